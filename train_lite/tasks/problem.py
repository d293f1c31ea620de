"""What is trained on what: all that is fixed during a run, and all that differs between tasks. The loop knows no task by name."""
import hashlib
import json

import numpy as np
import torch

from edge.tiles import plan
from train_lite import evaluate
from train_lite.config import GLNETS, micro_batch, mode_settings, task_of, whole_side
from train_lite.gradient import Gradient
from train_lite.patches import View

REWARM = 0.05  # share of the steps over which the rate rises again after the norms are frozen


def task(config):
    """The Problem class of a config's task."""
    name = task_of(config.model)
    if name == "classification":
        from train_lite.tasks.classification import Classification
        return Classification
    if name == "detection":
        from train_lite.tasks.detection import Detection
        return Detection
    if config.model in GLNETS:
        from train_lite.tasks.glnet import Glnet
        return Glnet
    from train_lite.tasks.segmentation import Segmentation
    return Segmentation


class Problem:
    """Fixed during a run. train, val, test: lists of Stored; classes: a dataset.Classes; device: a torch.device.

    A task adds: find(config, data) -> (pairs, classes), check(config, train), build(config, outputs, kind), all static; views_to_batch,
    objective, calibrate, evaluate, row, line, describe, draw; and COLUMNS, CURVES, SCORE of metrics.csv."""

    view = View
    turns = range(8)  # of View: how training images may be turned
    scores_pixels = True  # of images at --res, whatever size the net was trained at

    def __init__(self, config, classes, train, val, test, device):
        self.config, self.classes, self.device = config, classes, device
        self.train, self.val, self.test = train, val, test
        self.settings = mode_settings(config)
        longest = max(max(s.height, s.width) for s in train)
        self.tile = self.settings.tile or max(self.settings.task or (whole_side(config.model, longest),))
        self.side = self.tile if self.settings.fusion != "none" else 0
        self.recipe = evaluate.recipe(self.settings, self.tile, micro_batch(config))
        self.batches = -(-len(train) // config.batch)
        inner = config.inner if self.settings.gradient == "sampled" else 1
        each = -(-self.batches * inner // config.accumulation)  # steps of an epoch
        self.steps = each * config.epochs
        freeze_at = {"group": config.freeze_at, "frozen": 0.0}.get(config.norm, 1.0)
        # norms are frozen where no gradient waits, in front of the last batch of the run at the latest
        apart = next(n for n in range(1, config.accumulation + 1) if n * inner % config.accumulation == 0)
        latest = self.steps - each + (self.batches - 1) // apart * apart * inner // config.accumulation
        self.freeze_step = self.steps if freeze_at == 1 else min(int(round(freeze_at * self.steps)), latest)

    def images(self):
        """What is trained on and what is held out, in short: for a checkpoint."""
        names = json.dumps([[stored.pair.name for stored in part] for part in (self.train, self.val)])
        return {"train": len(self.train), "val": len(self.val), "names": hashlib.sha256(names.encode()).hexdigest()[:16]}

    @staticmethod
    def demand(_config):
        """Raise UsageError when what a new run begins with is not there."""

    @staticmethod
    def overview(settings):
        """(height, width) px of the overviews that the store keeps; () for none."""
        return (settings.tile, settings.tile) if settings.fusion != "none" else ()

    @staticmethod
    def probe(net, _outputs, count, px):
        """A scalar of what black patches become, to see what a pass through `net` keeps."""
        return net.encoder(torch.zeros(count, 3, px, px)).sum()

    @staticmethod
    def held(_net, _count, _px, _images, _spill):
        """Bytes that a chunk of as many patches of a batch of as many images brings along, besides what autograd keeps of it. spill: as
        of plan.Levers."""
        return 0

    def words(self):
        """How it is trained, in one line."""
        return "mode %s, %s gradient, global patch %s, patch %d px" % (
            self.config.mode, self.settings.gradient, self.settings.fusion, self.tile)

    def batch(self, epoch, number):
        """Batch `number` of an epoch, and the generator for everything random in it: functions of the seed."""
        config = self.config
        order = np.random.RandomState([config.seed, epoch]).permutation(len(self.train))
        rng = np.random.RandomState([config.seed, epoch, number + 1])
        views = [self.view(self.train[i], self.turns[int(rng.randint(len(self.turns)))] if config.augment else 0, self.tile)
                 for i in order[number * config.batch:(number + 1) * config.batch]]
        return self.views_to_batch(views, rng, epoch, number), rng

    def drawn(self, rng, turned, count):
        """`count` patches drawn from all training images, image i turned by turned[i]: (views of their images, picks of these). A list of
        all patches of many large images would take hundreds of MB."""
        stops = np.cumsum([1 if self.settings.task else len(plan(s.height, s.width, self.tile).boxes()) for s in self.train])
        chosen = rng.permutation(int(stops[-1]))[:count]
        images = np.searchsorted(stops, chosen, side="right")
        used = sorted(set(images))
        picks = [(used.index(image), int(patch - (stops[image - 1] if image else 0))) for image, patch in zip(images, chosen)]
        return [self.view(self.train[image], turned[image], self.tile) for image in used], picks

    @staticmethod
    def later(_config):
        """(words, config) of the trainings that are to follow one, as far as memory goes."""
        return []

    def adopt(self, state):
        """Begin a new State with what another run ended with."""

    def following(self, _path):
        """The config of the training that comes after the run in the folder `_path`; None: that was all."""

    def gradient(self, state):
        config = self.config
        return Gradient(state.net, self.objective(state), self.settings, config.patches, config.inner, micro_batch(config),
                        state.loss_scale)

    def learning_rate(self, step, frozen_at=None):
        """Of optimizer step 1, 2, ...: untuned linear warm-up over 2 / (1 - beta2) steps (Ma & Yarats 2019, section 5),
        capped by a share of the run, times linear decay to 0. frozen_at: steps done when norms were frozen, None before."""
        config = self.config
        period = max(1.0, min(2 / (1 - config.beta2), (REWARM if frozen_at else config.warm_up) * self.steps))
        return config.lr * min(1.0, (step - (frozen_at or 0)) / period) * (1 - (step - 1) / float(self.steps))
