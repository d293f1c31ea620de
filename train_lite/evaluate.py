"""Predict stored images with a net and score them: the same path from pixels to labels as edge-run's."""
import numpy as np
import torch

from edge import scores
from train_lite import metrics
from train_lite.patches import MEAN, STD


def recipe(settings, tile, batch):
    """The Recipe (edge.scores) of a net trained with `settings` (config.ModeSettings) on tiles of `tile` px."""
    return scores.Recipe(settings.resize, settings.resize_px, tile, settings.overlap, batch,
                         tile if settings.fusion != "none" else 0, MEAN, STD)


def torch_functions(net, device):
    """`net` as the two functions (encode, score) that edge.scores.score_bands takes."""
    net.eval()

    def tensor(array):
        return None if array is None else torch.from_numpy(array).to(device)

    def encode(pixels):
        with torch.no_grad():
            return net.encoder(tensor(pixels))

    def score(pixels, g, rows, cols):
        with torch.no_grad():
            return net(tensor(pixels), g, tensor(rows), tensor(cols)).cpu().numpy()

    return encode, score


def label_bands(net, picture, how, device):
    """Yield (y0, class ids (h, W) uint8) for the rows of `picture`, from the top. how: a Recipe."""
    for y0, band in scores.score_bands(picture, how, *torch_functions(net, device)):
        yield y0, scores.labels_of(band)


def evaluate(net, stored, how, classes, device):
    """Score `net` on a list of Stored. Returns the dict of metrics.summarise."""
    matrices = []
    for entry in stored:
        matrix = np.zeros((classes, classes), np.int64)
        for y0, labels in label_bands(net, entry.picture, how, device):
            truth = entry.labels.window(y0, 0, y0 + len(labels), entry.width)
            matrix += metrics.confusion(truth, labels, classes)
        matrices.append(matrix)
    return metrics.summarise(matrices)
