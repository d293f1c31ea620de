"""Where results go: mask and overlay pictures, JSON lines. Masks are written band by band as they come."""
import json
import os
import re
import sys
import time

import numpy as np

from edge import images, scores
from edge.command import held
from edge.errors import UsageError
from edge.warp import reference

FILM = (".mp4", ".mkv")
ENDINGS = (".mask.png", ".overlay.png", ".samples.png")  # what a frame's name gets in a folder of results
SHEET_PX = 1024  # longer side at which labels and boxes are drawn on pictures that are read in bands


def is_film(output):
    """Whether --output names a video."""
    return output.lower().endswith(FILM)


def is_page(output):
    """Whether --output names a live page."""
    return re.match(r"(?i)https?://", output) is not None


def lines_beside(film):
    """The file of JSON lines that belongs to a video."""
    return os.path.splitext(film)[0] + ".jsonl"


def kept_apart(film):
    """`film`, or a name with the date where a video is there already: a service that starts again records beside what it has."""
    (stem, ending), name, number = os.path.splitext(film), film, 0
    while os.path.exists(name) and os.path.getsize(name):
        number += 1
        name = "%s-%s%s%s" % (stem, time.strftime("%Y%m%d-%H%M%S"), "-%d" % number if number > 1 else "", ending)
    return name


def _lines(path):
    """A new file of results, held: a second edge-run that writes there would spoil both."""
    try:
        return held(path)
    except BlockingIOError:
        raise UsageError("%s is being written by another edge-run; give each an --output of its own" % path) from None


class Sinks:
    """The outputs of one run. output: a folder (masks, overlays, results.jsonl), a .png (one mask), a .jsonl, a
    .mp4 or .mkv (a video of the overlays; of the masks in their colours without overlay; JSON lines beside it), '-' (JSON
    lines on stdout), or a http:// address (no files). rate: frames per second of that video; 0: the source's. palette: colours of
    the classes, which a new model may change. live: a live.Live that sees what passes, or None; it is not closed."""

    def __init__(self, output, palette, overlay, rate=0.0, live=None):
        self.recorder, self._live = None, live
        self.palette, self._one_mask, self._folder, self._overlay = palette, None, None, overlay
        self._lines, self._count = None, 0
        if output == "-":
            self._lines = sys.stdout
        elif is_page(output):
            pass
        elif output.lower().endswith((".png", ".jsonl")):
            os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
            if output.lower().endswith(".png"):
                self._one_mask = output
            else:
                self._lines = _lines(output)
        elif is_film(output):
            from edge.sinks.recording import Recorder  # GStreamer costs nothing where it is not used
            os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
            self.recorder = Recorder(output, rate)
            self._lines = _lines(lines_beside(output))
        elif "." in os.path.basename(output.rstrip("/")) and not os.path.isdir(output):
            raise UsageError("--output %s: expected a folder (one without a dot in its name, or that is there), a file ending in .png, .jsonl, "
                             ".mp4 or .mkv, http://HOST:PORT, or -" % output)
        else:
            os.makedirs(output, exist_ok=True)
            self._folder = output
            self._lines = _lines(os.path.join(output, "results.jsonl"))

    def take_up(self, classes, palette):
        """Names and colours of the classes from now on: a new model may have others."""
        self.palette = palette
        if self._live:
            self._live.take_up(classes, palette)

    def paths(self, frame):
        """(mask path, overlay path) of a frame, None where none is written."""
        if self._one_mask:
            if self._count:
                raise UsageError("--output %s is one file, but the input has more than one image; give a folder"
                                 % self._one_mask)
            return self._one_mask, os.path.splitext(self._one_mask)[0] + ".overlay.png" if self._overlay else None
        if not self._folder:
            return None, None
        mask, overlay = (os.path.join(self._folder, frame.name + ending) for ending in ENDINGS[:2])
        return mask, overlay if self._overlay else None

    def write_bands(self, frame, picture, bands, lap, blend):
        """Write the mask of one frame, given as an iterator of label bands; blend(pixels, labels) paints them over the
        picture. Returns (mask path, overlay path, pixels per class)."""
        mask_path, overlay_path = self.paths(frame)
        counts = np.zeros(len(self.palette), np.int64)
        size = (picture.height, picture.width)
        room = self.recorder.begin(size[0], size[1], frame.rate) if self.recorder else None
        view = self._live.begin(size[0], size[1]) if self._live else None
        # a reader of its own: the net reads ahead of the overlay
        behind = frame.open() if overlay_path or view or room is not None and self._overlay else None
        mask = over = None
        try:
            if mask_path:
                mask = images.PngWriter(mask_path, size[0], size[1], 1, self.palette)
            if overlay_path:
                over = images.PngWriter(overlay_path, size[0], size[1], 3)
            y = 0
            for labels in bands:
                counts += np.bincount(labels.ravel(), minlength=len(counts))
                if mask:
                    mask.write(labels)
                if over:
                    over.write(blend(behind.window(y, 0, y + len(labels), size[1]), labels))
                if room is not None:
                    room[y:y + len(labels)] = (blend(behind.window(y, 0, y + len(labels), size[1]), labels) if self._overlay
                                               else np.array(self.palette, np.uint8)[labels])
                if view:
                    view.add(y, behind.window(y, 0, y + len(labels), size[1]), labels)
                y += len(labels)
                lap("write")
            for png in filter(None, (mask, over)):
                png.finish()
        except BaseException:  # a half-written file must not look whole, whatever stopped it
            for png in filter(None, (mask, over)):
                png.abandon()
            raise
        if room is not None:
            self.recorder.commit()
        if view:
            self._live.show(view)
        self._count += 1  # only now: a frame that failed may come again
        lap("write")
        return mask_path, overlay_path, counts

    def write_sheet(self, frame, paint):
        """What paint(the picture (h, w, 3) uint8, a large one shrunk, by how much it was shrunk) makes of a frame, (h', w', 3), where overlays
        go; a .png too. Returns the overlay's path, or None."""
        mask_path, path = self.paths(frame)
        path = mask_path if self._one_mask else path
        if not (path or self.recorder or self._live):
            return None
        from edge.warp import pictures  # pens and fonts cost nothing where nothing is drawn
        picture = frame.open()
        whole = picture.height * picture.width <= images.STREAM_ABOVE_PX
        small = pictures.shown(picture, max(picture.height, picture.width) if whole else SHEET_PX)
        sheet = paint(small, max(small.shape[:2]) / float(max(picture.height, picture.width)))
        size = sheet.shape[:2]
        room = self.recorder.begin(size[0], size[1], frame.rate) if self.recorder else None
        if path:
            images.write_png(path, sheet)
        if room is not None:
            room[:] = sheet
            self.recorder.commit()
        view = self._live.begin(*size) if self._live else None
        if view:
            view.add(0, sheet, np.zeros(size, np.uint8))
            self._live.show(view)
        self._count += 1
        return path

    def write_samples(self, frame, overlay_path, positions, recipe):
        """Draw where a frame's samples lie, and what was found there, beside its overlay. positions: (th, tw, 2); recipe: the
        WarpRecipe by which they were made. Returns the path, or None."""
        if overlay_path is None:
            return None
        from edge.warp import pictures  # pens and fonts cost nothing where nothing is drawn
        path, picture = overlay_path[:-len("overlay.png")] + "samples.png", frame.open()
        samples = (reference.sample(scores.view_of(picture, recipe, scores.Host()), positions) + 0.5).astype(np.uint8)
        images.write_png(path, pictures.whereabouts(pictures.shown(picture), positions, samples))
        return path

    def write_line(self, result):
        """One JSON object, on a line of its own."""
        if self._lines:
            self._lines.write(json.dumps(result, sort_keys=True, allow_nan=False) + "\n")
            self._lines.flush()
        if self._live:
            self._live.write_line(result)

    def close(self):
        try:
            if self.recorder:
                self.recorder.close()
        finally:
            if self._lines and self._lines is not sys.stdout:
                self._lines.close()


class Memory:
    """A sink that keeps the mask of the last frame: .mask (H, W) uint8, a new array each time."""

    def __init__(self):
        self.mask = None

    def take_up(self, _classes, _palette):
        pass

    def write_bands(self, _frame, picture, bands, lap, _blend):
        self.mask, y = np.empty((picture.height, picture.width), np.uint8), 0
        counts = np.zeros(256, np.int64)
        for labels in bands:
            self.mask[y:y + len(labels)] = labels
            counts += np.bincount(labels.ravel(), minlength=256)
            y += len(labels)
            lap("write")
        return None, None, counts

    def write_sheet(self, _frame, _paint):
        self.mask = None

    def write_samples(self, _frame, _overlay_path, _positions, _recipe):
        return None

    def write_line(self, result):
        pass
