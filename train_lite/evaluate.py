"""Predict stored images with a net and score them: the same path from pixels to labels as edge-run's."""
import numpy as np
import torch

from edge import glnet, scores
from edge.command import say
from edge.warp import path, reference
from train_lite import metrics
from train_lite.patches import MEAN, STD
from train_lite.samplers import marin
from train_lite.samplers.deform import Sampler, oracle_logits


def recipe(settings, tile, batch):
    """The Recipe (edge.scores) of a net trained with `settings` (config.ModeSettings) on tiles of `tile` px; that of
    edge.glnet of one of two branches, the WarpRecipe (edge.warp.path) of one that sees samples."""
    if settings.task:
        return path.WarpRecipe(settings.resize, settings.resize_px, settings.task, settings.density, settings.radius, MEAN, STD)
    own = scores.Recipe(settings.resize, settings.resize_px, tile, settings.overlap, batch,
                        tile if settings.fusion != "none" else 0, MEAN, STD)
    return glnet.Recipe(*own + (settings.merges, settings.coarse)) if settings.fusion == "maps" else own


def torch_functions(net, device):
    """`net` as the two functions (encode, score) that edge.scores.score_bands takes."""
    net.eval()
    return lambda pixels: computed(net.encoder, device, pixels), lambda *given: through(net, device, *given)


def computed(part, device, *given):
    """What `part` of a net makes of numpy arrays, tensors or None, without graph."""
    with torch.no_grad():
        return part(*[torch.from_numpy(one).to(device) if isinstance(one, np.ndarray) else one for one in given])


def through(part, device, *given):
    """computed(), as a numpy array."""
    return computed(part, device, *given).cpu().numpy()


class Branches:
    """A GLNet as edge.glnet.score_bands takes it."""

    def __init__(self, net, device):
        self._net, self._device = net.eval(), device

    def look(self, pixels):
        maps, deep, rough = computed(self._net.look, self._device, pixels)
        return maps, deep, rough.cpu().numpy()

    def work(self, *given):
        return computed(self._net.work, self._device, *given)

    def merge(self, pixels, maps, *rest):
        merged = torch.zeros_like(maps) if rest[-1] is None else rest[-1]
        part, merged = computed(self._net.merge, self._device, pixels, maps, *rest[:-1] + (merged,))
        return part.cpu().numpy(), merged

    def deepen(self, *given):
        return computed(self._net.deepen, self._device, *given)

    def fuse(self, *given):
        return through(self._net.fuse_large, self._device, *given)


def warp_functions(net, sampler, stored, device):
    """A WarpNet as the two functions (logits_of, score) that edge.warp.path takes, for the image `stored`."""
    net.eval()
    if sampler.kind == "edge-oracle":
        logits_of = lambda pixels: oracle_logits(stored.edges(*sampler.size))  # noqa: E731
    elif sampler.kind == "marin":
        logits_of = lambda pixels: through(net.deform, device, pixels)[0]  # noqa: E731
    else:
        logits_of = net.deform and (lambda pixels: through(net.deform, device, pixels)[0, 0])
    return logits_of, lambda pixels: through(net, device, pixels)


def _nodes(moves, recipe):
    """Of --sampler marin: how its nodes move -> where samples lie, as edge.warp.path takes it."""
    return marin.grid(torch.from_numpy(moves), *recipe.task).numpy()


class Seen(path.WarpHost):
    """Remembers of an image, once its first band is there: positions (th, tw, 2), edge.warp.reference.grid; samples
    (1, 3, th, tw) float32, normalised; scores (C, th, tw) float32, the net's."""

    def sampled(self, view, positions, recipe):
        self.positions, self.samples = positions, super().sampled(view, positions, recipe)
        return self.samples

    def unwarp_labels(self, found, positions, height, width):
        self.scores = found[0]
        return super().unwarp_labels(found, positions, height, width)

    def pixels(self):
        """The samples as a picture: (th, tw, 3) uint8."""
        return np.clip((np.moveaxis(self.samples[0], 0, 2) * STD + MEAN) * 255 + 0.5, 0, 255).astype(np.uint8)


def predict(net, stored, how, device):
    """A Stored through `net`. how: a Recipe, of edge.scores or edge.glnet, or a deform.Sampler. Returns (bands, seen): bands yields (y0, class ids (h, W)
    uint8) for all rows, from the top; seen: the Seen of a Sampler, None of a Recipe."""
    if isinstance(how, Sampler):
        seen, place = Seen(), _nodes if how.kind == "marin" else path.by_density
        logits_of, score = warp_functions(net, how, stored, device)
        return path.label_bands(stored.picture, how.recipe, logits_of, score, pixels=seen, place=place), seen
    if isinstance(how, glnet.Recipe):
        bands = glnet.score_bands(stored.picture, how, Branches(net, device))
    else:
        bands = scores.score_bands(stored.picture, how, *torch_functions(net, device))
    return ((y0, scores.labels_of(band)) for y0, band in bands), None


def label_bands(net, stored, how, device):
    """The bands of predict()."""
    return predict(net, stored, how, device)[0]


def evaluate(net, stored, how, classes, device, final=False):
    """Score `net` on a list of Stored. final: whether a run ends with this; then also what takes more time.

    Returns the dict of metrics.summarise, and 'boundary_f1': a float; of a net of patches None but at the end. For a Sampler
    also what SampleScores.summary gives. All but that is about every pixel of the images."""
    edges = np.zeros((classes, 4), np.int64)
    samples = SampleScores(how, classes) if isinstance(how, Sampler) else None

    def matrices():
        for entry in stored:
            bands, seen = predict(net, entry, how, device)
            boundaries = metrics.Boundaries(classes, entry.height, entry.width) if samples or final else None
            yield confusion(entry, bands, classes, boundaries)
            if boundaries:
                edges[:] += boundaries.counts()
            if samples:
                samples.add(entry, seen, final)

    result = dict(metrics.summarise(matrices()), boundary_f1=metrics.boundary_f1(edges) if samples or final else None)
    if samples:
        result.update(samples.summary())
    return result


def confusion(stored, bands, classes, boundaries=None):
    """metrics.confusion of bands as predict() gives them. boundaries: a metrics.Boundaries that is shown them too."""
    matrix = np.zeros((classes, classes), np.int64)
    for y0, labels in bands:
        truth = stored.labels.window(y0, 0, y0 + len(labels), stored.width)
        matrix += metrics.confusion(truth, labels, classes)
        if boundaries:
            boundaries.add(truth, labels)
    return matrix


def describe(result, how):
    """What evaluate() gave, in one line. how: as for evaluate()."""
    text = "IoU %.3f  F1 %.3f" % (result["pooled"]["iou"], result["pooled"]["f1"])
    if result["boundary_f1"] is not None:
        text += "  boundary F1 %.3f" % result["boundary_f1"]
    if "low_res" in result:
        text += " | at %dx%d %.3f" % (how.recipe.task[::-1] + (result["low_res"]["iou"],))
        if result["ceiling"]:
            text += " | label round trip %.3f" % result["ceiling"]["iou"]
    return text


class SampleScores:
    """What tells the net's share in the scores of a Sampler from that of the samples' places."""

    def __init__(self, sampler, classes):
        self.recipe, self.kind, self.classes = sampler.recipe, sampler.kind, classes
        self.low, self.best, self.faults = 0, None, []  # sums of matrices; of each image

    def add(self, stored, seen, ceiling):
        """An image. seen: its Seen. ceiling: whether to compute that: as long again as to un-warp the net's scores."""
        labels = reference.sample_labels(stored.labels, seen.positions)
        self.low = self.low + metrics.confusion(labels, scores.labels_of(seen.scores), self.classes)
        self.faults.append(path.faults(seen.positions, self.recipe) + (stored.pair.name,))
        if ceiling:
            votes = (labels == np.arange(self.classes)[:, None, None]).astype(np.float32)  # of IGNORE: for no class
            bands = reference.unwarp_labels(votes, seen.positions, stored.height, stored.width)
            found = confusion(stored, bands, self.classes)
            self.best = found if self.best is None else self.best + found

    def summary(self):
        """'low_res': {'iou', 'f1'} of the net's own output against the labels at the samples; 'ceiling': of those labels,
        un-warped, against all pixels, None unless asked for; 'faulty': how many images waste samples, which is said too.

        Ceiling is what a net comes to that is right at every sample and sure of it. Where things are as thin as samples are
        apart, one that is less sure may pass it: its scores say where between two samples a class ends."""
        faulty = sorted((entry for entry in self.faults if entry[0]), key=lambda entry: entry[1:])
        if faulty:
            _wrong, crowded, folded, name = faulty[-1]
            say("warning: samples of %d of %d images have collapsed onto each other (worst: %s, %.1f %% of its samples, %.1f %% folded over): "
                "a smaller --%s may spread them" % (len(faulty), len(self.faults), name, 100 * crowded, 100 * folded,
                                                    "lr" if self.kind == "marin" else "radius"))
        return {"low_res": _iou_f1(self.low), "ceiling": None if self.best is None else _iou_f1(self.best), "faulty": len(faulty)}


def _iou_f1(matrix):
    pooled = metrics.summarise([matrix])["pooled"]
    return {name: pooled[name] for name in ("iou", "f1")}
