"""AdamW with moments in float32 or in 8 bits, and SGD. Our own, because memory is the point: parameters are updated in slabs,
so no temporary has a layer's size, and torch 2's optim module alone would load 70 MB of compiler.

Bytes of state per parameter: adamw 8, adamw8 2.03, sgd 0."""
import torch

BLOCK = 256           # values that share a scale
SLAB = 1024 * BLOCK   # values in float32 temporaries at a time: 1 MiB each
STATE_BYTES = {"adamw": 8.0, "adamw8": 2 + 8.0 / BLOCK, "sgd": 0.0}
MOMENTS = ("exp_avg", "exp_avg_sq")
BETA1, EPS = 0.9, 1e-8


class Optimizer:
    """Updates the parameters of a net from their .grad. kind: 'adamw' | 'adamw8' | 'sgd'.

    AdamW is Loshchilov & Hutter 2019, algorithm 2. Its 8-bit moments come in blocks, after Dettmers et al. 2022
    (arXiv 2110.02861, section 2) with linear codes: m as int8 times the block's largest |m| / 127; sqrt(v) as uint8
    times the block's largest / 255, rounded up, so that no step divides by a v that was rounded to nothing.
    Vectors (norms, biases) keep float32 moments: they are few, and steer much."""

    def __init__(self, net, kind, beta2, weight_decay):
        self.net, self.kind, self.beta2, self.weight_decay = net, kind, beta2, weight_decay
        self.steps = 0
        self.moments = {}  # parameter -> dict of tensors: MOMENTS, and 'KEY_scale' (one per block) where they are coded

    @torch.no_grad()
    def step(self, rate):
        """One step with learning rate `rate`. Parameters without a gradient stay as they are."""
        self.steps += 1
        for parameter in self.net.parameters():
            if parameter.grad is None:
                continue
            if self.kind == "sgd":
                parameter.mul_(1 - rate * self.weight_decay).add_(parameter.grad, alpha=-rate)
                continue
            if parameter not in self.moments:
                self.moments[parameter] = self._form(parameter, {key: torch.zeros_like(parameter) for key in MOMENTS})
            self._adamw(parameter, self.moments[parameter], rate)

    def _adamw(self, parameter, state, rate):
        values, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        coded = MOMENTS[0] + "_scale" in state
        for first in range(0, len(values), SLAB):
            part = slice(first, min(first + SLAB, len(values)))
            g = gradient[part]
            m, v = (_decode(state, key, part) if coded else state[key].view(-1)[part] for key in MOMENTS)
            m.mul_(BETA1).add_(g, alpha=1 - BETA1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            divisor = (v / (1 - self.beta2 ** self.steps)).sqrt_().add_(EPS)
            values[part] *= 1 - rate * self.weight_decay
            values[part].addcdiv_(m, divisor, value=-rate / (1 - BETA1 ** self.steps))
            if coded:
                for key, moment in zip(MOMENTS, (m, v)):
                    state[key].view(-1)[part], state[key + "_scale"][_blocks(part)] = _encode(key, moment)

    def restore(self, moments, steps):
        """Take over from a checkpoint: a dict of moments per parameter, in order, written by either AdamW."""
        self.steps = steps
        for parameter, moment in zip(self.net.parameters(), moments):
            self.moments[parameter] = self._form(parameter, moment)

    def _form(self, parameter, moments):
        """Moments in the form that this kind keeps."""
        coded, wanted = MOMENTS[0] + "_scale" in moments, self.kind == "adamw8" and parameter.dim() > 1
        if coded and not wanted:
            return {key: _decode(moments, key, slice(0, parameter.numel())).view(parameter.shape) for key in MOMENTS}
        if wanted and not coded:
            out = {}
            for key in MOMENTS:
                codes, out[key + "_scale"] = _encode(key, moments[key].reshape(-1))
                out[key] = codes.view(parameter.shape)
            return out
        return moments


def _blocks(part):
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _blocked(flat):
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _encode(key, moment):
    """A flat float32 moment -> (codes of the same length, scale per block). exp_avg_sq is stored as its root."""
    rows = _blocked(moment if key == "exp_avg" else moment.sqrt())
    scale = rows.abs().max(dim=1)[0] / (127 if key == "exp_avg" else 255)
    codes = rows / scale.clamp(min=1e-38)[:, None]
    codes = codes.round_().to(torch.int8) if key == "exp_avg" else codes.ceil_().clamp_(max=255).to(torch.uint8)
    return codes.view(-1)[:len(moment)], scale


def _decode(state, key, part):
    codes = state[key].view(-1)[part]
    flat = (_blocked(codes.float()) * state[key + "_scale"][_blocks(part), None]).view(-1)[:len(codes)]
    return flat if key == "exp_avg" else flat.square_()
