"""Pixels in and out, for images of any size: every image is read, and every mask written, in bands of rows.

A picture has `height`, `width` and `window(y0, x0, y1, x1)`, which returns (h, w, 3) uint8 RGB (or (h, w) and
(h, w, 3) for masks) and mirrors what lies outside the image. One routine prepares pixels for a net (`normalise`);
training, parity check and runtime share it.
"""
import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

from edge.errors import BadFile
from edge.geometry import reflect

STREAM_ABOVE_PX = 16 * 1000 * 1000   # larger PNG files are decoded band by band (48 MB of RGB)
WHOLE_LIMIT_PX = 400 * 1000 * 1000   # other formats are decoded whole: beyond this (1.2 GB) they are refused
READABLE = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".webp")
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
          struct.error, zlib.error)  # whatever Pillow raises over damaged bytes

Image.MAX_IMAGE_PIXELS = None  # the limits above take its place; Pillow's would refuse the images we exist for
ROWS = 256  # of an image in two forms at once
OVERLAY_OPACITY = 0.5
ORIENTATION = 274  # the tag of EXIF and TIFF
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def listed(folder, endings=READABLE):
    """Paths of the files in a folder that have one of these endings, in order. Not the hidden ones: macOS leaves one beside every image."""
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries
                      if entry.name.lower().endswith(endings) and entry.name[0] != "." and not entry.is_dir())


class ArrayPicture:
    """A picture held in memory: array (H, W, 3) or (H, W), uint8."""

    def __init__(self, array):
        self.array = array
        self.height, self.width = array.shape[:2]

    def window(self, y0, x0, y1, x1):
        if y0 >= 0 and x0 >= 0 and y1 <= self.height and x1 <= self.width:
            return self.array[y0:y1, x0:x1]
        rows = reflect(np.arange(y0, y1), self.height)
        return self.array[rows[:, None], reflect(np.arange(x0, x1), self.width)]


class BandPicture:
    """A picture that can only be read from the top down. `bands()` returns a fresh iterator over (h, W[, 3]) uint8
    arrays, rows in order. Keeps the rows that the last window needed; reading further up starts again."""

    def __init__(self, height, width, bands):
        self.height, self.width = height, width
        self._open = bands
        self._restart()

    def _restart(self):
        self._bands, self._first, self._held = self._open(), 0, []

    def _rows(self, y0, y1):
        if y0 < self._first:
            self._restart()
        while self._first + sum(map(len, self._held)) < y1:
            self._held.append(next(self._bands))
            while self._held and self._first + len(self._held[0]) <= y0:
                self._first += len(self._held.pop(0))
        held = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
        self._held, skip = [held[y0 - self._first:]], y0 - self._first
        self._first = y0
        return held[skip:skip + y1 - y0]

    def window(self, y0, x0, y1, x1):
        rows = reflect(np.arange(y0, y1), self.height)
        top, bottom = int(rows.min()), int(rows.max()) + 1
        band = ArrayPicture(self._rows(top, bottom)).window(0, x0, bottom - top, x1)
        return band if y0 >= 0 and y1 <= self.height else band[rows - top]


def open_photo(path):
    """Open a photograph: 8-bit grey, RGB or RGBA (alpha is dropped). Returns a picture of (h, w, 3) uint8 RGB.
    Raises BadFile for a damaged file and for 16-bit, CMYK, palette and animated images, saying what to do."""
    return _open(path, _photo_pixels, _check_photo)


def photo_header(path):
    """(height, width, whether open_photo reads it in bands) from an image's header; None where open_photo will refuse."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "TIFF" and image.tag_v2.get(ORIENTATION, 1) > 4:
                width, height = image.tag_v2[257], image.tag_v2[256]  # Pillow turns it; older ones say so after loading only
            bands = image.format == "PNG" and height * width > STREAM_ABOVE_PX
            believable = width < 10 ** 6 if bands else height * width <= WHOLE_LIMIT_PX
            return (height, width, bands) if believable else None
    except DAMAGE:
        return None


def orientation(path):
    """How a viewer turns an image that is not turned here: its EXIF flag, 2 to 8; 1, not at all, where it has none. A TIFF is turned."""
    try:
        with Image.open(path) as image:
            turn = 1 if image.format == "TIFF" else Image.Image.getexif(image).get(ORIENTATION, 1)  # PNG's own would decode all of it
    except DAMAGE:
        return 1
    return turn if turn in range(2, 9) else 1


def open_mask(path, colours):
    """Open a label image. colours True: (h, w, 3) RGB; False: (h, w) values as stored (palette index, grey value,
    0 or 1 of a 1-bit file; the largest channel of a colour file). Raises BadFile as open_photo does."""
    return _open(path, _colour_pixels if colours else _label_pixels, _check_mask)


def _check_photo(image, path):
    if image.mode == "P":
        raise BadFile("%s is a palette image, as masks are; expected a photograph in RGB or grey. If it is one: "
                      "convert %s -type TrueColor out.png" % (path, path))
    _check_mask(image, path)


def _check_mask(image, path):
    if image.mode.startswith(("I", "F")):
        raise BadFile("%s has 16 bits or more per pixel (mode %s); expected 8. Say yourself what becomes white: "
                      "convert %s -depth 8 out.png" % (path, image.mode, path))
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise BadFile("%s has colour mode %s; expected RGB or grey. Convert it: convert %s -colorspace sRGB out.png"
                      % (path, image.mode, path))
    if getattr(image, "n_frames", 1) > 1:
        raise BadFile("%s holds %d images; expected one. Split it first" % (path, image.n_frames))
    if min(image.size) < 1:
        raise BadFile("%s has no pixels: %dx%d" % ((path,) + image.size))


def pixels_of(image):
    """The pixels of a Pillow image, (h, w) or (h, w, bands): uint8 (0 and 255 of a 1-bit image), float32 of mode F. In place of
    np.asarray(image), which has two copies beside the image for a moment; Pillow 8, the last one for Python 3.6, leaves one of them
    to the garbage collector."""
    image = image.convert("L") if image.mode == "1" else image
    bands = len(image.getbands())
    pixels = np.empty((image.height, image.width) + (bands,) * (bands > 1), np.float32 if image.mode == "F" else np.uint8)
    for y0 in range(0, image.height, ROWS):
        part = pixels[y0:y0 + ROWS]
        part[...] = np.frombuffer(image.crop((0, y0, image.width, y0 + len(part))).tobytes(), part.dtype).reshape(part.shape)
    return pixels


def _photo_pixels(image):
    return pixels_of(image if image.mode == "RGB" else image.convert("RGB"))


_colour_pixels = _photo_pixels


def _label_pixels(image):
    array = pixels_of(image)
    if image.mode == "1":
        return array // 255
    return array if array.ndim == 2 else (array[..., 0] if image.mode == "LA" else array[..., :3].max(axis=2))


def _open(path, pixels, check):
    try:
        with open(path, "rb") as handle:
            header = handle.read(29)
        if not header:
            raise BadFile("%s is empty (0 bytes); expected an image" % path)
        if header.startswith(PNG_MAGIC) and header[12:16] == b"IHDR" and len(header) == 29:
            width, height, depth, _colour = struct.unpack(">IIBB", header[16:26])
            if depth == 16:
                raise BadFile("%s has 16 bits per channel; expected 8. Say yourself what becomes white: "
                              "convert %s -depth 8 out.png" % (path, path))
            if width * height > STREAM_ABOVE_PX and depth in (1, 8) and header[28] == 0:
                first = next(_png_bands(path, 1))  # one row: finds out now whether the file can be used
                check(first, path)
                return BandPicture(height, width, lambda: _decoded(path, pixels))
        with Image.open(path) as image:
            check(image, path)
            if image.size[0] * image.size[1] > WHOLE_LIMIT_PX:
                raise BadFile("%s has %d megapixels; a %s file must be decoded whole, and %d is the limit. PNG is "
                              "read band by band: convert it to an 8-bit, non-interlaced PNG" %
                              (path, image.size[0] * image.size[1] // 10 ** 6, image.format, WHOLE_LIMIT_PX // 10 ** 6))
            image.load()
            return ArrayPicture(pixels(image))
    except BadFile:
        raise
    except FileNotFoundError as exc:
        raise BadFile("no such image: %s" % path) from exc
    except DAMAGE as exc:
        raise _damaged(path, exc) from exc


def _damaged(path, exc):
    return BadFile("%s is truncated, damaged or no image: %s. Copy it again from its source" % (path, exc))


def _decoded(path, pixels):
    try:
        for image in _png_bands(path, 128):
            yield pixels(image)
    except DAMAGE as exc:
        raise _damaged(path, exc) from exc


# --- PNG in bands -------------------------------------------------------------------------------------------------
# PNG is one deflate stream of filtered rows. We inflate a band of rows, put the last decoded row before it (a row
# may be filtered against the one above), wrap both as a small PNG and let Pillow undo the filters in C.

def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) & 0xffffffff)


def _chunks(handle, path):
    handle.seek(len(PNG_MAGIC))
    while True:
        head = handle.read(8)
        if len(head) < 8:
            raise BadFile("%s is truncated: it ends without its last part. Copy it again from its source" % path)
        size, kind = struct.unpack(">I4s", head)
        check = zlib.crc32(kind)
        left = size
        while left or size == 0:
            data = handle.read(min(left, 1 << 16))
            if len(data) < min(left, 1 << 16):
                raise BadFile("%s is truncated inside a %s part. Copy it again from its source" % (path, kind.decode("latin-1")))
            check = zlib.crc32(data, check)
            left -= len(data)
            yield kind, data
            if size == 0:
                break
        if struct.unpack(">I", handle.read(4).ljust(4, b"\0"))[0] != check & 0xffffffff:
            raise BadFile("%s is damaged: a checksum is wrong. Copy it again from its source" % path)
        if kind == b"IEND":
            return


def _png_bands(path, rows):
    """Yield Pillow images of `rows` rows each (the last may be shorter). 8-bit or 1-bit, not interlaced."""
    with open(path, "rb") as handle:
        header, palette = b"", b""
        inflate, waiting, above, done = zlib.decompressobj(), bytearray(), None, 0
        for kind, data in _chunks(handle, path):
            if kind == b"IHDR":
                if header:
                    raise BadFile("%s is damaged: it has two headers. Copy it again from its source" % path)
                header = data
                width, height, depth, colour = struct.unpack(">IIBB", data[:10])
                samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
                stride = 1 + (width * depth * samples + 7) // 8
            elif kind == b"PLTE":
                palette += data
            elif kind == b"IDAT":
                while data and done < height:  # what follows the last row is not even inflated
                    waiting += inflate.decompress(data, rows * stride)
                    data = inflate.unconsumed_tail
                    while done < height:
                        take = min(rows, height - done)
                        if len(waiting) < take * stride:
                            break
                        image, above = _unfilter(header, palette, waiting[:take * stride], above, take, stride)
                        del waiting[:take * stride]
                        done += take
                        if done < height:
                            yield image
        if done < height:
            raise BadFile("%s is damaged: it holds %d of %d rows. Copy it again from its source" % (path, done, height))
        yield image  # the last rows wait until every checksum behind them has been read


def _unfilter(header, palette, band, above, rows, stride):
    if above is None:
        above = bytes(stride)  # an unfiltered row of zeros: what PNG defines above the first row
    data = zlib.compress(bytes(above + band), 0)
    small = PNG_MAGIC + _chunk(b"IHDR", header[:4] + struct.pack(">I", rows + 1) + header[8:])
    if palette:
        small += _chunk(b"PLTE", palette)
    with Image.open(io.BytesIO(small + _chunk(b"IDAT", data) + _chunk(b"IEND", b""))) as image:
        image.load()
        last = pixels_of(image.crop((0, rows, image.width, rows + 1)))[0]
        last = np.packbits(last) if header[8] == 1 else last  # 1 bit per pixel
        return image.crop((0, 1, image.width, rows + 1)), b"\0" + last.tobytes()


class PngWriter:
    """Write a PNG row band by row band. The file appears under its name only when complete.

    channels 1 (with an optional palette, list of (r, g, b), for class ids) or 3. Use as a context manager."""

    def __init__(self, path, height, width, channels=1, palette=None):
        self.path, self.height, self.rows = path, height, 0
        self._deflate = zlib.compressobj(3)
        self._part = "%s.%d.part" % (path, os.getpid())
        self._handle = open(self._part, "wb")
        colour = 2 if channels == 3 else (3 if palette else 0)
        self._handle.write(PNG_MAGIC + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)))
        if palette:
            self._handle.write(_chunk(b"PLTE", bytes(bytearray(v for c in palette for v in c))))

    def write(self, rows):
        """rows (h, W) or (h, W, 3) uint8: the next h rows."""
        rows = np.ascontiguousarray(rows)
        flat = rows.reshape(len(rows), -1)
        filtered = np.zeros((len(rows), flat.shape[1] + 1), np.uint8)
        filtered[:, 1:] = flat
        if rows.ndim == 3:  # photographs shrink better as differences to the left neighbour (filter 1, "Sub")
            filtered[:, 0] = 1
            filtered[:, 4:] -= flat[:, :-3]
        self._put(_chunk(b"IDAT", self._deflate.compress(filtered.tobytes())))
        self.rows += len(rows)

    def _put(self, data):
        try:
            self._handle.write(data)
            self._handle.flush()
        except OSError as exc:  # a full disk: write() does not know its file
            exc.filename = self.path
            raise

    def finish(self):
        """All rows are written: the file takes its name."""
        try:
            assert self.rows == self.height, (self.rows, self.height)
            self._put(_chunk(b"IDAT", self._deflate.flush()) + _chunk(b"IEND", b""))
            self._handle.close()
            os.replace(self._part, self.path)
        finally:
            self.abandon()

    def abandon(self):
        """Leave nothing behind; does nothing after a successful finish()."""
        try:
            self._handle.close()
        except OSError:  # a full disk makes the last flush fail: the file goes anyway
            pass
        if os.path.exists(self._part):
            os.remove(self._part)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is None:
            self.finish()
        else:
            self.abandon()


def write_png(path, array, palette=None):
    """array (H, W) or (H, W, 3) uint8 to a PNG file, atomically."""
    with PngWriter(path, array.shape[0], array.shape[1], 3 if array.ndim == 3 else 1, palette) as png:
        png.write(array)


# --- size and value -----------------------------------------------------------------------------------------------

def fitted_size(height, width, rule, px):
    """The size at which a net sees an image. rule: 'none' (as it is), 'long' (longer side becomes px, shape kept),
    'stretch' (px x px). Returns (height, width)."""
    if rule == "none":
        return height, width
    if rule == "stretch":
        return px, px
    scale = float(px) / max(height, width)
    return max(1, int(round(height * scale))), max(1, int(round(width * scale)))


def resized(picture, height, width):
    """`picture` at another size, as a picture: linear filter, widened when shrinking so that every pixel counts
    (antialiased), half-pixel centres. Computed band by band; the bands do not depend on what is asked, so that
    training and runtime see the same bytes."""
    if (picture.height, picture.width) == (height, width):
        return picture

    def bands():
        for y0, y1, top, bottom, start, stop in row_bands(picture.height, height):
            source = picture.window(top, 0, bottom, picture.width)
            # columns first, in a call of their own: Pillow 13 would choose an order by the sizes, older ones never do
            columns = _linear(source, (width, bottom - top), (0, 0, picture.width, bottom - top))
            yield _linear(columns, (width, y1 - y0), (0, start, width, stop))

    return BandPicture(height, width, bands)


def row_bands(n_in, n_out):
    """The bands in which `resized` makes n_out rows of n_in: yields (y0, y1, top, bottom, start, stop). The rows y0 .. y1
    are made of the rows top .. bottom, of which Pillow is asked for the box from start to stop: floats, in rows below top."""
    scale = n_in / float(n_out)
    reach = max(1.0, scale)
    step = max(1, min(128, int(128 / scale)))
    for y0 in range(0, n_out, step):
        y1 = min(n_out, y0 + step)
        top = max(0, int(y0 * scale - reach) - 1)
        bottom = min(n_in, int(y1 * scale + reach) + 2)
        yield y0, y1, top, bottom, y0 * scale - top, min(y1 * scale, n_in) - top


def _linear(array, size, box):
    """Pillow's linear filter on (h, w, 3) uint8, or on (h, w, C) float32 channel by channel."""
    if array.dtype == np.uint8:
        return pixels_of(Image.fromarray(array).resize(size, Image.BILINEAR, box=box))
    planes = [Image.fromarray(np.ascontiguousarray(array[..., c])) for c in range(array.shape[2])]
    return np.stack([pixels_of(p.resize(size, Image.BILINEAR, box=box)) for p in planes], axis=2)


def whole(picture):
    """All pixels of a picture as an array. For pictures known to be small."""
    return picture.window(0, 0, picture.height, picture.width)


def scale_shift(mean, std):
    """(scale, shift), float32 of each channel: (x/255 - mean) / std is x * scale + shift."""
    return (np.array([1 / (255.0 * s) for s in std], np.float32),
            np.array([-m / s for m, s in zip(mean, std)], np.float32))


def normalise(pixels, mean, std):
    """uint8 pixels (..., H, W, 3) in 0..255 to the float32 (..., 3, H, W) that a net takes: (x/255 - mean) / std.
    mean, std: three floats each, of the range 0..1."""
    scale, shift = scale_shift(mean, std)
    out = np.empty(pixels.shape[:-3] + (3,) + pixels.shape[-3:-1], np.float32)
    for channel in range(3):  # channel by channel: no temporary of the whole size
        np.multiply(pixels[..., channel], scale[channel], out=out[..., channel, :, :])
        out[..., channel, :, :] += shift[channel]
    return out


def blend(pixels, labels, palette):
    """Paint class colours over a picture, class 0 left clear. pixels (h, w, 3) uint8, labels (h, w) uint8,
    palette list of (r, g, b). Returns (h, w, 3) uint8, read-only."""
    picture, colours = Image.fromarray(pixels), Image.fromarray(labels)
    colours.putpalette([value for colour in palette for value in colour])
    picture.paste(Image.blend(picture, colours.convert("RGB"), OVERLAY_OPACITY), mask=Image.fromarray(labels > 0))
    return pixels_of(picture)
