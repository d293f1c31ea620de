"""Do the exported files give the trained net's answers? The same frames through both, pixels to labels."""
import numpy as np

from edge import images, scores
from edge.errors import ParityError
from train_lite.evaluate import torch_functions

ORDINARY_SCORE = 10.0  # scores up to this size count with their absolute error, larger ones with their relative error
WINDOW_PX = 1536  # the middle of larger frames: enough tiles to judge, seconds instead of hours


def frame_window(picture):
    """The middle of a picture, at most WINDOW_PX square, as a picture in memory."""
    height, width = min(picture.height, WINDOW_PX), min(picture.width, WINDOW_PX)
    y, x = (picture.height - height) // 2, (picture.width - width) // 2
    return images.ArrayPicture(np.array(picture.window(y, x, y + height, x + width)))


def compare(net, segmenter, frames):
    """net: the trained PatchNet, norms not folded; segmenter: an edge Segmenter of the exported files; frames: list of
    (name, picture). Returns the contract's 'parity' without tolerance: largest difference of a score, the
    largest score, share of pixels whose class changed."""
    worst, largest, changed, pixels = 0.0, 0.0, 0, 0
    encode, score = torch_functions(net, "cpu")
    for _name, picture in frames:
        ours = scores.score_bands(picture, segmenter.recipe, encode, score)
        theirs = scores.score_bands(picture, segmenter.recipe, segmenter.encode, segmenter.score)
        for (_y, a), (_y2, b) in zip(ours, theirs):
            worst = max(worst, float(np.abs(a - b).max()) if np.isfinite(b).all() else float("inf"))
            largest = max(largest, float(np.abs(a).max()))
            changed += int((scores.labels_of(a) != scores.labels_of(b)).sum())
            pixels += a.shape[1] * a.shape[2]
    return {"max_abs_error": worst, "largest_score": largest, "changed_share": float(changed) / pixels, "frames": [name for name, _ in frames]}


def demand(report, tolerance, out):
    """Raise ParityError when the report is beyond what is allowed: `tolerance`, or its multiple in proportion for nets
    whose scores are larger (float32 itself rounds those by as much). Returns what was allowed."""
    allowed = tolerance * max(1.0, report["largest_score"] / ORDINARY_SCORE)
    if not report["max_abs_error"] <= allowed:
        raise ParityError("the exported files differ from the trained net: scores by %.3g (allowed %.3g), class of %.4f %% "
                          "of the pixels, on %s. %s is not written. If that is acceptable: --tolerance %.1g" % (
                              report["max_abs_error"], allowed, 100 * report["changed_share"],
                              ", ".join(report["frames"]), out, 2 * report["max_abs_error"]))
    return allowed
