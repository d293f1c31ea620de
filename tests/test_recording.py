"""Video out of edge-run: the choice of an encoder as text; then real GStreamer, skipped where it is not installed."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, alive, wait_for
from edge import sinks
from edge.errors import BadFile, MissingElement
from edge.sinks import recording
from edge.sources import open_source, pipelines
from edge.sources.child import Feed
from test_bad_input import small_disk  # noqa: F401 (a fixture)
from test_edge_run import agree, lines_of
from test_video import TEST, children, make_clip, tidy  # noqa: F401 (tidy is a fixture)
from test_video_run import model, run  # noqa: F401 (fixtures)

PLAIN = {"fdsrc", "rawvideoparse", "queue", "videoconvert", "h264parse", "mp4mux", "matroskamux", "filesink"}
SOFTWARE = PLAIN | {"x264enc", "openh264enc", "avenc_mpeg4", "jpegenc"}
JETSON = SOFTWARE | {"nvvidconv", "nvv4l2h264enc", "omxh264enc"}
BEGIN = ("fdsrc fd=0 ! rawvideoparse format=rgb width=64 height=48 framerate=30/1 ! "
         "queue max-size-buffers=2 max-size-bytes=0 max-size-time=0 ! videoconvert ! ")
I420 = "video/x-raw,format=(string)I420 ! "
NVMM = "video/x-raw,format=(string)RGBA ! nvvidconv ! video/x-raw(memory:NVMM),format=(string)NV12 ! "
MP4, MKV = [mux + " ! filesink buffer-mode=unbuffered location=\"a.%s\"" % end for mux, end in
            (("mp4mux fragment-duration=1000", "mp4"), ("matroskamux", "mkv"))]


# --- the choice -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, elements, expected", [
    ("mp4", JETSON, NVMM + "nvv4l2h264enc bitrate=500000 insert-sps-pps=true iframeinterval=30 ! h264parse ! " + MP4),
    ("mkv", JETSON - {"nvv4l2h264enc"}, NVMM + "omxh264enc bitrate=500000 insert-sps-pps=true iframeinterval=30 ! "
     "h264parse ! " + MKV),
    ("mp4", JETSON - {"nvvidconv"}, I420 + "x264enc bitrate=500 key-int-max=30 speed-preset=superfast tune=zerolatency ! "
     "h264parse ! " + MP4),
    ("mp4", SOFTWARE - {"x264enc"}, I420 + "openh264enc bitrate=500000 rate-control=bitrate gop-size=30 complexity=low ! "
     "h264parse ! " + MP4),
    ("mp4", SOFTWARE - {"x264enc", "openh264enc", "h264parse"}, I420 + "avenc_mpeg4 bitrate=500000 gop-size=30 ! " + MP4),
    ("mkv", PLAIN | {"jpegenc"}, I420 + "jpegenc quality=90 ! " + MKV)])
def test_pipelines(suffix, elements, expected):
    assert " ".join(pipelines.recording("a." + suffix, 64, 48, 30.0, elements)) == BEGIN + expected


def test_bits_and_rate():
    assert set(sinks.FILM) == set(pipelines.MUXERS)
    words = pipelines.recording('a "b".MP4', 1920, 1080, 30000 / 1001.0, JETSON)
    assert "bitrate=9321878" in words and "framerate=30000/1001" in words and words[-1] == 'location="a \\"b\\".MP4"'
    assert "bitrate=20000000" in pipelines.recording("a.mp4", 3840, 2160, 60.0, JETSON)


@pytest.mark.parametrize("suffix, elements, package", [
    ("mp4", PLAIN, "gstreamer1.0-plugins-ugly"), ("mp4", PLAIN | {"jpegenc"}, "gstreamer1.0-plugins-ugly"),
    ("mkv", SOFTWARE - {"matroskamux"}, "gstreamer1.0-plugins-good"),
    ("mp4", SOFTWARE - {"h264parse"}, "gstreamer1.0-plugins-bad"),
    ("mp4", SOFTWARE - {"rawvideoparse"}, "gstreamer1.0-plugins-base"), ("mp4", set(), "gstreamer1.0-plugins-ugly")])
def test_missing_elements_name_their_package(suffix, elements, package, tmp_path):
    path = tmp_path / ("a." + suffix)
    with pytest.raises(MissingElement, match="sudo apt install %s" % package) as caught:
        recording.Recorder(str(path), elements=elements)
    assert caught.value.exit_code == 2 and not path.exists()


def test_the_orin_nano_has_no_encoder():
    name = "NVIDIA Jetson Orin Nano Developer Kit"
    assert pipelines.encoder(".mp4", recording.usable(JETSON, name)) == "x264enc"
    for model_name in ("NVIDIA Jetson Nano Developer Kit", None):
        assert pipelines.encoder(".mp4", recording.usable(JETSON, model_name)) == "nvv4l2h264enc"


# --- real GStreamer -------------------------------------------------------------------------------------------------

gst = pytest.mark.skipif(not shutil.which("gst-launch-1.0"), reason="GStreamer is not installed: apt install gstreamer1.0-tools "
                         "gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-libav")
LIVE = TEST % ("true", "ball", -1, 64, 48, 30)


def decoded(path, cut=False):
    """The frames of a video, (N, H, W, 3); cut: that it says to be truncated is no failure."""
    frames = []
    try:
        for frame in open_source(str(path)):
            frames.append(np.array(frame.open().array))
    except BadFile:
        assert cut and frames
    return np.array(frames)


def pictures(count, height, width):
    """Flat colours, each a little brighter than the one before."""
    return [np.full((height, width, 3), 40 + 3 * index, np.uint8) for index in range(count)]


def record(path, frames, **options):
    """`frames` into a file. Returns (the closed Recorder, what it said)."""
    said = []
    recorder = recording.Recorder(str(path), tell=said.append, **options)
    for frame in frames:
        room = recorder.begin(*frame.shape[:2])
        if room is not None:
            room[...] = frame
            recorder.commit()
    recorder.close()
    return recorder, said


@gst
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", 'a "b" c!.MP4'])
def test_every_frame_is_in_the_file(name, tmp_path, tidy):  # noqa: F811
    frames = pictures(65, 48, 64)
    recorder, said = record(tmp_path / name, frames)
    got = decoded(tmp_path / name)
    assert not said and recorder.frames == 65 and recorder.error is None
    assert got.shape == (65, 48, 64, 3) and np.abs(got.astype(int) - frames).max() < 12


@gst
@pytest.mark.parametrize("only", ["x264enc", "openh264enc", "avenc_mpeg4", "jpegenc"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_every_encoder_that_is_here(only, suffix, tmp_path, tidy):  # noqa: F811
    here = pipelines.available()
    if only not in here or (only, suffix) == ("jpegenc", "mp4"):
        pytest.skip("no %s here, or not for .%s" % (only, suffix))
    record(tmp_path / ("a." + suffix), pictures(33, 48, 64), elements=(here & PLAIN) | {only})
    assert len(decoded(tmp_path / ("a." + suffix))) == 33


@pytest.mark.slow
@gst
@pytest.mark.parametrize("height, width", [(37, 53), (38, 50), (48, 63)])
def test_odd_sizes(height, width, tmp_path, tidy):  # noqa: F811
    """One more row or column, a copy of the last; rows whose bytes are no multiple of 4."""
    ramp = np.ones((height, 1, 3)) * np.linspace(30, 220, width)[None, :, None]
    record(tmp_path / "a.mp4", [ramp.astype(np.uint8)] * 20)
    got = decoded(tmp_path / "a.mp4").astype(int)
    assert got.shape == (20, height + height % 2, width + width % 2, 3)
    assert np.abs(got[:, :height, :width] - ramp).max() < 25
    assert np.abs(got[:, height:] - got[:, height - 1:height]).max(initial=0) < 25


@gst
def test_rates(tmp_path, tidy):  # noqa: F811
    film = 24000 / 1001.0
    for asked, of_source, expected in ((12.5, 30.0, 12.5), (0.0, film, film), (0.0, None, 30.0), (0.0, 90000.0, 30.0)):
        recorder = recording.Recorder(str(tmp_path / "a.mp4"), asked)
        for _index in range(25):
            recorder.begin(48, 64, of_source)[...] = 99
            recorder.commit()
        recorder.close()
        rates = [frame.rate for frame in open_source(str(tmp_path / "a.mp4"))]
        assert len(rates) == 25 and abs(rates[0] - expected) < 0.01


@gst
def test_a_clip(run, tmp_path, tidy):  # noqa: F811
    clip, out = make_clip(tmp_path / "in.avi", 40), tmp_path / "new" / "out.mp4"
    said, err = run(0, "--input", clip, "--output", out, "--json")
    lines = lines_of(tmp_path / "new" / "out.jsonl")
    for line in lines:
        agree(line, "result")
    assert len(lines) == len(decoded(out)) == 40 and sorted(os.listdir(str(tmp_path / "new"))) == ["out.jsonl", "out.mp4"]
    assert json.loads(said)["recording"] == {"frames": 40, "error": None} and "40 frames of video in" in err


@gst
def test_the_overlay_is_what_is_seen(run, tmp_path):  # noqa: F811
    """The video shows what the folder holds as PNG; without overlay the masks in their colours."""
    (tmp_path / "set").mkdir()
    for index in range(4):
        Image.fromarray(np.full((48, 64, 3), 40 * index + 30, np.uint8)).save(str(tmp_path / "set" / ("%d.png" % index)))
    run(0, "--input", tmp_path / "set", "--output", tmp_path / "png")
    for words, kind in (((), "overlay"), (("--no-overlay",), "mask")):
        run(0, "--input", tmp_path / "set", "--output", tmp_path / "out.mkv", *words)
        wanted = [np.asarray(Image.open(str(tmp_path / "png" / ("%d.%s.png" % (index, kind)))).convert("RGB")).astype(int)
                  for index in range(4)]
        got = decoded(tmp_path / "out.mkv")
        assert got.shape == (4, 48, 64, 3) and np.abs(got - np.array(wanted)).mean() < 8


@gst
def test_another_size_is_an_error_of_that_frame(run, tmp_path, tidy):  # noqa: F811
    (tmp_path / "set").mkdir()
    for index, width in enumerate((64, 62, 64)):
        Image.fromarray(np.full((48, width, 3), 90, np.uint8)).save(str(tmp_path / "set" / ("%d.png" % index)))
    _out, err = run(5, "--input", tmp_path / "set", "--output", tmp_path / "out.mp4")
    assert "62x48" in err and "64x48" in err and "2 frames done, 1 failed" in err
    assert len(decoded(tmp_path / "out.mp4")) == 2
    assert [bool(line["error"]) for line in lines_of(tmp_path / "out.jsonl")] == [False, True, False]


@gst
def test_sizes_that_are_none_for_a_video(tmp_path, tidy):  # noqa: F811
    for height, width in ((15, 64), (64, 8193)):
        with pytest.raises(BadFile, match="%dx%d, but sides of a video are 16 to 8192 px" % (width, height)):
            record(tmp_path / "a.mp4", [np.zeros((height, width, 3), np.uint8)])
    record(tmp_path / "a.mp4", pictures(3, 16, 16))
    assert decoded(tmp_path / "a.mp4").shape == (3, 16, 16, 3)


@gst
def test_wrong_outputs(run, tmp_path):  # noqa: F811
    clip = make_clip(tmp_path / "in.mp4.avi", 3)
    for name in ("out.avi", "out.mov", "out.webm"):
        assert ".mp4 or .mkv" in run(2, "--input", clip, "--output", tmp_path / name)[1]
    shutil.copy(clip, str(tmp_path / "in.mp4"))
    os.symlink("in.mp4", str(tmp_path / "link.mp4"))
    for name in ("in.mp4", "link.mp4"):
        assert "is the input itself" in run(2, "--input", tmp_path / "in.mp4", "--output", tmp_path / name)[1]
    assert (tmp_path / "in.mp4").read_bytes() == open(clip, "rb").read()
    (tmp_path / "folder.mp4").mkdir()
    run(5, "--input", clip, "--output", tmp_path / "folder.mp4")
    run(5, "--input", tmp_path / "absent.avi", "--output", tmp_path / "none.mp4")
    assert not (tmp_path / "none.mp4").exists()


@gst
def test_no_frame_no_file(run, tmp_path, tidy):  # noqa: F811
    (tmp_path / "x.png").write_bytes(b"no image")
    run(5, "--input", tmp_path / "x.png", "--output", tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def started(model, out, *words):  # noqa: F811
    """edge-run in a process of its own that records a live test picture, after its first second."""
    command = [sys.executable, "-m", "edge.cli", "--engine", model, "--input", LIVE, "--output", str(out)] + list(words)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=ROOT))
    # more than the headers: on a busy machine the encoder is behind us, by as many frames as the pipe holds
    wait_for(lambda: count_lines(out) >= 40 and os.path.getsize(str(out)) > 1500)
    return process


def count_lines(out):
    try:
        return len(lines_of(os.path.splitext(str(out))[0] + ".jsonl"))
    except (OSError, ValueError):  # a line that is being written
        return 0


def encoders_of(pid):
    """Process ids of its children that write a video."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % name) as stat, open("/proc/%s/cmdline" % name) as words:
                if int(stat.read().rpartition(")")[2].split()[1]) == pid and "filesink" in words.read():
                    found.append(int(name))
        except OSError:
            pass
    return found


@pytest.mark.slow
@gst
@pytest.mark.parametrize("number, code, suffix", [(signal.SIGINT, 130, "mp4"), (signal.SIGTERM, 143, "mkv"), (signal.SIGHUP, 129, "mkv"),
                                                  (signal.SIGKILL, -9, "mp4"), (signal.SIGKILL, -9, "mkv")])
def test_interrupted(number, code, suffix, model, tmp_path):  # noqa: F811
    """The file can be played and no process is left; after kill -9 all but the last second or so is in it."""
    out = tmp_path / ("out." + suffix)
    process = started(model, out)
    (encoder,) = encoders_of(process.pid)
    process.send_signal(number)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == code and b"Traceback" not in err
    wait_for(lambda: not alive(encoder), 5)
    lines, frames = count_lines(out), len(decoded(out, cut=number == signal.SIGKILL))
    assert lines <= frames <= lines + 1 if number != signal.SIGKILL else 0 < frames <= lines + 1


@gst
def test_interrupted_within_a_frame(tmp_path, tidy):  # noqa: F811
    """What came of it is dropped."""
    recorder = recording.Recorder(str(tmp_path / "a.mp4"))
    for frame in pictures(5, 48, 64):
        recorder.begin(48, 64)[...] = frame
        recorder.commit()
    recorder._feed.write(memoryview(recorder._bytes)[:5000], 5)
    recorder.close()
    assert recorder.error is None and len(decoded(tmp_path / "a.mp4")) == 5


@gst
def test_interrupted_twice(monkeypatch, tmp_path, tidy):  # noqa: F811
    """The second Ctrl-C ends the wait for the end of the file, and still leaves no process."""
    def again(_self, _limit_s):
        raise KeyboardInterrupt
    monkeypatch.setattr(Feed, "wait_for_end", again)
    recorder = recording.Recorder(str(tmp_path / "a.mp4"))
    recorder.begin(48, 64)[...] = 0
    recorder.commit()
    with pytest.raises(KeyboardInterrupt):
        recorder.close()


@pytest.mark.slow
@gst
def test_the_encoder_dies(model, tmp_path):  # noqa: F811
    out = tmp_path / "out.mp4"
    process = started(model, out, "--frames", "60", "--policy", "every")
    (encoder,) = encoders_of(process.pid)
    os.kill(encoder, signal.SIGKILL)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 5 and count_lines(out) == 60
    assert err.count(b"error:") == 1 and b"killed by signal 9" in err and b"60 frames done, 0 failed" in err
    assert 0 < len(decoded(out, cut=True)) < 60


@pytest.mark.slow
@gst
def test_an_encoder_that_hangs(monkeypatch, tmp_path, tidy):  # noqa: F811
    monkeypatch.setattr(recording, "STALL_S", 0.5)
    monkeypatch.setattr(recording, "END_S", 0.5)
    said, recorder = [], recording.Recorder(str(tmp_path / "a.mkv"))
    recorder._tell = said.append
    for index in range(30):
        room = recorder.begin(720, 1280)
        if index == 3:
            os.kill(recorder._feed.pid, signal.SIGSTOP)
        if room is not None:
            room[...] = index
            recorder.commit()
    recorder.close()
    assert len(said) == 1 and "took nothing for 0.5 s" in said[0] and 3 <= recorder.frames < 10
    recorder = recording.Recorder(str(tmp_path / "b.mkv"), tell=said.append)
    recorder.begin(48, 64)[...] = 0
    recorder.commit()
    os.kill(recorder._feed.pid, signal.SIGSTOP)
    recorder.close()
    assert len(said) == 2 and "GStreamer did not end" in said[1]


@gst
def test_a_disk_without_room(run, tmp_path, tidy):  # noqa: F811
    os.symlink("/dev/full", str(tmp_path / "out.mkv"))
    _out, err = run(5, "--input", make_clip(tmp_path / "in.avi", 300), "--output", tmp_path / "out.mkv")
    assert err.count("recording stopped") == 1 and "No space left" in err and len(lines_of(tmp_path / "out.jsonl")) == 300


@gst
def test_a_disk_that_fills(run, small_disk, monkeypatch, tidy):  # noqa: F811
    """The video ends as it should while there is room for the results, which go on."""
    monkeypatch.setattr(recording, "SPARE_BYTES", 1600 << 10)
    source = "gst://videotestsrc pattern=snow num-buffers=120 ! video/x-raw,width=320,height=240,framerate=30/1"
    _out, err = run(5, "--input", source, "--output", small_disk / "out.mp4")
    assert err.count("recording stopped") == 1 and "less than 1 MiB left" in err
    assert len(lines_of(small_disk / "out.jsonl")) == 120 and 0 < len(decoded(small_disk / "out.mp4")) < 120


@gst
def test_a_feed_leaves_nothing(tmp_path, tidy):  # noqa: F811
    feed = Feed(["fdsrc", "fd=0", "!", "filesink", "location=%s" % (tmp_path / "a.bin")])
    feed.write(memoryview(bytes(3 << 20)), 5)
    feed.finish(5)
    assert feed.ended(0)[0] == 0 and os.path.getsize(str(tmp_path / "a.bin")) == 3 << 20
    feed.close()
    feed.close()
    assert not children()
