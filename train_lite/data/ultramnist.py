"""UltraMNIST: digits of very different size on a large black canvas; the class is their sum ('UltraMNIST classification', Gupta et
al. 2022, arXiv 2206.12681).

    python -m train_lite.data.ultramnist --mnist FOLDER --out FOLDER --side 512 --train 2800 --test 280

FOLDER holds MNIST's four idx files, gzipped or not. Train and val are drawn from its training digits, test from its test digits. Writes
OUT/{train,val,test}/SUM/NNNNNN.png and OUT/ultramnist.json with the canvas, seed and counts: a set drawn at 512 px is far easier
than one drawn at 4000 px and shrunk."""
import gzip
import json
import os
import shutil
import struct
import sys
import zlib
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
from PIL import Image

from edge.command import guarded, parse, say, written
from edge.errors import BadFile, UsageError
from train_lite.data.dataset import SPLITS, demand_empty

SIDE = 28
SUMS = range(28)        # of 3 to 5 digits
SCALES = np.arange(1, 10)
WEIGHTS = np.array([5, 4, 3, 2, 1, 1, 2, 3, 4]) / 25.0  # of the scales: small and large are frequent
TRIES = 10000           # to place a digit, before the canvas counts as too small


class DrawConfig(NamedTuple):
    mnist: str = ""
    out: str = ""
    side: int = 512
    canvas: int = 0
    sums: int = 28
    train: int = 2800
    val: int = 280
    test: int = 280
    seed: int = 0
    json: bool = False
    debug: bool = False


HELPS = {
    "mnist": "folder with MNIST's idx files",
    "out": "folder to write",
    "side": "px, side of the images",
    "canvas": "px, side of the canvas that digits are placed on, brought to --side afterwards; published: 4000; 0: --side",
    "sums": "classes: sums from 0 to this, less one; published: 28, or 10",
    "train": "images, the same number of every class",
    "val": "images, from the training digits too",
    "test": "images, from the test digits",
    "seed": "of all that is random",
    "json": "print one JSON object on stdout at the end",
    "debug": "show the traceback of an error",
}


def read_idx(folder, name):
    """The array in an idx file, gzipped or not. Raises BadFile."""
    for path in (os.path.join(folder, name), os.path.join(folder, name + ".gz")):
        if os.path.isfile(path):
            try:
                with (gzip.open if path.endswith(".gz") else open)(path, "rb") as handle:
                    magic, count = struct.unpack(">II", handle.read(8))
                    shape = (count,) + (struct.unpack(">II", handle.read(8)) if magic == 2051 else ())
                    if magic not in (2049, 2051):
                        raise ValueError("its magic number is %d, expected 2049 or 2051" % magic)
                    return np.frombuffer(handle.read(), np.uint8).reshape(shape)
            except (OSError, EOFError, ValueError, struct.error, zlib.error) as exc:
                raise BadFile("%s is damaged or no idx file: %s" % (path, exc)) from exc
    raise BadFile("no %s or %s.gz in %s" % (name, name, folder))


def digits(folder, part):
    """The digits of a part, 'train' or 't10k': list over 0..9 of (N, 28, 28) uint8."""
    images, labels = read_idx(folder, part + "-images-idx3-ubyte"), read_idx(folder, part + "-labels-idx1-ubyte")
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1] or set(np.unique(labels)) != set(range(10)):
        raise BadFile("the %s digits in %s: images of shape %s and labels of shape %s, which are %s; expected (N, %d, %d), (N,) and every digit "
                      "from 0 to 9. Give the folder of all MNIST files"
                      % (part, folder, images.shape, labels.shape, np.unique(labels).tolist()[:12], SIDE, SIDE))
    return [images[labels == digit] for digit in range(10)]


def multisets(total):
    """All sorted sets of 3, 4 or 5 digits with this sum."""
    return [chosen for count in (3, 4, 5) for chosen in combinations_with_replacement(range(10), count) if sum(chosen) == total]


def enlarged(digit, rng):
    """A digit (28, 28) at a random scale: 14, 28, 56, ..., 252 px."""
    scale = int(rng.choice(SCALES, p=WEIGHTS))
    if scale > 1:
        return digit.repeat(scale, axis=0).repeat(scale, axis=1)
    return digit[::2, ::2] if rng.rand() < 0.5 else digit


def draw(total, pool, side, rng):
    """A canvas (side, side) uint8 whose digits, none of which touches another, have this sum. Raises UsageError where they do not
    fit. pool: as of digits()."""
    choices = multisets(total)
    canvas, boxes = np.zeros((side, side), np.uint8), []
    for value in choices[rng.randint(len(choices))]:
        digit = pool[value][rng.randint(len(pool[value]))]
        for _ in range(TRIES):
            shown = enlarged(digit, rng)
            size = len(shown)
            if size > side:
                continue
            y, x = rng.randint(0, side - size + 1, 2)
            if all(y > b or a > y + size or x > d or c > x + size for a, c, b, d in boxes):
                break
        else:
            raise UsageError("--canvas %d is too small for %d digits; published: 4000, or 512" % (side, len(boxes) + 1))
        boxes.append((y, x, y + size, x + size))
        canvas[y:y + size, x:x + size] = shown
    return canvas


@guarded
def main(argv):
    config = parse(DrawConfig, argv, "python -m train_lite.data.ultramnist", __doc__, HELPS)
    for name in ("mnist", "out"):
        if not getattr(config, name):
            raise UsageError("--%s is missing. Type: python -m train_lite.data.ultramnist --mnist FOLDER --out FOLDER" % name)
    canvas = config.canvas or config.side
    for name, value, low, high in (("side", config.side, 64, 65535), ("canvas", canvas, config.side, 65535), ("sums", config.sums, 2, 28),
                                   ("train", config.train, config.sums, 10 ** 7), ("val", config.val, 0, 10 ** 7), ("test", config.test, 0, 10 ** 7),
                                   ("seed", config.seed, 0, 2 ** 32 - 1)):
        if not low <= value <= high:
            raise UsageError("--%s is %d, expected %d to %d" % (name, value, low, high))
    stamp = os.path.join(config.out, "ultramnist.json")
    demand_empty(config.out, "" if os.path.exists(stamp) else ", perhaps a set that was stopped")
    pools = {"train": digits(config.mnist, "train"), "test": digits(config.mnist, "t10k")}
    try:
        for number, split in enumerate(SPLITS):
            pool, count = pools["test" if split == "test" else "train"], getattr(config, split)
            for index in range(count):
                rng, total = np.random.RandomState([config.seed, number, index]), index % config.sums
                folder = os.path.join(config.out, split, "%d" % total)
                os.makedirs(folder, exist_ok=True)
                picture = Image.fromarray(draw(total, pool, canvas, rng))
                picture = picture if canvas == config.side else picture.resize((config.side, config.side), Image.BOX)
                picture.save(os.path.join(folder, "%06d.png" % index))
            say("%s: %d images of %d px" % (split, count, config.side))
    except BaseException:  # the folder is as it was, and the command can be typed again
        for split in SPLITS:
            shutil.rmtree(os.path.join(config.out, split), ignore_errors=True)
        raise
    say("a mirrored digit is another one: train with --no-augment")
    facts = dict(config._asdict(), canvas=canvas)
    with written(stamp) as handle:  # last: a set without it is not complete
        json.dump(facts, handle, indent=1)
    if config.json:
        print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
