"""Large images with boxes, made of small ones: a grid of cells, one image in each.

    python -m train_lite.data.canvas --data SRC --out DIR --grid 6 --cell 682

Writes DIR/images/*.png, DIR/train.json and, with --val, DIR/val.json: COCO files with the name of the source image in every cell.
Every source image is drawn before any comes again; one larger than a cell is shrunk, its shape kept, and none is enlarged.
Holds one row of cells at a time, however many rows there are."""
import json
import os
import shutil
import sys
from typing import NamedTuple

import numpy as np

from edge.command import guarded, parse, say, written
from edge.errors import BadFile, UsageError, raise_all
from edge.images import PngWriter, fitted_size, open_photo, photo_header, resized, whole
from train_lite.data import boxed
from train_lite.data.dataset import SPLITS, demand_empty, demand_sizes

GREY = 250  # of what no image covers
LONGEST = 65535  # px, of a canvas


class CanvasConfig(NamedTuple):
    data: str = ""
    out: str = ""
    count: int = 0
    grid: int = 6
    cell: int = 682
    seed: int = 0
    split: str = "train"
    val: int = 0
    json: bool = False
    debug: bool = False


HELPS = {
    "data": "images with boxes: COCO, YOLO or Pascal VOC",
    "out": "folder to write, new or empty",
    "count": "canvases for training; 0: until every image is used",
    "grid": "cells across and down",
    "cell": "px, side of a cell",
    "seed": "of the order in which images are drawn",
    "split": "split of --data that the training canvases are made of",
    "val": "canvases for validation, of the split val, or of a fifth of the training images where there is none",
    "json": "print one JSON object on stdout at the end",
    "debug": "show the traceback of an error",
}


def drawn(pairs, count, rng):
    """`count` of the pairs, at random; none again before all are used."""
    order = []
    while len(order) < count:
        order += [pairs[index] for index in rng.permutation(len(pairs))]
    return order[:count]


def fitted(pair, cell):
    """The pixels of an image (h, w, 3) uint8, neither side above `cell` px; the image itself where that holds."""
    picture = open_photo(pair.image)
    if max(picture.height, picture.width) <= cell:
        return whole(picture)
    return whole(resized(picture, *fitted_size(picture.height, picture.width, "long", cell)))


def paint(path, pairs, grid, cell):
    """Writes one canvas, a PNG of grid * cell px. pairs: grid * grid, row by row. Returns their cells: dicts of source, row, col
    and the height and width (px) that the image has there, at the cell's top left."""
    cells = []
    with PngWriter(path, grid * cell, grid * cell, 3) as png:
        for row in range(grid):
            band = np.full((cell, grid * cell, 3), GREY, np.uint8)
            for col, pair in enumerate(pairs[row * grid:(row + 1) * grid]):
                pixels = fitted(pair, cell)
                band[:pixels.shape[0], col * cell:col * cell + pixels.shape[1]] = pixels
                cells.append({"source": pair.name, "row": row, "col": col, "height": pixels.shape[0], "width": pixels.shape[1]})
            png.write(band)
    return cells


def moved(box, place, cell):
    """COCO's [x, y, width, height] (px of the canvas) of a Box on the image in this place."""
    return [place["col"] * cell + box.x0 * place["width"], place["row"] * cell + box.y0 * place["height"],
            (box.x1 - box.x0) * place["width"], (box.y1 - box.y0) * place["height"]]


def make(folder, split, pairs, classes, count, config, rng):
    """Writes `count` canvases of these pairs into a folder. Returns the COCO object that describes them."""
    images, notes, size = [], [], config.grid ** 2
    order = drawn(pairs, count * size, rng)
    for index in range(count):
        own, name = order[index * size:(index + 1) * size], "%s_%06d.png" % (split, index)
        cells = paint(os.path.join(folder, name), own, config.grid, config.cell)
        side = config.grid * config.cell
        images.append({"id": index + 1, "file_name": name, "width": side, "height": side, "cells": cells})
        for pair, place in zip(own, cells):
            for box in pair.boxes:
                bbox = moved(box, place, config.cell)
                notes.append({"id": len(notes) + 1, "image_id": index + 1, "category_id": box.label + 1, "bbox": bbox,
                              "area": bbox[2] * bbox[3], "iscrowd": int(box.crowd)})
    say("%s: %d canvases of %d px with %d boxes, of %d images"
        % (split, count, config.grid * config.cell, len(notes), len(pairs)))
    return {"info": {"description": "made by train_lite.data.canvas", "grid": config.grid, "cell": config.cell, "seed": config.seed},
            "images": images, "annotations": notes,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(classes.names)]}


@guarded
def main(argv):
    config = parse(CanvasConfig, argv, "python -m train_lite.data.canvas", __doc__, HELPS, {"split": SPLITS})
    for name in ("data", "out"):
        if not getattr(config, name):
            raise UsageError("--%s is missing. Type: python -m train_lite.data.canvas --data SRC --out DIR" % name)
    for name, low, high in (("grid", 1, 256), ("cell", 16, LONGEST // max(1, config.grid)), ("count", 0, 10 ** 6),
                            ("val", 0, 10 ** 6), ("seed", 0, 2 ** 32 - 1)):
        if not low <= getattr(config, name) <= high:
            raise UsageError("--%s is %d, expected %d to %d" % (name, getattr(config, name), low, high))
    if config.val and config.split == "val":
        raise UsageError("--val and --split val would draw from the same images. Give one of them")
    demand_empty(config.out)
    pairs, classes = boxed.find(config.data, 0.2 if config.val else 0.0)
    pools = {split: [pair for pair in pairs if pair.split == wanted]
             for split, wanted in (("val", "val"), ("train", config.split))}
    if not pools["train"]:
        raise BadFile("%s has no images of the split %s; expected one or more. Give another --split"
                      % (config.data, config.split))
    headers = [photo_header(pair.image) for pair in pairs]
    demand_sizes(pairs, headers)
    raise_all([pair.image for pair, header in zip(pairs, headers) if not header], "%s has images that cannot be opened" % config.data,
              "Copy them again from their source, or take them off the list.")
    counts = {"train": config.count or -(-len(pools["train"]) // config.grid ** 2), "val": config.val}
    folder, stamps = os.path.join(config.out, "images"), []
    os.makedirs(folder)
    try:
        made = []
        for number, split in enumerate(("val", "train")):
            rng = np.random.RandomState([config.seed, number])
            made += [(split, make(folder, split, pools[split], classes, counts[split], config, rng))] if counts[split] else []
        for split, described in made:  # train.json last: a set without it is not complete
            stamps.append(os.path.join(config.out, split + ".json"))
            with written(stamps[-1]) as handle:
                json.dump(described, handle)
    except BaseException:  # the folder is as it was, and the command can be typed again
        shutil.rmtree(folder, ignore_errors=True)
        for stamp in filter(os.path.exists, stamps):
            os.remove(stamp)
        raise
    if config.json:
        print(json.dumps(dict(config._asdict(), **counts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
