"""The baseline of Marin et al. 2019: its targets against the energy they are the least of, its grid, and what trains its net."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edge.warp import reference
from test_sampler import SQUARE, batch_of, gradient_of, warp_net
from train_lite.samplers import marin
from train_lite.samplers.marin import ALPHA, NODES, NodeNet


def some_edges(kind, height=24, width=40):
    edges, rng = np.zeros((height, width), np.float32), np.random.RandomState(0)
    if kind == "one":
        edges[3, 30] = 0.5
    elif kind == "ring":
        y, x = np.ogrid[:height, :width]
        edges[np.abs(np.hypot(y - 15, x - 12) - 6) < 1] = 1
    else:
        edges[rng.rand(height, width) < 0.05] = 1
    return edges


def nearest(edges):
    """The label edge closest to each node's own place, one by one: (2, NODES, NODES)."""
    found = [((r + 0.5) / edges.shape[0], (c + 0.5) / edges.shape[1]) for r, c in np.argwhere(edges > 0)]
    out = np.empty((2, NODES, NODES))
    for i in range(NODES):
        for j in range(NODES):
            own = i / (NODES - 1.0), j / (NODES - 1.0)
            out[:, i, j] = min(found, key=lambda p: (p[0] - own[0]) ** 2 + (p[1] - own[1]) ** 2)
    return out


def energy(nodes, pull):
    between = (np.diff(nodes, axis=1) ** 2).sum() + (np.diff(nodes, axis=2) ** 2).sum()
    return ALPHA * ((nodes - pull) ** 2).sum() + (1 - ALPHA ** 0.5) * between


@pytest.mark.parametrize("kind", ["one", "ring", "scattered"])
def test_targets_are_the_least_of_their_energy(kind):
    edges, rng = some_edges(kind), np.random.RandomState(1)
    nodes, own, pull = marin.targets(edges), marin.own_nodes(), nearest(edges)
    for axis in (0, 1):  # the two borders across an axis keep their place on it
        assert np.array_equal(nodes[axis].take([0, -1], axis=axis), own[axis].take([0, -1], axis=axis))
    least = energy(nodes, pull)
    assert least < energy(own, pull)
    for scale in (1e-1, 1e-3):
        for _ in range(50):
            step = rng.normal(0, scale, nodes.shape)
            step[0, [0, -1]] = step[1][:, [0, -1]] = 0
            assert energy(nodes + step, pull) > least


def test_without_a_label_edge_nodes_stay():
    assert np.array_equal(marin.targets(np.zeros((9, 9), np.float32)), marin.own_nodes())


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (7, 130)])
def test_nodes_that_do_not_move_are_the_plain_resize(size):
    where = marin.grid(torch.zeros(2, NODES, NODES, dtype=torch.float64), *size)
    assert np.abs(where.numpy() - reference.own_positions(*size, dtype=np.float64)).max() < 1e-12


def test_samples_lie_evenly_between_nodes():
    """Every second sample of a grid of 2 x 7 + 1 would be a node, were they at the border: align_corners, in torch's words."""
    rng = np.random.RandomState(0)
    moves = torch.from_numpy(rng.uniform(-0.05, 0.05, (2, NODES, NODES)))
    nodes = marin.own_nodes() + moves.numpy()
    nodes[0, [0, -1]], nodes[1][:, [0, -1]] = [[0.0], [1.0]], [0.0, 1.0]
    nodes = np.clip(nodes, 0, 1)
    dense = F.interpolate(torch.from_numpy(nodes)[None], (7 * 32 + 1, 7 * 32 + 1), mode="bilinear", align_corners=True)[0]
    where = marin.grid(moves, 112, 112).numpy()  # its samples are at (2 i + 1) / 224: points 1, 3, 5 ... of the dense ones
    assert np.abs(where - dense.numpy()[:, 1::2, 1::2].transpose(1, 2, 0)).max() < 1e-12


def test_nodes_go_to_the_label_edges_in_reach():
    edges = some_edges("ring")
    where = reference.own_positions(48, 80)
    moved = marin.grid(torch.from_numpy(marin.targets(edges) - marin.own_nodes()), 48, 80).numpy()
    near = [(np.abs(np.hypot(p[..., 0] * 24 - 15.5, p[..., 1] * 40 - 12.5) - 6) < 1.5).sum() for p in (where, moved)]
    assert near[1] > 1.3 * near[0] > 0, near
    assert reference.faults(moved).folded == 0


def test_label_edges_alone_train_the_nodes():
    """By the mean square of what its net gets wrong; the task's loss moves no sample."""
    net, batch = warp_net(look=NodeNet), batch_of(SQUARE, "marin")
    _value, found = gradient_of(net, batch, 0.0)
    assert not any((g != 0).any() for name, g in found.items() if name.startswith("deform."))
    task, _found = gradient_of(net, batch, 0.0)
    value, found = gradient_of(net, batch, 2.0)
    wrong = []
    for view in batch.views:
        moves = net.deform(batch._small(view))[0].detach().numpy()
        wrong.append(((moves - marin.targets(batch._edges(view).numpy()) + marin.own_nodes()) ** 2).mean())
    assert abs(value - task - 2 * np.mean(wrong)) < 1e-9
    assert all((found["deform." + name] != 0).any() for name, _p in net.deform.named_parameters())


def test_a_new_net_learns_its_targets():
    torch.manual_seed(0)
    net, moves = NodeNet(8, "group"), torch.from_numpy(marin.targets(some_edges("ring")) - marin.own_nodes()).float()
    assert not net(torch.randn(1, 3, 24, 40)).abs().max()  # it begins at the plain resize
    image, steps = torch.randn(1, 3, 24, 40), torch.optim.Adam(net.parameters(), 1e-2)
    first = F.mse_loss(net(image)[0], moves).item()
    for _ in range(60):
        steps.zero_grad()
        loss = F.mse_loss(net(image)[0], moves)
        loss.backward()
        steps.step()
    assert loss.item() < 0.05 * first
