"""Where frames come from. A source is a URI or path; it yields Frames and stops at its end."""
import glob
import itertools
import os
import re
from typing import Callable, NamedTuple

import numpy as np

from edge import images
from edge.errors import BadFile, UsageError


class Frame(NamedTuple):
    index: int
    name: str            # of the outputs: unique within a run, no suffix
    origin: str          # path or URI
    open: Callable       # () -> a picture, see edge.images; each call reads from the start


def open_source(uri, limit=0):
    """An iterator over the Frames of an image file, a folder, a glob or synthetic://WxH; at most `limit` when not 0.
    Raises UsageError for a wrong URI and BadFile for an empty folder, at once; a file is opened by Frame.open."""
    if uri.startswith("synthetic://"):
        frames = synthetic(*synthetic_size(uri))
    elif "://" in uri:
        raise UsageError("--input %s: this version reads image files, folders, globs and synthetic://WxH"
                         % re.sub(r"//[^/@]*@", "//***@", uri))
    else:
        frames = from_files(find_files(uri))
    return itertools.islice(frames, limit or None)


def find_files(path):
    """Image paths behind a file, folder or glob, in the order of their names."""
    if os.path.isdir(path):
        found = sorted(os.path.join(path, f) for f in os.listdir(path) if f.lower().endswith(images.READABLE))
        if not found:
            raise BadFile("the folder %s holds no image; expected one of %s" % (path, " ".join(images.READABLE)))
        return found
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path))
    if not found:
        raise BadFile("no such file, folder or pattern: %s" % path)
    return found


def from_files(paths):
    used = set()
    for index, path in enumerate(paths):
        stem = os.path.splitext(os.path.basename(path))[0]
        name = stem if stem not in used else "%s-%d" % (stem, index)
        used.add(name)
        yield Frame(index, name, path, lambda path=path: images.open_photo(path))


def synthetic_size(uri):
    """(width, height) of synthetic://WIDTHxHEIGHT."""
    match = re.match(r"^synthetic://([1-9]\d{0,4})x([1-9]\d{0,4})$", uri)
    if not match:
        raise UsageError("--input %s: expected synthetic://WIDTHxHEIGHT, such as synthetic://1280x720" % uri)
    return int(match.group(1)), int(match.group(2))


def synthetic(width, height):
    """An endless test picture, a diagonal gradient that moves with every frame."""
    y, x = np.ogrid[:height, :width]
    index = 0
    while True:
        still = np.stack(np.broadcast_arrays(x + 3 * index, y, x + y + 7 * index), axis=2).astype(np.uint8)
        yield Frame(index, "frame-%06d" % index, "synthetic://%dx%d" % (width, height),
                    lambda still=still: images.ArrayPicture(still))
        index += 1
