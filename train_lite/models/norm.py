"""Normalisation layers, freezing them to per-channel affines, and folding those into convolutions.

Group norm trains best at batch 1 but does not fold at export; so: train with it, freeze, fine-tune, fold
(docs/method.md, section 3)."""
import torch
from torch import nn

EPS = 1e-5
LARGE = 0.75  # share of all values that norms go over, which the largest maps make up


class GroupNorm(nn.GroupNorm):
    """Up to 8 groups of at least 4 channels: one channel per group would be instance norm, which erases contrast."""

    def __init__(self, channels):
        groups = max(n for n in range(1, 9) if channels % n == 0 and (n == 1 or channels // n >= 4))
        super().__init__(groups, channels, eps=EPS)

    def forward(self, x):
        if x.dtype != torch.float16:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # else it would be float32, at twice the memory
            return nn.functional.group_norm(x, self.num_groups, self.weight.half(), self.bias.half(), self.eps)


class PlainGroupNorm(nn.Module):
    """A trained GroupNorm in means, differences and a root: what a runtime computes without a normalisation operator,
    which on TensorRT 8.2 is a plugin that loads cuDNN. Sizes are fixed when it is traced."""

    def __init__(self, norm):
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x):
        batch, channels, height, width = (int(n) for n in x.shape)
        z = x.reshape(batch, self.groups, channels // self.groups * height, width)
        z = z - _mean(z)
        z = z / torch.sqrt(_mean(z * z) + self.eps)
        return z.reshape(batch, channels, height, width) * self.weight[:, None, None] + self.bias[:, None, None]


def _mean(z):
    """Over the last two dimensions, one after the other: ONNX Runtime adds up a million values in a row, and is off by 1e-4 of the result."""
    return z.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)


class BatchNorm(nn.BatchNorm2d):
    """Batch statistics in training, unless there is one value per channel (pooling of a single patch): then the
    running ones. `updating` False leaves the running statistics alone, for the second pass over the same tiles."""
    updating = True

    def forward(self, x):
        batch_stats = self.training and x.numel() > x.shape[1]
        momentum = self.momentum if batch_stats and self.updating else 0.0
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                        batch_stats, momentum, self.eps)


class FrozenNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel; mean and var fixed, weight and bias trained.
    State names are batch norm's, so that pretrained batch-norm nets load into it."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def affine(self):
        """(scale, shift), each (C,): y = x * scale + shift."""
        scale = self.weight * torch.rsqrt(self.running_var + EPS)
        return scale, self.bias - self.running_mean * scale

    def forward(self, x):
        scale, shift = (values.to(x.dtype) for values in self.affine())
        return x * scale[:, None, None] + shift[:, None, None]


NORMS = {"group": GroupNorm, "batch": BatchNorm, "frozen": FrozenNorm}


def begin(encoder):
    """First weights of a residual encoder: He's, and branches that add nothing yet (Goyal et al. 2017, arXiv 1706.02677, section
    5.1): without that, group norm does not train."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for norm in encoder.residual_ends():
        nn.init.zeros_(norm.weight)


def set_updating(net, updating):
    """Whether batch norms of `net` move their running statistics in train mode."""
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.updating = updating


def group_norms(net):
    """Names of the group norms of `net`."""
    return [name for name, module in net.named_modules() if isinstance(module, GroupNorm)]


def of_large_maps(net, parts):
    """Those of group_norms(net) that take most of the time: the norms of the largest maps, down to the size at which they make up
    LARGE of the values that all norms of `net` go over, frozen ones too. parts: as of freeze_first()."""
    sizes = {}

    def look(name, x):
        sizes[name] = x[0].numel()

    norms = {name: module for name, module in net.named_modules() if isinstance(module, (GroupNorm, FrozenNorm))}
    for _prefix, forward in parts:
        _watch(norms, look, forward)
    ranked = sorted(sizes.values(), reverse=True)
    least = next(size for size in ranked if sum(other for other in ranked if other >= size) >= LARGE * sum(ranked))
    return [name for name in group_norms(net) if sizes.get(name, 0) >= least]


def freeze_first(net, names, parts):
    """Replace the one of the group norms `names` that comes first in forward order by a FrozenNorm with statistics measured on
    real patches (docs/method.md, section 3).

    parts: list of (prefix, function) in forward order; a function runs calibration patches, chunk by chunk, through the modules whose
    names begin so, and is called without grad, when one of these norms is wanted. Returns its name."""
    first, mean, var = _first_moments({name: net.get_submodule(name) for name in names}, parts, lambda norm: norm.num_groups)
    with torch.no_grad():
        new, = put_frozen(net, [first])
        per_group = len(new.weight) // len(mean)
        new.running_mean.copy_(mean.repeat_interleave(per_group))
        new.running_var.copy_(var.repeat_interleave(per_group))
    return first


def measure(net, parts):
    """Set the running statistics of the trained batch norms of `net`, in eval mode, to those of what `parts` run through them:
    in forward order, so that each is measured on what the ones before it give in eval mode. ('Rethinking "Batch" in BatchNorm', Wu
    & Johnson 2021, arXiv 2105.07576, section 3, measures all at once in train mode; for small batches of unlike images that
    does not hold: docs/measured.md, "Labels of whole images".)

    parts: as of freeze_first(); each is called once for every norm that it reaches."""
    left = {name: module for name, module in net.named_modules() if isinstance(module, BatchNorm) and module.weight.requires_grad}
    while left:
        first, mean, var = _first_moments(left, parts, lambda norm: norm.num_features)
        if first is None:  # the others are not reached
            return
        norm = left.pop(first)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def _first_moments(norms, parts, groups_of):
    """(name, mean, variance) of what goes into the first, in forward order, of `norms`, a dict by name; of each of its
    groups_of(norm) groups of channels. (None, None, None) when no part reaches any."""
    sums = {}  # name of the first -> (3, groups) float64: sum, sum of squares, count

    def add(name, x):
        if sums and name not in sums:
            return
        x = x.reshape(x.shape[0], groups_of(norms[name]), -1).double()
        count = torch.full_like(x[0, :, 0], x.shape[0] * x.shape[2])
        sums[name] = sums.get(name, 0) + torch.stack([x.sum(dim=(0, 2)), (x * x).sum(dim=(0, 2)), count])

    for prefix, forward in parts:
        if not sums and any(name.startswith(prefix) for name in norms):
            _watch(norms, add, forward)
    for name, (total, squares, count) in sums.items():
        mean = total / count
        return name, mean, (squares / count - mean * mean).clamp(min=0)
    return None, None, None


def _watch(norms, look, forward):
    """Call look(name, x) with what goes into the modules of a dict by name while forward() runs without grad."""
    hooks = [norm.register_forward_pre_hook(lambda _norm, args, name=name: look(name, args[0])) for name, norm in norms.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()


def put_frozen(net, names):
    """Replace the group norms `names` by FrozenNorms without statistics; weight and bias stay the same Parameters, so
    the optimizer keeps their state. Returns the new layers."""
    made = []
    for name in names:
        parent, _, child = name.rpartition(".")
        old = net.get_submodule(name)
        new = FrozenNorm(old.num_channels).to(old.weight.device, old.weight.dtype)
        new.weight, new.bias = old.weight, old.bias
        setattr(net.get_submodule(parent), child, new)
        made.append(new)
    return made


def fold(net):
    """Fold every frozen or batch norm of `net` (eval mode) into the convolution registered just before it, in place.
    Returns the number folded. Group norms depend on the input; they become PlainGroupNorms."""
    folded = 0
    with torch.no_grad():
        for parent in list(net.modules()):
            conv = None
            for name, child in list(parent.named_children()):
                if isinstance(child, (FrozenNorm, BatchNorm)) and conv is not None:
                    scale, shift = FrozenNorm.affine(child)
                    conv.weight.mul_(scale[:, None, None, None])
                    bias = shift if conv.bias is None else conv.bias * scale + shift
                    conv.bias = nn.Parameter(bias)
                    setattr(parent, name, nn.Identity())
                    folded += 1
                elif isinstance(child, GroupNorm):
                    setattr(parent, name, PlainGroupNorm(child))
                conv = child if isinstance(child, nn.Conv2d) else None
    return folded
