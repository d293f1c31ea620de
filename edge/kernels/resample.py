"""Pillow's linear filter as tables, for a GPU to do what `Image.resize(size, Image.BILINEAR, box=box)` does, bit for bit.

A table is (first (n_out,) int32, weights (n_out, taps) float64): line i of the result is the sum over k of weights[i, k]
times line first[i] + k. Taps that Pillow does not use have weight 0; such a tap may lie outside and is never read."""
import numpy as np

from edge.images import row_bands

PRECISION_BITS = 22  # of the whole numbers that Pillow resizes bytes with


def table(n_in, n_out, start=0.0, stop=None):
    """The table of one axis, from n_in pixels to n_out; start, stop: the box that is resized, in pixels of the source."""
    start, stop = np.float32(start), np.float32(n_in if stop is None else stop)  # Pillow keeps the box in float32
    scale = float(stop - start) / n_out
    support = max(1.0, scale)
    centre = float(start) + (np.arange(n_out) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), n_in) - first
    tap = np.arange(count.max())
    weights = 1 - np.abs((tap + first[:, None] - centre[:, None] + 0.5) * (1 / support))
    weights[(weights < 0) | (tap >= count[:, None])] = 0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed in order, as C does: np.sum adds in pairs
    return first.astype(np.int32), weights


def row_table(n_in, n_out):
    """The table of the rows of edge.images.resized(picture, n_out, width), which asks Pillow band by band."""
    parts = []
    for y0, y1, top, bottom, start, stop in row_bands(n_in, n_out):
        first, weights = table(bottom - top, y1 - y0, start, stop)
        parts.append((first + np.int32(top), weights))
    joined = np.zeros((n_out, max(weights.shape[1] for _first, weights in parts)))
    done = 0
    for first, weights in parts:
        joined[done:done + len(first), :weights.shape[1]] = weights
        done += len(first)
    return np.concatenate([first for first, _weights in parts]), joined


def fixed(weights):
    """The weights that Pillow resizes bytes with: (n_out, taps) int32, in steps of 2^-22."""
    return (0.5 + weights * (1 << PRECISION_BITS)).astype(np.int32)


def resize(array, height, width):
    """What edge.images.resized gives, by the tables: of (h, w, 3) uint8, or of (C, h, w) float32 planes."""
    rows, columns = (0, 1) if array.dtype == np.uint8 else (1, 2)
    if width != array.shape[columns]:
        array = along(array, columns, table(array.shape[columns], width))
    if height != array.shape[rows]:
        array = along(array, rows, row_table(array.shape[rows], height))
    return array


def along(array, axis, made):
    """Apply a table to one axis of an array, uint8 or float32. Returns the same type."""
    lines, (first, weights) = np.moveaxis(array, axis, 0), made
    small = array.dtype == np.uint8
    weights = fixed(weights) if small else weights
    total = np.full((len(first),) + lines.shape[1:], 1 << PRECISION_BITS - 1 if small else 0, weights.dtype)
    for tap in range(weights.shape[1]):
        used = weights[:, tap] != 0
        factor = weights[used, tap].reshape((-1,) + (1,) * (lines.ndim - 1))
        total[used] += lines[first[used] + tap] * factor
    total = np.clip(total >> PRECISION_BITS, 0, 255) if small else total
    return np.moveaxis(total.astype(array.dtype), 0, axis)
