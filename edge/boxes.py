"""From a picture to boxes: the one path that training's evaluation, the parity check and the runtime share (FCOS, Tian et al. 2019,
arXiv 1904.01355, section 3). Tiles go through the encoder one by one; their features lie at their place in the map of every
level, and the head reads the maps window by window (docs/method.md, section 7).

Callers differ only in who computes a net, and pass it in as two functions, as for edge.scores."""
from typing import NamedTuple

import numpy as np

from edge import images, tiles
from edge.errors import BadFile
from edge.geometry import bilinear_matrix
from edge.scores import Host, encoded, encoded_overview, view_of

STRIDES = (8, 16, 32, 64, 128)  # px between the cells of a level; a tile's side is a multiple of the last
CELLS = 32                      # of a level, that the head computes at a time, each way
HALO = 5                        # cells around them that it looks at: five convolutions of 3x3
WINDOW = CELLS + 2 * HALO
FARTHEST = 8.0                  # of the logarithm of a distance in strides: what is beyond no image holds


class Rules(NamedTuple):
    """Which boxes are kept."""
    score: float    # least, 0..1
    overlap: float  # most IoU with a better box of the same class
    level: int      # most of a level, before overlaps are looked at
    limit: int      # most of a picture


def rules(limit, score=0.2):
    """The published Rules (torchvision's: 1000 of a level, 100 of a picture) for `limit` boxes of a picture, about ten cells of a level
    for each of them."""
    return Rules(score, 0.6, max(1000, 10 * limit), limit)


def layout(height, width, tile):
    """The tiles.Plan of an image: multiples of `tile` cover it, so that a level's cells are a tile's cells."""
    return tiles.plan(-(-height // tile) * tile, -(-width // tile) * tile, tile)


def sizes(height, width):
    """Per level the (rows, columns) of its map: cell i has its centre at px (i + 0.5) * stride."""
    return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]


def split(features, tile):
    """What an encoder gives of tiles, (n, C, cells), as one (n, C, side, side) per level. numpy or torch."""
    found, first = [], 0
    for stride in STRIDES:
        side = tile // stride
        found.append(features[:, :, first:first + side * side].reshape(tuple(features.shape[:2]) + (side, side)))
        first += side * side
    return found


def spread(level, height, width, side, y0, x0, y1, x1):
    """Matrices (rows (y1 - y0, side), cols (x1 - x0, side)) that bring a level of the global patch, side x side, to the cells
    y0..y1, x0..x1 of an image of height x width px: rows @ g @ cols.T."""
    stride = float(STRIDES[level])
    return bilinear_matrix(height / stride, side, y0, y1), bilinear_matrix(width / stride, side, x0, x1)


def windows(picture, recipe, encode, head, lap=lambda stage: None, pixels=None):
    """Yield (level, y, x, scores (classes + 5, h, w) float32) of all cells of all levels, each once: h, w <= CELLS.

    encode(pixels (n, 3, p, p)) -> (n or more, C, cells) float32. head(cells (1, C, WINDOW, WINDOW), context (the same of the
    global patch, or None), inside (1, 1, WINDOW, WINDOW), 1 for cells of the image) -> (1, classes + 5, WINDOW, WINDOW): class
    logits, logarithms of the distances to the left, upper, right and lower side in strides, logit of the centre-ness.
    recipe: an edge.scores.Recipe; lap, pixels: as of edge.scores.score_bands. Holds a few rows of tiles, never a map: memory
    grows with the width of the picture, not with its height."""
    pixels = pixels or Host()
    lap = pixels.timed(lap)
    view = view_of(picture, recipe, pixels)
    overview = None
    if recipe.overview:
        overview = [part[0] for part in split(encoded_overview(view, recipe, encode, lap, pixels), recipe.overview)]
    laid = layout(view.height, view.width, recipe.tile)
    levels = [Level(*size) for size in sizes(view.height, view.width)]
    for y in laid.ys:
        row = [(y, x, y + recipe.tile, x + recipe.tile) for x in laid.xs]
        for first in range(0, len(row), recipe.batch):
            found = encoded(view, row[first:first + recipe.batch], recipe, encode, lap, pixels)
            for level, part in zip(levels, split(found, recipe.tile)):
                level.add(part, first)
        for index, level in enumerate(levels):
            for y0, x0, cells, inside in level.ready():
                context = None
                if overview is not None:
                    context = _context(overview[index], *spread(index, view.height, view.width, len(overview[index][0]), y0 - HALO,
                                                                x0 - HALO, y0 + CELLS + HALO, x0 + CELLS + HALO))
                lap("stitch")
                scores = np.array(head(cells, context, inside)[0])
                lap("run")
                yield index, y0, x0, scores[:, HALO:HALO + min(CELLS, level.height - y0), HALO:HALO + min(CELLS, level.width - x0)]


def _context(g, rows, cols):
    """rows @ g @ cols.T, from the part of g that they read: (1, C, WINDOW, WINDOW)."""
    (top, bottom), (left, right) = [(used[0], used[-1] + 1) for used in (np.flatnonzero(m.any(axis=0)) for m in (rows, cols))]
    return np.matmul(np.matmul(rows[:, top:bottom], g[:, top:bottom, left:right]), cols[:, left:right].T)[None]


class Level:
    """The rows of a level's map (height, width) that are there and still needed."""

    def __init__(self, height, width):
        self.height, self.width = height, width
        self._rows = None  # (C, rows, width), of which the first _there are the map's from _top on
        self._top = self._there = self._next = self._added = 0

    def add(self, tiles, column):
        """Tiles (n, C, side, side), number `column` and on of the row of tiles below what is there. ready() ends the row."""
        channels, side = tiles.shape[1:3]
        if self._rows is None:  # what ready() leaves is less than a window
            self._rows = np.zeros((channels, min(self.height, WINDOW + side), self.width), np.float32)
        self._added = min(side, self.height - self._top - self._there)
        for x, tile in enumerate(tiles, column):
            part = self._rows[:, self._there:self._there + self._added, x * side:(x + 1) * side]
            part[...] = tile[:, :self._added, :part.shape[2]]

    def ready(self):
        """Yield (y, x, cells (1, C, WINDOW, WINDOW), inside (1, 1, WINDOW, WINDOW)) of the windows around y, x whose rows are all
        there; zeros outside the map. Each comes once."""
        self._there, self._added = self._there + self._added, 0
        bottom = self._top + self._there
        while self._next < self.height and (bottom == self.height or bottom >= self._next + CELLS + HALO):
            for x in range(0, self.width, CELLS):
                yield (self._next, x) + self._window(self._next - HALO, x - HALO)
            self._next += CELLS
            done = min(self._there, max(0, self._next - HALO - self._top))
            self._there, self._top = self._there - done, self._top + done
            for rows in self._rows:  # one by one: numpy copies what overlaps
                rows[:self._there] = rows[done:done + self._there]

    def _window(self, y, x):
        cells = np.zeros((1, len(self._rows), WINDOW, WINDOW), np.float32)
        inside = np.zeros((1, 1, WINDOW, WINDOW), np.float32)
        y0, x0, y1, x1 = max(0, y), max(0, x), min(self.height, y + WINDOW), min(self.width, x + WINDOW)
        cells[0, :, y0 - y:y1 - y, x0 - x:x1 - x] = self._rows[:, y0 - self._top:y1 - self._top, x0:x1]
        inside[0, 0, y0 - y:y1 - y, x0 - x:x1 - x] = 1
        return cells, inside


def demand_finite(scores):
    """Raise BadFile for scores that say nothing."""
    if not np.isfinite(scores).all():
        raise BadFile("the net's scores are no finite numbers. Train again with a smaller --lr, or build the engine without --fp16")


def detect(picture, recipe, rules, encode, head, lap=lambda stage: None, pixels=None):
    """The boxes in a picture: (n, 6) float64, x0, y0, x1, y1 px of the picture, score 0..1, class id; the best first.
    rules: Rules; the rest as of windows()."""
    height, width = images.fitted_size(picture.height, picture.width, recipe.resize, recipe.resize_px)
    found = [np.zeros((0, 6)) for _stride in STRIDES]
    for level, y, x, scores in windows(picture, recipe, encode, head, lap, pixels):
        demand_finite(scores)
        more = decoded(scores, level, y, x, rules.score)
        if len(more):
            found[level] = best(np.concatenate([found[level], more]), rules.level)
        lap("decode")
    kept = np.concatenate(found)
    kept[:, :4] = np.clip(kept[:, :4], 0, (width, height, width, height))
    kept = apart(best(kept[(kept[:, 2] > kept[:, 0]) & (kept[:, 3] > kept[:, 1])], len(kept)), rules.overlap, rules.limit)
    kept[:, :4] *= np.tile((picture.width / float(width), picture.height / float(height)), 2)
    lap("decode")
    return kept


def decoded(scores, level, y, x, least):
    """The boxes that the cells of a window stand for, (n, 6): one for every class of a cell that scores more than `least`, the
    root of class probability times centre-ness."""
    stride, classes = STRIDES[level], len(scores) - 5
    likely = likelihood(scores)
    label, row, column = np.nonzero(likely > least)
    left, up, right, down = np.exp(np.minimum(scores[classes:classes + 4, row, column].astype(np.float64), FARTHEST)) * stride
    at_x, at_y = (x + column + 0.5) * stride, (y + row + 0.5) * stride
    return np.stack([at_x - left, at_y - up, at_x + right, at_y + down, likely[label, row, column], label], axis=1)


def likelihood(scores):
    """(C, ...) of scores (C + 5, ...) of cells: the root of class probability times centre-ness."""
    return np.sqrt(_sigmoid(scores[:-5]) * _sigmoid(scores[-1]))


def _sigmoid(values):
    return 1 / (1 + np.exp(-np.clip(values, -60, 60)))


def best(boxes, most):
    """The `most` boxes (n, 6) of the highest scores, in their order."""
    return boxes[np.argsort(-boxes[:, 4], kind="stable")[:most]]


def apart(boxes, overlap, most):
    """At most `most` of the boxes (n, 6), sorted by score: those that no better one of their class overlaps by more than an IoU
    of `overlap`."""
    kept, left = [], boxes
    while len(left) and len(kept) < most:
        kept.append(left[0].copy())  # of a view all of `left` would stay in memory
        left = left[1:]
        left = left[(left[:, 5] != kept[-1][5]) | (iou(kept[-1][None], left)[0] <= overlap)]
    return np.array(kept).reshape(-1, 6)


def iou(found, others, crowd=False):
    """IoU of boxes (m, 4 or more) and (n, 4 or more): (m, n). crowd, (n,) bool: with these, the shared area over that of the found
    box (0 where nothing is shared)."""
    sides = np.minimum(found[:, None, 2:4], others[:, 2:4]) - np.maximum(found[:, None, :2], others[:, :2])
    shared, own = sides.clip(0).prod(axis=2), areas(found)[:, None]
    both = np.where(crowd, own, own + areas(others) - shared)
    return np.divide(shared, both, out=np.zeros_like(shared), where=shared > 0)


def areas(boxes):
    """(n,) of boxes (n, 4 or more)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
