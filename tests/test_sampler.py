"""Learned down-sampling in training: the joint gradient against plain autograd in float64, and what samplers, views, label
edges, schedules and flags are said to do."""
import itertools
import types

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edge import images
from edge.errors import UsageError
from edge.geometry import bilinear_matrix, reflect
from edge.warp import path
from train_lite import evaluate
from train_lite.config import ModeSettings, TrainConfig, check, density_radius, density_size, task_size
from train_lite.data import dataset, store
from train_lite.data.dataset import IGNORE, Classes, Pair
from train_lite.gradient import Gradient
from train_lite.models import FEATURES, MODELS, norm
from train_lite.models.deform import DeformNet
from train_lite.patches import MEAN, STD, View
from train_lite.samplers.deform import FLOOR, LOOKS, Sampler, WarpBatch, WarpNet
from train_lite.state import State
from train_lite.tasks.segmentation import Segmentation

CPU = torch.device("cpu")
SIZES = ((37, 45), (53, 29), (16, 71))
SQUARE, OBLONG = ((16, 16), (7, 7), (2, 2), (0, 5, 3)), ((16, 32), (5, 9), (2, 3), (0, 6, 2))  # task, density, radius, turns


class Memory:
    """A Stored whose pixels are arrays, its overviews and label edges noise; with real_edges those of its labels."""

    def __init__(self, height, width, classes=2, seed=0, ignored=0.1, real_edges=False):
        rng = np.random.RandomState([seed, height, width])
        self.pair, self.height, self.width = Pair("x", "", "", "train"), height, width
        self.picture = images.ArrayPicture(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        labels = rng.randint(0, classes, (height, width)).astype(np.uint8)
        labels[rng.rand(height, width) < ignored] = IGNORE
        self.labels, self.real_edges, self._rng, self._made = images.ArrayPicture(labels), real_edges, rng, {}

    def overview(self, height, width):
        return self._made.setdefault((height, width, 3), self._rng.randint(0, 256, (height, width, 3)).astype(np.uint8))

    def edges(self, height, width):
        if self.real_edges:
            return store.label_edges(self.labels, height, width)
        return self._made.setdefault((height, width), self._rng.rand(height, width).astype(np.float32))

    def turned(self, turn, *density):
        """A Memory that holds everything turned."""
        other = Memory(1, 1)
        other.picture, other.labels = [images.ArrayPicture(np.ascontiguousarray(turned(part.array, turn)))
                                       for part in (self.picture, self.labels)]
        other.height, other.width = other.labels.array.shape
        for array in (self.overview(*density), self.edges(*density)):
            array = np.ascontiguousarray(turned(array, turn))
            other._made[array.shape] = array
        return other


def turned(array, turn):
    return np.rot90(np.fliplr(array) if turn > 3 else array, turn % 4)


def recipe(task, density, radius):
    return path.WarpRecipe("none", 0, task, density, radius, MEAN, STD)


def warp_net(outputs=1, kind="group", look=DeformNet, seed=0):
    """A WarpNet in float64 whose density is not flat, with frozen statistics that are not trivial."""
    torch.manual_seed(seed)
    net = WarpNet(MODELS["unet"](FEATURES, 4, kind), outputs, look(8, kind) if look else None).double()
    for module in net.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
    if look is DeformNet:
        torch.nn.init.normal_(net.deform.last.weight)
    elif look:
        torch.nn.init.normal_(net.deform.around[2].weight, 0, 1e-3)
    return net


def batch_of(layout, kind="deform", classes=2, shrink=0, edge_loss="spanned", **more):
    task, density, radius, turns = layout
    views = [View(Memory(h, w, classes, seed, **more), turn, 16) for seed, ((h, w), turn) in enumerate(zip(SIZES, turns))]
    return WarpBatch(views, Sampler(kind, recipe(task, density, radius), edge_loss), shrink, CPU, torch.float64)


def gradient_of(net, batch, gamma, outputs=1, micro=3):
    """(loss, {name: gradient}) as train_lite computes them; the net is left without gradients."""
    task, density, radius = batch.sampler.recipe.task, batch.sampler.size, batch.sampler.recipe.radius
    settings = ModeSettings("none", 0, 0, "none", "exact", "image", 0, task, density, radius)
    ours = Gradient(net, loss_of(gamma, outputs), settings, 1, 1, micro)
    value, = ours.rounds(batch, np.random.RandomState(0))
    ours.finish(clip=0)
    return value, taken(net)


def loss_of(gamma, outputs):
    """As training makes it."""
    return problem(outputs=outputs, gamma=gamma).objective(types.SimpleNamespace(step=0))


def taken(net):
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = None
    return found


def assert_same_gradient(got, want):
    """To 1e-9 of each parameter's largest; of a thousandth of the net's largest where the true gradient is zero: the density
    does not change when all logits rise together, nor a group norm's output with a bias before it."""
    assert sorted(got) == sorted(want)
    scale = max(float(g.abs().max()) for g in want.values())
    for name in want:
        limit = 1e-9 * max(float(want[name].abs().max()), 1e-3 * scale)
        assert float((got[name] - want[name]).abs().max()) <= limit, name


# --- the plain way: equation 3 in two dimensions, grid_sample, one loss over all samples ----------------------------

def plain_positions(density, task, radius):
    """(th, tw, 2) of (y, x) in u, from sums over all nodes in the Gaussian's reach, the density mirrored at its border."""
    (h, w), (ry, rx) = density.shape, radius
    i, j = np.arange(-ry, ry + 1), np.arange(-rx, rx + 1)
    rows, cols = [reflect(np.add.outer(np.arange(n), steps).ravel(), n).reshape(n, -1) for n, steps in ((h, i), (w, j))]
    gauss = np.exp(-4 * np.log(2) * ((i[:, None] / float(ry)) ** 2 + (j / float(rx)) ** 2))
    mass = density[rows[:, None, :, None], cols[None, :, None, :]] * torch.from_numpy(gauss)
    to_rows, to_cols = [bilinear_matrix(n, m).astype(np.float64) for n, m in zip(task, (h, w))]
    found = []
    for axis, away in enumerate((i[:, None] / float(h), j[None] / float(w))):
        move = (mass * torch.from_numpy(away)).sum((2, 3)) / mass.sum((2, 3))
        own = (np.arange(task[axis]) + 0.5) / task[axis]
        own = np.broadcast_to(own[:, None] if axis == 0 else own, task)
        found.append(torch.from_numpy(own.copy()) + torch.from_numpy(to_rows) @ move @ torch.from_numpy(to_cols).t())
    return torch.stack(found, dim=-1)


def plain_spanned(density, edges):
    spans = [(values - values.min()) / (values.max() - values.min()) for values in (density, edges)]
    return ((spans[0] - spans[1]) ** 2).mean()


def plain_divergence(density, edges):
    wanted = edges + FLOOR * edges.mean() + 1e-6
    wanted = wanted / wanted.sum()
    return (wanted * torch.log(wanted / density)).sum()


def plain_gradient(net, batch, gamma, outputs=1, follow=True, edge_loss=plain_spanned):
    """(loss, {name: gradient}). follow: whether the task's loss moves the samples."""
    scale, shift = (torch.from_numpy(values).double()[:, None, None] for values in images.scale_shift(MEAN, STD))
    (task, density, radius), logits, truth, penalties = batch.sampler.recipe[2:5], [], [], []
    for view in batch.views:
        small = turned(view.stored.overview(*density), view.turn)
        small = images.normalise(np.ascontiguousarray(small)[None], MEAN, STD)
        d = torch.softmax(net.deform(torch.from_numpy(small).double()).flatten(), 0).view(density)
        edges = torch.from_numpy(turned(view.stored.edges(*density), view.turn).astype(np.float64))
        penalties.append(edge_loss(d, edges))
        where = plain_positions(d if follow else d.detach(), task, radius)
        picture = torch.from_numpy(turned(view.stored.picture.array, view.turn).astype(np.float64)).permute(2, 0, 1)
        seen = F.grid_sample((picture * scale + shift)[None], (2 * where - 1).flip(-1)[None], mode="bilinear",
                             padding_mode="border", align_corners=False)
        labels = turned(view.stored.labels.array, view.turn)
        nearest = (where.detach().numpy() * labels.shape).astype(int)
        labels = torch.from_numpy(labels[nearest[..., 0], nearest[..., 1]].astype(np.int64))
        logits.append(net(seen)[0].permute(1, 2, 0)[labels != IGNORE])
        truth.append(labels[labels != IGNORE])
    loss = gamma * sum(penalties) / len(penalties) + plain_task_loss(torch.cat(logits), torch.cat(truth), outputs)
    loss.backward()
    return float(loss.detach()), taken(net)


def plain_task_loss(logits, truth, outputs):
    if not len(truth):
        return 0.0
    if outputs == 1:
        p, t = torch.sigmoid(logits[:, 0]), truth.double()
        entropy = -(t * torch.log(p) + (1 - t) * torch.log(1 - p)).mean()
        return entropy + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    p, t = torch.softmax(logits, 1), F.one_hot(truth, outputs).double()
    entropy = -torch.log(p[torch.arange(len(truth)), truth]).mean()
    return entropy + (1 - (2 * (p * t).sum(0) + 1) / (p.sum(0) + t.sum(0) + 1)).mean()


# --- the gradient -------------------------------------------------------------------------------------------------

EDGE_LOSSES = ((0.0, "spanned", plain_spanned), (3.0, "spanned", plain_spanned), (1.0, "divergence", plain_divergence))


@pytest.mark.parametrize("layout", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", ["group", "frozen"])
def test_joint_gradient_is_plain_autograds(kind, outputs, layout):
    net, classes = warp_net(outputs, kind), max(2, outputs)
    for gamma, name, edge_loss in EDGE_LOSSES:
        batch = batch_of(layout, classes=classes, edge_loss=name)
        value, want = plain_gradient(net, batch, gamma, outputs, edge_loss=edge_loss)
        for micro in (1, 3):
            got_value, got = gradient_of(net, batch, gamma, outputs, micro)
            assert abs(got_value - value) < 1e-9 * value, (gamma, micro)
            assert_same_gradient(got, want)


@pytest.mark.parametrize("micro", [1, 2])
def test_without_a_label_only_the_edge_loss_is_left(micro):
    net, batch = warp_net(), batch_of(SQUARE, ignored=2)
    value, want = plain_gradient(net, batch, 2.0)
    got_value, got = gradient_of(net, batch, 2.0, micro=micro)
    assert abs(got_value - value) < 1e-9 * value
    assert_same_gradient(got, want)


@pytest.mark.parametrize("kind", ["group", "frozen"])
def test_the_task_alone_trains_both_nets(kind):
    """The deformation net through the samples' places only."""
    _value, found = gradient_of(warp_net(1, kind), batch_of(SQUARE), 0.0)
    assert [name for name, g in found.items() if not (g != 0).any()] == []
    largest = float(found["deform.last.weight"].abs().max())
    assert largest > 1e-6


def test_a_new_net_looks_evenly_and_learns_where_to_look():
    net = WarpNet(MODELS["unet"](FEATURES, 4, "group"), 1, DeformNet(8, "group")).double()
    batch = batch_of(OBLONG)
    y, x = np.meshgrid((np.arange(16) + 0.5) / 16, (np.arange(32) + 0.5) / 32, indexing="ij")
    where, _penalty = batch.sampler.positions(net, torch.randn(1, 3, 5, 9).double(), None)
    assert np.abs(where.detach().numpy() - np.stack([y, x], axis=-1)).max() < 1e-12
    for gamma in (0.0, 1.0):
        assert float(gradient_of(net, batch, gamma)[1]["deform.last.weight"].abs().max()) > 1e-6


def test_label_edges_alone_train_the_density_of_sampler_edge():
    """The task's loss moves none of its samples, but trains the net that sees them."""
    net, batch = warp_net(), batch_of(SQUARE, "edge")
    _value, found = gradient_of(net, batch, 0.0)
    assert not any((g != 0).any() for name, g in found.items() if name.startswith("deform."))
    assert all((g != 0).any() for name, g in found.items() if not name.startswith("deform."))
    value, want = plain_gradient(net, batch, 3.0, follow=False)
    got_value, got = gradient_of(net, batch, 3.0, micro=1)
    assert abs(got_value - value) < 1e-9 * value and float(got["deform.last.weight"].abs().max()) > 1e-6
    assert_same_gradient(got, want)


# --- what a sampler sees ------------------------------------------------------------------------------------------

def chunk_of(batch, net=None):
    with torch.no_grad():
        return batch.chunk(batch.every_patch(), net)


@pytest.mark.parametrize("layout", [SQUARE, OBLONG], ids=["square", "oblong"])
def test_uniform_is_the_plain_resize(layout):
    batch, (th, tw) = batch_of(layout, "uniform"), layout[0]
    chunk = chunk_of(batch)
    for view, pixels, labels, penalty in zip(batch.views, chunk.pixels, chunk.labels, chunk.penalty):
        picture, mask = [turned(part.array, view.turn) for part in (view.stored.picture, view.stored.labels)]
        ready = (picture.astype(np.float64) / 255 - MEAN) / STD
        ready = torch.from_numpy(ready).permute(2, 0, 1)[None]
        plain = F.interpolate(ready, (th, tw), mode="bilinear", align_corners=False)[0]
        assert float((pixels - plain).abs().max()) < 1e-5  # of constants in float32
        rows, cols = [((np.arange(n) + 0.5) / n * size).astype(int) for n, size in zip((th, tw), mask.shape)]
        assert np.array_equal(labels.numpy(), mask[rows][:, cols]) and penalty.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["deform", "edge", "uniform", "edge-oracle", "marin"])
def test_labels_are_those_of_the_nearest_pixels(kind):
    """No class between two others, no edge of what is ignored softened."""
    net, batch = warp_net(look=LOOKS.get(kind)), batch_of(OBLONG, kind)
    for view in batch.views:
        ids = view.stored.labels.array
        ids[ids == 1] = 7
    chunk = chunk_of(batch, net)
    for v, view in enumerate(batch.views):
        mask, small = turned(view.stored.labels.array, view.turn), batch._small(view)
        with torch.no_grad():
            where = batch.sampler.positions(net, small, batch._edges(view))[0].numpy()
        nearest = np.minimum((where * mask.shape).astype(int), np.array(mask.shape) - 1)
        assert np.array_equal(chunk.labels[v].numpy(), mask[nearest[..., 0], nearest[..., 1]])
        assert set(np.unique(chunk.labels[v].numpy())) == {0, 7, IGNORE}


def disc(height, width, y, x, radius):
    memory = Memory(height, width, ignored=0, real_edges=True)
    away = np.hypot(np.arange(height)[:, None] - y, np.arange(width) - x)
    memory.labels = images.ArrayPicture((away < radius).astype(np.uint8))
    return memory


def test_edge_oracle_looks_where_labels_change():
    near = {}
    for kind in ("edge-oracle", "uniform"):
        view, sampler = View(disc(200, 240, 70, 150, 30), 0, 16), Sampler(kind, recipe((32, 48), (20, 24), (3, 3)))
        batch = WarpBatch([view], sampler, 0, CPU)
        where = sampler.positions(None, batch._small(view), batch._edges(view))[0].numpy() * (200, 240)
        near[kind] = (np.abs(np.hypot(where[..., 0] - 70.5, where[..., 1] - 150.5) - 30) < 6).sum()
    assert near["edge-oracle"] > 2 * near["uniform"] > 20, near


def test_edge_oracle_without_an_edge_is_uniform():
    view, how = View(disc(60, 60, -90, 0, 1), 0, 16), recipe((16, 16), (8, 8), (2, 2))
    oracle, plain = [chunk_of(WarpBatch([view], Sampler(kind, how), 0, CPU)) for kind in ("edge-oracle", "uniform")]
    assert torch.equal(oracle.pixels, plain.pixels)


@pytest.mark.parametrize("kind", ["deform", "edge-oracle", "uniform", "marin"])
def test_evaluation_looks_where_training_does(kind):
    memory, seen = Memory(45, 61, real_edges=True), []
    memory._made[7, 7, 3] = images.whole(images.resized(memory.picture, 7, 7))
    net = warp_net(look=LOOKS.get(kind)).float()
    batch = WarpBatch([View(memory, 0, 16)], Sampler(kind, recipe(*SQUARE[:3])), 0, CPU)
    hook = net.register_forward_pre_hook(lambda _net, args: seen.append(args[0]))
    labels = np.concatenate([band for _y0, band in evaluate.label_bands(net, memory, batch.sampler, CPU)])
    hook.remove()
    assert labels.shape == (45, 61) and len(seen) == 1
    assert float((seen[0] - chunk_of(batch, net).pixels).abs().max()) < 1e-4


@pytest.mark.parametrize("kind, look", [("deform", True), ("edge", True), ("uniform", False), ("edge-oracle", False),
                                        ("marin", True)])
def test_only_who_asks_a_net_where_to_look_has_one(kind, look):
    state = State(problem(sampler=kind))
    assert (state.net.deform is not None) == look
    assert any(name.startswith("deform.") for name, _p in state.net.named_parameters()) == look


# --- views --------------------------------------------------------------------------------------------------------

VIEWS = [(SQUARE, turn) for turn in range(8)] + [(OBLONG, turn) for turn in (0, 2, 4, 6)]


@pytest.mark.parametrize("kind", ["deform", "edge-oracle"])
@pytest.mark.parametrize("layout, turn", VIEWS)
def test_a_view_is_the_turned_image(layout, turn, kind):
    net, memory = warp_net(), Memory(37, 53)
    sampler = Sampler(kind, recipe(*layout[:3]))
    views = View(memory, turn, 16), View(memory.turned(turn, *sampler.size), 0, 16)
    ours, plain = [chunk_of(WarpBatch([view], sampler, 0, CPU, torch.float64), net) for view in views]
    assert torch.equal(ours.pixels, plain.pixels) and torch.equal(ours.labels, plain.labels)
    assert torch.equal(ours.penalty, plain.penalty)


@pytest.mark.parametrize("layout, turn", VIEWS)
def test_a_density_turned_alike_samples_alike(layout, turn):
    memory, sampler = Memory(37, 53), Sampler("edge-oracle", recipe(*layout[:3]))
    first, other = [chunk_of(WarpBatch([View(memory, t, 16)], sampler, 0, CPU, torch.float64)) for t in (0, turn)]
    pixels = turned(first.pixels[0].permute(1, 2, 0).numpy(), turn)
    assert np.abs(other.pixels[0].permute(1, 2, 0).numpy() - pixels).max() < 1e-9
    assert np.array_equal(other.labels[0].numpy(), turned(first.labels[0].numpy(), turn))
    assert pixels.std() > 0.5


# --- schedules ----------------------------------------------------------------------------------------------------

SMALL = dict(width=4, deform_width=4, task_size="48x48", density=12, epochs=5, batch=2, sampler="deform")


def problem(outputs=1, **flags):
    """Two batches per epoch, ten steps in all."""
    classes = Classes(("ground", "thing", "other")[:max(2, outputs)], ((0, 0, 0),) * max(2, outputs), outputs, False, (255,))
    train = [Memory(40, 50 + index, seed=index) for index in range(4)]
    return Segmentation(TrainConfig(**dict(SMALL, **flags)), classes, train, [], [], CPU)


def weight_of(loss):
    """What the edge loss counts: how much the value grows with it."""
    sums = torch.zeros(2 + 3 + 2).double()
    sums[1] = sums[-1] = 1
    without = loss.value(sums)
    sums[-2] = 1
    return float(loss.value(sums) - without)


def test_gamma_follows_its_schedule():
    at = types.SimpleNamespace(net=None, step=0, loss_scale=None)
    for gamma, power in ((100.0, 0.0), (100.0, 0.9), (7.0, 2.0), (0.0, 0.9)):
        made = problem(gamma=gamma, gamma_power=power)
        assert made.steps == 10
        for at.step in range(10):
            assert abs(weight_of(made.gradient(at).objective) - gamma * (1 - at.step / 10.0) ** power) < 1e-9 * 100
    at.step = 0
    for name, gamma in (("spanned", 100.0), ("divergence", 1.0)):  # unless told: as published; ours
        assert abs(weight_of(problem(edge_loss=name).gradient(at).objective) - gamma) < 1e-9


def test_gamma_falls_from_step_to_step():
    """One object serves a whole epoch. A run that is resumed within one makes another, and must end with the same bits."""
    at, made = types.SimpleNamespace(net=None, step=0, loss_scale=None), problem(gamma=100.0, gamma_power=0.9)
    kept = made.gradient(at).objective
    at.step = 3
    assert weight_of(kept) == weight_of(made.gradient(at).objective)


def test_shrink_helps_the_first_steps_only():
    for share in (0.0, 0.5, 0.8, 1.0):
        made = problem(shrink=share)
        shrinks = [made.batch(epoch, number)[0].shrink for epoch in range(5) for number in range(2)]
        first = int(round(share * 10))
        assert all(12 // 3 <= px <= 12 for px in shrinks[:first]) and shrinks[first:] == [0] * (10 - first)
        assert first < 5 or len(set(shrinks[:first])) > 2


def test_a_batch_is_a_function_of_seed_epoch_and_number():
    """Whatever was done before: a run that is resumed sees what it would have seen."""
    def facts(made, epoch, number):
        batch, rng = made.batch(epoch, number)
        return batch.shrink, [(view.stored.width, view.turn) for view in batch.views], int(rng.randint(2 ** 31))

    places = list(itertools.product(range(4), range(2)))
    made = problem()
    found = [facts(made, *place) for place in places]
    assert [facts(problem(), *place) for place in places[::-1]] == found[::-1]
    assert [facts(problem(seed=1), *place) for place in places] != found and len(set(map(str, found))) == len(places)


def test_shrink_blurs_what_the_deformation_net_sees_and_nothing_else():
    taken_in = []
    for layout, shrink in ((SQUARE, 3), (SQUARE, 7), (OBLONG, 2), (OBLONG, 5)):
        batch, plain = batch_of(layout, shrink=shrink), batch_of(layout)
        (h, w), view = layout[1], batch.views[0]
        net = types.SimpleNamespace(deform=lambda small: taken_in.append(small) or small[:, :1] * 0)
        blurred, sharp = chunk_of(batch, net), chunk_of(plain, net)
        small = images.normalise(view.stored.overview(h, w), MEAN, STD).astype(np.float64)
        rows, cols = [[slice(i * n // shrink, -(-(i + 1) * n // shrink)) for i in range(shrink)] for n in (h, w)]
        means = torch.tensor([[[plane[y, x].mean() for x in cols] for y in rows] for plane in small])
        expected = F.interpolate(means[None].double(), (h, w), mode="bilinear", align_corners=False)
        assert float((taken_in[-6] - expected).abs().max()) < 1e-9
        assert np.array_equal(taken_in[-3][0].numpy(), small.astype(np.float32))
        assert torch.equal(blurred.pixels, sharp.pixels) and torch.equal(blurred.labels, sharp.labels)


def test_oblong_tasks_get_no_quarter_turns():
    """Of a task as wide as high every turn comes; without --augment none."""
    for size, flags, expected in (("48x48", {}, set(range(8))), ("64x32", {}, {0, 2, 4, 6}),
                                  ("64x32", {"augment": False}, {0})):
        made = problem(task_size=size, **flags)
        turns = [view.turn for epoch in range(5) for number in range(2) for view in made.batch(epoch, number)[0].views]
        assert set(turns) <= expected and len(set(turns)) > len(expected) // 2


@pytest.mark.parametrize("kind", ["deform", "edge", "uniform", "edge-oracle"])
def test_every_norm_is_frozen_when_due(kind):
    made = problem(sampler=kind, freeze_at=0.5, freeze="all")
    state = State(made)
    names = norm.group_norms(state.net)
    state.step = 4
    state.freeze_if_due(made)
    assert norm.group_norms(state.net) == names
    state.step = 5
    state.freeze_if_due(made)
    assert norm.group_norms(state.net) == [] and sorted(state.frozen) == sorted(names)
    for module in state.net.modules():
        if isinstance(module, norm.FrozenNorm):
            assert (module.running_mean != 0).any() and (module.running_var != 1).any()  # measured, not made up


# --- label edges --------------------------------------------------------------------------------------------------

def plain_edges(labels, height, width):
    """Pixel by pixel; labels divide evenly into cells."""
    counts, here = np.zeros((height, width)), labels.astype(int)
    for y in range(len(labels)):
        for x in range(labels.shape[1]):
            others = here[y + 1:y + 2, x].tolist() + here[y, x + 1:x + 2].tolist()
            if here[y, x] != IGNORE and any(other not in (here[y, x], IGNORE) for other in others):
                counts[y * height // len(labels), x * width // labels.shape[1]] += 1
    share = counts / (labels.size // (height * width))
    out = np.zeros_like(share)
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        rows, cols = [np.clip(np.arange(n) + d, 0, n - 1) for n, d in ((height, dy), (width, dx))]
        out += share[rows][:, cols] / 16 * (2 - abs(dy)) * (2 - abs(dx))
    return out


@pytest.mark.parametrize("size, cells, classes", [
    ((300, 60), (30, 6), 3), ((257, 20), (1, 1), 2), ((256, 32), (8, 8), 2), ((129, 10), (43, 5), 4), ((1, 40), (1, 8), 2),
    ((130, 1), (13, 1), 2), ((1, 1), (1, 1), 2)])
def test_label_edges_are_as_defined(size, cells, classes):
    """Images taller than a block of the store are read in parts; a change between two blocks counts like any other."""
    rng = np.random.RandomState(size[0])
    labels = np.repeat(rng.randint(0, classes, (size[0], -(-size[1] // 3))), 3, axis=1)[:, :size[1]].astype(np.uint8)
    labels[rng.rand(*size) < 0.05] = IGNORE
    got = store.label_edges(images.ArrayPicture(labels), *cells)
    assert got.shape == cells and got.dtype == np.float32
    assert np.abs(got - plain_edges(labels, *cells)).max() < 1e-6


def test_an_edge_between_two_blocks_is_seen_once():
    labels = np.zeros((256, 64), np.uint8)
    labels[store.BLOCK:] = 1
    got = store.label_edges(images.ArrayPicture(labels), 256, 64)
    expected = np.zeros((256, 64))
    expected[store.BLOCK - 2:store.BLOCK + 1] = [[0.25], [0.5], [0.25]]
    assert np.abs(got - expected).max() < 1e-6


def test_what_is_ignored_makes_no_edge():
    labels = np.zeros((40, 40), np.uint8)
    labels[10:20] = IGNORE
    assert not store.label_edges(images.ArrayPicture(labels), 8, 8).any()
    labels[20:] = 1  # behind a strip that is ignored: where it changes nobody knows
    assert not store.label_edges(images.ArrayPicture(labels), 8, 8).any()
    labels[30:] = 2
    assert store.label_edges(images.ArrayPicture(labels), 8, 8).any()


def ingested(folder):
    rng = np.random.RandomState(0)
    image, mask = str(folder / "image.png"), str(folder / "mask.png")
    images.write_png(image, rng.randint(0, 256, (150, 90, 3)).astype(np.uint8))
    images.write_png(mask, np.repeat(rng.randint(0, 2, (150, 30)), 3, axis=1).astype(np.uint8))
    classes, problems = dataset.read_classes(str(folder), TrainConfig()), []
    entry, = store.ingest([Pair("a", image, mask, "train")], classes, "none", 0, str(folder / "cache"), 1.0, (), 0, problems)
    assert problems == []
    return entry


@pytest.mark.parametrize("what", ["edges", "overview"])
def test_what_is_kept_is_read_again_and_made_again_when_cut_short(what, tmp_path):
    entry = ingested(tmp_path)
    before = {str(file) for file in (tmp_path / "cache").iterdir()}
    first = getattr(entry, what)(15, 9)
    assert first.any() and first.shape[:2] == (15, 9)
    new, = [file for file in (tmp_path / "cache").iterdir() if str(file) not in before]
    whole = new.read_bytes()
    new.write_bytes(bytes(len(whole)))
    assert not getattr(entry, what)(15, 9).any(), "it was made again"
    for cut in (0, len(whole) // 2, len(whole) - 1, len(whole) + 1):
        new.write_bytes(whole[:cut] + b"x" * (cut - len(whole)))
        assert np.array_equal(getattr(entry, what)(15, 9), first) and new.read_bytes() == whole
    assert getattr(entry, what)(9, 15).shape[:2] == (9, 15)
    assert np.array_equal(getattr(entry, what)(15, 9), first)


def test_edges_of_the_store_are_those_of_its_labels(tmp_path):
    entry = ingested(tmp_path)
    labels = entry.labels.window(0, 0, 150, 90)
    assert np.abs(entry.edges(15, 9) - plain_edges(labels, 15, 9)).max() < 1e-6


# --- flags --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", ["0x0", "100x100", "256x100", "small", "256", "", "256x", "x256", "-16x16", "16x-16",
                                  "256x256x3", "256 x 256", "16.0x16", "256,256", "1000000x16"])
@pytest.mark.parametrize("kind", ["deform", "uniform", "edge", "edge-oracle", "marin"])
def test_a_wrong_task_size_is_refused(kind, size):
    with pytest.raises(UsageError, match="--task-size .*WIDTHxHEIGHT.*multiples of 16.*256x256"):
        check(TrainConfig(sampler=kind, task_size=size))


@pytest.mark.parametrize("flags, words", [
    ({"sampler": "deform", "mode": "full"}, "--sampler deform and --mode full.*leave one out"),
    ({"sampler": "uniform", "mode": "down"}, "--sampler uniform and --mode down.*leave one out"),
    ({"sampler": "edge", "mode": "tiled"}, "--sampler edge and --mode tiled.*leave one out"),
    ({"sampler": "deform", "patch": 64}, "--sampler deform and --patch 64: .*no patches behind them; leave one out"),
    ({"sampler": "marin", "global_patch": "add"}, "--sampler marin and --global-patch add: .*leave one out"),
    ({"task_size": "64x64"}, "--task-size 64x64 without --sampler: .*Add --sampler deform, or leave it out"),
    ({"gamma": 2.0}, "--gamma 2.0 without --sampler: "),
    ({"sampler": "deform", "density": 7}, "--density is 7, expected 8 or more"),
    ({"sampler": "deform", "density": -64}, "--density is -64, expected 8 or more"),
    ({"sampler": "deform", "deform_width": 30}, "--deform-width is 30, expected a multiple of 4, such as 32"),
    ({"sampler": "deform", "deform_width": 0}, "--deform-width is 0, expected 4 or more"),
    ({"sampler": "deform", "radius": 0.0}, "--radius is 0.0, expected 0.01 to 1.0"),
    ({"sampler": "deform", "radius": 1.5}, "--radius is 1.5, expected 0.01 to 1.0"),
    ({"sampler": "deform", "gamma": -2.0}, "--gamma is -2.0, expected -1.0 or more"),
    ({"sampler": "deform", "shrink": 1.1}, "--shrink is 1.1, expected 0.0 to 1.0"),
    ({"sampler": "deform", "gamma_power": -0.9}, "--gamma-power is -0.9, expected 0.0")])
def test_what_does_not_go_together_says_what_to_type(flags, words):
    with pytest.raises(UsageError, match=words):
        check(TrainConfig(**flags))


def test_sizes_follow_from_the_flags():
    """The density has the task's shape; its pull reaches further across, by the whole part of width / height."""
    for size, density, expected in (
            ("256x256", 64, ((256, 256), (64, 64), (8, 8))), ("64x48", 32, ((48, 64), (24, 32), (3, 3))),
            ("128x64", 64, ((64, 128), (32, 64), (4, 8))), ("800x80", 100, ((80, 800), (10, 100), (1, 10))),
            ("16x512", 8, ((512, 16), (8, 1), (1, 1)))):
        config = TrainConfig(sampler="deform", task_size=size, density=density, radius=0.125)
        check(config)
        assert (task_size(config), density_size(config), density_radius(config)) == expected


# --- a scene that is still ----------------------------------------------------------------------------------------

def frame(level, **more):
    small = np.full((6, 8, 3), level, np.uint8)
    for (y, x), value in more.get("but", {}).items():
        small[y, x] = value
    return small


def test_the_same_scene_keeps_its_places():
    still, places = path.Still(2.0), np.zeros((3, 4, 2))
    assert still.find(frame(100)) is None
    still.keep(frame(100), places)
    assert still.find(frame(100)) is places and still.find(frame(102)) is places and still.find(frame(98)) is places
    assert still.find(frame(103)) is None and still.find(frame(97)) is None
    assert still.find(np.full((8, 6, 3), 100, np.uint8)) is None


def test_threshold_zero_takes_equal_frames_only():
    still = path.Still(0)
    still.keep(frame(0), "places")
    assert still.find(frame(0)) == "places" and still.find(frame(0, but={(3, 3): 1})) is None
    still.keep(frame(255), "others")
    assert still.find(frame(255)) == "others" and still.find(frame(0)) is None and still.find(frame(254)) is None


def test_the_threshold_is_a_mean_of_255():
    """Also between levels that are further apart than 8 bits with a sign."""
    still = path.Still(255 / 48.0 * 3)
    still.keep(frame(0), "places")
    assert still.find(frame(0, but={(0, 0): 255, (5, 7): 255, (2, 2): 255})) == "places"
    assert still.find(frame(0, but={(0, 0): 255, (5, 7): 255, (2, 2): 255, (2, 3): 2})) is None
    everything = path.Still(255)
    everything.keep(frame(0), "places")
    assert everything.find(frame(255)) == "places"


def test_a_slow_drift_is_noticed():
    """Frames are compared with the one that the places were made for, not with the one before."""
    still, made = path.Still(2.0), []
    for level in range(100, 112):
        if still.find(frame(level)) is None:
            still.keep(frame(level), level)
            made.append(level)
        assert abs(still.find(frame(level)) - level) <= 2
    assert made == [100, 103, 106, 109]
