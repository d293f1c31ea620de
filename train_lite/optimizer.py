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
    times the block's largest / 255, and never 0 where v is not: a step would divide by nothing. sqrt(v) changes by less
    than a code in a step, so it is rounded at random, right on average; rounded up or to the nearest it stands still.
    Vectors (norms, biases) keep float32 moments: they are few, and steer much."""

    def __init__(self, net, kind, beta2, weight_decay):
        self.net, self.kind, self.beta2, self.weight_decay = net, kind, beta2, weight_decay
        self.steps = 0
        self._random = torch.Generator()  # of the rounding; seeded by the step, so a resumed run rounds alike
        self.moments = {}  # parameter -> dict of tensors: MOMENTS, and 'KEY_scale' (one per block) where they are coded

    @torch.no_grad()
    def step(self, rate):
        """One step with learning rate `rate`. Parameters without a gradient stay as they are."""
        self.steps += 1
        self._random.manual_seed(self.steps)
        for parameter in self.net.parameters():
            if parameter.grad is None:
                continue
            if self.kind == "sgd":
                parameter.mul_(1 - rate * self.weight_decay).add_(parameter.grad, alpha=-rate)
                continue
            if parameter not in self.moments:
                self.moments[parameter] = self._empty(parameter)
            self._adamw(parameter, self.moments[parameter], rate)

    def _adamw(self, parameter, state, rate):
        values, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        coded = MOMENTS[0] + "_scale" in state
        for part in _slabs(len(values)):
            g = gradient[part]
            m, v = (_decode(state, key, part) if coded else state[key].view(-1)[part] for key in MOMENTS)
            m.mul_(BETA1).add_(g, alpha=1 - BETA1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            divisor = (v / (1 - self.beta2 ** self.steps)).sqrt_().add_(EPS)
            values[part] *= 1 - rate * self.weight_decay
            values[part].addcdiv_(m, divisor, value=-rate / (1 - BETA1 ** self.steps))
            if coded:
                for key, moment in zip(MOMENTS, (m, v)):
                    self._encode(state, key, part, moment)

    def restore(self, moments, steps):
        """Take over from a checkpoint: a dict of moments per parameter, in order, written by either AdamW; empty where there are none."""
        self.steps = steps
        for parameter, moment in zip(self.net.parameters(), moments):
            if moment:
                moment = {key: value.to(parameter.device) for key, value in moment.items()}
                self.moments[parameter] = self._form(parameter, moment)

    def _codes(self, parameter):
        return self.kind == "adamw8" and parameter.dim() > 1

    def _empty(self, parameter):
        """Moments of 0 in the form that this kind keeps."""
        if not self._codes(parameter):
            return {key: torch.zeros_like(parameter) for key in MOMENTS}
        blocks = -(-parameter.numel() // BLOCK)
        return {"exp_avg": torch.zeros_like(parameter, dtype=torch.int8), "exp_avg_scale": parameter.new_zeros(blocks),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.uint8), "exp_avg_sq_scale": parameter.new_zeros(blocks)}

    def _form(self, parameter, moments):
        """Moments of either AdamW in the form that this kind keeps."""
        coded = MOMENTS[0] + "_scale" in moments
        if coded == self._codes(parameter):
            return moments
        out = self._empty(parameter)
        for key in MOMENTS:
            for part in _slabs(parameter.numel()):
                if coded:
                    out[key].view(-1)[part] = _decode(moments, key, part)
                else:
                    self._encode(out, key, part, moments[key].reshape(-1)[part])
        return out

    def _encode(self, state, key, part, moment):
        """Store a slab `moment` (float32) as codes. exp_avg_sq is stored as its root."""
        rows = _blocked(moment if key == "exp_avg" else moment.sqrt())
        scale = rows.abs().max(dim=1)[0] / (127 if key == "exp_avg" else 255)
        codes = rows / scale.clamp(min=1e-38)[:, None]
        if key == "exp_avg":
            codes = codes.round_()
        else:
            dither = torch.rand(codes.shape, generator=self._random).to(codes.device)
            codes = torch.max((codes + dither).floor_().clamp_(max=255), (rows > 0).to(codes.dtype))
        state[key].view(-1)[part] = codes.view(-1)[:len(moment)].to(state[key].dtype)
        state[key + "_scale"][_blocks(part)] = scale


def _slabs(count):
    return [slice(first, min(first + SLAB, count)) for first in range(0, count, SLAB)]


def _blocks(part):
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _blocked(flat):
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _decode(state, key, part):
    codes = state[key].view(-1)[part]
    flat = (_blocked(codes.float()) * state[key + "_scale"][_blocks(part), None]).view(-1)[:len(codes)]
    return flat if key == "exp_avg" else flat.square_()
