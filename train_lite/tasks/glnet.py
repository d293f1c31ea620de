"""GLNet in training: three stages, each a run of its own that begins with the net of the one before (Chen et al. 2019, arXiv 1905.06368,
sections 3.2 to 3.4; docs/method.md, section 8). What a stage does not train it computes without gradient, patch by patch."""
import os
import tempfile
from typing import NamedTuple

import numpy as np
import torch

from edge import glnet as sharing
from edge.errors import UsageError
from edge.images import fitted_size, photo_header
from edge.tiles import plan
from edge.warp import reference
from train_lite.config import GLNETS, mode_settings, stage
from train_lite.data.dataset import IGNORE
from train_lite.half import apply
from train_lite.losses import SumTable, entropy
from train_lite.models import glnet, norm
from train_lite.patches import Batch, View
from train_lite.runfolder import RunFolder
from train_lite.samplers.deform import Seen
from train_lite.tasks.segmentation import CALIBRATION_PATCHES, Segmentation

RATES = {1: 1.0, 2: 0.4, 3: 1.0}  # of --lr, as published
LEAST_MISSED = 1e-6               # of probability: the derivative of 0 to a power below 1 is infinite
QUARTER = slice(2, None, 4)       # every fourth label: the nearest to the centre of a cell of the first level


class Chunk(NamedTuple):
    """Patches that go through a branch together, and what the other branch gives them. Tensors on the training device."""
    pixels: torch.Tensor  # (n, 3, p, p) float, normalised
    labels: torch.Tensor  # (n, p / 4, p / 4) uint8, IGNORE where they count nowhere
    image: list           # n ints: which image of the batch
    others: list = None   # per level (n, C, h, h): the frozen overview's maps at these patches
    deep: torch.Tensor = None  # (n, D, p / 4, p / 4): its deepest map there
    rows: torch.Tensor = None  # (n, R), with cols: of edge.glnet.crops
    cols: torch.Tensor = None


class TileBatch(Batch):
    """Views whose tiles see nothing else. tile: px."""

    def __init__(self, views, tile, device, dtype=torch.float32):
        super().__init__(views, 0, device, dtype)
        self.tile = tile

    def labels(self, picks):
        """(n, p / 4, p / 4) uint8."""
        return self._labels([self.views[v].labels(t)[QUARTER, QUARTER] for v, t in picks])

    def global_labels(self, which):
        """The same of the whole images `which`."""
        at = reference.own_positions(self.tile // 4, self.tile // 4)
        return self._labels([reference.sample_labels(Seen(self.views[v], self.views[v].stored.labels), at) for v in which])

    def _labels(self, arrays):
        return torch.from_numpy(np.stack(arrays)).to(self.device)

    def overviews(self, which):
        """(n, 3, p, p) float: the whole images `which`."""
        return self._pixels([self.views[v].overview(self.tile) for v in which])

    def chunk(self, picks, _net=None):
        return Chunk(self._pixels([self.views[v].pixels(t) for v, t in picks]), self.labels(picks), [v for v, _ in picks])


class GlobalBatch(TileBatch):
    """Views each of which is one patch: the whole image."""

    def every_patch(self):
        return [(v, 0) for v in range(len(self.views))]

    def labels(self, picks):
        return self.global_labels([v for v, _ in picks])

    def chunk(self, picks, _net=None):
        which = [v for v, _ in picks]
        return Chunk(self.overviews(which), self.global_labels(which), which)


class SharedBatch(TileBatch):
    """Views whose tiles see the maps of their whole image. merges: whether the whole images see those of the tiles too (stage 3), which
    then go through the net `micro_batch` at a time; spill: whether what they are merged to lies in files until it is read."""

    def __init__(self, views, tile, merges, micro_batch, device, dtype=torch.float32, spill=False):
        super().__init__(views, tile, device, dtype)
        self.side, self._micro_batch, self._looked, self._merged = tile if merges else 0, micro_batch, {}, {}
        self._spill = spill

    def look(self, net, v):
        """Flat maps and deepest map of image v by the frozen overview. Those of one image are kept: chunks come image by image."""
        if v not in self._looked:
            with torch.no_grad():
                self._looked = {v: net.look(self.overviews([v]))[:2]}
        return self._looked[v]

    def _crops(self, v, tiles):
        view = self.views[v]
        return [self._tensor(part) for part in sharing.crops(view.boxes[tiles], view.height, view.width, self.tile)]

    def chunk(self, picks, net=None):
        rows, cols = [torch.cat(part) for part in zip(*[self._crops(v, [t]) for v, t in picks])]
        others, deep = [], []
        for number, (v, _t) in enumerate(picks):
            maps, last = self.look(net, v)
            matrices = [sharing.split(part[number:number + 1], self.tile) for part in (rows, cols)]
            others.append(glnet.moved(sharing.split(maps, self.tile, net.channels), *matrices))
            deep += glnet.moved([last], *matrices)
        return super().chunk(picks)._replace(others=[torch.cat(level) for level in zip(*others)], deep=torch.cat(deep),
                                             rows=rows, cols=cols)

    def encoded(self, net, half, which):
        """The deepest maps of the whole images `which`, which have seen their tiles' maps: (n, D, p / 4, p / 4)."""
        merged = torch.cat([self._merge(net, v) for v in which])
        return apply(lambda pixels: net.deepen(pixels, merged), half, self.overviews(which))

    def _merge(self, net, v):
        if v not in self._merged:  # the same for both passes: nothing that it comes from is trained
            view, maps = self.views[v], self.look(net, v)[0]
            laid, merged = plan(view.height, view.width, self.tile, view.overlap), torch.zeros_like(maps)
            for first in range(0, 1 if self.brief else len(view.boxes), self._micro_batch):
                tiles = list(range(len(view.boxes)))[first:first + self._micro_batch]
                pixels = self._pixels([view.pixels(t) for t in tiles])
                puts = [self._tensor(part) for part in sharing.places(view.boxes[tiles], laid)]
                with torch.no_grad():
                    merged = net.merge(pixels, maps, *self._crops(v, tiles) + puts + [merged])[1]
            self._merged[v] = Spilled(merged, os.path.dirname(view.stored.path)) if self._spill else merged
        return self._merged[v].read() if self._spill else self._merged[v]


class Spilled:
    """A tensor in a file without a name, in `folder` until this object is gone."""

    def __init__(self, tensor, folder):
        self._shape, self._device, values = tensor.shape, tensor.device, tensor.cpu().numpy()
        self._dtype, self._file = values.dtype, tempfile.TemporaryFile(dir=folder)
        self._file.write(values)
        self._file.flush()

    def read(self):
        self._file.seek(0)
        return torch.from_numpy(np.fromfile(self._file, self._dtype)).reshape(self._shape).to(self._device)


class FocalLoss:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, section 3) of all class scores of a patch, mean over the pixels that count; and
    `feature` times the mean squared difference of the two branches' deepest maps, where there are two."""

    def __init__(self, outputs, gamma, feature):
        self.outputs, self.gamma, self.feature = outputs, gamma, feature

    def table(self, batch):
        return FocalTable(batch, self)

    def focal(self, scores, labels):
        """scores (n, C, h, h), labels (n, h, h) uint8 -> the sum over the pixels of each, (n,)."""
        counts = labels != IGNORE
        each = entropy(scores, torch.where(counts, labels, torch.zeros_like(labels)).long())
        missed = (1 - torch.exp(-each)).clamp(min=LEAST_MISSED)
        return (missed ** self.gamma * each * counts).sum((1, 2))

    def rows(self, scores, labels, difference=None):
        """(n, 4) float64 for a SumTable: focal losses, pixels that count, squared difference, patches. scores: a list of class scores
        (n, C, h, h)."""
        pixels = (labels != IGNORE).sum((1, 2)).double()
        nothing = torch.zeros_like(pixels)
        loss = sum((self.focal(each, labels).double() for each in scores), nothing)
        return torch.stack([loss, pixels, nothing if difference is None else difference.double(), nothing + 1], dim=1)

    def value(self, total):
        return total[0] / total[1].clamp(min=1) + self.feature * total[2] / total[3]

    def surrogate(self, part, total):
        return part[0] + total[1].clamp(min=1) * self.feature * part[2] / total[3]


class FocalTable(SumTable):
    """Knows the pixels of all patches from the start, so that no first pass is needed."""
    ready = True

    def __init__(self, batch, loss):
        super().__init__(batch, loss)
        every = batch.every_patch()
        self.put(every, torch.cat([loss.rows([], batch.labels([pick])) for pick in every]))


class Stage1Loss(FocalLoss):
    """Of an Alone: whole images, or tiles that see nothing else."""

    def kept(self, net, half, chunk, _g):
        return apply(lambda pixels: self.rows([net.branch(pixels)[2]], chunk.labels), half, chunk.pixels)


class Stage2Loss(FocalLoss):
    def kept(self, net, half, chunk, _g):
        def both(pixels):
            deep = net.local.maps(pixels, chunk.others)[1]
            fused = net.fuse_local(deep) + net.fuse_deep(chunk.deep)
            return self.rows([net.local.classify(deep), fused], chunk.labels, ((deep - chunk.deep) ** 2).mean((1, 2, 3)))
        return apply(both, half, chunk.pixels)


class Stage3Loss(FocalLoss):
    def table(self, batch):
        return WholeTable(batch, self)

    def kept(self, net, half, chunk, g):
        """g: the deepest map of the branch that is trained, (n, D, h, h)."""
        def fused(pixels):
            with torch.no_grad():
                deep = net.local.maps(pixels, chunk.others)[1]
            first = deep.shape[2] ** 2
            return self.rows([net.fuse(net.fuse_local(deep), g, chunk.rows[:, :first], chunk.cols[:, :first])], chunk.labels)
        return apply(fused, half, chunk.pixels)


class WholeTable(FocalTable):
    """And the loss of the whole images themselves."""

    def __init__(self, batch, loss):
        super().__init__(batch, loss)
        self._labels = batch.global_labels(list(range(len(batch.views))))

    def couple(self, net, g, factor):
        super().couple(net, g, factor)
        loss = self._loss.focal(net.whole.classify(g), self._labels).sum() / (self._labels != IGNORE).sum().clamp(min=1)
        (loss * float(self.weight()) * factor).backward()
        self._of_whole = float(loss.detach())

    def value(self):
        return super().value() + self._of_whole


LOSSES = {1: Stage1Loss, 2: Stage2Loss, 3: Stage3Loss}


class TileView(View):
    """A View whose tiles overlap as they do when images are scored. Every tile learns all of its pixels, as published."""

    def __init__(self, stored, turn, tile, overlap):
        super().__init__(stored, turn, tile)
        self.overlap = overlap
        laid = plan(self.height, self.width, tile, overlap)
        self.boxes, self.grid = laid.boxes(), (len(laid.ys), len(laid.xs))
        self.owned = np.clip(self.boxes, 0, (self.height, self.width) * 2)


class Glnet(Segmentation):
    """Stage 1 and the baselines (--mode down: whole images, --mode tiled: tiles alone) train an Alone; stages 2 and 3 a GLNet."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.stage = stage(self.config)

    @staticmethod
    def demand(config):
        if stage(config) > 1:
            demand_base(config)
        if not config.name or config.mode != "patch" or RunFolder(os.path.join(config.out, config.name)).begun():
            return  # the last is refused by its own name
        for number in config.stage[1:]:  # now, not when it is that stage's turn
            path = os.path.join(config.out, stage_name(config.name, stage(config), number))
            if RunFolder(path).begun():
                raise UsageError("--name %s: its stage %s would be %s, and that run exists. Take another --name, or move it away"
                                 % (config.name, number, path))

    @staticmethod
    def find(config, data):
        pairs, classes = Segmentation.find(config, data)
        if config.coarse and classes.outputs != 1:
            raise UsageError("--coarse %g: proposals are for sets of one class and background; this one has %d classes. Leave --coarse "
                             "out" % (config.coarse, classes.outputs))
        if config.mode == "patch":  # stage 1 would not see it
            headers = [(pair.image, photo_header(pair.image)) for pair in pairs if pair.split == "train"]
            demand_tiles(config, [(image,) + fitted_size(header[0], header[1], config.fit, config.res)
                                  for image, header in headers if header])
        return pairs, classes

    def view(self, stored, turn, tile):
        return TileView(stored, turn, tile, self.settings.overlap)

    @staticmethod
    def check(config, train):
        if mode_settings(config).fusion != "none":
            demand_tiles(config, [(entry.pair.image, entry.height, entry.width) for entry in train])
        if config.coarse and not any(any(entry.ids) for entry in train):
            raise UsageError("--coarse %g and none of the %d training masks has any foreground: there is nothing to propose. Check "
                             "the masks, or leave --coarse out" % (config.coarse, len(train)))

    @staticmethod
    def build(config, outputs, kind):
        return glnet.build(stage(config), config.model, config.width, kind, outputs)

    @staticmethod
    def probe(net, outputs, tiles, px):
        pixels, side = torch.zeros(tiles, 3, px, px), px // 4
        labels, loss = torch.zeros(tiles, side, side, dtype=torch.uint8), FocalLoss(outputs, 1.0, 0.0)
        if isinstance(net, glnet.Alone):
            return loss.rows([net.branch(pixels)[2]], labels).sum()
        others = [torch.zeros(tiles, count, px // stride, px // stride) for count, stride in zip(net.channels, sharing.STRIDES)]
        branch = net.whole or net.local
        deep = branch.maps(pixels, others)[1]
        return loss.rows([branch.classify(deep), net.fuse_local(deep) + net.fuse_deep(deep)], labels).sum()

    @staticmethod
    def held(net, tiles, px, images, spill):
        """Maps of the whole image and their crops; in stage 3, of every image of the batch, what its tiles' maps are merged to, and the
        deepest map with its gradient."""
        if isinstance(net, glnet.Alone):
            return 0
        deep = net.local.classify.in_channels * (px // 4) ** 2
        maps = sum(count * (px // stride) ** 2 for count, stride in zip(net.channels, sharing.STRIDES))
        merged = 1 + (min(tiles, images) if spill else images)
        return 4 * ((1 + tiles) * (maps + deep) + (merged * maps + 2 * images * deep if net.whole else 0))

    def views_to_batch(self, views, _rng, _epoch, _number):
        if self.stage > 1:
            return SharedBatch(views, self.tile, self.stage == 3, self.recipe.batch, self.device, spill=self.config.spill)
        return (TileBatch if self.config.mode == "tiled" else GlobalBatch)(views, self.tile, self.device)

    def objective(self, _state):
        return LOSSES[self.stage](self.classes.outputs, self.config.focal, self.config.feature)

    def learning_rate(self, step, frozen_at=None):
        return RATES[self.stage] * super().learning_rate(step, frozen_at)

    def calibrate(self, net):
        rng = np.random.RandomState(self.config.seed)
        chosen = [self.train[i] for i in rng.permutation(len(self.train))[:CALIBRATION_PATCHES // 4]]
        views = [self.view(stored, int(rng.choice(self.turns)), self.tile) for stored in chosen]
        batch = self.views_to_batch(views, rng, 0, 0) if self.stage < 3 else SharedBatch(
            views, self.tile, True, self.recipe.batch, self.device, spill=True)  # on disk: more images than training may have at a time
        every = batch.every_patch()
        picks = sorted(every[i] for i in rng.permutation(len(every))[:CALIBRATION_PATCHES])
        used = sorted({v for v, _t in picks})
        if self.stage == 1:
            return [("", lambda: [net.branch(batch.chunk([pick]).pixels) for pick in picks])]

        def tiles():
            for pick in picks:
                chunk = batch.chunk([pick], net)
                net.local.maps(chunk.pixels, chunk.others)

        # the batch keeps what the overview and the tiles gave: by the time that it is asked, their norms are what they stay
        return [("overview.", lambda: [net.look(batch.overviews([v])) for v in used]), ("local.", tiles),
                ("whole.", lambda: [batch.encoded(net, False, [v]) for v in used] if net.whole else None)]

    def adopt(self, state):
        """Begin with the net of the stage before: --base."""
        if self.stage == 1:
            return
        base, _config, classes, _tile, meta = restore_base(self.config)
        if list(classes.names) != list(self.classes.names):
            raise UsageError("--base %s was trained for the classes %s; --data has %s. Take data of the same classes"
                             % (self.config.base, ", ".join(classes.names), ", ".join(self.classes.names)))
        net = state.net
        if self.stage == 2:
            net.overview = base.branch
            glnet.begin_as(net.local, base.branch)  # its group norms stay: frozen later, with statistics of tiles
            state.frozen = [name.replace("branch.", "overview.", 1) for name in meta["frozen"]]
        else:
            net.overview, net.local, net.fuse_local, net.fuse_deep = base.overview, base.local, base.fuse_local, base.fuse_deep
            whole = [name.replace("overview.", "whole.", 1) for name in meta["frozen"] if name.startswith("overview.")]
            norm.put_frozen(net, whole)
            glnet.begin_as(net.whole, base.overview)
            state.frozen = meta["frozen"] + whole
        net.to(self.device)
        net.freeze()

    @staticmethod
    def later(config):
        return [("stage " + config.stage[index], config._replace(stage=config.stage[index:], base=config.base or "the stage before"))
                for index in range(1, len(config.stage) if config.mode == "patch" else 0)]

    def following(self, path):
        """The config of the stage after the run in `path`; None after the last."""
        config = self.config
        if len(config.stage) < 2 or config.mode != "patch":
            return None
        return config._replace(stage=config.stage[1:], base=path, out=os.path.dirname(os.path.normpath(path)),
                               name=stage_name(os.path.basename(os.path.normpath(path)), self.stage, config.stage[1]), resume="", smaller=0,
                               weights=config.weights if config.stage[1] == "2" else "")

    def words(self):
        if self.config.mode != "patch":
            return super().words()
        seen = {1: "whole images at %d px", 2: "tiles of %d px beside them", 3: "whole images with tiles of %d px"}
        return "stage %d, %s" % (self.stage, seen[self.stage] % self.tile)


def stage_name(name, own, other):
    """Of the run of stage `other` ("2", "3") that follows the run `name` of stage `own`."""
    return "%s-%s" % (name[:-2] if own == 2 and name.endswith("-2") else name, other)


def demand_tiles(config, sizes):
    """Raise UsageError where images, a list of (path, height, width), are smaller than a patch."""
    small = [entry for entry in sizes if min(entry[1:]) < config.patch]
    if small:
        raise UsageError("%d of the training images, such as %s of %dx%d px at --res %d, are smaller than a patch of %d px: they have no "
                         "tiles to look at. Take a smaller --patch or a larger --res, or leave them out"
                         % (len(small), small[0][0], small[0][2], small[0][1], config.res, config.patch))


def restore_base(config):
    """state.restore() of the best net of the run --base."""
    from train_lite.state import restore
    return restore(os.path.join(config.base, "best.safetensors"))


def demand_base(config):
    """Raise UsageError when --base is no run of the stage before, or of another net."""
    if not os.path.isfile(os.path.join(config.base, "best.safetensors")):
        raise UsageError("--base %s holds no best.safetensors; --stage %s begins with the net of stage %d. Expected its run folder, such "
                         "as runs/train/NAME" % (config.base, config.stage, stage(config) - 1))
    trained = restore_base(config)[1]
    for name, theirs, ours in [("--stage", stage(trained) if trained.model in GLNETS else "of another net", stage(config) - 1)] + [
            ("--" + field, getattr(trained, field), getattr(config, field)) for field in ("model", "width", "patch", "mode", "norm")]:
        if theirs != ours:
            raise UsageError("--base %s was trained with %s %s; expected %s" % (config.base, name, theirs, ours))
