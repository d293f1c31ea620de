"""GLNet: crops and merges against whole tensors, each stage's gradient against plain autograd, the command, what is worked on."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edge import glnet as sharing
from edge import images, tiles
from edge.images import ArrayPicture
from train_lite.config import ModeSettings
from train_lite.dataset import IGNORE, Pair
from train_lite.glnet import GlobalBatch, SharedBatch, Stage1Loss, Stage2Loss, Stage3Loss, TileBatch, TileView
from train_lite.gradient import Gradient
from train_lite.models import glnet
from train_lite.patches import MEAN, STD

MODELS = ["glnet-mobilenetv2", "glnet"]
KINDS = ("backbone", "ps0", "ps1", "ps2")


# --- the method, written out over whole tensors ---------------------------------------------------------------------
# Maps: of each level from a quarter to a thirty-second of the pixels, one tensor for each of KINDS.

def enlarged(maps, height, width):
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)


def relative_box(box, height, width, cells):
    """(rows, columns) of a map of `cells` that a tile lies over: slices."""
    def span(first, size):
        count = min(cells, max(1, round(cells * tile / size)))
        start = min(round(first / size * cells), cells - count)
        return slice(start, start + count)
    tile = int(box[2] - box[0])
    return span(int(box[0]), height), span(int(box[1]), width)


def cropped(maps, box, height, width):
    """The whole image's map (1, C, n, n) at a tile, of the same size."""
    rows, cols = relative_box(box, height, width, maps.shape[2])
    return enlarged(maps[:, :, rows, cols], *maps.shape[2:])


def merged(maps, boxes, height, width):
    """The tiles' maps (N, C, n, n), each at its footprint: the mean of those that lie over a cell, 0 where none does."""
    total, count = torch.zeros_like(maps[:1]), torch.zeros_like(maps[:1])
    for one, box in zip(maps, boxes):
        rows, cols = relative_box(box, height, width, maps.shape[2])
        total[:, :, rows, cols] += enlarged(one[None], rows.stop - rows.start, cols.stop - cols.start)
        count[:, :, rows, cols] += 1
    return total / count.clamp(min=1)


def pyramid(net, levels, others=None):
    """(maps, deepest map). others: the other branch's maps."""
    def seen(kind, level, own):
        return own if others is None else torch.cat([own, others[level][kind]], 1)

    ps0 = [None] * 4
    for level in (3, 2, 1, 0):
        ps0[level] = F.conv2d(seen(0, level, levels[level]), net.lateral[level].weight, net.lateral[level].bias)
        if level < 3:
            ps0[level] = ps0[level] + enlarged(ps0[level + 1], *ps0[level].shape[2:])
    ps1 = [F.conv2d(seen(1, i, own), net.smooth1[i].weight, net.smooth1[i].bias, padding=1) for i, own in enumerate(ps0)]
    ps2 = [F.conv2d(seen(2, i, own), net.smooth2[i].weight, net.smooth2[i].bias, padding=1) for i, own in enumerate(ps1)]
    deep = torch.cat([enlarged(seen(3, i, own), *levels[0].shape[2:]) for i, own in enumerate(ps2)], 1)
    if others is not None:
        deep = F.conv2d(deep, net.smooth.weight, net.smooth.bias, padding=1)
    return [list(kinds) for kinds in zip(levels, ps0, ps1, ps2)], deep


def classified(branch, deep):
    return F.conv2d(deep, branch.classify.weight, branch.classify.bias, padding=1)


class Transcribed:
    """What a GLNet makes of one image. whole (1, 3, p, p), patches (N, 3, p, p): pixels; boxes (N, 4)."""

    def __init__(self, net, whole, patches, boxes, height, width):
        self.maps, self.deep = pyramid(net.overview.pyramid, net.overview.encoder(whole))
        self.rough = classified(net.overview, self.deep)
        others = [[torch.cat([cropped(maps, box, height, width) for box in boxes]) for maps in level] for level in self.maps]
        self.own, self.fine = pyramid(net.local.pyramid, net.local.encoder(patches), others)
        if net.whole:
            self.merged = [[merged(maps, boxes, height, width) for maps in level] for level in self.own]
            self.deep = pyramid(net.whole.pyramid, net.whole.encoder(whole), self.merged)[1]
        self.coarse = torch.cat([cropped(self.deep, box, height, width) for box in boxes])
        weight = torch.cat([net.fuse_local.weight, net.fuse_deep.weight], 1)
        self.scores = F.conv2d(torch.cat([self.fine, self.coarse], 1), weight, net.fuse_local.bias, padding=1)


def seeded(stage, model="glnet-mobilenetv2", outputs=1, norm="group", seed=0):
    """A net of toy size in float64 all of whose parts matter."""
    torch.manual_seed(seed)
    net = glnet.build(stage, model, 4, norm, outputs).double()
    for name, module in net.named_modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(std=0.1)
        if name.endswith("encoder"):
            for ending in module.residual_ends():  # they begin at zero, and then nothing behind them has a gradient
                torch.nn.init.uniform_(ending.weight, 0.1, 0.4)
        if isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.1)
    return net


def close(got, want, least=1e-6):
    return tuple(got.shape) == tuple(want.shape) and float((got - want).abs().max()) <= least * max(1.0, float(want.abs().max()))


SIZES = [(64, 64, 64, 0), (200, 150, 64, 16), (150, 333, 64, 20), (64, 500, 64, 50), (65, 64, 64, 0), (96, 97, 32, 25), (500, 40, 32, 5)]


@pytest.mark.parametrize("height, width, tile, overlap", SIZES)
def test_matrices_are_slices_and_interpolations(height, width, tile, overlap):
    """Every level there and back, for tiles that overlap, at once and in chunks."""
    laid = tiles.plan(height, width, tile, overlap)
    boxes, generator = laid.boxes(), torch.Generator().manual_seed(0)
    there, back = sharing.crops(boxes, height, width, tile), sharing.places(boxes, laid)
    assert all(part.dtype == np.float32 and part.shape == (len(boxes), sum((tile // s) ** 2 for s in (4, 8, 16, 32))) for part in there + back)
    for number in {0, len(boxes) // 2, len(boxes) - 1}:
        alone = sharing.crops(boxes[number:number + 1], height, width, tile) + sharing.places(boxes[number:number + 1], laid)
        assert all((one[0] == part[number]).all() for one, part in zip(alone, there + back))
    there, back = ([sharing.split(torch.from_numpy(part).double(), tile) for part in pair] for pair in (there, back))
    whole = [torch.randn(1, 3, tile // s, tile // s, generator=generator).double() for s in sharing.STRIDES]
    for got, maps in zip(glnet.moved(whole, *there), whole):
        assert close(got, torch.cat([cropped(maps, box, height, width) for box in boxes]))
    own = [torch.randn(len(boxes), 3, tile // s, tile // s, generator=generator).double() for s in sharing.STRIDES]
    for got, maps in zip(glnet.moved(own, *back), own):
        assert close(got.sum(0, keepdim=True), merged(maps, boxes, height, width))


def test_flat_maps_come_apart_again():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3 + i, 64 // s, 64 // s, generator=generator) for i, s in enumerate(sharing.STRIDES)]
    packed = glnet.flat(maps)
    for kind in (packed, packed.numpy()):
        assert all((np.asarray(one) == other.numpy()).all() for one, other in zip(sharing.split(kind, 64, [3, 4, 5, 6]), maps))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("height, width, tile, overlap, outputs", [(150, 70, 64, 16, 1), (64, 90, 32, 12, 3)])
def test_the_net_is_its_transcription(model, height, width, tile, overlap, outputs):
    """Every part of the net that training and the runtime call, by twos of the tiles."""
    net = seeded(3, model, outputs).eval()
    generator = torch.Generator().manual_seed(0)
    laid = tiles.plan(height, width, tile, overlap)
    boxes = laid.boxes()
    small = torch.randn(1, 3, tile, tile, generator=generator).double()
    patches = torch.randn(len(boxes), 3, tile, tile, generator=generator).double()
    with torch.no_grad():
        want = Transcribed(net, small, patches, boxes, height, width)
        assert [kinds[0].shape[1:] for kinds in want.own] == [
            (count, tile // s, tile // s) for count, s in zip(net.local.encoder.channels, sharing.STRIDES)]
        maps, deep, rough = net.look(small)
        for got, kinds in zip(sharing.split(maps, tile, net.channels), want.maps):
            assert close(got, torch.cat(kinds, 1))
        assert close(rough, want.rough)
        total, parts = torch.zeros_like(maps), []
        for first in range(0, len(boxes), 2):
            chunk = slice(first, first + 2)
            there, back = ([torch.from_numpy(part).double() for part in pair] for pair in (
                sharing.crops(boxes[chunk], height, width, tile), sharing.places(boxes[chunk], laid)))
            own, fine = net.tiles(patches[chunk], maps, *there)
            assert close(fine, want.fine[chunk]) and all(close(got, torch.cat(kinds, 1)[chunk]) for got, kinds in zip(own, want.own))
            part, total = net.merge(patches[chunk], maps, *there + back + [total])
            assert close(part, net.work(patches[chunk], maps, *there))
            parts.append((part, [matrix[:, :(tile // 4) ** 2] for matrix in there], want.scores[chunk]))
        for got, kinds in zip(sharing.split(total, tile, net.channels), want.merged):
            assert close(got, torch.cat(kinds, 1))
        deep = net.deepen(small, total)
        assert close(deep, want.deep)
        for part, there, scores in parts:
            assert close(net.fuse(part, deep, *there), scores)
            assert close(net.fuse_large(part, deep, *there), enlarged(scores, tile, tile))


@pytest.mark.parametrize("model", MODELS)
def test_a_branch_alone_is_its_transcription(model):
    net = seeded(1, model, 3).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        scores = classified(net.branch, pyramid(net.branch.pyramid, net.encoder(x))[1])
        assert close(net.branch(x)[2], scores) and close(net(x), enlarged(scores, 64, 64))


# --- gradients ------------------------------------------------------------------------------------------------------

class Memory:
    """A Stored whose pixels are arrays."""

    def __init__(self, rng, height, width, tile, classes, ignored=0.1):
        self.pair, self.height, self.width = Pair("x", "", "", "train"), height, width
        self.picture = ArrayPicture(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        labels = rng.randint(0, classes, (height, width)).astype(np.uint8)
        labels[rng.rand(height, width) < ignored] = IGNORE
        self.labels = ArrayPicture(labels)
        self._overview = rng.randint(0, 256, (tile, tile, 3)).astype(np.uint8)

    def overview(self, height, width):
        assert (height, width) == self._overview.shape[:2]
        return self._overview


TILE, OVERLAP = 64, 16
EXACT = [(128, 64), (128, 128)]  # px; of a tile's maps all cells come to whole powers of two, so that float32 matrices are exact


def pixels(arrays):
    return torch.from_numpy(images.normalise(np.stack(arrays), MEAN, STD)).double()


class Whole:
    """One view, as whole arrays: what the transcription reads."""

    def __init__(self, view):
        box = (0, 0, view.height, view.width)
        image, labels = view.read(view.stored.picture, box), view.read(view.stored.labels, box)
        self.size, self.boxes = (view.height, view.width), tiles.plan(view.height, view.width, TILE, OVERLAP).boxes()
        self.small, self.patches = pixels([view.overview(TILE)]), pixels([image[y0:y1, x0:x1] for y0, x0, y1, x1 in self.boxes])
        rows, cols = [((np.arange(TILE // 4) + 0.5) / (TILE // 4) * size).astype(int) for size in self.size]
        self.truth = torch.from_numpy(labels[rows][:, cols].astype(np.int64))[None]
        self.truths = torch.from_numpy(np.stack([labels[y0 + 2:y1:4, x0 + 2:x1:4] for y0, x0, y1, x1 in self.boxes]).astype(np.int64))


def focal(scores, truth):
    """Mean over the pixels that count: scores (N, C, h, h), truth (N, h, h)."""
    counted = truth != IGNORE
    if scores.shape[1] == 1:
        p = torch.sigmoid(scores[:, 0])[counted]
        p = torch.where(truth[counted] == 1, p, 1 - p)
    else:
        p = torch.softmax(scores, 1).permute(0, 2, 3, 1)[counted]
        p = p[torch.arange(len(p)), truth[counted]]
    return (-(1 - p) ** 3 * torch.log(p)).mean()


def whole_loss(net, views, tiled):
    """The loss of a batch of Whole, in one graph."""
    if isinstance(net, glnet.Alone):
        x, truth = (torch.cat([v.patches for v in views]), torch.cat([v.truths for v in views])) if tiled else (
            torch.cat([v.small for v in views]), torch.cat([v.truth for v in views]))
        return focal(classified(net.branch, pyramid(net.branch.pyramid, net.encoder(x))[1]), truth)
    made = [Transcribed(net, v.small, v.patches, v.boxes, *v.size) for v in views]
    truths = torch.cat([v.truths for v in views])
    fused = focal(torch.cat([one.scores for one in made]), truths)
    if net.whole:
        return fused + focal(torch.cat([classified(net.whole, one.deep) for one in made]), torch.cat([v.truth for v in views]))
    fine = torch.cat([one.fine for one in made])
    squares = (fine - torch.cat([one.coarse for one in made])) ** 2
    return fused + focal(classified(net.local, fine), truths) + 0.15 * torch.stack([one.mean() for one in squares]).mean()


LOSSES = {1: Stage1Loss, 2: Stage2Loss, 3: Stage3Loss}


def batch_of(stage, views, micro, tiled=False):
    if stage > 1:
        return SharedBatch(views, TILE, stage == 3, micro, torch.device("cpu"), torch.float64)
    return (TileBatch if tiled else GlobalBatch)(views, TILE, torch.device("cpu"), torch.float64)


def taken(net):
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for p in net.parameters():
        p.grad = None
    return found


def ours(net, stage, batch, outputs, micro):
    """(loss, {name: gradient}) as training computes them."""
    made = Gradient(net, LOSSES[stage](outputs, 3.0, 0.15), ModeSettings("none", 0, TILE, "maps", "exact", "image", OVERLAP), 1, 1, micro)
    loss, = made.rounds(batch, np.random.RandomState(0))
    made.finish(clip=0)
    return loss, taken(net)


def assert_same(got, want):
    assert sorted(got) == sorted(want)
    scale = max(float(g.abs().max()) for g in want.values())
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= 1e-9 * max(float(want[name].abs().max()), 1e-3 * scale), name


TRAINED = {1: ("branch.",), 2: ("local.", "fuse_"), 3: ("whole.", "fuse_")}
CASES = [(1, "glnet-mobilenetv2", "group", 1, False), (1, "glnet", "frozen", 3, True), (1, "glnet-mobilenetv2", "group", 3, True),
         (2, "glnet-mobilenetv2", "group", 1, False), (2, "glnet", "frozen", 3, False), (2, "glnet-mobilenetv2", "frozen", 3, False),
         (3, "glnet-mobilenetv2", "group", 1, False), (3, "glnet", "frozen", 3, False), (3, "glnet", "group", 1, False)]


@pytest.mark.parametrize("stage, model, norm, outputs, tiled", CASES)
def test_gradients_equal_plain_autograd(stage, model, norm, outputs, tiled):
    """Of two images of unlike shape, turned and mirrored, whatever goes through the net together; nothing for what is frozen."""
    rng, net = np.random.RandomState(1), seeded(stage, model, outputs, norm)
    views = [TileView(Memory(rng, h, w, TILE, max(2, outputs)), turn, TILE, OVERLAP) for (h, w), turn in zip(EXACT, (0, 5))]
    net.train()
    loss = whole_loss(net, [Whole(view) for view in views], tiled)
    loss.backward()
    want = taken(net)
    trained = [name for name, _p in net.named_parameters() if name.startswith(TRAINED[stage])]
    assert sorted(want) == sorted(trained) and all((grad != 0).any() for grad in want.values())
    for micro in (1, 2):
        value, got = ours(net, stage, batch_of(stage, views, micro, tiled), outputs, micro)
        assert abs(value - float(loss.detach())) < 1e-9 * value
        assert_same(got, want)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_images_without_labels_teach_nothing(stage):
    """Beside others they change no gradient of the focal losses; by themselves they give none, and no NaN."""
    rng, net = np.random.RandomState(1), seeded(stage)
    blank = TileView(Memory(rng, 128, 128, TILE, 2, ignored=2), 0, TILE, OVERLAP)
    made = Gradient(net, LOSSES[stage](1, 3.0, 0.0), ModeSettings("none", 0, TILE, "maps", "exact", "image", OVERLAP), 1, 1, 2)
    loss, = made.rounds(batch_of(stage, [blank], 2), np.random.RandomState(0))
    assert loss == 0 and made.finish(clip=1.0) == 0 and all((grad == 0).all() for grad in taken(net).values())
    view = TileView(Memory(rng, 128, 64, TILE, 2), 0, TILE, OVERLAP)
    found = []
    for views in ([view], [blank, view]):
        list(made.rounds(batch_of(stage, views, 2), np.random.RandomState(0)))
        made.finish(clip=0)
        found.append(taken(net))
    assert_same(*found)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_branches_stay_as_they_are(stage, norm):
    """In eval mode when the net trains, and bit for bit after a step."""
    net = seeded(stage, norm=norm)
    frozen = [net.overview] + [net.local][:stage - 2]
    assert net.train() is net and net.training and net.fuse_local.training
    assert not any(module.training for branch in frozen for module in branch.modules())
    assert all(module.training for module in (net.whole or net.local).modules())
    before = [{name: value.clone() for name, value in branch.state_dict().items()} for branch in frozen]
    views = [TileView(Memory(np.random.RandomState(0), 128, 64, TILE, 2), 0, TILE, OVERLAP)]
    ours(net, stage, batch_of(stage, views, 1), 1, 1)
    for branch, kept in zip(frozen, before):
        assert all(torch.equal(value, kept[name]) for name, value in branch.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in branch.parameters())
