"""The tables of Pillow's filter and the CUDA kernels of pixels equal Pillow and numpy bit for bit; NVRTC takes them all."""
import ctypes
import glob
import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from doubles import child_env, install, kernels
from edge import images, scores, tiles
from edge.kernels import resample

SOURCES = {os.path.basename(path): open(path, encoding="utf-8").read()
           for path in sorted(glob.glob(os.path.join(ROOT, "edge", "*", "*.cu")))}
KERNELS = sorted((name, kernel) for name, text in SOURCES.items() for kernel in re.findall(r"__global__ void (\w+)\(", text))
BLOCK = (7, 3, 1)  # odd, so that threads are left over on both sides


def same(got, expected):
    """Equal in shape, type and every bit; a NaN equals any other."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if got.dtype.kind != "f":
        return np.array_equal(got, expected)
    number = ~np.isnan(expected)
    return np.array_equal(np.isnan(got), ~number) and got[number].tobytes() == expected[number].tobytes()


def size(rng, most):
    """Mostly small, sometimes 1."""
    return int(rng.randint(1, (2, 8, 60, most)[rng.randint(4)] + 1))


def pair(rng, height, width, spread=4):
    """Noise as (height, width, 3) bytes and as (2, height, width) float32 of any magnitude."""
    return (rng.randint(0, 256, (height, width, 3)).astype(np.uint8),
            (rng.randn(2, height, width) * 10 ** rng.uniform(-spread, spread)).astype(np.float32))


# tables

def pillow(array, width, height, box):
    """Columns first, in a call of their own: Pillow 13 starts with the rows where that is less work."""
    def linear(image):
        x0, y0, x1, y1 = box
        columns = image.resize((width, image.size[1]), Image.BILINEAR, box=(x0, 0, x1, image.size[1]))
        apart = columns.resize((width, height), Image.BILINEAR, box=(0, y0, width, y1))
        if image.size[1] - height <= max(0, 2 * (image.size[0] - width)):
            at_once = image.resize((width, height), Image.BILINEAR, box=box)
            assert at_once.tobytes() == apart.tobytes()
        return np.asarray(apart)

    if array.dtype == np.uint8:
        return linear(Image.fromarray(array))
    return np.stack([linear(Image.fromarray(plane)) for plane in array])


@pytest.mark.parametrize("seed", range(6))
def test_a_table_is_pillows(seed):
    rng = np.random.RandomState(seed)
    for _ in range(50):
        n_in, m_in, n_out, m_out = size(rng, 700), size(rng, 90), size(rng, 700), size(rng, 90)
        box = [0, 0, n_in, m_in]
        if rng.rand() < 0.7:
            box = list(np.concatenate(np.sort(rng.rand(2, 2), axis=1).T * (n_in, m_in)))
        columns, rows = resample.table(n_in, n_out, box[0], box[2]), resample.table(m_in, m_out, box[1], box[3])
        assert columns[0].dtype == np.int32 and columns[1].dtype == np.float64 and len(columns[1]) == n_out
        small, large = pair(rng, m_in, n_in)
        for array, axis in ((small, 0), (large, 1)):
            got = resample.along(resample.along(array, axis + 1, columns), axis, rows)
            assert same(got, pillow(array, n_out, m_out, box)), (n_in, m_in, n_out, m_out, box)


def in_bands(rng, array):
    cuts = [0] + sorted(rng.randint(0, len(array) + 1, 3).tolist()) + [len(array)]
    return images.BandPicture(array.shape[0], array.shape[1], lambda: (array[a:b] for a, b in zip(cuts, cuts[1:]) if b > a))


@pytest.mark.parametrize("seed", range(6))
def test_the_twin_is_images_resized(seed):
    rng = np.random.RandomState(100 + seed)
    for _ in range(30):
        height, width, to_height, to_width = size(rng, 900), size(rng, 60), size(rng, 900), size(rng, 60)
        small, large = pair(rng, height, width)
        got = images.whole(images.resized(in_bands(rng, small), to_height, to_width))
        assert same(resample.resize(small, to_height, to_width), got), (height, width, to_height, to_width)
        got = images.whole(images.resized(in_bands(rng, np.moveaxis(large, 0, 2)), to_height, to_width))
        assert same(resample.resize(large, to_height, to_width), np.moveaxis(got, 2, 0)), large.shape + (to_height, to_width)


@pytest.mark.parametrize("n_in,n_out", [(20000, 256), (256, 5000), (20000, 1), (1, 300), (4097, 4096)])
def test_long_rows(n_in, n_out):
    small, large = pair(np.random.RandomState(n_in), n_in, 2)
    assert same(resample.resize(small, n_out, 2), images.whole(images.resized(images.ArrayPicture(small), n_out, 2)))
    got = images.whole(images.resized(images.ArrayPicture(np.moveaxis(large, 0, 2)), n_out, 2))
    assert same(resample.resize(large, n_out, 2), np.moveaxis(got, 2, 0))


def test_a_table_reads_inside():
    for n_in, n_out in ((1, 1), (1, 9), (9, 1), (300, 301), (301, 300), (1000, 33), (3, 1000)):
        for first, weights in (resample.table(n_in, n_out), resample.row_table(n_in, n_out)):
            reached = first[:, None] + np.arange(weights.shape[1])
            assert first.min() >= 0 and reached[weights != 0].max() < n_in and np.allclose(weights.sum(axis=1), 1)
            assert abs(resample.fixed(weights).sum(axis=1) - (1 << 22)).max() <= weights.shape[1]


# kernels

def launch(source, kernel, threads, *arguments):
    """Run a kernel of a .cu file on threads = (columns, rows), as the board would: numpy arrays are its pointers."""
    library = kernels.compile_on_cpu(SOURCES[source])
    codes = kernels.parameters(library, kernel)
    assert len(codes) == len(arguments), (kernel, codes)
    assert all(value.flags.c_contiguous for value in arguments if isinstance(value, np.ndarray))
    values = [np.uintp(value.ctypes.data) if kind == "P" else np.dtype(kind).type(value)
              for kind, value in zip(codes, arguments)]
    grid = tuple(-(-n // b) for n, b in zip(threads, BLOCK)) + (1,)
    kernels.launch(library, kernel, grid, BLOCK, values)


class Room:
    """An array for a kernel to fill, with bytes around it that must stay."""

    def __init__(self, shape, dtype):
        self._raw = np.full(128 + int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xA5, np.uint8)
        self.array = self._raw[64:-64].view(dtype).reshape(shape)

    def get(self):
        assert (self._raw[:64] == 0xA5).all() and (self._raw[-64:] == 0xA5).all(), "written outside"
        return self.array


WINDOWS = [(9, 13, 2, 3, 5), (9, 13, -3, -4, 8), (9, 13, 5, 9, 11), (9, 13, -40, 70, 30), (1, 1, -2, 3, 6),
           (1, 7, -5, -5, 16), (7, 1, 2, 0, 9), (2, 2, -9, -9, 20), (40, 50, 0, 0, 40), (33, 20, 999, -999, 17),
           (5, 5, 4, 4, 1)]


@pytest.mark.parametrize("height,width,y0,x0,side", WINDOWS)
def test_prepare(height, width, y0, x0, side):
    rng = np.random.RandomState(height + side)
    picture = rng.randint(0, 256, (height, width, 3)).astype(np.uint8)
    picture.flat[:2] = 0, 255
    for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0, 0, 0), (1, 1, 1)), ((0.5, 0, 1), (1e-5, 0.3, 7))):
        window = images.ArrayPicture(picture).window(y0, x0, y0 + side, x0 + side)
        expected = images.normalise(window, mean, std)
        scale = [np.float32(1 / (255.0 * s)) for s in std]
        shift = [np.float32(-m / s) for m, s in zip(mean, std)]
        for kernel, dtype in (("prepare_float", np.float32), ("prepare_half", np.float16)):
            out = Room((3, side, side), dtype)
            launch("pixels_in.cu", kernel, (side, side), picture, height, width, y0, x0, side,
                   *(scale + shift + [out.array]))
            with np.errstate(over="ignore"):
                assert same(out.get(), expected.astype(dtype)), (kernel, mean)


def test_resample_bytes():
    rng = np.random.RandomState(5)
    for _ in range(40):
        height, width, to_height, to_width = [size(rng, 120) for _ in range(4)]
        small, _large = pair(rng, height, width)
        if rng.rand() < 0.3:
            small[:] = rng.choice([0, 255])  # the rounding must not pass 255
        first, weights = resample.table(width, to_width)
        columns, rows = Room((height, to_width, 3), np.uint8), Room((to_height, to_width, 3), np.uint8)
        launch("pixels_in.cu", "resample_cols_u8", (to_width, height), small, height, width, to_width, first,
               resample.fixed(weights), weights.shape[1], columns.array)
        assert same(columns.get(), resample.along(small, 1, (first, weights)))
        first, weights = resample.row_table(height, to_height)
        launch("pixels_in.cu", "resample_rows_u8", (to_width, to_height), columns.array, to_width, to_height, first,
               resample.fixed(weights), weights.shape[1], rows.array)
        assert same(rows.get(), resample.along(columns.array, 0, (first, weights)))
        if height != to_height and width != to_width:
            assert same(rows.get(), images.whole(images.resized(images.ArrayPicture(small), to_height, to_width)))


@pytest.mark.parametrize("odd", [False, True])
def test_resample_scores(odd):
    """odd: with infinite values and NaN, where Pillow makes a NaN of a neighbour of weight 0 and the twin does not."""
    rng = np.random.RandomState(6)
    for _ in range(40):
        height, width, to_height, to_width = [size(rng, 90) for _ in range(4)]
        planes = (rng.randn(rng.randint(1, 4), height, width) * 10 ** rng.uniform(-4, 4)).astype(np.float32)
        if odd:
            planes.flat[rng.randint(0, planes.size, 3)] = np.inf, -np.inf, np.nan
        columns = Room(planes.shape[:2] + (to_width,), np.float32)
        first, weights = resample.table(width, to_width)
        launch("pixels_out.cu", "resample_cols_float", (to_width, len(planes) * height), planes, len(planes) * height, width,
               to_width, first, weights, weights.shape[1], columns.array)
        with np.errstate(invalid="ignore"):
            assert same(columns.get(), resample.along(planes, 2, (first, weights)))
            first, weights = resample.row_table(height, to_height)
            expected = resample.along(columns.array, 1, (first, weights))
        y0 = int(rng.randint(to_height))
        count = int(rng.randint(1, to_height - y0 + 1))
        rows = Room((len(planes), count, to_width), np.float32)
        launch("pixels_out.cu", "resample_rows_float", (to_width, count), columns.array, height, len(planes), to_width, y0,
               count, first, weights, weights.shape[1], rows.array)
        assert same(rows.get(), expected[:, y0:y0 + count])


PLANS = [(1, 20, 30, 8, 0), (3, 20, 30, 8, 3), (2, 21, 29, 9, 8), (4, 5, 7, 16, 4), (1, 1, 1, 5, 2), (2, 40, 6, 8, 2),
         (5, 6, 40, 8, 5), (2, 33, 33, 11, 0), (2, 16, 16, 16, 0), (256, 9, 9, 6, 1)]


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("channels,height,width,tile,overlap", PLANS)
def test_tiles_blended_and_decoded(channels, height, width, tile, overlap, ring):
    """add_tile and decode, on a canvas of one tile row that goes round or of the whole image, are stitch and labels_of."""
    rng = np.random.RandomState(height * width)
    laid = tiles.plan(height, width, tile, overlap)
    given = {tuple(box): rng.randn(channels, tile, tile).astype(np.float32) for box in laid.boxes().tolist()}
    for one in given.values():
        one.flat[rng.randint(0, one.size, 6)] = np.inf, -np.inf, np.nan, np.inf, 1e38, -0.0
    held = tile if ring else max(height, tile)
    canvas, labels = Room((channels, held, width), np.float32), Room((height, width), np.uint8)
    canvas.array[...] = 0
    rows = tiles.blend_weights(laid.ys, tile, overlap, height)
    cols = tiles.blend_weights(laid.xs, tile, overlap, width)
    with np.errstate(invalid="ignore", over="ignore"):
        bands = [(y, np.array(band)) for y, band in
                 tiles.stitch(laid, lambda boxes: [given[tuple(box)] for box in boxes.tolist()])]
    for index, (y, band) in enumerate(bands):
        for column, x in enumerate(laid.xs):
            launch("pixels_out.cu", "add_tile", (tile, tile), given[y, x, y + tile, x + tile], channels, tile, rows[index],
                   cols[column], canvas.array, held, height, width, y, x)
        count = band.shape[1]
        assert same(canvas.get()[:, np.arange(y, y + count) % held], band)
        launch("pixels_out.cu", "decode", (width, count), canvas.array, channels, held, width, y, count, int(ring),
               labels.array[y:])
        assert same(labels.get()[y:y + count], scores.labels_of(band))
        assert not ring or not canvas.array[:, np.arange(y, y + count) % held].any()
    assert not ring or not canvas.array.any()


@pytest.mark.parametrize("channels", [1, 2, 5, 256])
def test_decode(channels):
    """Ties, NaN before and after the best, infinities, every class id; rows that go round the end of the canvas."""
    rng = np.random.RandomState(channels)
    held, width, y0, count = 11, 40, 1000007, 9
    canvas = Room((channels, held, width), np.float32)
    canvas.array[...] = rng.randint(-3, 4, canvas.array.shape)
    choice = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45], np.float32)
    some = rng.rand(*canvas.array.shape) < min(0.3, 6.0 / channels)
    canvas.array[some] = choice[rng.randint(0, len(choice), some.sum())]
    at = np.arange(y0, y0 + count) % held
    if channels == 256:  # each is the best somewhere
        canvas.array[~np.isfinite(canvas.array)] = 0
        canvas.array[np.arange(256), at[np.arange(256) // width], np.arange(256) % width] = 9
    before = canvas.array.copy()
    expected = scores.labels_of(before[:, at])
    assert channels != 256 or len(np.unique(expected)) == 256
    for clear in (0, 1):
        labels = Room((count, width), np.uint8)
        launch("pixels_out.cu", "decode", (width, count), canvas.array, channels, held, width, y0, count, clear,
               labels.array)
        assert same(labels.get(), expected) and labels.array.max() <= max(1, channels - 1)
        after = before.copy()
        if clear:
            after[:, at] = 0
        assert same(canvas.get(), after)


@pytest.mark.parametrize("opacity", [0.5, 0.3, 1.0, 0.0])
@pytest.mark.parametrize("count", [1, 257, 5000])
def test_blend(monkeypatch, opacity, count):
    monkeypatch.setattr(images, "OVERLAY_OPACITY", opacity)
    rng = np.random.RandomState(count)
    pixels = rng.choice([0, 1, 2, 127, 254, 255], (count, 3)).astype(np.uint8)
    labels = rng.permutation(np.arange(count) % 256).astype(np.uint8)
    palette = rng.randint(0, 256, (256, 3)).astype(np.uint8)
    palette[:4] = (9, 9, 9), (0, 0, 0), (255, 255, 255), (0, 255, 1)
    expected = images.blend(pixels[None], labels[None], palette)[0]
    out = Room((count, 3), np.uint8)
    launch("pixels_out.cu", "blend", (count, 1), pixels, labels, palette, opacity, count, out.array)
    assert same(out.get(), expected)


# NVRTC 11.8, the last to know both the Nano's sm_53 and Orin's sm_87

@pytest.fixture(scope="module")
def nvrtc():
    """compile(source, architecture) -> (log, PTX or cubin)."""
    found = importlib.util.find_spec("nvidia")
    folders = list(found.submodule_search_locations or []) if found else []

    def part(package, *names):
        for folder in folders:
            if os.path.exists(os.path.join(folder, *names)):
                return os.path.join(folder, *names)
        return pytest.skip("%s is missing; install it: pip install %s==11.8.89" % (names[-1], package))

    ctypes.CDLL(part("nvidia-cuda-nvrtc-cu11", "cuda_nvrtc", "lib", "libnvrtc-builtins.so.11.8"), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(part("nvidia-cuda-nvrtc-cu11", "cuda_nvrtc", "lib", "libnvrtc.so.11.2"))
    headers = os.path.dirname(part("nvidia-cuda-runtime-cu11", "cuda_runtime", "include", "cuda_fp16.h"))

    def text(program, what):
        length = ctypes.c_size_t()
        assert getattr(library, "nvrtcGet%sSize" % what)(program, ctypes.byref(length)) == 0
        room = ctypes.create_string_buffer(length.value)
        assert getattr(library, "nvrtcGet" + what)(program, room) == 0
        return room.raw

    def compile_(source, architecture):
        program = ctypes.c_void_p()
        assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
        options = [b"--std=c++14", b"--gpu-architecture=" + architecture.encode(), b"-I" + headers.encode()]
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = text(program, "ProgramLog").rstrip(b"\0").decode().strip()
        assert not failed, log
        return log, text(program, "CUBIN" if architecture.startswith("sm_") else "PTX")

    return compile_


@pytest.mark.parametrize("capability", ["53", "87"])
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_nvrtc_takes_every_source(nvrtc, source, capability):
    (log, cubin), (_log, ptx) = nvrtc(SOURCES[source], "sm_" + capability), nvrtc(SOURCES[source], "compute_" + capability)
    assert log == "" and cubin.startswith(b"\x7fELF")  # not even a warning
    for name in [kernel for file, kernel in KERNELS if file == source]:
        assert b".text." + name.encode() in cubin and b".entry %s(" % name.encode() in ptx, name
    # "mul.rn, add.rn" stays two roundings on every GPU; fma, or a bare mul or add that ptxas may join, is one
    assert b"fma" not in ptx and not re.findall(rb"(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64)", ptx)


def test_nvrtc_complains_of_what_is_wrong(nvrtc):
    with pytest.raises(AssertionError, match="nothing"):
        nvrtc('extern "C" __global__ void k(int *a) { a[0] = nothing; }', "sm_53")
    assert "warning" in nvrtc('extern "C" __global__ void k(int *a) { int unused; }', "sm_53")[0]
    assert b"fma" in nvrtc('extern "C" __global__ void k(float *a) { a[0] = a[0] * a[1] + a[2]; }', "compute_53")[1]


def test_the_kernels_are_the_ones_we_know():
    assert {"add_tile", "blend", "decode", "prepare_float", "prepare_half", "resample_cols_float", "resample_cols_u8",
            "resample_rows_float", "resample_rows_u8"} <= {kernel for _file, kernel in KERNELS}


# the double of pycuda.compiler

@pytest.fixture
def nano(monkeypatch):
    _trt, pycuda = install(monkeypatch, "8.2")
    pycuda.driver.init()
    context = pycuda.driver.Device(0).retain_primary_context()
    context.push()
    yield pycuda
    pycuda.driver.Context.pop()
    context.detach()
    pycuda.double.check_teardown()


PLAIN = "__global__ void twice(float *a) { a[threadIdx.x] *= 2; }"


def test_compiler_makes_what_the_driver_loads(nano):
    import pycuda.compiler
    import pycuda.driver as cuda
    made = pycuda.compiler.compile(SOURCES["pixels_out.cu"], no_extern_c=True, arch="sm_53", options=["-std=c++14"])
    assert isinstance(made, bytes)
    decode = cuda.module_from_buffer(made).get_function("decode").prepare("PiiiiiiP")
    stream, canvas, labels = cuda.Stream(), cuda.mem_alloc(4 * 2 * 6 * 5), cuda.mem_alloc(6 * 5)
    values, got = np.random.RandomState(0).randn(2, 6, 5).astype(np.float32), np.empty((6, 5), np.uint8)
    cuda.memcpy_htod(canvas, values)
    decode.prepared_async_call((1, 2), (8, 4, 1), stream, int(canvas), 2, 6, 5, 0, 6, 1, int(labels))
    stream.synchronize()
    cuda.memcpy_dtoh(got, labels)
    assert same(got, scores.labels_of(values))
    cuda.memcpy_dtoh(values, canvas)
    assert not values.any()
    twice = cuda.module_from_buffer(pycuda.compiler.compile(PLAIN)).get_function("twice")  # wrapped in extern "C" { }
    twice(canvas, block=(5, 1, 1))
    cuda.Context.synchronize()


def test_compiler_refuses(nano):
    compile_, error = nano.compiler.compile, nano.driver.CompileError
    for words, match in ((dict(source=SOURCES["pixels_in.cu"]), "linkage"), (dict(source=PLAIN, arch="sm_87"), "sm_53"),
                         (dict(source="int nothing(", no_extern_c=True), "error"),
                         (dict(source=PLAIN.replace("2;", "b;")), "not declared")):
        with pytest.raises(error, match=match) as caught:
            compile_(**words)
        assert str(caught.value).startswith("nvcc compilation of ") and "-arch" in caught.value.command_line
    assert issubclass(error, nano.driver.Error)
    for words in (dict(options=["--use_fast_math"]), dict(keep=True), dict(target="ptx"), dict(code="sm_53")):
        with pytest.raises(kernels.NotSimulated):
            compile_(PLAIN, **words)
    for words in (dict(target="so"), dict(source=PLAIN.encode(), no_extern_c=False), dict(options=("-O2",)), dict(flags=[])):
        with pytest.raises((AssertionError, TypeError, error)):
            compile_(**dict(dict(source=PLAIN), **words))


def test_compiler_without_nvcc(nano, monkeypatch):
    monkeypatch.setenv("NANOPATCH_DOUBLE_NO_NVCC", "1")
    with pytest.raises(OSError, match="No such file or directory: 'nvcc'"):
        nano.compiler.compile(PLAIN)


def test_compiler_in_a_child_process():
    words = "import pycuda.compiler, pycuda.driver; print(pycuda.compiler.compile(%r, arch='sm_53')[:4])" % PLAIN
    for knobs, expected in ((dict(), b"CUDA"), (dict(no_nvcc=1), b"OSError: error invoking 'nvcc --version'")):
        done = subprocess.run([sys.executable, "-c", words], env=child_env("8.2", **knobs), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        assert expected in done.stdout, done.stdout.decode()


def test_memset_waits_for_the_stream(nano):
    cuda = nano.driver
    stream, block, back = cuda.Stream(), cuda.mem_alloc(40), np.empty(40, np.uint8)
    cuda.memset_d8(block, 1, 40)
    cuda.memset_d8_async(int(block) + 8, 7, 16, stream)
    pinned = cuda.pagelocked_empty(40, np.uint8)
    pinned[:] = 0
    cuda.memcpy_dtoh_async(pinned, block, stream)
    assert not pinned.any()
    stream.synchronize()
    assert pinned.tolist() == [1] * 8 + [7] * 16 + [1] * 16
    cuda.memset_d8_async(block, 3, 40)
    cuda.memcpy_dtoh(back, block)
    assert (back == 3).all()
    with pytest.raises(cuda.LogicError, match="invalid argument"):
        cuda.memset_d8_async(block, 0, 41, stream)
    with pytest.raises(TypeError):
        cuda.memset_d8_async(block, 0, 40, 0)
    del pinned
