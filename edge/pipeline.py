"""A contract and its loaded stages, as one function from a picture to a mask."""
import numpy as np

from edge import boxes, glnet
from edge import contract as contracts
from edge import scores
from edge.command import say
from edge.errors import BadFile, UsageError
from edge.warp import path


class Segmenter:
    """Class ids for pictures of any size. Use as a context manager, or close() it.

    contract, files: from contract.load; backend: from backends.choose; threads: 0 for all cores;
    resize: 'model' (frames are brought to the size the net was trained at) or 'none' (taken as they are); still: how much a
    frame may differ for the samples' places to be used again, see path.Still; negative: never; score: least of a box; negative: the
    contract's.

    moves: whether a stage says where the samples lie; tiled: whether frames are cut into tiles; scale: above 0, what the side of
    such frames is multiplied by before, 1 unless set: masks have the frame's own size whatever it is; model: contract.identity."""

    def __init__(self, contract, files, backend, threads=0, resize="model", still=-1.0, score=-1.0):
        self.recipe, self.model = contracts.recipe(contract), contracts.identity(contract)
        if resize == "none":
            self.recipe = self.recipe._replace(resize="none")
        self.tiled, self.scale = contract["pipeline"] in contracts.TILED, 1.0
        self.moves, self._still = contract["pipeline"] == "deform", path.Still(still)
        self._warned, self._judged = False, None
        if still >= 0 and not self.moves:
            raise UsageError("--still %g: the model is of the pipeline %s, which does not move samples; expected one of deform. Leave "
                             "--still out" % (still, contract["pipeline"]))
        if resize == "none" and contract["pipeline"] == "whole" and contract["image"]["resize"] != "none":
            raise UsageError("--resize none: the model takes whole pictures, at the one size that it was trained at. Leave --resize out")
        if score >= 0 and contract["task"] != "detection":
            raise UsageError("--score %g: the model is for %s; expected one that finds boxes. Leave --score out" % (score, contract["task"]))
        self.palette = [tuple(entry["colour"]) for entry in contract["classes"]]
        self.classes = [entry["name"] for entry in contract["classes"]]
        self.session = backend.Session(contract, files, threads)
        try:
            for stage in contract["stages"]:
                for side in ("inputs", "outputs"):
                    contracts.check_tensors(stage, side, self.session.tensors(stage["name"], side))
        except BadFile:
            self.close()
            raise

    def _full(self, array):
        """n tiles as the batch that the net was exported with: the last one is repeated."""
        if not isinstance(array, np.ndarray):
            return array  # a backend's own, which is full
        spare = self.recipe.batch - len(array)
        return np.concatenate([array] + [array[-1:]] * spare) if spare else array

    def encode(self, pixels):
        return self.session.hold(self.session.run("encoder", {"pixels": self._full(pixels)}, keep=True)["features"])

    def score(self, pixels, overview, rows, cols):
        if overview is None:
            return self.session.run("net", {"pixels": self._full(pixels)}, keep=True)["scores"]
        features = self.session.run("encoder", {"pixels": self._full(pixels)}, keep=True)["features"]
        return self.session.run("head", {"features": features, "overview": overview, "rows": self._full(rows),
                                         "cols": self._full(cols)}, keep=True)["scores"]

    def logits(self, image):
        return self.session.run("deform", {"image": image})["logits"][0, 0]

    def score_samples(self, samples):
        return self.session.run("net", {"samples": samples}, keep=True)["scores"]

    def score_bands(self, picture, lap=lambda stage: None):
        """Yield (y0, scores) as edge.scores.score_bands: in the form that session.pixels.scores() and labels() take."""
        if isinstance(self.recipe, path.WarpRecipe):
            return path.score_bands(*self._warped(picture, lap))
        return scores.score_bands(picture, self._scaled(picture), self.encode, self.score, lap, self.session.pixels)

    def _scaled(self, picture):
        """The recipe that makes fewer tiles of `picture`, by self.scale."""
        recipe = self.recipe
        if self.scale == 1:
            return recipe
        rule, px = ("long", max(picture.height, picture.width)) if recipe.resize == "none" else (recipe.resize, recipe.resize_px)
        return recipe._replace(resize=rule, resize_px=max(1, int(round(px * self.scale))))

    def bands(self, picture, lap=lambda stage: None):
        """Yield class ids (h, W) uint8 of the rows of `picture` from the top, all rows once, in its own size."""
        if isinstance(self.recipe, path.WarpRecipe):
            for _y0, labels in path.label_bands(*self._warped(picture, lap)):
                yield labels
            return
        for _y0, band in self.score_bands(picture, lap):
            labels = self.labels(band)
            lap("decode")
            yield labels

    def infer(self, picture, lap=lambda stage: None):
        """All that is computed of a picture, and nothing written."""
        for _labels in self.bands(picture, lap):
            pass

    @property
    def kinds(self):
        """How many ids decoded() has."""
        return max(2, len(self.classes))

    def decoded(self, found):
        """Class ids of scores (C, h, W) in the host's memory."""
        return scores.labels_of(found)

    def labels(self, band):
        """Class ids (h, W) of what score_bands yields."""
        return self.session.pixels.labels(band)

    def _warped(self, picture, lap):
        return picture, self.recipe, self.logits if self.moves else None, self.score_samples, lap, self._still, self.session.pixels

    @property
    def positions(self):
        """Where the samples of the last frame lay, (th, tw, 2) in u; None for a net that does not move any."""
        return self._still.positions

    def blend(self, pixels, labels):
        """Class colours over (h, w, 3) uint8 pixels, as images.blend."""
        return self.session.pixels.blend(pixels, labels, self.palette)

    def mask(self, picture):
        """All of it: (H, W) uint8."""
        return np.concatenate(list(self.bands(picture)))

    def results(self, frame, picture, sinks, lap):
        """One frame into the sinks. Returns what its line says of it."""
        mask, overlay, counts = sinks.write_bands(frame, picture, self.bands(picture, lap), lap, self.blend)
        samples = None
        if self.positions is not None:
            self._warn(frame)
            samples = sinks.write_samples(frame, overlay, self.positions, self.recipe)
        lap("write")
        return {"mask": mask, "overlay": overlay, "samples": samples,
                "area": {name: float(n) / counts.sum() for name, n in zip(self.classes, counts)}}

    def _warn(self, frame):
        """Say, once, that samples have collapsed: where there are none, things are missed."""
        if self._warned or self.positions is self._judged:  # of a still scene, the places of the frame before
            return
        self._judged = self.positions
        self._warned, crowded, folded = path.faults(self.positions, self.recipe)
        if self._warned:
            say("warning: %.1f %% of the samples of %s have collapsed onto each other, %.1f %% are folded over: things may be missed where there "
                "are none. Is it an image like those of training? This is said once" % (100 * crowded, frame.origin, 100 * folded))

    def attempt(self, work):
        """work(), which takes one frame through this pipeline. One with another model at hand may call it again: edge.shelf."""
        return work()

    def close(self):
        self.session.close()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()


class Branches(Segmenter):
    """Class ids from two nets that see each other's maps (edge.glnet). As a Segmenter otherwise."""

    def score_bands(self, picture, lap=lambda stage: None):
        return glnet.score_bands(picture, self._scaled(picture), self, lap, self.session.pixels)

    def look(self, pixels):
        found = self.session.run("overview", {"pixels": pixels}, keep=True)
        return found["maps"], found["deep"], _on_host(found["rough"])

    def work(self, pixels, maps, rows, cols):
        given = {"pixels": self._full(pixels), "maps": maps, "rows": self._full(rows), "cols": self._full(cols)}
        return self.session.run("local", given, keep=True)["part"]

    def merge(self, pixels, maps, rows, cols, put_rows, put_cols, merged):
        if merged is None:
            merged = np.zeros(getattr(maps, "host", maps).shape, np.float32)
        spare = [(0, self.recipe.batch - len(rows)), (0, 0)]  # what fills a batch up is put nowhere
        found = self.session.run("local", {
            "pixels": self._full(pixels), "maps": maps, "rows": self._full(rows), "cols": self._full(cols),
            "put_rows": np.pad(put_rows, spare, mode="constant"), "put_cols": np.pad(put_cols, spare, mode="constant"),
            "merged": merged}, keep=True)
        return _on_host(found["part"])[:len(rows)], self.session.hold(found["sum"])

    def deepen(self, pixels, merged):
        return self.session.run("whole", {"pixels": pixels, "merged": merged}, keep=True)["deep"]

    def fuse(self, part, deep, rows, cols):
        given = {"part": self._full(part), "deep": deep, "rows": self._full(rows), "cols": self._full(cols)}
        return self.session.run("fusion", given)["scores"]


def _on_host(value):
    return value if isinstance(value, np.ndarray) else value.get()


class Classifier(Segmenter):
    """A label for every picture, from the grid of its tiles. As a Segmenter otherwise."""

    def __init__(self, contract, files, backend, threads=0, resize="model", still=-1.0, score=-1.0):
        if resize != "model":
            raise UsageError("--resize %s: the model labels whole pictures, which it takes at one size. Leave --resize out" % resize)
        super().__init__(contract, files, backend, threads, resize, still, score)

    def score_bands(self, picture, lap=lambda stage: None):
        """Yield (0, scores (C, 1, 1)): what parity and proof compare."""
        found = scores.grid_scores(picture, self.recipe, self._vectors, self._head, lap, self.session.pixels)
        yield 0, np.array(found)[:, None, None]

    def _vectors(self, pixels):
        return self.session.run("encoder", {"pixels": self._full(pixels)})["features"]

    def _head(self, cells, g):
        return self.session.run("head", {"cells": cells} if g is None else {"cells": cells, "overview": g})["scores"]

    def results(self, frame, picture, sinks, lap):
        shares = self.shares(picture, lap)
        label = self.classes[int(shares.argmax())]
        words = "%s  %.0f %%" % (label, 100 * shares.max())

        def paint(small, _scale):
            from edge.warp import pictures  # pens and fonts cost nothing where nothing is drawn
            return pictures.beside([(words, small)])
        overlay = sinks.write_sheet(frame, paint)
        lap("write")
        return {"mask": None, "overlay": overlay, "samples": None, "label": label,
                "scores": {name: float(share) for name, share in zip(self.classes, shares)}}

    def infer(self, picture, lap=lambda stage: None):
        self.shares(picture, lap)

    def shares(self, picture, lap=lambda stage: None):
        """(C,) float: how likely each class is."""
        (_y0, found), = self.score_bands(picture, lap)
        boxes.demand_finite(found)
        powers = np.exp(found[:, 0, 0] - found.max())
        lap("decode")
        return powers / powers.sum()


class Detector(Segmenter):
    """Boxes of every picture, from tiles at their place in a pyramid of maps. As a Segmenter otherwise."""

    def __init__(self, contract, files, backend, threads=0, resize="model", still=-1.0, score=-1.0):
        self.rules = boxes.Rules(**contract["boxes"])
        if score >= 0:
            self.rules = self.rules._replace(score=score)
        super().__init__(contract, files, backend, threads, resize, still, score)

    def score_bands(self, picture, lap=lambda stage: None):
        """Yield (0, scores (classes + 5, 1, cells)), all cells of all levels: what parity and proof compare."""
        parts = [part.reshape(len(part), 1, -1) for _level, _y, _x, part in
                 boxes.windows(picture, self._scaled(picture), self._cells, self._head, lap, self.session.pixels)]
        yield 0, np.concatenate(parts, axis=2)

    @property
    def kinds(self):
        return len(self.classes) + 1

    def decoded(self, found):
        """Of every cell: 0 for no box, else its likeliest class + 1. Which class is likeliest where nothing is, is noise."""
        likely = boxes.likelihood(found)
        return np.where(likely.max(axis=0) > self.rules.score, likely.argmax(axis=0) + 1, 0).astype(np.uint8)

    def labels(self, band):
        return self.decoded(band)

    def _cells(self, pixels):
        return self.session.run("encoder", {"pixels": self._full(pixels)})["features"]

    def _head(self, cells, context, inside):
        given = {"cells": cells, "inside": inside}
        return self.session.run("head", given if context is None else dict(given, context=context))["scores"]

    def infer(self, picture, lap=lambda stage: None):
        """The boxes: see boxes.detect()."""
        return boxes.detect(picture, self._scaled(picture), self.rules, self._cells, self._head, lap, self.session.pixels)

    def results(self, frame, picture, sinks, lap):
        found = self.infer(picture, lap)

        def paint(small, scale):
            from edge.warp import pictures  # pens and fonts cost nothing where nothing is drawn
            return pictures.outlined(small, found, scale, self.classes, self.palette)
        overlay = sinks.write_sheet(frame, paint)
        lap("write")
        return {"mask": None, "overlay": overlay, "samples": None, "boxes": [
            {"class": self.classes[int(box[5])], "score": float(box[4]), "box": [round(side, 2) for side in box[:4].tolist()]}
            for box in found]}


KINDS = {"grid": Classifier, "boxes": Detector, "glnet": Branches}


def of(contract):
    """The class whose objects run this contract's model."""
    return KINDS.get(contract["pipeline"], Segmenter)
