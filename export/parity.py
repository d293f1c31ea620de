"""Do the exported files, or the engines built from them, give the same answers? The same frames through both, from pixels to
classes; where they part, the stage in which it begins is named.

Stages, in the order of the data: prepare (pixels as the net gets them), interpolate (weights that bring the global feature to
a tile), the net's own stages, between them sample (where a deformation net says), stitch (tiles to image), decode (classes)."""
import zlib
from typing import NamedTuple

import numpy as np

from edge import images
from edge.command import say
from edge.errors import ParityError
from edge.sources import open_source
from edge.sources.stills import find_files
from edge.warp.path import WarpHost
from train_lite import metrics
from train_lite.metrics import confusion

ORDINARY_SCORE = 10.0  # scores up to this size count with their absolute error, larger ones with their relative error
FRAMES = 2
WINDOW_PX = 1536  # the middle of larger frames: enough tiles to judge, seconds instead of hours
# of an engine beside ONNX Runtime: error of a score up to ORDINARY_SCORE, share of pixels that may change their class
ENGINE = {"float32": (1e-2, 5e-4), "float16": (2e-1, 5e-3)}
TASK_DROP = 0.01  # of any class's IoU against the labels, where they are known
STAGE_CALLS = 4  # inputs on which every stage is compared by itself
KINDS = {"rows": "interpolate", "cols": "interpolate", "put_rows": "interpolate", "put_cols": "interpolate",
         "pixels": "prepare", "image": "prepare", "samples": "sample"}
LOGITS = 1e-2  # of the largest, the most that density logits may differ by, however much scores may: they are kept in float32
EXACT = ("prepare", "interpolate", "sample", "decode")  # stages that are the same code on both sides: no difference is allowed


class Frame(NamedTuple):
    """What two models are compared on."""
    name: str
    picture: object            # edge.images picture
    truth: object = None       # class ids (h, w) uint8 of its pixels, where they are known


def chosen(pattern, otherwise):
    """The Frames to compare on: files of `pattern`; without it of `otherwise`, (name, path, labels) each, labels(box) giving
    class ids of a window; with neither a test picture, and a warning."""
    found = [(path, path, None) for path in find_files(pattern)] if pattern else otherwise
    if found:
        return [middle(name, images.open_photo(path), labels) for name, path, labels in found[:FRAMES]]
    say("warning: no images to compare on are here; comparing on a test picture. Give some of your own with --frames")
    return [middle(frame.origin, frame.open()) for frame in open_source("synthetic://1024x768", 1)]


def middle(name, picture, labels=None):
    """The middle of a picture, at most WINDOW_PX square, as a Frame in memory."""
    height, width = min(picture.height, WINDOW_PX), min(picture.width, WINDOW_PX)
    y, x = (picture.height - height) // 2, (picture.width - width) // 2
    box = (y, x, y + height, x + width)
    return Frame(name, images.ArrayPicture(np.array(picture.window(*box))), labels(box) if labels else None)


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
        self._parts = {"overview": "look", "local": "work", "whole": "deepen", "fusion": "fuse_large"}  # of a GLNet
        self._net, self._stages, self.pixels = net, {stage["name"]: stage for stage in contract["stages"]}, WarpHost()

    def tensors(self, stage, side):
        return {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in self._stages[stage][side]}

    def run(self, stage, inputs, keep=False):
        import torch
        given = {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}
        with torch.no_grad():
            if stage in self._parts:
                part = getattr(self._net, "merge" if "merged" in given and stage == "local" else self._parts[stage])
                found = part(*[given[tensor["name"]] for tensor in self._stages[stage]["inputs"]])
                found = found if isinstance(found, tuple) else (found,)
                return {tensor["name"]: one.numpy() for tensor, one in zip(self._stages[stage]["outputs"], found)}
            if stage == "deform":
                return {"logits": self._net.deform(given["image"]).numpy()}
            if stage == "encoder":
                return {"features": self._net.encoder(given["pixels"]).numpy()}
            if "inside" in given:
                return {"scores": self._net.head(given["cells"], given.get("context"), given["inside"]).numpy()}
            if "cells" in given:
                return {"scores": self._net.head(given["cells"], given.get("overview")).numpy()}
            if stage == "head":
                return {"scores": self._net.score(given["features"], given["overview"], given["rows"], given["cols"]).numpy()}
            (pixels,) = given.values()
            return {"scores": self._net(pixels).numpy()}

    def hold(self, value):
        return value[:1]

    def close(self):
        pass


class Tap:
    """A session that notes what goes in: checksums of all pixels and weights, and each stage's first calls whole.

    leader: a Tap whose last density logits are taken for this one's: their last bits move samples, and with them scores."""

    def __init__(self, session, leader=None):
        self._session, self.calls, self.sums = session, {}, {"prepare": [], "interpolate": [], "sample": []}
        self._leader, self.logits = leader, None
        self.pixels, self.hold, self.close = session.pixels, session.hold, session.close

    def run(self, stage, inputs, keep=False):
        for name in inputs:
            if name in KINDS:
                self.sums[KINDS[name]].append(zlib.crc32(np.ascontiguousarray(inputs[name]).tobytes()))
        noted = len(self.calls.setdefault(stage, [])) < STAGE_CALLS
        given = {name: np.array(value) for name, value in inputs.items()} if noted else None
        if stage == "deform" and self._leader:
            return {"logits": self._leader.logits}
        outputs = self._session.run(stage, inputs, keep)
        if stage == "deform":
            self.logits = np.array(outputs["logits"])
        if noted:
            self.calls[stage].append((given, {name: np.array(value) for name, value in outputs.items()}))
        return outputs


def compare(reference, other, frames):
    """reference, other: Segmenters, each with its own way to prepare pixels; frames: list of Frame. Returns the
    contract's 'parity' without tolerance: largest difference of a score, the largest score, share of pixels whose class
    changed, per class the overlap (IoU) of where the two see it, and `stages`: by how much each is off, as a share; with
    labels `task_iou`, the IoU per class against them, of the reference and of the other.

    Classes are each side's own from end to end. Scores of a net whose samples move are compared with the samples where the
    reference has them."""
    pixels, classes = other.session.pixels, reference.kinds
    taps = Tap(reference.session), Tap(other.session)
    alike = taps
    if reference.moves:
        leader = Tap(reference.session)
        alike = leader, Tap(other.session, leader)
    apart, undecoded = [], 0  # (largest difference, largest score) of every band
    between = np.zeros((classes, classes), np.int64)  # counts of (class by reference, class by other)
    judged = []  # (counts of (true class, class by reference), the same by other) of the frames whose labels are known
    for frame in frames:
        judged.append((np.zeros_like(between), np.zeros_like(between)))
        for y0, a, band in _bands(reference, other, taps, frame.picture):
            b = pixels.scores(band)
            if alike is taps:
                apart.append((_difference(a, b), float(np.abs(a).max())))
            ours, others = reference.decoded(a), other.labels(band)
            undecoded += int((others != other.decoded(b)).sum())
            between += confusion(ours, others, classes)
            if frame.truth is not None:
                for matrix, labels in zip(judged[-1], (ours, others)):
                    matrix += confusion(frame.truth[y0:y0 + len(labels)], labels, classes)
        if alike is not taps:
            apart += [(_difference(a, pixels.scores(band)), float(np.abs(a).max()))
                      for _y0, a, band in _bands(reference, other, alike, frame.picture)]
    total, (worst, largest) = int(between.sum()), [max(values) for values in zip(*apart)]
    own = _of_stages(taps[0].calls, other.session)
    stages = {kind: _share_changed(*[tap.sums[kind] for tap in taps]) for kind in ("prepare", "interpolate")}
    stages.update({stage: own.pop(stage) for stage in ("deform",) if stage in own})
    stages["sample"] = _share_changed(*[tap.sums["sample"] for tap in alike])
    stages.update(own, stitch=worst / (largest or 1.0))
    named = (reference.classes, reference.palette) == (other.classes, other.palette)
    stages["decode"] = float(undecoded) / total if named else 1.0
    report = {"max_abs_error": worst, "largest_score": largest, "changed_share": 1.0 - between.trace() / float(total),
              "stages": stages, "class_iou": per_class_iou(between), "frames": [frame.name for frame in frames]}
    if any(frame.truth is not None for frame in frames):
        report["task_iou"] = [per_class_iou(sum(matrices)) for matrices in zip(*judged)]
    return report, taps[0].calls


def _bands(reference, other, taps, picture):
    """(y0, scores of the reference, band of the other) of a picture, with the Taps in the place of their sessions."""
    sessions = reference.session, other.session
    reference.session, other.session = taps
    try:
        for (y0, a), (_y0, band) in zip(reference.score_bands(picture), other.score_bands(picture)):
            yield y0, a, band
    finally:
        reference.session, other.session = sessions


def per_class_iou(matrix):
    """{class id: IoU} of the classes that occur in a matrix of counts (C, C)."""
    return {str(index): float(value) for index, value in enumerate(metrics.scores(matrix)["iou"]) if value == value}


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
    sound = all(report["stages"].get(stage, 0.0) <= limit for stage, limit in limits(tolerance).items())
    return (report["max_abs_error"] <= allowance(report, tolerance) and report["changed_share"] <= share and sound
            and task_drop(report) <= TASK_DROP)


def limits(tolerance):
    """{stage: the share by which it may be off} of the stages that have a limit of their own."""
    return dict(dict.fromkeys(EXACT, 0.0), deform=min(tolerance, LOGITS))


def task_drop(report):
    """The most IoU that a class loses against the labels; 0 where those are not known."""
    before, after = report.get("task_iou", ({}, {}))
    return max([value - after.get(index, 0.0) for index, value in before.items()] + [0.0])


def demand(report, tolerance, out, what="the exported files differ from the trained net", share=1.0, advice=""):
    """Raise ParityError, naming the stage where it begins, when a report is beyond what is allowed: scores by `tolerance`
    (see allowance()), classes of more than `share` of the pixels; preparing, interpolating and decoding must be the same.
    Returns what was allowed for a score."""
    allowed, stages = allowance(report, tolerance), report["stages"]
    if passes(report, tolerance, share):
        return allowed
    own, limit = limits(tolerance), allowed / (report["largest_score"] or 1.0)
    begins = next((stage for stage, off in stages.items() if off > own.get(stage, limit)), "stitch")
    raise ParityError("%s: scores by %.3g (allowed %.3g), class of %.4f %% of the pixels%s%s, on %s. It begins in stage %s (off by "
                      "%.2g of its largest value). %s is not written. %s" % (
                          what, report["max_abs_error"], allowed, 100 * report["changed_share"],
                          "" if share == 1.0 else " (allowed %.3f %%)" % (100 * share),
                          ", IoU of a class by %.3f (allowed %.2f)" % (task_drop(report), TASK_DROP) if task_drop(report) else "",
                          ", ".join(report["frames"]), begins,
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
