"""The geometry of learned down-sampling in torch, differentiable: edge/warp/reference.py, line by line, says what it means.

Only the way down is here: training's loss is taken on the samples. Un-warping scores for evaluation is the reference's."""
import numpy as np
import torch

from edge.geometry import bilinear_matrix, to_pixels
from edge.warp import reference


def softmax(logits):
    """Density logits (h, w) -> density (h, w), sum 1, float32 (float64 for float64)."""
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(), 0).view(logits.shape)


def moments(density, radius):
    """Down each column of (n, m): sum_r K(r) d(i + r) and sum_r r K(r) d(i + r), (n, m) each."""
    blur, lever = (_like(matrix, density) for matrix in reference.arms(len(density), radius, np.float64))
    least = density.detach().min(0)[0].clamp(min=0)  # it cancels out: no gradient goes that way
    rest = density - least
    return float(reference.kernel(radius).sum()) * least + blur @ rest, lever @ rest


def displacement(density, radius_y, radius_x):
    """density (h, w) -> how far each node moves, (h, w, 2) of (y, x) in u."""
    blurred, lever = moments(density, radius_y)
    mass, move_x = [part.t() for part in moments(blurred.t(), radius_x)]
    move_y = moments(lever.t(), radius_x)[0].t()
    return torch.stack([move_y / len(density), move_x / density.shape[1]], dim=-1) / (mass + reference.EMPTY).unsqueeze(-1)


def nodes(density, radius_y, radius_x):
    """density (h, w), radii in nodes -> where the nodes go, (h, w, 2)."""
    own = _like(reference.own_positions(*density.shape, dtype=np.float64), density)
    return own + displacement(density, radius_y, radius_x)


def grid(density, task_height, task_width, radius_y, radius_x):
    """density (h, w) -> where the samples lie, (task_height, task_width, 2) of (y, x) in [0, 1]."""
    move = displacement(density, radius_y, radius_x)
    rows = _like(bilinear_matrix(task_height, density.shape[0]), density)
    cols = _like(bilinear_matrix(task_width, density.shape[1]), density)
    resized = torch.stack([rows @ move[..., axis] @ cols.t() for axis in (0, 1)], dim=-1)
    return _like(reference.own_positions(task_height, task_width, np.float64), density) + resized


def sample(picture, positions):
    """A picture at (th, tw, 2) positions, bilinear, clamped at the border: (3, th, tw) in 0 .. 255, of the positions' type.

    Exact derivative with respect to the positions, that of grid_sample(align_corners=False, padding_mode='border'): it needs
    the four pixels about each sample only, so the image may be any picture of edge.images, the tile store's too."""
    low, high, fraction = [], [], []
    for axis, size in enumerate((picture.height, picture.width)):
        at = to_pixels(positions[..., axis].flatten(), size)
        at = torch.where((at > 0) & (at < size - 1), at, at.detach().clamp(0, size - 1))  # no derivative on the border
        low.append(at.detach().long())
        high.append((low[axis] + 1).clamp(max=size - 1))
        fraction.append(at - low[axis])
    rows, cols = torch.cat(low[:1] * 2 + high[:1] * 2).cpu().numpy(), torch.cat([low[1], high[1]] * 2).cpu().numpy()
    pixels = torch.from_numpy(np.ascontiguousarray(reference.gather(picture, rows, cols).T)).to(positions)  # (3, 4 n)
    out = 0
    for corner, weight in zip(pixels.chunk(4, dim=1), reference.corner_weights(*fraction)):
        out = out + corner * weight
    return out.view((-1,) + positions.shape[:2])


def _like(array, tensor):
    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor)
