"""The answers that a trained net gives on a picture everybody can draw, kept in its contract: whoever is handed the files later
needs neither torch nor frames to see whether they still give them."""
import numpy as np

from edge import images
from edge.errors import BadFile, ParityError
from edge.warp import path

GRID = 16                     # places per side of the picture, and of the density, at which answers are kept
NOISE, CELL_PX = (8, 11), 24  # rows and columns of random colours, and the side of each: an odd 192 x 264 px


def picture():
    """The picture: (192, 264, 3) uint8, the same with every numpy."""
    noise = np.random.RandomState(0).randint(0, 256, NOISE + (3,)).astype(np.uint8)
    return images.ArrayPicture(noise.repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1))


def answers(segmenter):
    """What a Segmenter gives on the picture at its own size: {"scores": (C, 256) float32} and, of the pipeline deform,
    "logits" (1, 256). There the scores are of samples that lie evenly: where logits put them, their last bits would count."""
    shown, recipe, pixels = picture(), segmenter.recipe._replace(resize="none"), segmenter.session.pixels  # a grid's is its own
    found = {}
    if segmenter.moves:
        _view, logits = path.look(shown, recipe, segmenter.logits, lambda stage: None, None, pixels, lambda kept, _recipe: kept)
        found["logits"] = _at_grid(np.array(logits)[None])
    before = segmenter.recipe, segmenter.moves
    segmenter.recipe, segmenter.moves = recipe, False
    bands = []
    try:
        for _y0, band in segmenter.score_bands(shown):
            bands.append(np.array(pixels.scores(band)))
            pixels.labels(band)  # a device makes room for the next band here
    finally:
        segmenter.recipe, segmenter.moves = before
    return dict(found, scores=_at_grid(np.concatenate(bands, axis=1)))


def _at_grid(maps):
    """(C, h, w) -> (C, 256): the values nearest to the middles of 16 x 16 cells; of one row, of 256."""
    if maps.shape[1] == 1:
        return maps[:, 0, (2 * np.arange(GRID ** 2) + 1) * maps.shape[2] // (2 * GRID ** 2)]
    rows, cols = [(2 * np.arange(GRID) + 1) * size // (2 * GRID) for size in maps.shape[1:]]
    return maps[:, rows][:, :, cols].reshape(len(maps), -1)


def make(segmenter, tolerance):
    """The contract's `proof` by a trusted Segmenter. tolerance: share of the largest answer. Raises BadFile for a net
    whose answers are no numbers."""
    found = answers(segmenter)
    if not all(np.isfinite(values).all() for values in found.values()):
        raise BadFile("the trained net's scores on the proof's picture are not finite. Train it again, with a smaller --lr")
    part = {name: [[float("%.6g" % value) for value in row] for row in values] for name, values in found.items()}
    return dict(part, tolerance=tolerance)


def demand(segmenter, made, what):
    """Raise ParityError when a Segmenter's answers are not those of its contract `made`, BadFile when that has none.
    what: the model, for the message. Returns the largest difference as a share of what is allowed."""
    kept = made.get("proof")
    if not kept:
        raise BadFile("%s has no proof in its contract: nobody can tell whether it gives the trained net's answers. Export it "
                      "again: python -m export CHECKPOINT --out MODEL.onnx" % what)
    worst = 0.0
    for name, values in answers(segmenter).items():
        wanted = np.array(kept.get(name, []), np.float32)
        off = float(np.abs(wanted - values).max()) if wanted.shape == values.shape and np.isfinite(values).all() else float("inf")
        allowed = kept["tolerance"] * float(np.abs(wanted).max() if wanted.size else 0.0)
        if not off <= allowed:
            raise ParityError("%s gives other answers than the net it was exported from: %s on the proof's picture differ by %.3g "
                              "(allowed %.3g). Export it again: python -m export CHECKPOINT --out MODEL.onnx"
                              % (what, name, off, allowed))
        worst = max(worst, off / (allowed or 1.0))
    return worst
