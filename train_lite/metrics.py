"""Segmentation scores from counts. Definitions: docs/method.md, section 4.

Two ways to gather: `pooled` counts over the whole set per class, then averages over the classes that occur (the
primary figures); `paper_compat` scores every image and class alone, takes 0 where that is undefined, then averages,
as the published code does. Never compare one with the other.

Boundaries are scored beside them, pooled in the same way."""
import math

import numpy as np

from train_lite.data.dataset import IGNORE

NAMES = ("acc", "f1", "iou", "bacc", "plr", "nlr")
PLR_LIMIT = 1e4  # stands for infinity: no false positives at all
# of the image's diagonal, 3 px on Cityscapes: how far a predicted boundary may lie from the true one. Csurka's 0.0075 is
# 11 px at 1024 px, as wide as the small things that are to be judged
TOLERANCE = 0.0013
BLOCK_ROWS = 64  # least number of rows whose boundaries are compared at a time
STRIP_PX = 2048  # columns, at most


def confusion(truth, predicted, classes):
    """Counts of (true class, predicted class): (classes, classes) int64. truth may hold IGNORE."""
    keep = truth != IGNORE
    pairs = truth[keep].astype(np.int64) * classes + predicted[keep]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def quadratic_kappa(matrix):
    """Cohen's kappa with quadratic weights (Cohen 1968) of counts (C, C) [true][predicted]: 1 where all agree, 0 for chance; NaN
    where all of both are one class."""
    matrix = np.asarray(matrix, np.float64)
    ids = np.arange(len(matrix))
    weights = (ids[:, None] - ids) ** 2
    chance = np.outer(matrix.sum(1), matrix.sum(0)) / matrix.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(1 - (weights * matrix).sum() / (weights * chance).sum())


def scores(matrix):
    """matrix (C, C) of counts -> dict name -> (C,) float, NaN where undefined: acc, f1, iou, bacc (balanced
    accuracy), plr = sens / (1 - spec), nlr = 100 (1 - sens) / spec, each class against the rest."""
    matrix = np.asarray(matrix, np.float64)
    tp = np.diag(matrix)
    fn, fp = matrix.sum(1) - tp, matrix.sum(0) - tp
    tn = matrix.sum() - tp - fn - fp
    with np.errstate(divide="ignore", invalid="ignore"):
        sens, spec = tp / (tp + fn), tn / (tn + fp)
        return {"acc": (tp + tn) / matrix.sum(), "f1": 2 * tp / (2 * tp + fp + fn), "iou": tp / (tp + fp + fn),
                "bacc": (sens + spec) / 2, "plr": sens / (1 - spec), "nlr": 100 * (1 - sens) / spec}


def summarise(per_image):
    """per_image: one (C, C) matrix per image, any iterable, of which no more than one is held; two classes are scored as one foreground
    class.

    Returns {'pooled': {name: float}, 'paper_compat': {...}, 'per_class_iou': [...], 'plr_clamped': n}: n scores were
    infinite and count as PLR_LIMIT."""
    total, single = 0, []
    for matrix in per_image:
        total, first, found = total + matrix, 1 if len(matrix) == 2 else 0, scores(matrix)
        single.append({name: np.nan_to_num(_limited(found[name][first:])) for name in NAMES})
    pooled, present = scores(total), total.sum(axis=1)[first:] > 0
    clamped = int(np.isinf(pooled["plr"][first:]).sum())
    return {
        "pooled": {name: _mean(_limited(pooled[name][first:])[present]) for name in NAMES},
        "paper_compat": {name: float(np.mean([s[name] for s in single])) for name in NAMES},
        "per_class_iou": [None if np.isnan(v) else float(v) for v in pooled["iou"]],
        "plr_clamped": clamped,
    }


def _limited(values):
    return np.where(np.isinf(values), PLR_LIMIT, values)


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


# --- boundaries ---------------------------------------------------------------------------------------------------

class Boundaries:
    """The boundary pixels of one image, and which of them have their counterpart near: 'What is a good evaluation measure
    for semantic segmentation?', Csurka et al., BMVC 2013.

    A boundary pixel of a class has a 4-neighbour of another class; pixels of IGNORE in truth count nowhere, and neither
    they nor the image's border make a boundary. Near is within `tolerance` px along rows and along columns (a square; the
    paper has a disc). Of two classes only the foreground is counted. Labels come in bands of rows from the top; held are
    three times `tolerance` rows, at least BLOCK_ROWS + 2 `tolerance`, two bytes a pixel."""

    def __init__(self, classes, height, width):
        self.tolerance = t = max(1, int(round(TOLERANCE * math.hypot(height, width))))
        self._totals = np.zeros((classes, 4), np.int64)
        # truth's and prediction's: the last two rows of labels, and the class of each boundary pixel, IGNORE elsewhere,
        # with a margin of `tolerance` on all sides
        self._labels = np.full((2, 2, width), IGNORE, np.uint8)
        self._edges = np.full((2, max(t, BLOCK_ROWS) + 2 * t, width + 2 * t), IGNORE, np.uint8)
        self._filled = t - 1  # the row above the image, of which no label is known, is the first to come

    def add(self, truth, predicted):
        """The next rows: class ids (h, W) uint8; truth may hold IGNORE."""
        both = np.stack([truth, np.where(truth == IGNORE, truth, predicted)])
        labels = np.concatenate([self._labels, both], axis=1)
        self._labels = labels[:, -2:]
        edges, t = _edges(labels), self.tolerance  # of all rows but the last, whose lower neighbours are still to come
        while edges.shape[1]:
            room = self._edges[:, self._filled:self._filled + edges.shape[1], t:-t]
            room[...] = edges[:, :room.shape[1]]
            edges = edges[:, room.shape[1]:]
            self._filled += room.shape[1]
            if self._filled == self._edges.shape[1]:
                self._compare()

    def counts(self):
        """After the last row: (classes, 4) int64: predicted boundary pixels, those of them that are right, true ones,
        those of them that were found."""
        nothing = np.full((1, self._labels.shape[2]), IGNORE, np.uint8)
        for _ in range(self.tolerance + 1):
            self.add(nothing, nothing)
        self._edges[:, self._filled:] = IGNORE
        self._compare()
        return self._totals

    def _compare(self):
        """Count the rows that have `tolerance` rows above and below them; keep what the next ones need."""
        t, classes = self.tolerance, len(self._totals)
        for x in range(0, self._edges.shape[2] - 2 * t, STRIP_PX):
            edges = self._edges[:, :, x:x + STRIP_PX + 2 * t]
            for first in range(1 if classes == 2 else 0, classes, 8):  # eight classes at a time, a bit each
                bit_of = bytearray(256)
                bit_of[first:first + 8] = [1 << i for i in range(8)]
                bit_of[classes:] = bytes(256 - classes)
                bits = np.frombuffer(edges.tobytes().translate(bit_of), np.uint8)  # 4 times as fast as an index
                if not bits.any():
                    continue
                bits = bits.reshape(edges.shape)
                near = _windows(_windows(bits, 2 * t + 1, 1), 2 * t + 1, 2)
                kinds, bits = edges[:, t:-t, t:-t], bits[:, t:-t, t:-t]
                for column, which in enumerate((bits[1], bits[1] & near[0], bits[0], bits[0] & near[1])):
                    self._totals[:, column] += np.bincount(kinds[1 - column // 2][which != 0], minlength=classes)
        self._edges[:, :2 * t] = self._edges[:, -2 * t:].copy()
        self._filled = 2 * t


def _edges(labels):
    """labels (2, h + 2, W) -> (2, h, W) uint8: the class of each boundary pixel of the rows between, IGNORE elsewhere."""
    here = labels[:, 1:-1]
    down, right = _apart(labels[:, :-1], labels[:, 1:]), _apart(here[..., :-1], here[..., 1:])
    found = down[:, :-1] | down[:, 1:]
    found[..., :-1] |= right
    found[..., 1:] |= right
    return np.where(found, here, np.uint8(IGNORE))


def _apart(a, b):
    return (a != b) & (a != IGNORE) & (b != IGNORE)


def _windows(bits, size, axis):
    """Bitwise or of every `size` neighbours along `axis`, which becomes size - 1 shorter. In steps that double."""
    done, bits = 1, np.moveaxis(bits, axis, 0)
    while done < size:
        step = min(done, size - done)
        bits, done = bits[:len(bits) - step] | bits[step:], done + step
    return np.moveaxis(bits, 0, axis)


def boundary_f1(counts):
    """counts (C, 4) of Boundaries, summed over a set -> mean F1 of the classes with a boundary in truth; NaN without."""
    predicted, right, true, found = np.asarray(counts, np.float64)[np.asarray(counts)[:, 2] > 0].T
    precision, recall = right / np.maximum(predicted, 1), found / np.maximum(true, 1)
    return _mean(2 * precision * recall / np.maximum(precision + recall, 1e-12))
