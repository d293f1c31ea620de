"""A contract and its loaded stages, as one function from a picture to a mask."""
import numpy as np

from edge import contract as contracts
from edge import scores


class Segmenter:
    """Class ids for pictures of any size. Use as a context manager, or close() it.

    contract, files: from contract.load; backend: from backends.choose; threads: 0 for all cores;
    resize: 'model' (frames are brought to the size the net was trained at) or 'none' (taken as they are)."""

    def __init__(self, contract, files, backend, threads=0, resize="model"):
        self.recipe = contracts.recipe(contract)
        if resize == "none":
            self.recipe = self.recipe._replace(resize="none")
        self.palette = [tuple(entry["colour"]) for entry in contract["classes"]]
        self.classes = [entry["name"] for entry in contract["classes"]]
        self._stages = {}
        for stage in contract["stages"]:
            loaded = self._stages[stage["name"]] = backend.Stage(files[stage["name"]], threads)
            for side in ("inputs", "outputs"):
                contracts.check_tensors(stage, side, loaded.tensors(side))

    def _run(self, stage, output, **inputs):
        """Run a stage on n tiles; the last one is repeated up to the batch that the net was exported with."""
        count = len(inputs["features"] if "features" in inputs else inputs["pixels"])
        spare = self.recipe.batch - count
        if spare:
            inputs = {name: array if name == "overview" else np.concatenate([array] + [array[-1:]] * spare)
                      for name, array in inputs.items()}
        return self._stages[stage].run(inputs)[output][:count]

    def encode(self, pixels):
        return self._run("encoder", "features", pixels=pixels)

    def score(self, pixels, overview, rows, cols):
        if overview is None:
            return self._run("net", "scores", pixels=pixels)
        features = self._run("encoder", "features", pixels=pixels)
        return self._run("head", "scores", features=features, overview=overview, rows=rows, cols=cols)

    def bands(self, picture, lap=lambda stage: None):
        """Yield class ids (h, W) uint8 of the rows of `picture` from the top, all rows once, in its own size."""
        for _y0, band in scores.score_bands(picture, self.recipe, self.encode, self.score, lap):
            labels = scores.labels_of(band)
            lap("decode")
            yield labels

    def mask(self, picture):
        """All of it: (H, W) uint8."""
        return np.concatenate(list(self.bands(picture)))

    def close(self):
        for stage in self._stages.values():
            stage.close()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()
