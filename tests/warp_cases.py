"""One table of warps for numpy, torch and CUDA: densities with their sizes, and grids that no density gives."""
from typing import NamedTuple

import numpy as np

from edge.warp import reference


class Case(NamedTuple):
    name: str
    logits: np.ndarray  # (h, w) float32 density logits
    radius: tuple       # of the Gaussian, nodes: y, x
    task: tuple         # samples: height, width
    size: tuple         # px of the full image: height, width
    fair: bool = True   # the inverse is one, and the mesh follows it: compared with Delaunay and with itself


def _smooth(seed, h, w, coarse, height):
    """Noise of coarse x coarse, interpolated to h x w, with that standard deviation."""
    from edge.geometry import bilinear_matrix
    noise = np.random.RandomState(seed).randn(coarse, coarse).astype(np.float32) * height
    return bilinear_matrix(h, coarse) @ noise @ bilinear_matrix(w, coarse).T


def _peak(h, w, y, x, height):
    logits = np.zeros((h, w), np.float32)
    logits[y, x] = height
    return logits


def _border(h, w):
    logits = np.zeros((h, w), np.float32)
    logits[0], logits[:, -1], logits[-1, 0] = 2, 3, 5
    return logits


def _spikes(seed, h, w):
    """Few and high: the Gaussian meets one here and another there."""
    rng = np.random.RandomState(seed)
    return (rng.randn(h, w) * 20 * (rng.rand(h, w) < 0.1)).astype(np.float32)


CASES = [
    Case("flat", np.zeros((8, 16), np.float32), (3, 6), (32, 64), (128, 256)),
    Case("flat, odd", np.full((7, 5), 3.5, np.float32), (9, 2), (13, 19), (51, 77)),
    Case("peaked", _peak(16, 16, 5, 9, 4.0), (6, 6), (48, 48), (200, 300)),
    Case("gradient", np.add.outer(np.linspace(0, 2, 12), np.linspace(3, 0, 12)).astype(np.float32), (5, 5), (40, 56),
         (160, 224)),
    Case("random smooth", _smooth(0, 24, 24, 5, 1.0), (8, 8), (64, 64), (256, 512)),
    Case("random", np.random.RandomState(1).randn(16, 24).astype(np.float32), (5, 8), (48, 64), (190, 333)),
    Case("odd sizes", _smooth(2, 5, 7, 3, 1.0), (2, 3), (11, 13), (61, 47)),
    Case("borders", _border(10, 14), (4, 6), (33, 47), (130, 191)),
    Case("one pixel", np.zeros((1, 1), np.float32), (1, 1), (1, 1), (1, 1), False),
    Case("one sample", _smooth(3, 4, 4, 2, 1.0), (2, 2), (1, 1), (20, 30), False),
    Case("one row", _smooth(4, 1, 9, 3, 1.0), (2, 3), (1, 21), (1, 90), False),
    Case("one column", _smooth(5, 9, 1, 3, 1.0), (3, 2), (21, 1), (90, 1), False),
    Case("image smaller than the task", _smooth(6, 8, 8, 3, 1.0), (3, 3), (24, 24), (10, 7), False),
    Case("Gaussian wider than the density", _smooth(7, 4, 6, 3, 2.0), (15, 30), (20, 20), (70, 90)),
    Case("collapse", _peak(16, 16, 8, 8, 200.0), (8, 8), (24, 24), (96, 96), False),
    Case("nothing in reach", _peak(12, 12, 1, 1, 200.0), (2, 2), (24, 24), (96, 96), False),
    Case("fold", _spikes(0, 16, 16), (4, 4), (64, 64), (192, 192), False),
]


def density(case, dtype=np.float32):
    return reference.softmax(case.logits.astype(dtype))


def grid_of(case, dtype=np.float32):
    return reference.grid(density(case, dtype), *(case.task + case.radius))


def _bad(kind, th, tw):
    grid = reference.own_positions(th, tw)
    rng = np.random.RandomState(th)
    return {"one point": lambda: np.full_like(grid, 0.3), "one corner": lambda: np.zeros_like(grid),
            "mirrored": lambda: grid[:, ::-1], "turned over": lambda: grid[::-1], "transposed": lambda: grid[..., ::-1],
            "anywhere": lambda: rng.rand(th, tw, 2).astype(np.float32),
            "outside": lambda: grid * 3 - 1, "far outside": lambda: grid + 5}[kind]()


BAD_GRIDS = [(kind, np.ascontiguousarray(_bad(kind, th, tw)), size) for kind in (
    "one point", "one corner", "mirrored", "turned over", "transposed", "anywhere", "outside", "far outside")
    for th, tw, size in ((12, 12, (50, 61)), (5, 9, (16, 24)))]


def picture_of(case, channels=3):
    """(H, W, channels) uint8: noise on a slope."""
    height, width = case.size
    rng = np.random.RandomState(height + width)
    slope = np.add.outer(np.arange(height), np.arange(width)) * 150 // max(1, height + width - 2)
    return (slope[..., None] + rng.randint(0, 100, (height, width, channels))).astype(np.uint8)


def scores_of(task, channels, seed=0):
    """(channels, th, tw) float32, smooth, as a net's are."""
    return np.stack([_smooth(seed + 10 * c, task[0], task[1], 7, 1.0) for c in range(channels)])
