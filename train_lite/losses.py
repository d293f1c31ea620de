"""Cross-entropy + Dice of a whole batch of images, from tiles that are never in memory together.

Only sums over pixels couple the tiles: entropy E, pixels n, and per class I = sum(p t), P = sum(p), T = sum(t).
L = E / n + w * mean_c(1 - (2 I_c + 1) / (P_c + T_c + 1))
dL/dp of the Dice term needs only the totals (docs/method.md, section 1), so a second pass can back-propagate tile by tile."""
import torch
from torch.nn import functional as F

from train_lite.data.dataset import IGNORE
from train_lite.half import apply
from train_lite.models.norm import set_updating


class SegmentationLoss:
    """outputs 1: sigmoid, one foreground class; more: softmax, Dice averaged over all classes."""

    def __init__(self, outputs, dice_weight=1.0):
        self.outputs, self.dice_weight = outputs, dice_weight

    def kept(self, net, half, chunk, g):
        """What a SumTable keeps of a patches.Chunk: sums(), and its penalty where it has one. g: (n, 8, q, q) or None."""
        sums = self.sums(apply(net, half, chunk.pixels, g, chunk.rows, chunk.cols), chunk.labels)
        return sums if chunk.penalty is None else torch.cat([sums, chunk.penalty.to(sums)], dim=1)

    def table(self, batch):
        return SumTable(batch, self)

    def sums(self, logits, labels):
        """logits (B, C, h, w) float, labels (B, h, w) uint8 class ids or IGNORE.
        Returns (B, 2 + 3C) float64, differentiable: entropy, pixels, then I, P, T per class."""
        valid = (labels != IGNORE)
        ids = torch.where(valid, labels, torch.zeros_like(labels)).long()
        weight = valid.to(logits.dtype)
        if self.outputs == 1:
            truth, share = ids.to(logits.dtype).unsqueeze(1), torch.sigmoid(logits)
        else:
            truth, share = F.one_hot(ids, self.outputs).permute(0, 3, 1, 2).to(logits.dtype), torch.softmax(logits, dim=1)
        weight4 = weight.unsqueeze(1)
        share, truth = share * weight4, truth * weight4
        columns = [(entropy(logits, ids) * weight).sum((1, 2)).unsqueeze(1), weight.sum((1, 2)).unsqueeze(1),
                   (share * truth).sum((2, 3)), share.sum((2, 3)), truth.sum((2, 3))]
        return torch.cat([column.double() for column in columns], dim=1)

    def _parts(self, total):
        entropy, pixels = total[0], total[1].clamp(min=1)
        overlap, size, truth = total[2:].reshape(3, self.outputs)
        return entropy, pixels, overlap, size + truth + 1

    def value(self, total):
        """The loss L, from the sums (2 + 3C,) over all pixels that count."""
        entropy, pixels, overlap, union = self._parts(total)
        return entropy / pixels + self.dice_weight * (1 - (2 * overlap + 1) / union).mean()

    def surrogate(self, part, total):
        """A scalar whose gradient is that of n * L through the tiles behind `part`.

        part (2 + 3C,): their sums, with graph; total: sums over all pixels, constant. n * L instead of L: a mean
        over millions of pixels has gradients too small for float16 and denormal in float32."""
        _entropy, pixels, overlap, union = self._parts(total)
        i, p = part[2:2 + 2 * self.outputs].reshape(2, self.outputs)
        dice = (p * (2 * overlap + 1) / union ** 2 - 2 * i / union).mean()
        return part[0] + pixels * self.dice_weight * dice


def entropy(logits, ids):
    """Cross-entropy of each pixel, (B, h, w). logits (B, C, h, w): of C = 1 foreground's, by sigmoid; ids (B, h, w) int64."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, ids.to(logits.dtype).unsqueeze(1), reduction="none")[:, 0]
    return F.cross_entropy(logits, ids, reduction="none")


class SumTable:
    """The loss sums of every patch of a batch, as last computed: the only trace of Z that a 1x1 head needs.

    PatchGD's stale cells are the rows not refreshed since the last step."""
    ready = False  # whether all that couples the patches is known without a first pass

    def __init__(self, batch, loss):
        self._loss = loss
        self._index = {pick: row for row, pick in enumerate(batch.every_patch())}
        self._rows = None

    def put(self, picks, sums):
        if self._rows is None:
            self._rows = torch.zeros(len(self._index), sums.shape[1], dtype=torch.float64, device=sums.device)
        self._rows[[self._index[pick] for pick in picks]] = sums.detach().to(self._rows)

    def clear(self):
        self._rows = None

    def weight(self):
        """Pixels that count: what the gradient of a mean over them is multiplied with."""
        return self._rows.sum(dim=0)[1].clamp(min=1)

    def couple(self, _net, _g, _factor):
        """To be called when all sums are there, before surrogate()."""
        self._total = self._rows.sum(dim=0)

    def surrogate(self, _picks, kept, factor):
        """A scalar whose gradient is that of the loss through `kept`, times weight() and `factor`."""
        return self._loss.surrogate(kept.sum(dim=0), self._total) * factor

    def value(self):
        """The loss over all patches that are in the table."""
        return self._loss.value(self._rows.sum(dim=0))


class GridLoss:
    """Cross-entropy of whole images' labels, mean over the batch, through a models.gridnet.GridNet."""

    def kept(self, net, half, chunk, _g):
        """The vectors of a chunk's patches, (n, F)."""
        return apply(net.encoder, half, chunk.pixels)

    def table(self, batch):
        return GridTable(batch)


class GridTable:
    """The vectors of all patches of a batch, PatchGD's Z, as last computed: (B, F, rows, cols). Stale cells keep their vectors."""
    ready = False

    def __init__(self, batch):
        self._labels, self._size, self._cells = batch.labels(), batch.grid(), None

    def put(self, picks, kept):
        if self._cells is None:
            self._cells = kept.new_zeros((len(self._labels), kept.shape[1]) + self._size)
        for (image, tile), vector in zip(picks, kept.detach()):
            self._cells[(image, slice(None)) + divmod(tile, self._size[1])] = vector

    def clear(self):
        self._cells = None

    def weight(self):
        return 1.0

    def couple(self, net, g, factor):
        """Through the head, once: its gradient, g's, and what every cell is asked for."""
        set_updating(net.last, True)  # one pass only
        cells = self._cells.clone().requires_grad_()
        loss = F.cross_entropy(net.head(cells, g), self._labels)
        (loss * factor).backward()
        self._value, self._asked = float(loss.detach()), cells.grad

    def surrogate(self, picks, kept, _factor):
        asked = [self._asked[(image, slice(None)) + divmod(tile, self._size[1])] for image, tile in picks]
        return (kept * torch.stack(asked)).sum()

    def value(self):
        return self._value
