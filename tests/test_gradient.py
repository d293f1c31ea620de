"""The two gradient modes against plain autograd over whole images, in float64."""
import itertools
import types

import numpy as np
import pytest
import torch

from train_lite import gradient as gradient_module
from train_lite.config import ModeSettings
from train_lite.data.dataset import IGNORE, Pair
from train_lite.gradient import Gradient
from train_lite.losses import SegmentationLoss
from train_lite.models import build
from train_lite.patches import Batch, View, draw
from edge.images import ArrayPicture

TILE = 16


class Memory:
    """A Stored whose pixels are arrays."""

    def __init__(self, rng, height, width, classes):
        self.pair, self.height, self.width = Pair("x", "", "", "train"), height, width
        self.picture = ArrayPicture(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        labels = rng.randint(0, classes, (height, width)).astype(np.uint8)
        labels[rng.rand(height, width) < 0.1] = IGNORE
        self.labels = ArrayPicture(labels)
        self._overview = rng.randint(0, 256, (TILE, TILE, 3)).astype(np.uint8)

    def overview(self, height, width):
        assert height == width == TILE
        return self._overview


def problem(norm="group", fusion="concat", outputs=1, sizes=((37, 45), (16, 33)), seed=0, model="unet"):
    """(net, loss, batch) of toy size in float64, the batch turned in different ways."""
    rng = np.random.RandomState(seed)
    torch.manual_seed(seed)
    net = build(model, 4, norm, outputs, fusion).double()
    for module in net.modules():  # frozen norms with statistics and affines that are not trivial
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
    views = [View(Memory(rng, h, w, max(2, outputs)), turn, TILE) for (h, w), turn in zip(sizes, (0, 5))]
    batch = Batch(views, TILE if fusion != "none" else 0, torch.device("cpu"), torch.float64)
    return net, SegmentationLoss(outputs), batch


def whole_loss(net, batch, outputs):
    """The loss of the batch computed the plain way: every tile's logits are put at their place in the whole image,
    then BCE or CE and Dice are evaluated over all pixels at once, by another transcription than the product's."""
    every = batch.every_patch()
    g_all = net.encoder(batch.overviews(list(range(len(batch.views))))) if batch.side else None
    logits, truth = [], []
    for v, view in enumerate(batch.views):
        canvas, covered = torch.zeros(outputs, view.height, view.width).double(), np.zeros((view.height, view.width), int)
        for image, tile in every:
            if image == v:
                chunk = batch.chunk([(image, tile)])
                scores = net(chunk.pixels, None if g_all is None else g_all[[v]], chunk.rows, chunk.cols)[0]
                (top, left), (y0, x0, y1, x1) = view.boxes[tile][:2], view.owned[tile]
                canvas[:, y0:y1, x0:x1] = scores[:, y0 - top:y1 - top, x0 - left:x1 - left]
                covered[y0:y1, x0:x1] += 1
        assert (covered == 1).all(), "every pixel belongs to one tile"
        labels = torch.from_numpy(view.read(view.stored.labels, (0, 0, view.height, view.width)).astype(np.int64))
        logits.append(canvas.permute(1, 2, 0)[labels != IGNORE])
        truth.append(labels[labels != IGNORE])
    logits, truth = torch.cat(logits), torch.cat(truth)
    if outputs == 1:
        p, t = torch.sigmoid(logits[:, 0]), truth.double()
        entropy = -(t * torch.log(p) + (1 - t) * torch.log(1 - p)).mean()
        return entropy + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    p, t = torch.softmax(logits, 1), torch.nn.functional.one_hot(truth, outputs).double()
    entropy = -torch.log(p[torch.arange(len(truth)), truth]).mean()
    return entropy + (1 - (2 * (p * t).sum(0) + 1) / (p.sum(0) + t.sum(0) + 1)).mean()


def plain_gradient(net, batch, outputs):
    net.zero_grad()
    loss = whole_loss(net, batch, outputs)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = None
    return float(loss.detach()), grads


def gradient(net, loss, how="exact", fill="image", micro=3, patches=1, inner=1):
    settings = ModeSettings("none", 0, TILE, net.fusion, how, fill, 0)
    return Gradient(net, loss, settings, patches, inner, micro)


def relative(got, want):
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("fusion", ["concat", "add", "none"])
@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_exact_equals_plain_autograd(norm, fusion, outputs):
    net, loss, batch = problem(norm, fusion, outputs)
    value, want = plain_gradient(net, batch, outputs)
    ours = gradient(net, loss)
    got_value, = ours.rounds(batch, np.random.RandomState(0))
    ours.finish(clip=0)
    assert abs(got_value - value) < 1e-9 * abs(value)
    scale = max(float(g.abs().max()) for g in want.values())
    for name, p in net.named_parameters():
        assert float((p.grad - want[name]).abs().max()) <= 1e-9 * max(float(want[name].abs().max()), 1e-3 * scale), name


def test_exact_holds_for_deeplab():
    net, loss, batch = problem("frozen", "concat", 1, sizes=((20, 36), (16, 16)), model="deeplabv3")
    net.eval()  # dropout off: the plain way draws other masks
    _value, want = plain_gradient(net, batch, 1)
    ours = gradient(net, loss)
    list(ours.rounds(batch, np.random.RandomState(0)))
    ours.finish(clip=0)
    assert max(relative(p.grad, want[name]) for name, p in net.named_parameters() if want[name].abs().max() > 1e-8) < 1e-8


def test_long_passes_are_seen_at_a_terminal(monkeypatch, capsys):
    net, loss, batch = problem()
    for terminal, many, bars in ((True, 2, ["pass 1", "pass 2"]), (True, 64, []), (False, 2, [])):
        monkeypatch.setattr(gradient_module, "MANY", many)
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
        list(gradient(net, loss).rounds(batch, np.random.RandomState(0)))
        text = capsys.readouterr().err
        assert [words for words in ("pass 1", "pass 2") if words in text] == bars and (bars or not text)


@pytest.mark.parametrize("fill", ["image", "sample"])
@pytest.mark.parametrize("every", [1, 2])
def test_sampled_steps_do_not_depend_on_the_chunks(every, fill):
    """Four rounds, a step after every one or every second: a round after a step counts no sums of before it."""
    ends = []
    for micro in (1, 100):
        net, loss, batch = problem()
        ours = gradient(net, loss, "sampled", fill, micro, patches=2, inner=4)
        for number, _loss in enumerate(ours.rounds(batch, np.random.RandomState(0)), 1):
            if number % every == 0:
                ours.finish(clip=0)
                with torch.no_grad():
                    for p in net.parameters():
                        p -= 0.1 * p.grad
                        p.grad = None
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert relative(ends[0], ends[1]) < 1e-9


def test_no_tile_twice_in_a_group():
    for count in range(1, 12):
        batch = types.SimpleNamespace(views=[types.SimpleNamespace(boxes=[None] * count)])
        groups = [[tile for _view, tile in group] for group in draw(np.random.RandomState(count), batch, 4, 6)]
        assert all(len(set(group)) == len(group) == min(4, count) for group in groups)
        drawn = sum(groups, [])
        assert all(sorted(drawn[at:at + count]) == list(range(count)) for at in range(0, len(drawn) - count + 1, count))


@pytest.mark.parametrize("micro", [1, 2, 100])
def test_exact_does_not_depend_on_the_chunks(micro):
    net, loss, batch = problem()
    _value, want = plain_gradient(net, batch, 1)
    ours = gradient(net, loss, micro=micro)
    list(ours.rounds(batch, np.random.RandomState(0)))
    ours.finish(clip=0)
    assert max(relative(p.grad, want[name]) for name, p in net.named_parameters() if want[name].abs().max() > 1e-8) < 1e-8


def test_dropout_draws_the_same_units_in_both_passes():
    """With dropout on, the two passes agree only if each chunk drops the same units twice: then a step of one chunk
    and of the same chunk behind a first pass are equal."""
    net, loss, batch = problem("frozen", "none", 1, sizes=((16, 16), (16, 16)), model="deeplabv3")
    net.train()
    results = []
    for filled in (False, True):
        table = loss.table(batch)
        ours = gradient(net, loss, micro=1)
        if filled:
            ours.fill(batch, batch.every_patch(), table, seed=5)
        ours.add(batch, batch.every_patch(), table, seed=5, filled=filled)
        ours.finish(clip=0)
        results.append({name: p.grad.clone() for name, p in net.named_parameters()})
        for p in net.parameters():
            p.grad = None
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("fusion,outputs", [("concat", 1), ("add", 3)])
def test_sampled_is_k_over_n_of_the_full_gradient(fusion, outputs):
    net, loss, batch = problem("group", fusion, outputs, sizes=((30, 30),))
    every, k = batch.every_patch(), 2
    _value, want = plain_gradient(net, batch, outputs)
    ours = gradient(net, loss, "sampled")
    table = loss.table(batch)
    ours.fill(batch, every, table, 0)
    subsets = list(itertools.combinations(every, k))
    for picks in subsets:
        ours.add(batch, list(picks), table, 0, filled=True)
    ours.finish(clip=0)  # the mean over all subsets
    assert len(every) == 4 and len(subsets) == 6
    for name, p in net.named_parameters():
        if want[name].abs().max() > 1e-8:
            assert relative(p.grad, want[name] * k / len(every)) < 1e-9, name


def test_sampled_with_every_patch_is_exact():
    net, loss, batch = problem(sizes=((30, 30),))
    _value, want = plain_gradient(net, batch, 1)
    for fill in ("image", "sample"):
        ours = gradient(net, loss, "sampled", fill, patches=4, inner=1)
        list(ours.rounds(batch, np.random.RandomState(0)))
        ours.finish(clip=0)
        assert max(relative(p.grad, want[n]) for n, p in net.named_parameters() if want[n].abs().max() > 1e-8) < 1e-8
        for p in net.parameters():
            p.grad = None


@pytest.mark.parametrize("model", ["unet", "deeplabv3"])
@pytest.mark.parametrize("path", ["local", "global"])
def test_every_encoder_parameter_learns_through_each_path_alone(path, model):
    """Local: the global feature is cut off the graph. Global: the head's weights for the local features are zero."""
    net, loss, batch = problem("group", "concat", 1, sizes=((40, 40), (33, 45)), model=model)
    net.eval()
    if path == "global":
        with torch.no_grad():
            net.head.weight[:, :8] = 0
    else:
        with torch.no_grad():
            net.head.weight[:, 8:] = 0
    ours = gradient(net, loss, "sampled", "sample", patches=2, inner=1)
    list(ours.rounds(batch, np.random.RandomState(0)))
    ours.finish(clip=0)
    # a bias before a group norm of one group shifts what the norm takes out again: its true gradient is zero
    dead = [name for name, p in net.encoder.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert dead == []


def test_finish_divides_and_clips():
    net, loss, batch = problem(sizes=((16, 16),))
    ours = gradient(net, loss)
    for _ in range(3):
        list(ours.rounds(batch, np.random.RandomState(0)))
    assert ours.pending == 3
    norm = ours.finish(clip=0.01)
    got = float(torch.sqrt(sum((p.grad ** 2).sum() for p in net.parameters())))
    assert norm > 0.01 and abs(got - 0.01) < 1e-9 and ours.pending == 0


def test_gradients_are_gathered_at_order_one():
    """Before finish() the gradient is that of a sum over pixels, not of a mean: no denormals at 67 million pixels."""
    net, loss, batch = problem(sizes=((64, 64),), fusion="none")
    ours = gradient(net, loss)
    list(ours.rounds(batch, np.random.RandomState(0)))
    raw = net.head.bias.grad.clone()
    ours.finish(clip=0)
    count = float((batch.views[0].stored.labels.array != IGNORE).sum())
    assert relative(raw, net.head.bias.grad * count) < 1e-12
