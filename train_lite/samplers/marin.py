"""Where samples lie by 'Efficient Segmentation: Learning Downsampling Near Semantic Boundaries' (Marin et al. 2019, arXiv
1907.07156): a few nodes, each drawn to the nearest label edge and to its neighbours; samples lie evenly between them. A baseline.

Unlike there, images are sampled bilinearly and scores un-warped as for every other sampler, and the net is a small one of our own."""
import numpy as np
import torch
from torch import nn

from train_lite.models.norm import NORMS

NODES = 8    # down and across; the outermost lie on the image's border
ALPHA = 0.5  # of the pull towards label edges; sqrt(ALPHA) is withheld from that between neighbours (equation 2)


class NodeNet(nn.Module):
    """(B, 3, h, w) float, the image shrunk -> (B, 2, NODES, NODES): how far each node moves, (y, x) in u."""

    def __init__(self, width, norm):
        super().__init__()
        layers, channels = [], 3
        for stride in (2, 2, 1):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), NORMS[norm](width), nn.ReLU6(inplace=True)]
            channels = width
        self.layers = nn.Sequential(*(layers + [nn.AdaptiveAvgPool2d(NODES)]))
        self.around = nn.Sequential(nn.Conv2d(width, width, 5, padding=2), nn.ReLU6(inplace=True), nn.Conv2d(width, 2, 5, padding=2))
        self.mean = nn.Parameter(torch.zeros(2, NODES, NODES))  # the part of the target that all images share
        nn.init.zeros_(self.around[2].weight)  # training begins at the plain resize
        nn.init.zeros_(self.around[2].bias)

    def forward(self, x):
        return self.around(self.layers(x)) + self.mean


def own_nodes():
    """Where the nodes lie when nothing moves them: (2, NODES, NODES) float64 in u."""
    at = np.linspace(0, 1, NODES)
    return np.stack(np.meshgrid(at, at, indexing="ij"))


def targets(edges):
    """Where the nodes should lie: edges (h, w), above 0 where labels change, or in the cell beside -> (2, NODES, NODES) float64 in u.

    The least of ALPHA sum |p - b|^2 + (1 - sqrt(ALPHA)) sum |p - p'|^2 over neighbours p', b the label edge nearest to a node's
    own place; nodes of a border keep to it. Without any label edge nodes stay."""
    own = own_nodes()
    rows, cols = np.nonzero(edges > 0)
    if not len(rows):
        return own
    found = np.stack([(rows + 0.5) / edges.shape[0], (cols + 0.5) / edges.shape[1]])
    nearest = ((own.reshape(2, -1, 1) - found[:, None]) ** 2).sum(axis=0).argmin(axis=1)
    return np.stack([_settled(own[axis], found[axis][nearest].reshape(NODES, NODES), axis) for axis in (0, 1)])


def _settled(own, pull, axis):
    """One coordinate of targets(): a linear system of a row per node."""
    count, index = own.size, np.arange(own.size).reshape(own.shape)
    system = ALPHA * np.eye(count)
    for one, other in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        for a, b in ((one.ravel(), other.ravel()), (other.ravel(), one.ravel())):
            np.add.at(system, (a, a), 1 - ALPHA ** 0.5)
            np.add.at(system, (a, b), ALPHA ** 0.5 - 1)
    wanted = ALPHA * pull.ravel()
    fixed = index.take([0, -1], axis=axis).ravel()
    system[fixed], wanted[fixed] = np.eye(count)[fixed], own.ravel()[fixed]
    return np.linalg.solve(system, wanted).reshape(own.shape)


def grid(moves, task_height, task_width):
    """Where the samples lie: what a NodeNet gave for one image, (2, NODES, NODES) -> (task_height, task_width, 2) in [0, 1],
    bilinear between the nodes."""
    own = torch.from_numpy(own_nodes()).to(moves)
    free = torch.ones_like(own)
    free[0, [0, -1]] = free[1][:, [0, -1]] = 0
    nodes = (own + free * moves).clamp(0, 1)
    rows, cols = [_between(size).to(moves) for size in (task_height, task_width)]
    return torch.stack([rows @ plane @ cols.t() for plane in nodes], dim=-1)


def _between(size):
    """Weights of the nodes for samples at (i + 0.5) / size: (size, NODES)."""
    at = (np.arange(size) + 0.5) / size * (NODES - 1)
    return torch.from_numpy(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(NODES))))
