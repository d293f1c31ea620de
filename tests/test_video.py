"""URIs, pipelines and cameras as text; then real GStreamer, skipped where it is not installed."""
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, alive, real_data
from edge.errors import BadFile, EdgeError, MissingPart, NoCamera, UsageError
from edge.sources import cameras, open_source, pipelines, uri, video

BASE = {"fdsink", "filesrc", "queue", "capsfilter", "multipartmux", "decodebin", "videoconvert", "videoscale", "videorate",
        "videoflip", "v4l2src", "rtspsrc", "jpegdec", "qtdemux", "matroskademux", "rtph264depay", "rtpjpegdepay", "avdec_h264"}
NANO = BASE | {"nvarguscamerasrc", "nvvidconv", "nvv4l2decoder", "nvjpegdec", "omxh264dec", "h264parse", "h265parse"}
FAULTS = int(os.environ.get("NANOPATCH_FAULTS", "0"))  # in real time; 40 makes those of docs/measured.md
RGB, RGBA = "capsfilter name=pixels caps=video/x-raw,format=(string)RGB", "capsfilter name=pixels caps=video/x-raw,format=(string)RGBA"


def built(text, elements=BASE, **options):
    return " ".join(pipelines.build(uri.parse(text), uri.Options(**options), elements))


@pytest.mark.parametrize("text, options, elements, expected", [
    ("csi://1", {}, NANO, "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),width=(int)1280,height=(int)720,"
     "framerate=(fraction)30/1,format=(string)NV12 ! nvvidconv flip-method=0 ! " + RGBA),
    ("csi://0", dict(width_px=1920, height_px=1080, rate=29.97, flip="rotate-180"), NANO, "nvarguscamerasrc sensor-id=0 ! "
     "video/x-raw(memory:NVMM),width=(int)1920,height=(int)1080,framerate=(fraction)30000/1001,format=(string)NV12 ! "
     "nvvidconv flip-method=2 ! " + RGBA),
    ("/dev/video1", {}, BASE, 'v4l2src device="/dev/video1" do-timestamp=true ! decodebin ! videoconvert ! ' + RGB),
    ("v4l2:///dev/video1", dict(codec="mjpeg", width_px=1280, height_px=720), NANO, 'v4l2src device="/dev/video1" '
     "do-timestamp=true ! image/jpeg,width=(int)1280,height=(int)720 ! jpegdec ! videoconvert ! " + RGB),
    ("/dev/video0", dict(codec="raw", width_px=640, height_px=480, rate=15), NANO, 'v4l2src device="/dev/video0" '
     "do-timestamp=true ! video/x-raw,width=(int)640,height=(int)480,framerate=(fraction)15/1 ! nvvidconv flip-method=0 ! " + RGBA),
    ("/dev/video0", dict(width_px=1280, height_px=720), BASE, 'v4l2src device="/dev/video0" do-timestamp=true ! image/jpeg,'
     "width=(int)1280,height=(int)720;video/x-raw,width=(int)1280,height=(int)720 ! decodebin ! videoconvert ! " + RGB),
    ("rtsp://h:554/a", {}, BASE, 'rtspsrc location="rtsp://h:554/a" latency=200 ! application/x-rtp,media=(string)video ! queue ! '
     "decodebin ! videoconvert ! " + RGB),
    ("rtsp://h/a", dict(codec="h264", rtsp_latency_ms=50), NANO, 'rtspsrc location="rtsp://h/a" latency=50 ! application/x-rtp,'
     "media=(string)video ! queue ! rtph264depay ! h264parse ! nvv4l2decoder enable-max-performance=1 ! nvvidconv flip-method=0 ! "
     + RGBA),
    ("rtsp://h/a", dict(codec="h264"), NANO - {"nvv4l2decoder"}, 'rtspsrc location="rtsp://h/a" latency=200 ! application/x-rtp,'
     "media=(string)video ! queue ! rtph264depay ! h264parse ! omxh264dec ! nvvidconv flip-method=0 ! " + RGBA),
    ("a.mp4", {}, BASE, 'filesrc location="a.mp4" ! decodebin ! videoconvert ! ' + RGB),
    ("a.mp4", {}, NANO, 'filesrc location="a.mp4" ! decodebin ! nvvidconv flip-method=0 ! ' + RGBA),
    ("a.MP4", dict(codec="h264"), NANO, 'filesrc location="a.MP4" ! qtdemux ! queue ! h264parse ! nvv4l2decoder '
     "enable-max-performance=1 ! nvvidconv flip-method=0 ! " + RGBA),
    ("a.mp4", dict(codec="h264"), BASE, 'filesrc location="a.mp4" ! qtdemux ! queue ! avdec_h264 ! videoconvert ! ' + RGB),
    ("file://a b.mkv", dict(width_px=640, height_px=360, rate=5, flip="horizontal"), BASE, 'filesrc location="a b.mkv" ! '
     "decodebin ! videoflip video-direction=horiz ! videoscale ! videoconvert ! videorate drop-only=true ! " + RGB +
     ",width=(int)640,height=(int)360,pixel-aspect-ratio=(fraction)1/1,framerate=(fraction)5/1"),
    ("gst://videotestsrc pattern=ball ! timeoverlay text=\"a ! b\" !", {}, BASE,
     'videotestsrc pattern=ball ! timeoverlay text="a ! b" ! videoconvert ! ' + RGB),
    ("gst://nvarguscamerasrc ! video/x-raw(memory:NVMM)", {}, NANO,
     "nvarguscamerasrc ! video/x-raw(memory:NVMM) ! nvvidconv flip-method=0 ! " + RGBA),
])
def test_pipelines(text, options, elements, expected):
    assert built(text, elements, **options) == expected


@pytest.mark.parametrize("text, options, elements, hint", [
    ("csi://0", {}, BASE, "nvidia-l4t-gstreamer"), ("a.mp4", {}, BASE - {"decodebin"}, "gstreamer1.0-plugins-base"),
    ("/dev/video0", {}, BASE - {"v4l2src"}, "gstreamer1.0-plugins-good"), ("rtsp://h/a", dict(codec="h265"), BASE, "gstreamer1.0-libav"),
    ("rtsp://h/a", dict(codec="h264"), NANO - {"h264parse"}, "gstreamer1.0-plugins-bad"),
    ("a.mp4", dict(codec="mjpeg"), BASE - {"jpegdec"}, "gstreamer1.0-plugins-good")])
def test_missing_elements_name_their_package(text, options, elements, hint):
    with pytest.raises(MissingPart, match="sudo apt install %s" % hint) as caught:
        built(text, elements, **options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text, kind, where", [
    ("csi://0", "csi", 0), ("csi://", "csi", 0), ("/dev/video12", "v4l2", "/dev/video12"), ("v4l2:///dev/video3", "v4l2", "/dev/video3"),
    ("/dev/v4l/by-id/usb-x", "v4l2", "/dev/v4l/by-id/usb-x"), ("rtsp://h/x", "rtsp", "rtsp://h/x"), ("a/b.Mov", "file", "a/b.Mov"),
    ("file:///a%20b.mp4", "file", "/a b.mp4"), ("file://x.png", "stills", "x.png"), ("img_%04d.png", "stills", "img_%04d.png"),
    ("*.mp4", "stills", "*.mp4"), ("folder", "stills", "folder"), ("gst://videotestsrc", "gst", "videotestsrc"),
    ("synthetic://64x48", "synthetic", (64, 48))])
def test_uris(text, kind, where):
    place = uri.parse(text)
    assert (place.kind, place.where) == (kind, where) and place.live == (kind in ("csi", "v4l2", "rtsp"))


@pytest.mark.parametrize("text", ["csi://x", "csi://-1", "v4l2://0", "rtsp://", "rtsp:// /x", "gst://", "gst:// ", "ftp://me:secret@h",
                                  "synthetic://1x", "webrtc://h?token=secret"])
def test_wrong_uris(text):
    with pytest.raises(UsageError) as caught:
        open_source(text)
    assert "secret" not in str(caught.value) and "--input" in str(caught.value)


@pytest.mark.parametrize("text, shown", [
    ("rtsp://bob:hunter2@h:554/x", "rtsp://***@h:554/x"), ("rtsp://bob:p@ss@h/x", "rtsp://***@h/x"),
    ("rtsp://bob:a/b@h/x", "rtsp://***@h/x"), ("rtsp://h/user=admin&password=xyz&channel=1", "rtsp://h/user=admin&password=***&channel=1"),
    ("rtsp://h/x?token=abc", "rtsp://h/x?token=***"), ("rtsps://h/x", "rtsps://h/x"),
    ('gst://rtspsrc location="rtsp://u:p@h/x" user-id=u user-pw="a b" ! decodebin',
     'gst://rtspsrc location="rtsp://***@h/x" user-id=u user-pw=*** ! decodebin')])
def test_passwords_are_not_shown(text, shown):
    place = uri.parse(text)
    assert place.shown == shown
    hidden = uri.secrets_of(place.where)
    assert bool(hidden) == (shown != text) and not any(len(s) > 2 and s in shown for s in hidden)


@pytest.mark.parametrize("options", [dict(flip="sideways"), dict(codec="h266"), dict(policy="oldest"), dict(width_px=640),
                                     dict(width_px=-1, height_px=-1), dict(rate=float("nan")), dict(patience_s=-1),
                                     dict(rtsp_latency_ms=-5), dict(frozen_s=-1.0), dict(frame_timeout_s=1e9)])
def test_options_out_of_range(options):
    with pytest.raises(UsageError, match="expected|together"):
        uri.check(uri.Options(**options))


def test_no_gstreamer_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPart, match="sudo apt install gstreamer1.0-tools"):
        open_source("rtsp://h/x")


def test_files_refused_at_once(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name, hint in (("empty.mp4", "0 bytes"), ("absent.mp4", "no such video")):
        with pytest.raises(BadFile, match=hint):
            open_source(str(tmp_path / name))


def test_sequences(tmp_path):
    for number in (0, 2, 3, 10, 11):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(str(tmp_path / ("a_%d.png" % number)))
        Image.new("RGB", (8, 6), (number, 0, 0)).save(str(tmp_path / ("b%03d.png" % number)))
    (tmp_path / "a_x.png").write_bytes(b"")
    for pattern in ("a_%d.png", "a_%i.png", "b%03d.png", "b%03i.png"):
        with_reds = [frame.open().array[0, 0, 0] for frame in open_source(str(tmp_path / pattern))]
        assert with_reds == [0, 2, 3, 10, 11], pattern
    for pattern in ("a_%04d.png", "c%d.png", "nofolder/a%d.png"):
        with pytest.raises(BadFile, match="no such file"):
            open_source(str(tmp_path / pattern))


LISTING = """ioctl: VIDIOC_ENUM_FMT
	Type: Video Capture

	[0]: 'YUYV' (YUYV 4:2:2)
		Size: Discrete 640x480
			Interval: Discrete 0.033s (30.000 fps)
			Interval: Discrete 0.067s (15.000 fps)
	[1]: 'MJPG' (Motion-JPEG, compressed)
		Size: Discrete 1280x720
			Interval: Discrete 0.033s (30.000 fps)
"""


def test_list_of_cameras(tmp_path):
    for node, name, index in (("video0", "vi-output, imx219 7-0010", "0"), ("video1", "HD Webcam", "0"), ("video2", "HD Webcam", "1"),
                              ("video10", "Other", "0")):
        (tmp_path / "sys" / node).mkdir(parents=True)
        (tmp_path / "sys" / node / "name").write_text(name + "\n")
        (tmp_path / "sys" / node / "index").write_text(index + "\n")
    tool = tmp_path / "v4l2-ctl"
    tool.write_text("#!/bin/sh\ncat <<'E'\n%sE\n" % LISTING)
    tool.chmod(0o755)
    found = cameras.list_cameras(str(tmp_path / "sys"), str(tool))
    assert [c["uri"] for c in found] == ["csi://0", "/dev/video1", "/dev/video2", "/dev/video10"]
    assert found[1]["modes"] == ["YUYV 640x480 @ 30, 15", "MJPG 1280x720 @ 30"]
    text = cameras.as_text(found)
    assert "HD Webcam" in text and "MJPG 1280x720 @ 30" in text and "use csi://" in text and "gives no pictures" in text
    assert "v4l-utils" in cameras.as_text(cameras.list_cameras(str(tmp_path / "sys"), str(tmp_path / "absent")))
    assert "no camera" in cameras.as_text(cameras.list_cameras(str(tmp_path / "nothing")))
    with pytest.raises(UsageError, match="csi://0"):
        video.check_node(uri.parse("/dev/video0"), str(tmp_path / "sys"))
    video.check_node(uri.parse("/dev/video1"), str(tmp_path / "sys"))


def test_bytes_an_mp4_lacks(tmp_path):
    box = b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x20mdat" + bytes(24)
    path = tmp_path / "a.mp4"
    for content, lacks in ((box, 0), (box[:-5], 5), (box[:20], 4), (box + b"\0\0\0\0free", 0), (b"RIFF1234AVI ", 0), (b"\0\0\0", 0)):
        path.write_bytes(content)
        assert video.missing_bytes(str(path)) == lacks


# --- real GStreamer ---------------------------------------------------------------------------------------------------------

gst = pytest.mark.skipif(not shutil.which("gst-launch-1.0"), reason="GStreamer is not installed: apt install gstreamer1.0-tools "
                         "gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-libav")
TEST = "gst://videotestsrc is-live=%s pattern=%s num-buffers=%d ! video/x-raw,width=%d,height=%d,framerate=%d/1"


def gst_source(count=30, width=64, height=48, rate=30, pattern="ball", live="false", limit=0, **options):
    return open_source(TEST % (live, pattern, count, width, height, rate), limit, uri.Options(**options))


def children():
    """Processes whose parent we are, zombies too."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % pid) as handle:
                fields = handle.read().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(os.getpid()):
            found.append((int(pid), fields[0]))
    return found


@pytest.fixture
def tidy():
    """No process, thread or file descriptor is left behind."""
    gc.collect()
    before, threads = (children(), len(os.listdir("/proc/self/fd"))), set(threading.enumerate())
    yield
    gc.collect()
    assert (children(), len(os.listdir("/proc/self/fd"))) == before and set(threading.enumerate()) <= threads


def make_clip(path, count=60, mux="avimux"):
    """A Motion-JPEG clip of `count` frames, 64 x 48, no two alike."""
    subprocess.check_call(["gst-launch-1.0", "-q"] + (
        "videotestsrc num-buffers=%d pattern=ball ! video/x-raw,width=64,height=48 ! jpegenc ! %s ! filesink location=%s"
        % (count, mux, path)).split())
    return str(path)


@pytest.mark.slow
@gst
@pytest.mark.parametrize("name, count, size", [("bottle-detection.mp4", 1189, (360, 640)), ("car-detection.mp4", 377, (432, 768)),
                                               ("one-by-one-person-detection.mp4", 1394, (432, 768))])
def test_every_frame_of_a_real_clip(name, count, size, tidy):
    source = open_source(os.path.join(real_data("video"), name))
    for index, frame in enumerate(source):
        picture = frame.open()
        assert frame.index == index and (picture.height, picture.width) == size
        assert frame.health["received"] == frame.health["processed"] == index + 1
    assert source.health() == {"received": count, "processed": count, "dropped": 0, "restarts": 0, "time_jumps": 0, "last_fault": None}


@gst
def test_pixels_are_those_of_the_picture(tmp_path, tidy):
    """Rows are padded to 4 bytes in the pipe; colours are in the order red, green, blue."""
    wanted = np.random.RandomState(0).randint(0, 256, (37, 53, 3)).astype(np.uint8)
    Image.fromarray(wanted).save(str(tmp_path / "a.png"))
    text = "gst://filesrc location=%s ! pngdec" % (tmp_path / "a.png")
    (frame,) = list(open_source(text))
    assert np.array_equal(frame.open().array, wanted)
    turned = (wanted, np.rot90(wanted), wanted[::-1, ::-1], np.rot90(wanted, -1), wanted[:, ::-1], np.rot90(wanted[:, ::-1], -1),
              wanted[::-1], wanted.transpose(1, 0, 2))
    for flip, expected in zip(uri.FLIPS, turned):
        (frame,) = list(open_source(text, options=uri.Options(flip=flip)))
        assert np.array_equal(frame.open().array, expected), flip
    (frame,) = list(open_source(text, options=uri.Options(flip="horizontal", width_px=106, height_px=74)))
    assert frame.open().array.shape == (74, 106, 3)


@gst
def test_odd_file_names(tmp_path, tidy):
    path = tmp_path / 'a "b" \\ c! %d 100%.avi'
    os.rename(make_clip(tmp_path / "a.avi", 5), str(path))
    assert len(list(open_source(str(path)))) == 5 and len(list(open_source("file://" + str(path)))) == 5


@gst
def test_newest_drops_and_every_waits(tidy):
    with gst_source(90, rate=60, live="true", policy="newest") as source:
        frames = []
        for frame in source:
            time.sleep(0.1)
            frames.append(frame)
    health = source.health()
    assert health["received"] == health["processed"] + health["dropped"] and health["dropped"] > 20
    assert [f.health["received"] == f.health["processed"] + f.health["dropped"] for f in frames] == [True] * len(frames)
    indices = [f.index for f in frames]
    assert indices == sorted(set(indices)) and len(frames) == health["processed"]
    assert all(a.arrived_s < b.arrived_s for a, b in zip(frames, frames[1:]))
    with gst_source(20) as source:
        assert [frame.index for frame in source] == list(range(20))


@pytest.mark.slow
@gst
@pytest.mark.parametrize("policy", ["every", "newest"])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_decoder_that_is_stopped_or_killed(policy, number, tidy):
    """A camera's comes back, with fresh frames."""
    place = uri.parse("rtsp://h/x")._replace(shown="rtsp://***@h/x")
    words = pipelines.build(uri.parse(TEST % ("true", "ball", -1, 64, 48, 30)), uri.Options(), pipelines.available())
    said = []
    with video.Video(place, uri.Options(policy=policy, frame_timeout_s=0.6), 0, lambda: video.child.Child(words),
                     tell=said.append) as source:
        for _ in range(5):
            next(source)
        began_s = time.monotonic()
        os.kill(source._healer._child.pid, number)
        while source.health()["restarts"] == 0:
            frame = next(source)
        frame = next(source)
        assert frame.arrived_s > began_s and time.monotonic() - began_s < 5
        assert len(said) == 1 and ("no frame" in said[0] or "short frame" in said[0] or "stopped" in said[0]) == (number == signal.SIGSTOP)
    health = source.health()
    assert health["received"] == health["processed"] + health["dropped"]


@pytest.mark.slow
@gst
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_file_loses_no_frame_with_its_decoder(number, tmp_path, tidy):
    pixels = []
    for spoil in (None, number):
        source = open_source(make_clip(tmp_path / "a.avi", 400), options=uri.Options(frame_timeout_s=1.0))
        pixels.append([])
        for frame in source:
            if spoil and frame.index == 150:
                os.kill(source._healer._child.pid, number)
            pixels[-1].append(frame.open().array.tobytes())
        assert source.health()["restarts"] == (1 if spoil else 0)
    assert len(pixels[0]) == 400 and pixels[0] == pixels[1]


@gst
def test_videos_that_are_none(tmp_path, tidy):
    rng = np.random.RandomState(0)
    (tmp_path / "noise.mp4").write_bytes(rng.bytes(30000))
    (tmp_path / "text.mkv").write_bytes(b"hello " * 100)
    subprocess.check_call("gst-launch-1.0 -q audiotestsrc num-buffers=9 ! wavenc ! filesink location=".split()[:-1] +
                          ["location=%s" % (tmp_path / "sound.avi")])
    for name in ("noise.mp4", "text.mkv", "sound.avi"):
        with pytest.raises(BadFile, match=name):
            list(open_source(str(tmp_path / name), options=uri.Options(frame_timeout_s=1.0)))


@gst
def test_a_truncated_video_gives_what_it_has_and_says_so(tmp_path, tidy):
    with open(os.path.join(real_data("video"), "car-detection.mp4"), "rb") as handle:
        (tmp_path / "cut.mp4").write_bytes(handle.read(800000))
    got = []
    with pytest.raises(BadFile, match=r"cut.mp4 is truncated: \d+ bytes are missing, and the video ends after \d+ frames"):
        for frame in open_source(str(tmp_path / "cut.mp4")):
            got.append(frame.index)
    assert 50 < len(got) < 377


@gst
def test_unsupported_codec(tmp_path, tidy):
    path = make_clip(tmp_path / "a.avi", 5)
    with open(path, "rb") as handle:
        content = handle.read()
    with open(path, "wb") as handle:
        handle.write(content.replace(b"MJPG", b"ZZ9Z"))
    with pytest.raises(MissingPart, match="codec of .* is not supported") as caught:
        list(open_source(path))
    assert caught.value.exit_code == 2


@gst
@pytest.mark.parametrize("text, error, hint", [
    ("gst://nosuchelement ! videoconvert", MissingPart, "nosuchelement"), ("gst://videotestsrc ! ! videoconvert", UsageError, "understand"),
    ("gst://videotestsrc nosuch=3", UsageError, "understand"),
    ("/dev/video77", NoCamera, "/dev/video77"), ("rtsp://bob:hunter2@127.0.0.1:9/x", EdgeError, "Could not open resource")])
def test_real_words_of_gstreamer(text, error, hint, capsys, tidy):
    with pytest.raises(error, match=hint) as caught:
        list(open_source(text, options=uri.Options(patience_s=0.5)))
    assert caught.value.exit_code == (2 if error in (UsageError, MissingPart) else 6)
    assert "hunter2" not in str(caught.value) + capsys.readouterr().err and "bob" not in str(caught.value)


@gst
def test_wrong_size_in_the_stream(tidy):
    """A stream that changes its size begins anew with the new one."""
    # the new size is said beside the pipe, and acted on before frames of the old one that are still in it are read: there are more
    # of those than the pipe takes
    text = "gst://concat name=c videotestsrc num-buffers=300 ! video/x-raw,width=64,height=48 ! c. videotestsrc num-buffers=9 ! " \
           "video/x-raw,width=32,height=24 ! c. c."
    source = open_source(text, options=uri.Options(policy="every"))  # nothing read ahead: the counts are exact
    sizes = [frame.open().width for _ in range(300) for frame in [next(source)]]
    next(source)
    health = source.health()
    source.close()
    assert sizes[0] == 64 and set(sizes) <= {64, 32} and health["restarts"] >= 1 and health["last_fault"] == "wrong size"


@pytest.mark.slow
@gst
def test_frozen_and_black_for_real(tidy):
    for pattern, option, kind in (("black", "black_s", "black"), ("white", "frozen_s", "frozen")):
        options = {option: 0.3, "patience_s": 1.0}
        with gst_source(-1, pattern=pattern, live="true", policy="newest", **options) as source:
            with pytest.raises(EdgeError, match="No good frame") as caught:
                list(source)
        assert caught.value.exit_code == 6 and caught.value.kind == kind


@gst
def test_reading_allocates_no_buffers(tidy):
    for policy in ("every", "newest"):
        with gst_source(200, policy=policy) as source:
            assert len({frame.open().array.__array_interface__["data"][0] for frame in source}) <= video.BUFFERS


def real_faults(count):
    """`count` signals to the decoder of a camera. Returns (list of (seconds until noticed, until the next frame), MiB grown)."""
    from jetson.memory import field_mib, read_text
    place = uri.parse("rtsp://h/x")
    words = pipelines.build(uri.parse(TEST % ("true", "ball", -1, 320, 240, 30)), uri.Options(), pipelines.available())
    noticed, memory, times = [], [], []
    with video.Video(place, uri.Options(), 0, lambda: video.child.Child(words), tell=lambda text: noticed.append(time.monotonic())) as source:
        for index in range(count):
            for _ in range(4):
                frame = next(source)
            before, began_s = len(noticed), time.monotonic()
            os.kill(source._healer._child.pid, (signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[index % 4])
            while len(noticed) == before or frame.arrived_s < noticed[-1]:
                last, frame = frame.arrived_s, next(source)
                assert frame.arrived_s > last
                assert frame.health["received"] == frame.health["processed"] + frame.health["dropped"]
            times.append((noticed[before] - began_s, frame.arrived_s - began_s))
            memory.append(field_mib(read_text("/proc/self/status"), "VmRSS"))
    assert source.health()["restarts"] == count
    return times, memory[-1] - memory[min(3, count - 1)]


@pytest.mark.slow
@gst
def test_faults_in_real_time(tidy):
    """Seconds count only where many are asked for, on a machine with nothing else to do."""
    times, grown_mib = real_faults(FAULTS or 4)
    if not FAULTS:
        return
    assert max(noticed for noticed, _back in times) <= 2.0 and max(back for _noticed, back in times) <= 5.0, times
    assert grown_mib <= 5.0
    print("noticed within %.2f s, back within %.2f s, %.1f MiB more" % (
        max(noticed for noticed, _back in times), max(back for _noticed, back in times), grown_mib))


ORPHAN = """
import sys, time
from edge.sources import open_source
source = open_source(%r)
next(source)
print(source._healer._child.pid)
sys.stdout.flush()
time.sleep(60)
"""


@gst
def test_the_child_dies_with_us():
    process = subprocess.Popen([sys.executable, "-c", ORPHAN % (TEST % ("true", "ball", -1, 64, 48, 30))], stdout=subprocess.PIPE,
                               env=dict(os.environ, PYTHONPATH=ROOT))
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not alive(pid):
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the decoder outlived us")
