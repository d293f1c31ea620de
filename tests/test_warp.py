"""Learned down-sampling: the formulas, numpy = torch = CUDA on every case of warp_cases, and the way back to every pixel."""
import os
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from doubles import kernels
from edge import images
from edge.errors import EdgeError
from edge.geometry import bilinear_matrix, reflect
from edge.scores import labels_of
from edge.warp import reference
from train_lite.data import store
from train_lite.samplers import warp as trained
from warp_cases import BAD_GRIDS, CASES, density, grid_of, picture_of, scores_of

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
with open(os.path.join(ROOT, "edge", "warp", "warp.cu"), encoding="utf-8") as handle:
    CUDA = handle.read()


def whole(bands, axis):
    """The bands of unwarp() or unwarp_labels() joined; they must be all rows in order."""
    parts, done = [], 0
    for y0, band in bands:
        assert y0 == done
        done += band.shape[axis]
        parts.append(band)
    return np.concatenate(parts, axis=axis)


def unwarped(scores, grid, size):
    return whole(reference.unwarp(scores, grid, *size), 1)


# --- the formula --------------------------------------------------------------------------------------------------

@by_name
def test_separable_is_equation_3(case):
    """With the Gaussian in two dimensions, positions that go on beyond the border, and the density mirrored there."""
    d, (ry, rx) = density(case, np.float64), case.radius
    h, w = d.shape
    i, j = np.arange(-ry, ry + 1), np.arange(-rx, rx + 1)
    gauss = np.exp(-4 * np.log(2) * ((i[:, None] / float(ry)) ** 2 + (j / float(rx)) ** 2))
    expected = np.empty((h, w, 2))
    for y in range(h):
        for x in range(w):
            mass = d[reflect(y + i, h)][:, reflect(x + j, w)] * gauss
            own = np.array([(y + 0.5) / h, (x + 0.5) / w])
            away = [(mass * (((y + i + 0.5) / h) - own[0])[:, None]).sum(), (mass * (((x + j + 0.5) / w) - own[1])).sum()]
            expected[y, x] = own + np.array(away) / (mass.sum() + reference.EMPTY)
    assert np.abs(reference.nodes(d, ry, rx) - expected).max() < 1e-12
    assert np.abs(reference.nodes(density(case), ry, rx) - expected).max() < 1e-6


@by_name
def test_a_grid_keeps_to_the_image(case):
    """Inside, in order along its own rows and columns, its border samples on their side: nothing is cropped."""
    grid = grid_of(case, np.float64)
    (th, tw), (h, w) = case.task, case.logits.shape
    assert grid.min() > 0 and grid.max() < 1
    assert (np.diff(grid[..., 0], axis=0) > -1e-7).all() and (np.diff(grid[..., 1], axis=1) > -1e-7).all()
    assert np.allclose(grid[0, :, 0], 0.5 / th) or h > th
    assert np.allclose(grid[:, -1, 1], 1 - 0.5 / tw) or w > tw


@pytest.mark.parametrize("sizes", [(8, 8, 32, 64, 128, 512), (7, 5, 13, 19, 51, 77), (3, 9, 9, 3, 10, 10),
                                   (1, 1, 5, 6, 2, 3)])
def test_a_flat_density_is_the_plain_resize(sizes):
    h, w, th, tw, height, width = sizes
    for dtype, level in ((np.float32, 0.0), (np.float32, -7.3), (np.float64, 1.0)):
        flat = reference.softmax(np.full((h, w), level, dtype))
        for radius in (1, 4, 2 * w):
            grid = reference.grid(flat, th, tw, radius, radius)
            assert grid.dtype == dtype and (grid == reference.own_positions(th, tw, dtype)).all()
            assert (trained.grid(torch.from_numpy(flat), th, tw, radius, radius).numpy() == grid).all()
    picture = images.ArrayPicture(np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8))
    pixels = torch.from_numpy(picture.array.astype(np.float64)).permute(2, 0, 1)[None]
    plain = F.interpolate(pixels, (th, tw), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    assert np.abs(reference.sample(picture, grid) - plain).max() < 1e-9
    single = reference.sample(picture, grid.astype(np.float32))
    assert single.dtype == np.float32 and np.abs(single - plain).max() < 256 * 2e-7 * max(height, width)  # of a position
    scores = scores_of((th, tw), 2)
    back = np.stack([bilinear_matrix(height, th) @ plane @ bilinear_matrix(width, tw).T for plane in scores])
    assert np.abs(unwarped(scores, grid, (height, width)) - back).max() < 1e-5


def test_softmax():
    logits = np.random.RandomState(0).randn(5, 7)
    for dtype in (np.float16, np.float32, np.float64):
        got = reference.softmax(logits.astype(dtype))
        assert got.dtype == (np.float64 if dtype == np.float64 else np.float32) and abs(got.sum() - 1) < 1e-6
        assert np.allclose(trained.softmax(torch.from_numpy(logits.astype(dtype))).numpy(), got, atol=1e-7)
    for wrong in (np.nan, np.inf):
        logits[2, 3] = wrong
        with pytest.raises(EdgeError, match="density logits"), np.errstate(invalid="ignore"):
            reference.softmax(logits)


def test_faults():
    own = reference.own_positions(9, 12)
    assert reference.faults(own)[:1] == (0,) and abs(reference.faults(own).smallest - 1) < 1e-5
    assert reference.faults(own).crowded == 0
    turned, point = reference.faults(own[::-1]), reference.faults(np.full_like(own, 0.4))
    assert turned.folded == 8 * 11 and turned.smallest < 0 and point == (0, 0.0, 1.0)
    crossed = own.copy()
    crossed[4, 5, 1] = 0.95
    assert 0 < reference.faults(crossed).folded <= 4
    assert reference.faults(own[:1]) == (0, 1.0, 0)
    found = {case.name: reference.faults(grid_of(case)) for case in CASES}
    assert found["fold"].folded and found["collapse"].crowded > 0.3 and found["collapse"].smallest < 1e-3
    assert not any(found[case.name].folded for case in CASES if case.fair)


# --- the three transcriptions -------------------------------------------------------------------------------------

@by_name
def test_torch_is_numpy(case):
    for dtype, limit in ((np.float32, 1e-6), (np.float64, 1e-12)):
        d = trained.softmax(torch.from_numpy(case.logits.astype(dtype)))
        assert np.abs(d.numpy() - density(case, dtype)).max() < limit
        nodes = reference.nodes(density(case, dtype), *case.radius)
        assert np.abs(trained.nodes(d, *case.radius).numpy() - nodes).max() < limit
        grid = grid_of(case, dtype)
        ours = trained.grid(d, *(case.task + case.radius))
        assert ours.numpy().dtype == dtype and np.abs(ours.numpy() - grid).max() < limit
        picture = images.ArrayPicture(picture_of(case))
        samples = trained.sample(picture, torch.from_numpy(grid)).permute(1, 2, 0).numpy()
        assert samples.dtype == dtype and np.abs(samples - reference.sample(picture, grid)).max() < 1e-4


def launch(kernel, threads, *arguments):
    """Run a kernel of warp.cu on threads = (columns, rows) of a CPU; numpy arrays are its pointers."""
    library, block = kernels.compile_on_cpu(CUDA), (7, 3, 1)
    values = [np.uintp(value.ctypes.data) if kind == "P" else np.dtype(kind).type(value)
              for kind, value in zip(kernels.parameters(library, kernel), arguments)]
    assert all(value.flags.c_contiguous for value in arguments if isinstance(value, np.ndarray))
    kernels.launch(library, kernel, tuple(-(-n // b) for n, b in zip(threads, block)) + (1,), block, values)


def assert_cuda_is_numpy(picture, grid, scores):
    (height, width), (th, tw) = picture.shape[:2], grid.shape[:2]
    expected = images.normalise(reference.sample(images.ArrayPicture(picture), grid), MEAN, STD)
    scale, shift = [1 / (255.0 * s) for s in STD], [-m / s for m, s in zip(MEAN, STD)]
    for kernel, dtype in (("sample_float", np.float32), ("sample_half", np.float16)):
        out = np.full((3, th, tw), np.nan, dtype)
        launch(kernel, (tw, th), picture, height, width, grid, th, tw, *(scale + shift + [out]))
        assert (out == expected.astype(dtype)).all()
    step = reference.mesh_step(grid, height, width)
    mesh = reference.inverse(grid, height, width, step)
    expected = unwarped(scores, grid, (height, width))
    planes = (scores, len(scores), th, tw, mesh, step, height, width)
    for y0 in (0, height // 3):
        out = np.full((len(scores), height - y0, width), np.nan, np.float32)
        labels = np.full((height - y0, width), 255, np.uint8)
        launch("unwarp_scores", (width, height - y0), *(planes + (y0, height - y0, out)))
        launch("unwarp_labels", (width, height - y0), *(planes + (y0, height - y0, labels)))
        assert (out == expected[:, y0:]).all() and (labels == labels_of(expected[:, y0:])).all()


@by_name
def test_cuda_is_numpy(case):
    assert_cuda_is_numpy(picture_of(case), grid_of(case), scores_of(case.task, 3))
    assert_cuda_is_numpy(picture_of(case), grid_of(case), scores_of(case.task, 1))


@pytest.mark.parametrize("kind,grid,size", BAD_GRIDS, ids=lambda value: value if isinstance(value, str) else "")
def test_cuda_is_numpy_on_bad_grids(kind, grid, size):
    picture = np.random.RandomState(1).randint(0, 256, size + (3,)).astype(np.uint8)
    assert_cuda_is_numpy(picture, grid, np.random.RandomState(2).randn(2, *grid.shape[:2]).astype(np.float32))


# --- the way down -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height,width", [(1, 1), (1, 7), (5, 1), (2, 2), (11, 17), (40, 33)])
def test_sample_is_grid_sample_and_so_is_its_gradient(height, width):
    rng = np.random.RandomState(height)
    picture = images.ArrayPicture(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
    positions = rng.uniform(-0.2, 1.2, (9, 8, 2))
    positions[0, :4] = [[0, 0], [1, 1], [0.001, 0.999], [0, 0.4]]
    given, towards = torch.from_numpy(positions).requires_grad_(), torch.from_numpy(rng.randn(3, 9, 8))
    ours = trained.sample(picture, given)
    pixels = torch.from_numpy(picture.array.astype(np.float64)).permute(2, 0, 1)[None]
    theirs = F.grid_sample(pixels, (2 * given - 1).flip(-1)[None], mode="bilinear", padding_mode="border",
                           align_corners=False)[0]
    assert float((ours - theirs).detach().abs().max()) < 1e-6
    our_gradient, = torch.autograd.grad((ours * towards).sum(), given)
    their_gradient, = torch.autograd.grad((theirs * towards).sum(), given)
    assert float((our_gradient - their_gradient).abs().max()) < 1e-6


def test_the_gradient_reaches_the_logits():
    picture = images.ArrayPicture(np.random.RandomState(0).randint(0, 256, (37, 53, 3)).astype(np.uint8))

    def samples(logits):
        return trained.sample(picture, trained.grid(trained.softmax(logits), 6, 7, 2, 3)) / 255

    logits = torch.from_numpy(np.random.RandomState(1).randn(4, 5)).requires_grad_()
    assert torch.autograd.gradcheck(samples, (logits,), eps=1e-7, atol=1e-4)


class Watched:
    """A picture that notes which windows were read."""

    def __init__(self, array):
        self.array, self.windows = array, []
        self.height, self.width = array.shape[:2]

    def window(self, y0, x0, y1, x1):
        assert 0 <= y0 < y1 <= self.height and 0 <= x0 < x1 <= self.width
        self.windows.append((y0, x0, y1, x1))
        return self.array[y0:y1, x0:x1]


def test_a_large_picture_is_read_once_from_the_top():
    array = np.random.RandomState(0).randint(0, 256, (700, 300, 3)).astype(np.uint8)
    grid = np.random.RandomState(1).uniform(0.2, 0.6, (20, 30, 2)).astype(np.float32)
    expected, watched = reference.sample(images.ArrayPicture(array), grid), Watched(array)
    assert (reference.sample(watched, grid) == expected).all()
    rows = np.array([(y0, y1) for y0, _x0, y1, _x1 in watched.windows])
    assert len(rows) <= 4 and (rows[1:, 0] >= rows[:-1, 1]).all() and (rows[:, 1] - rows[:, 0]).max() <= reference.BLOCK_ROWS
    assert min(x0 for _y0, x0, _y1, _x1 in watched.windows) >= 59 and max(w[3] for w in watched.windows) <= 181
    opened = []
    banded = images.BandPicture(700, 300, lambda: opened.append(1) or (array[y:y + 50] for y in range(0, 700, 50)))
    assert (reference.sample(banded, grid) == expected).all() and len(opened) == 1
    nearest = array[(grid[..., 0] * 700).astype(int), (grid[..., 1] * 300).astype(int), 0]
    assert (reference.sample_labels(Watched(array[..., 0]), grid) == nearest).all()


def test_the_tile_store_serves_samples(tmp_path):
    rng = np.random.RandomState(0)
    array, path = rng.randint(0, 256, (300, 290, 3)).astype(np.uint8), str(tmp_path / "x.tiles")
    with open(path, "wb") as handle:
        for y in range(0, 300, store.BLOCK):
            store._write_blocks(handle, array[y:y + store.BLOCK])
    stored = store.StoredPicture(path, 0, 300, 290, 3)
    grid, held = rng.rand(15, 17, 2), images.ArrayPicture(array)
    assert (reference.sample(stored, grid) == reference.sample(held, grid)).all()
    assert (trained.sample(stored, torch.from_numpy(grid)) == trained.sample(held, torch.from_numpy(grid))).all()


@by_name
def test_sampled_labels_are_the_masks(case):
    """Never a class between two others, as interpolated ids would be."""
    mask = np.random.RandomState(0).choice([0, 7, 255], case.size).astype(np.uint8)
    labels = reference.sample_labels(images.ArrayPicture(mask), grid_of(case))
    assert labels.shape == case.task and labels.dtype == np.uint8 and set(np.unique(labels)) <= {0, 7, 255}


# --- the way back -------------------------------------------------------------------------------------------------

LARGE = [case._replace(task=(96, 128), size=(400, 600)) for case in CASES if case.fair]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_unwarp_is_delaunays(case):
    """At most 0.5 % of the pixels between samples get another class than by linear interpolation on Delaunay's triangles."""
    interpolate = pytest.importorskip("scipy.interpolate")
    grid, scores, (height, width) = grid_of(case, np.float64), scores_of(case.task, 4), case.size
    pixels = np.stack(np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij"), axis=-1)
    linear = interpolate.LinearNDInterpolator(grid.reshape(-1, 2) * case.size, scores.reshape(4, -1).T)(pixels)
    inside = ~np.isnan(linear[..., 0])
    assert inside.mean() > 0.95
    ours = unwarped(scores, grid.astype(np.float32), case.size)
    assert (ours.argmax(axis=0) != linear.argmax(axis=2))[inside].mean() < 0.005


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_unwarp_is_the_inverse(case):
    """Un-warping each sample's own position gives every pixel its own, to a part of the mesh's step."""
    grid, border = grid_of(case), 0.5 / np.array(case.task)
    found = unwarped(np.ascontiguousarray(np.moveaxis(grid, 2, 0)), grid, case.size)
    own = np.clip(reference.own_positions(*case.size), border, 1 - border)
    away_px = np.abs(np.moveaxis(found, 0, 2) - own) * case.size
    assert away_px.max() < 3 and np.percentile(away_px, 99) < 1


@pytest.mark.parametrize("size, task", [((256, 256), (64, 64)), ((512, 512), (128, 128)), ((512, 512), (64, 64)), ((128, 1024), (64, 64)),
                                        ((1024, 1024), (64, 64)), ((320, 384), (160, 192))])
def test_small_things_come_back_where_samples_are_close(size, task, monkeypatch):
    """Discs where the density is 400 times the ground's: un-warped on the mesh they overlap what a mesh of every pixel gives."""
    rng, logits, truth = np.random.RandomState(1), np.zeros((64, 64), np.float32), np.zeros(size, np.uint8)
    rows, cols = np.mgrid[:64, :64]
    y_px, x_px = np.mgrid[:size[0], :size[1]] + 0.5
    for y, x in 12 + 40 * rng.rand(3, 2):
        logits = np.maximum(logits, 6 - 0.7 * np.hypot(rows + 0.5 - y, cols + 0.5 - x))
        truth |= np.hypot(y_px - y * size[0] / 64, x_px - x * size[1] / 64) < 0.024 * min(size)
    grid = reference.grid(reference.softmax(logits), *task + (16, 16))
    votes = (reference.sample_labels(images.ArrayPicture(truth), grid) == np.arange(2)[:, None, None]).astype(np.float32)

    def found():
        return whole(reference.unwarp_labels(votes, grid, *size), 0) == 1

    ours = found()
    monkeypatch.setattr(reference, "mesh_step", lambda *_given: 1)
    exact = found()
    assert (exact & (truth == 1)).sum() > 0.6 * (exact | (truth == 1)).sum()
    assert (ours & exact).sum() > 0.93 * (ours | exact).sum()


def assert_every_pixel_has_its_own(grid, size):
    """Weights that sum to one, of samples that exist: no pixel is left at some start value."""
    th, tw = grid.shape[:2]
    ones = np.ones((1, th, tw), np.float32)
    assert np.abs(unwarped(ones, grid, size) - 1).max() < 1e-5 and unwarped(ones, grid, size).shape == (1,) + size
    scores = np.random.RandomState(0).randn(3, th, tw).astype(np.float32)
    found = unwarped(scores, grid, size)
    assert found.dtype == np.float32 and (np.abs(found) <= np.abs(scores).max() * (1 + 1e-6)).all()  # and no NaN
    for planes in (scores, scores[:1]):
        labels = whole(reference.unwarp_labels(planes, grid, *size), 0)
        assert labels.dtype == np.uint8 and (labels == labels_of(unwarped(planes, grid, size))).all()


@by_name
def test_no_pixel_is_left_out(case):
    assert_every_pixel_has_its_own(grid_of(case), case.size)


@pytest.mark.parametrize("kind,grid,size", BAD_GRIDS, ids=lambda value: value if isinstance(value, str) else "")
def test_no_pixel_is_left_out_of_a_bad_grid(kind, grid, size):
    assert_every_pixel_has_its_own(grid, size)


@by_name
def test_unwarped_labels_are_those_that_were_given(case):
    given = np.random.RandomState(3).choice([1, 4, 5], case.task)
    scores = (given == np.arange(6)[:, None, None]).astype(np.float32)
    assert set(np.unique(whole(reference.unwarp_labels(scores, grid_of(case), *case.size), 0))) <= {1, 4, 5}


def test_the_border_takes_the_nearest_samples():
    grid = reference.own_positions(6, 6) * 0.5 + 0.25  # the outer quarter has no samples
    scores = np.arange(36, dtype=np.float32).reshape(1, 6, 6)
    found = unwarped(scores, grid, (80, 80))[0]
    assert np.allclose(found[:20, :20], 0) and np.allclose(found[-20:, -20:], 35) and np.allclose(found[:20, -20:], 5)


def test_a_wide_radius_takes_no_memory():
    """A density of 256 x 256 nodes that pull over half of it: 256 KB."""
    field = np.random.RandomState(0).rand(256, 256).astype(np.float32)
    tracemalloc.start()
    try:
        reference.displacement(field, 128, 128)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_the_cost_is_linear_in_the_pixels(monkeypatch):
    """Counted: look-ups for the mesh, and pixels that are interpolated."""
    case = [case for case in CASES if case.name == "random smooth"][0]
    counts, row_by_row, interpolated = {}, reference._row_by_row, reference._interpolated

    def counted(at, x, f):
        found = row_by_row(at, x, f)
        counts["mesh"] += found.size
        return found

    def seen(padded, y, x):
        counts["pixels"] += y.size
        return interpolated(padded, y, x)

    monkeypatch.setattr(reference, "_row_by_row", counted)
    monkeypatch.setattr(reference, "_interpolated", seen)
    scores, grid, (th, tw) = scores_of(case.task, 3), grid_of(case), case.task
    for height, width in ((256, 512), (512, 1024), (1024, 2048)):
        counts.update(mesh=0, pixels=0)
        for _band in reference.unwarp(scores, grid, height, width):
            pass
        step = reference.mesh_step(grid, height, width)
        points = (height // step + 1) * (width // step + 1)
        assert counts == {"mesh": 2 * points + 2 * (th + 2) * (width // step + 1), "pixels": height * width}
        counts.update(mesh=0, pixels=0)
        for _band in reference.unwarp_labels(scores, grid, height, width):
            pass
        assert counts["pixels"] < 0.3 * height * width


def test_bands_are_small():
    """A wide image comes in bands, whatever its height."""
    bands = reference.unwarp(np.zeros((2, 8, 8), np.float32), reference.own_positions(8, 8), 5000, 4000)
    assert next(bands)[1].nbytes <= 2 * 4 * max(reference.BAND_PX, 8 * 4000)
