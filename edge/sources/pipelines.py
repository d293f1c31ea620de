"""From a place and options to the words of a GStreamer pipeline: hardware elements on a Jetson, software ones elsewhere.

A pipeline ends in raw video with all bytes of a pixel together: RGB from videoconvert, RGBA from nvvidconv, which has no RGB
and whose fourth byte is skipped when frames are read."""
import fractions
import os
import re
import subprocess

from edge.errors import DecoderExit, MissingElement, UsageError
from edge.sources.uri import FLIPS

CSI_SIZE, CSI_RATE = (1280, 720), 30.0
DIRECTIONS = ("identity", "90l", "180", "90r", "horiz", "ur-ll", "vert", "ul-lr")  # videoflip's names, in the order of FLIPS
NVIDIA = "nvidia-l4t-gstreamer"  # a part of JetPack
PACKAGES = {  # the Debian package of an element; of others by the start of their names, below
    "gst-launch-1.0": "gstreamer1.0-tools", "decodebin": "gstreamer1.0-plugins-base", "vp8dec": "gstreamer1.0-plugins-good",
    "videoconvert": "gstreamer1.0-plugins-base", "videoscale": "gstreamer1.0-plugins-base",
    "videorate": "gstreamer1.0-plugins-base", "h264parse": "gstreamer1.0-plugins-bad", "h265parse": "gstreamer1.0-plugins-bad",
    "mpegvideoparse": "gstreamer1.0-plugins-bad", "mpeg4videoparse": "gstreamer1.0-plugins-bad",
    "tsdemux": "gstreamer1.0-plugins-bad", "x264enc": "gstreamer1.0-plugins-ugly", "openh264enc": "gstreamer1.0-plugins-bad",
    "rawvideoparse": "gstreamer1.0-plugins-base", "fdsrc": "gstreamer1.0-tools", "filesink": "gstreamer1.0-tools",
    "queue": "gstreamer1.0-tools"}
PACKAGES_BY_START = (("avdec_", "gstreamer1.0-libav"), ("avenc_", "gstreamer1.0-libav"), ("nv", NVIDIA), ("omx", NVIDIA))
DECODERS = {  # codec -> (parser, decoders from the best to the last)
    "h264": ("h264parse", ("nvv4l2decoder", "omxh264dec", "avdec_h264")),
    "h265": ("h265parse", ("nvv4l2decoder", "omxh265dec", "avdec_h265")),
    "vp8": ("", ("nvv4l2decoder", "omxvp8dec", "vp8dec")),
    "vp9": ("", ("nvv4l2decoder", "omxvp9dec", "vp9dec")),
    "mpeg2": ("mpegvideoparse", ("nvv4l2decoder", "omxmpeg2videodec", "avdec_mpeg2video")),
    "mpeg4": ("mpeg4videoparse", ("nvv4l2decoder", "omxmpeg4videodec", "avdec_mpeg4")),
    # the CPU first: nvjpegdec leaks memory and shifts colours, and a camera runs for weeks
    "mjpeg": ("", ("jpegdec", "nvjpegdec"))}
DEMUXERS = {"qtdemux": (".mp4", ".m4v", ".mov", ".3gp"), "matroskademux": (".mkv", ".webm"), "avidemux": (".avi",),
            "flvdemux": (".flv",), "tsdemux": (".ts", ".mts", ".m2ts")}
# encoders from the best to the last. %(bits)d per second; a whole picture at least every %(rate)d frames
ENCODERS = (("nvv4l2h264enc", "bitrate=%(bits)d insert-sps-pps=true iframeinterval=%(rate)d"),
            ("omxh264enc", "bitrate=%(bits)d insert-sps-pps=true iframeinterval=%(rate)d"),
            ("x264enc", "bitrate=%(kbits)d key-int-max=%(rate)d speed-preset=superfast tune=zerolatency"),
            ("openh264enc", "bitrate=%(bits)d rate-control=bitrate gop-size=%(rate)d complexity=low"),
            ("avenc_mpeg4", "bitrate=%(bits)d gop-size=%(rate)d"),
            ("jpegenc", "quality=90"))
HARDWARE = ("nvv4l2h264enc", "omxh264enc")
# a file that is cut keeps what came before: MP4 in parts of a second, each with its own index; Matroska is made so
MUXERS = {".mp4": ["mp4mux", "fragment-duration=1000"], ".mkv": ["matroskamux"]}
BITS_PER_PX = 0.15
DEPAYLOADERS = {"mpeg2": "rtpmpvdepay", "mpeg4": "rtpmp4vdepay", "mjpeg": "rtpjpegdepay"}  # else rtpCODECdepay


def available(timeout_s=120):
    """The names of the GStreamer elements of this machine, a set. The first call after an installation takes long."""
    try:
        done = subprocess.run(["gst-inspect-1.0"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=timeout_s, env=dict(os.environ, LC_ALL="C"))
    except FileNotFoundError as exc:
        raise missing("gst-launch-1.0") from exc
    except OSError as exc:
        raise DecoderExit("gst-inspect-1.0 cannot be started: %s" % exc.strerror) from exc
    except subprocess.TimeoutExpired as exc:
        raise UsageError("gst-inspect-1.0 did not answer within %d s. Type it yourself to see where it hangs; "
                         "rm -r ~/.cache/gstreamer-1.0 makes it look anew" % timeout_s) from exc
    return set(re.findall(r"^\S+:\s+(\S+?):", done.stdout.decode(errors="replace"), re.M))


def missing(element):
    """The MissingElement error of an element, with the package that has it."""
    package = PACKAGES.get(element) or next((p for start, p in PACKAGES_BY_START if element.startswith(start)),
                                            "gstreamer1.0-plugins-good")
    where = "Only a Jetson has it; there type" if package == NVIDIA else "Type"
    return MissingElement(element, "%s: sudo apt install %s" % (where, package))


def build(place, options, elements):
    """The pipeline of a uri.Place with uri.Options up to raw video: a list of words for gst-launch-1.0.
    elements: the set from available(). Raises MissingElement for an element that is not in it, UsageError for options that do
    not go together."""
    parts, hardware = {"csi": _csi, "v4l2": _v4l2, "rtsp": _rtsp, "file": _file, "gst": _gst}[place.kind](place, options, elements)
    scaled = options.width_px if place.kind in ("rtsp", "file", "gst") else 0  # a camera was asked for its size already
    parts += _to_pixels(options, hardware, (options.width_px, options.height_px) if scaled else None,
                        options.rate if place.kind in ("rtsp", "file", "gst") else 0.0)
    return _joined(parts, elements, given=1 if place.kind == "gst" else 0)


def encoder(suffix, elements):
    """The name of the best encoder in `elements` for a file of that suffix, a key of MUXERS. Raises MissingElement."""
    for name, _words in ENCODERS:
        if name in elements and not (name in HARDWARE and "nvvidconv" not in elements) \
                and not (name == "jpegenc" and suffix == ".mp4"):  # mp4mux takes no JPEG
            return name
    raise missing("x264enc")


def recording(path, width_px, height_px, rate, elements):
    """The pipeline from raw RGB on standard input, its rows padded to 4 bytes, to a video file: a list of words for
    gst-launch-1.0. width_px, height_px: even; rate: frames per second; elements: as of build(). Raises MissingElement."""
    suffix = os.path.splitext(path)[1].lower()
    chosen, whole_rate = encoder(suffix, elements), max(1, int(round(rate)))
    bits = int(min(max(BITS_PER_PX * width_px * height_px * rate, 500e3), 20e6))
    parts = [["fdsrc", "fd=0"],
             ["rawvideoparse", "format=rgb", "width=%d" % width_px, "height=%d" % height_px, "framerate=%s" % _rate(rate)],
             # it encodes one frame while we fill the next
             ["queue", "max-size-buffers=2", "max-size-bytes=0", "max-size-time=0"], ["videoconvert"]]
    if chosen in HARDWARE:  # nvvidconv has no RGB
        parts += [["video/x-raw,format=(string)RGBA"], ["nvvidconv"], ["video/x-raw(memory:NVMM),format=(string)NV12"]]
    else:
        parts.append(["video/x-raw,format=(string)I420"])  # else 4:4:4, which few players show
    parts.append([chosen] + (dict(ENCODERS)[chosen] % {"bits": bits, "kbits": bits // 1000, "rate": whole_rate}).split())
    if "h264" in chosen or chosen == "x264enc":
        parts.append(["h264parse"])
    # unbuffered: what is encoded is on the disk, whoever is killed
    parts += [MUXERS[suffix], ["filesink", "buffer-mode=unbuffered", "location=%s" % quoted(path)]]
    return _joined(parts, elements)


def _joined(parts, elements, given=0):
    """The words of a pipeline of parts, lists of words each that begin with an element or caps. given: parts at the front that
    are the user's own, for GStreamer to judge. Raises MissingElement."""
    for part in parts[given:]:
        if "/" not in part[0] and part[0] not in elements:
            raise missing(part[0])
    return [word for part in parts for word in ["!"] + part][1:]


def _csi(place, options, _elements):
    size = (options.width_px, options.height_px) if options.width_px else CSI_SIZE
    caps = "video/x-raw(memory:NVMM),width=(int)%d,height=(int)%d,framerate=(fraction)%s,format=(string)NV12"
    return [["nvarguscamerasrc", "sensor-id=%d" % place.where], [caps % (size + (_rate(options.rate or CSI_RATE),))]], True


def _v4l2(place, options, elements):
    source = ["v4l2src", "device=%s" % quoted(place.where), "do-timestamp=true"]
    asked = "".join([",width=(int)%d,height=(int)%d" % (options.width_px, options.height_px) if options.width_px else "",
                     ",framerate=(fraction)%s" % _rate(options.rate) if options.rate else ""])
    if options.codec == "raw":
        return [source, ["video/x-raw" + asked]], "nvvidconv" in elements
    if options.codec == "mjpeg":  # jpegdec may give 4:2:2, which nvvidconv does not take
        return [source, ["image/jpeg" + asked]] + _decoder("mjpeg", elements), False
    if options.codec:
        return [source, ["video/x-%s%s" % (options.codec, asked)]] + _decoder(options.codec, elements), "nvvidconv" in elements
    if not asked:
        return [source, ["decodebin"]], False
    # what USB 2 can carry decides the order: large raw pictures come at a few frames per second only
    either = ["image/jpeg" + asked, "video/x-raw" + asked]
    return [source, [";".join(either if options.width_px > 640 else either[::-1])], ["decodebin"]], False


def _rtsp(place, options, elements):
    source = ["rtspsrc", "location=%s" % quoted(place.where), "latency=%d" % options.rtsp_latency_ms]
    parts = [source, ["application/x-rtp,media=(string)video"], ["queue"]]
    if options.codec and options.codec != "raw":
        parts += [[DEPAYLOADERS.get(options.codec, "rtp%sdepay" % options.codec)]] + _decoder(options.codec, elements)
        return parts, "nvvidconv" in elements and options.codec != "mjpeg"
    return parts + [["decodebin"]], "nvvidconv" in elements


def _file(place, options, elements):
    parts = [["filesrc", "location=%s" % quoted(place.where)]]
    demuxer = next((d for d, ends in DEMUXERS.items() if place.where.lower().endswith(ends)), None)
    if options.codec and options.codec != "raw":
        parts += ([[demuxer], ["queue"]] if demuxer else []) + _decoder(options.codec, elements)
        return parts, "nvvidconv" in elements and options.codec != "mjpeg"
    return parts + [["decodebin"]], "nvvidconv" in elements


def _gst(place, _options, _elements):
    words = re.findall(r'(?:"(?:\\.|[^"\\])*"|[^\s"])+', place.where)
    while words and words[-1] == "!":
        words.pop()
    return [words], "NVMM" in place.where


def _decoder(codec, elements):
    """The parser and the best decoder of a codec that this machine has."""
    parser, decoders = DECODERS[codec]
    chosen = next((d for d in decoders if d in elements), None)
    if not chosen:
        raise missing(decoders[0] if codec == "mjpeg" else decoders[-1])
    if chosen.startswith("avdec_") and parser not in elements:
        parser = ""  # libav's decoders can do without
    return ([[parser]] if parser else []) + [[chosen] + (["enable-max-performance=1"] if chosen == "nvv4l2decoder" else [])]


def _to_pixels(options, hardware, size, rate):
    """Turned, scaled to `size` (width, height) when not None, at `rate` frames per second when not 0, as RGB or RGBA."""
    caps = "video/x-raw,format=(string)%s" % ("RGBA" if hardware else "RGB")
    if size:
        caps += ",width=(int)%d,height=(int)%d,pixel-aspect-ratio=(fraction)1/1" % size
    if hardware:
        parts = [["nvvidconv", "flip-method=%d" % FLIPS.index(options.flip)]]
    else:
        # not its older property, method, which GStreamer 1.22 takes and ignores
        turn = [] if options.flip == "none" else [["videoflip", "video-direction=" + DIRECTIONS[FLIPS.index(options.flip)]]]
        parts = turn + ([["videoscale"]] if size else []) + [["videoconvert"]]
    if rate:
        parts += [["videorate", "drop-only=true"]]
        caps += ",framerate=(fraction)%s" % _rate(rate)
    return parts + [["capsfilter", "name=pixels", "caps=" + caps]]


def _rate(rate):
    whole = round(rate * 1.001)
    if rate != int(rate) and abs(rate - whole / 1.001) < 0.005:
        return "%d/1001" % (whole * 1000)  # 29.97 and its like
    fraction = fractions.Fraction(rate).limit_denominator(1000)
    return "%d/%d" % (fraction.numerator, fraction.denominator)


def quoted(text):
    """A property's value as gst-launch reads it back unchanged."""
    return '"%s"' % text.replace("\\", "\\\\").replace('"', '\\"')
