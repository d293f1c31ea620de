"""The optimizer against torch's own, its 8-bit moments and its memory; recomputed activations."""
import copy

import pytest
import torch
from torch import nn

from conftest import command, rest_slow
from train_lite.models import build
from train_lite.models.recompute import recompute
from train_lite.optimizer import BLOCK, MOMENTS, SLAB, Optimizer

RATE, BETA2, DECAY = 1e-2, 0.99, 0.1


class Toy(nn.Module):
    """Convolutions, biases, a norm's affine; one layer larger than a slab and no multiple of a block; one not used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.norm = nn.GroupNorm(2, 16)
        self.large = nn.Linear(SLAB // 256 + 1, 321)
        self.unused = nn.Linear(5, 7)


def toy(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Toy().to(dtype)


def give_gradients(net, seed):
    """Random gradients, of other sizes in every layer, a tenth of them 0; none for the unused layer."""
    torch.manual_seed(seed)
    for number, (name, p) in enumerate(net.named_parameters()):
        if not name.startswith("unused"):
            p.grad = torch.randn_like(p) * 10.0 ** -number * (torch.rand_like(p) > 0.1).to(p.dtype)


def moments_of(net, optimizer):
    """As a checkpoint hands them back: copies, a dict per parameter, in order."""
    return [{key: value.clone() for key, value in optimizer.moments[p].items()} for p in net.parameters()]


def decoded(state, key, shape):
    """A coded moment, by another transcription than the product's."""
    codes, scale = state[key].reshape(-1).double(), state[key + "_scale"].double()
    values = codes * scale.repeat_interleave(BLOCK)[:len(codes)]
    return (values if key == "exp_avg" else values ** 2).view(shape)


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_adamw_is_torchs(dtype, allowed):
    ours, theirs = toy(dtype), toy(dtype)
    before = copy.deepcopy(ours.unused.state_dict())
    optimizer = Optimizer(ours, "adamw", BETA2, DECAY)
    reference = torch.optim.AdamW(theirs.parameters(), RATE, (0.9, BETA2), 1e-8, DECAY)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        rate = RATE / (1 + step % 3)
        reference.param_groups[0]["lr"] = rate
        optimizer.step(rate)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert float((a - b).detach().abs().max()) <= allowed * float(b.detach().abs().max()), name
    assert all(torch.equal(before[name], value) for name, value in ours.unused.state_dict().items())
    assert ours.unused.weight not in optimizer.moments


def test_sgd_decays_apart_from_the_gradient():
    net = toy(torch.float64)
    before, optimizer = copy.deepcopy(net), Optimizer(net, "sgd", BETA2, DECAY)
    give_gradients(net, 0)
    optimizer.step(RATE)
    for p, old in zip(net.parameters(), before.parameters()):
        want = old if p.grad is None else old * (1 - RATE * DECAY) - RATE * p.grad
        assert torch.allclose(p, want, rtol=1e-12, atol=1e-18)
    assert optimizer.moments == {}


def test_adamw8_keeps_bytes():
    net = toy()
    optimizer = Optimizer(net, "adamw8", BETA2, DECAY)
    give_gradients(net, 0)
    optimizer.step(RATE)
    for name, p in net.named_parameters():
        state = optimizer.moments.get(p, {})
        kinds = {key: (value.dtype, value.numel()) for key, value in state.items()}
        blocks = (torch.float32, -(-p.numel() // 256))
        if p.dim() == 1 and state:
            assert kinds == dict.fromkeys(MOMENTS, (torch.float32, p.numel())), name
        elif state:
            assert kinds == {"exp_avg": (torch.int8, p.numel()), "exp_avg_sq": (torch.uint8, p.numel()),
                             "exp_avg_scale": blocks, "exp_avg_sq_scale": blocks}, name
            size = sum(value.numel() * value.element_size() for value in state.values())
            assert p.numel() < 1000 or size <= 2.1 * p.numel(), name
    assert net.large.weight.numel() > SLAB and net.large.weight.numel() % BLOCK


def test_no_coded_root_of_a_positive_v_is_zero():
    """Else a step would divide by eps alone."""
    net = nn.Linear(512, 40, bias=False)
    optimizer = Optimizer(net, "adamw8", BETA2, DECAY)
    torch.manual_seed(1)
    for _ in range(3):
        net.weight.grad = torch.randn(40, 512).sign() * 10 ** (-12 * torch.rand(40, 512))
        net.weight.grad[:, ::7] = 0
        net.weight.grad[3] = 0
        optimizer.step(RATE)
        codes = optimizer.moments[net.weight]["exp_avg_sq"]
        assert torch.equal(codes == 0, net.weight.grad == 0)


def final_loss(kind, steps=300):
    """(first, last) loss of a net that learns which pixels of noisy images are set, two images at a time."""
    torch.manual_seed(0)
    x, bce = torch.randn(16, 3, 24, 24), nn.BCEWithLogitsLoss()
    target = (nn.functional.conv2d(x, torch.randn(1, 3, 5, 5), padding=2) + 2 * torch.randn(16, 1, 24, 24) > 0).float()
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
                        nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 1, 1))
    optimizer, losses = Optimizer(net, kind, 0.999, 0.01), []
    for step in range(steps + 1):
        with torch.no_grad():
            losses.append(float(bce(net(x), target)))
        picks = torch.randint(16, (2,))
        net.zero_grad()
        bce(net(x[picks]), target[picks]).backward()
        optimizer.step(3e-3 * (1 - step / float(steps + 1)))
    return losses[0], losses[-1]


@pytest.mark.slow
def test_adamw8_learns_as_adamw_does():
    (first, reference), (_same, coded) = final_loss("adamw"), final_loss("adamw8")
    assert reference < 0.4 * first and coded < 1.02 * reference, (first, reference, coded)


def test_coded_moments_follow_the_true_ones():
    nets = [nn.Linear(256, 16, bias=False) for _ in range(2)]
    adamw, coded = (Optimizer(net, kind, 0.999, 0) for net, kind in zip(nets, ("adamw", "adamw8")))
    torch.manual_seed(0)
    for _ in range(1000):
        gradient = torch.randn(16, 256)
        for net, optimizer in zip(nets, (adamw, coded)):
            net.weight.grad = gradient.clone()
            optimizer.step(1e-3)
    true = adamw.moments[nets[0].weight]["exp_avg_sq"].double()
    ratio = (decoded(coded.moments[nets[1].weight], "exp_avg_sq", true.shape) / true).sqrt()
    assert 0.95 < float(ratio.median()) < 1.05 and float(ratio.max()) < 1.3, float(ratio.median())


@pytest.mark.parametrize("kind", ["adamw", "adamw8"])
def test_restored_moments_make_the_same_step(kind):
    net = toy()
    optimizer = Optimizer(net, kind, BETA2, DECAY)
    for step in range(3):
        for p in net.parameters():  # a checkpoint holds moments of every parameter
            p.grad = torch.randn_like(p)
        optimizer.step(RATE)
    other = copy.deepcopy(net)
    again = Optimizer(other, kind, BETA2, DECAY)
    again.restore(moments_of(net, optimizer), 3)
    for a, b in zip(moments_of(net, optimizer), moments_of(other, again)):
        assert sorted(a) == sorted(b) and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
    for n, o in ((net, optimizer), (other, again)):
        n.zero_grad(set_to_none=True)
        give_gradients(n, 9)
        o.step(RATE)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def test_moments_pass_between_the_two_kinds():
    net = toy()
    adamw, coded, back = (Optimizer(net, kind, BETA2, DECAY) for kind in ("adamw", "adamw8", "adamw"))
    for p in net.parameters():
        p.grad = torch.randn_like(p) * 10 ** (-3 * torch.rand_like(p))
    adamw.step(RATE)
    coded.restore(moments_of(net, adamw), 1)
    back.restore(moments_of(net, coded), 1)
    for name, p in net.named_parameters():
        for key in MOMENTS:
            true, state = adamw.moments[p][key].double(), coded.moments[p]
            if p.dim() == 1:
                assert torch.equal(state[key], adamw.moments[p][key]) and torch.equal(back.moments[p][key], state[key])
                continue
            got, scale = decoded(state, key, p.shape), state[key + "_scale"].double().repeat_interleave(BLOCK)
            scale = scale[:p.numel()].view(p.shape)
            assert torch.allclose(back.moments[p][key].double(), got, rtol=1e-6, atol=0)
            if key == "exp_avg":
                assert ((got - true).abs() <= 0.5001 * scale).all(), name
            else:
                error = got.sqrt() - true.sqrt()  # rounded at random, by less than one code
                assert (error.abs() <= 1.0001 * scale).all(), name


LARGE_STEP = """
import sys, torch
from jetson.memory import peak_rss_mib, reset_peak, rss_mib
from train_lite.optimizer import Optimizer
kind, how = sys.argv[1:]
torch.set_num_threads(1)
for side in 64, 4096:  # the first loads what torch loads late; 4096: 64 MiB
    net = torch.nn.Linear(side, side, bias=False)
    net.weight.grad = torch.ones_like(net.weight)
    optimizer = Optimizer(net, kind, 0.99, 0.1)
    moments = [{key: torch.ones(side, side) for key in ("exp_avg", "exp_avg_sq")}] if how == "restore" else None
    assert reset_peak()
    before = rss_mib()
    optimizer.step(1e-3) if moments is None else optimizer.restore(moments, 1)
print(peak_rss_mib(since_reset=True) - before)
"""


@pytest.mark.parametrize("kind, how, moments_mib", rest_slow([
    ("adamw8", "step", 32.5), ("adamw8", "restore", 32.5), ("adamw", "step", 128), ("sgd", "step", 0)]))
def test_no_temporary_has_a_layers_size(kind, how, moments_mib, tmp_path):
    """The peak grows by the moments and a few slabs."""
    (tmp_path / "large_step.py").write_text(LARGE_STEP)
    done = command("large_step", kind, how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) - moments_mib < 24, done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", ["unet", "deeplabv3"])
def test_recomputed_gradients_are_the_same(model, dtype):
    torch.manual_seed(0)
    plain = build(model, 4, "group", 1, "concat").encoder.to(dtype)
    twice = copy.deepcopy(plain)
    recompute(twice)
    x, grads, outputs = torch.randn(2, 3, 48, 32).to(dtype), [], []
    for net in (plain, twice):
        net.train()
        torch.manual_seed(5)  # of the dropout
        out = net(x)
        (out ** 2).mean().backward()
        outputs.append(out.detach())
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert torch.equal(*outputs) and all(g is not None for g in grads[1].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), twice.eval()(x)) and not twice(x).requires_grad
