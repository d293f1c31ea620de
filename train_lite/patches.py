"""Stored images -> augmented views -> chunks of patches as tensors. Everything random comes from the caller's rng."""
from typing import NamedTuple

import numpy as np
import torch

from edge import images, tiles
from edge.scores import interpolation
from train_lite.data.dataset import IGNORE
from train_lite.half import apply

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of x/255 in RGB: what pretrained encoders expect
STD = (0.229, 0.224, 0.225)


class View:
    """One image as a training step sees it: turned and mirrored as a whole, so that its patches agree.

    turn in 0..7: turn % 4 quarter turns (counter-clockwise), mirrored left-right before that when turn > 3."""

    def __init__(self, stored, turn, tile):
        self.stored, self.turn = stored, turn
        self.height, self.width = (stored.width, stored.height) if turn % 2 else (stored.height, stored.width)
        laid = tiles.plan(self.height, self.width, tile)
        self.boxes, self.owned, self.grid = laid.boxes(), tiles.owned(laid), (len(laid.ys), len(laid.xs))

    def read(self, picture, box):
        """The window `box` of a stored picture, in this view's own coordinates."""
        y0, x0, y1, x1 = (int(v) for v in box)
        height, width = self.height, self.width
        for _ in range(self.turn % 4):  # undo the quarter turns, last first: rot90(m)[i, j] = m[j, W - 1 - i]
            y0, x0, y1, x1 = x0, height - y1, x1, height - y0
            height, width = width, height
        if self.turn > 3:
            x0, x1 = width - x1, width - x0
        return self.turned(picture.window(y0, x0, y1, x1))

    def turned(self, array):
        """An array of the whole stored image as this view sees it."""
        return np.rot90(array[:, ::-1] if self.turn > 3 else array, self.turn % 4)

    def pixels(self, index):
        """Of tile `index`: (p, p, 3) uint8."""
        return self.read(self.stored.picture, self.boxes[index])

    def labels(self, index):
        """Of tile `index`: (p, p) uint8, IGNORE where another tile owns the pixel."""
        box, own = self.boxes[index], self.owned[index]
        labels = np.full((box[2] - box[0], box[3] - box[1]), IGNORE, np.uint8)
        labels[own[0] - box[0]:own[2] - box[0], own[1] - box[1]:own[3] - box[1]] = self.read(self.stored.labels, own)
        return labels

    def patch(self, index):
        """pixels() and labels() of tile `index`."""
        return self.pixels(index), self.labels(index)

    def overview(self, size):
        """The global patch: the whole image at size x size, (size, size, 3) uint8."""
        return self.turned(self.stored.overview(size, size))


class Chunk(NamedTuple):
    """Patches that go through the net together. Tensors on the training device."""
    pixels: torch.Tensor   # (n, 3, p, p) float, normalised
    labels: torch.Tensor   # (n, p, p) uint8, IGNORE where they count nowhere
    image: list            # n ints: which image of the batch
    rows: torch.Tensor     # (n, p, q) float, interpolation of the global feature; None without
    cols: torch.Tensor
    penalty: torch.Tensor = None  # (n, 2) further sums of the loss: see deform.EdgeLoss


class Batch:
    """The views of one batch. side: px of the global patch, 0 for none; device, dtype: of the tensors made. brief: what all patches of
    an image give may be made of the first few, where memory is measured."""
    brief = False

    def __init__(self, views, side, device, dtype=torch.float32):
        self.views, self.side, self.device, self.dtype = views, side, device, dtype

    def every_patch(self):
        """All (image, tile) pairs, image by image."""
        return [(v, t) for v, view in enumerate(self.views) for t in range(len(view.boxes))]

    def chunk(self, picks, net=None):
        """Read the patches `picks`, a list of (image, tile). net: for batches whose pixels depend on it."""
        pixels, labels = zip(*(self.views[v].patch(t) for v, t in picks))
        rows = cols = None
        if self.side:
            spread = [interpolation(self.views[v].boxes[t:t + 1], self.views[v].height, self.views[v].width, self.side)
                      for v, t in picks]
            rows, cols = (self._tensor(np.concatenate(part)) for part in zip(*spread))
        return Chunk(self._pixels(pixels), torch.from_numpy(np.stack(labels)).to(self.device), [v for v, _ in picks],
                     rows, cols)

    def overviews(self, which):
        """(n, 3, q, q) float: the global patches of the images `which`, a list of n ints."""
        return self._pixels([self.views[v].overview(self.side) for v in which])

    def encoded(self, net, half, which):
        """What `net` makes of the global patches of the images `which`: a tensor of n."""
        return apply(net.encoder, half, self.overviews(which))

    def _pixels(self, arrays):
        return self._tensor(images.normalise(np.stack(arrays), MEAN, STD))

    def _tensor(self, array):
        return torch.from_numpy(array).to(self.device, self.dtype)


class PixelBatch(Batch):
    """Views whose patches go through an encoder without labels of their own."""

    def chunk(self, picks, _net=None):
        return Chunk(self._pixels([self.views[v].pixels(t) for v, t in picks]), None, [v for v, _ in picks], None, None)


def draw(rng, batch, patches, inner, again=False):
    """PatchGD's sampling: per image one random order of its tiles, cut into `inner` groups of `patches`, so no tile
    comes twice (a second order begins when the first is used up, with those that are not in a group that is not full yet).
    again: a new order for every group, so that tiles come again, as
    'Resource Efficient Perception for Vision Systems' draws them. Yields lists of (image, tile)."""
    orders = []
    for view in batch.views:
        order, k = [], min(patches, len(view.boxes))
        while len(order) < patches * inner:
            coming, begun = rng.permutation(len(view.boxes))[:k if again else None].tolist(), order[len(order) // k * k:]
            order += [tile for tile in coming if tile not in begun] + begun
        orders.append((order, k))
    for j in range(inner):
        yield [(v, tile) for v, (order, k) in enumerate(orders) for tile in order[j * k:(j + 1) * k]]
