"""The demo set: thin branching vessels over uneven light, as PNG files of any size.

Detail matters: vessels are 2 to 7 px wide at every image size, so a shrunken image loses them. Context matters: the
same threads go on beyond the border of the tissue, and there they are not vessels; light changes as much as the
tissue's own colour does, so the border is plain in the whole image and faint in a patch of it.
Images are drawn in bands of rows: the size is limited by the disk only."""
import json
import os
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from edge.command import say, written
from edge.errors import BadFile
from edge.images import PngWriter, pixels_of
from train_lite.data.dataset import SPLITS

VERSION = 1
BAND = 128
MARGIN = 8   # px drawn beyond a band, so that the blur of its border is right


def sizes(res, images):
    """How many images for train, val, test. images 0: 16 at 1024 px and below, fewer above, at least 4."""
    total = images or int(min(16, max(4, 16 * (1024.0 / res) ** 2)))
    val = max(1, total // 5)
    return total - val - 1, val, 1


def make(folder, res, images=0, seed=0):
    """Write the set to folder/{train,val,test}/{image,mask}/NNN.png unless it is there already. Returns folder."""
    counts = sizes(res, images)
    facts = {"version": VERSION, "res": res, "counts": list(counts), "seed": seed}
    stamp = os.path.join(folder, "demo.json")
    if os.path.exists(stamp):
        with open(stamp, encoding="utf-8") as handle:
            if json.load(handle) == facts:
                return folder
        raise BadFile("%s holds another demo set; delete that folder, or give --data" % folder)
    say("drawing the demo set: %d images of %d px in %s" % (sum(counts), res, folder))
    number = 0
    for split, count in zip(SPLITS, counts):
        names = ["%03d.png" % one for one in range(number, number + count)]
        for kind in ("image", "mask"):
            place = os.path.join(folder, split, kind)
            os.makedirs(place, exist_ok=True)
            for left in set(os.listdir(place)) - set(names):  # by one that was cut off, perhaps of another split now
                if re.match(r"\d{3,}\.png$", left):
                    os.remove(os.path.join(place, left))
        for name in names:
            draw(os.path.join(folder, split, "image", name), os.path.join(folder, split, "mask", name), res, (seed, number))
            number += 1
    with written(stamp) as handle:  # last: a set without it is not complete
        json.dump(facts, handle)
    return folder


def draw(image_path, mask_path, res, seed, height=0):
    """One image and its mask, res x res px, or its first `height` rows. seed: tuple of ints; the same seed gives the same
    picture."""
    height = height or res
    rng = np.random.RandomState(np.array(seed, np.uint32))
    threads = _threads(rng, res)
    waves = [(rng.uniform(0.5, 2.5, 2) * rng.choice([-1, 1], 2) * 2 * np.pi, rng.uniform(0, 7)) for _ in range(4)]
    centre, radius = rng.uniform(0.42, 0.58, 2), rng.uniform(0.40, 0.46)
    lobes = [(rng.uniform(0.03, 0.09), n, rng.uniform(0, 7)) for n in (2, 3, 5)]
    with PngWriter(image_path, height, res, 3) as image, PngWriter(
            mask_path, height, res, 1, [(0, 0, 0), (255, 255, 255)]) as mask:
        for y0 in range(0, height, BAND):
            y1 = min(height, y0 + BAND)
            y, x = np.ogrid[(y0 + 0.5) / res:(y1 - 0.5) / res:(y1 - y0) * 1j, 0.5 / res:1 - 0.5 / res:res * 1j]
            light = 0.72 + 0.07 * sum(np.cos(f[0] * y + f[1] * x + phase) for f, phase in waves)
            angle = np.arctan2(y - centre[0], x - centre[1])
            border = radius + sum(a * np.cos(n * angle + phase) for a, n, phase in lobes)
            tissue = np.hypot(y - centre[0], x - centre[1]) < border
            solid, soft = _band(threads, y0, y1, res)
            colour = np.where(tissue[..., None], (0.84, 0.51, 0.40), (0.78, 0.55, 0.45))
            grain = np.random.RandomState(np.array(tuple(seed) + (y0,), np.uint32)).normal(0, 0.035, (y1 - y0, res, 1))
            shade = light[..., None] * (1 - soft[..., None] * np.array((0.22, 0.34, 0.26))) + grain
            image.write(np.clip(colour * shade * 255, 0, 255).astype(np.uint8))
            mask.write((solid & tissue).astype(np.uint8))


def _threads(rng, res):
    """Branching threads as segments: (n, 5) float, x0 y0 x1 y1 width in px."""
    segments = []
    for _ in range(max(2, int(round(16 * (res / 1024.0) ** 2)))):
        todo = [(rng.uniform(0, res), rng.uniform(0, res), rng.uniform(0, 2 * np.pi), rng.uniform(4.5, 7.0))]
        while todo:
            x, y, heading, width = todo.pop()
            bend = rng.uniform(-0.02, 0.02)
            for step in range(int(30 * width)):
                heading += rng.normal(bend, 0.12)
                nx, ny = x + 6 * np.cos(heading), y + 6 * np.sin(heading)
                segments.append((x, y, nx, ny, width))
                x, y, width = nx, ny, width * 0.994
                if not (-20 < x < res + 20 and -20 < y < res + 20) or width < 1.8:
                    break
                if step > 8 and width > 2.2 and rng.rand() < 0.035:
                    todo.append((x, y, heading + rng.choice([-1, 1]) * rng.uniform(0.4, 1.1), width * rng.uniform(0.55, 0.8)))
    return np.array(segments)


def _band(threads, y0, y1, res):
    """The threads in the rows y0..y1: solid (h, res) bool, the truth; soft (h, res) float 0..1, with blurred edges."""
    high, low = np.maximum(threads[:, 1], threads[:, 3]), np.minimum(threads[:, 1], threads[:, 3])
    near = threads[(high > y0 - MARGIN - 8) & (low < y1 + MARGIN + 8)]
    canvas = Image.new("L", (res, y1 - y0 + 2 * MARGIN))
    pen = ImageDraw.Draw(canvas)
    for ax, ay, bx, by, width in near:
        ay, by = ay - y0 + MARGIN, by - y0 + MARGIN
        pen.line((ax, ay, bx, by), fill=255, width=max(2, int(round(width))))
        half = width / 2
        if half > 1:
            pen.ellipse((bx - half, by - half, bx + half, by + half), fill=255)  # joins the segments
    rows = slice(MARGIN, MARGIN + y1 - y0)
    soft = pixels_of(canvas.filter(ImageFilter.GaussianBlur(1.0)))[rows].astype(np.float32) / 255
    return pixels_of(canvas)[rows] > 127, soft
