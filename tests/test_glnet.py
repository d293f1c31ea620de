"""GLNet: crops and merges against whole tensors, each stage's gradient against plain autograd, the command, what is worked on."""
import fcntl
import json
import os
import shutil
import signal
import tempfile

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import BLOCKS, LOOK, ROOT, STEP, command, peaks_kib, write_large, write_set
from edge import glnet as sharing
from edge import images, tiles
from edge.images import ArrayPicture
from train_lite import checkpoint, loop, state
from train_lite.config import ModeSettings
from train_lite.data.dataset import IGNORE, Pair
from train_lite.evaluate import Branches
from train_lite.gradient import Gradient
from train_lite.half import LossScale
from train_lite.models import glnet, norm
from train_lite.patches import MEAN, STD
from train_lite.run import main
from train_lite.tasks.glnet import Glnet, GlobalBatch, SharedBatch, Stage1Loss, Stage2Loss, Stage3Loss, TileBatch, TileView

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


SIZES = [(64, 64, 64, 0), (200, 150, 64, 16), (150, 333, 64, 20), (64, 500, 64, 50), (65, 64, 64, 0), (96, 97, 32, 25),
         (500, 40, 32, 5)]


@pytest.mark.parametrize("size", [20, 40, 63])
def test_a_tile_larger_than_the_image_sees_its_cells_where_they_lie(size):
    """Maps of px positions, there and back: within rounding to whole cells."""
    tile = 64
    laid = tiles.plan(size, 200, tile, 8)
    there, back = [sharing.split(made[0], tile) for made in (sharing.crops(laid.boxes(), size, 200, tile), sharing.places(laid.boxes(), laid))]
    for stride, crop, place in zip(sharing.STRIDES, there, back):
        cells, along = tile // stride, crop[0].shape[0]
        of_image, of_tile = [(np.arange(cells) + 0.5) / cells * side for side in (size, tile)]
        assert abs(crop[0] @ of_image - np.clip(of_tile, of_image[0], of_image[-1])).max() <= 0.6 * size / cells and along == cells
        assert abs(place[0] @ of_tile - np.clip(of_image, of_tile[0], of_tile[-1])).max() <= 0.6 * size / cells
        assert np.allclose(crop[0].sum(axis=1), 1) and np.allclose(place[0].sum(axis=1) * len(laid.ys), 1)


@pytest.mark.parametrize("height, width, tile, overlap", SIZES)
def test_matrices_are_slices_and_interpolations(height, width, tile, overlap):
    """Every level there and back, for tiles that overlap, at once and in chunks."""
    laid = tiles.plan(height, width, tile, overlap)
    boxes, generator = laid.boxes(), torch.Generator().manual_seed(0)
    there, back = sharing.crops(boxes, height, width, tile), sharing.places(boxes, laid)
    cells = sum((tile // s) ** 2 for s in (4, 8, 16, 32))
    assert all(part.dtype == np.float32 and part.shape == (len(boxes), cells) for part in there + back)
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
            assert close(fine, want.fine[chunk])
            assert all(close(got, torch.cat(kinds, 1)[chunk]) for got, kinds in zip(own, want.own))
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
        self.pair, self.height, self.width, self.path = Pair("x", "", "", "train"), height, width, os.path.join(tempfile.gettempdir(), "x")
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
        nearest = [labels[y0 + 2:y1:4, x0 + 2:x1:4] for y0, x0, y1, x1 in self.boxes]
        self.truths = torch.from_numpy(np.stack(nearest).astype(np.int64))


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
SETTINGS = ModeSettings("none", 0, TILE, "maps", "exact", "image", OVERLAP)


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
    made = Gradient(net, LOSSES[stage](outputs, 3.0, 0.15), SETTINGS, 1, 1, micro)
    loss, = made.rounds(batch, np.random.RandomState(0))
    made.finish(clip=0)
    return loss, taken(net)


@pytest.mark.skipif(torch.__version__ < "2", reason="this torch has bfloat16 only on a CPU")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision_points_the_same_way(stage):
    """The layers in float16, sums and gradients in float32."""
    net = seeded(stage).float()
    batch = batch_of(stage, [TileView(Memory(np.random.RandomState(0), 128, 100, TILE, 2), 0, TILE, OVERLAP)], 2)
    batch.dtype, grads = torch.float32, {}
    for on in (False, True):
        made = Gradient(net, LOSSES[stage](1, 3.0, 0.15), SETTINGS, 1, 1, 2, LossScale(on))
        loss, = made.rounds(batch, np.random.RandomState(0))
        made.finish(clip=0)
        grads[on] = loss, torch.cat([grad.flatten() for _name, grad in sorted(taken(net).items())])
    assert grads[True][1].dtype == torch.float32 and abs(grads[True][0] - grads[False][0]) < 1e-2 * grads[False][0]
    assert float(torch.cosine_similarity(grads[True][1], grads[False][1], dim=0)) > 0.99 and not torch.equal(grads[True][1], grads[False][1])


def assert_same(got, want):
    assert sorted(got) == sorted(want)
    scale = max(float(g.abs().max()) for g in want.values())
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= 1e-9 * max(float(want[name].abs().max()), 1e-3 * scale), name


TRAINED = {1: ("branch.",), 2: ("local.", "fuse_"), 3: ("whole.", "fuse_")}
CASES = [(1, "glnet-mobilenetv2", "group", 1, False), (1, "glnet", "frozen", 3, True), (1, "glnet-mobilenetv2", "group", 3, True),
         (2, "glnet-mobilenetv2", "group", 1, False), (2, "glnet", "frozen", 3, False),
         (2, "glnet-mobilenetv2", "frozen", 3, False),
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


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_pixels_that_are_surely_right_give_no_nan(gamma):
    scores = torch.tensor([[[[60.0, -60.0, 0.3]]]], requires_grad=True)
    labels = torch.tensor([[[1, IGNORE, 1]]], dtype=torch.uint8)
    Stage1Loss(1, gamma, 0.0).focal(scores, labels).sum().backward()
    assert torch.isfinite(scores.grad).all() and float(scores.grad[0, 0, 0, 2]) < 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_images_without_labels_teach_nothing(stage):
    """Beside others they change no gradient of the focal losses; by themselves they give none, and no NaN."""
    rng, net = np.random.RandomState(1), seeded(stage)
    blank = TileView(Memory(rng, 128, 128, TILE, 2, ignored=2), 0, TILE, OVERLAP)
    made = Gradient(net, LOSSES[stage](1, 3.0, 0.0), SETTINGS, 1, 1, 2)
    loss, = made.rounds(batch_of(stage, [blank], 2), np.random.RandomState(0))
    assert loss == 0 and made.finish(clip=1.0) == 0 and all((grad == 0).all() for grad in taken(net).values())
    view = TileView(Memory(rng, 128, 64, TILE, 2), 0, TILE, OVERLAP)
    found = []
    for views in ([view], [blank, view]):
        list(made.rounds(batch_of(stage, views, 2), np.random.RandomState(0)))
        made.finish(clip=0)
        found.append(taken(net))
    assert_same(*found)


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_plan_counts_the_maps_that_a_chunk_brings_along(stage, tiles):
    """What is held of a real one, in float32; in stage 3 the merged maps of all images of the batch, those that one is added to, and the
    deepest maps with their gradients beside it."""
    net, images = seeded(stage), 3
    if stage == 1:
        assert Glnet.held(net, tiles, TILE, images, False) == 0
        return
    batch = batch_of(stage, [TileView(Memory(np.random.RandomState(0), 128, 128, TILE, 2), 0, TILE, OVERLAP)] * images, 1)
    chunk = batch.chunk([(0, t) for t in range(tiles)], net)
    kept = list(batch.look(net, 0)) + chunk.others + [chunk.deep]
    if stage == 3:
        deepest = batch.encoded(net, False, list(range(images)))
        kept += list(batch._merged.values()) + [batch._merged[0], deepest, deepest]
    assert Glnet.held(net, tiles, TILE, images, False) == sum(each.numel() * 4 for each in kept)
    on_disk = sum(each.numel() * 4 for each in list(batch._merged.values())[tiles:]) if stage == 3 else 0
    assert Glnet.held(net, tiles, TILE, images, True) == Glnet.held(net, tiles, TILE, images, False) - on_disk


@pytest.mark.parametrize("size", EXACT)
def test_maps_on_disk_give_the_same_bits(size):
    net, views = seeded(3), [TileView(Memory(np.random.RandomState(at), size[0], size[1], TILE, 2), 0, TILE, OVERLAP) for at in range(3)]
    net.train()
    (loss, held), (spilled_loss, spilled) = [
        ours(net, 3, SharedBatch(views, TILE, True, 2, torch.device("cpu"), torch.float64, spill), 1, 2) for spill in (False, True)]
    assert loss == spilled_loss and sorted(held) == sorted(spilled) and all(torch.equal(held[name], spilled[name]) for name in held)


@pytest.mark.parametrize("brief", [True, False])
def test_a_trial_merges_no_more_than_a_chunk(brief):
    """Of each image; its memory is that of all of them."""
    net, seen = seeded(3).eval(), []
    batch = batch_of(3, [TileView(Memory(np.random.RandomState(at), 192, 128, TILE, 2), 0, TILE, OVERLAP) for at in range(2)], 2)
    batch.brief = brief
    net.local.encoder.register_forward_pre_hook(lambda _encoder, given: seen.append(len(given[0])))
    batch.encoded(net, False, [0, 1])
    tiles = len(batch.views[0].boxes)
    assert seen == ([2, 2] if brief else ([2] * (tiles // 2) + [1] * (tiles % 2)) * 2) and tiles > 4


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


@pytest.mark.parametrize("frozen", [False, True])
def test_a_new_branch_gives_the_overviews_scores(frozen):
    """Whatever the other branch's maps hold: nothing of them is heard yet."""
    for model in MODELS:
        net = seeded(3, model, 3).eval()
        if frozen:
            norm.put_frozen(net, [name for name in norm.group_norms(net) if not name.startswith("local.")])
            for name, value in net.overview.named_buffers():
                value.copy_(torch.rand(value.shape).double() + 0.5)
        glnet.begin_as(net.whole, net.overview)
        small = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
        with torch.no_grad():
            maps, deep, rough = net.look(small)
            for total in (torch.zeros_like(maps), torch.randn(*maps.shape).double()):
                begun = net.deepen(small, total)
                assert close(begun, deep, 1e-12) and close(net.whole.classify(begun), rough, 1e-12)
            if not frozen:
                glnet.begin_as(net.local, net.overview)
                others = [torch.randn(1, count, 64 // stride, 64 // stride).double() for count, stride in zip(net.channels, sharing.STRIDES)]
                assert close(net.local(small, others)[2], rough, 1e-12)
        net.freeze()
        assert all(p.requires_grad for p in net.whole.parameters()), "its layers are its own"
        assert not any(p.requires_grad for p in net.overview.parameters())


# --- what is worked on ----------------------------------------------------------------------------------------------

class Spy:
    """A net for edge.glnet.score_bands in numpy: a tile's score is its first colour, the whole image's are `rough`."""

    def __init__(self, rough, batch):
        self.rough, self.batch, self.maps, self.deep, self.deeper = rough, batch, object(), object(), object()
        self.looked, self.seen, self.counts, self.fused, self.total, self.deepened = [], [], [], [], None, 0

    def look(self, pixels):
        self.looked.append(pixels.copy())
        return self.maps, self.deep, self.rough[None]

    def work(self, pixels, maps, rows, cols):
        assert maps is self.maps and len(pixels) == len(rows) == len(cols) <= self.batch
        self.seen += [one.tobytes() for one in pixels]
        self.counts.append(len(pixels))
        more = [pixels[:1, :1]] * (self.batch - len(pixels))  # as a backend of a fixed batch
        return np.concatenate([pixels[:, :1]] + more)

    def merge(self, pixels, maps, rows, cols, put_rows, put_cols, total):
        assert total is self.total and len(put_rows) == len(put_cols) == len(pixels)
        self.total = object()
        return self.work(pixels, maps, rows, cols), self.total

    def deepen(self, pixels, total):
        assert total is self.total is not None and (pixels == self.looked[0]).all()
        self.deepened += 1
        return self.deeper

    def fuse(self, part, deep, rows, cols):
        assert deep is (self.deeper if self.deepened else self.deep) and len(part) >= len(rows)
        self.fused += [(down.copy(), across.copy()) for down, across in zip(rows, cols)]
        return part


def recipe_of(tile, overlap, batch, merges=False, coarse=0.0, resize="none", px=0):
    return sharing.Recipe(resize, px, tile, overlap, batch, tile, MEAN, STD, merges, coarse)


def noise(height, width):
    return np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)


def gathered(bands, height, width):
    """The rows of bands that come in order and cover an image."""
    found, at = [], 0
    for y0, band in bands:
        assert y0 == at and band.shape[2] == width
        found.append(band.copy())
        at += band.shape[1]
    assert at == height
    return np.concatenate(found, 1)


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("height, width, tile, overlap, batch", [(150, 200, 64, 16, 3), (64, 64, 64, 0, 4), (40, 130, 64, 20, 2)])
def test_every_tile_is_worked_on_once(height, width, tile, overlap, batch, merges):
    image = noise(height, width)
    net, recipe = Spy(np.zeros((1, tile // 4, tile // 4), np.float32), batch), recipe_of(tile, overlap, batch, merges)
    got = gathered(sharing.score_bands(ArrayPicture(image), recipe, net), height, width)
    assert np.abs(got - images.normalise(image, MEAN, STD)[:1]).max() < 1e-5
    laid = tiles.plan(height, width, tile, overlap)
    boxes, picture = laid.boxes(), ArrayPicture(image)
    windows = [images.normalise(picture.window(*box), MEAN, STD) for box in boxes]
    assert net.seen == [window.tobytes() for window in windows], "each once, in order"
    across = len(boxes) if merges else len(laid.xs)
    row = [batch] * (across // batch) + [across % batch] * (across % batch > 0)
    assert net.counts == row * (len(boxes) // across) and net.deepened == merges and len(net.looked) == 1
    first = (tile // 4) ** 2
    for (down, aside), one, other in zip(net.fused, *sharing.crops(boxes, height, width, tile)):
        assert (down == one[:first]).all() and (aside == other[:first]).all()
    small = images.normalise(images.whole(images.resized(picture, tile, tile)), MEAN, STD)
    assert (net.looked[0] == small).all()


@pytest.mark.parametrize("merges", [False, True])
def test_pictures_of_another_size(merges):
    """Tiles are of the picture at the recipe's size, scores of the picture's own."""
    image = noise(90, 150)
    net = Spy(np.zeros((1, 8, 8), np.float32), 4)
    got = gathered(sharing.score_bands(ArrayPicture(image), recipe_of(32, 8, 4, merges, resize="long", px=100), net), 90, 150)
    view = ArrayPicture(images.whole(images.resized(ArrayPicture(image), 60, 100)))
    assert len(net.seen) == len(tiles.plan(60, 100, 32, 8).boxes()) == len(set(net.seen))
    want = ArrayPicture(np.moveaxis(images.normalise(view.array, MEAN, STD)[:1], 0, 2).copy())
    assert np.abs(got - np.moveaxis(images.whole(images.resized(want, 90, 150)), 2, 0)).max() < 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("height, width, coarse, spots", [
    (200, 330, 0.3, [(3, 5, 0.4), (12, 9, 0.29), (15, 15, 0.9)]), (128, 128, 0.5, [(0, 15, 0.5)]), (150, 100, 0.01, [])])
def test_only_tiles_with_foreground_are_worked_on(height, width, coarse, spots, merges):
    tile, overlap, batch = 64, 16, 3
    image, rough = noise(height, width), np.random.RandomState(1).uniform(-9, -6, (1, 16, 16)).astype(np.float32)
    for y, x, likely in spots:
        rough[0, y, x] = np.log(likely / (1 - likely))
    laid = tiles.plan(height, width, tile, overlap)
    boxes = laid.boxes()
    chosen = []
    for box in boxes:
        rows, cols = relative_box(box, height, width, 16)
        chosen.append(bool((sigmoid(rough[0])[rows, cols] >= coarse).any()))
    assert sharing.proposed(boxes, laid, rough, coarse).tolist() == chosen
    assert sum(chosen) < len(boxes) and bool(spots) == any(chosen)
    assert sharing.proposed(boxes, laid, rough, 0.0).all()
    net, picture = Spy(rough, batch), ArrayPicture(image)
    got = gathered(sharing.score_bands(picture, recipe_of(tile, overlap, batch, merges, coarse), net), height, width)
    windows = [images.normalise(picture.window(*box), MEAN, STD) for box in boxes]
    assert net.seen == [window.tobytes() for window, yes in zip(windows, chosen) if yes]
    assert net.deepened == (merges and any(chosen))
    spread = enlarged(torch.from_numpy(rough[None]), height, width)[0].numpy()
    covered, near = np.zeros((height, width), bool), np.zeros((height, width), bool)
    for (y0, x0, y1, x1), yes in zip(boxes, chosen):
        (covered if yes else near)[y0:y1, x0:x1] = True
    assert np.abs(got - spread)[:, ~covered].max() < 1e-5, "where no tile is worked on"
    if any(chosen):
        assert np.abs(got - images.normalise(image, MEAN, STD)[:1])[:, ~near].max() < 1e-5, "where all are"


@pytest.mark.parametrize("stage, outputs, coarse", [(2, 3, 0.0), (3, 1, 0.0), (2, 1, 0.5)])
def test_scores_of_a_picture_are_the_transcriptions(stage, outputs, coarse):
    """The path of training's evaluation, in float32."""
    net, image = seeded(stage, outputs=outputs).eval(), noise(150, 90)
    laid = tiles.plan(150, 90, 64, 20)
    boxes, picture = laid.boxes(), ArrayPicture(image)
    small = pixels([images.whole(images.resized(picture, 64, 64))])
    with torch.no_grad():
        want = Transcribed(net, small, pixels([picture.window(*box) for box in boxes]), boxes, 150, 90)
        if coarse:  # foreground in some tiles only
            net.overview.classify.bias -= want.rough[:, :, 8:, 8:].max() + 1e-3
            want.rough -= want.rough[:, :, 8:, 8:].max() + 1e-3
    scores, spread = enlarged(want.scores, 64, 64).numpy(), enlarged(want.rough, 150, 90)[0].numpy()
    worked = sharing.proposed(boxes, laid, want.rough[0].numpy(), coarse)
    assert worked.all() if not coarse else worked.any() and not worked.all()
    by_box = {tuple(box): one if yes else spread[:, box[0]:box[2], box[1]:box[3]] for box, one, yes in zip(boxes, scores, worked)}
    want_bands = tiles.stitch(laid, lambda row: [by_box[tuple(box)] for box in row])
    want_scores = gathered(want_bands, 150, 90)
    recipe, branches = recipe_of(64, 20, 2, stage == 3, coarse), Branches(net.float(), torch.device("cpu"))
    got = gathered(sharing.score_bands(picture, recipe, branches), 150, 90)
    assert np.abs(got - want_scores).max() < 1e-4 * max(1, np.abs(want_scores).max())


# --- the command ----------------------------------------------------------------------------------------------------

TINY = ["--res", 64, "--patch", 32, "--overlap", 8, "--model", "glnet-mobilenetv2", "--width", 4, "--threads", 1, "--out", "runs"]
NEW = ["--data", "set", "--epochs", 2] + TINY

# Becomes the training's sitecustomize: it ends the first one in the second stage's second step.
KILLED = """
import os, signal
if b"train_lite.run" in open("/proc/self/cmdline", "rb").read() and not os.path.exists(%(mark)r):
    from train_lite import loop
    real = loop.step
    def step(problem, run, state, gradient, loss):
        if problem.stage == 2 and state.step == 1:
            open(%(mark)r, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(problem, run, state, gradient, loss)
    loop.step = step
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a set, one of black masks, and the three runs of an undisturbed training, ref."""
    folder = tmp_path_factory.mktemp("glnet")
    write_set(folder / "set", count=3, height=96, width=72)
    write_set(folder / "blank", count=3, height=96, width=72, classes=1)
    done = command("train_lite", *NEW + ["--name", "ref", "--json"], cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "summary").write_text(done.stdout)
    (folder / "said").write_text(done.stderr)
    return folder


@pytest.fixture()
def here(place, monkeypatch):
    """here(*words): the training in this process, in the folder of `place`; returns its exit code."""
    monkeypatch.chdir(str(place))
    monkeypatch.setattr("train_lite.tasks.glnet.CALIBRATION_PATCHES", 4)  # norms are measured one by one
    return lambda *words: main([str(word) for word in words])


def tensors(folder, name, file="last"):
    return checkpoint.read(str(folder / "runs" / name / (file + ".safetensors")))


def same_bits(one, other):
    return sorted(one) == sorted(other) and len(one) > 10 and all(one[key].tobytes() == other[key].tobytes() for key in one)


def branch(found, name):
    """{name: tensor} of one branch of a net."""
    first = "net.%s." % name
    return {key[len(first):]: value for key, value in found.items() if key.startswith(first)}


def files(folder, name):
    """{path: bytes} of a run, without what is of the last command."""
    return {str(path): path.read_bytes() for path in (folder / "runs" / name).rglob("*")
            if path.is_file() and path.name not in ("summary.json", "config.json")}


def test_three_stages_by_one_command(place):
    summary = json.loads((place / "summary").read_text())
    assert summary["run"] == "runs/ref-3" and summary["steps"] == 4, "one object, of the last"
    said = (place / "said").read_text()
    assert [said.count(words) for words in ("stage 1, whole", "stage 2, tiles", "stage 3, whole", "done in")] == [1, 1, 1, 3]
    runs = ["ref", "ref-2", "ref-3"]
    assert sorted(os.listdir(str(place / "runs")))[:4] == ["last"] + runs and os.readlink(str(place / "runs" / "last")) == "ref-3"
    (one, _), (two, _), (three, meta) = (tensors(place, name) for name in runs)
    best, best2 = (tensors(place, name, "best")[0] for name in runs[:2])
    assert all(same_bits(branch(found, "overview"), branch(best, "branch")) for found in (two, three))
    assert same_bits(branch(three, "local"), branch(best2, "local"))
    assert not any(".overview." in key for key in list(two) + list(three) if key.startswith("adamw"))
    assert not any(".local." in key for key in three if key.startswith("adamw")) and meta["step"] == 4
    assert any("fuse_deep" in key for key in three if key.startswith("adamw"))
    rates = [[json.loads(line)["lr"] for line in (place / "runs" / name / "log.jsonl").read_text().splitlines()] for name in runs]
    assert np.allclose(rates[1], 0.4 * np.array(rates[0])) and rates[2] == rates[0], "5e-5, 2e-5 and 5e-5 as published"


@pytest.mark.slow
def test_resume_when_all_is_done_changes_nothing(place, here, capsys):
    before, names = {name: files(place, name) for name in ("ref", "ref-2", "ref-3")}, os.listdir(str(place / "runs"))
    for folder in ("runs/ref", "runs/ref/"):
        assert here("--resume", folder, "--json") == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["run"] == "runs/ref-3" and err.count("done in 0 s") == 3 and "epoch 1" not in err
    assert os.listdir(str(place / "runs")) == names
    for name in before:
        assert files(place, name) == before[name], name


@pytest.mark.slow
def test_killed_in_the_second_stage(place, tmp_path):
    """The supervisor goes on in that stage's run, and then with the third."""
    (tmp_path / "sitecustomize.py").write_text(KILLED % {"mark": str(tmp_path / "mark")})
    done = command("train_lite", *NEW + ["--name", "killed", "--json", "--save-every", 0], cwd=place,
                   env={"PYTHONPATH": str(tmp_path) + os.pathsep + ROOT})
    assert done.returncode == 0 and (tmp_path / "mark").exists(), done.stderr
    assert "the training was killed" in done.stderr and "going on after step 1" in done.stderr
    assert json.loads(done.stdout)["run"] == "runs/killed-3"
    for end in ("", "-2", "-3"):
        assert same_bits(tensors(place, "killed" + end)[0], tensors(place, "ref" + end)[0]), end


@pytest.mark.slow
def test_interrupted_in_the_second_stage(place, here, monkeypatch, capsys):
    """Gone on with from the first stage's folder."""
    real = loop.step

    def step(problem, run, state, gradient, loss):
        real(problem, run, state, gradient, loss)
        if problem.stage == 2 and state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "step", step)
        assert here(*NEW + ["--name", "stopped"]) == 130
    assert "--resume runs/stopped-2" in capsys.readouterr().err and not (place / "runs" / "stopped-3").exists()
    assert tensors(place, "stopped-2")[1]["step"] == 1
    assert here("--resume", "runs/stopped") == 0
    for end in ("", "-2", "-3"):
        assert same_bits(tensors(place, "stopped" + end)[0], tensors(place, "ref" + end)[0]), end


@pytest.mark.slow
def test_stages_by_themselves(place, here, capsys):
    """--stage 12 ends with the second; a third that begins with it, and a second with ref, end as ref's."""
    assert here(*NEW + ["--stage", 12, "--name", "two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "runs/two-2" and not (place / "runs" / "two-3").exists()
    assert here(*NEW + ["--stage", 3, "--base", "runs/two-2", "--name", "third"]) == 0
    assert here(*NEW + ["--stage", 2, "--base", "runs/ref", "--name", "second"]) == 0
    assert sorted(name for name in os.listdir(str(place / "runs")) if name[:5] in ("third", "secon")) == ["second", "third"]
    for name, reference in (("third", "ref-3"), ("second", "ref-2")):
        assert same_bits(tensors(place, name)[0], tensors(place, reference)[0]), name


@pytest.mark.parametrize("mode", ["down", "tiled"])
def test_baselines(mode, place, here, capsys):
    """One net, scored at full size, that no later stage begins with."""
    assert here(*NEW + ["--mode", mode, "--name", mode, "--epochs", 1, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == "runs/" + mode and "mode " + mode in err and not (place / "runs" / (mode + "-2")).exists()
    net, config, _classes, tile, _meta = state.restore(str(place / "runs" / mode / "best.safetensors"))
    assert isinstance(net, glnet.Alone) and tile == 32 and config.mode == mode
    assert here(*NEW + ["--stage", 2, "--base", "runs/" + mode]) == 2
    assert "--mode %s; expected patch" % mode in capsys.readouterr().err


@pytest.mark.slow
def test_norms_freeze_in_every_stage(place, here, capsys):
    assert here(*NEW + ["--epochs", 1, "--freeze-at", 0.5, "--name", "frozen"]) == 0
    said = capsys.readouterr().err
    assert said.count("14 norms are frozen") == said.count("norms are frozen") == 2, "the third stage begins with those of the first"
    for end, count in (("", 1), ("-2", 2), ("-3", 3)):
        net, _config, _classes, _tile, meta = state.restore(str(place / "runs" / ("frozen" + end) / "best.safetensors"))
        assert len(norm.group_norms(net)) == 37 * count and len(set(meta["frozen"])) == len(meta["frozen"]) == 14 * count
    assert here("--resume", "runs/frozen-3") == 0


@pytest.mark.slow
def test_batch_norms(place, here):
    """Those of a frozen branch keep the statistics that the stage before measured."""
    assert here(*NEW + ["--norm", "batch", "--epochs", 1, "--stage", 12, "--name", "batch"]) == 0
    best, last = branch(tensors(place, "batch", "best")[0], "branch"), tensors(place, "batch-2")[0]
    assert any((value != 0).any() for key, value in best.items() if key.endswith("running_mean"))
    assert same_bits(branch(last, "overview"), best)


@pytest.mark.slow
def test_pretrained_weights_with_frozen_norms(place, here, capsys):
    """They begin both branches of their own encoder; the third has the first's."""
    torch.manual_seed(1)
    encoder = glnet.MobileNetLevels(4, "batch")
    weights = {name: value.numpy() for name, value in encoder.state_dict().items()}
    checkpoint.write(str(place / "encoder.safetensors"), weights, {})
    assert here(*NEW + ["--norm", "frozen", "--weights", "encoder.safetensors", "--epochs", 1, "--name", "given"]) == 0
    assert capsys.readouterr().err.count("tensors of the encoder from %s" % (place / "encoder.safetensors")) == 2
    given = encoder.features[0][1].running_mean.numpy()
    third = tensors(place, "given-3")[0]
    for name in ("overview", "local", "whole"):
        assert np.array_equal(branch(third, name)["encoder.features.0.1.running_mean"], given)
    state.restore(str(place / "runs" / "given-3" / "last.safetensors"))


def problem_of(place, config, base):
    _net, trained, classes, _tile, _meta = state.restore(str(place / "runs" / base / "best.safetensors"))
    config = trained._replace(base=str(place / "runs" / base), **config)
    entry = Memory(np.random.RandomState(0), 64, 48, 32, 2)
    return Glnet(config, classes, [entry], [], [], torch.device("cpu"))


def test_norms_of_frozen_branches_freeze_too(place, monkeypatch):
    """Of a stage before that did not freeze them; each measured on what those before it give, frozen."""
    monkeypatch.setattr("train_lite.tasks.glnet.CALIBRATION_PATCHES", 4)
    for base, stage in (("ref", "2"), ("ref-2", "3")):
        problem = problem_of(place, {"stage": stage, "freeze_at": 0.0}, base)
        begun = state.new(problem)
        names = norm.group_norms(begun.net)
        kept = [name for part, count in (("overview.", 1), ("local.", 1), ("whole.", 2)) for name in
                [name for name in names if name.startswith(part)][:count]]
        for name in names:  # all of them would take a minute
            if name not in kept:
                parent, _, child = name.rpartition(".")
                setattr(begun.net.get_submodule(parent), child, torch.nn.Identity())
        passes = []
        begun.net.local.encoder.register_forward_pre_hook(lambda _encoder, given: passes.append(len(given[0])))
        begun.freeze_if_due(problem)
        assert sorted(begun.frozen) == sorted(kept) and norm.group_norms(begun.net) == []
        # the drawn patches for the sizes and for the norm of tiles; all tiles for the sizes, and once for both norms that see their maps
        tiles = len(problem.batch(0, 0)[0].every_patch())
        assert sum(passes) == {"2": 4 + 4, "3": 4 + tiles + 4 + tiles}[stage]


@pytest.mark.slow
def test_recomputed_activations(place):
    """Asked of what each stage trains, the new branch of the third too; the same gradient."""
    for base, stage in (("ref", "2"), ("ref-2", "3")):
        found = []
        for again in (False, True):
            problem = problem_of(place, {"stage": stage, "recompute": again}, base)
            begun = state.new(problem)
            assert again == all("forward" in vars(segment) for segment in begun.net.encoder.segments())
            gradient, (batch, rng) = problem.gradient(begun), problem.batch(0, 0)
            list(gradient.rounds(batch, rng))
            found.append(taken(begun.net))
        assert sorted(found[0]) == sorted(found[1]) and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("number", ["2", "3"])
def test_a_name_whose_later_stages_are_there_is_refused(number, place, here, capsys):
    """Before the first is trained: its net is not the one that they began with, however alike they look."""
    other = place / "runs" / ("mine-" + number)
    shutil.copytree(str(place / "runs" / ("ref-" + number)), str(other))
    assert here(*NEW + ["--name", "mine"]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "its stage %s would be runs/mine-%s" % (number, number) in err
    assert not (place / "runs" / "mine").exists()
    shutil.rmtree(str(other))


def test_runs_that_were_moved_are_gone_on_with(place, here, capsys, tmp_path, monkeypatch):
    """From another folder too; not the one that has the name of a following run and began with another."""
    def configure(name, **change):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(dict(json.loads(path.read_text()), data=str(place / "set"), **change)))

    for name in ("ref", "ref-2", "ref-3"):
        shutil.copytree(str(place / "runs" / name), str(tmp_path / name))
        configure(name)
    (tmp_path / "last").symlink_to("ref-3")
    monkeypatch.chdir(str(tmp_path))
    assert here("--resume", str(tmp_path / "ref")) == 0
    assert capsys.readouterr().err.count("done in 0 s") == 3 and os.readlink(str(tmp_path / "last")) == "ref-3"
    with open(str(tmp_path / "ref-2" / "lock")) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert here("--resume", "ref") == 2 and os.readlink(str(tmp_path / "last")) == "ref-3"
    assert "another process is training in ref-2" in capsys.readouterr().err
    configure("ref-2", base="runs/other")
    assert here("--resume", "ref") == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "the run ref-2 exists and does not go on from ref" in err


@pytest.mark.slow
def test_the_last_run_as_a_base_is_named(place, here):
    """`last` is to point at the new run."""
    (place / "runs" / "newest").symlink_to("ref-2")
    assert here(*NEW + ["--stage", 3, "--base", "runs/newest", "--name", "onwards", "--epochs", 1]) == 0
    assert os.path.basename(json.loads((place / "runs" / "onwards" / "config.json").read_text())["base"]) == "ref-2"


@pytest.mark.slow
def test_interrupted_while_norms_freeze(place, here, monkeypatch, capsys):
    """At once, not when all are done; the rest is frozen when it goes on, to the same bits."""
    words = NEW + ["--stage", 1, "--epochs", 2, "--freeze-at", 0.5]
    assert here(*words + ["--name", "whole"]) == 0
    real, asked = norm.freeze_first, []

    def freeze_first(net, names, parts):
        asked.append(len(names))
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(net, names, parts)

    with monkeypatch.context() as patched:
        patched.setattr(norm, "freeze_first", freeze_first)
        assert here(*words + ["--name", "parts"]) == 130
    assert len(asked) == 3 and "stopped in epoch 2" in capsys.readouterr().err
    assert len(tensors(place, "parts")[1]["frozen"]) == 3
    assert here("--resume", "runs/parts") == 0
    assert same_bits(tensors(place, "parts")[0], tensors(place, "whole")[0])
    assert tensors(place, "parts")[1]["frozen"] == tensors(place, "whole")[1]["frozen"]


@pytest.mark.parametrize("words, said", [
    (["--stage", 2], "name its run folder, --base"), (["--stage", 23], "begins with the net of stage 1"),
    (["--stage", 2, "--base", "nowhere"], "holds no best.safetensors"),
    (["--stage", 2, "--base", "runs"], "holds no best.safetensors"),
    (["--stage", 3, "--base", "runs/ref"], "--stage 1; expected 2"),
    (["--stage", 2, "--base", "runs/ref-2"], "--stage 2; expected 1"),
    (["--stage", 3, "--base", "runs/ref-3"], "--stage 3; expected 2"),
    (["--stage", 2, "--base", "runs/ref", "--width", 8], "--width 4; expected 8"),
    (["--stage", 2, "--base", "runs/ref", "--model", "glnet"], "--model glnet-mobilenetv2; expected glnet"),
    (["--stage", 2, "--base", "runs/ref", "--patch", 64], "--patch 32; expected 64"),
    (["--stage", 2, "--base", "runs/ref", "--classes", 3], "was trained for the classes background, foreground"),
    (["--patch", 64, "--epochs", 1, "--name", "small"], "smaller than a patch of 64 px"),
    (["--stage", 12, "--coarse", 0.2, "--classes", 3], "proposals are for sets of one class"),
    (["--coarse", 0.6], "--coarse is 0.6, expected 0.0 to 0.5"), (["--coarse", 0.2], "take --stage 12"),
    (["--stage", 2, "--base", "runs/ref", "--coarse", 0.2, "--data", "blank"], "training masks has any foreground"),
    (["--patch", 48], "take a multiple of 32, such as 32"), (["--mode", "full"], "its two baselines are --mode down"),
    (["--model", "unet", "--stage", 1], "--stage 1 and --model unet: that is a flag for glnet, glnet-mobilenetv2"),
    (["--model", "deeplabv3", "--coarse", 0.1], "--coarse 0.1 and --model deeplabv3: that is a flag for glnet"),
    (["--sampler", "deform"], "--sampler deform and --model glnet-mobilenetv2"), (["--stage", 13], "--stage"),
    (["--focal", -1], "--focal is -1"), (["--focal", "nan"], "--focal is nan, expected 0.0 or more"), (["--feature", "inf"], "--feature is inf"),
    (["--stage", 1, "--coarse", 0.2], "take --stage 12"), (["--mode", "tiled", "--stage", 2], "a baseline has no stages"),
    (["--stage", 3, "--base", "runs/ref-2", "--weights", "w"], "--weights w and --stage 3"), (["--data", "nowhere"], "does not exist")])
def test_usage(words, said, here, capsys):
    assert here(*NEW + words) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("error:") == 1 and "Traceback" not in err and out == ""


def test_a_run_of_another_net_is_no_base(place, here, capsys):
    assert here("--data", "set", "--res", 32, "--patch", 16, "--overlap", 0, "--width", 4, "--epochs", 1, "--inner", 1,
                "--out", "runs", "--name", "unet") == 0
    capsys.readouterr()
    assert here(*NEW + ["--stage", 2, "--base", "runs/unet"]) == 2
    err = capsys.readouterr().err
    assert "--stage of another net; expected 1" in err and err.count("error:") == 1


def test_coarse_to_fine_trains(place, here):
    assert here(*NEW + ["--stage", 2, "--base", "runs/ref", "--coarse", 0.1, "--epochs", 1, "--name", "coarse"]) == 0


READ = """
import os, sys
import torch
from train_lite.config import TrainConfig
from train_lite.data import dataset, store
from train_lite.state import State
from train_lite.tasks.glnet import Glnet
torch.set_num_threads(1)
folder, res = sys.argv[1], int(sys.argv[2])
config = TrainConfig(model="glnet-mobilenetv2", width=4, res=res, patch=256, overlap=0, micro_batch=2, epochs=1,
                     stage="3", base="none")
pairs, classes = dataset.find_pairs(folder, 0.0), dataset.read_classes(folder, config)
stored = store.ingest(pairs, classes, "long", res, os.path.join(folder, ".cache"), 16, (256, 256), 0, [])
"""
ONE_BATCH = """
problem = Glnet(config, classes, stored, [], [], torch.device("cpu"))
state = State(problem)
""" + STEP + LOOK


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """Nine times the pixels, at most 5 % more at the peak of stage 3's merging, a step and a look at a validation image."""
    folders = []
    for res in (512, 1536):
        folder = tmp_path / str(res)
        for kind, pixels_ in (("images", BLOCKS), ("masks", (BLOCKS[..., 0] > 200).astype(np.uint8))):
            (folder / kind).mkdir(parents=True)
            write_large(pixels_, res, folder / kind / "0.png")
        folders.append(folder)
    small, large = peaks_kib(READ, ONE_BATCH, (folders[0], 512), 1), peaks_kib(READ, ONE_BATCH, (folders[1], 1536), 1)
    assert large[0] <= 1.05 * small[-1], (small, large)  # processes that do the same differ by 5 % themselves
