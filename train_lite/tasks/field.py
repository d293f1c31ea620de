"""The maps of an image's levels, in a file: what a head reads in windows, and what it asks of them, at the memory of a window."""
import errno
import os
import tempfile

import numpy as np

from edge import boxes


class Field:
    """(C, rows, columns) of every level of an image of height x width px, zeros at first. folder: where its file, which has no
    name, lies until this object is gone."""

    def __init__(self, folder, height, width, channels, dtype):
        self.sizes, self._dtype, self._channels = boxes.sizes(height, width), np.dtype(dtype), channels
        cell = channels * self._dtype.itemsize
        self._first = [0] + np.cumsum([rows * columns * cell for rows, columns in self.sizes]).tolist()
        self._folder, self._file = folder, tempfile.TemporaryFile(dir=folder)
        self.clear()

    def clear(self):
        """Zeros everywhere."""
        self._file.truncate(0)
        self._file.truncate(self._first[-1])

    def _rows(self, level, y0, x0, y1, x1):
        """(offset, bytes) of every row of a window, whose cells lie one after another."""
        columns, cell = self.sizes[level][1], self._channels * self._dtype.itemsize
        return [(self._first[level] + (y * columns + x0) * cell, (x1 - x0) * cell) for y in range(y0, y1)]

    def read(self, level, y0, x0, y1, x1):
        """The cells y0..y1, x0..x1 of a level, all within it: (C, y1 - y0, x1 - x0)."""
        parts = [os.pread(self._file.fileno(), size, at) for at, size in self._rows(level, y0, x0, y1, x1)]
        cells = np.frombuffer(b"".join(parts), self._dtype).reshape(y1 - y0, x1 - x0, self._channels)
        return np.moveaxis(cells, 2, 0)

    def write(self, level, y0, x0, cells):
        """Put cells (C, h, w) at y0, x0; what lies beyond the level is left out."""
        rows, columns = self.sizes[level]
        inside = np.ascontiguousarray(np.moveaxis(cells[:, :rows - y0, :columns - x0], 0, 2), self._dtype)
        for (at, _size), row in zip(self._rows(level, y0, x0, y0 + inside.shape[0], x0 + inside.shape[1]), inside):
            if os.pwrite(self._file.fileno(), row.tobytes(), at) != row.nbytes:
                raise OSError(errno.ENOSPC, "cannot write all of the maps", self._folder)

    def add(self, level, y0, x0, cells):
        """Add cells (C, h, w), all within the level, to those at y0, x0."""
        self.write(level, y0, x0, self.read(level, y0, x0, y0 + cells.shape[1], x0 + cells.shape[2]) + cells)

    def write_tile(self, box, parts):
        """Put what an encoder gave of the tile at `box` (y0, x0, y1, x1) px: parts, boxes.split() of it, (C, side, side) each."""
        for level, (stride, part) in enumerate(zip(boxes.STRIDES, parts)):
            self.write(level, box[0] // stride, box[1] // stride, part)

    def read_tile(self, box):
        """The cells of the tile at `box`, as an encoder gives them: (C, cells); zeros beyond the image."""
        found = []
        for level, stride in enumerate(boxes.STRIDES):
            side, (y0, x0), (rows, columns) = (box[2] - box[0]) // stride, (box[0] // stride, box[1] // stride), self.sizes[level]
            part = np.zeros((self._channels, side, side), self._dtype)
            inside = self.read(level, y0, x0, min(rows, y0 + side), min(columns, x0 + side))
            part[:, :inside.shape[1], :inside.shape[2]] = inside
            found.append(part.reshape(self._channels, -1))
        return np.concatenate(found, axis=1)
