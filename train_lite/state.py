"""Where training stands: all that a checkpoint holds."""
import inspect
import re

import torch

from edge.command import say
from edge.errors import BadFile, UsageError
from jetson import phases
from train_lite import checkpoint
from train_lite.config import TrainConfig
from train_lite.data.dataset import Classes
from train_lite.half import LossScale
from train_lite.models import norm
from train_lite.models.recompute import recompute
from train_lite.optimizer import Optimizer
from train_lite.tasks.problem import task


MISFIT = "%s does not fit the net that its config describes, or is of another version of nanopatch: %s. Was its config.json changed? Bring it back"


class State:
    """Net, optimizer moments, scale of the loss, position, best score."""

    def __init__(self, problem, frozen=()):
        config = problem.config
        torch.manual_seed(config.seed)
        self.net = build_net(config, problem.classes, frozen).to(problem.device)
        if config.recompute:
            recompute(self.net.encoder)
        self.frozen = list(frozen)   # names of the group norms that have become affines
        self.frozen_at = None        # optimizer steps done when they did
        self.optimizer = self._new_optimizer(config)
        self.loss_scale = LossScale(config.half)
        self.epoch = self.batch = self.step = 0   # the next batch to do; optimizer steps done
        self.best = -1.0
        self.loss_sum = self.loss_count = 0.0     # of the epoch so far

    def _new_optimizer(self, config):
        return Optimizer(self.net, config.optimizer, config.beta2, config.weight_decay)

    def save(self, path, problem):
        phases.mark("checkpoint")
        tensors = {"net." + name: value.detach().cpu().numpy() for name, value in self.net.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.moments.get(parameter, {}).items():
                tensors["adamw.%s.%s" % (key, name)] = value.cpu().numpy()
        checkpoint.write(path, tensors, {
            "config": problem.config._asdict(), "images": problem.images(), "classes": problem.classes._asdict(), "tile": problem.tile,
            "frozen": self.frozen, "frozen_at": self.frozen_at, "epoch": self.epoch, "batch": self.batch,
            "step": self.step, "optimizer_steps": self.optimizer.steps, "loss_scale": self.loss_scale.position(), "best": self.best, "loss_sum": self.loss_sum, "loss_count": self.loss_count})

    @classmethod
    def load(cls, path, problem):
        tensors, meta = checkpoint.read_newest(path, drop_damaged=True)
        _demand_classes(problem, meta, path)
        _demand_images(problem, meta, path)
        try:
            state = cls(problem, meta["frozen"])
            _load(state.net, tensors, path)
            for name in ("epoch", "batch", "step", "frozen_at", "best", "loss_sum", "loss_count"):
                setattr(state, name, meta[name])
            state.loss_scale.restore(meta["loss_scale"])
            moments = _moments(state, tensors, problem.config.optimizer)
            steps = meta["optimizer_steps"]
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise BadFile(MISFIT % (path, exc)) from exc
        if moments:
            state.optimizer.restore(moments, steps)
        return state

    def freeze_if_due(self, problem, stop=()):
        """From problem.freeze_step on: freeze group norms, in forward order, on statistics of training patches. Leaves off, to go on
        after load(), when `stop` is no longer empty.

        AdamW begins anew, its rate with a warm-up: gradients are larger without group norm, and moments of the time
        before would make the first steps far too long. So does the best score: nets before that do not fold."""
        names, config = norm.group_norms(self.net), problem.config
        if not names or self.frozen_at is not None or self.step < problem.freeze_step or problem.freeze_step == problem.steps:
            return
        self.net.eval()
        if config.freeze == "large" and config.norm == "group":
            names = norm.of_large_maps(self.net, problem.calibrate(self.net))
        if not names:  # a stage of GLNet may begin with all of them frozen
            self.frozen_at = 0
            return
        left, parts = set(names), problem.calibrate(self.net)
        while left:
            if stop:
                return
            self.frozen.append(norm.freeze_first(self.net, left, parts))
            left.remove(self.frozen[-1])
        self.frozen_at, self.best = self.step, -1.0
        self.optimizer = self._new_optimizer(config)
        say("step %d: %d norms are frozen; they fold into the convolutions at export" % (self.step, len(names)))

    def measure_norms(self, problem):
        """Statistics of batch norms for a net that is scored or done: those of training patches."""
        if problem.config.norm == "batch":
            self.net.eval()
            norm.measure(self.net, problem.calibrate(self.net))


def _demand_classes(problem, meta, path):
    """Raise UsageError where the data names other classes than those that the checkpoint was trained for."""
    trained, now = [list(names) for names in (meta.get("classes", {}).get("names", ()), problem.classes.names)]
    if trained and trained != now:
        first = next((i for i, pair in enumerate(zip(trained, now)) if pair[0] != pair[1]), min(len(trained), len(now)))
        raise UsageError("%s was trained for %d classes, --data now has %d; the first that differs is number %d: %s, now %s. Bring the old ones "
                         "back, or begin a new run" % (path, len(trained), len(now), first, *[
                             repr(names[first]) if first < len(names) else "none" for names in (trained, now)]))


def _demand_images(problem, meta, path):
    """Raise UsageError where training would go on with other images, or others held out: with a schedule of another length, and scores
    of images that were trained on."""
    began, now = meta.get("images"), problem.images()
    if began and began != now:
        raise UsageError("%s was trained on %d images with %d held out, --data now has %d and %d%s. Bring the old ones back, or begin a new run" % (
            path, began["train"], began["val"], now["train"], now["val"],
            ", others" if (began["train"], began["val"]) == (now["train"], now["val"]) else ""))


def _moments(state, tensors, kind):
    """The optimizer's moments in a checkpoint: a dict per parameter, in order, empty of those that are not trained; [] before
    its first step, or when the optimizer `kind` has none."""
    by_name = {}
    for key, value in tensors.items():
        if key.startswith("adamw."):
            _, part, name = key.split(".", 2)
            by_name.setdefault(name, {})[part] = torch.from_numpy(value)
    return [] if kind == "sgd" or not by_name else [
        by_name[name] if parameter.requires_grad else {} for name, parameter in state.net.named_parameters()]


def build_net(config, classes, frozen=()):
    """The net of a config, with the group norms `frozen` replaced."""
    net = task(config).build(config, classes.outputs, "group" if config.norm == "frozen" else config.norm)
    norm.put_frozen(net, frozen)
    return net


def _load(net, tensors, path):
    """Put the tensors 'net.*' of a checkpoint into `net`. Raises BadFile when they do not fit."""
    try:
        net.load_state_dict({name[4:]: torch.from_numpy(value) for name, value in tensors.items()
                             if name.startswith("net.")})
    except RuntimeError as exc:
        raise BadFile(MISFIT % (path, str(exc).splitlines()[-1].strip(" ."))) from exc


def new(problem):
    """The State at step 0, with pretrained weights where the config names some."""
    state, config = State(problem), problem.config
    problem.adopt(state)
    if config.weights:
        found = read_weights(config.weights, config.allow_pickle)
        if config.norm == "frozen":  # their own statistics, not ones measured here; those of other layers are measured at step 0
            inside = {id(module): name for name, module in state.net.encoder.named_modules()}
            own = [name for name in norm.group_norms(state.net)
                   if inside.get(id(state.net.get_submodule(name)), "") + ".running_mean" in found]
            norm.put_frozen(state.net, own)
            state.frozen += own
        loaded = load_encoder(state.net, found, config.weights)
        say("%d of %d tensors of the encoder from %s" % (loaded + (config.weights,)))
    return state


def restore(path):
    """The trained net in a checkpoint file, in eval mode, and what it was trained for.
    Returns (net, config, classes, tile px, meta). Raises BadFile."""
    tensors, meta = checkpoint.read_newest(path, prefix="net.")
    try:
        config = TrainConfig(**meta["config"])
        classes = Classes(**dict(meta["classes"], palette=tuple(map(tuple, meta["classes"]["palette"]))))
        net = build_net(config, classes, meta["frozen"])
    except (KeyError, TypeError, AttributeError) as exc:
        raise BadFile(MISFIT % (path, exc)) from exc
    _load(net, tensors, path)
    return net.eval(), config, classes, meta["tile"], meta


def read_weights(path, allow_pickle):
    """{name in an encoder: tensor} of a file with pretrained weights: .safetensors, or torchvision's .pth."""
    if path.endswith(".safetensors"):
        found = {name: torch.from_numpy(value) for name, value in checkpoint.read(path, ours=False)[0].items()}
    else:
        found = _read_pth(path, allow_pickle)
    if not isinstance(found, dict):
        raise BadFile("%s holds a %s; expected a dict of names and tensors, as torch.save(net.state_dict()) writes it" % (path, type(found).__name__))
    detector = any(str(name).startswith("backbone.body.") for name in found)  # torchvision's: backbone.body.layer1, backbone.fpn
    prefix = r"^backbone\.(body\.)?" if detector else r"^net\.encoder\."
    return {re.sub(prefix, "", str(name)): value for name, value in found.items()}


def load_encoder(net, found, path):
    """Put pretrained weights, as of read_weights(), into net.encoder. Layers of another shape (the last one always) keep their
    random start. Returns (parameters loaded, parameters in all)."""
    own = net.encoder.state_dict()
    fits = {name: found[name] for name in own if torch.is_tensor(found.get(name)) and found[name].shape == own[name].shape}
    if 2 * len(fits) < len(own):
        raise BadFile("%s fits %d of the %d tensors of this net; expected weights of the same --model and --width"
                      % (path, len(fits), len(own)))
    net.encoder.load_state_dict(fits, strict=False)
    return len(fits), len(own)


def _read_pth(path, allow_pickle):
    safe = "weights_only" in inspect.signature(torch.load).parameters
    if not safe and not allow_pickle:
        raise UsageError("%s: this torch (%s) reads a .pth only by running code from it. Convert it to .safetensors on "
                         "another machine or, if you trust the file, add --allow-pickle" % (path, torch.__version__))
    try:
        if safe:
            return torch.load(path, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu")  # unpickles, so runs what the file says: --allow-pickle was typed for it
    except Exception as exc:  # whatever a hostile or damaged pickle raises
        raise BadFile("cannot read the weights %s: %s: %s. Expected a file that torch.save wrote"
                      % (path, type(exc).__name__, (str(exc).splitlines() or [""])[0])) from exc
