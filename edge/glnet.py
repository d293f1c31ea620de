"""From a picture to class scores by two nets that see each other's maps: one the whole image, made small, one its tiles ('Collaborative
Global-Local Networks', Chen et al. 2019, arXiv 1905.06368, section 3; docs/method.md, section 8). The one path that training's
evaluation, the parity check and the runtime share.

Maps have four levels, of a quarter to a thirty-second of the pixels each way. Between the two nets they are resized by a product
with two matrices, so that graphs need nothing but MatMul."""
import functools
from typing import NamedTuple

import numpy as np

from edge import scores, tiles
from edge.geometry import bilinear_matrix
from edge.scores import Host

STRIDES = (4, 8, 16, 32)  # px between the cells of a level; a tile's side is a multiple of the last


class Recipe(NamedTuple):
    """An edge.scores.Recipe whose overview is of the tile's size, and what of a GLNet is computed."""
    resize: str
    resize_px: int
    tile: int
    overlap: int
    batch: int
    overview: int
    mean: tuple
    std: tuple
    merges: bool   # whether the tiles' maps go back to the whole image's net
    coarse: float  # probability of foreground that a tile must hold somewhere to be worked on; 0: every tile is


def footprint(first, side, size, cells):
    """(first cell, cells) of a map of `cells` that px first .. first + side of `size` px cover: rounded, as published. Of a tile larger
    than the image the cells go on beyond the map."""
    count = max(1, int(np.round(cells * side / float(size))))
    return min(int(np.round(first / float(size) * cells)), max(0, cells - count)), count


def crops(boxes, height, width, tile):
    """Matrices that bring the maps of an image of height x width px to its tiles `boxes` (n, 4): rows, cols (n, R) float32, of
    all levels one after another (see split), each (cells of the tile, cells of the image); rows @ map @ cols.T."""
    def matrix(_axis, cells, first, count):
        found = np.zeros((cells, max(cells, count)), np.float32)
        found[:, first:first + count] = bilinear_matrix(cells, count)
        found[:, cells - 1] += found[:, cells:].sum(axis=1)  # beyond the image is what is at its border
        return found[:, :cells]
    return _of_boxes(boxes, (height, width), tile, matrix)


def places(boxes, laid):
    """Matrices that bring the maps of the tiles `boxes` to their place in those of the image, (cells of the image, cells of the
    tile), otherwise as crops(). They are divided by the number of tiles over a cell, so that the sum over all tiles of `laid`, a
    tiles.Plan, is their mean."""
    def matrix(axis, cells, first, count):
        found = np.zeros((max(cells, count), cells), np.float32)
        found[first:first + count] = bilinear_matrix(count, cells)
        return found[:cells] / over[axis, cells][:, None]

    over = _tiles_over(laid)
    return _of_boxes(boxes, (laid.height, laid.width), laid.tile, matrix)


@functools.lru_cache(maxsize=1)
def _tiles_over(laid):
    """{(axis, cells of a map): how many tile rows or columns lie over each cell, at least 1}. Asked for with every chunk of an image."""
    over = {}
    for axis, (origins, size) in enumerate(((laid.ys, laid.height), (laid.xs, laid.width))):
        for cells in (laid.tile // stride for stride in STRIDES):
            spans = [footprint(origin, laid.tile, size, cells) for origin in origins]
            over[axis, cells] = sum((np.arange(cells) >= first) & (np.arange(cells) < first + count) for first, count in spans).clip(1)
    return over


def _of_boxes(boxes, size, tile, matrix):
    return tuple(np.stack([np.concatenate([
        matrix(axis, tile // stride, *footprint(box[axis], tile, size[axis], tile // stride)).ravel() for stride in STRIDES])
        for box in boxes]).astype(np.float32) for axis in (0, 1))


def split(packed, tile, channels=None):
    """What lies level after level in (n, cells): one array for each level, (n, side, side) of matrices, (n, channels, side, side) of
    maps with so many `channels` (per level). numpy or torch."""
    found, first = [], 0
    for level, stride in enumerate(STRIDES):
        shape = (int(tile) // stride,) * 2 if channels is None else (channels[level], tile // stride, tile // stride)
        stop = first + int(np.prod(shape))
        found.append(packed[:, first:stop].reshape((int(packed.shape[0]),) + shape))
        first = stop
    return found


def score_bands(picture, recipe, net, lap=lambda stage: None, pixels=None):
    """Yield (y0, scores) as edge.scores.score_bands. recipe: a Recipe. net: who computes, an object with

    look(pixels (1, 3, p, p)) -> (maps, deep, scores (1, C, p / 4, p / 4)) of the whole image,
    work(pixels (n, 3, p, p), maps, rows (n, R), cols (n, R)) -> part (n or more, C, p / 4, p / 4) of the tiles,
    merge(the same, rows (n, R), cols (n, R) of places(), merged) -> (part, merged), where merged is None at first,
    deepen(pixels (1, 3, p, p), merged) -> deep, of recipes that merge, and
    fuse(part, deep, rows (n, r), cols (n, r)) -> scores (n or more, C, p, p), r: of the first level.

    maps, deep and merged are only passed on, and of one size whatever the picture's. Recipes that merge keep the parts of all tiles,
    p * p / 4 bytes of each and class."""
    pixels = pixels or Host()
    lap, tile = pixels.timed(lap), recipe.tile
    view = scores.view_of(picture, recipe, pixels)
    small = scores.prepared_overview(view, recipe, lap, pixels)
    maps, deep, rough = net.look(small)
    lap("run")
    laid, parts = tiles.plan(view.height, view.width, tile, recipe.overlap), {}
    boxes = laid.boxes()
    worked = boxes[proposed(boxes, laid, rough[0], recipe.coarse)]
    if recipe.merges and len(worked):
        merged = None
        for chunk, ready in _prepared(view, worked, recipe, lap, pixels):
            part, merged = net.merge(ready, maps, *crops(chunk, view.height, view.width, tile) + places(chunk, laid) + (merged,))
            parts.update(zip(map(tuple, chunk), np.array(part)))
            lap("run")
        deep = net.deepen(small, merged)
        lap("run")
    chosen, first_level = set(map(tuple, worked)), (tile // STRIDES[0]) ** 2

    def of_row(row):
        lap("blend")
        for first in range(0, len(row), recipe.batch):
            some = [box for box in row[first:first + recipe.batch] if tuple(box) in chosen]
            fine = iter(())
            for chunk, ready in _prepared(view, some, recipe, lap, pixels, read=not recipe.merges):  # one, or none
                rows, cols = crops(chunk, view.height, view.width, tile)
                part = np.stack([parts.pop(tuple(box)) for box in chunk]) if recipe.merges else net.work(ready, maps, rows, cols)
                fine = iter(net.fuse(part, deep, rows[:, :first_level], cols[:, :first_level]))
                lap("run")
            for box in row[first:first + recipe.batch]:
                yield next(fine) if tuple(box) in chosen else _enlarged(rough[0], box, view)

    for band in scores.blended(picture, laid, of_row, lap, pixels):
        yield band


def proposed(boxes, laid, rough, coarse):
    """Which of the tiles `boxes` (n, 4) of a tiles.Plan are worked on, (n,) bool: those where the scores (1, h, w) of the whole
    image give foreground a probability of `coarse` or more somewhere; all when that is 0."""
    if not coarse:
        return np.ones(len(boxes), bool)
    likely = 1 / (1 + np.exp(-np.clip(np.asarray(rough[0], np.float64), -60, 60))) >= coarse
    sides = list(zip((laid.height, laid.width), likely.shape))
    spans = [[footprint(box[axis], laid.tile, *sides[axis]) for axis in (0, 1)] for box in boxes]
    return np.array([likely[y:y + rows, x:x + cols].any() for (y, rows), (x, cols) in spans])


def _prepared(view, boxes, recipe, lap, pixels, read=True):
    """Yield (chunk of boxes (n, 4), its pixels, None unless read)."""
    for first in range(0, len(boxes), recipe.batch):
        chunk = np.asarray(boxes[first:first + recipe.batch])
        ready = pixels.prepared(view, chunk, recipe) if read else None
        lap("prepare")
        yield chunk, ready


def _enlarged(rough, box, view):
    """The whole image's scores (C, h, w) at one of its tiles: (C, p, p)."""
    rows, cols = scores.interpolation(box[None], view.height, view.width, rough.shape[1])
    return np.matmul(np.matmul(rows[0], rough), cols[0].T)
