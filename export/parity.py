"""Do the exported files, or the engines built from them, give the same answers? The same frames through both, pixels to
labels, and every stage on the same inputs."""
import numpy as np

from edge import images, scores
from edge.errors import ParityError

ORDINARY_SCORE = 10.0  # scores up to this size count with their absolute error, larger ones with their relative error
WINDOW_PX = 1536  # the middle of larger frames: enough tiles to judge, seconds instead of hours
# of the engine's scores beside ONNX Runtime's, and of the pixels that may change their class
ENGINE = {"float32": (1e-2, 5e-4), "float16": (2e-1, 5e-3)}
STAGE_CALLS = 4  # inputs on which every stage is compared by itself


def frame_window(picture):
    """The middle of a picture, at most WINDOW_PX square, as a picture in memory."""
    height, width = min(picture.height, WINDOW_PX), min(picture.width, WINDOW_PX)
    y, x = (picture.height - height) // 2, (picture.width - width) // 2
    return images.ArrayPicture(np.array(picture.window(y, x, y + height, x + width)))


def compare(reference, other, frames):
    """reference, other: (recipe, encode, score) as score_bands() takes them, each with its own way to prepare pixels;
    frames: list of (name, picture). Returns the contract's 'parity' without tolerance: largest difference of a score, the largest score, share of pixels whose class
    changed, and per class the overlap (IoU) of where the two see it."""
    worst, largest, changed, pixels, overlap = 0.0, 0.0, 0, 0, {}
    for _name, picture in frames:
        for (_y, a), (_y2, b) in zip(scores.score_bands(picture, *reference), scores.score_bands(picture, *other)):
            worst = max(worst, float(np.abs(a - b).max()) if np.isfinite(b).all() else float("inf"))
            largest = max(largest, float(np.abs(a).max()))
            mine, theirs = scores.labels_of(a), scores.labels_of(b)
            changed += int((mine != theirs).sum())
            pixels += mine.size
            for index in np.union1d(mine, theirs).tolist():
                both, either = overlap.get(index, (0, 0))
                overlap[index] = (both + int(((mine == index) & (theirs == index)).sum()),
                                  either + int(((mine == index) | (theirs == index)).sum()))
    return {"max_abs_error": worst, "largest_score": largest, "changed_share": float(changed) / pixels,
            "class_iou": {str(index): float(both) / either for index, (both, either) in sorted(overlap.items())},
            "frames": [name for name, _ in frames]}


def allowance(report, tolerance):
    """What `tolerance` allows for the scores of a report: itself, or its multiple in proportion for nets whose scores are
    larger (float32 itself rounds those by as much)."""
    return tolerance * max(1.0, report["largest_score"] / ORDINARY_SCORE)


def demand(report, tolerance, out):
    """Raise ParityError when the report is beyond what is allowed. Returns what was allowed."""
    allowed = allowance(report, tolerance)
    if not report["max_abs_error"] <= allowed:
        raise ParityError("the exported files differ from the trained net: scores by %.3g (allowed %.3g), class of %.4f %% "
                          "of the pixels, on %s. %s is not written. If that is acceptable: --tolerance %.1g" % (
                              report["max_abs_error"], allowed, 100 * report["changed_share"],
                              ", ".join(report["frames"]), out, 2 * report["max_abs_error"]))
    return allowed


class Tap:
    """A Segmenter's session that keeps the inputs and outputs of each stage's first calls."""

    def __init__(self, session):
        self._session, self.calls = session, {}

    def run(self, stage, inputs, keep=False):
        outputs = self._session.run(stage, inputs)
        if len(self.calls.setdefault(stage, [])) < STAGE_CALLS:
            self.calls[stage].append((inputs, outputs))
        return outputs

    def close(self):
        self._session.close()


def of_stages(calls, session):
    """{stage: largest difference as a share of the largest value} of a session from what a Tap kept: every stage on the
    reference's own inputs, so that the first that is wrong is named, not those behind it."""
    found = {}
    for stage, kept in calls.items():
        worst = largest = 0.0
        for inputs, outputs in kept:
            got = session.run(stage, inputs)
            for name, array in outputs.items():
                difference = np.abs(array - got[name]).max() if np.isfinite(got[name]).all() else float("inf")
                worst, largest = max(worst, float(difference)), max(largest, float(np.abs(array).max()))
        found[stage] = worst / (largest or 1.0)
    return found


def demand_engine(report, precision, out, spoiled=()):
    """Raise ParityError, naming the stage, when engines of 'float32' or 'float16' differ from the ONNX files by too much.
    spoiled: nodes that half precision is known to spoil. Returns (allowed error of a score, allowed share of pixels)."""
    tolerance, share = ENGINE[precision]
    allowed = allowance(report, tolerance)
    if report["max_abs_error"] <= allowed and report["changed_share"] <= share:
        return allowed, share
    stage = max(report["stages"], key=report["stages"].get)
    advice = "Export the model again and build once more."
    if precision == "float16":
        advice = "Keep layers in float32: --float32 \"%s\"; or build without --fp16." % " ".join(spoiled[:3] or ["NODE"])
    raise ParityError("the engine gives other answers than its ONNX files: scores differ by %.3g (allowed %.3g), class of %.3f %% "
                      "of the pixels (allowed %.3f), on %s. It begins in stage %s, off by %.2g of its largest value%s. %s is not "
                      "written. %s" % (report["max_abs_error"], allowed, 100 * report["changed_share"], 100 * share,
                                       ", ".join(report["frames"]), stage, report["stages"][stage],
                                       ", in layer %s" % spoiled[0] if spoiled else "", out, advice))
