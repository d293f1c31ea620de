"""The picture of a profile: memory over time, phases as bands behind it."""
import csv
import itertools
import math

from edge.command import written

SHOWN = {"rss_mib": ("RSS", (30, 90, 200)), "pss_mib": ("PSS", (0, 150, 130)),
         "available_drop_mib": ("MemAvailable, fall", (20, 20, 20)), "swap_mib": ("swap, rise", (220, 120, 0)),
         "nvmap_mib": ("GPU (NvMap), rise", (200, 30, 60))}  # column -> title, colour
BANDS = [(225, 236, 250), (253, 235, 220), (226, 245, 226), (245, 226, 243), (250, 246, 210), (222, 244, 246),
         (240, 230, 220), (232, 232, 232)]


def draw(csv_path, png_path, seconds):
    """Memory over time, phases as bands behind it. Returns '' or why there is no picture."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        return "a picture (Pillow is not installed)"
    left, top, right, bottom, grey = 60, 34, 1060, 430, (90, 90, 90)
    columns = {}  # x in pixels -> {"phase": the last, one of SHOWN: the largest}
    width = _round_up(max(seconds, 0.1))
    with open(csv_path, encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            here = columns.setdefault(left + int(float(row["seconds"]) / width * (right - left)), {})
            here.update((name, max(float(row[name]), here.get(name, 0.0))) for name in SHOWN if row[name])
            here["phase"] = row["phase"]
    points = sorted(columns.items())
    names = list(dict.fromkeys(here["phase"] for _x, here in points))
    height = _round_up(1.05 * max([here[name] for _x, here in points for name in SHOWN if name in here] + [1.0]))
    canvas = Image.new("RGB", (1100, 490 + 18 * ((len(names) + 4) // 5)), "white")
    pen = ImageDraw.Draw(canvas)
    runs = [(name, next(run)[0]) for name, run in itertools.groupby(points, key=lambda point: point[1]["phase"])]
    last = left + int(seconds / width * (right - left))
    for (name, x), (_next, end) in zip(runs, runs[1:] + [("", last)]):
        pen.rectangle((x, top, end, bottom), fill=BANDS[names.index(name) % len(BANDS)])
        if 6 * len(name) + 8 < end - x:
            pen.text((x + 4, top + 2), name, fill=grey)
    for quarter in range(5):
        x, y = left + quarter * (right - left) // 4, bottom - quarter * (bottom - top) // 4
        pen.line((left, y, right, y), fill=(205, 205, 205))
        pen.line((x, bottom, x, bottom + 4), fill=grey)
        pen.text((8, y - 6), "%g" % (height * quarter / 4), fill=grey)
        pen.text((x - 8, bottom + 6), "%g s" % (width * quarter / 4), fill=grey)
    pen.text((8, 12), "MiB", fill="black")
    for index, (name, (title, ink)) in enumerate(SHOWN.items()):
        line = [(x, bottom - here[name] / height * (bottom - top)) for x, here in points if name in here]
        for x, y in line if name == "pss_mib" else line[-1:]:  # read less often: lines between would be invented
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=ink)
        if line and name != "pss_mib":
            pen.line(line, fill=ink, width=2)
        _legend(pen, left + 200 * index, bottom + 26, title + ("" if line else ": not seen"), ink, 4)
    for index, name in enumerate(names):
        x, y = left + 200 * (index % 5), bottom + 48 + 18 * (index // 5)
        _legend(pen, x, y, name[:28], BANDS[index % len(BANDS)], 11)
    pen.rectangle((left, top, right, bottom), outline=grey)
    with written(png_path, "wb") as handle:
        canvas.save(handle, format="PNG")
    return ""


def _legend(pen, x, y, text, ink, thick):
    pen.rectangle((x, y + 6 - thick // 2, x + 14, y + 6 + thick // 2), fill=ink)
    pen.text((x + 20, y), text, fill="black")


def _round_up(value):
    """The next larger number whose quarters are short to write."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 3, 4, 6, 8, 10) if power * factor >= value)
