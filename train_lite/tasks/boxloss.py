"""The loss of a detector whose features lie in a Field: what every cell is to say, and a table that takes the head over it window by
window (FCOS, Tian et al. 2019, arXiv 1904.01355, section 3; constants as torchvision's)."""
import numpy as np
import torch
from torch.nn import functional as F

from edge import boxes
from train_lite.half import apply
from train_lite.models.norm import set_updating
from train_lite.tasks.field import Field

CENTRE = 1.5        # strides around a box's middle in which cells stand for it
REACH = (4.0, 8.0)  # strides to the farthest side of the boxes of a level; the first level begins at 0, the last has no end
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017, arXiv 1708.02002, section 3)
NOTHING, CROWD = -1, -2


def targets(level, y0, x0, y1, x1, truth):
    """What the cells y0..y1, x0..x1 of a level are to say. truth: (n, 6) float, x0, y0, x1, y1 px, class id, crowd.
    Returns (labels (h, w) int64: class id, NOTHING or CROWD, distances (4, h, w) in strides: left, up, right, down). Of several
    boxes the smallest counts."""
    stride = boxes.STRIDES[level]
    at_y, at_x = ((np.arange(first, last) + 0.5) * stride for first, last in ((y0, y1), (x0, x1)))
    labels, distances = np.full((len(at_y), len(at_x)), NOTHING, np.int64), np.zeros((4, len(at_y), len(at_x)))
    near = truth[(truth[:, 0] < at_x[-1]) & (truth[:, 2] > at_x[0]) & (truth[:, 1] < at_y[-1]) & (truth[:, 3] > at_y[0])]
    least = 0.0 if level == 0 else REACH[0]
    most = np.inf if level == len(boxes.STRIDES) - 1 else REACH[1]
    areas = (near[:, 2] - near[:, 0]) * (near[:, 3] - near[:, 1])
    for box in near[np.lexsort((-areas, near[:, 5] == 0))]:  # crowds first, then the largest: what comes later wins
        sides = np.stack(np.broadcast_arrays(at_x - box[0], (at_y - box[1])[:, None], box[2] - at_x, (box[3] - at_y)[:, None])) / stride
        inside, farthest = sides.min(axis=0) > 0, sides.max(axis=0)
        if box[5]:
            labels[inside] = CROWD
            continue
        off = np.maximum(np.abs(at_x - (box[0] + box[2]) / 2), np.abs(at_y - (box[1] + box[3]) / 2)[:, None])
        own = inside & (off < CENTRE * stride) & (farthest > least) & (farthest < most)
        labels[own], distances[:, own] = int(box[4]), sides[:, own]
    return labels, distances


def windows(height, width):
    """Yield (level, cells (y0, x0, y1, x1), (rows, columns) of the level) of all levels of an image of height x width px, cut into
    windows of boxes.CELLS each way."""
    for level, (rows, columns) in enumerate(boxes.sizes(height, width)):
        for y in range(0, rows, boxes.CELLS):
            for x in range(0, columns, boxes.CELLS):
                yield level, (y, x, min(rows, y + boxes.CELLS), min(columns, x + boxes.CELLS)), (rows, columns)


def centreness(distances):
    """(4, ...) left, up, right, down -> 1 in the middle of a box, 0 at its side (section 3.2)."""
    left, up, right, down = distances
    return torch.sqrt(torch.min(left, right) / torch.max(left, right) * (torch.min(up, down) / torch.max(up, down)))


def window_loss(scores, labels, distances):
    """The sum over a window's cells: focal loss, 1 - GIoU and the entropy of centre-ness. scores (classes + 5, h, w); labels,
    distances: of targets(), as tensors."""
    classes = len(scores) - 5
    counts = labels != CROWD
    truth = (labels == torch.arange(classes, device=labels.device)[:, None, None]).to(scores.dtype)
    entropy = F.binary_cross_entropy_with_logits(scores[:classes], truth, reduction="none")
    share = torch.sigmoid(scores[:classes])
    wrong = share * (1 - truth) + (1 - share) * truth
    focal = (ALPHA * truth + (1 - ALPHA) * (1 - truth)) * wrong ** GAMMA * entropy
    loss = (focal * counts).sum()
    own = labels >= 0
    if own.any():
        said, told = scores[classes:, own], distances[:, own]
        loss = loss + (1 - giou(torch.exp(said[:4].clamp(max=boxes.FARTHEST)), told)).sum()
        loss = loss + F.binary_cross_entropy_with_logits(said[4], centreness(told), reduction="sum")
    return loss


def giou(some, others):
    """Generalised IoU (Rezatofighi et al. 2019, arXiv 1902.09630, section 3) of boxes around one point, given as distances (4, n)
    to their sides: (n,)."""
    common = (torch.min(some[0], others[0]) + torch.min(some[2], others[2])) * (torch.min(some[1], others[1]) + torch.min(some[3], others[3]))
    hull = (torch.max(some[0], others[0]) + torch.max(some[2], others[2])) * (torch.max(some[1], others[1]) + torch.max(some[3], others[3]))
    union = sum((box[0] + box[2]) * (box[1] + box[3]) for box in (some, others)) - common
    return common / union - (hull - union) / hull


class BoxLoss:
    """Focal loss, GIoU and centre-ness, the sum over all cells of a batch over the number of cells that stand for a box."""

    def kept(self, net, half, chunk, _g):
        """The cells of a chunk's patches, (n, C, cells)."""
        return apply(net.encoder, half, chunk.pixels)

    def table(self, batch):
        return BoxTable(batch)


class BoxTable:
    """The Fields of a batch, PatchGD's Z, as last computed, and what the head asks of them. Stale cells keep their features."""
    ready = False

    def __init__(self, batch):
        self._views, self._truth, self._device = batch.views, batch.truth(), batch.device
        self._fields = self._asked = self._own = None

    def put(self, picks, kept):
        values = kept.detach().cpu().numpy()
        if self._fields is None:
            self._fields, self._asked = [[Field(view.folder, view.height, view.width, values.shape[1], values.dtype)
                                          for view in self._views] for _ in range(2)]
        for (image, tile), parts in zip(picks, zip(*boxes.split(values, self._views[0].tile))):
            self._fields[image].write_tile(self._views[image].boxes[tile], parts)

    def clear(self):
        self._fields = None

    def weight(self):
        return 1.0

    def _windows(self):
        """(image, level, own cells, cells that are read: y0, x0, y1, x1 each) of all windows."""
        for image, view in enumerate(self._views):
            for level, own, (rows, columns) in windows(view.height, view.width):
                yield image, level, own, (max(0, own[0] - boxes.HALO), max(0, own[1] - boxes.HALO),
                                          min(rows, own[2] + boxes.HALO), min(columns, own[3] + boxes.HALO))

    def couple(self, net, g, factor):
        """Through the head, window by window: its gradient, g's, and what every cell is asked for."""
        set_updating(net.last, True)  # one pass only
        if self._own is None:
            self._own = max(1, sum(int((targets(level, *own, truth=self._truth[image])[0] >= 0).sum())
                                   for image, level, own, _read in self._windows()))
        for field in self._asked:
            field.clear()
        self._value = 0.0
        for image, level, own, read in self._windows():
            cells = torch.from_numpy(self._fields[image].read(level, *read)[None].copy()).to(self._device).requires_grad_()
            scores = net.head(cells, None if g is None else self._context(image, level, g, read))
            inside = scores[0, :, own[0] - read[0]:own[2] - read[0], own[1] - read[1]:own[3] - read[1]]
            labels, distances = (torch.from_numpy(part).to(self._device) for part in targets(level, *own, truth=self._truth[image]))
            loss = window_loss(inside, labels, distances.to(scores.dtype)) / self._own
            (loss * factor).backward()
            self._asked[image].add(level, read[0], read[1], cells.grad[0].cpu().numpy())
            self._value += float(loss.detach())

    def _context(self, image, level, g, read):
        """The global patch's cells at the places of a window."""
        view, part = self._views[image], boxes.split(g[image:image + 1], self._views[image].tile)[level]
        rows, cols = (torch.from_numpy(m).to(part) for m in boxes.spread(level, view.height, view.width, part.shape[3], *read))
        return torch.matmul(torch.matmul(rows, part), cols.t())

    def surrogate(self, picks, kept, _factor):
        asked = np.stack([self._asked[image].read_tile(self._views[image].boxes[tile]) for image, tile in picks])
        return (kept * torch.from_numpy(asked).to(kept)).sum()

    def value(self):
        return self._value
