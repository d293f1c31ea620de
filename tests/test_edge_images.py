"""edge.images against Pillow's whole decode, Pillow's whole resize and numpy's padding; damage; memory."""
import gc
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from edge import images
from edge.errors import BadFile
from jetson.memory import rss_mib

HEIGHT, WIDTH = 301, 67  # more than two bands of 128 rows, nothing divides evenly


def scene(kind, channels, height=HEIGHT, width=WIDTH, seed=0):
    """(h, w[, channels]) uint8, 'smooth' or 'noisy': an encoder picks other filters for the two."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.RandomState(seed)
    planes = [(128 + 60 * np.sin(y / (9.0 + c)) + 60 * np.cos(x / 7.0)).astype(np.uint8) if kind == "smooth" else
              rng.randint(0, 256, (height, width)).astype(np.uint8) for c in range(channels)]
    return np.stack(planes, axis=2) if channels > 1 else planes[0]


def filtered_png(path, array, colour, idat=777):
    """Write a PNG whose rows use the filters 0, 1, 2, 3, 4 in turn (PNG specification, section 9), in many IDATs."""
    height, width = array.shape[:2]
    step = array.size // (height * width)
    raw = array.reshape(height, -1).astype(np.int64)
    lines = b""
    for y in range(height):
        up = raw[y - 1] if y else np.zeros_like(raw[0])
        left, corner = np.zeros_like(up), np.zeros_like(up)
        left[step:], corner[step:] = raw[y, :-step], up[:-step]
        guess = left + up - corner
        distance = np.stack([abs(guess - left), abs(guess - up), abs(guess - corner)])
        paeth = np.choose(distance.argmin(axis=0), [left, up, corner])
        other = [0, left, up, (left + up) // 2, paeth][y % 5]
        lines += bytes(bytearray([y % 5])) + ((raw[y] - other) % 256).astype(np.uint8).tobytes()
    packed = zlib.compress(lines)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) & 0xffffffff)
    with open(str(path), "wb") as handle:
        handle.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)))
        for at in range(0, len(packed), idat):
            handle.write(chunk(b"IDAT", packed[at:at + idat]))
        handle.write(chunk(b"IDAT", b"") + chunk(b"IEND", b""))  # an empty part is legal


@pytest.fixture(params=["whole", "streamed"])
def way(request, monkeypatch):
    """Both ways that a file may be read."""
    if request.param == "streamed":
        monkeypatch.setattr(images, "STREAM_ABOVE_PX", 0)
    return request.param


def read(picture):
    """All pixels, in windows that ascend and overlap, as tiles do."""
    rows = []
    for y in range(0, picture.height, 50):
        window = picture.window(max(0, y - 7), 0, min(picture.height, y + 50), picture.width)
        rows.append(np.array(window[min(y, 7):]))
    return np.concatenate(rows)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "F"])
def test_pixels_of_equals_numpy(mode):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (2 * images.ROWS + 3, 17, 3)).astype(np.uint8)).convert(mode)
    got, want = images.pixels_of(image), np.asarray(image)
    assert got.dtype == (np.float32 if mode == "F" else np.uint8) and np.array_equal(got, want * np.uint8(255) if mode == "1" else want)


def test_pixels_leave_nothing_to_the_garbage_collector():
    """Pillow 8 makes a class for each array that numpy takes of an image, and the class holds its bytes."""
    image = Image.new("RGB", (2000, 1000))
    gc.collect()
    gc.disable()
    try:
        images.pixels_of(image)
        before = rss_mib()
        for _ in range(20):
            images.pixels_of(image)
        assert rss_mib() - before < 20
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["smooth", "noisy"])
@pytest.mark.parametrize("mode,channels", [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_photo_equals_pillow(tmp_path, way, mode, channels, kind):
    path = str(tmp_path / "a.png")
    Image.fromarray(scene(kind, channels), mode).save(path)
    picture = images.open_photo(path)
    assert isinstance(picture, images.BandPicture) == (way == "streamed")
    got = read(picture)
    with Image.open(path) as image:
        assert got.dtype == np.uint8 and np.array_equal(got, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("colour,channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_every_png_filter(tmp_path, way, colour, channels):
    path, array = tmp_path / "a.png", scene("smooth", channels)
    filtered_png(path, array, colour)
    if channels in (1, 2):
        expected = np.repeat(array.reshape(HEIGHT, WIDTH, -1)[..., :1], 3, axis=2)
    else:
        expected = array[..., :3]
    assert np.array_equal(read(images.open_photo(str(path))), expected)


@pytest.mark.parametrize("kind", ["smooth", "noisy"])
@pytest.mark.parametrize("ids", [2, 4, 7, 200])
def test_palette_mask_keeps_its_ids(tmp_path, way, ids, kind):
    """Pillow stores small palettes in 1, 2 or 4 bits per pixel."""
    path, array = str(tmp_path / "a.png"), (scene(kind, 1) % ids).astype(np.uint8)
    image = Image.fromarray(array, "P")
    image.putpalette([(37 * i + c) % 256 for i in range(ids) for c in range(3)])
    image.save(path)
    assert np.array_equal(read(images.open_mask(path, False)), array)
    colours = np.array([[(37 * i + c) % 256 for c in range(3)] for i in range(ids)], np.uint8)
    assert np.array_equal(read(images.open_mask(path, True)), colours[array])


@pytest.mark.parametrize("width", [67, 64, 1])
def test_one_bit_mask_is_0_and_1(tmp_path, way, width):
    path, array = str(tmp_path / "a.png"), scene("noisy", 1, width=width) > 100
    Image.fromarray((array * 255).astype(np.uint8)).convert("1").save(path)
    with Image.open(path) as image:
        assert image.mode == "1"
    assert np.array_equal(read(images.open_mask(path, False)), array.astype(np.uint8))
    assert np.array_equal(read(images.open_photo(path))[..., 1], array * np.uint8(255))


def test_colour_mask_by_value_takes_the_largest_channel(tmp_path, way):
    array = scene("noisy", 3)
    Image.fromarray(array).save(str(tmp_path / "a.png"))
    assert np.array_equal(read(images.open_mask(str(tmp_path / "a.png"), False)), array.max(axis=2))


def interlaced_png(path, array):
    """Adam7 by hand: Pillow reads interlaced files and writes none."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    lines = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in array[y::dy, x::dx])
    blob = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 8, 2, 0, 0, 1)
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        blob += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) & 0xffffffff)
    with open(str(path), "wb") as handle:
        handle.write(blob)


def test_interlaced_falls_back_to_whole(tmp_path, way):
    array = scene("smooth", 3, 37, 29)
    interlaced_png(tmp_path / "a.png", array)
    picture = images.open_photo(str(tmp_path / "a.png"))
    assert isinstance(picture, images.ArrayPicture) and np.array_equal(read(picture), array)


# --- damage ---------------------------------------------------------------------------------------------------------

def damaged(tmp_path, kind, change):
    path = str(tmp_path / "a.png")
    Image.fromarray(scene(kind, 3)).save(path)
    with open(path, "rb") as handle:
        blob = bytearray(handle.read())
    with open(path, "wb") as handle:
        handle.write(change(blob))
    return path


@pytest.mark.parametrize("kind", ["smooth", "noisy"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.6, 0.9, 0.97])
def test_truncated(tmp_path, way, kind, share):
    path = damaged(tmp_path, kind, lambda blob: blob[:int(len(blob) * share)])
    with pytest.raises(BadFile) as caught:
        read(images.open_photo(path))
    assert path in str(caught.value)


@pytest.mark.parametrize("kind", ["smooth", "noisy"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_flipped_bits(tmp_path, way, kind, share):
    """PNG's own checksums find this; wrong pixels must not go unnoticed."""
    def flip(blob):
        blob[int(len(blob) * share)] ^= 0x55
        return blob
    path = damaged(tmp_path, kind, flip)
    with pytest.raises(BadFile):
        read(images.open_photo(path))


@pytest.mark.parametrize("back", [14, 18])
def test_the_last_checksums_count_too(tmp_path, monkeypatch, back):
    """The CRC and the Adler-32 that end the last part; they come after all rows, and only they cover the last ones."""
    def flip(blob):
        blob[-back] ^= 0x55
        return blob
    monkeypatch.setattr(images, "STREAM_ABOVE_PX", 0)
    path = damaged(tmp_path, "smooth", flip)
    with pytest.raises(BadFile):
        read(images.open_photo(path))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of each tag
@pytest.mark.parametrize("ending", ["webp", "tif", "gif", "jpg", "bmp"])
def test_damage_in_other_formats(tmp_path, ending):
    """Cut anywhere, or a bit flipped near the beginning: an image or one BadFile, whatever Pillow raises over it."""
    path, refused = str(tmp_path / ("a." + ending)), 0
    try:
        Image.fromarray(scene("noisy", 3, 40, 60)).save(path)
    except (KeyError, OSError, ValueError) as exc:
        pytest.skip("this Pillow writes no %s: %s" % (ending, exc))
    with open(path, "rb") as handle:
        blob = handle.read()
    spoiled = [blob[:len(blob) * share // 100] for share in (1, 5, 30, 60, 90, 99)]
    for at in list(range(0, 120)) + list(range(max(0, len(blob) - 200), len(blob), 3)):  # a TIFF's directory may be at its end
        for bit in (0, 3, 6):
            changed = bytearray(blob)
            changed[min(at, len(blob) - 1)] ^= 1 << bit
            spoiled.append(bytes(changed))
    for content in spoiled:
        with open(path, "wb") as handle:
            handle.write(content)
        try:
            images.photo_header(path)
            images.open_photo(path)
        except BadFile as exc:
            assert path in str(exc)
            refused += 1
    assert refused >= 3


def test_what_follows_the_last_row_is_not_inflated(tmp_path, monkeypatch):
    """A few KB can hold gigabytes of zeros."""
    import tracemalloc
    monkeypatch.setattr(images, "STREAM_ABOVE_PX", 0)
    array = scene("smooth", 3)
    filtered_png(tmp_path / "a.png", array, 2)
    blob = (tmp_path / "a.png").read_bytes()
    at = blob.index(b"IDAT") - 4
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    packed = zlib.compress(rows + bytes(200 << 20))
    bomb = struct.pack(">I", len(packed)) + b"IDAT" + packed + struct.pack(">I", zlib.crc32(b"IDAT" + packed) & 0xffffffff)
    (tmp_path / "a.png").write_bytes(blob[:at] + bomb + blob[-12:])
    tracemalloc.start()
    assert np.array_equal(read(images.open_photo(str(tmp_path / "a.png"))), array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


@pytest.mark.parametrize("swap", [(b"IHDR", b"IHDx"), (b"IDAT", b"IHDR")])
def test_headers_in_the_wrong_place(tmp_path, way, swap):
    filtered_png(tmp_path / "a.png", scene("smooth", 3), 2)
    blob = bytearray((tmp_path / "a.png").read_bytes())
    at = blob.index(swap[0])
    size, = struct.unpack(">I", blob[at - 4:at])
    blob[at:at + 4] = swap[1]
    blob[at + 4 + size:at + 8 + size] = struct.pack(">I", zlib.crc32(bytes(blob[at:at + 4 + size])) & 0xffffffff)
    (tmp_path / "a.png").write_bytes(bytes(blob))
    with pytest.raises(BadFile):
        read(images.open_photo(str(tmp_path / "a.png")))


# --- writing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bands", [1, 50, 1000])
@pytest.mark.parametrize("channels,palette", [(1, None), (3, None), (1, [(i, 255 - i, i // 2) for i in range(256)])])
def test_writer_round_trip(tmp_path, channels, palette, bands):
    path, array = str(tmp_path / "a.png"), scene("noisy", channels)
    with images.PngWriter(path, HEIGHT, WIDTH, channels, palette) as png:
        for y in range(0, HEIGHT, bands):
            assert not os.path.exists(path)
            png.write(array[y:y + bands])
    with Image.open(path) as image:
        assert image.mode == ("P" if palette else "RGB" if channels == 3 else "L")
        assert np.array_equal(np.asarray(image), array)
        if palette:
            assert image.getpalette()[:768] == [v for colour in palette for v in colour]
    assert os.listdir(str(tmp_path)) == ["a.png"]


@pytest.mark.parametrize("rows", [0, 30, HEIGHT])
def test_writer_leaves_nothing_after_an_error(tmp_path, rows):
    path = str(tmp_path / "a.png")
    with pytest.raises(KeyError):
        with images.PngWriter(path, HEIGHT, WIDTH, 1) as png:
            if rows:
                png.write(scene("smooth", 1)[:rows])
            raise KeyError("stop")
    assert os.listdir(str(tmp_path)) == []


def test_writer_leaves_nothing_when_rows_are_missing(tmp_path):
    with pytest.raises(Exception):
        with images.PngWriter(str(tmp_path / "a.png"), HEIGHT, WIDTH, 1) as png:
            png.write(scene("smooth", 1)[:10])
    assert os.listdir(str(tmp_path)) == []


# --- windows, size, value -------------------------------------------------------------------------------------------

def mirrored(array, y0, x0, y1, x1):
    """The window out of numpy's own reflection, which the whole image is padded with."""
    pad = ((max(0, -y0), max(0, y1 - array.shape[0])), (max(0, -x0), max(0, x1 - array.shape[1])), (0, 0))
    return np.pad(array, pad, mode="reflect")[y0 + pad[0][0]:y1 + pad[0][0], x0 + pad[1][0]:x1 + pad[1][0]]


@pytest.mark.parametrize("height,width", [(HEIGHT, WIDTH), (40, 300), (1, 9), (9, 1)])
def test_random_windows_and_mirrored_ones(tmp_path, way, height, width):
    array, rng = scene("noisy", 3, height, width), np.random.RandomState(3)
    Image.fromarray(array).save(str(tmp_path / "a.png"))
    picture = images.open_photo(str(tmp_path / "a.png"))
    for _ in range(60):
        y0, x0 = int(rng.randint(1 - height, height)), int(rng.randint(1 - width, width))
        y1 = int(rng.randint(max(y0, -1) + 1, max(2 * height - 1, y0 + 2)))
        x1 = int(rng.randint(max(x0, -1) + 1, max(2 * width - 1, x0 + 2)))
        assert np.array_equal(picture.window(y0, x0, y1, x1), mirrored(array, y0, x0, y1, x1)), (y0, x0, y1, x1)


SIZES = [((301, 67), (97, 23)), ((301, 67), (700, 150)), ((301, 67), (64, 64)), ((300, 400), (3, 1)),
         ((1, 1), (5, 7)), ((37, 900), (37, 300)), ((900, 37), (300, 37))]


@pytest.mark.parametrize("kind", ["smooth", "noisy"])
@pytest.mark.parametrize("source,target", SIZES)
def test_resized_equals_pillow(tmp_path, way, source, target, kind):
    array = scene(kind, 3, *source)
    Image.fromarray(array).save(str(tmp_path / "a.png"))
    got = images.whole(images.resized(images.open_photo(str(tmp_path / "a.png")), *target)).astype(int)
    expected = np.asarray(Image.fromarray(array).resize(target[::-1], Image.BILINEAR)).astype(int)
    assert got.shape == expected.shape and abs(got - expected).max() <= 1


@pytest.mark.parametrize("target", [(97, 23), (700, 150)])
def test_resized_does_not_depend_on_the_windows(tmp_path, way, target):
    Image.fromarray(scene("noisy", 3)).save(str(tmp_path / "a.png"))
    whole = images.whole(images.resized(images.open_photo(str(tmp_path / "a.png")), *target))
    picture, rng = images.resized(images.open_photo(str(tmp_path / "a.png")), *target), np.random.RandomState(0)
    for _ in range(30):  # in no order: up, down, over the border
        y0, x0 = int(rng.randint(-9, target[0])), int(rng.randint(-9, target[1]))
        box = y0, x0, y0 + int(rng.randint(1, 40)), x0 + int(rng.randint(1, 40))
        if box[2] > 0 and box[3] > 0:
            assert np.array_equal(picture.window(*box), mirrored(whole, *box)), box


def test_fitted_size():
    assert images.fitted_size(300, 400, "none", 99) == (300, 400)
    assert images.fitted_size(300, 400, "stretch", 99) == (99, 99)
    assert images.fitted_size(300, 400, "long", 100) == (75, 100)
    assert images.fitted_size(9000, 3, "long", 100) == (100, 1)


def test_normalise():
    pixels = scene("noisy", 3)[:40]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = np.moveaxis((pixels.astype(np.float64) / 255 - mean) / std, 2, 0)
    got = images.normalise(pixels[None], mean, std)
    assert got.dtype == np.float32 and got.shape == (1, 3, 40, WIDTH) and abs(got[0] - expected).max() < 1e-5
    assert np.array_equal(images.normalise(pixels, mean, std), got[0])


@pytest.mark.parametrize("turn", range(1, 9))
def test_which_flags_turn_an_image(tmp_path, turn):
    """Pillow, old and new, turns TIFF files, and no others."""
    array = scene("noisy", 3, 30, 21)
    exif = Image.Exif()
    exif[274] = turn
    for name, options in (("a.tif", {"tiffinfo": {274: turn}}), ("a.png", {"exif": exif}), ("a.webp", {"exif": exif, "lossless": True})):
        path = str(tmp_path / name)
        Image.fromarray(array).save(path, **options)
        turned = name == "a.tif" and turn > 1
        found = images.whole(images.open_photo(path))
        assert np.array_equal(found, array) != turned and sorted(found.ravel()) == sorted(array.ravel()), name
        assert images.photo_header(path) == found.shape[:2] + (False,) and images.orientation(path) == (1 if turned else turn), name


def test_the_flag_of_a_large_png_is_read_without_its_pixels(tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    Image.new("RGB", (9, 7)).save(path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert images.orientation(path) == 1


MEASURE = """
import sys
from edge import images
from jetson.memory import peak_rss_mib
before = peak_rss_mib()
small = images.whole(images.resized(images.open_photo(sys.argv[1]), 256, 256))
print(peak_rss_mib() - before, small.shape, int(small[0, 0, 0]), int(small[-1, 0, 0]))
"""


def test_large_png_is_read_in_little_memory(tmp_path):
    """36 megapixels are 108 MB decoded. The measuring goes on in a fresh process: a peak never falls."""
    path, height, width = str(tmp_path / "large.png"), 12000, 3000
    with images.PngWriter(path, height, width, 3) as png:
        for y in range(0, height, 500):
            grey = ((np.arange(y, y + 500) * 255) // height)[:, None] + np.arange(width)[None] % 2
            png.write(np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2))
    done = subprocess.run([sys.executable, "-c", MEASURE, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=dict(os.environ, PYTHONPATH=ROOT))
    assert done.returncode == 0, done.stderr.decode()
    growth, rest = done.stdout.decode().split(" ", 1)
    shape, first, last = rest.rsplit(" ", 2)
    assert shape == "(256, 256, 3)" and int(first) <= 2 and int(last) >= 252
    assert float(growth) < 45, "%s MiB" % growth  # 14 to 25 seen: the heap's holes are luck
