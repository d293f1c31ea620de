"""Sizes -> tiles -> blended scores. Knows no pixels: whoever calls reads tiles and computes their scores."""
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """Square tiles of `tile` px that cover height x width, neighbours sharing `overlap` px or more.

    ys, xs: tuples of int, origins of the tile rows and columns. All tiles lie inside the image unless it is
    smaller than a tile: then the one origin is 0 and the tile reaches over the border (to be filled by reflection)."""
    height: int
    width: int
    tile: int
    overlap: int
    ys: tuple
    xs: tuple

    def boxes(self):
        """(N, 4) int, [y0, x0, y1, x1) px, row by row."""
        return np.array([(y, x, y + self.tile, x + self.tile) for y in self.ys for x in self.xs], np.int64)


def plan(height, width, tile, overlap=0):
    """Lay tiles over an image. height, width, tile >= 1 px; 0 <= overlap < tile. Returns a Plan.

    A side that the tile does not divide is covered by moving the last tile inwards."""
    assert 0 <= overlap < tile and height > 0 and width > 0, (height, width, tile, overlap)
    return Plan(height, width, tile, overlap,
                _origins(height, tile, overlap), _origins(width, tile, overlap))


def _origins(size, tile, overlap):
    last = max(0, size - tile)
    return tuple(range(0, last, tile - overlap)) + (last,)


def owned(laid):
    """The part of every tile that no earlier tile covers: each image pixel belongs to exactly one tile.

    Returns (N, 4) int boxes [y0, x0, y1, x1) in image px, in the order of laid.boxes()."""
    def spans(origins, size):
        ends = [0] + [min(o + laid.tile, size) for o in origins]
        return list(zip(ends[:-1], ends[1:]))
    return np.array([(y0, x0, y1, x1) for y0, y1 in spans(laid.ys, laid.height)
                     for x0, x1 in spans(laid.xs, laid.width)], np.int64)


def blend_weights(origins, tile, overlap, size):
    """Weight of each tile along one axis: a linear ramp over `overlap` px at its ends, normalised so that the
    weights of all tiles over a pixel sum to 1. Returns (len(origins), tile) float32; 0 outside the image."""
    ramp = np.ones(tile)
    if overlap:
        ramp[:overlap] = (np.arange(overlap) + 0.5) / overlap
        ramp[tile - overlap:] = np.minimum(ramp[tile - overlap:], ramp[:overlap][::-1])
    total = np.zeros(max(size, tile))
    for origin in origins:
        total[origin:origin + tile] += ramp
    weights = np.stack([ramp / total[o:o + tile] for o in origins])
    for row, origin in zip(weights, origins):
        row[max(0, size - origin):] = 0
    return weights.astype(np.float32)


def stitch(laid, scores_of, canvas=None):
    """Run all tiles and blend their scores, band by band from the top; holds one tile row, never the image.

    scores_of(boxes) takes (n, 4) int boxes of one tile row and returns an iterable of n arrays (C, tile, tile) float32;
    canvas: who blends them, a Band unless given. Yields (y0, scores) with scores (C, h, width) float32: finished rows, in
    order, every row once. `scores` is reused: copy what must outlive the next step."""
    canvas = canvas or Band(laid)
    for index, y in enumerate(laid.ys):
        boxes = np.array([(y, x, y + laid.tile, x + laid.tile) for x in laid.xs], np.int64)
        for column, scores in enumerate(scores_of(boxes)):
            canvas.add(scores, index, column)
        yield y, canvas.take(y, laid.ys[index + 1] if index + 1 < len(laid.ys) else laid.height)


class Band:
    """The weighted sum of a tile row's scores, in the host's memory."""

    def __init__(self, laid):
        self.laid, self._band, self._top = laid, None, 0
        self._rows = blend_weights(laid.ys, laid.tile, laid.overlap, laid.height)
        self._cols = blend_weights(laid.xs, laid.tile, laid.overlap, laid.width)

    def add(self, scores, index, column):
        """Blend in the tile of row `index` and column `column`: scores (C, tile, tile) float32."""
        laid, scores = self.laid, np.asarray(scores)
        if self._band is None:  # (C, tile, width): the image rows y .. y + tile
            self._band = np.zeros((len(scores), laid.tile, laid.width), np.float32)
        self._scroll(laid.ys[index])
        part = self._band[:, :, laid.xs[column]:laid.xs[column] + laid.tile]
        inside = part.shape[2]
        weight = self._rows[index][:, None] * self._cols[column][None, :inside]
        if laid.overlap == 0 and weight.min() == 1:
            part += scores[:, :, :inside]
        else:
            part += scores[:, :, :inside] * weight

    def take(self, y, stop):
        """The finished image rows y .. stop; valid until the next add()."""
        return self._band[:, :stop - y]

    def _scroll(self, y):
        done, self._top = y - self._top, y
        if done:
            self._band[:, :-done] = self._band[:, done:].copy()  # rows that this tile row adds to
            self._band[:, -done:] = 0
