"""Do the exported files, or the engines built from them, give the same answers? The same frames through both, from pixels to
classes; where they part, the stage in which it begins is named.

Stages, in the order of the data: prepare (pixels as the net gets them), interpolate (weights that bring the global feature to
a tile), the net's own stages, stitch (tiles to image), decode (classes)."""
import zlib

import numpy as np

from edge import images, scores
from edge.command import say
from edge.errors import ParityError
from edge.sources import find_files, open_source

ORDINARY_SCORE = 10.0  # scores up to this size count with their absolute error, larger ones with their relative error
FRAMES = 2
WINDOW_PX = 1536  # the middle of larger frames: enough tiles to judge, seconds instead of hours
# of an engine beside ONNX Runtime: error of a score up to ORDINARY_SCORE, share of pixels that may change their class
ENGINE = {"float32": (1e-2, 5e-4), "float16": (2e-1, 5e-3)}
STAGE_CALLS = 4  # inputs on which every stage is compared by itself
INTERPOLATION = ("rows", "cols")
EXACT = ("prepare", "interpolate", "decode")  # stages that are the same code on both sides: no difference is allowed


def chosen(pattern, otherwise):
    """The (name, picture) to compare on: files of `pattern`; without it the pairs (name, path) of `otherwise`; with neither
    a test picture, and a warning."""
    pairs = [(path, path) for path in find_files(pattern)] if pattern else otherwise
    if pairs:
        return [(name, frame_window(images.open_photo(path))) for name, path in pairs[:FRAMES]]
    say("warning: no images to compare on are here; comparing on a test picture. Give some of your own with --frames")
    return [(frame.origin, frame_window(frame.open())) for frame in open_source("synthetic://1024x768", 1)]


def frame_window(picture):
    """The middle of a picture, at most WINDOW_PX square, as a picture in memory."""
    height, width = min(picture.height, WINDOW_PX), min(picture.width, WINDOW_PX)
    y, x = (picture.height - height) // 2, (picture.width - width) // 2
    return images.ArrayPicture(np.array(picture.window(y, x, y + height, x + width)))


class TorchBackend:
    """A trained PatchNet, norms not folded, in the place of a backend: the reference."""

    def __init__(self, net):
        self.net = net.cpu().eval()

    def describe(self):
        return "torch"

    def Session(self, contract, files, threads=0):
        return TorchSession(self.net, contract)


class TorchSession:
    """What edge.backends says of a Session."""

    def __init__(self, net, contract):
        self._net, self._stages = net, {stage["name"]: stage for stage in contract["stages"]}

    def tensors(self, stage, side):
        return {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in self._stages[stage][side]}

    def run(self, stage, inputs, keep=False):
        import torch
        given = {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}
        with torch.no_grad():
            if stage == "encoder":
                return {"features": self._net.encoder(given["pixels"]).numpy()}
            if stage == "head":
                return {"scores": self._net.score(given["features"], given["overview"], given["rows"], given["cols"]).numpy()}
            return {"scores": self._net(given["pixels"]).numpy()}

    def close(self):
        pass


class Tap:
    """A session that notes what goes in: checksums of all pixels and weights, and each stage's first calls whole."""

    def __init__(self, session):
        self._session, self.calls, self.sums = session, {}, {"prepare": [], "interpolate": []}

    def run(self, stage, inputs, keep=False):
        for name in inputs:
            kind = "interpolate" if name in INTERPOLATION else "prepare" if name == "pixels" else None
            if kind:
                self.sums[kind].append(zlib.crc32(np.ascontiguousarray(inputs[name]).tobytes()))
        outputs = self._session.run(stage, inputs)
        if len(self.calls.setdefault(stage, [])) < STAGE_CALLS:
            self.calls[stage].append((inputs, outputs))
        return outputs

    def close(self):
        self._session.close()


def compare(reference, other, frames):
    """reference, other: Segmenters, each with its own way to prepare pixels; frames: list of (name, picture). Returns the
    contract's 'parity' without tolerance: largest difference of a score, the largest score, share of pixels whose class
    changed, per class the overlap (IoU) of where the two see it, and `stages`: by how much each is off, as a share."""
    session = other.session
    mine, theirs = Tap(reference.session), Tap(session)
    worst, largest, changed, pixels, overlap = 0.0, 0.0, 0, 0, {}
    reference.session, other.session = mine, theirs
    try:
        for _name, picture in frames:
            ours = scores.score_bands(picture, reference.recipe, reference.encode, reference.score)
            for (_y, a), (_y2, b) in zip(ours, scores.score_bands(picture, other.recipe, other.encode, other.score)):
                worst = max(worst, _difference(a, b))
                largest = max(largest, float(np.abs(a).max()))
                one, two = scores.labels_of(a), scores.labels_of(b)
                changed += int((one != two).sum()) if one.shape == two.shape else one.size
                pixels += one.size
                for index in np.union1d(one, two).tolist() if one.shape == two.shape else ():
                    both, either = overlap.get(index, (0, 0))
                    overlap[index] = (both + int(((one == index) & (two == index)).sum()),
                                      either + int(((one == index) | (two == index)).sum()))
    finally:
        reference.session, other.session = mine._session, session
    stages = {kind: _share_changed(mine.sums[kind], theirs.sums[kind]) for kind in ("prepare", "interpolate")}
    stages.update(_of_stages(mine.calls, session))
    stages["stitch"] = worst / (largest or 1.0)
    stages["decode"] = float((reference.classes, reference.palette) != (other.classes, other.palette))
    return {"max_abs_error": worst, "largest_score": largest, "changed_share": float(changed) / pixels, "stages": stages,
            "class_iou": {str(index): float(both) / either for index, (both, either) in sorted(overlap.items())},
            "frames": [name for name, _ in frames]}, mine.calls


def _difference(a, b):
    """Largest difference of two arrays; infinite when they have other shapes or one is not finite."""
    return float(np.abs(a - b).max()) if a.shape == b.shape and np.isfinite(b).all() else float("inf")


def _share_changed(mine, theirs):
    if len(mine) != len(theirs):
        return 1.0
    return sum(a != b for a, b in zip(mine, theirs)) / float(len(mine) or 1)


def _of_stages(calls, session):
    """{stage: largest difference as a share of the largest value}: every stage of `session` on the reference's own inputs,
    so that the first that is wrong is named, not those behind it."""
    found = {}
    for stage, kept in calls.items():
        worst = largest = 0.0
        for inputs, outputs in kept:
            got = session.run(stage, inputs)
            for name, array in outputs.items():
                worst, largest = max(worst, _difference(array, got[name])), max(largest, float(np.abs(array).max()))
        found[stage] = worst / (largest or 1.0)
    return found


def allowance(report, tolerance):
    """What `tolerance` allows for the scores of a report: itself, or its multiple in proportion for nets whose scores are
    larger (float32 itself rounds those by as much)."""
    return tolerance * max(1.0, report["largest_score"] / ORDINARY_SCORE)


def passes(report, tolerance, share):
    """Whether a report is within what is allowed; see demand()."""
    exact = not any(report["stages"][stage] for stage in EXACT)
    return report["max_abs_error"] <= allowance(report, tolerance) and report["changed_share"] <= share and exact


def demand(report, tolerance, out, what="the exported files differ from the trained net", share=1.0, advice=""):
    """Raise ParityError, naming the stage where it begins, when a report is beyond what is allowed: scores by `tolerance`
    (see allowance()), classes of more than `share` of the pixels; preparing, interpolating and decoding must be the same.
    Returns what was allowed for a score."""
    allowed, stages = allowance(report, tolerance), report["stages"]
    if passes(report, tolerance, share):
        return allowed
    limit = allowed / (report["largest_score"] or 1.0)
    begins = next((stage for stage, off in stages.items() if off > (0.0 if stage in EXACT else limit)), "stitch")
    raise ParityError("%s: scores by %.3g (allowed %.3g), class of %.4f %% of the pixels%s, on %s. It begins in stage %s (off by "
                      "%.2g of its largest value). %s is not written. %s" % (
                          what, report["max_abs_error"], allowed, 100 * report["changed_share"],
                          "" if share == 1.0 else " (allowed %.3f %%)" % (100 * share), ", ".join(report["frames"]), begins,
                          stages[begins], out, advice or "If that is acceptable: --tolerance %.1g" % (2 * report["max_abs_error"])))


def demand_engine(report, precision, out, spoiled=()):
    """demand() of engines of 'float32' or 'float16'. spoiled: nodes that half precision is known to spoil. Returns (allowed
    error of a score, allowed share of pixels)."""
    tolerance, share = ENGINE[precision]
    advice = "Export the model again and build once more."
    if precision == "float16":
        advice = "%sKeep it in float32: --float32 \"%s\"; or build without --fp16." % (
            "Half precision spoils layer %s. " % spoiled[0] if spoiled else "", " ".join(spoiled[:3]) or "NODE")
    return demand(report, tolerance, out, "the engine gives other answers than its ONNX files", share, advice), share
