"""The one coordinate convention: position u in [0, 1]; pixel i of n has its centre at u = (i + 0.5) / n.

This is align_corners=False. Bare arithmetic where possible, so that numpy and torch share it.
"""
import numpy as np


def to_unit(pixel, size):
    """Centre of pixel index `pixel` (any number) of `size` pixels, as u in [0, 1]."""
    return (pixel + 0.5) / size


def to_pixels(u, size):
    """Inverse of to_unit: the pixel coordinate, 0 at the centre of the first pixel."""
    return u * size - 0.5


def reflect(index, size):
    """Fold integer pixel indices outside [0, size) back inside, mirrored at the border pixel (…2 1 0 1 2…).
    index (n,) int, any value; size >= 1. Returns (n,) int64 in [0, size)."""
    period = max(1, 2 * (size - 1))
    folded = np.abs(np.asarray(index, dtype=np.int64)) % period
    return np.minimum(folded, period - folded) if size > 1 else folded * 0


def nearest_index(n_out, n_in, start=0, stop=None):
    """Source pixel (nearest centre) of the output pixels start..stop of n_out. Returns (stop-start,) int64."""
    out = np.arange(start, n_out if stop is None else stop, dtype=np.int64)
    return np.clip((2 * out + 1) * n_in // (2 * n_out), 0, n_in - 1)  # u * n_in in whole numbers: ties fall one way


def bilinear_matrix(n_out, n_in, start=0, stop=None):
    """Linear interpolation of n_in samples to the pixels start..stop of n_out, as a matrix.

    Output pixels may lie outside [0, n_out): they take the border value, as those inside the border do.
    Returns (stop-start, n_in) float32, rows summing to 1; `matrix @ samples` interpolates. For an image:
    rows_matrix @ g @ cols_matrix.T, which is what the exported head computes with two MatMuls."""
    out = np.arange(start, n_out if stop is None else stop)
    at = np.clip(to_pixels(to_unit(out, n_out), n_in), 0, n_in - 1)
    low = np.minimum(np.floor(at).astype(np.int64), max(0, n_in - 2))
    matrix = np.zeros((len(out), n_in), np.float32)
    row = np.arange(len(out))
    matrix[row, low] = 1 - (at - low)
    if n_in > 1:
        matrix[row, low + 1] = at - low
    return matrix
