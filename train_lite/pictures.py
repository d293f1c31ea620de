"""The pictures of a run folder: curves over the epochs, predictions beside the truth."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edge import images
from edge.geometry import nearest_index
from edge.warp import reference
from train_lite.dataset import IGNORE

SIDE_PX = 512  # longer side of one panel
BAR_PX = 18    # above it, with a few words
GAP_PX = 4     # beside and below it
LINES = 24     # of a grid that are drawn each way, about
LINE_PX = 8    # between two of them, at least
# colours of log2 of a density, 0: as dense as undeformed
HEAT = ((-2, (0, 0, 0)), (0, (70, 20, 120)), (1.5, (210, 50, 60)), (3, (255, 160, 20)), (5, (255, 255, 210)))


def curves(rows, series, path):
    """rows: list of dicts, one per epoch; series: list of (key, title). One panel per key over the epochs; a key
    that a row lacks is left out. Writes a PNG."""
    width, height, pad = 420, 260, 44
    canvas = Image.new("RGB", (width * len(series), height), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (key, title) in enumerate(series):
        points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None and np.isfinite(row[key])]
        left, top, right, bottom = index * width + pad, 30, (index + 1) * width - 14, height - 30
        pen.text((left, 10), title, fill="black")
        pen.rectangle((left, top, right, bottom), outline=(200, 200, 200))
        if not points:
            continue
        x0, x1 = points[0][0], max(points[-1][0], points[0][0] + 1)
        y0, y1 = min(0.0, min(y for _, y in points)), max(max(y for _, y in points), 1e-9)
        for fraction in (0.0, 0.5, 1.0):
            value = y0 + fraction * (y1 - y0)
            y = bottom - fraction * (bottom - top)
            pen.line((left, y, right, y), fill=(230, 230, 230))
            pen.text((index * width + 4, y - 6), "%.3g" % value, fill=(90, 90, 90))
        pen.text((left, bottom + 6), "epoch %d" % x0, fill=(90, 90, 90))
        pen.text((right - 20, bottom + 6), "%d" % x1, fill=(90, 90, 90))
        line = [(left + (x - x0) / float(x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
                for x, y in points]
        pen.line(line, fill=(30, 90, 200), width=2)
        for x, y in line:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(30, 90, 200))
    canvas.save(path)


def comparison(stored, label_bands, palette, path, seen=None):
    """Image, truth and prediction side by side, shrunk to at most SIDE_PX each. stored: a Stored; label_bands:
    iterable of (y0, (h, W) uint8 class ids), top to bottom. Writes a PNG.

    seen: the evaluate.Seen of a net that sees samples: below come their density, the samples and the grid they lie on."""
    height, width = images.fitted_size(stored.height, stored.width, "long", min(SIDE_PX, max(stored.height, stored.width)))
    small = images.whole(images.resized(stored.picture, height, width))
    rows, cols = nearest_index(height, stored.height), nearest_index(width, stored.width)
    predicted, truth = np.zeros((2, height, width), np.uint8)
    for y0, labels in label_bands:
        here = np.flatnonzero((rows >= y0) & (rows < y0 + len(labels)))
        predicted[here] = labels[rows[here] - y0][:, cols]
        truth[here] = stored.labels.window(y0, 0, y0 + len(labels), stored.width)[rows[here] - y0][:, cols]
    sheet = _row([("image, %dx%d px" % (stored.width, stored.height), small),
                  ("truth", images.blend(small, np.where(truth == IGNORE, 0, truth), palette)),
                  ("prediction", images.blend(small, predicted, palette))])
    if seen:
        heat, least, most = density(small, seen.positions)
        samples = seen.pixels()
        sheet = np.concatenate([sheet, _row([
            ("density: %.2g (dark) to %.2g (bright) times even" % (least, most), heat),
            ("what the net sees: %dx%d samples" % samples.shape[1::-1],
             samples[nearest_index(height, len(samples))][:, nearest_index(width, samples.shape[1])]),
            ("where they lie", grid(small, seen.positions))])])
    images.write_png(path, sheet)


def _row(panels):
    """(words, (h, w, 3) uint8) each, side by side, the words above."""
    parts = []
    try:
        font = ImageFont.load_default(14)
    except TypeError:  # Pillow before 10.1 has one size, smaller
        font = ImageFont.load_default()
    for words, panel in panels:
        bar = Image.new("RGB", (panel.shape[1], BAR_PX), "white")
        ImageDraw.Draw(bar).text((2, 1), words, fill="black", font=font)
        parts.append(np.pad(np.concatenate([np.asarray(bar), panel]), ((0, GAP_PX), (0, GAP_PX), (0, 0)), mode="constant",
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
    return np.asarray(canvas.resize((width, height), Image.BOX))


def _grey(pixels):
    return pixels.mean(axis=2, keepdims=True)
