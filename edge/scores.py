"""From a picture to class scores: the one path that training's evaluation, the parity check and the runtime share.

Callers differ only in who computes a net: torch, ONNX Runtime or TensorRT. They pass it in as two functions.
"""
from typing import NamedTuple

import numpy as np

from edge import images, tiles
from edge.geometry import bilinear_matrix

BAND_ROWS = 128  # px, of scores brought to another size


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


def score_bands(picture, recipe, encode, score, lap=lambda stage: None, pixels=None):
    """Yield (y0, scores): scores (C, h, W) float32 for the rows y0 .. y0 + h of `picture`, from the top, all rows.

    encode(pixels (1, 3, q, q)) -> the global feature g, in whatever form `score` takes it; called once, if at all.
    score(pixels (n, 3, p, p), g, rows (n, p, q), cols (n, p, q)) -> (n or more, C, p, p) float32; n <= recipe.batch.
    lap(stage) is called when a stage of work ends ('prepare', 'run', 'blend').
    pixels: where they are held: a Host unless given; then `scores` are what its scores() and labels() take."""
    pixels = pixels or Host()
    lap = pixels.timed(lap)
    view = view_of(picture, recipe, pixels)
    overview = None
    if recipe.overview:
        overview = encode(prepared_overview(view, recipe, lap, pixels))
        lap("run")
    laid = tiles.plan(view.height, view.width, recipe.tile, recipe.overlap)
    for band in blended(picture, laid, lambda boxes: _tile_scores(view, boxes, recipe, overview, score, lap, pixels), lap, pixels):
        yield band


def view_of(picture, recipe, pixels):
    """`picture` at the size at which the net of `recipe` sees it, as a picture. pixels: a Host, or what does the same elsewhere."""
    return pixels.fitted(picture, *images.fitted_size(picture.height, picture.width, recipe.resize, recipe.resize_px))


def prepared_overview(view, recipe, lap, pixels):
    """The global patch as a net takes it: (1, 3, q, q)."""
    side = recipe.overview
    ready = pixels.prepared(pixels.fitted(view, side, side), [(0, 0, side, side)], recipe)
    lap("prepare")
    return ready


def blended(picture, laid, scores_of, lap, pixels):
    """As score_bands(), of the scores of the tiles of `laid`, as tiles.stitch takes them: brought to the size of `picture`."""
    resize = (laid.height, laid.width) != (picture.height, picture.width)
    canvas = pixels.canvas(laid, (picture.height, picture.width) if resize else None)
    bands = tiles.stitch(laid, scores_of, canvas)
    if resize:
        bands = pixels.at_size(bands, canvas, picture.height, picture.width)
    for band in bands:
        lap("blend")
        yield band


def _tile_scores(view, boxes, recipe, overview, score, lap, pixels):
    lap("blend")
    for first in range(0, len(boxes), recipe.batch):
        chunk = boxes[first:first + recipe.batch]
        rows, cols = interpolation(chunk, view.height, view.width, recipe.overview)
        ready = pixels.prepared(view, chunk, recipe)
        lap("prepare")
        scores = score(ready, overview, rows, cols)
        lap("run")
        for one, _box in zip(scores, chunk):  # a backend of a fixed batch gives more than there are boxes
            yield one


def encoded(view, boxes, recipe, encode, lap, pixels):
    """What encode(pixels (n, 3, p, p)) -> (n or more, ...) gives of the windows `boxes` (n, 4) of a picture, a copy: (n, ...)."""
    ready = pixels.prepared(view, boxes, recipe)
    lap("prepare")
    found = np.array(encode(ready)[:len(boxes)])  # a backend of a fixed batch gives more than there are boxes
    lap("run")
    return found


def encoded_overview(view, recipe, encode, lap, pixels):
    """encoded() of the global patch: (1, ...)."""
    found = np.array(encode(prepared_overview(view, recipe, lap, pixels))[:1])
    lap("run")
    return found


def grid(recipe):
    """(rows, cols) of the tiles of every picture, for nets that read them as a grid."""
    return (len(tiles.plan(recipe.resize_px, recipe.resize_px, recipe.tile).ys),) * 2


def grid_scores(picture, recipe, encode, head, lap=lambda stage: None, pixels=None):
    """(C,) float32: scores of `picture` as a whole, brought to resize_px x resize_px, from the grid of its tiles.

    encode(pixels (n, 3, p, p)) -> (n or more, F) float32; n <= recipe.batch. head(cells (1, F, rows, cols), g (1, F) or None)
    -> (1, C). lap, pixels: as of score_bands()."""
    pixels = pixels or Host()
    lap = pixels.timed(lap)
    view = pixels.fitted(picture, recipe.resize_px, recipe.resize_px)
    boxes = tiles.plan(view.height, view.width, recipe.tile).boxes()
    cells = np.concatenate([encoded(view, boxes[i:i + recipe.batch], recipe, encode, lap, pixels)
                            for i in range(0, len(boxes), recipe.batch)])
    g = encoded_overview(view, recipe, encode, lap, pixels) if recipe.overview else None
    scores = head(np.ascontiguousarray(cells.T.reshape((1, -1) + grid(recipe))), g)
    lap("run")
    return scores[0]


class Host:
    """Pixels and scores in the host's memory, by Pillow and numpy. edge.kernels.device does the same on a GPU."""

    def timed(self, lap):
        """`lap`, called only when the work before it is done."""
        return lap

    def fitted(self, picture, height, width):
        """`picture` at another size; decoded once when it is small enough to be held."""
        view = images.resized(picture, height, width)
        if isinstance(view, images.BandPicture) and height * width <= images.STREAM_ABOVE_PX:
            view = images.ArrayPicture(images.whole(view))
        return view

    def prepared(self, view, boxes, recipe):
        """The windows `boxes` (n, 4) of a picture as a net takes them: (n, 3, p, p) float32."""
        return images.normalise(np.stack([view.window(*box) for box in boxes]), recipe.mean, recipe.std)

    def canvas(self, laid, size=None):
        """What tiles.stitch blends the tiles of `laid` on. size: (height, width) that at_size() will be asked for."""
        return tiles.Band(laid)

    def at_size(self, bands, canvas, height, width):
        """Bands of scores in the size of `canvas`, resized to height x width by the filter that resizes pictures."""
        channels_last = images.BandPicture(canvas.laid.height, canvas.laid.width, lambda: (
            np.array(np.moveaxis(scores, 0, 2)) for _y0, scores in bands))  # a copy: the canvas is used again
        picture = images.resized(channels_last, height, width)
        for y0 in range(0, height, BAND_ROWS):
            yield y0, np.moveaxis(picture.window(y0, 0, min(height, y0 + BAND_ROWS), width), 2, 0)

    def scores(self, band):
        """(C, h, W) float32 of what score_bands yields."""
        return band

    def labels(self, band):
        """Class ids (h, W) uint8 of what score_bands yields, once for each."""
        return labels_of(band)

    def blend(self, pixels, labels, palette):
        """images.blend."""
        return images.blend(pixels, labels, palette)


def interpolation(boxes, height, width, side):
    """Matrices that bring a global feature of side x side to the tiles `boxes` (n, 4) of an image height x width.
    Returns rows (n, p, side), cols (n, p, side) float32; (None, None) when side is 0."""
    if not side:
        return None, None
    return (np.stack([bilinear_matrix(height, side, b[0], b[2]) for b in boxes]),
            np.stack([bilinear_matrix(width, side, b[1], b[3]) for b in boxes]))


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
