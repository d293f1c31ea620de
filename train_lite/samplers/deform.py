"""Learned down-sampling in training: every image becomes samples where a density asks for them, and the net sees those.

'Learning to Downsample', Jin et al. 2022, arXiv 2109.11071: the deformation net is trained jointly, by the task's loss through the
samples' places, and by an edge loss that asks for samples where labels change (equation 5)."""
import numpy as np
import torch
from torch.nn import functional as F

from edge.images import normalise, scale_shift
from edge.warp import reference
from train_lite.losses import SegmentationLoss
from train_lite.models.deform import DeformNet
from train_lite.models.patchnet import PatchNet
from train_lite.patches import MEAN, STD, Batch, Chunk
from train_lite.samplers import marin, warp

LEAST_SPAN = 1e-3  # of a density, as a share of its mean: a flatter one counts as flat
FLOOR = 0.1        # of the mean of a density made of label edges: what ground without any edge still gets


class WarpNet(PatchNet):
    """The segmentation net, and beside it the one that says where to look. deform: a DeformNet, or a marin.NodeNet; None:
    nothing is learned about that."""

    def __init__(self, encoder, outputs, deform):
        super().__init__(encoder, outputs, "none")
        self.deform = deform


LOOKS = {"deform": DeformNet, "edge": DeformNet, "marin": marin.NodeNet}


def build_deform(config):
    """What says where to look, of a training's config: a module, or None where nothing is learned about that."""
    kind = "group" if config.norm == "frozen" else config.norm
    return LOOKS[config.sampler](config.deform_width, kind) if config.sampler in LOOKS else None


class Sampler:
    """Where the samples of an image lie. kind: a --sampler; recipe: a WarpRecipe; edge_loss: a key of EDGE_LOSSES."""

    def __init__(self, kind, recipe, edge_loss="divergence"):
        self.kind, self.recipe, self.size, self._edge_loss = kind, recipe, recipe.density, EDGE_LOSSES[edge_loss]

    def positions(self, net, small, edges):
        """small (1, 3, h, w): the image at the density's size; edges (h, w) tensor: where its labels change, None when they are
        not known. Returns (positions (th, tw, 2), edge loss: a scalar)."""
        nothing = small.new_zeros(())
        if self.kind == "uniform":
            return torch.from_numpy(reference.own_positions(*self.recipe.task)).to(small), nothing
        if self.kind == "edge-oracle":
            return self._grid(warp.softmax(_edge_logits(edges))), nothing
        if self.kind == "marin":
            moves = net.deform(small)[0]
            loss = nothing if edges is None else F.mse_loss(moves, self._like_moves(edges, moves))
            return marin.grid(moves.detach(), *self.recipe.task), loss
        logits = net.deform(small)[0, 0]
        density = warp.softmax(logits)
        loss = nothing if edges is None else self._edge_loss(logits, density, edges)
        return self._grid(density.detach() if self.kind == "edge" else density), loss

    def _like_moves(self, edges, moves):
        return torch.from_numpy(marin.targets(edges.cpu().numpy()) - marin.own_nodes()).to(moves)

    def _grid(self, density):
        return warp.grid(density, *(self.recipe.task + self.recipe.radius))


def oracle_logits(edges):
    """Density logits (h, w) made of label edges, numpy."""
    return np.log(edges + FLOOR * edges.mean() + 1e-6)


def _edge_logits(edges):
    return torch.from_numpy(oracle_logits(edges.cpu().numpy())).to(edges)


def divergence(logits, density, edges):
    """Kullback-Leibler divergence of the density from that of the edges: it asks for their contrast, too."""
    wanted = torch.log_softmax(_edge_logits(edges).flatten(), 0)
    return (wanted.exp() * (wanted - torch.log_softmax(logits.flatten(), 0))).sum()


def spanned(logits, density, edges):
    """The published loss: squared difference after both were brought to 0 .. 1 by their least and largest. A density that is
    all but flat meets it as well as one that moves samples."""
    return F.mse_loss(_span(density), _span(edges))


def _span(values):
    low = values.min()
    return (values - low) / (values.max() - low).clamp(min=LEAST_SPAN * float(values.detach().mean()) + 1e-12)


EDGE_LOSSES = {"divergence": divergence, "spanned": spanned}


class Seen:
    """A stored picture in the coordinates of a view: what edge.images calls a picture."""

    def __init__(self, view, picture):
        self.height, self.width, self._view, self._picture = view.height, view.width, view, picture

    def window(self, *box):
        return self._view.read(self._picture, box)


class WarpBatch(Batch):
    """The views of one batch, each of them one patch: its samples. shrink: px of the square to which the deformation net's image
    is blurred; 0: not at all."""

    def __init__(self, views, sampler, shrink, device, dtype=torch.float32):
        super().__init__(views, 0, device, dtype)
        self.sampler, self.shrink = sampler, shrink

    def every_patch(self):
        return [(v, 0) for v in range(len(self.views))]

    def chunk(self, picks, net):
        scale, shift = (self._tensor(values)[:, None, None] for values in scale_shift(MEAN, STD))
        pixels, labels, penalties = [], [], []
        for v, _ in picks:
            view = self.views[v]
            positions, penalty = self.sampler.positions(net, self._small(view), self._edges(view))
            pixels.append(warp.sample(Seen(view, view.stored.picture), positions) * scale + shift)
            labels.append(reference.sample_labels(Seen(view, view.stored.labels), positions.detach().cpu().numpy()))
            penalties.append(torch.stack([penalty, torch.ones_like(penalty)]))
        return Chunk(torch.stack(pixels), torch.from_numpy(np.stack(labels)).to(self.device), [v for v, _ in picks], None, None,
                     torch.stack(penalties))

    def _small(self, view):
        small = self._tensor(normalise(view.turned(view.stored.overview(*self.sampler.size))[None], MEAN, STD))
        if self.shrink:
            small = F.interpolate(F.adaptive_avg_pool2d(small, self.shrink), size=small.shape[2:], mode="bilinear",
                                  align_corners=False)
        return small

    def _edges(self, view):
        return self._tensor(np.ascontiguousarray(view.turned(view.stored.edges(*self.sampler.size))))


class EdgeLoss(SegmentationLoss):
    """And share() times the mean edge loss of the images: the sums have two more columns, edge losses and images
    (Chunk.penalty)."""

    def __init__(self, outputs, dice_weight, share):
        super().__init__(outputs, dice_weight)
        self.share = share

    def value(self, total):
        return super().value(total[:-2]) + self.share() * total[-2] / total[-1]

    def surrogate(self, part, total):
        return super().surrogate(part[:-2], total[:-2]) + total[1].clamp(min=1) * self.share() * part[-2] / total[-1]
