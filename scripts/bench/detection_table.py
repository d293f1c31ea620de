"""What a detector learns: 16 images by heart; and canvases of many images, in patches and shrunk, in the same number of steps.

    python scripts/bench/detection_table.py --set FOLDER/coco_small --work FOLDER [--epochs 60] [--canvases 6] [--grid 6] [--cell 128]
        [--rows overfit,patches,shrunk] [--width 16] [--seeds 1]

overfit: the 16 images whose smallest box is largest, at 256 px, scored on themselves. patches, shrunk: canvases of --grid x --grid of all
images, scored on other arrangements of the same images: so few images teach nothing about others. shrunk sees a canvas at the size of one
patch, 256 px, and has four times the epochs: as many steps."""
import argparse
import os
import subprocess
import sys

import numpy as np

from trainings import ROOT, summary

COLUMNS = ("ap", "ap50", "ap_small", "ap_medium", "ap_large")


def beside(source, folder, count):
    """`count` images of a set in YOLO form (0: all), as train and as val of a new one, by links."""
    names = sorted(os.path.splitext(name)[0] for name in os.listdir(os.path.join(source, "labels")))

    def smallest(name):
        with open(os.path.join(source, "labels", name + ".txt")) as handle:
            return min(min(map(float, line.split()[3:])) for line in handle)

    for name in sorted(names, key=smallest)[-count:]:
        for split in ("train", "val"):
            for part, ending in (("images", ".jpg"), ("labels", ".txt")):
                place = os.path.join(folder, split, part)
                os.makedirs(place, exist_ok=True)
                link(os.path.join(source, part, name + ending), os.path.join(place, name + ending))
    link(os.path.join(source, "classes.txt"), os.path.join(folder, "classes.txt"))
    return folder


def link(source, path):
    if not os.path.lexists(path):
        os.symlink(os.path.abspath(source), path)


def canvases(given, source):
    folder = os.path.join(given.work, "canvases")
    if not os.path.exists(os.path.join(folder, "train.json")):
        subprocess.check_call([sys.executable, "-m", "train_lite.data.canvas", "--data", source, "--out", folder, "--count", str(given.canvases),
                               "--val", "2", "--grid", str(given.grid), "--cell", str(given.cell)], env=dict(os.environ, PYTHONPATH=ROOT))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--rows", default="overfit,patches,shrunk")
    for name, value in (("epochs", 60), ("canvases", 6), ("grid", 6), ("cell", 128), ("width", 16), ("seeds", 1)):
        parser.add_argument("--" + name, type=int, default=value)
    given = parser.parse_args()
    given.work = os.path.abspath(given.work)
    shared = ["--width", given.width, "--no-augment", "--weight-decay", 0, "--threads", 1]
    canvas = ["--model", "fcos-mobilenetv2", "--res", given.grid * given.cell, "--patch", 256, "--max-boxes", 1000]
    rows = {"overfit": (["--model", "fcos-resnet50", "--res", 256, "--patch", 128], 1), "patches": (canvas, 1),
            "shrunk": (canvas + ["--mode", "down"], 4)}
    print("| row | %s | peak MiB | minutes |\n|%s" % (" | ".join(name.replace("ap", "AP").replace("_", " ") for name in COLUMNS), "---|" * (len(COLUMNS) + 3)))
    for row in given.rows.split(","):
        words, times = rows[row]
        data = beside(given.set, os.path.join(given.work, "few" if row == "overfit" else "all"), 16 if row == "overfit" else 0)
        data = data if row == "overfit" else canvases(given, data)
        epochs = times * given.epochs
        done = [summary(os.path.join(given.work, "runs"), "%s-%d" % (row, seed), ["--data", data, "--epochs", epochs, "--validate-every", epochs // 4,
                                                                                "--seed", seed] + words + shared) for seed in range(given.seeds)]
        means = [100 * np.mean([np.nan if one["val"][name] is None else one["val"][name] for one in done]) for name in COLUMNS]
        print("| %s | %s | %.0f | %.1f |" % (row, " | ".join("%.1f" % mean for mean in means), np.mean([one["peak_mib"] for one in done]),
                                             np.mean([one["seconds"] for one in done]) / 60))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
