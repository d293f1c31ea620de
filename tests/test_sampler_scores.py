"""What training says of a net: scores of boundaries, what a sampler adds to the scores, warnings, pictures."""
import json
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from conftest import rest_slow, write_set  # noqa: E402
from edge import scores  # noqa: E402
from edge.geometry import nearest_index  # noqa: E402
from edge.warp import path, reference  # noqa: E402
from edge.warp import pictures as warp_pictures  # noqa: E402
from train_lite import evaluate, metrics, pictures, run, state  # noqa: E402
from train_lite.config import TrainConfig, mode_settings  # noqa: E402
from train_lite.data import dataset, store  # noqa: E402
from train_lite.data.dataset import IGNORE  # noqa: E402
from train_lite.metrics import Boundaries  # noqa: E402
from train_lite.tasks.segmentation import Segmentation  # noqa: E402
from warp_cases import CASES, grid_of  # noqa: E402

CPU = torch.device("cpu")


# --- boundaries -----------------------------------------------------------------------------------------------------

def plain_edges(labels, kind):
    """(y, x) of the boundary pixels of a class, pixel by pixel as defined."""
    found, (height, width) = [], labels.shape
    for y, x in zip(*np.nonzero(labels == kind)):
        around = [labels[v, u] for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                  if 0 <= v < height and 0 <= u < width]
        if any(other not in (kind, IGNORE) for other in around):
            found.append((y, x))
    return np.array(found).reshape(-1, 2)


def plain_counts(truth, predicted, classes, tolerance):
    counts = np.zeros((classes, 4), int)
    for kind in range(1 if classes == 2 else 0, classes):
        true, guess = (plain_edges(labels, kind) for labels in (truth, np.where(truth == IGNORE, IGNORE, predicted)))
        near = np.abs(true[:, None] - guess[None]).max(axis=2) <= tolerance
        counts[kind] = len(guess), near.any(axis=0).sum(), len(true), near.any(axis=1).sum()
    return counts


def banded(boundaries, truth, predicted, rng):
    """Shown in bands of odd heights."""
    y = 0
    while y < len(truth):
        rows = rng.randint(1, 14)
        boundaries.add(truth[y:y + rows], predicted[y:y + rows])
        y += rows
    return boundaries.counts()


@pytest.mark.parametrize("seed", range(24))
def test_boundaries_are_as_defined(seed, monkeypatch):
    rng = np.random.RandomState(seed)
    classes, (height, width), cell = rng.choice([2, 3, 9, 17, 250]), rng.randint(1, 50, 2), rng.randint(1, 9)
    monkeypatch.setattr(metrics, "TOLERANCE", rng.choice([0.0075, 0.05, 0.3]))
    monkeypatch.setattr(metrics, "BLOCK_ROWS", rng.choice([1, 5, 64]))
    monkeypatch.setattr(metrics, "STRIP_PX", rng.choice([3, 16, 2048]))

    def blocks():
        small = rng.randint(0, classes, (height // cell + 1, width // cell + 1)).astype(np.uint8)
        return small[np.arange(height)[:, None] // cell, np.arange(width) // cell]

    truth = blocks()
    predicted = np.where(rng.rand(height, width) < 0.8, np.roll(truth, 1, axis=rng.randint(2)), blocks())
    truth[rng.rand(height, width) < rng.choice([0, 0.05, 0.5])] = IGNORE
    boundaries = Boundaries(classes, height, width)
    got = banded(boundaries, truth, predicted, rng)
    assert (got == plain_counts(truth, predicted, classes, boundaries.tolerance)).all()
    assert got is boundaries.counts() and (got == plain_counts(truth, predicted, classes, boundaries.tolerance)).all()


@pytest.mark.parametrize("shift,right", [(0, True), (3, True), (4, False)])
def test_a_boundary_counts_as_right_within_the_tolerance(shift, right, monkeypatch):
    """An edge across 320 x 240 px: the diagonal is 400 px, the tolerance 3 with the paper's share of it."""
    monkeypatch.setattr(metrics, "TOLERANCE", 0.0075)
    truth, predicted = np.zeros((2, 240, 320), np.uint8)
    truth[:, 100:], predicted[:, 100 + shift:] = 1, 1
    boundaries = Boundaries(2, 240, 320)
    boundaries.add(truth, predicted)
    assert boundaries.tolerance == 3
    assert boundaries.counts().tolist() == [[0] * 4, [240, 240 * right, 240, 240 * right]]
    assert metrics.boundary_f1(boundaries.counts()) == (1.0 if right else 0.0)


def test_boundary_f1_is_the_mean_over_classes_with_a_true_boundary():
    """Precision 1/2 and recall 3/4; nothing predicted; no boundary in truth."""
    assert metrics.boundary_f1([[8, 4, 4, 3], [0, 0, 5, 0], [7, 0, 0, 0]]) == pytest.approx((2 * 0.5 * 0.75 / 1.25 + 0) / 2)
    assert np.isnan(metrics.boundary_f1([[0, 0, 0, 0], [3, 0, 0, 0]]))


def test_boundaries_hold_only_the_rows_that_the_tolerance_needs():
    """4096 x 4096 px: 32 MB of labels."""
    row = np.zeros((16, 4096), np.uint8)
    row[:, ::64] = 1
    tracemalloc.start()
    boundaries = Boundaries(2, 4096, 4096)
    for _ in range(4096 // 16):
        boundaries.add(row, row)
    assert (boundaries.counts()[1] == 4096 * 64).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6, peak


# --- what a sampler adds --------------------------------------------------------------------------------------------

class Bright(torch.nn.Module):
    """A net for the images of level_set(): its scores say how near the samples' level is to each class's. It looks where
    `logits` (h, w) say."""

    def __init__(self, logits, outputs):
        super().__init__()
        self.deform = lambda small: torch.from_numpy(logits)[None, None]
        self.outputs = outputs

    def forward(self, pixels):
        level = (pixels[:, :1] * evaluate.STD[0] + evaluate.MEAN[0]) * 255
        apart = torch.cat([-(level - 100 * kind).abs() for kind in range(max(2, self.outputs))], dim=1)
        return apart if self.outputs > 1 else apart[:, 1:] - apart[:, :1]


def level_set(folder, classes, sampler="deform", sizes=((61, 83), (90, 70))):
    """A Problem of blocks of 100 times their class, some pixels ignored."""
    rng = np.random.RandomState(classes)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for index, (height, width) in enumerate(sizes):
        labels = rng.randint(0, classes, (4, 5)).astype(np.uint8)[nearest_index(height, 4)][:, nearest_index(width, 5)]
        Image.fromarray(np.repeat(100 * labels[..., None], 3, axis=2)).save(str(folder / "images" / ("%d.png" % index)))
        labels[:9, 20:] = IGNORE
        labels[0, 0] = 1
        Image.fromarray(labels).save(str(folder / "masks" / ("%d.png" % index)))
    config = TrainConfig(data=str(folder), fit="none", classes=classes if classes > 2 else 1, width=4, sampler=sampler,
                         task_size="32x32", density=16, radius=0.2, patch=32, overlap=8)
    found, settings, problems = dataset.read_classes(str(folder), config), mode_settings(config), []
    stored = store.ingest(dataset.find_pairs(str(folder), 0), found, "none", 0, str(folder / "cache"), 1, (), 0, problems)
    assert not problems
    return Segmentation(config, found, stored, [], [], CPU), settings


def logits(height=1.0):
    return (height * np.random.RandomState(0).randn(16, 16)).astype(np.float32)


def iou_f1(truth, predicted, classes):
    pooled = metrics.summarise([metrics.confusion(t, p, classes) for t, p in zip(truth, predicted)])["pooled"]
    return {name: pytest.approx(pooled[name], abs=2e-3) for name in ("iou", "f1")}


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_of_a_sampler_are_as_defined(tmp_path, classes):
    problem, settings = level_set(tmp_path, classes)
    net = Bright(logits(), 1 if classes == 2 else classes)
    got = evaluate.evaluate(net, problem.train, problem.how, classes, CPU, final=True)
    positions = reference.grid(reference.softmax(logits()), *(settings.task + settings.radius))
    truth, predicted, low_truth, low, back, edges = [], [], [], [], [], 0
    for entry in problem.train:
        size = entry.height, entry.width
        truth.append(entry.labels.window(0, 0, *size))
        samples = reference.sample(entry.picture, positions)
        pixels = torch.from_numpy(((samples / 255 - evaluate.MEAN) / evaluate.STD).astype(np.float32)).permute(2, 0, 1)
        found = net(pixels[None])[0].numpy()
        bands = [scores.labels_of(band) for _y0, band in reference.unwarp(found, positions, *size)]
        predicted.append(np.concatenate(bands))
        low.append(scores.labels_of(found))
        low_truth.append(reference.sample_labels(entry.labels, positions))
        votes = np.stack([low_truth[-1] == kind for kind in range(classes)]).astype(np.float32)
        back.append(np.concatenate([band.argmax(axis=0) for _y0, band in reference.unwarp(votes, positions, *size)]))
        boundaries = Boundaries(classes, *size)
        boundaries.add(truth[-1], predicted[-1])
        edges = edges + boundaries.counts()
    assert {name: got["pooled"][name] for name in ("iou", "f1")} == iou_f1(truth, predicted, classes)
    assert got["low_res"] == iou_f1(low_truth, low, classes) and got["ceiling"] == iou_f1(truth, back, classes)
    assert got["boundary_f1"] == pytest.approx(metrics.boundary_f1(edges), abs=5e-3)
    assert got["faulty"] == 0 and 0.7 < got["ceiling"]["iou"] < 1
    assert len({round(entry["iou"], 3) for entry in (got["pooled"], got["low_res"], got["ceiling"])}) == 3
    between = evaluate.evaluate(net, problem.train, problem.how, classes, CPU)
    assert between == dict(got, ceiling=None)  # and nothing else differs before the end
    json.dumps(got)


def test_ignored_pixels_count_in_no_score(tmp_path):
    problem, _settings = level_set(tmp_path, 3)
    counted = sum(int((entry.labels.window(0, 0, entry.height, entry.width) != IGNORE).sum()) for entry in problem.train)
    samples = evaluate.SampleScores(problem.how, 3)
    for entry in problem.train:
        bands, seen = evaluate.predict(Bright(logits(), 3), entry, problem.how, CPU)
        list(bands)
        samples.add(entry, seen, True)
    assert np.sum(samples.best) == counted and 0 < np.sum(samples.low) < len(problem.train) * 32 * 32


def test_patches_have_boundaries_at_the_end_only(tmp_path):
    problem, _settings = level_set(tmp_path, 3, "none")
    net = state.State(problem).net
    between, end = (evaluate.evaluate(net, problem.train, problem.how, 3, CPU, final=final) for final in (False, True))
    assert between.pop("boundary_f1") is None and 0 <= end.pop("boundary_f1") <= 1
    assert between == end and not {"low_res", "ceiling", "faulty"} & set(end)


# --- grids that waste their samples -----------------------------------------------------------------------------------

def spike(height, y, x, nodes=64):
    found = np.zeros((nodes, nodes), np.float32)
    found[y, x] = height
    return found


@pytest.mark.parametrize("radius", [0.05, 0.125, 0.25, 0.5])
@pytest.mark.parametrize("task", [64, 128, 256])
@pytest.mark.parametrize("y, x", [(32, 21), (32, 32), (9, 47), (3, 40), (60, 60), (63, 5)])
def test_a_density_of_one_point_is_a_fault_wherever_it_is_and_a_speck_is_none(y, x, radius, task):
    config = TrainConfig(sampler="deform", task_size="%dx%d" % (task, task), radius=radius)
    recipe = evaluate.recipe(mode_settings(config), 0, 1)
    wrong = [path.faults(reference.grid(reference.softmax(spike(height, y, x)), task, task, *recipe.radius), recipe)[0]
             for height in (0, 4, 50)]
    assert wrong == [False, False, True]


def test_a_folded_grid_is_a_fault():
    case = [case for case in CASES if case.name == "fold"][0]
    recipe = evaluate.recipe(mode_settings(TrainConfig(sampler="deform", task_size="64x64")), 0, 1)
    assert path.faults(reference.own_positions(64, 64)[:, ::-1], recipe)[0]
    assert path.faults(grid_of(case), recipe)[2] == reference.faults(grid_of(case)).folded / 4096.0


def test_one_line_says_how_many_images_are_wasted(tmp_path, capsys):
    problem, _settings = level_set(tmp_path, 2)
    assert evaluate.evaluate(Bright(logits(), 1), problem.train, problem.how, 2, CPU)["faulty"] == 0
    assert "warning" not in capsys.readouterr().err
    assert evaluate.evaluate(Bright(spike(90, 8, 5, 16), 1), problem.train, problem.how, 2, CPU)["faulty"] == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and re.search(r"2 of 2 images .*worst: [01], [.\d]+ % .*--radius", lines[0]), lines


# --- pictures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", rest_slow([((61, 83),), ((1, 1),), ((20, 700),)]))
def test_a_sampler_s_picture_has_a_second_row(tmp_path, size):
    problem, _settings = level_set(tmp_path, 2, sizes=(size,))
    entry, heights = problem.train[0], []
    for number, how in enumerate((problem.how, evaluate.recipe(mode_settings(TrainConfig(patch=32, overlap=0)), 32, 1))):
        net = Bright(logits(), 1) if number == 0 else state.State(level_set_patches(problem)).net
        bands, seen = evaluate.predict(net, entry, how, CPU)
        pictures.comparison(entry, bands, problem.classes.palette, str(tmp_path / "a.png"), seen)
        with Image.open(str(tmp_path / "a.png")) as image:
            panel = min(512, max(size)) * size[1] // max(size)
            assert image.mode == "RGB" and image.width == 3 * (panel + warp_pictures.GAP_PX)
            heights.append(image.height)
    assert heights[0] == 2 * heights[1]


def level_set_patches(problem):
    """The Problem of patches on the same images."""
    return Segmentation(problem.config._replace(sampler="none"), problem.classes, problem.train, [], [], CPU)


def test_density_is_bright_where_samples_are_close():
    picture = np.full((120, 160, 3), 100, np.uint8)
    even, least, most = warp_pictures.density(picture, reference.own_positions(48, 64))
    assert abs(least - 1) < 1e-3 > abs(most - 1) and np.ptp(even.reshape(-1, 3), axis=0).max() <= 1
    positions = reference.grid(reference.softmax(spike(5, 8, 5, 16)), 48, 64, 4, 4)  # the node at 8.5/16, 5.5/16
    heat, least, most = warp_pictures.density(picture, positions)
    assert least < 0.8 and most > 4
    bright = heat.sum(axis=2, dtype=int)
    at = np.unravel_index(bright.argmax(), bright.shape)
    assert abs(at[0] - 120 * 8.5 / 16) < 6 and abs(at[1] - 160 * 5.5 / 16) < 8


def test_the_grid_s_lines_go_through_the_samples():
    drawn = warp_pictures.grid(np.zeros((240, 240, 3), np.uint8), reference.own_positions(48, 48))
    lit = drawn[..., 0] > 60
    across = lit[nearest_index(1, 240)[0] + 3]  # between two lines
    count = int((np.diff(np.concatenate([[0], across.astype(int)])) == 1).sum())
    assert count == warp_pictures.LINES, count
    with_few = warp_pictures.grid(np.zeros((40, 240, 3), np.uint8), reference.own_positions(48, 48))[..., 0] > 60
    assert with_few.mean() < 0.5


# --- runs ---------------------------------------------------------------------------------------------------------------

def trained(folder, csv, *flags):
    """Two epochs on the set of conftest, as a user types it. Returns the summary."""
    data = write_set(folder / "set", count=4)
    with open(str(folder / "set" / "pairs.csv"), "w") as handle:
        handle.write("image,mask,split\n" + "".join("images/%02d.png,masks/%02d.png,%s\n" % (i, i, split)
                                                    for i, split in enumerate(csv)))
    words = ("--data", data, "--out", folder / "runs", "--name", "run", "--res", 56, "--width", 4, "--epochs", 2,
             "--threads", 1) + flags
    if "--sampler" in flags:
        words += ("--task-size", "32x32", "--density", 16, "--deform-width", 8)
    assert run.main([str(word) for word in words]) == 0
    return json.loads((folder / "runs" / "run" / "summary.json").read_text())


@pytest.mark.parametrize("sampler", ["deform", "uniform", "edge-oracle"])
def test_a_sampler_run_reports_its_three_scores(tmp_path, capsys, sampler):
    summary = trained(tmp_path, ("train", "train", "val", "test"), "--sampler", sampler)
    for part, ceiling in (("val", False), ("test", True)):
        assert summary[part]["boundary_f1"] is not None and set(summary[part]["low_res"]) == {"iou", "f1"}
        assert (summary[part]["ceiling"] is not None) == ceiling
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("test ")]
    assert len(line) == 1 and re.match(r"test  IoU \S+  F1 \S+  boundary F1 \S+ \| at 32x32 \S+ \| label round trip 0\.\d+ "
                                       r"\(best net, 1 images\)$", line[0]), line


def test_without_test_images_the_last_validation_says_it_all(tmp_path, capsys):
    summary = trained(tmp_path, ("train", "train", "train", "val"), "--sampler", "uniform")
    assert 0 < summary["val"]["ceiling"]["iou"] <= 1 and summary["test"] is None
    assert sum(line.startswith("val  IoU") and "round trip" in line for line in capsys.readouterr().err.splitlines()) == 1


def test_a_patch_run_says_nothing_of_samples(tmp_path, capsys):
    summary = trained(tmp_path, ("train", "train", "val", "test"), "--patch", 32, "--overlap", 8)
    assert summary["val"]["boundary_f1"] is None and "boundary_f1" in summary["test"] and "low_res" not in summary["test"]
    said = capsys.readouterr().err
    assert re.search(r"^test  IoU \S+  F1 \S+  boundary F1 \S+ \(best net, 1 images\)$", said, re.MULTILINE)
