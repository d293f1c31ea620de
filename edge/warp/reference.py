"""Learned down-sampling in numpy, the definition: density -> grid -> samples, and scores back to every pixel of the image.

'Learning to Downsample for Segmentation of Ultra-High Resolution Images', Jin et al. 2022, arXiv 2109.11071. A density over
h x w nodes says where an image deserves samples; each of a task's th x tw samples moves to the mean position of the density
around it. Positions are (y, x), u in [0, 1] as in edge.geometry: float32, or float64 for a float64 density."""
import functools
from typing import NamedTuple

import numpy as np

from edge.errors import EdgeError
from edge.geometry import bilinear_matrix, reflect, to_pixels, to_unit
from edge.images import ArrayPicture
from edge.scores import labels_of

EMPTY = 1e-30      # a node with less density about it stays where it is
TINY_CELL = 1 / 256.0  # area of a cell whose samples are 16 times as close each way as undeformed: more than an image has to give
BLOCK_ROWS = 128   # of a picture that is read in parts, as the tile store and large PNG files are
BAND_PX = 1 << 16  # pixels un-warped at a time: arrays of them stay in a processor's cache
CLOSE = 0.05       # share of the samples that may be closer to the next than the mesh's points
BENT = 0.75        # of the undeformed distance between samples
MESH_POINTS = 1 << 16  # so many are cheap whatever the task; of more, there are four to a sample at most


# --- density -> grid ----------------------------------------------------------------------------------------------

def softmax(logits):
    """Density logits (h, w), any float -> density (h, w), sum 1, float32 (float64 for float64)."""
    logits = logits.astype(np.result_type(logits, np.float32))
    powers = np.exp(logits - logits.max())
    density = powers / powers.sum()
    if not np.isfinite(density).all():
        raise EdgeError("the deform net gave density logits with infinity or NaN; expected numbers. Export it in float32")
    return density


def kernel(radius):
    """exp(-4 ln2 r^2 / radius^2), r = -radius .. radius >= 1: (2 radius + 1,) float64; half as high at radius / 2."""
    return np.exp(-4 * np.log(2.0) * (np.arange(-radius, radius + 1) / float(radius)) ** 2)


@functools.lru_cache(maxsize=8)
def arms(n, radius, dtype):
    """Matrices (n, n) of `dtype` that take a column d, mirrored at its border nodes, to sum K(r) d(i + r) and to sum r K(r) d(i + r)."""
    found, own = np.zeros((2, n, n)), np.arange(n)
    for r, weight in zip(range(-radius, radius + 1), kernel(radius)):
        found[:, own, reflect(own + r, n)] += np.array([[weight], [r * weight]])
    return found.astype(dtype)


def moments(density, radius):
    """Down the columns of d (n, m): sum K(r) d(i + r) and sum r K(r) d(i + r), (n, m) each."""
    blur, lever = arms(len(density), radius, density.dtype)
    least = np.maximum(density.min(axis=0), 0)
    rest = density - least  # nothing, of a flat density: it then moves nothing, not even by a rounding error
    return density.dtype.type(kernel(radius).sum()) * least + blur @ rest, lever @ rest


def displacement(density, radius_y, radius_x):
    """Equation 3 less each node's own position: density (h, w) -> (h, w, 2) in u. The Gaussian is separable: 1-D sums."""
    blurred, lever = moments(density, radius_y)
    mass, move_x = [part.T for part in moments(blurred.T, radius_x)]
    move_y = moments(lever.T, radius_x)[0].T
    return np.stack([move_y / len(density), move_x / density.shape[1]], axis=-1) / (mass + EMPTY)[..., None]


def own_positions(rows, cols, dtype=np.float32):
    """Where rows x cols points lie when nothing moves them: (rows, cols, 2)."""
    y, x = np.meshgrid(to_unit(np.arange(rows), rows), to_unit(np.arange(cols), cols), indexing="ij")
    return np.stack([y, x], axis=-1).astype(dtype)


def nodes(density, radius_y, radius_x):
    """Where the nodes go: density (h, w), radii in nodes -> (h, w, 2). Border nodes move along their border only."""
    return own_positions(*density.shape, dtype=density.dtype) + displacement(density, radius_y, radius_x)


def grid(density, task_height, task_width, radius_y, radius_x):
    """Where the samples lie: density (h, w) -> (task_height, task_width, 2) in [0, 1]. Displacements are resized; positions,
    clamped beyond the outermost nodes, would not give the identity there."""
    move = displacement(density, radius_y, radius_x)
    rows = bilinear_matrix(task_height, density.shape[0]).astype(density.dtype)
    cols = bilinear_matrix(task_width, density.shape[1]).astype(density.dtype)
    resized = np.stack([rows @ move[..., axis] @ cols.T for axis in (0, 1)], axis=-1)
    return own_positions(task_height, task_width, density.dtype) + resized


class Faults(NamedTuple):
    """What is wrong with a grid; a cell is the quadrangle of four neighbouring samples."""
    folded: int      # cells with a corner turned over, by more than the rounding of positions
    smallest: float  # area of the smallest cell, 1 for undeformed
    crowded: float   # share of the cells that are all but nothing, TINY_CELL or less: samples on top of each other, at a point or a line


def faults(positions):
    """Faults of a grid (th, tw, 2)."""
    th, tw = positions.shape[:2]
    p = positions.astype(np.float64) * (th, tw)
    down, right = np.diff(p, axis=0), np.diff(p, axis=1)
    turns = [down[:, left:tw - 1 + left, 0] * right[top:th - 1 + top, :, 1]
             - down[:, left:tw - 1 + left, 1] * right[top:th - 1 + top, :, 0] for top in (0, 1) for left in (0, 1)]
    folded = np.min(turns, axis=0) < -1e-3
    areas = (turns[0] + turns[3]) / 2
    tiny = int((np.abs(areas) < TINY_CELL).sum())
    return Faults(int(folded.sum()), float(areas.min()) if areas.size else 1.0, tiny / float(max(1, areas.size)))


# --- picture -> samples -------------------------------------------------------------------------------------------

def gather(picture, rows, cols):
    """Pixels (n, 3) uint8, or (n,) of a mask, at rows, cols (n,) int inside a picture. Read in blocks of rows from the top,
    and of each only the columns between the outermost points: a large PNG gives its pixels in no other order."""
    if isinstance(picture, ArrayPicture):
        pixels = picture.array.reshape((-1,) + picture.array.shape[2:])
        return pixels.take(rows * picture.width + cols, axis=0)  # three times as fast as array[rows, cols]
    block, out = (rows // BLOCK_ROWS).astype(np.int16), None  # 16 bits: sorted by their digits
    order = np.argsort(block, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(block[order])) + 1):
        y, x = rows[part], cols[part]
        top, left = int(y.min()), int(x.min())
        values = picture.window(top, left, int(y.max()) + 1, int(x.max()) + 1)[y - top, x - left]
        out = np.empty((len(rows),) + values.shape[1:], values.dtype) if out is None else out
        out[part] = values
    return out


def corner_weights(fy, fx):
    """Of the pixels (0, 0), (0, 1), (1, 0), (1, 1) about a point at the fractions fy, fx between them."""
    ey, ex = 1 - fy, 1 - fx
    return ey * ex, ey * fx, fy * ex, fy * fx


def sample(picture, positions):
    """A picture at (th, tw, 2) positions, bilinear, clamped at the border: (th, tw, 3) float32 in 0 .. 255. Not rounded, as
    training differentiates it; images.normalise takes it as it takes uint8."""
    low, high, fraction = [], [], []
    for axis, size in enumerate((picture.height, picture.width)):
        at = np.clip(to_pixels(positions[..., axis].ravel(), size), 0, size - 1)
        low.append(at.astype(np.int64))
        high.append(np.minimum(low[axis] + 1, size - 1))
        fraction.append(at - low[axis].astype(at.dtype))
    pixels = gather(picture, np.concatenate(low[:1] * 2 + high[:1] * 2), np.concatenate([low[1], high[1]] * 2))
    out = 0
    for corner, weight in zip(np.split(pixels, 4), corner_weights(*fraction)):
        out = out + corner * weight[:, None]
    return out.reshape(positions.shape[:2] + (-1,))


def sample_labels(picture, positions):
    """A mask picture at (th, tw, 2) positions, the nearest pixel: (th, tw) uint8."""
    rows, cols = [np.clip((positions[..., axis].ravel() * size).astype(np.int64), 0, size - 1)
                  for axis, size in enumerate((picture.height, picture.width))]
    return gather(picture, rows, cols).reshape(positions.shape[:2])


# --- scores -> every pixel ----------------------------------------------------------------------------------------
# The inverse of a grid is computed on a mesh of points some px apart, and interpolated from them bilinearly. Coordinates are
# px of the scores padded by one on every side: no tap needs a test, and truncation rounds down.

def mesh_step(positions, height, width):
    """px between two points of the mesh: the largest of 8, 4 and 2 than which few samples are closer to the next, down the columns and
    along the rows; larger where that would make too many points. What is as far apart as undeformed needs no finer mesh: between
    such samples the inverse is linear."""
    finest = np.sqrt(height * width / float(max(MESH_POINTS, 4 * positions[..., 0].size)))
    apart = [(np.abs(np.diff(positions[..., axis], axis=axis)) * size, BENT * size / float(positions.shape[axis]))
             for axis, size in enumerate((height, width))]
    fits = [step for step in (8, 4) if step / 2.0 < finest or all(
        (gaps < min(step, bent)).sum() <= CLOSE * gaps.size for gaps, bent in apart)]
    return max(fits + [2])


def inverse(positions, height, width, step):
    """Where each mesh point of a height x width image lies in the padded scores: (th, tw, 2) -> (2, n, m) float32: y, x. step: of
    mesh_step().

    Points are at the pixel edges 0, step, 2 step ... and the last. Exact on the task's rows, linear between them along the
    image's columns. Every point gets a place: border samples are carried on to the image's border, and where a grid folds
    back, which the paper's does across its rows only, the first sample to reach a position counts."""
    th, tw = positions.shape[:2]
    p = np.pad(np.clip(positions.astype(np.float64), 0, 1), ((1, 1), (1, 1), (0, 0)), mode="edge")
    p[0, :, 0], p[-1, :, 0], p[:, 0, 1], p[:, -1, 1] = 0, 1, 0, 1
    rows, cols = [np.concatenate([[0.5], np.arange(1, n + 1), [n + 0.5]]) for n in (th, tw)]
    ys, xs = [np.minimum(np.arange(0, n + step, step), n) / float(n) for n in (height, width)]
    x = np.maximum.accumulate(p[..., 1], axis=1)
    y, across = _row_by_row(xs, x, p[..., 0]).T, _row_by_row(xs, x, cols).T  # where the task's rows cross the mesh's columns
    y = np.maximum.accumulate(y, axis=1)
    mesh = np.empty((2, len(ys), len(xs)), np.float32)
    for k in range(0, len(ys), 64):  # some at a time: the temporaries are in double precision
        mesh[0, k:k + 64] = _row_by_row(ys[k:k + 64], y, rows).T
        mesh[1, k:k + 64] = _row_by_row(ys[k:k + 64], y, across).T
    return mesh


def _row_by_row(at, x, f):
    """np.interp of at (q,) in each row of x (n, k), non-decreasing in [0, 1], and f (n, k) or (k,). Returns (n, q)."""
    apart = 2.0 * np.arange(len(x))[:, None]  # all rows in one table
    return np.interp((apart + at).ravel(), (apart + x).ravel(), np.broadcast_to(f, x.shape).ravel()).reshape(len(x), -1)


def fractions(size, step):
    """Where pixel centres lie between mesh points: (cells, step) float32 in 0 .. 1 for `size` px."""
    spans = np.minimum(step, size - np.arange(0, size, step))[:, None]
    return np.minimum((np.arange(step) + 0.5) / spans, 1).astype(np.float32)  # 1: pixels of the last cell beyond the image


def _between(low, high, fraction):
    return low + (high - low) * fraction


def _interpolated(padded, y, x):
    """padded (C, th + 2, tw + 2) at coordinates y, x (...) float32. Returns (C, ...)."""
    row, col, stride = y.astype(np.int32), x.astype(np.int32), padded.shape[2]
    index = (row * stride + col).astype(np.intp)
    weights = corner_weights(y - row.astype(np.float32), x - col.astype(np.float32))
    corners = [index, index + 1, index + stride, index + stride + 1]
    out = np.empty((len(padded),) + y.shape, np.float32)
    for plane, target in zip(padded.reshape(len(padded), -1), out):
        np.multiply(plane[corners[0]], weights[0], out=target)
        for corner, weight in zip(corners[1:], weights[1:]):
            taken = plane[corner]
            taken *= weight
            target += taken
    return out


def bands(height, width, step):
    """(first, last + 1) mesh row of the bands of an image."""
    cells, count = -(-height // step), max(1, BAND_PX // (step * width))
    return [(k, min(cells, k + count)) for k in range(0, cells, count)]


def unwarp(scores, positions, height, width):
    """Scores (C, th, tw) float32 of samples at (th, tw, 2). Yields (y0, (C, h, width) float32), all rows from the top."""
    step = mesh_step(positions, height, width)
    mesh = inverse(positions, height, width, step)
    padded = np.pad(scores, ((0, 0), (1, 1), (1, 1)), mode="edge")
    f, g, cols = fractions(height, step), fractions(width, step).ravel()[:width], np.arange(width) // step
    for first, last in bands(height, width, step):
        lines = [_between(plane[:, cols], plane[:, cols + 1], g) for plane in mesh[:, first:last + 1]]
        y, x = [_between(line[:-1, None], line[1:, None], f[first:last, :, None]).reshape(-1, width) for line in lines]
        rows = min(last * step, height) - first * step
        yield first * step, _interpolated(padded, y[:rows], x[:rows])


def unwarp_labels(scores, positions, height, width):
    """The classes of what unwarp() yields, as edge.scores.labels_of gives them. Yields (y0, (h, width) uint8). Scores are
    interpolated only where the four samples about a pixel do not all have the same class; elsewhere none other can win."""
    step = mesh_step(positions, height, width)
    mesh = inverse(positions, height, width, step)
    padded = np.pad(scores, ((0, 0), (1, 1), (1, 1)), mode="edge")
    f, g, best = fractions(height, step), fractions(width, step), labels_of(padded)
    known, unknown = np.full(best.shape, -1, np.int16), np.zeros(best.shape, np.int32)
    here = best[:-1, :-1]
    same = (here == best[1:, :-1]) & (here == best[:-1, 1:]) & (here == best[1:, 1:])
    known[:-1, :-1][same] = here[same]  # the class between a padded sample and the next ones, or -1
    unknown[1:, 1:] = (~same).cumsum(axis=0).cumsum(axis=1)  # how many -1 there are above and left
    for first, last in bands(height, width, step):
        corners = [mesh[:, i:i + last - first, j:j + len(g)] for i in (first, first + 1) for j in (0, 1)]
        y0, x0 = (np.min(corners, axis=0) - 1e-3).astype(np.int32)
        y1, x1 = (np.max(corners, axis=0) + 1.001).astype(np.int32)
        i, j = np.nonzero(unknown[y1, x1] - unknown[y0, x1] - unknown[y1, x0] + unknown[y0, x0])
        labels = np.empty((last - first, step, len(g), step), np.uint8)
        labels[...] = known[y0, x0][:, None, :, None]  # right for the mesh cells with no -1 in them
        y, x = [_between(_between(a, b, g[j][:, None]), _between(c, d, g[j][:, None]), f[first + i][:, :, None])
                for a, b, c, d in zip(*[corner[:, i, j, None, None] for corner in corners])]
        found = known[y.astype(np.int32), x.astype(np.int32)]
        mixed = found < 0
        found[mixed] = labels_of(_interpolated(padded, y[mixed], x[mixed]))
        labels[i, :, j, :] = found
        yield first * step, labels.reshape(-1, len(g) * step)[:min(last * step, height) - first * step, :width]
