"""One label for every image, from the grid of its patches."""
import numpy as np
import torch
from PIL import Image, ImageDraw

from edge import images, scores
from edge.errors import UsageError
from edge.warp.pictures import drawable, shown
from train_lite import evaluate, metrics
from train_lite.config import mode_settings
from train_lite.data import labelled
from train_lite.losses import GridLoss
from train_lite.models import gridnet, norm
from train_lite.patches import PixelBatch, View
from train_lite.tasks.problem import Problem

CALIBRATION_IMAGES, CALIBRATION_PATCHES = 32, 128  # for the statistics of norms


class GridBatch(PixelBatch):
    """Views whose patches make a grid, with one label each."""

    def labels(self):
        """(B,) int64 class ids."""
        return torch.tensor([view.stored.pair.label for view in self.views], device=self.device)

    def grid(self):
        """(rows, cols) of patches of every view."""
        return self.views[0].grid


class Classification(Problem):
    COLUMNS = ("accuracy", "kappa", "val_loss")
    CURVES = (("accuracy", "validation accuracy"), ("kappa", "validation kappa"))
    SCORE = "accuracy"
    scores_pixels = False

    @staticmethod
    def find(config, data):
        """(pairs, classes) behind --data; none without it."""
        if not data:
            raise UsageError("--model %s needs --data: %s" % (config.model, labelled.LAYOUTS))
        return labelled.find(data, config.val_share, config.group_by)

    @staticmethod
    def check(config, train):
        side = mode_settings(config).resize_px
        other = [entry for entry in train if (entry.height, entry.width) != (side, side)]
        if other:
            raise UsageError("%s is %dx%d px, and with --fit none all images are to be --res %d px wide and high, for one grid of "
                             "patches. Leave --fit out" % (other[0].pair.image, other[0].width, other[0].height, side))

    @staticmethod
    def build(config, outputs, kind):
        settings = mode_settings(config)
        cells = scores.grid(evaluate.recipe(settings, settings.tile or settings.resize_px, 1))
        return gridnet.build(config.model, config.head, config.width, kind, outputs, cells, settings.fusion)

    def views_to_batch(self, views, _rng, _epoch, _number):
        return GridBatch(views, self.side, self.device)

    def objective(self, _state):
        return GridLoss()

    def calibrate(self, net):
        """Patches of many images, and their overviews; where the head has norms too, the grids of whole images, which are few where a
        grid is large."""
        rng = np.random.RandomState(self.config.seed)
        chosen = [self.train[i] for i in rng.permutation(len(self.train))[:CALIBRATION_IMAGES]]
        rows, cols = scores.grid(self.recipe)
        whole = chosen[:max(2, CALIBRATION_PATCHES // (rows * cols))]
        if any(isinstance(module, tuple(norm.NORMS.values())) for module in net.last.modules()):
            return [("", lambda: [self._scores(net, stored) for stored in whole])]
        batch = GridBatch([View(stored, 0, self.tile) for stored in chosen], self.side, self.device)
        every = batch.every_patch()
        picks = sorted(every[i] for i in rng.permutation(len(every))[:CALIBRATION_PATCHES])

        def forward():
            for pick in picks:
                net.encoder(batch.chunk([pick]).pixels)
            for number in range(len(whole) if self.side else 0):
                net.encoder(batch.overviews([number]))
        return [("", forward)]

    def _scores(self, net, stored):
        """(classes,) of the whole image, by the path that edge-run takes."""
        return scores.grid_scores(stored.picture, self.recipe, lambda pixels: evaluate.through(net.encoder, self.device, pixels),
                                  lambda cells, g: evaluate.through(net.head, self.device, cells, g))

    def probabilities(self, net, stored):
        """(classes,) of one image."""
        net.eval()
        return torch.softmax(torch.from_numpy(self._scores(net, stored)), 0).numpy()

    def evaluate(self, net, stored, final=False):
        """Accuracy, quadratic kappa (Cohen 1968), mean cross-entropy and the confusion matrix [true][predicted]."""
        truth = np.array([entry.pair.label for entry in stored])
        shares = np.stack([self.probabilities(net, entry) for entry in stored])
        matrix = metrics.confusion(truth, shares.argmax(axis=1), len(self.classes.names))
        return {"accuracy": float(np.trace(matrix)) / matrix.sum(), "kappa": metrics.quadratic_kappa(matrix),
                "val_loss": float(-np.log(np.maximum(shares[np.arange(len(truth)), truth], 1e-12)).mean()), "confusion": matrix.tolist()}

    @staticmethod
    def row(result):
        return {name: result[name] for name in Classification.COLUMNS}

    @staticmethod
    def line(row):
        return "accuracy %.3f  kappa %.3f" % (row["accuracy"], row["kappa"])

    def describe(self, result):
        return self.line(result)

    def words(self):
        return "%s, %dx%d of them, head %s" % ((super().words(),) + scores.grid(self.recipe)[::-1] + (self.config.head,))

    def draw(self, net, stored, path):
        """The image with its label and the likeliest three, as a picture in the file `path`."""
        shares = self.probabilities(net, stored)
        small = shown(stored.picture)
        sheet = Image.new("RGB", (max(small.shape[1], 260), small.shape[0] + 64), "white")
        sheet.paste(Image.fromarray(small), (0, 0))
        pen = ImageDraw.Draw(sheet)

        def write(line, words, fill):
            pen.text((6, small.shape[0] + 4 + 14 * line), drawable(words), fill=fill)

        write(0, "label %s" % self.classes.names[stored.pair.label], "black")
        for line, index in enumerate(np.argsort(-shares)[:3], 1):
            right = index == stored.pair.label
            write(line, "%s  %.0f %%" % (self.classes.names[index], 100 * shares[index]), (0, 128, 0) if right else (90, 90, 90))
        images.write_png(path, images.pixels_of(sheet))
