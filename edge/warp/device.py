"""Samples and un-warped scores in a GPU's memory: what edge.warp.path.WarpHost does in the host's, with the same results bit for
bit. Positions and their inverse are the host's: a few thousand numbers in float32, which no half precision touches."""
import os

import numpy as np

from edge import images
from edge.kernels import Kernels
from edge.kernels.device import Device, Picture
from edge.warp import reference
from edge.warp.path import WarpHost

WARP = {"sample_float": "PiiPiiffffffP", "sample_half": "PiiPiiffffffP", "unwarp_scores": "PiiiPiiiiiP",
        "unwarp_labels": "PiiiPiiiiiP"}


class WarpDevice(Device):
    """As Device; samples: the Buffer of the net's input (1, 3, th, tw)."""

    def __init__(self, gpu, samples, channels, kind):
        super().__init__(gpu, samples, channels, kind)
        self._samples = samples
        self._launch = Kernels(gpu, os.path.join(os.path.dirname(os.path.abspath(__file__)), "warp.cu"), WARP).launch

    def pixels_of(self, picture):
        """What fitted() gave as an array (h, w, 3) uint8."""
        if not isinstance(picture, Picture):
            return images.whole(picture)
        array = np.empty((picture.height, picture.width, 3), np.uint8)
        self.gpu.stream.synchronize()
        self.gpu.driver.memcpy_dtoh(array, picture.address)
        return array

    def sampled(self, view, positions, recipe):
        """A picture's samples in the net's input buffer."""
        if not isinstance(view, Picture):
            return WarpHost.sampled(self, view, positions, recipe)
        (rows, cols), kernel = recipe.task, "sample_half" if self._samples.host.dtype == np.float16 else "sample_float"
        scale, shift = images.scale_shift(recipe.mean, recipe.std)
        self._launch(kernel, (cols, rows), view.address, view.height, view.width, self.sent("positions", positions), rows, cols, *(
            [float(v) for v in scale] + [float(v) for v in shift] + [self._samples.address]))
        return self._samples

    def unwarp(self, found, positions, height, width):
        """reference.unwarp of a net's scores, a Buffer (1, C, th, tw)."""
        return self._unwarped("unwarp_scores", (self.channels,), np.float32, found, positions, height, width)

    def unwarp_labels(self, found, positions, height, width):
        """reference.unwarp_labels of a net's scores, a Buffer (1, C, th, tw)."""
        return self._unwarped("unwarp_labels", (), np.uint8, found, positions, height, width)

    def _unwarped(self, kernel, channels, dtype, found, positions, height, width):
        step, (rows, cols) = reference.mesh_step(positions, height, width), positions.shape[:2]
        mesh = self.sent("mesh", reference.inverse(positions, height, width, step))
        for first, last in reference.bands(height, width, step):
            y0, count = first * step, min(last * step, height) - first * step
            out = self.buffer("un-warped", int(np.prod(channels + (count, width))) * np.dtype(dtype).itemsize)
            self._launch(kernel, (width, count), found.address, self.channels, rows, cols, mesh, step, height, width, y0, count,
                         out.address)
            yield y0, out.get_first(channels + (count, width), dtype)
