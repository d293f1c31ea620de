"""From a picture to class ids by way of samples: the one path that training's evaluation, the parity check and the runtime share.

As edge.scores, callers differ in who computes a net, and pass it in as functions."""
from typing import NamedTuple

import numpy as np

from edge import images, scores
from edge.warp import reference

# When samples are said to be wasted. What one point of a density draws to itself is what lies within its radius: 2 % of the
# samples at --radius 0.0625, 27 % at 0.25, so a limit in shares of all samples would never be met, or always. In shares of
# what a point can draw, densities trained on the seeded set and on vessels come to 0, their smallest cells to 0.018; a
# single node to 0.12 (near a corner, where its mirror image draws too) and, mostly, to 0.4 and more.
CROWDED = 0.1     # of them on top of each other
LEAST_CROWD = 16  # cells of them: fewer are no loss
FOLDED = 0.01     # of the grid's cells turned over: trained ones have none; un-warping takes the first of two samples


class WarpRecipe(NamedTuple):
    """How the two nets want their pixels."""
    resize: str      # 'none' | 'long' | 'stretch': images.fitted_size, of the image that is sampled
    resize_px: int
    task: tuple      # (height, width) px of the segmentation net's input: samples
    density: tuple   # (height, width) px of the deformation net's input
    radius: tuple    # of the density's pull, its rows and columns
    mean: tuple      # of x/255, RGB
    std: tuple


class Still:
    """Places of samples that are used again while the scene is still: while the small image differs from the one that they were
    made for by at most `threshold` of 255, on average over its values; never again when it is negative. positions: the last
    places, (th, tw, 2); None before there are any."""

    def __init__(self, threshold):
        self.threshold, self._small, self.positions = threshold, None, None

    def find(self, small):
        """The positions kept, or None when `small` (h, w, 3) uint8 is another scene."""
        if self._small is None or self._small.shape != small.shape:
            return None
        apart = np.abs(self._small.astype(np.int16) - small).mean()
        return self.positions if apart <= self.threshold else None

    def keep(self, small, positions):
        self._small, self.positions = small, positions


class WarpHost(scores.Host):
    """Pixels, samples and scores in the host's memory. edge.warp.device does the same on a GPU."""

    def pixels_of(self, picture):
        """What fitted() gave as an array (h, w, 3) uint8."""
        return images.whole(picture)

    def sampled(self, view, positions, recipe):
        """A picture's samples as the net takes them: (1, 3, th, tw) float32."""
        return images.normalise(reference.sample(view, positions)[None], recipe.mean, recipe.std)

    def unwarp(self, found, positions, height, width):
        """reference.unwarp of a net's scores (1, C, th, tw)."""
        return reference.unwarp(np.asarray(found)[0], positions, height, width)

    def unwarp_labels(self, found, positions, height, width):
        """reference.unwarp_labels of a net's scores (1, C, th, tw)."""
        return reference.unwarp_labels(np.asarray(found)[0], positions, height, width)


def by_density(logits, recipe):
    """Where samples lie by density logits (h, w): (th, tw, 2)."""
    return reference.grid(reference.softmax(logits), *(recipe.task + recipe.radius))


def look(picture, recipe, logits_of, lap, still, pixels, place):
    """(view, positions): the picture at the size that is sampled, and where its samples lie, (th, tw, 2).

    logits_of(pixels (1, 3, h, w) float32) -> density logits (h, w), or what else place(logits, recipe) makes positions of;
    None: samples stay where they are."""
    view = scores.view_of(picture, recipe, pixels)
    if logits_of is None:
        lap("prepare")
        return view, reference.own_positions(*recipe.task)
    lap("prepare")
    small = pixels.pixels_of(pixels.fitted(view, *recipe.density))
    positions = still and still.find(small)
    if positions is None:
        ready = images.normalise(small[None], recipe.mean, recipe.std)
        positions = place(logits_of(ready), recipe)
        if still:
            still.keep(small, positions)
    lap("look")
    return view, positions


def faults(positions, recipe):
    """(whether too many samples are wasted, shares of the grid's cells whose samples are on top of each other, and that are
    folded) of a grid (th, tw, 2) made by a density as in the WarpRecipe."""
    found, samples = reference.faults(positions), positions[..., 0].size
    drawn = np.prod([min(1.0, (2 * reach + 1.0) / nodes) for reach, nodes in zip(recipe.radius, recipe.density)])
    crowded, folded = found.crowded, found.folded / float(samples)
    return crowded > max(CROWDED * drawn, LEAST_CROWD / float(samples)) or folded > FOLDED, crowded, folded


def score_bands(picture, recipe, logits_of, score, lap=lambda stage: None, still=None, pixels=None, place=by_density,
                labels=False):
    """Yield (y0, scores (C, h, W) float32) of the rows of `picture` from the top, all rows, in its own size; with labels the
    class ids (h, W) uint8 in their place, which is much faster.

    logits_of, place: see look(); score(pixels (1, 3, th, tw) float32) -> (1, C, th, tw) float32; lap(stage) is called when a stage of
    work ends; still: a Still or None; pixels: where they are held, a WarpHost unless given."""
    pixels = pixels or WarpHost()
    lap = pixels.timed(lap)
    view, positions = look(picture, recipe, logits_of, lap, still, pixels, place)
    samples = pixels.sampled(view, positions, recipe)
    lap("sample")
    found = score(samples)
    lap("run")
    for y0, band in (pixels.unwarp_labels if labels else pixels.unwarp)(found, positions, picture.height, picture.width):
        lap("unwarp")
        yield y0, band


def label_bands(*given, **more):
    """score_bands() with labels."""
    return score_bands(*given, labels=True, **more)
