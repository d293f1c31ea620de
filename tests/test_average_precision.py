"""COCO's average precision: figures worked out by hand, and those of pycocotools on random sets and on real boxes."""
import glob
import importlib.util
import math
import os

import numpy as np
import pytest
from PIL import Image

from conftest import real_data
from train_lite.tasks.average_precision import evaluate

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")


def box(x, y, width, height, *more):
    return (x, y, x + width, y + height) + more


A, B, FAR = (0, 0, 50, 50), (100, 0, 50, 50), (300, 300, 50, 50)
TIED, BETWEEN = [(0, 0, 40, 40, 0, 0), (20, 0, 60, 40, 0, 0)], (10, 0, 50, 40, 0.9, 0)


def scored(truth, found, classes=1, limit=100):
    """One image."""
    return evaluate([truth], [found], classes, limit)


# --- by hand ----------------------------------------------------------------------------------------------------------

def test_perfect():
    truth = [box(*A, 0, 0), box(*B, 1, 0)]
    got = scored(truth, [box(*A, 0.5, 0), box(*B, 0.1, 1)], 3)
    assert [got[name] for name in NAMES if name not in ("ap_small", "ap_large")] == [1.0] * 5
    assert math.isnan(got["ap_small"]) and math.isnan(got["ap_large"])
    assert got["per_class_ap"][:2] == [1, 1] and math.isnan(got["per_class_ap"][2])


@pytest.mark.parametrize("found", [[], [box(*FAR, 0.9, 0)], [box(*A, 0.9, 1)], [box(0, 0, 0, 0, 0.9, 0)]])
def test_nothing_right(found):
    """None; elsewhere; of another class; of no area."""
    got = scored([box(*A, 0, 0)], found, 2)
    assert [got[name] for name in ("ap", "ap50", "ap75", "ap_medium", "ar")] == [0.0] * 5
    assert got["per_class_ap"][0] == 0 and math.isnan(got["per_class_ap"][1])


@pytest.mark.parametrize("truth", [[], [box(*A, 0, 1)]])
def test_nothing_to_be_found(truth):
    got = scored(truth, [box(*A, 0.9, 0)])
    assert all(math.isnan(got[name]) for name in NAMES) and math.isnan(got["per_class_ap"][0])
    assert math.isnan(evaluate([], [], 1)["ap"]) and type(got["ap"]) is float


def test_duplicate():
    """Precision 1, 1/2, 2/3 at recalls 1/2, 1/2, 1: 51 of the 101 points see 1, 50 see 2/3."""
    got = scored([box(*A, 0, 0), box(*B, 0, 0)], [box(*B, 0.7, 0), box(*A, 0.9, 0), box(*A, 0.8, 0)])
    assert abs(got["ap"] - (51 + 50 * 2 / 3) / 101) < 1e-12 and got["ar"] == 1


def test_overlap_on_the_threshold():
    """IoU 3/4 exactly: right at .50, .55 ... .75."""
    got = scored([box(0, 0, 40, 40, 0, 0)], [box(0, 0, 40, 30, 0.9, 0)])
    assert abs(got["ap"] - 0.6) < 1e-12 and got["ap75"] == 1 and abs(got["ar"] - 0.6) < 1e-12


def test_of_equal_overlaps_the_last_wins():
    """The first found lies between two boxes, with 0.6 of either: it takes the second, so that only the first is left."""
    assert scored(TIED, [BETWEEN, box(0, 0, 40, 40, 0.8, 0)])["ap50"] == 1
    assert abs(scored(TIED, [BETWEEN, box(20, 0, 40, 40, 0.8, 0)])["ap50"] - 51 / 101) < 1e-12


def test_crowd():
    """Any number inside the crowd do not count, one half inside does above .50; and a box to be found goes before the crowd."""
    truth = [box(0, 0, 200, 200, 0, 1), box(*A, 0, 0)]
    inside = [box(60 + 20 * i, 60, 50, 50, 0.95, 0) for i in range(3)]
    assert scored(truth, inside + [box(*A, 0.5, 0)])["ap"] == 1
    got = scored(truth, [box(175, 60, 50, 50, 0.95, 0), box(*A, 0.5, 0)])
    assert got["ap50"] == 1 and abs(got["ap"] - (1 + 9 * 0.5) / 10) < 1e-12
    assert scored(truth, [box(0, 0, 50, 30, 0.9, 0)])["ap50"] == 1  # the crowd's 1 is more than the box's 0.6


def test_sizes_on_the_boundary():
    """32 x 32 px is small and medium, 96 x 96 px medium and large. What matches nothing counts in its own size."""
    truth = [box(0, 0, 32, 32, 0, 0), box(100, 100, 96, 96, 0, 0)]
    got = scored(truth, [box(0, 0, 32, 32, 0.5, 0)])
    assert (got["ap_small"], got["ap_large"]) == (1, 0)
    assert abs(got["ap"] - 51 / 101) < 1e-12 and abs(got["ap_medium"] - 51 / 101) < 1e-12 and got["ar"] == 0.5
    got = scored(truth, [box(0, 0, 32, 32, 0.5, 0), box(300, 0, 31, 32, 0.9, 0)])
    assert got["ap_small"] == 0.5 and abs(got["ap_medium"] - 51 / 101) < 1e-12 and abs(got["ap"] - 51 / 202) < 1e-12


def test_limit_is_per_image_and_class():
    truth, found = [box(*A, 0, 0), box(*B, 1, 0)], [box(*A, 0.2, 0), box(*FAR, 0.3, 0), box(*B, 0.1, 1)]
    assert scored(truth, found, 2, limit=2)["per_class_ap"] == [0.5, 1]
    assert scored(truth, found, 2, limit=1)["per_class_ap"] == [0, 1]


def test_refused():
    with pytest.raises(ValueError, match="1 images in truth, 2 in found"):
        evaluate([[]], [[], []], 1)
    for truth, found in (([box(*A, 2, 0)], []), ([], [box(*A, 0.5, -1)])):
        with pytest.raises(ValueError, match="of 2"):
            scored(truth, found, 2)


# --- beside pycocotools -----------------------------------------------------------------------------------------------

def reference(truth, found, classes, limit):
    """pycocotools' figures in the same form. Skips the test, saying so, where it is absent; in CI that is a failure."""
    if not importlib.util.find_spec("pycocotools"):
        message = "pycocotools is not installed here; scripts/test installs it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    sets = []
    for tables, kind, names in ((truth, 4, ("iscrowd", 5)), (found, 5, ("score", 4))):
        coco, rows = COCO(), []
        for image, table in enumerate(tables):
            for row in np.reshape(table, (-1, 6)).tolist():
                width, height = row[2] - row[0], row[3] - row[1]
                rows.append({"id": len(rows) + 1, "image_id": image, "category_id": int(row[kind]), "area": width * height,
                             "bbox": [row[0], row[1], width, height], "iscrowd": 0})
                rows[-1][names[0]] = row[names[1]]
        coco.dataset = {"images": [{"id": i} for i in range(len(tables))], "annotations": rows,
                        "categories": [{"id": i} for i in range(classes)]}
        coco.createIndex()
        sets.append(coco)
    judge = COCOeval(sets[0], sets[1], "bbox")
    judge.params.maxDets = [limit]
    judge.evaluate()
    judge.accumulate()
    precision, recall = judge.eval["precision"][..., 0], judge.eval["recall"][..., 0]  # (overlap, recall, class, size)

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else np.nan

    every = precision[..., 0]
    got = {"ap": mean(every), "ap50": mean(every[0]), "ap75": mean(every[5]), "ar": mean(recall[..., 0]),
           "per_class_ap": [mean(every[:, :, c]) for c in range(classes)]}
    got.update(("ap_" + name, mean(precision[..., i])) for i, name in enumerate(("small", "medium", "large"), 1))
    return got


def assert_same(truth, found, classes, limit):
    """Both give the same figures. Returns them."""
    got, want = evaluate(truth, found, classes, limit), reference(truth, found, classes, limit)
    assert sorted(got) == sorted(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-12, err_msg=name)
    return got


def random_set(rng, images, classes, most, guesses):
    """(truth, found): boxes on a grid of 8 px, so that overlaps and areas tie and lie on the limits, with crowds and doubles;
    found ones near them, of scores that tie."""
    truth, found = [], []
    for _ in range(images):
        count = rng.randint(0, most + 1)
        corner, size = rng.randint(0, 20, (count, 2)) * 8, rng.choice([1, 2, 4, 4, 5, 8, 12, 12, 14], (count, 2)) * 8
        rows = np.hstack([corner, corner + size, rng.randint(0, classes, (count, 1)), rng.rand(count, 1) < 0.15]).astype(float)
        doubles = rows[rng.rand(count) < 0.3]
        doubles[:, [0, 2]] += 16 * rng.randint(0, 2, (len(doubles), 1))
        truth.append(np.concatenate([rows, doubles]))
        count = rng.randint(0, guesses + 1)
        near = rows[rng.randint(0, len(rows), count)] if len(rows) else np.zeros((count, 6))
        near[:, :4] += rng.randint(-1, 2, (count, 4)) * 8 * (rng.rand(count, 4) < 0.3)
        near[:, 2:4] = np.maximum(near[:, 2:4], near[:, :2])
        kinds = np.where(rng.rand(count) < 0.1, rng.randint(0, classes, count), near[:, 4])
        found.append(np.column_stack([near[:, :4], rng.randint(0, 6, count) / 5.0, kinds]))
    return truth, found


@pytest.mark.parametrize("limit", [1, 10, 100, 1000])
def test_random_sets(limit):
    for seed in range(8):
        rng = np.random.RandomState(seed)
        assert_same(*random_set(rng, 12, 4, 12, 40), classes=5, limit=limit)  # the fifth class never occurs


@pytest.mark.parametrize("limit", [10, 100, 1000])
def test_more_found_than_the_limit(limit):
    truth, found = random_set(np.random.RandomState(0), 3, 1, 9, 2500)
    assert max(len(table) for table in found) > 1000
    assert_same(truth, found, 1, limit)


@pytest.mark.parametrize("x", [0, 20])
def test_equal_overlaps(x):
    assert_same([TIED], [[BETWEEN, box(x, 0, 40, 40, 0.8, 0)]], 1, 100)


def test_single_images():
    """Small enough that most have a figure without a class, a size or a found box."""
    for seed in range(40):
        rng = np.random.RandomState(seed)
        assert_same(*random_set(rng, 1, 2, 2, 4), classes=2, limit=100)


@pytest.mark.parametrize("limit", [1, 10, 100])
def test_real_boxes(limit):
    """Those of COCO, and what a fair detector might find of them: moved, missed, doubled, taken for another class, made up."""
    folder, rng, truth, found = real_data("coco_small"), np.random.RandomState(0), [], []
    for path in sorted(glob.glob(os.path.join(folder, "images", "*.jpg"))):
        with Image.open(path) as image:
            size = np.array(image.size)
        labels = os.path.join(folder, "labels", os.path.basename(path)[:-4] + ".txt")
        rows = np.loadtxt(labels, ndmin=2) if os.path.exists(labels) else np.zeros((0, 5))
        centre, side = rows[:, 1:3] * size, rows[:, 3:5] * size
        boxes = np.hstack([centre - side / 2, centre + side / 2])
        truth.append(np.column_stack([boxes, rows[:, 0], rng.rand(len(rows)) < 0.05]))
        picks = np.flatnonzero(rng.rand(2 * len(rows)) < np.repeat([0.8, 0.3], len(rows))) % max(len(rows), 1)
        moved = boxes[picks] + rng.randn(len(picks), 4) * np.tile(side[picks], 2) * 0.06
        kinds = np.where(rng.rand(len(picks)) < 0.1, rng.randint(0, 80, len(picks)), rows[picks, 0])
        corner = rng.rand(6, 2) * size * 0.8
        extra = np.column_stack([corner, corner + rng.rand(6, 2) * size * 0.2, 0.6 * rng.rand(6), rng.randint(0, 80, 6)])
        found.append(np.concatenate([np.column_stack([moved, rng.rand(len(picks)), kinds]), extra]))
    assert len(truth) == 70 and sum(map(len, truth)) == 581
    got = assert_same(truth, found, 80, limit)
    assert np.isnan(got["per_class_ap"]).sum() >= 14 and 0.1 < got["ap"] < 0.8
