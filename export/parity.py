"""Do the exported files give the trained net's answers? The same frames through both, pixels to labels."""
import numpy as np

from edge import images, scores
from edge.errors import ParityError
from train_lite.evaluate import torch_functions

WINDOW_PX = 1536  # the middle of larger frames: enough tiles to judge, seconds instead of hours


def frame_window(picture):
    """The middle of a picture, at most WINDOW_PX square, as a picture in memory."""
    height, width = min(picture.height, WINDOW_PX), min(picture.width, WINDOW_PX)
    y, x = (picture.height - height) // 2, (picture.width - width) // 2
    return images.ArrayPicture(np.array(picture.window(y, x, y + height, x + width)))


def compare(net, segmenter, frames):
    """net: the trained PatchNet, norms not folded; segmenter: an edge Segmenter of the exported files; frames: list of
    (name, picture). Returns the contract's 'parity' without tolerance: largest difference of a score, share of
    pixels whose class changed, and the stages' share of the error."""
    worst, changed, pixels = 0.0, 0, 0
    encode, score = torch_functions(net, "cpu")
    for _name, picture in frames:
        ours = scores.score_bands(picture, segmenter.recipe, encode, score)
        theirs = scores.score_bands(picture, segmenter.recipe, segmenter.encode, segmenter.score)
        for (_y, a), (_y2, b) in zip(ours, theirs):
            worst = max(worst, float(np.abs(a - b).max()) if np.isfinite(b).all() else float("inf"))
            changed += int((scores.labels_of(a) != scores.labels_of(b)).sum())
            pixels += a.shape[1] * a.shape[2]
    return {"max_abs_error": worst, "changed_share": float(changed) / pixels, "frames": [name for name, _ in frames]}


def demand(report, tolerance, out):
    """Raise ParityError when the report is beyond the tolerance."""
    if not report["max_abs_error"] <= tolerance:
        raise ParityError("the exported files differ from the trained net: scores by %.3g (allowed %.3g), class of %.4f %% "
                          "of the pixels, on %s. %s is not written. If that is acceptable: --tolerance %.1g" % (
                              report["max_abs_error"], tolerance, 100 * report["changed_share"],
                              ", ".join(report["frames"]), out, 2 * report["max_abs_error"]))
