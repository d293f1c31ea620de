"""The pictures of a run folder: curves over the epochs, predictions beside the truth."""
import numpy as np
from PIL import Image, ImageDraw

from edge import images
from edge.geometry import nearest_index
from edge.warp.pictures import beside, shown, whereabouts
from train_lite.data.dataset import IGNORE


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
    """Image, truth and prediction side by side, as edge.warp.pictures.shown() shrinks them. stored: a Stored; label_bands:
    iterable of (y0, (h, W) uint8 class ids), top to bottom. Writes a PNG.

    seen: the evaluate.Seen of a net that sees samples: below come their density, the samples and the grid they lie on."""
    small = shown(stored.picture)
    height, width = small.shape[:2]
    rows, cols = nearest_index(height, stored.height), nearest_index(width, stored.width)
    predicted, truth = np.zeros((2, height, width), np.uint8)
    for y0, labels in label_bands:
        here = np.flatnonzero((rows >= y0) & (rows < y0 + len(labels)))
        predicted[here] = labels[rows[here] - y0][:, cols]
        truth[here] = stored.labels.window(y0, 0, y0 + len(labels), stored.width)[rows[here] - y0][:, cols]
    sheet = beside([("image, %dx%d px" % (stored.width, stored.height), small),
                  ("truth", images.blend(small, np.where(truth == IGNORE, 0, truth), palette)),
                  ("prediction", images.blend(small, predicted, palette))])
    if seen:
        sheet = np.concatenate([sheet, whereabouts(small, seen.positions, seen.pixels())])
    images.write_png(path, sheet)
