"""A video of the results, frame by frame, through GStreamer in a process of its own.

Whatever happens to that process, results go on: recording stops, once and for all, and says why. A file that is cut, by a
kill or a full disk, can be played up to about its last second."""
import os

import numpy as np

from edge.command import say
from edge.errors import BadFile, DecoderExit
from edge.sources import child, faults, pipelines
from jetson import board

RATE, FASTEST_RATE = 30.0, 240.0  # frames per second, where the source does not say; more than that is a clock, not a rate
SHORTEST_SIDE_PX, LONGEST_SIDE_PX = 16, 8192  # openh264 takes no less; 200 MB at most
STALL_S = 15.0          # an encoder that takes nothing for so long hangs
END_S = 10.0            # for the last frames and the end of the file
SPARE_BYTES = 8 << 20   # of the disk that are left to others: the JSON lines go on where the video cannot


class Recorder:
    """Writes frames of one size to `path`, a .mp4 or .mkv. rate: frames per second; 0: the source's, or 30.
    elements: as of pipelines.available(). Raises MissingElement, and OSError for a path that cannot be written.

    An odd side gets one more row or column, a copy of the last: encoders halve the colours' resolution.
    .frames: how many were given to the encoder; .error: why recording stopped, or None."""

    def __init__(self, path, rate=0.0, elements=None, tell=say):
        self.path, self.frames, self.error = path, 0, None
        self._rate, self._tell, self._size, self._feed = rate, tell, None, None
        self._elements = usable(pipelines.available() if elements is None else elements, board.model())
        pipelines.recording(path, 16, 16, RATE, self._elements)  # what is missing is said before the first frame
        with open(path, "ab"):
            pass  # no permission: said now; an older video stays until there is a frame

    def begin(self, height, width, rate=None):
        """Room for the next frame: (height, width, 3) uint8 RGB to be painted; None when recording has stopped.
        rate: the source's. Raises BadFile for a size that is not that of the first frame, or none for a video."""
        if self.error:
            return None
        if self._size is None:
            if max(height, width) > LONGEST_SIDE_PX or min(height, width) < SHORTEST_SIDE_PX:
                raise BadFile("a frame is %dx%d, but sides of a video are %d to %d px; give a folder as --output"
                              % (width, height, SHORTEST_SIDE_PX, LONGEST_SIDE_PX))
            self._start(height, width, rate)
            if self.error:
                return None
        elif self._size != (height, width):
            raise BadFile("a frame is %dx%d, but the video %s began with %dx%d. Video can be scaled: --input-width and "
                          "--input-height; or give a folder as --output" % ((width, height, self.path) + self._size[::-1]))
        return self._pixels[:height, :width]

    def _start(self, height, width, rate):
        even = (height + height % 2, width + width % 2)
        stride = (even[1] * 3 + 3) // 4 * 4  # GStreamer's rows begin at multiples of 4 bytes
        self._bytes = np.zeros(even[0] * stride, np.uint8)
        self._pixels = np.ndarray(even + (3,), np.uint8, self._bytes, strides=(stride, 3, 1))
        rate = self._rate or (rate if rate and rate <= FASTEST_RATE else RATE)
        try:
            self._feed = child.Feed(pipelines.recording(self.path, even[1], even[0], rate, self._elements))
        except DecoderExit as exc:
            return self._stop(str(exc))
        self._size = (height, width)

    def commit(self):
        """The frame that was painted is whole: encode it. Never raises for what happens to the encoder or the disk."""
        height, width = self._size
        self._pixels[height:] = self._pixels[height - 1]
        self._pixels[:, width:] = self._pixels[:, width - 1:width]
        if self._spare_bytes() < SPARE_BYTES:
            self._finish()
            self._stop("the disk has less than %d MiB left" % (SPARE_BYTES >> 20))
            return
        try:
            self._feed.write(memoryview(self._bytes), STALL_S)
        except BrokenPipeError:
            self._stop(self._why(*self._feed.ended()))
        except TimeoutError as exc:
            self._stop("GStreamer %s" % exc)
        else:
            self.frames += 1

    def _spare_bytes(self):
        try:
            disk = os.statvfs(os.path.dirname(os.path.abspath(self.path)))
        except OSError:
            return SPARE_BYTES  # the folder has gone; whether the file can go on is for GStreamer to say
        return disk.f_bavail * disk.f_frsize

    def _why(self, status, text):
        """What ended GStreamer, in one line; None for an end as it should be."""
        if status == 0:
            return None
        said = faults.complaint(text)
        return ("GStreamer was killed by signal %d" % -status if status and status < 0 else
                "GStreamer did not end" if status is None else
                "GStreamer ended with status %d" % status) + (": " + said if said else "")

    def _stop(self, why):
        """Say once that there is no more video."""
        if self._feed:
            self._feed.close()
            self._feed = None
        if not self.error:
            self.error = "%s: recording stopped after %d frames: %s" % (self.path, self.frames, why or "GStreamer ended early")
            self._tell("error: %s" % self.error)

    def _finish(self):
        """Give the file its end. Returns what went wrong, or None."""
        try:
            self._feed.finish(END_S)
            return self._why(*self._feed.ended(0))
        finally:  # Ctrl-C again: at once
            self._feed.close()
            self._feed = None

    def close(self):
        """Give the file its end, within END_S, and the process too."""
        if self._feed:
            why = self._finish()
            if why:
                self._stop(why)
        if self._size is None and os.path.isfile(self.path) and os.path.getsize(self.path) == 0:
            os.remove(self.path)  # no frame came, and ours is not a video


def usable(elements, model):
    """`elements` without those that a board names and does not have: the Orin Nano has no hardware encoder."""
    return elements - set(pipelines.HARDWARE) if "Orin Nano" in (model or "") else elements
