"""Train the comparison on a real set, equal epochs and width for every row, and print the scores on its test images:

    python scripts/bench/real_table.py chasedb1 --sets FOLDER --res 1024 --epochs 40 --width 8 --seeds 1
    python scripts/bench/real_table.py hrf_av --sets FOLDER --res 2048 --rows down,ours --epochs 20 --width 8
    python scripts/bench/real_table.py chasedb1 --sets FOLDER --rows ours,frozen-large --seeds 3

Rows: full (whole image), down (shrunk to one patch), no-global (patches alone), ours (patches and global patch),
frozen-large (ours with freeze-and-fold of the large maps' norms), frozen-all (of all norms). The last epoch's net is scored: nothing is chosen on the test images.
Other flags go to train_lite as they are. Runs that are finished in --out are read, not repeated."""
import argparse
import os

import numpy as np

import real_sets
from trainings import summary

ROWS = {"full": ["--mode", "full"], "down": ["--mode", "down"], "no-global": ["--global-patch", "none"], "ours": [],
        "frozen-large": ["--freeze-at", "0.5"], "frozen-all": ["--freeze-at", "0.5", "--freeze", "all"]}
NAMES = ("acc", "f1", "iou", "bacc", "plr", "nlr")


def run(args, pairs, row, seed, extra):
    """Train one row with one seed, unless done. Returns its summary."""
    return summary(args.out, "%s-%d-%s-%d" % (args.set, args.res, row, seed), [
        "--data", pairs, "--val-share", 0, "--cache", os.path.join(args.out, "cache"), "--res", args.res, "--width", args.width,
        "--epochs", args.epochs, "--seed", seed] + ROWS[row] + extra)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(real_sets.SETS))
    parser.add_argument("--sets", required=True, help="folder that holds the real sets")
    parser.add_argument("--res", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--rows", default="full,down,no-global,ours")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", default=os.path.join("runs", "table"))
    args, extra = parser.parse_known_args()
    os.makedirs(args.out, exist_ok=True)
    pairs = os.path.join(args.out, args.set + ".csv")
    real_sets.write(args.set, args.sets, pairs)
    print("%s, %d px, U-Net width %d, %d epochs, %d seed(s), %s" % (args.set, args.res, args.width, args.epochs, args.seeds,
                                                                 " ".join(extra) or "other flags at their defaults"))
    print("| row | how | " + " | ".join(NAMES) + " | minutes |")
    print("|---|---|" + "---|" * (len(NAMES) + 1))
    for row in args.rows.split(","):
        done = [run(args, pairs, row, seed, extra) for seed in range(args.seeds)]
        for how in ("pooled", "paper_compat"):
            cells = []
            for name in NAMES:
                scores = [d["test"][how][name] for d in done]
                cells.append("-" if None in scores else "%.1f" % (np.mean(scores) * (100 if name in ("acc", "f1", "iou", "bacc") else 1)))
            print("| %s | %s | %s | %.1f |" % (row, how, " | ".join(cells), np.mean([d["seconds"] for d in done]) / 60))
        print("  F1 by seed: %s" % ", ".join("%.1f" % (100 * d["test"]["pooled"]["f1"]) for d in done))


if __name__ == "__main__":
    main()
