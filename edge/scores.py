"""From a picture to class scores: the one path that training's evaluation, the parity check and the runtime share.

Callers differ only in who computes a net: torch, ONNX Runtime or TensorRT. They pass it in as two functions.
"""
from typing import NamedTuple

import numpy as np

from edge import images, tiles
from edge.geometry import bilinear_matrix


class Recipe(NamedTuple):
    """How a net wants its pixels; a contract's `image`, `tile` and `overview` in flat form."""
    resize: str        # 'none' | 'long' | 'stretch': images.fitted_size
    resize_px: int     # px, for 'long' and 'stretch'
    tile: int          # px, side of the net's input
    overlap: int       # px shared by neighbouring tiles
    batch: int         # tiles per call, at most
    overview: int      # px, side of the global patch; 0: the net has none
    mean: tuple        # of x/255, RGB
    std: tuple


def working_view(picture, recipe):
    """`picture` at the size the net was trained at; decoded once when it is small enough to be held."""
    height, width = images.fitted_size(picture.height, picture.width, recipe.resize, recipe.resize_px)
    view = images.resized(picture, height, width)
    if isinstance(view, images.BandPicture) and height * width <= images.STREAM_ABOVE_PX:
        view = images.ArrayPicture(images.whole(view))
    return view


def score_bands(picture, recipe, encode, score, lap=lambda stage: None):
    """Yield (y0, scores): scores (C, h, W) float32 for the rows y0 .. y0 + h of `picture`, from the top, all rows.

    encode(pixels (1, 3, q, q)) -> the global feature g, in whatever form `score` takes it; called once, if at all.
    score(pixels (n, 3, p, p), g, rows (n, p, q), cols (n, p, q)) -> (n, C, p, p) float32; n <= recipe.batch.
    lap(stage) is called when a stage of work ends ('prepare', 'run', 'blend')."""
    view = working_view(picture, recipe)
    overview = None
    if recipe.overview:
        small = images.whole(images.resized(view, recipe.overview, recipe.overview))
        lap("prepare")
        overview = encode(images.normalise(small[None], recipe.mean, recipe.std))
        lap("run")
    laid = tiles.plan(view.height, view.width, recipe.tile, recipe.overlap)
    bands = tiles.stitch(laid, lambda boxes: _tile_scores(view, boxes, recipe, overview, score, lap))
    if (view.height, view.width) != (picture.height, picture.width):
        bands = _at_size(bands, view, picture.height, picture.width)
    for band in bands:
        lap("blend")
        yield band


def _tile_scores(view, boxes, recipe, overview, score, lap):
    lap("blend")
    for first in range(0, len(boxes), recipe.batch):
        chunk = boxes[first:first + recipe.batch]
        pixels = np.stack([view.window(*box) for box in chunk])
        rows, cols = interpolation(chunk, view.height, view.width, recipe.overview)
        ready = images.normalise(pixels, recipe.mean, recipe.std)
        lap("prepare")
        scores = score(ready, overview, rows, cols)
        lap("run")
        for one in scores:
            yield one


def interpolation(boxes, height, width, side):
    """Matrices that bring a global feature of side x side to the tiles `boxes` (n, 4) of an image height x width.
    Returns rows (n, p, side), cols (n, p, side) float32; (None, None) when side is 0."""
    if not side:
        return None, None
    return (np.stack([bilinear_matrix(height, side, b[0], b[2]) for b in boxes]),
            np.stack([bilinear_matrix(width, side, b[1], b[3]) for b in boxes]))


def _at_size(bands, view, height, width):
    """Score bands of `view`'s size, resized to height x width by the filter that resizes pictures."""
    channels_last = images.BandPicture(view.height, view.width, lambda: (
        np.array(np.moveaxis(scores, 0, 2)) for _y0, scores in bands))  # a copy: stitch reuses its buffer
    picture = images.resized(channels_last, height, width)
    for y0 in range(0, height, 128):
        yield y0, np.moveaxis(picture.window(y0, 0, min(height, y0 + 128), width), 2, 0)


def labels_of(scores):
    """scores (C, h, w) float32 -> class ids (h, w) uint8. C = 1 is binary: score > 0, that is probability > 0.5."""
    if len(scores) == 1:
        return (scores[0] > 0).astype(np.uint8)
    best, labels = scores[0].copy(), np.zeros(scores.shape[1:], np.uint8)
    for index in range(1, len(scores)):  # three times as fast as argmax over the first axis
        better = scores[index] > best
        np.copyto(labels, index, where=better)
        np.maximum(best, scores[index], out=best)
    return labels
