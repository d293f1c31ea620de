"""What a URI means, the options of a source, and URIs without their secrets."""
import os
import re
from typing import Any, NamedTuple
from urllib.parse import unquote

from edge.command import SECRET, without_secrets
from edge.errors import UsageError

VIDEO = ("csi", "v4l2", "rtsp", "gst", "file")  # those that go through GStreamer; the rest: "synthetic", "stills"
FILM = (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv",
        ".ogv", ".mjpeg", ".mjpg", ".h264", ".264", ".h265", ".265", ".y4m")
# as jetson-utils names them, in the order of nvvidconv's flip-method; no source is turned unless the user says so, a CSI
# camera neither (jetson-utils turns those by 180 degrees)
FLIPS = ("none", "counterclockwise", "rotate-180", "clockwise", "horizontal", "upper-right-diagonal", "vertical",
         "upper-left-diagonal")
CODECS = ("", "raw", "h264", "h265", "vp8", "vp9", "mpeg2", "mpeg4", "mjpeg")
POLICIES = ("auto", "newest", "every")


class Options(NamedTuple):
    width_px: int = 0            # 0: as the source has it; csi: 1280 x 720
    height_px: int = 0
    rate: float = 0.0            # frames per second; 0: as the source has it
    flip: str = "none"           # one of FLIPS
    rtsp_latency_ms: int = 200   # of video held back for packets that come late
    codec: str = ""              # one of CODECS; "": found out
    policy: str = "auto"         # newest: a frame that waits is dropped for a newer one; every: none; auto: newest of cameras
    frame_timeout_s: float = 0.0  # no frame for so long is a fault; 0: 1.5 s of a camera, 10 s of a file
    frozen_s: float = 0.0        # the same bytes for so long are a fault; 0: never
    black_s: float = 0.0         # nothing but black for so long is a fault; 0: never
    patience_s: float = 30.0     # without a good frame before the source counts as lost


class Place(NamedTuple):
    kind: str    # one of VIDEO, "synthetic", "stills"
    where: Any   # csi: sensor number; v4l2: path; rtsp: URI; gst: pipeline; file, stills: path; synthetic: (width, height)
    shown: str   # for people and logs: no password

    @property
    def live(self):
        """A camera: it has no end, and waits for nobody."""
        return self.kind in ("csi", "v4l2", "rtsp")


def secrets_of(text):
    """The strings in a URI or pipeline that may not be shown, as they stand and decoded; longest first."""
    found = [m.group(2).strip('"') for m in re.finditer(SECRET, text)]
    for inner in re.findall(r"://(\S*)@", text):
        found += [inner, inner.partition(":")[2]]
    return sorted({s for f in found for s in (f, unquote(f)) if s}, key=len, reverse=True)


def parse(uri):
    """The Place of a URI or path. Raises UsageError."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return _path(uri, uri)
    scheme = scheme.lower()
    if scheme == "file":
        return _path(rest if os.path.exists(rest) else unquote(rest), uri)
    if scheme == "synthetic":
        size = re.match(r"^([1-9]\d{0,4})x([1-9]\d{0,4})$", rest)
        if not size:
            raise UsageError("--input %s: expected synthetic://WIDTHxHEIGHT, such as synthetic://1280x720" % uri)
        return Place("synthetic", (int(size.group(1)), int(size.group(2))), uri)
    if scheme == "csi":
        if not re.match(r"^\d{0,2}$", rest):
            raise UsageError("--input %s: expected csi:// and the number of the sensor, such as csi://0" % uri)
        return Place("csi", int(rest or 0), "csi://%d" % int(rest or 0))
    if scheme == "v4l2":
        if not rest.startswith("/dev/"):
            raise UsageError("--input %s: expected v4l2:///dev/videoN. Cameras are shown by: edge-run --list-sources" % uri)
        return Place("v4l2", rest, rest)
    shown = without_secrets(uri)
    if scheme in ("rtsp", "rtsps"):
        if not re.match(r"^(\S*@)?(\[[\da-fA-F:.]+\]|[^\s:/@\[]+)(:\d{1,5})?(/\S*)?$", rest):
            raise UsageError("--input %s: expected rtsp://HOST:PORT/PATH, such as rtsp://192.168.1.20:554/stream" % shown)
        return Place("rtsp", uri, shown)
    if scheme == "gst":
        if not rest.strip():
            raise UsageError("--input gst:// holds no pipeline; expected such as 'gst://videotestsrc ! videoconvert'")
        return Place("gst", rest, shown)
    raise UsageError("--input %s: expected a file, folder, glob or sequence, csi://, v4l2://, rtsp://, file://, gst:// or "
                     "synthetic://" % shown)


def _path(path, shown):
    if re.match(r"^/dev/(video\d+$|v4l/)", path):
        return Place("v4l2", path, path)
    if path.lower().endswith(FILM) and not os.path.isdir(path) and (os.path.exists(path) or not re.search(r"[*?%]", path)):
        return Place("file", path, shown)
    return Place("stills", path, shown)


def check(options):
    """Raise UsageError for an option out of its range."""
    for flag, value, allowed in (("flip", options.flip, FLIPS), ("codec", options.codec, CODECS)):
        if value not in allowed:
            raise UsageError("--input-%s is %r, expected one of %s" % (flag, value, ", ".join(filter(None, allowed))))
    if options.policy not in POLICIES:
        raise UsageError("--policy is %r, expected one of %s" % (options.policy, ", ".join(POLICIES)))
    if bool(options.width_px) != bool(options.height_px):
        raise UsageError("give --input-width and --input-height together")
    for flag, value, most in (("input-width", options.width_px, 16384), ("input-height", options.height_px, 16384),
                              ("input-rate", options.rate, 1000), ("input-rtsp-latency", options.rtsp_latency_ms, 60000),
                              ("frame-timeout", options.frame_timeout_s, 86400), ("frozen-after", options.frozen_s, 86400),
                              ("black-after", options.black_s, 86400), ("patience", options.patience_s, 10 ** 9)):
        if not 0 <= value <= most:  # NaN too
            raise UsageError("--%s is %g, expected 0 to %g" % (flag, value, most))
