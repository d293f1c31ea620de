"""Half precision: the scale of the loss, what a step that overflowed leaves, and the gradient itself."""
import numpy as np
import pytest
import torch

from test_gradient import gradient, plain_gradient, problem, relative
from train_lite import half, loop
from train_lite.models import norm
from train_lite.optimizer import Optimizer



def test_scale_halves_on_overflow_and_doubles_after_peace():
    scale = half.LossScale(half=True)
    assert scale.lower() and scale.value == half.START / 2
    for _ in range(half.GROW_AFTER):
        scale.succeed()
    assert scale.value == half.START
    other = half.LossScale(half=True)
    other.restore(scale.position())
    assert other.position() == scale.position()
    assert not all(scale.lower() for _ in range(60)), "a loss that is not finite at any scale has diverged"


def test_float32_has_no_scale():
    scale = half.LossScale(half=False)
    for _ in range(3 * half.GROW_AFTER):
        scale.succeed()
    assert scale.value == 1 and not scale.lower()


@pytest.mark.parametrize("value", [2.0 ** -9, 1.0, 2.0 ** 12])
def test_the_scale_does_not_change_the_gradient(value):
    net, loss, batch = problem()
    _value, want = plain_gradient(net, batch, 1)
    ours = gradient(net, loss)
    ours.loss_scale.value = value
    list(ours.rounds(batch, np.random.RandomState(0)))
    ours.finish(clip=0)
    assert max(relative(p.grad, want[name]) for name, p in net.named_parameters() if want[name].abs().max() > 1e-8) < 1e-8


def test_sums_of_half_precision_go_into_the_table():
    """A loss that is worked out under autocast comes back as float32, the table holds float64."""
    _net, loss, batch = problem()
    table, every = loss.table(batch), batch.every_patch()
    table.put(every[:2], torch.full((2, 5), 0.5, dtype=torch.float32))
    table.put(every[2:], torch.ones(len(every) - 2, 5, dtype=torch.float64))
    table.couple(None, None, 1.0)
    assert table.weight().dtype == torch.float64 and float(table.weight()) == len(every) - 1


class Log(list):
    def log(self, **row):
        self.append(row)


class Stub:
    """What loop.step() reads of a State and of a Problem."""
    config = type("config", (), {"clip": 1.0, "lr": 1e-3})

    def __init__(self, net, half_precision):
        self.net, self.step, self.epoch, self.frozen_at = net, 0, 0, 0
        self.optimizer = Optimizer(net, "adamw", 0.999, 0.0)
        self.loss_scale = half.LossScale(half_precision)

    def learning_rate(self, step, frozen_at):
        return 1e-3


@pytest.mark.parametrize("half_precision", [True, False])
def test_a_step_that_overflows_is_left_out_but_counted(half_precision):
    net, loss, batch = problem()
    state, ours, run = Stub(net, half_precision), gradient(net, loss), Log()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    list(ours.rounds(batch, np.random.RandomState(0)))
    next(net.parameters()).grad[0] = float("inf")
    if not half_precision:
        with pytest.raises(Exception, match="diverged"):
            loop.step(state, run, state, ours, 1.0)
        return
    loop.step(state, run, state, ours, 1.0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in net.named_parameters())
    assert (state.step, state.optimizer.steps, run[0]["grad_norm"]) == (1, 0, None)
    list(ours.rounds(batch, np.random.RandomState(0)))
    loop.step(state, run, state, ours, 1.0)
    assert (state.step, state.optimizer.steps) == (2, 1) and run[1]["grad_norm"] > 0


@pytest.mark.skipif(torch.__version__ < "2", reason="this torch has bfloat16 only on a CPU")
@pytest.mark.parametrize("kind", ["group", "frozen"])
def test_gradient_in_half_precision_points_the_same_way(kind):
    net, loss, batch = problem(kind)
    check_half(net.float(), loss, batch, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["group", "frozen"])
def test_gradient_in_half_precision_on_a_gpu(kind):
    net, loss, batch = problem(kind)
    check_half(net.float(), loss, batch, torch.device("cuda"))


def check_half(net, loss, batch, device):
    batch.device, batch.dtype, net = device, torch.float32, net.to(device)
    grads, dtypes = {}, set()
    for module in net.modules():
        if isinstance(module, (norm.GroupNorm, norm.FrozenNorm)):
            module.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    for on in (False, True):
        ours = gradient(net, loss)
        ours.loss_scale = half.LossScale(on)
        list(ours.rounds(batch, np.random.RandomState(0)))
        ours.finish(clip=0)
        grads[on] = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        net.zero_grad()
        assert dtypes == {torch.float16 if on else torch.float32}
        dtypes.clear()
    cosine = torch.nn.functional.cosine_similarity(grads[True], grads[False], dim=0)
    assert float(cosine) > 0.99 and abs(float(grads[True].norm() / grads[False].norm()) - 1) < 0.05
