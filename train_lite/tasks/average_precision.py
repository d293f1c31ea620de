"""COCO's average precision of boxes. Definition: https://cocodataset.org/#detection-eval, which goes on from 'The PASCAL
Visual Object Classes (VOC) Challenge', Everingham et al., IJCV 2010, section 4.2. The figures are those of pycocotools, whose
rules decide where the definition is silent: both ends of a range of sizes belong to it, and of equal overlaps the last wins."""
import numpy as np

from edge.boxes import areas, iou

OVERLAPS = np.linspace(0.5, 0.95, 10)  # least IoU of a match
RECALLS = np.linspace(0, 1, 101)
SIZES = np.array([(0, 1e5), (0, 32), (32, 96), (96, 1e5)]) ** 2  # px^2, from and to: all, small, medium, large


def evaluate(truth, found, classes, limit=100):
    """truth: per image (n, 6): x0, y0, x1, y1 px, class id, crowd (0 or 1); found: per image (m, 6): x0, y0, x1, y1 px, score,
    class id. The `limit` best of each image and class count. What is found in a crowd is neither right nor wrong.

    Returns {'ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large', 'ar': float, 'per_class_ap': [float]}: the mean precision
    (ar: the last recall) over OVERLAPS and the classes that occur in truth, in that range of sizes; NaN where none does."""
    if len(truth) != len(found):
        raise ValueError("%d images in truth, %d in found" % (len(truth), len(found)))
    parts = [[] for _ in range(classes)]  # per class, of each image where it is or was found
    for boxes, guesses in zip(truth, found):
        boxes, guesses = (np.asarray(table, np.float64).reshape(-1, 6) for table in (boxes, guesses))
        for kind in np.union1d(boxes[:, 4], guesses[:, 5]):
            if not 0 <= kind < classes:
                raise ValueError("class %g of %d" % (kind, classes))
            mine = guesses[guesses[:, 5] == kind]
            mine = mine[np.argsort(-mine[:, 4], kind="mergesort")[:limit]]
            parts[int(kind)].append((mine[:, 4],) + _judged(boxes[boxes[:, 4] == kind], mine))
    precision, recall = np.stack([_summary(of_class) for of_class in parts], axis=-1)  # each (sizes, overlaps, classes)
    return {"ap": _mean(precision[0]), "ap50": _mean(precision[0, 0]), "ap75": _mean(precision[0, 5]),
            "ap_small": _mean(precision[1]), "ap_medium": _mean(precision[2]), "ap_large": _mean(precision[3]),
            "ar": _mean(recall[0]), "per_class_ap": precision[0].mean(axis=0).tolist()}


def _outside(boxes):
    """(sizes, n) bool: not of that range."""
    sizes = areas(boxes)
    return (sizes < SIZES[:, :1]) | (sizes > SIZES[:, 1:])


def _judged(boxes, found):
    """One image and class, found (m, 6) best first -> right (sizes, overlaps, m) bool, wrong likewise, and how many boxes are to
    be found (sizes,). Each in turn takes the free box that it overlaps most; one to be found goes before one that is not (a
    crowd, or outside of the range). A crowd stays free."""
    crowd = boxes[:, 5] != 0
    wanted = ~(crowd | _outside(boxes))[:, None]
    free = np.ones((len(SIZES), len(OVERLAPS), len(boxes)), bool)
    right = np.zeros(free.shape[:2] + (len(found),), bool)
    wrong = right | ~_outside(found)[:, None]  # what matches nothing counts only in the range of its own size
    overlaps = iou(found, boxes, crowd)
    for index in np.flatnonzero((overlaps >= OVERLAPS[0]).any(axis=1)):
        fits = free & (overlaps[index] >= OVERLAPS[:, None])
        matched, first = fits.any(axis=2), fits & wanted
        right[..., index] = first.any(axis=2)
        wrong[..., index] &= ~matched
        fits = np.where(right[..., index, None], first, fits)
        last = np.argmax(np.where(fits, overlaps[index], -1)[..., ::-1], axis=2)  # counted from the end: the last of equals
        taken = np.arange(len(boxes))[::-1] == last[..., None]
        free &= ~(taken & matched[..., None]) | crowd
    return right, wrong, wanted.sum(axis=(1, 2))


def _summary(parts):
    """One class: (scores, right, wrong, wanted) of each image -> (2, sizes, overlaps): mean precision at RECALLS, last recall;
    NaN where there is nothing to be found."""
    result = np.full((2, len(SIZES), len(OVERLAPS)), np.nan)
    if parts:
        scores, right, wrong = (np.concatenate(column, axis=-1) for column in list(zip(*parts))[:3])
        order = np.argsort(-scores, kind="mergesort")  # over all images, equals in the images' order
        for size, wanted in enumerate(sum(part[3] for part in parts)):
            for level in range(len(OVERLAPS) if wanted else 0):
                hits, misses = (np.cumsum(flags[size, level][order]) for flags in (right, wrong))
                precision = hits / np.maximum(hits + misses, 1)
                best = np.maximum.accumulate(np.append(precision, 0)[::-1])[::-1]  # at this recall or a higher one, 0 past all
                result[:, size, level] = best[np.searchsorted(hits / wanted, RECALLS)].mean(), hits[-1:].sum() / wanted
    return result


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
