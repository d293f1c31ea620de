"""Boxes with a class each, from patches at their place in a feature pyramid."""
import os

import numpy as np

from edge import boxes, images
from edge.command import say
from edge.errors import UsageError
from edge.warp import pictures
from train_lite import evaluate
from train_lite.config import mode_settings
from train_lite.data import boxed
from train_lite.models import fcos
from train_lite.patches import PixelBatch, View
from train_lite.tasks import average_precision, boxloss
from train_lite.tasks.boxloss import BoxLoss
from train_lite.tasks.problem import Problem

CALIBRATION_PATCHES = 32  # for the statistics of frozen norms
LOOKED_AT, LOST = 20, 0.02  # images that are looked through for boxes that cannot be learned, and their share that is not worth a word
SCORE_LEAST = 0.05        # of the boxes that are scored: average precision ranks them, so the weak ones count too


class BoxView(View):
    """A View whose tiles lie at multiples of their side, so that their cells are an image's cells; the last reach over its border."""

    def __init__(self, stored, turn, tile):
        super().__init__(stored, turn, tile)
        self.tile, self.folder = tile, os.path.dirname(stored.path)
        laid = boxes.layout(self.height, self.width, tile)
        self.boxes, self.grid = laid.boxes(), (len(laid.ys), len(laid.xs))

    def truth(self):
        """The boxes of this view, (n, 6): x0, y0, x1, y1 px, class id, crowd."""
        found = truth_of(self.stored)
        if self.turn == 4:  # mirrored
            found[:, [0, 2]] = self.width - found[:, [2, 0]]
        return found


class BoxBatch(PixelBatch):
    """Views with boxes."""

    def truth(self):
        return [view.truth() for view in self.views]


def truth_of(stored):
    """The boxes of a Stored, (n, 6): x0, y0, x1, y1 px, class id, crowd."""
    size = stored.width, stored.height, stored.width, stored.height
    return np.array([tuple(side * full for side, full in zip((box.x0, box.y0, box.x1, box.y1), size)) + (box.label, box.crowd)
                     for box in stored.pair.boxes], np.float64).reshape(-1, 6)


class Detection(Problem):
    COLUMNS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
    CURVES = (("ap50", "validation AP at IoU 0.5"), ("ap", "validation AP"))
    SCORE = "ap"
    view, turns = BoxView, (0, 4)

    @staticmethod
    def find(config, data):
        """(pairs, classes) behind --data; none without it."""
        if not data:
            raise UsageError("--model %s needs --data: %s" % (config.model, boxed.LAYOUTS))
        return boxed.find(data, config.val_share, config.group_by)

    @staticmethod
    def check(config, train):
        if not any(entry.pair.boxes for entry in train):
            raise UsageError("none of the %d training images has a box: there is nothing to learn. Expected boxes on some: %s"
                             % (len(train), boxed.LAYOUTS))
        looked_at, lost = 0, 0
        for entry in train[:LOOKED_AT]:
            own = truth_of(entry)
            own = own[own[:, 5] == 0]
            own[:, 4] = np.arange(len(own))
            seen = set()
            for level, cells, _size in boxloss.windows(entry.height, entry.width):
                seen.update(np.unique(boxloss.targets(level, *cells, truth=own)[0]).tolist())
            looked_at, lost = looked_at + len(own), lost + len(own) - len(seen - {boxloss.NOTHING})
        if lost > LOST * looked_at:
            say("warning: no cell stands for %d of %d boxes of the first %d images at --res %d: they are too small, too thin or hidden behind "
                "smaller ones, and cannot be learned. A larger --res shows more" % (lost, looked_at, min(LOOKED_AT, len(train)), config.res))

    @staticmethod
    def build(config, outputs, kind):
        return fcos.build(config.model, config.width, kind, outputs, mode_settings(config).fusion)

    def views_to_batch(self, views, _rng, _epoch, _number):
        return BoxBatch(views, self.side, self.device)

    def objective(self, _state):
        return BoxLoss()

    def calibrate(self, net):
        rng = np.random.RandomState(self.config.seed)
        views, picks = self.drawn(rng, [0] * len(self.train), CALIBRATION_PATCHES)
        batch = self.views_to_batch(views, rng, 0, 0)
        return [("", lambda: [net.encoder(batch.chunk([pick]).pixels) for pick in picks])]

    def boxes(self, net, stored, rules):
        """What `net` finds in a Stored, by the path that edge-run takes: as boxes.detect()."""
        net.eval()
        return boxes.detect(stored.picture, self.recipe, rules, lambda pixels: evaluate.through(net.encoder, self.device, pixels),
                            lambda *given: evaluate.through(net.head, self.device, *given))

    def evaluate(self, net, stored, final=False):
        """COCO's average precision on a list of Stored, sizes of boxes in px at --res: see average_precision.evaluate."""
        rules = boxes.rules(self.config.max_boxes, SCORE_LEAST)
        return average_precision.evaluate([truth_of(entry) for entry in stored], [self.boxes(net, entry, rules) for entry in stored],
                                          len(self.classes.names), self.config.max_boxes)

    @staticmethod
    def row(result):
        return {name: result[name] for name in Detection.COLUMNS}

    @staticmethod
    def line(row):
        return "AP %.3f  AP50 %.3f" % (row["ap"], row["ap50"])

    def describe(self, result):
        return self.line(result) + "  AP75 %(ap75).3f  small %(ap_small).3f  medium %(ap_medium).3f  large %(ap_large).3f" % result

    def draw(self, net, stored, path):
        """Truth and what was found, side by side, as a picture in the file `path`."""
        rules = boxes.rules(self.config.max_boxes)
        small, names, palette = pictures.shown(stored.picture), self.classes.names, self.classes.palette
        scale = max(small.shape[:2]) / float(max(stored.height, stored.width))
        truth = truth_of(stored)
        truth = np.concatenate([truth[:, :4], np.ones((len(truth), 1)), truth[:, 4:5]], axis=1)
        panels = [(words, pictures.outlined(small, found, scale, names, palette))
                  for words, found in (("truth", truth), ("found", self.boxes(net, stored, rules)))]
        images.write_png(path, pictures.beside(panels))
