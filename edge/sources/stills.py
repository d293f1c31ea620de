"""Image files and the synthetic test picture as sources."""
import glob
import os
import re

import numpy as np

from edge import images
from edge.command import fitting_name
from edge.errors import BadFile
from edge.sources import Frame

NUMBER = re.compile(r"%(0?)(\d*)[di]")  # of a sequence: img_%04d.png, img_%i.jpg


def find_files(path):
    """Image paths behind a file, folder, glob or numbered sequence, in the order of their names or numbers."""
    if os.path.isdir(path):
        found = images.listed(path)
        if not found:
            raise BadFile("the folder %s holds no image; expected one of %s" % (path, " ".join(images.READABLE)))
        return found
    if os.path.exists(path):
        return [path]
    found = numbered(path) if NUMBER.search(os.path.basename(path)) else sorted(glob.glob(path))
    if not found:
        raise BadFile("no such file, folder or pattern: %s" % path)
    return found


def numbered(pattern):
    """The files of a sequence such as img_%04d.png that exist, in the order of their numbers."""
    folder, name = os.path.split(pattern)
    place = NUMBER.search(name)
    digits = r"(\d{%s,})" % place.group(2) if place.group(1) and place.group(2) else r"([1-9]\d*|0)"
    wanted = re.compile("%s%s%s$" % (re.escape(name[:place.start()]), digits, re.escape(name[place.end():])))
    if not os.path.isdir(folder or "."):
        return []
    found = [(int(match.group(1)), file) for file in os.listdir(folder or ".") for match in [wanted.match(file)] if match]
    return [os.path.join(folder, file) for _number, file in sorted(found)]


def from_files(paths):
    stems, used = [fitting_name(os.path.splitext(os.path.basename(path))[0]) for path in paths], set()
    known = set(stems)
    for index, (path, stem) in enumerate(zip(paths, stems)):
        name = stem
        while name in used or name != stem and name in known:  # a.png behind a.jpg, where a-1.png may be another
            name += "-%d" % index
        used.add(name)
        yield Frame(index, name, path, lambda path=path: images.open_photo(path))


def synthetic(width, height):
    """An endless test picture, a diagonal gradient that moves with every frame."""
    y, x = np.ogrid[:height, :width]
    first = np.stack(np.broadcast_arrays(x, y, x + y), axis=2).astype(np.uint8).reshape(height, -1)
    index = 0
    while True:
        step = np.tile(np.array([3 * index % 256, 0, 7 * index % 256], np.uint8), width)  # whole rows: numpy is slow at threes
        pixels = (first + step).reshape(height, width, 3)
        yield Frame(index, "frame-%06d" % index, "synthetic://%dx%d" % (width, height),
                    lambda pixels=pixels: images.ArrayPicture(pixels))
        index += 1
