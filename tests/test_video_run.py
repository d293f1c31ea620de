"""Video through edge-run and edge.run: results, exit codes, signals. Real GStreamer; skipped where it is not installed."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import edge
from conftest import ROOT, real_data
from edge.cli import main as edge_run
from edge.errors import BadFile, NoCamera, UsageError
from test_edge_run import agree, colour_model, lines_of
from test_video import FAULTS, TEST, make_clip, tidy  # noqa: F401 (tidy is a fixture)

pytestmark = pytest.mark.skipif(not shutil.which("gst-launch-1.0"), reason="GStreamer is not installed: apt install "
                                "gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-libav")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colour_model(tmp_path_factory, 3, 64, 0)


@pytest.fixture
def run(model, capfd):
    """run(code, *words): edge-run in this process, with that exit code. Returns (stdout, stderr)."""
    def call(code, *words):
        capfd.readouterr()
        got = edge_run(["--engine", model] + [str(word) for word in words])
        out, err = capfd.readouterr()
        assert got == code, err
        assert "Traceback" not in err and "bug in nanopatch" not in err
        assert sum(line.startswith("error:") for line in err.splitlines()) == (code != 0)
        return out, err
    return call


def test_a_clip(run, tmp_path):
    clip = make_clip(tmp_path / "a.avi", 12)
    out, err = run(0, "--input", clip, "--output", tmp_path / "out", "--json")
    lines = lines_of(tmp_path / "out" / "results.jsonl")
    for index, line in enumerate(lines):
        agree(line, "result")
        assert (line["frame"], line["width"], line["height"], line["source"]) == (index, 64, 48, clip)
        assert line["health"]["processed"] == index + 1 and line["health"]["dropped"] == line["health"]["restarts"] == 0
        assert 0 <= line["done_time_s"] - line["capture_time_s"] < 60 and abs(line["done_time_s"] - time.time()) < 600
    summary = json.loads(out)
    assert len(lines) == summary["frames"] == 12 and summary["health"]["received"] == 12 and "12 frames done, 0 failed, 0 dropped" in err
    assert len(os.listdir(str(tmp_path / "out"))) == 25 and os.path.exists(str(tmp_path / "out" / "frame-000011.mask.png"))


def test_flags_reach_the_source(run, tmp_path):
    out, _err = run(0, "--input", make_clip(tmp_path / "a.avi", 30), "--output", "-", "--input-width", 32, "--input-height", 40,
                    "--input-flip", "clockwise", "--input-rate", 10, "--policy", "every")
    lines = [json.loads(line) for line in out.splitlines()]
    assert {(line["width"], line["height"]) for line in lines} == {(32, 40)} and 9 <= len(lines) <= 11
    out, _err = run(0, "--input", TEST % ("true", "ball", 60, 64, 48, 60), "--output", "-", "--policy", "newest", "--frames", 5)
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 5
    for line in lines:
        agree(line, "result")
        assert line["health"]["received"] == line["health"]["processed"] + line["health"]["dropped"]


def test_benchmark_keeps_its_pictures(run, tmp_path):
    out, _err = run(0, "--input", make_clip(tmp_path / "a.avi", 12), "--benchmark", "--runs", 3, "--warm-up", 1, "--json")
    assert json.loads(out)["width"] == 64


def test_list_sources(capsys):
    assert edge_run(["--list-sources"]) == 0
    assert capsys.readouterr().out.strip()
    assert edge_run(["--list-sources", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["cameras"], list)


@pytest.mark.parametrize("words, code, hint", [
    ("--input {here}/empty.mp4", 5, "0 bytes"), ("--input {here}/noise.mp4", 5, "noise.mp4"), ("--input {here}/absent.mp4", 5, "absent"),
    ("--input /dev/video77 --patience 0.3", 6, "--list-sources"), ("--input csi://0", 2, "nvarguscamerasrc"),
    ("--input rtsp://bob:hunter2@127.0.0.1:9/x --patience 0.3", 6, "***@127.0.0.1:9"),
    ("--inptu rtsp://bob:hunter2@h/x", 2, "--input"), ("--input gst://nosuch", 2, "nosuch"), ("--input synthetic://9x9 --input-width 5", 2, "--input-height"),
    ("--input synthetic://9x9 --input-flip up", 2, "--input-flip"), ("--input csi://a", 2, "csi://0"),
    ("--input synthetic://9x9 --patience -1", 2, "--patience"), ("--input synthetic://9x9 --input-codec h263", 2, "--input-codec")])
def test_exit_codes(words, code, hint, run, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.RandomState(0).bytes(9000))
    out, err = run(code, "--output", tmp_path / "r.jsonl", *words.format(here=tmp_path).split())
    assert hint in err and "hunter2" not in out + err and "bob" not in out + err
    if (tmp_path / "r.jsonl").exists():
        assert (tmp_path / "r.jsonl").read_text() == ""


def test_no_password_in_results(run, tmp_path):
    secret = "gst://videotestsrc name=token=s3cret num-buffers=2 ! video/x-raw,width=64,height=48"
    out, err = run(0, "--input", secret, "--output", "-")
    assert "s3cret" not in out + err and json.loads(out.splitlines()[0])["source"].count("***") == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("policy", ["every", "newest"])
def test_interrupted(number, code, policy, model, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "edge.cli", "--engine", model, "--input", TEST % ("true", "ball", -1, 64, 48, 30), "--output", "-",
         "--policy", policy], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=ROOT))
    line = json.loads(process.stdout.readline().decode())
    agree(line, "result")
    pids = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if _parent(pid) == process.pid]
    assert len(pids) == 1
    process.send_signal(number)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == code and b"Traceback" not in err
    assert not os.path.exists("/proc/" + pids[0]), "the decoder outlived edge-run"


def _parent(pid):
    try:
        with open("/proc/%s/stat" % pid) as handle:
            return int(handle.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


# --- edge.run ---------------------------------------------------------------------------------------------------------

def test_five_lines(model, tmp_path, tidy):  # noqa: F811
    source, indices = make_clip(tmp_path / "a.avi", 8), []
    for frame, result in edge.run(model, source):
        indices.append(frame.index)
        assert result.mask.shape == (48, 64) and result.mask.dtype == np.uint8 and result.error is None
        assert abs(sum(result.area.values()) - 1) < 1e-9 and result.latency_ms["run"] > 0
        assert result.health == frame.health and result.done_time_s >= result.capture_time_s
        picture = frame.open().window(0, 0, 48, 64)
        assert picture.shape == (48, 64, 3)
    assert indices == list(range(8))


def test_masks_are_yours_to_keep(model):
    masks = [result.mask for _frame, result in edge.run(model, "synthetic://64x48", limit=3)]
    assert len({mask.ctypes.data for mask in masks}) == 3 and not np.array_equal(masks[0], masks[2])


def test_leaving_the_loop_ends_the_camera(model, tidy):  # noqa: F811
    for frame, _result in edge.run(model, TEST % ("true", "ball", -1, 64, 48, 30), policy="newest"):
        if frame.index > 2:
            break
    del frame, _result


def test_errors_of_the_api(model, tmp_path, tidy):  # noqa: F811
    with pytest.raises(NoCamera):
        next(edge.run(model, "/dev/video77", patience_s=0.2))
    with pytest.raises(UsageError, match="no option colour"):
        next(edge.run(model, "/dev/video77", colour=1))
    with pytest.raises(BadFile):
        next(edge.run(model, str(tmp_path / "absent.mp4")))
    (tmp_path / "x.png").write_bytes(b"no image")
    ((_frame, result),) = list(edge.run(model, str(tmp_path / "x.png")))
    assert "x.png" in result.error and result.mask is None


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("bottle-detection.mp4", 1189), ("car-detection.mp4", 377),
                                         ("one-by-one-person-detection.mp4", 1394)])
def test_masks_of_every_frame_of_the_clips(name, count, model):
    if not FAULTS and count > 400:
        pytest.skip("minutes; NANOPATCH_FAULTS=40 runs it")
    indices = []
    for frame, result in edge.run(model, os.path.join(real_data("video"), name)):
        assert result.error is None and result.mask.shape == (frame.open().height, frame.open().width)
        indices.append(frame.index)
    assert indices == list(range(count))
