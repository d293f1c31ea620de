"""Pixels and scores on the device: the same bytes as on the host, from picture to class ids, on the double of pycuda and, where
there is one, on a GPU."""
import itertools
import os
import sys

import numpy as np
import pytest

from doubles import CARD, NANO, api_folder, install, kernels
from edge import images, scores
from edge.gpu import Gpu
from edge.kernels.device import Device
from edge.warp import path
from edge.warp.device import WarpDevice

FREE = scores.Recipe("none", 0, 24, 8, 2, 0, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
RECIPES = {
    "tiled": FREE, "no overlap": FREE._replace(overlap=0, batch=1), "shrunk": FREE._replace(resize="long", resize_px=40),
    "grown": FREE._replace(resize="long", resize_px=200, batch=4), "square": FREE._replace(resize="stretch", resize_px=64),
    "overview": FREE._replace(overview=24), "both": FREE._replace(resize="long", resize_px=70, overview=24),
}


@pytest.fixture(params=["nano", "card", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request, monkeypatch, tmp_path):
    """A Gpu on a double, or the real one; what it leaves behind fails the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pycuda = None
    if request.param == "real":
        pytest.importorskip("pycuda.driver", reason="no CUDA device here")
    else:
        if not os.path.isdir(api_folder()):
            pytest.skip("the listed names of TensorRT's bindings are not in %s; set NANOPATCH_DATA" % api_folder())
        _trt, pycuda = install(monkeypatch, "8.2", {"nano": NANO, "card": CARD}[request.param])
        kernels.compile_on_cpu("")  # skips without g++
    made = Gpu()
    yield made
    made.close()
    if pycuda:
        pycuda.double.check_teardown()


def net(channels, seed=0):
    """A stand-in for a net: (n, 3, p, p) and weights -> (n, channels, p, p), different in every channel and place."""
    mix = np.random.RandomState(seed).normal(0, 1, (channels, 3)).astype(np.float32)

    def compute(pixels, g, rows, cols):
        out = np.einsum("kc,ncyx->nkyx", mix, pixels.astype(np.float32)).astype(np.float32)
        if g is not None:
            out += np.einsum("npq,qr,nsr->nps", rows, g[0, 0].astype(np.float32), cols)[:, None].astype(np.float32)
        return out
    return compute


def host_labels(picture, recipe, compute):
    host = scores.Host()
    return [host.labels(band) for _y, band in scores.score_bands(picture, recipe, lambda pixels: pixels, compute)]


def device_labels(gpu, picture, recipe, channels, compute, kind="device", dtype=np.float32):
    pixels = gpu.buffer((recipe.batch, 3, recipe.tile, recipe.tile), dtype, kind)
    results = gpu.buffer((recipe.batch, channels, recipe.tile, recipe.tile), np.float32, kind)
    device = Device(gpu, pixels, channels, kind)

    def score(ready, g, rows, cols):
        spare = recipe.batch - (len(rows) if rows is not None else recipe.batch)
        if spare:
            rows, cols = (np.concatenate([m] + [m[-1:]] * spare) for m in (rows, cols))
        results.put(compute(ready.get(), g, rows, cols))
        return results

    bands = scores.score_bands(picture, recipe, lambda ready: ready.get()[:1], score, pixels=device)
    return [device.labels(band) for _y, band in bands]


@pytest.mark.parametrize("channels", [1, 3, 19])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_class_ids_are_the_hosts(gpu, name, channels):
    rng = np.random.RandomState(channels)
    for height, width in ((61, 83), (24, 24), (100, 30), (7, 90), (1, 1)):
        picture = images.ArrayPicture(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        want = host_labels(picture, RECIPES[name], net(channels))
        got = device_labels(gpu, picture, RECIPES[name], channels, net(channels))
        assert len(got) == len(want) and all((a == b).all() for a, b in zip(got, want)), (height, width)
        assert sum(map(len, got)) == height


@pytest.mark.parametrize("kind", ["mapped", "managed"])
def test_kinds_of_memory(gpu, kind):
    if not gpu.integrated and kind == "managed":
        pytest.skip("managed memory is for boards that share it")
    picture = images.ArrayPicture(np.random.RandomState(5).randint(0, 256, (90, 70, 3)).astype(np.uint8))
    for recipe in (RECIPES["both"], RECIPES["tiled"]):
        want = np.concatenate(host_labels(picture, recipe, net(3)))
        assert (np.concatenate(device_labels(gpu, picture, recipe, 3, net(3), kind)) == want).all()


def test_half_precision_input(gpu):
    """The device rounds as numpy does."""
    picture = images.ArrayPicture(np.random.RandomState(6).randint(0, 256, (50, 60, 3)).astype(np.uint8))
    want = host_labels(picture, FREE, lambda pixels, *rest: net(3)(pixels.astype(np.float16), *rest))
    assert (np.concatenate(device_labels(gpu, picture, FREE, 3, net(3), dtype=np.float16)) == np.concatenate(want)).all()


def test_pictures_in_bands_and_canvases_too_large_for_the_device(gpu, monkeypatch):
    """Then the host reads, or blends, and the answer is the same."""
    array = np.random.RandomState(7).randint(0, 256, (130, 90, 3)).astype(np.uint8)
    banded = images.BandPicture(130, 90, lambda: (array[y:y + 40] for y in range(0, 130, 40)))
    monkeypatch.setattr("edge.images.STREAM_ABOVE_PX", 100)
    for recipe in (RECIPES["both"], RECIPES["tiled"]):
        want = np.concatenate(host_labels(images.ArrayPicture(array), recipe, net(3)))
        assert (np.concatenate(device_labels(gpu, banded, recipe, 3, net(3))) == want).all()
    monkeypatch.setattr("edge.images.STREAM_ABOVE_PX", 10 ** 6)
    monkeypatch.setattr("edge.kernels.device.MOST_BYTES", 100)
    for recipe, picture in itertools.product((RECIPES["both"], RECIPES["tiled"]), (images.ArrayPicture(array), banded)):
        want = np.concatenate(host_labels(images.ArrayPicture(array), recipe, net(3)))
        assert (np.concatenate(device_labels(gpu, picture, recipe, 3, net(3))) == want).all()


def test_frames_of_changing_size_use_the_same_memory(gpu):
    recipe, pixels = RECIPES["both"], gpu.buffer((2, 3, 24, 24), np.float32)
    device = Device(gpu, pixels, 1, "device")
    results = gpu.buffer((2, 1, 24, 24), np.float32)
    free = []
    for turn in range(6):
        height, width = ((90, 70), (30, 140))[turn % 2]
        picture = images.ArrayPicture(np.full((height, width, 3), turn, np.uint8))
        for _y, band in scores.score_bands(picture, recipe, lambda ready: None, lambda *given: results, pixels=device):
            device.labels(band)
        free.append(gpu.driver.mem_get_info()[0])
    assert len(set(free[2:])) == 1, free


def test_overlays(gpu):
    rng = np.random.RandomState(8)
    palette = [tuple(colour) for colour in rng.randint(0, 256, (5, 3)).tolist()]
    device = Device(gpu, gpu.buffer((1, 3, 8, 8), np.float32), 5, "device")
    for height, width in ((33, 57), (1, 1), (128, 19)):
        pixels = rng.randint(0, 256, (height, width, 3)).astype(np.uint8)
        labels = rng.randint(0, 5, (height, width)).astype(np.uint8)
        assert (device.blend(pixels, labels, palette) == images.blend(pixels, labels, palette)).all()


def test_scores_can_be_looked_at_before_they_are_decoded(gpu):
    picture = images.ArrayPicture(np.random.RandomState(9).randint(0, 256, (60, 50, 3)).astype(np.uint8))
    pixels, results = gpu.buffer((2, 3, 24, 24), np.float32), gpu.buffer((2, 3, 24, 24), np.float32)
    device = Device(gpu, pixels, 3, "device")

    def score(ready, *rest):
        results.put(net(3)(ready.get(), *rest))
        return results
    want = scores.score_bands(picture, FREE, None, net(3))
    got = scores.score_bands(picture, FREE, None, score, pixels=device)
    for (_y, a), (_y2, band) in itertools.zip_longest(want, got):
        b = device.scores(band)
        assert (a == b).all() and (device.labels(band) == scores.labels_of(b)).all()


def test_compiled_once_and_again_when_the_kept_file_is_damaged(gpu, tmp_path, monkeypatch):
    shelf = tmp_path / "nanopatch" / "kernels"
    make = lambda: Device(gpu, gpu.buffer((1, 3, 8, 8), np.float32), 1, "device")  # noqa: E731
    make()
    kept = sorted(shelf.iterdir())
    assert len(kept) == 2 and all(path.name.endswith("-sm_%s.cubin" % gpu.capability.replace(".", "")) for path in kept)
    whole = kept[0].read_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycuda.compiler", None)  # nothing can be compiled now, and need not
        make()
    kept[0].write_bytes(whole[:20])
    make()
    assert kept[0].read_bytes() == whole


# samples

WARPED = path.WarpRecipe("none", 0, (32, 48), (8, 12), (2, 3), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def look(pixels):
    """A stand-in for a deformation net."""
    return pixels[0].sum(axis=0) * np.float32(0.7)


def warped_bands(gpu, picture, recipe, channels, labels, kind="device", dtype=np.float32):
    samples = gpu.buffer((1, 3) + recipe.task, dtype, kind)
    results = gpu.buffer((1, channels) + recipe.task, np.float32, kind)
    device = WarpDevice(gpu, samples, channels, kind)

    def score(ready):
        results.put(net(channels)(np.asarray(ready), None, None, None))
        return results
    return [band for _y, band in path.score_bands(picture, recipe, look, score, pixels=device, labels=labels)]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 19])
@pytest.mark.parametrize("recipe", [WARPED, WARPED._replace(resize="long", resize_px=90)])
def test_un_warped_scores_and_class_ids_are_the_hosts(gpu, recipe, channels, labels):
    rng = np.random.RandomState(channels)
    for height, width in ((70, 111), (200, 90), (1, 60), (1, 1), (20, 20)):
        picture = images.ArrayPicture(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        want = [band.copy() for _y, band in path.score_bands(picture, recipe, look, lambda samples: net(channels)(
            samples, None, None, None), labels=labels)]
        got = warped_bands(gpu, picture, recipe, channels, labels)
        assert len(got) == len(want) and all((a == b).all() for a, b in zip(got, want)), (height, width)


def test_samples_of_banded_pictures_other_memory_and_half_precision(gpu, monkeypatch):
    array = np.random.RandomState(3).randint(0, 256, (130, 90, 3)).astype(np.uint8)
    banded = images.BandPicture(130, 90, lambda: (array[y:y + 40] for y in range(0, 130, 40)))

    def host(dtype):
        return [band.copy() for _y, band in path.label_bands(images.ArrayPicture(array), WARPED, look, lambda samples: net(3)(
            samples.astype(dtype), None, None, None))]
    for kind in ("mapped", "managed") if gpu.integrated else ("mapped",):
        assert np.array_equal(np.concatenate(warped_bands(gpu, images.ArrayPicture(array), WARPED, 3, True, kind)),
                              np.concatenate(host(np.float32)))
    half = warped_bands(gpu, images.ArrayPicture(array), WARPED, 3, True, dtype=np.float16)
    assert np.array_equal(np.concatenate(half), np.concatenate(host(np.float16)))
    monkeypatch.setattr("edge.images.STREAM_ABOVE_PX", 100)
    assert np.array_equal(np.concatenate(warped_bands(gpu, banded, WARPED, 3, True)), np.concatenate(host(np.float32)))
