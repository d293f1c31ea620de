"""What went wrong with a source: from GStreamer's words to one clear error, and pictures that are none."""
import re
import zlib

import numpy as np

from edge.command import without_secrets
from edge.errors import BadFile, BlackFrames, BusyCamera, DecoderExit, FrozenFrames, MissingElement, NoCamera, UsageError
from edge.sources import pipelines
from edge.sources.uri import secrets_of

RESTART_ARGUS = "sudo systemctl restart nvargus-daemon"
SAMPLE_BYTES = 4096  # a look at so many tells nearly all frames that are not black
BLACK_AT_MOST = 16  # of 255: black of a camera is not quite 0


def explain(error, place):
    """A DecoderExit of the child of `place`, as the error it means: a SourceLost that may pass by itself, or a UsageError,
    MissingElement or BadFile that will not."""
    text, shown = getattr(error, "text", ""), place.shown
    said = _said(text, place)

    def has(*patterns):
        return any(re.search(pattern, text, re.I) for pattern in patterns)

    element = re.search(r'no element "([^"]+)"', text)
    if element:
        return pipelines.missing(element.group(1))
    if has("erroneous pipeline", "no property .* in element"):
        return UsageError("--input %s: GStreamer does not understand the pipeline: %s" % (shown, said))
    if has("missing a plug-?in", "no suitable plugins found", "missing decoder"):
        what = re.search(r"Missing (?:decoder|element): ([^\n(]+)", text)
        return MissingElement("decoder of %s" % (what.group(1).strip() if what else "this codec"),
                              "Type: sudo apt install gstreamer1.0-libav gstreamer1.0-plugins-bad. Where they are installed, the "
                              "codec of %s is not supported: convert it to H.264" % shown)
    if has("permission denied"):
        return UsageError("no permission to use %s. Type: sudo usermod -aG video $USER, and log in again" % shown)
    if place.kind == "file":
        return (BadFile("%s is damaged or no video: %s. Copy it again from its source" % (shown, said or error))
                if getattr(error, "status", -1) > 0 else error)
    if has("unauthorized", r"\b401\b"):
        return UsageError("%s refuses the user name or password; expected rtsp://USER:PASSWORD@HOST/PATH" % shown)
    if place.kind == "csi":
        if has("no cameras available", "no such sensor", "invalid camera device"):
            return NoCamera("no camera at %s: %s. Check the ribbon cable; on an Orin choose the sensor in "
                            "/opt/nvidia/jetson-io/jetson-io.py; then type: %s" % (shown, said, RESTART_ARGUS))
        return DecoderExit("%s: %s. If it stays so, type: %s" % (shown, said or error, RESTART_ARGUS))
    if has("cannot identify device", "no such (file|device)", "could not be found") and place.kind == "v4l2":
        return NoCamera("no such camera: %s. Type: edge-run --list-sources" % shown)
    if has("busy"):
        return BusyCamera("%s is in use by another program. Find it with: fuser -v %s"
                          % (shown, place.where if place.kind == "v4l2" else "/dev/video*"))
    if has("not-negotiated", "not negotiated") and place.kind != "rtsp":
        return UsageError("%s does not give frames of this size, rate or codec (%s). Its modes are shown by: edge-run "
                          "--list-sources" % (shown, said))
    return DecoderExit("%s: %s%s" % (shown, error, ", " + said if said else ""))


def complaint(text):
    """GStreamer's first complaint in one line, as it stands; "" when there is none."""
    found = re.search(r"(?:ERROR: from element \S+:|ERROR:|WARNING: erroneous pipeline:|\(Argus\))\s*([^\n]+)", text)
    return found.group(1).strip().rstrip(".") if found else ""


def _said(text, place):
    """GStreamer's first complaint in one line, without secrets."""
    line = complaint(text)
    more = re.search(r"\n\(?(Argus|Error generated)[^\n]*", text)
    line += " (%s)" % more.group(0).strip() if more and more.group(0).strip() not in line else ""
    if place.kind in ("rtsp", "gst"):
        for secret in secrets_of(place.where):
            line = line.replace(secret, "***")
        line = without_secrets(line)
    return line


class Watchdog:
    """Tells frozen and black frames from good ones. frozen_s, black_s: how long they may last; 0: for ever, and no look is taken.

    A dark room is black too, and a picture without noise may stand still: both are off unless asked for. With frozen_s a
    repeated picture is never good; a black one is until black_s are over."""

    def __init__(self, frozen_s=0.0, black_s=0.0):
        self._limits = {FrozenFrames: frozen_s, BlackFrames: black_s}
        self._since, self._sum, self._black = {}, None, False

    def look(self, pixels, now_s):
        """pixels (H, W, 3) uint8, now_s: when they came. True for a good frame. Raises FrozenFrames or BlackFrames when the
        time of it is over: once, and again after as long."""
        frozen = bool(self._limits[FrozenFrames]) and self._same(pixels)
        black = bool(self._limits[BlackFrames]) and _is_black(pixels)
        self._black = self._black and black  # once told, black stays bad until it ends
        for kind, bad, what in ((FrozenFrames, frozen, "the same picture again and again"), (BlackFrames, black, "nothing but black")):
            if not bad:
                self._since.pop(kind, None)
            elif now_s - self._since.setdefault(kind, now_s) >= self._limits[kind]:
                self._since[kind] = now_s
                self._black = self._black or kind is BlackFrames
                raise kind("%s for %.1f s" % (what, self._limits[kind]))
        return not frozen and not self._black

    def _same(self, pixels):
        last, self._sum = self._sum, _checksum(pixels)
        return last == self._sum

    def restarted(self):
        """The source begins anew: what it shows first may be as bad as before, and is given as long to change."""
        self._since.clear()


def _is_black(pixels):
    height, width = pixels.shape[:2]
    step = max(1, int((height * width * 3 / float(SAMPLE_BYTES)) ** 0.5))
    return pixels[::step, ::step].max() <= BLACK_AT_MOST and pixels.max() <= BLACK_AT_MOST


def _checksum(pixels):
    value = 1
    for row in [pixels] if pixels.flags.c_contiguous else pixels:  # no copy of a picture whose rows are padded
        value = zlib.adler32(np.ascontiguousarray(row), value)
    return value
