"""Segmentation scores from counts. Definitions: docs/method.md, section 4.

Two ways to gather: `pooled` counts over the whole set per class, then averages over the classes that occur (the
primary figures); `paper_compat` scores every image and class alone, takes 0 where that is undefined, then averages,
as the published code does. Never compare one with the other."""
import numpy as np

from train_lite.dataset import IGNORE

NAMES = ("acc", "f1", "iou", "bacc", "plr", "nlr")
PLR_LIMIT = 1e4  # stands for infinity: no false positives at all


def confusion(truth, predicted, classes):
    """Counts of (true class, predicted class): (classes, classes) int64. truth may hold IGNORE."""
    keep = truth != IGNORE
    pairs = truth[keep].astype(np.int64) * classes + predicted[keep]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


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
    """per_image: one (C, C) matrix per image; two classes are scored as one foreground class.

    Returns {'pooled': {name: float}, 'paper_compat': {...}, 'per_class_iou': [...], 'plr_clamped': n}: n scores were
    infinite and count as PLR_LIMIT."""
    first = 1 if len(per_image[0]) == 2 else 0
    pooled = scores(np.sum(per_image, axis=0))
    present = np.sum(per_image, axis=0).sum(axis=1)[first:] > 0
    clamped = int(np.isinf(pooled["plr"][first:]).sum())
    single = [scores(matrix) for matrix in per_image]
    return {
        "pooled": {name: _mean(_limited(pooled[name][first:])[present]) for name in NAMES},
        "paper_compat": {name: float(np.mean([np.nan_to_num(_limited(s[name][first:])) for s in single])) for name in NAMES},
        "per_class_iou": [None if np.isnan(v) else float(v) for v in pooled["iou"]],
        "plr_clamped": clamped,
    }


def _limited(values):
    return np.where(np.isinf(values), PLR_LIMIT, values)


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
