"""Full-image training, PatchGD and ours on UltraMNIST at 512 px, equal epochs: accuracy, kappa and memory, mean and spread over seeds.

    python scripts/bench/ultramnist_table.py --mnist FOLDER --work FOLDER [--train 300] [--test 200] [--sums 3] [--epochs 12]
        [--seeds 3] [--width 8] [--model mobilenetv2] [--head small] [--norm batch] [--batch 8] [--rows full,patchgd,ours]

Patches of 256 px (four of them), one drawn per image and inner iteration (25 %), three inner iterations, batch norm as published.
Scored is the last epoch's net on the test digits: nothing is chosen on the test images."""
import argparse
import csv
import os
import subprocess
import sys

import numpy as np

from trainings import ROOT, demand_same, summary

ROWS = {"full": ["--mode", "full"], "patchgd": ["--global-patch", "none"], "ours": ["--global-patch", "add"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", required=True)
    parser.add_argument("--work", required=True)
    for name, value in (("model", "mobilenetv2"), ("head", "small"), ("norm", "batch"), ("rows", "full,patchgd,ours")):
        parser.add_argument("--" + name, default=value)
    for name, value in (("train", 300), ("test", 200), ("sums", 3), ("batch", 8), ("epochs", 12), ("seeds", 3), ("width", 8)):
        parser.add_argument("--" + name, type=int, default=value)
    given = parser.parse_args()
    data = os.path.join(os.path.abspath(given.work), "set")
    counts = ["--train", str(given.train), "--val", "0", "--test", str(given.test), "--sums", str(given.sums)]
    os.makedirs(given.work, exist_ok=True)
    demand_same(os.path.join(given.work, "set.flags"), " ".join(counts))
    if not os.path.exists(os.path.join(data, "ultramnist.json")):
        subprocess.check_call([sys.executable, "-m", "train_lite.data.ultramnist", "--mnist", given.mnist, "--out", data, "--side", "512"] + counts,
                              env=dict(os.environ, PYTHONPATH=ROOT))
    print("%d training and %d test images of %d sums, %s width %d, head %s, %s norm, batch %d, %d epochs, %d seeds" % (
        given.train, given.test, given.sums, given.model, given.width, given.head, given.norm, given.batch, given.epochs, given.seeds))
    print("| row | accuracy, % | kappa | test loss | training loss | peak MiB | minutes |\n|---|---|---|---|---|---|---|")
    for row in given.rows.split(","):
        found = []
        for seed in range(given.seeds):
            done = summary(os.path.join(given.work, "runs"), "%s-%d" % (row, seed), [
                "--data", data, "--val-share", 0, "--model", given.model, "--head", given.head, "--width", given.width, "--norm", given.norm,
                "--res", 512, "--patch", 256, "--patches", 1, "--inner", 3, "--batch", given.batch, "--no-augment",
                "--epochs", given.epochs, "--seed", seed, "--threads", 1] + ROWS[row])
            with open(os.path.join(done["run"], "metrics.csv"), newline="") as handle:
                learned = float(list(csv.DictReader(handle))[-1]["loss"])
            test = done["test"]
            found.append([100 * test["accuracy"], test["kappa"], test["val_loss"], learned, done["peak_mib"], done["seconds"] / 60])
        means, spreads = np.mean(found, axis=0), np.std(found, axis=0)
        print("| %s | %.1f ± %.1f | %.2f ± %.2f | %.2f ± %.2f | %.2f ± %.2f | %.0f | %.1f |" % (
            (row,) + tuple(value for pair in zip(means[:4], spreads[:4]) for value in pair) + (means[4], means[5])))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
