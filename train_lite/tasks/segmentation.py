"""A class for every pixel, from patches or from samples of the whole image."""
import numpy as np
import torch

from edge.errors import UsageError
from train_lite import evaluate, metrics, pictures
from train_lite.config import micro_batch, mode_settings
from train_lite.data import dataset
from train_lite.losses import SegmentationLoss
from train_lite.models import FEATURES, MODELS, build
from train_lite.patches import Batch, View
from train_lite.samplers.deform import EdgeLoss, Sampler, WarpBatch, WarpNet, build_deform
from train_lite.tasks.problem import Problem

CALIBRATION_PATCHES = 32  # for the statistics of frozen norms; drawn from all training images
TURNS_OF_OBLONGS = (0, 2, 4, 6)  # no quarter turns where the net's input is wider than high
GAMMA = {"divergence": 1.0, "spanned": 100.0}


class Segmentation(Problem):
    COLUMNS = metrics.NAMES + tuple("compat_" + n for n in metrics.NAMES) + ("boundary_f1",)
    CURVES = (("iou", "validation IoU"), ("f1", "validation F1"))
    SCORE = "iou"  # of a row: what the best net is chosen by

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        config = self.config
        self.sampler = Sampler(config.sampler, self.recipe, config.edge_loss) if self.settings.task else None
        self.how = self.sampler or self.recipe  # what evaluate.label_bands takes
        if self.sampler and self.sampler.size[0] != self.sampler.size[1]:
            self.turns = TURNS_OF_OBLONGS

    @staticmethod
    def find(config, data):
        """(pairs, classes) behind --data; no pairs without it."""
        return (dataset.find_pairs(data, config.val_share, config.group_by) if data else []), dataset.read_classes(data, config)

    @staticmethod
    def overview(settings):
        return settings.density if settings.task else Problem.overview(settings)

    @staticmethod
    def check(config, train):
        """Raise UsageError for training images, a list of Stored, that do not go with the flags."""
        task = mode_settings(config).task
        small = [entry for entry in train if task and (task[0] > entry.height or task[1] > entry.width)]
        if small:
            raise UsageError("--task-size %s is larger than %d of the training images, such as %s of %dx%d px: samplers spend fewer "
                             "pixels than an image has. Take a smaller --task-size%s"
                             % (config.task_size, len(small), small[0].pair.image, small[0].width, small[0].height,
                                ", or leave these images out" if config.fit == "none" else " or a larger --res, or leave these images out"))

    @staticmethod
    def build(config, outputs, kind):
        """The net of a config, its norms of `kind`. outputs: of a dataset.Classes."""
        if config.sampler != "none":
            deform = build_deform(config)  # first, as ever: the same seed then draws the same weights
            return WarpNet(MODELS[config.model](FEATURES, config.width, kind), outputs, deform)
        return build(config.model, config.width, kind, outputs, mode_settings(config).fusion)

    @staticmethod
    def probe(net, outputs, tiles, px):
        """A loss over black tiles, to see what a pass through `net` keeps."""
        g, spread = torch.zeros(tiles, FEATURES, px, px), torch.zeros(tiles, px, px)
        logits = net(torch.zeros(tiles, 3, px, px), g, spread, spread)
        return SegmentationLoss(outputs).sums(logits, torch.zeros(tiles, px, px, dtype=torch.uint8)).sum()

    def views_to_batch(self, views, rng, epoch, number):
        if not self.sampler:
            return Batch(views, self.side, self.device)
        blurred = epoch * self.batches + number < self.config.shrink * self.config.epochs * self.batches
        shorter = min(self.sampler.size)
        shrink = int(rng.randint(max(1, shorter // 3), shorter + 1)) if blurred else 0
        return WarpBatch(views, self.sampler, shrink, self.device)

    def objective(self, state):
        config = self.config
        if not self.sampler:
            return SegmentationLoss(self.classes.outputs, config.dice)
        gamma = config.gamma if config.gamma >= 0 else 1.0 if config.sampler == "marin" else GAMMA[config.edge_loss]
        return EdgeLoss(self.classes.outputs, config.dice,
                        lambda: gamma * (1 - state.step / float(self.steps)) ** config.gamma_power)

    def calibrate(self, net):
        """What runs training patches through `net`: parts, as of norm.freeze_first()."""
        rng = np.random.RandomState(self.config.seed)
        turns = 1 if self.sampler else 8
        turned = [int(rng.randint(turns)) for _ in self.train]
        # two whole images (--mode full) hold as many pixels as 128 patches of 128 px of 1024 px images
        count, chunk = (CALIBRATION_PATCHES, micro_batch(self.config)) if self.settings.tile or self.sampler else (2, 1)
        views, picks = self.drawn(rng, turned, count)
        batch = WarpBatch(views, self.sampler, 0, self.device) if self.sampler else Batch(views, self.side, self.device)
        overviews = [Batch([View(stored, turn, self.tile)], self.side, self.device)
                     for stored, turn in list(zip(self.train, turned))[:CALIBRATION_PATCHES // 8]]

        def forward():
            for first in range(0, len(picks), chunk):
                net.encoder(batch.chunk(picks[first:first + chunk], net).pixels)
            if self.side:
                for one in overviews:
                    net.encoder(one.overviews([0]))
        return [("", forward)]

    def evaluate(self, net, stored, final=False):
        """Scores of `net` on a list of Stored: see evaluate.evaluate."""
        return evaluate.evaluate(net, stored, self.how, len(self.classes.names), self.device, final)

    @staticmethod
    def row(result):
        """What a result adds to the epoch's row of metrics.csv."""
        return dict(result["pooled"], boundary_f1=result["boundary_f1"],
                    **{"compat_" + name: value for name, value in result["paper_compat"].items()})

    @staticmethod
    def line(row):
        return "IoU %.3f  F1 %.3f" % (row["iou"], row["f1"])

    def describe(self, result):
        return evaluate.describe(result, self.how)

    def words(self):
        if self.sampler:
            return "sampler %s, %s px, density of %dx%d" % ((self.config.sampler, self.config.task_size) + self.settings.density[::-1])
        return super().words()

    def draw(self, net, stored, path):
        """Image, truth and prediction as a picture in the file `path`."""
        bands, seen = evaluate.predict(net, stored, self.how, self.device)
        pictures.comparison(stored, bands, self.classes.palette, path, seen)
