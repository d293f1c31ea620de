"""Cross-entropy + Dice of a whole batch of images, from tiles that are never in memory together.

Only sums over pixels couple the tiles: entropy E, pixels n, and per class I = sum(p t), P = sum(p), T = sum(t).
L = E / n + w * mean_c(1 - (2 I_c + 1) / (P_c + T_c + 1))
dL/dp of the Dice term needs only the totals (docs/method.md, section 1), so a second pass can back-propagate tile by tile."""
import torch
from torch.nn import functional as F

from train_lite.dataset import IGNORE


class SegmentationLoss:
    """outputs 1: sigmoid, one foreground class; more: softmax, Dice averaged over all classes."""

    def __init__(self, outputs, dice_weight=1.0):
        self.outputs, self.dice_weight = outputs, dice_weight

    def sums(self, logits, labels):
        """logits (B, C, h, w) float, labels (B, h, w) uint8 class ids or IGNORE.
        Returns (B, 2 + 3C) float64, differentiable: entropy, pixels, then I, P, T per class."""
        valid = (labels != IGNORE)
        ids = torch.where(valid, labels, torch.zeros_like(labels)).long()
        weight = valid.to(logits.dtype)
        if self.outputs == 1:
            truth = ids.to(logits.dtype).unsqueeze(1)
            entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")[:, 0]
            share = torch.sigmoid(logits)
        else:
            truth = F.one_hot(ids, self.outputs).permute(0, 3, 1, 2).to(logits.dtype)
            entropy = F.cross_entropy(logits, ids, reduction="none")
            share = torch.softmax(logits, dim=1)
        weight4 = weight.unsqueeze(1)
        share, truth = share * weight4, truth * weight4
        columns = [(entropy * weight).sum((1, 2)).unsqueeze(1), weight.sum((1, 2)).unsqueeze(1),
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
