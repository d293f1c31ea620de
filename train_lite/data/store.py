"""The tile store: every image, and its mask where it has one, decoded once to blocks of raw bytes, so that a tile is a few reads.

One file per pair: a header of 4096 bytes (JSON), then the image's blocks (128 x 128 x 3 uint8, row by row, edges
padded with zeros), then the mask's (128 x 128). Blocks are read with pread, not mapped: a map's pages would count as
resident memory of the process. Beside it an overview per size asked. All of it can be deleted at any time."""
import hashlib
import json
import os
import re
import shutil
import stat

import numpy as np

from edge import images
from edge.command import cache_home, say, written
from edge.errors import BadFile
from edge.geometry import nearest_index, reflect
from train_lite.data.dataset import IGNORE, TURNED

VERSION = 4
BLOCK = 128
HEADER = 4096
OURS = re.compile(r"[0-9a-f]{24}\.tiles")  # names begin so: tiles, and the overviews and edges beside them


class StoredPicture:
    """A picture (see edge.images) whose pixels are blocks of a file."""

    def __init__(self, path, offset, height, width, channels):
        self.path, self.offset, self.height, self.width, self.channels = path, offset, height, width, channels

    def window(self, y0, x0, y1, x1):
        """(h, w, 3) uint8, or (h, w) for a mask; mirrored outside the image."""
        rows, cols = reflect(np.arange(y0, y1), self.height), reflect(np.arange(x0, x1), self.width)
        top, left = int(rows.min()), int(cols.min())
        inside = self._read(top, left, int(rows.max()) + 1, int(cols.max()) + 1)
        if inside.shape[:2] != (len(rows), len(cols)) or y0 < 0 or x0 < 0 or y1 > self.height or x1 > self.width:
            inside = inside[(rows - top)[:, None], cols - left]
        return inside if self.channels > 1 else inside[..., 0]

    def _read(self, y0, x0, y1, x1):
        out = np.empty((y1 - y0, x1 - x0, self.channels), np.uint8)
        size = BLOCK * BLOCK * self.channels
        across = -(-self.width // BLOCK)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            for by in range(y0 // BLOCK, (y1 - 1) // BLOCK + 1):
                for bx in range(x0 // BLOCK, (x1 - 1) // BLOCK + 1):
                    raw = os.pread(handle, size, self.offset + (by * across + bx) * size)
                    if len(raw) != size:
                        raise BadFile("%s is cut short; delete the cache folder and type the command again" % self.path)
                    block = np.frombuffer(raw, np.uint8).reshape(BLOCK, BLOCK, self.channels)
                    top, bottom = max(y0, by * BLOCK), min(y1, (by + 1) * BLOCK)
                    left, right = max(x0, bx * BLOCK), min(x1, (bx + 1) * BLOCK)
                    out[top - y0:bottom - y0, left - x0:right - x0] = block[
                        top - by * BLOCK:bottom - by * BLOCK, left - bx * BLOCK:right - bx * BLOCK]
        finally:
            os.close(handle)
        return out


class Stored:
    """One pair in the store: `picture` and `labels` (class ids, IGNORE) of the same size, `pair`, overviews; white: what 255 was
    taken for in a binary mask, 'ignored', 'foreground' or ''; ids: the classes that its labels hold, in order."""

    def __init__(self, pair, path, height, width, white="", ids=()):
        self.pair, self.path, self.height, self.width, self.white, self.ids = pair, path, height, width, white, tuple(ids)
        blocks = -(-height // BLOCK) * -(-width // BLOCK) * BLOCK * BLOCK
        self.picture = StoredPicture(path, HEADER, height, width, 3)
        self.labels = StoredPicture(path, HEADER + 3 * blocks, height, width, 1)

    def overview_path(self, height, width):
        return "%s.%dx%d" % (self.path, width, height)

    def overview(self, height, width):
        """The whole image at that size: (height, width, 3) uint8; computed once, then read."""
        return self._kept(self.overview_path(height, width), (height, width, 3), np.uint8,
                          lambda: images.whole(images.resized(self.picture, height, width)))

    def edges(self, height, width):
        """Where labels change: (height, width) float32, per cell the share of its pixels whose right or lower neighbour has
        another class, blurred by one cell. Computed once, then read."""
        return self._kept("%s.%dx%d.edges" % (self.path, width, height), (height, width), np.float32,
                          lambda: label_edges(self.labels, height, width))

    @staticmethod
    def _kept(path, shape, dtype, make):
        """The array in the file `path`, made and written there when it is not."""
        if not os.path.isfile(path) or os.path.getsize(path) != int(np.prod(shape)) * np.dtype(dtype).itemsize:
            with written(path, "wb") as handle:
                handle.write(np.ascontiguousarray(make(), dtype).tobytes())
        return np.fromfile(path, dtype).reshape(shape)


def label_edges(labels, height, width):
    """See Stored.edges; labels: a picture of class ids. IGNORE makes no edge."""
    counts = np.zeros((height, width), np.int64)
    cols = np.arange(labels.width) * width // labels.width
    for y0 in range(0, labels.height, BLOCK):
        stop = min(labels.height, y0 + BLOCK)
        band = labels.window(y0, 0, min(labels.height, stop + 1), labels.width)
        here = np.zeros((stop - y0, labels.width), bool)
        for axis, other in ((0, band[1:]), (1, band[:, 1:])):
            this = band[:other.shape[0], :other.shape[1]]
            apart = (this != other) & (this != IGNORE) & (other != IGNORE)
            here[:apart.shape[0], :apart.shape[1]] |= apart[:len(here)]
        rows, at = np.arange(y0, stop) * height // labels.height, np.nonzero(here)
        counts += np.bincount(rows[at[0]] * width + cols[at[1]], minlength=height * width).reshape(height, width)
    room = np.outer(*[np.bincount(np.arange(n) * cells // n, minlength=cells) for n, cells in (
        (labels.height, height), (labels.width, width))])
    share = counts / np.maximum(room, 1.0)
    padded = np.pad(share, 1, mode="edge")
    padded = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return ((padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4).astype(np.float32)


def cache_folder(config, data):
    """Where the store of a data folder lives: --cache, else DIR/.nanopatch, else the user's cache where DIR is
    write-protected (root could write there all the same; it should not)."""
    if config.cache:
        return config.cache
    folder = os.path.abspath(data if os.path.isdir(data) else os.path.dirname(os.path.abspath(data)))
    if os.stat(folder).st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK):
        return os.path.join(folder, ".nanopatch")
    return os.path.join(cache_home(), hashlib.sha256(folder.encode()).hexdigest()[:12])


class NoRoom(BadFile):
    """No image is at fault."""


def ingest(pairs, classes, resize, resize_px, folder, limit_gb, overview, since, problems):
    """Bring all pairs into the store, at the size that `resize`, `resize_px` ask (edge.images.fitted_size), with an
    overview of `overview` (height, width) px when asked for. What is there already is kept; files not used since the time `since` make
    room. Returns the list of Stored, in order; what is wrong with a file goes to the list `problems`."""
    os.makedirs(folder, exist_ok=True)
    stored, added = [], 0
    for pair in pairs:
        try:
            path = os.path.join(folder, _key(pair, classes, resize, resize_px) + ".tiles")
            entry = _open(pair, path)
            if entry is None:
                if added == 0:
                    say("reading up to %d images into the tile store %s" % (len(pairs), folder))
                if added % 32 == 0:
                    _make_room(folder, limit_gb, since)
                added += 1
                entry = _add(pair, path, classes, resize, resize_px)
            if overview:
                entry.overview(*overview)
                os.utime(entry.overview_path(*overview))
            os.utime(path)  # recently used: the last to be pruned
            stored.append(entry)
        except NoRoom:
            raise  # as would all that follow
        except BadFile as exc:
            problems.append(str(exc))
    if added:
        _make_room(folder, limit_gb, since)
    return stored


def _key(pair, classes, resize, resize_px):
    facts = [VERSION, resize, resize_px, classes._asdict() if hasattr(classes, "_asdict") else classes]
    for path in filter(None, (pair.image, pair.mask)):
        try:
            info = os.stat(path)
        except OSError as exc:
            raise BadFile("cannot read %s: %s" % (path, exc.strerror)) from exc
        facts += [os.path.abspath(path), info.st_size, info.st_mtime]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _open(pair, path):
    try:
        with open(path, "rb") as handle:
            header = json.loads(handle.read(HEADER).rstrip(b" \0").decode())
        entry = Stored(pair, path, header["height"], header["width"], header["white"], header["ids"])
        whole = entry.labels.offset + ((entry.labels.offset - HEADER) // 3 if pair.mask else 0)
        return entry if header["version"] == VERSION and os.path.getsize(path) == whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _add(pair, path, classes, resize, resize_px):
    image = images.open_photo(pair.image)
    mask = images.open_mask(pair.mask, classes.by_colour) if pair.mask else None
    if mask:
        _demand_alike(pair, image, mask)
    height, width = images.fitted_size(image.height, image.width, resize, resize_px)
    sized = images.resized(image, height, width)
    decode = LabelDecoder(pair.mask, classes) if mask else None
    white, ids = decode.white if mask else "", set()

    with written(path, "wb") as handle:
        handle.write(b" " * HEADER)
        for y0 in range(0, height, BLOCK):
            _write_blocks(handle, sized.window(y0, 0, min(height, y0 + BLOCK), width))
        for y0 in range(0, height if mask else 0, BLOCK):
            rows = nearest_index(height, mask.height, y0, min(height, y0 + BLOCK))
            band = mask.window(int(rows[0]), 0, int(rows[-1]) + 1, mask.width)
            band = band[rows - rows[0]][:, nearest_index(width, mask.width)]
            labels = decode(band)
            ids.update(np.unique(labels).tolist())
            _write_blocks(handle, labels[..., None])
        ids = sorted(ids - {IGNORE})
        handle.seek(0)
        handle.write(json.dumps({"version": VERSION, "height": height, "width": width, "white": white, "ids": ids}).encode())

    return Stored(pair, path, height, width, white, ids)


def _demand_alike(pair, image, mask):
    """Raise BadFile where a mask is of another size than its image, or where one of them is turned by a flag and sizes do not say whether
    the other was drawn on it turned."""
    turns, sides = [images.orientation(path) for path in (pair.image, pair.mask)], (image.height, image.width)
    flags = "One of them is turned by a flag (EXIF orientation %d, %d), which is not followed here. " % tuple(turns) + TURNED % "it was"
    if sides != (mask.height, mask.width):
        raise BadFile("%s is %dx%d but its mask %s is %dx%d; expected the same size%s" % (
            pair.image, image.width, image.height, pair.mask, mask.width, mask.height, "" if turns[0] == turns[1] else ". " + flags))
    if turns[0] != turns[1] and (len(set(sides)) == 1 or (turns[0] < 5) == (turns[1] < 5)):
        raise BadFile("%s and its mask %s: nothing says whether they agree. %s" % (pair.image, pair.mask, flags))


def contradictions(stored):
    """What is wrong with the masks of a list of Stored taken together, a list of texts."""
    found = {entry.white: entry.pair.mask for entry in stored}
    if not {"ignored", "foreground"} <= set(found):
        return []
    return ["%(ignored)s holds 0, 1 and 255, so 255 is ignored there; %(foreground)s holds 0 and 255 alone, where it would be foreground. Say "
            "which it is in a classes.json in the data folder, such as {\"classes\": [{\"name\": \"ground\", \"colour\": [0, 0, 0]}, {\"name\": "
            "\"thing\", \"colour\": [1, 1, 1]}], \"ignore\": [[255, 255, 255]]}" % found]


def absent(stored, names):
    """Which of the classes `names` no label of a list of Stored holds, a list of names."""
    held = set().union(*(entry.ids for entry in stored))
    return [name for index, name in enumerate(names) if index not in held]


def _write_blocks(handle, band):
    rows, width, channels = band.shape
    padded = np.zeros((BLOCK, -(-width // BLOCK) * BLOCK, channels), np.uint8)
    padded[:rows, :width] = band
    for x in range(0, padded.shape[1], BLOCK):
        handle.write(np.ascontiguousarray(padded[:, x:x + BLOCK]).tobytes())


class LabelDecoder:
    """Mask values or colours -> class ids. One per mask file: binary masks may be 0/1 or 0/255."""

    def __init__(self, path, classes):
        self.path, self.classes, self.white = path, classes, ""  # white: see Stored
        self._high = None if classes.outputs > 1 or classes.by_colour else self._binary_level()

    def _binary_level(self):
        picture, values = images.open_mask(self.path, False), set()
        for y in range(0, picture.height, 256):
            values.update(np.unique(picture.window(y, 0, min(picture.height, y + 256), picture.width)).tolist())
        if 1 in values and values <= {0, 1} | set(self.classes.ignore):
            self.white = "ignored" if 255 in values else ""
            return 1
        self.white = "foreground" if 255 in values and values <= {0, 255} and 255 in self.classes.ignore else ""
        top = max(values - set(self.classes.ignore) - {255} or {0})  # 255 marks outlines in masks of class ids
        if 0 < top < 128:
            raise BadFile("%s holds the values %s; a binary mask has 0 and 1, or black and white. For class ids give --classes %d, or a "
                          "classes.json; for a value that counts nowhere --ignore" % (self.path, sorted(values)[:8], top + 1))
        return 128

    def __call__(self, band):
        """band (h, w) values or (h, w, 3) colours -> (h, w) uint8 ids, IGNORE. Raises BadFile naming the values."""
        if self.classes.by_colour:
            return self._by_colour(band)
        ignored = [v for v in self.classes.ignore if isinstance(v, int)]
        if self._high is not None:
            ids = (band >= self._high).astype(np.uint8)
            ids[np.isin(band, [v for v in ignored if v != 255 or self._high == 1])] = IGNORE  # or 255 is white
            return ids
        ids = band.copy()
        ids[np.isin(band, ignored)] = IGNORE
        wrong = np.unique(band[(ids != IGNORE) & (ids >= len(self.classes.names))])
        if len(wrong):
            raise BadFile("%s holds the values %s; expected 0..%d or %s (ignored). Give --classes, --ignore or a classes.json"
                          % (self.path, wrong[:8].tolist(), len(self.classes.names) - 1, ignored))
        return ids

    def _by_colour(self, band):
        packed = (band.astype(np.uint32) * np.array([65536, 256, 1], np.uint32)).sum(axis=2)
        ids = np.full(packed.shape, 254, np.uint8)
        for index, colour in enumerate(self.classes.palette):
            ids[packed == _packed(colour)] = index
        for colour in self.classes.ignore:
            if not isinstance(colour, int):
                ids[packed == _packed(colour)] = IGNORE
        if (ids == 254).any():
            wrong = np.unique(packed[ids == 254])[:4]
            raise BadFile("%s holds colours that classes.json does not name: %s. Name them, or list them under ignore"
                          % (self.path, [[int(v) >> 16, int(v) >> 8 & 255, int(v) & 255] for v in wrong]))
        return ids


def _packed(colour):
    return colour[0] * 65536 + colour[1] * 256 + colour[2]


def _make_room(folder, limit_gb, since):
    """Delete the longest unused files until the store is below its cap; refuse when the disk is nearly full."""
    files = [os.path.join(folder, name) for name in os.listdir(folder) if OURS.match(name)]  # --cache may be a folder that holds more
    sizes = {path: os.stat(path) for path in files if os.path.isfile(path)}
    total = sum(info.st_size for info in sizes.values())
    for path in sorted(sizes, key=lambda p: sizes[p].st_mtime):
        if total > limit_gb * 1e9 and sizes[path].st_mtime < since - 1:  # - 1: clocks of file systems are coarse
            os.remove(path)
            total -= sizes[path].st_size
    if total > limit_gb * 1e9:
        raise NoRoom("the tile store %s needs more than --cache-gb %g; give a larger cap" % (folder, limit_gb))
    if shutil.disk_usage(folder).free < 64 << 20:
        raise NoRoom("less than 64 MB are free on the disk of %s; free some, or move the store with --cache" % folder)
