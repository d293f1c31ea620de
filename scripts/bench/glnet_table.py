"""GLNet against its two branches alone, on a real set: scores, memory and minutes, mean and spread over seeds.

    python scripts/bench/glnet_table.py --sets FOLDER --work FOLDER [--set dubai_aerial] [--rows global,local,glnet]
        [--model glnet-mobilenetv2] [--res 512] [--patch 128] [--width 8] [--epochs 10] [--seeds 1] [--threads 1]
        [-- further words for train_lite]

Rows: global (--mode down: whole images, shrunk to one patch), local (--mode tiled: tiles that see nothing else), glnet (stages
1, 2 and 3, --epochs each, so three times as many in all). Scored is the last epoch's net on the test images: nothing is chosen
on them. Peak and minutes are those of training, of glnet all three stages. Runs that are finished in --work are read, not
repeated."""
import argparse
import os
import sys

import numpy as np

import real_sets
from trainings import summary

ROWS = {"global": (["--mode", "down"], ("",)), "local": (["--mode", "tiled"], ("",)), "glnet": ([], ("", "-2", "-3"))}


def figures(done):
    """Of a summary: mIoU and boundary F1 in percent, MiB, minutes."""
    test = done["test"]
    return [100 * test["pooled"]["iou"], 100 * test["boundary_f1"], done["peak_mib"], done["seconds"] / 60]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", required=True, help="folder that holds the real sets")
    parser.add_argument("--work", required=True)
    parser.add_argument("--set", choices=sorted(real_sets.SETS), default="dubai_aerial")
    parser.add_argument("--rows", default="global,local,glnet")
    parser.add_argument("--model", default="glnet-mobilenetv2")
    for name, value in (("seeds", 1), ("res", 512), ("patch", 128), ("width", 8), ("epochs", 10), ("threads", 1)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    given.work = os.path.abspath(given.work)
    pairs = real_sets.written(given.set, given.sets, given.work)
    print("%s, %d px, patch %d px, %s width %d, %d epochs of each stage, %d seed(s), %s" % (
        given.set, given.res, given.patch, given.model, given.width, given.epochs, given.seeds,
        " ".join(given.rest) or "other flags at their defaults"))
    print("| row | mIoU | boundary F1 | IoU per class | peak MiB | minutes |\n|---|---|---|---|---|---|")
    for row in given.rows.split(","):
        words, stages = ROWS[row]
        done = [summary(os.path.join(given.work, "runs"), "%s-%s-%d" % (given.set, row, seed), [
            "--data", pairs, "--val-share", 0, "--cache", os.path.join(given.work, "cache"), "--model", given.model,
            "--width", given.width, "--res", given.res, "--patch", given.patch, "--epochs", given.epochs, "--seed", seed,
            "--threads", given.threads] + words + given.rest, stages) for seed in range(given.seeds)]
        found = np.array([figures(one) for one in done])
        means, spreads = found.mean(axis=0), found.std(axis=0)
        classes = np.mean([[np.nan if v is None else 100 * v for v in one["test"]["per_class_iou"]] for one in done], axis=0)
        print("| %s | %.1f ± %.1f | %.1f ± %.1f | %s | %.0f | %.1f |" % (
            row, means[0], spreads[0], means[1], spreads[1], " ".join("%.0f" % v for v in classes), means[2], means[3]))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
