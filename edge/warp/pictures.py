"""Where samples lie, as pictures: their density over the image, what the net sees, and the grid."""
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edge import images
from edge.geometry import nearest_index
from edge.warp import reference

SIDE_PX = 512  # longer side of one panel
BAR_PX = 18    # above it, with a few words
GAP_PX = 4     # beside and below it
LINES = 24     # of a grid that are drawn each way, about
LINE_PX = 8    # between two of them, at least
# colours of log2 of a density, 0: as dense as undeformed
HEAT = ((-2, (0, 0, 0)), (0, (70, 20, 120)), (1.5, (210, 50, 60)), (3, (255, 160, 20)), (5, (255, 255, 210)))


def shown(picture, side_px=SIDE_PX):
    """A picture of edge.images, shrunk to at most side_px: (h, w, 3) uint8."""
    longest = max(picture.height, picture.width)
    return images.whole(images.resized(picture, *images.fitted_size(picture.height, picture.width, "long", min(side_px, longest))))


def whereabouts(small, positions, samples):
    """A row of three panels over the shrunk picture `small` (h, w, 3) uint8. positions: (th, tw, 2), edge.warp.reference.grid;
    samples: (th, tw, 3) uint8, what was found there."""
    heat, least, most = density(small, positions)
    rows, cols = nearest_index(len(small), len(samples)), nearest_index(small.shape[1], samples.shape[1])
    return beside([("density: %.2g (dark) to %.2g (bright) times even" % (least, most), heat),
                   ("what the net sees: %dx%d samples" % samples.shape[1::-1], samples[rows][:, cols]),
                   ("where they lie", grid(small, positions))])


def _font(px):
    try:
        return ImageFont.load_default(px)
    except TypeError:  # Pillow before 10.1 has one size, smaller
        return ImageFont.load_default()


def drawable(words):
    """`words` in the letters that the fonts of every Pillow have: without their accents, and ? for each that is of another script."""
    parts = unicodedata.normalize("NFKD", words.replace(u"\xdf", "ss"))
    return "".join(part for part in parts if not unicodedata.combining(part)).encode("ascii", "replace").decode("ascii")


def outlined(small, boxes, scale, names, palette):
    """The shrunk picture `small` (h, w, 3) uint8 with boxes (n, 6), of edge.boxes.detect, drawn on it. scale: what their px are
    multiplied with; names, palette: of the classes. Words that would cover those of a better box are left out."""
    sheet = Image.fromarray(small)
    pen, font, taken = ImageDraw.Draw(sheet), _font(11), []
    for box in boxes[::-1]:  # the best on top
        x0, y0, x1, y1 = (float(side) * scale for side in box[:4])
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=tuple(palette[int(box[5])]), width=2)
    for box in boxes:
        x0, y0, colour = float(box[0]) * scale, float(box[1]) * scale, tuple(palette[int(box[5])])
        words = drawable(names[int(box[5])] if box[4] >= 1 else "%s %.0f %%" % (names[int(box[5])], 100 * box[4]))
        across, down = font.getmask(words).size
        bar = x0, y0, x0 + across + 6, y0 + down + 6
        if any(bar[0] <= x2 and x1 <= bar[2] and bar[1] <= y2 and y1 <= bar[3] for x1, y1, x2, y2 in taken):
            continue
        taken.append(bar)
        pen.rectangle(bar, fill=colour)
        pen.text((x0 + 3, y0 + 1), words, fill="black" if sum(colour) > 330 else "white", font=font)
    return images.pixels_of(sheet)


def beside(panels):
    """(words, (h, w, 3) uint8) each, side by side, the words above."""
    parts, font = [], _font(14)
    for words, panel in panels:
        bar = Image.new("RGB", (panel.shape[1], BAR_PX), "white")
        ImageDraw.Draw(bar).text((2, 1), drawable(words), fill="black", font=font)
        parts.append(np.pad(np.concatenate([images.pixels_of(bar), panel]), ((0, GAP_PX), (0, GAP_PX), (0, 0)), mode="constant",
                            constant_values=255))
    return np.concatenate(parts, axis=1)


def density(small, positions):
    """How close samples at `positions` (th, tw, 2) lie, in colours over the picture `small` (h, w, 3) uint8. Returns
    ((h, w, 3) uint8, least, most): densities in samples per share of the area that one would have undeformed."""
    height, width = small.shape[:2]
    p = positions.astype(np.float64) * positions.shape[:2]
    (down_y, right_y), (down_x, right_x) = np.gradient(p[..., 0]), np.gradient(p[..., 1])
    close = -np.log2(np.maximum(np.abs(down_y * right_x - down_x * right_y), 1e-4)).astype(np.float32)
    shown = np.concatenate([band[0] for _y0, band in reference.unwarp(close[None], positions, height, width)])
    at, colours = [entry[0] for entry in HEAT], np.array([entry[1] for entry in HEAT])
    heat = np.stack([np.interp(shown, at, colours[:, c]) for c in range(3)], axis=2)
    return (0.3 * _grey(small) + 0.7 * heat).astype(np.uint8), 2.0 ** shown.min(), 2.0 ** shown.max()


def grid(small, positions):
    """Lines through every few of the samples at `positions` (th, tw, 2), over the picture `small`: (h, w, 3) uint8."""
    height, width = small.shape[:2]
    canvas = Image.fromarray((0.7 * small).astype(np.uint8)).resize((2 * width, 2 * height))  # twice the size: smooth lines
    pen, places = ImageDraw.Draw(canvas), positions[..., ::-1] * (2 * width, 2 * height)
    for along, room in ((places, height), (places.swapaxes(0, 1), width)):
        count = max(2, min(len(along), LINES, room // LINE_PX))
        for index in np.linspace(0, len(along) - 1, count).round().astype(int):
            pen.line([tuple(point) for point in along[index].tolist()], fill=(255, 220, 60), width=2)
    return images.pixels_of(canvas.resize((width, height), Image.BOX))


def _grey(pixels):
    return pixels.mean(axis=2, keepdims=True)
