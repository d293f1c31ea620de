"""The gradient of a whole batch of large images, at the memory of a few patches.

Two passes (docs/method.md, section 1): the first, without graph, gathers in a table what couples all patches, such as sums over
pixels; the second back-propagates chunk by chunk. The global feature is a leaf whose gradient is collected and pushed once
through the encoder. Over all patches this is the exact gradient; over k random ones PatchGD's, on average k/N of it.

A task's objective says what that is: objective.kept(net, half, chunk, g) gives it of a chunk of patches, with graph, and
objective.table(batch) a table for one batch, such as losses.SumTable."""
import sys

import numpy as np
import torch
from torch import nn

from edge.optional import need
from jetson import phases
from train_lite.half import LossScale
from train_lite.models.norm import BatchNorm, set_updating
from train_lite.optimizer import SLAB
from train_lite.patches import draw

MANY = 64  # chunks; a pass over more has a bar of its own at a terminal: one over a gigapixel takes minutes


class Gradient:
    """Gathers gradients of a net in its parameters' .grad, batch after batch, until finish().

    how: a config.ModeSettings; patches, inner: PatchGD's k and J; micro_batch: patches in memory at once; loss_scale: of
    a training in half precision."""

    def __init__(self, net, objective, how, patches, inner, micro_batch, loss_scale=None):
        self.net, self.objective, self.how, self.micro_batch = net, objective, how, micro_batch
        self.loss_scale = loss_scale or LossScale(half=False)
        self.patches, self.inner = patches, inner
        self.pending = 0      # contributions since the last finish()
        self._scale = None    # of the gradients gathered; see add()
        self._stale = True    # a step was made since all patches were in the table

    def rounds(self, batch, rng):
        """Add the gradient of one batch, in one round (exact) or `inner` rounds (sampled). Yields the loss of each."""
        seed = int(rng.randint(2 ** 31 - 2 ** 20))
        every, table = batch.every_patch(), self.objective.table(batch)
        if self.how.gradient == "exact":
            yield self.add(batch, every, table, seed)
            return
        if self.how.fill == "image":
            self.fill(batch, every, table, seed)
            self._stale = False
        refilled = self.how.fill == "sample" or varies(getattr(self.net, "encoder", self.net))  # the table has no vectors of these chunks
        for picks in draw(rng, batch, self.patches, self.inner, self.how.again):
            if self.how.fill == "sample":
                table.clear()
            yield self.add(batch, picks, table, seed, filled=not (refilled or self._stale))

    def _chunks(self, picks):
        return [picks[i:i + self.micro_batch] for i in range(0, len(picks), self.micro_batch)]

    def _kept(self, batch, picks, features, seed):
        chunk = batch.chunk(picks, self.net)
        torch.manual_seed(seed)  # both passes over a chunk drop the same units
        # not features[chunk.image]: the gradient of indexing adds in whatever order the threads come
        g = None if features is None else torch.stack([features[v] for v in chunk.image])
        return self.objective.kept(self.net, self.loss_scale.half, chunk, g)

    def _encode_overviews(self, batch, seed, which):
        """Global features of the images `which`, a list of int, of a batch."""
        torch.manual_seed(seed)
        return batch.encoded(self.net, self.loss_scale.half, which)

    def _features(self, batch, seed):
        """Global features of all images of a batch (B, ...), without graph; None when the net takes none."""
        if not batch.side:
            return None
        with torch.no_grad():
            return torch.cat([self._encode_overviews(batch, seed, which)
                              for which in self._chunks(list(range(len(batch.views))))])

    def fill(self, batch, picks, table, seed):
        """First pass: refresh what the table holds of `picks`, without graph."""
        phases.mark("pass 1")
        with torch.no_grad():
            features = self._features(batch, seed)
            for number, part in _watched(self._chunks(picks), "pass 1"):
                table.put(part, self._kept(batch, part, features, seed + 1 + number))

    def add(self, batch, picks, table, seed, filled=False):
        """Second pass: add the gradient of L over the patches `picks`, a list of (image, tile), to .grad.

        L counts all patches in `table`; what it holds of `picks` is refreshed first, unless filled. Gradients are kept
        times the weight of the first contribution, such as its number of pixels, so that they are of order 1 (a mean over
        67 million pixels has gradients that are denormal in float32); finish() divides. Returns L."""
        chunks = self._chunks(picks)
        if len(chunks) > 1 and not filled and not table.ready:
            self.fill(batch, picks, table, seed)
        phases.mark("pass 2")
        set_updating(self.net, len(chunks) == 1)
        leaf = self._features(batch, seed)
        if leaf is not None:
            leaf.requires_grad_()
        for number, part in _watched(chunks, "pass 2"):
            kept = self._kept(batch, part, leaf, seed + 1 + number)
            if len(chunks) == 1 or table.ready:
                table.put(part, kept)
            if number == 0:  # all is in the table
                weight = table.weight()
                self._scale = float(weight) if self._scale is None else self._scale
                factor = self.loss_scale.value * self._scale / weight
                table.couple(self.net, leaf, factor)
            table.surrogate(part, kept, factor).backward()
        if leaf is not None:  # g trains the encoder: once, with all that the patches asked of it
            for which in self._chunks(list(range(len(batch.views)))):
                asked = leaf.grad[which[0]:which[-1] + 1]
                # the same bits as .backward(asked), for which torch 2 would load its symbolic shapes and sympy
                (self._encode_overviews(batch, seed, which) * asked).sum().backward()
        set_updating(self.net, True)
        self.pending += 1
        return float(table.value())

    def finish(self, clip):
        """Bring .grad to the mean of all contributions, then limit its norm to `clip` (0: no limit). Returns the norm
        before that limit, not finite when training has diverged (.grad is then left as it is)."""
        divisor = self.pending * self._scale * self.loss_scale.value
        self.pending, self._scale, self._stale = 0, None, True
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        parts = (part for g in grads for part in g.reshape(-1).split(SLAB))  # a copy in float64 of a layer is 75 MB
        norm = float(torch.sqrt(sum((part.double() ** 2).sum() for part in parts))) / divisor
        if np.isfinite(norm):
            for grad in grads:
                grad.mul_((min(1.0, clip / norm) if clip and norm else 1.0) / divisor)
        return norm


def _watched(chunks, words):
    return enumerate(need("tqdm").tqdm(chunks, words, leave=False, unit="chunk", disable=len(chunks) < MANY or not sys.stderr.isatty()))


def varies(net):
    """Whether what `net` makes of a patch in training depends on the chunk that it is in: dropout, batch norm."""
    return any(isinstance(module, BatchNorm) or isinstance(module, (nn.Dropout, nn.Dropout2d)) and module.p > 0 for module in net.modules())
