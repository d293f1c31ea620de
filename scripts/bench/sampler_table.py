"""Every way to spend the same few pixels, trained alike: a table of full-resolution scores, mean and spread over seeds.

    python scripts/bench/sampler_table.py --work FOLDER [--data DIR] [--res 1024] [--task-sizes 128x128,64x64] [--epochs 60]
        [--seeds 3] [--samplers uniform,marin,edge,deform,edge-oracle] [--width 8] [--threads 1] [-- further words for train_lite]

Without --data a seeded set is drawn into --work: small discs, squares and triangles, crowded in one or two places of a large empty
ground. Scores are of the best net on the test images, on validation images where there are none."""
import argparse
import json
import os
import sys

import numpy as np
from PIL import Image, ImageDraw

from trainings import summary

KINDS = ("ground", "disc", "square", "triangle")
TINTS = ((40, 0, -40), (0, 0, 0), (-40, 0, 40))
SPLITS = (("train", 24), ("val", 6), ("test", 8))


def draw(rng, side, image_path, mask_path):
    """One image of side x side px with its mask of class ids."""
    coarse = Image.fromarray(rng.randint(70, 150, (6, 6, 3)).astype(np.uint8)).resize((side, side), Image.BICUBIC)
    pixels = np.asarray(coarse) + rng.normal(0, 6, (side, side, 3))
    image, mask = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), Image.new("L", (side, side), 0)
    pens = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    for _ in range(rng.randint(1, 3)):  # crowds
        y, x = rng.uniform(0.15, 0.85, 2) * side
        for _ in range(rng.randint(8, 20)):
            kind, half = rng.randint(1, 4), rng.uniform(0.006, 0.013) * side
            cy, cx = y + rng.normal(0, 0.05) * side, x + rng.normal(0, 0.05) * side
            tone = rng.uniform(150, 210) + np.array(TINTS[kind - 1])
            for pen, fill in zip(pens, (tuple(tone.astype(int).tolist()), int(kind))):
                if kind == 1:
                    pen.ellipse((cx - half, cy - half, cx + half, cy + half), fill=fill)
                elif kind == 2:
                    pen.rectangle((cx - half, cy - half, cx + half, cy + half), fill=fill)
                else:
                    pen.polygon([(cx, cy - 1.3 * half), (cx - 1.2 * half, cy + half), (cx + 1.2 * half, cy + half)], fill=fill)
    image.save(image_path)
    mask.save(mask_path)


def made(folder, side):
    """The seeded set, drawn once."""
    if not os.path.exists(os.path.join(folder, "classes.json")):
        rng = np.random.RandomState(4)
        for split, count in SPLITS:
            for index in range(count):
                paths = [os.path.join(folder, split, kind, "%02d.png" % index) for kind in ("image", "mask")]
                for path in paths:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                draw(rng, side, *paths)
        with open(os.path.join(folder, "classes.json"), "w", encoding="utf-8") as handle:
            json.dump({"classes": [{"name": name} for name in KINDS]}, handle)
    return folder


def train(given, data, sampler, task, seed):
    """One training. Returns its summary."""
    return summary(os.path.join(given.work, "runs"), "%s-%s-%d" % (sampler, task, seed), [
        "--data", data, "--res", given.res, "--sampler", sampler, "--task-size", task, "--epochs", given.epochs, "--seed", seed,
        "--width", given.width, "--threads", given.threads] + given.rest)


def row(done):
    """The figures of a run, in percent."""
    found = done["test"] or done["val"]
    parts = found["pooled"]["iou"], found.get("boundary_f1"), (found.get("low_res") or {}).get("iou"), (
        found.get("ceiling") or {}).get("iou")
    return [float("nan") if part is None else 100 * part for part in parts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True)
    parser.add_argument("--data", default="")
    parser.add_argument("--task-sizes", default="128x128,64x64")
    parser.add_argument("--samplers", default="uniform,marin,edge,deform,edge-oracle")
    for name, value in (("res", 1024), ("epochs", 60), ("seeds", 3), ("width", 8), ("threads", 1)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    data = os.path.abspath(given.data) if given.data else made(os.path.join(os.path.abspath(given.work), "set"), given.res)
    given.work = os.path.abspath(given.work)
    print("| task px | sampler | mIoU | boundary F1 | mIoU at task size | mIoU ceiling | IoU per class |\n|---|---|---|---|---|---|---|")
    for task in given.task_sizes.split(","):
        for sampler in given.samplers.split(","):
            runs = [train(given, data, sampler, task, seed) for seed in range(given.seeds)]
            table = np.array([row(run) for run in runs])
            classes = np.array([[np.nan if v is None else 100 * v for v in (run["test"] or run["val"])["per_class_iou"]] for run in runs])
            cells = ["%.1f ± %.1f" % (mean, spread) for mean, spread in zip(table.mean(axis=0), table.std(axis=0))]
            print("| %s | %s | %s | %s |" % (task, sampler, " | ".join(cells), " ".join("%.0f" % v for v in classes.mean(axis=0))))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
