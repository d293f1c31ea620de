"""Cameras that fail, under an injected clock: a fake GStreamer process gives bytes, and faults among them."""
import errno
import os
import random
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from conftest import ROOT
from edge.errors import (BadFile, BlackFrames, DecoderExit, FrozenFrames, MissingElement, NoCamera, NoFrame, ShortFrame, SourceLost,
                         TornFrame, UsageError, WrongSize)
from edge.sources import child, faults, uri, video

KINDS = ("no frame", "frozen", "black", "torn frame", "short frame", "wrong size", "decoder exit", "time jump")
PERIOD_S, WIDTH, HEIGHT = 1 / 30.0, 22, 10  # rows of 66 bytes are padded to 68
CAPS = "video/x-raw, format=(string)RGB, width=(int)%d, height=(int)%d, framerate=(fraction)30/1"


class Clock:
    def __init__(self):
        self.now, self.jump = 5000.0, 0.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1.6e9 + self.now + self.jump

    def sleep(self, seconds):
        self.now += seconds


class World:
    """What a camera sees, and what shall go wrong: inject(kind) spoils the next frame. sent: frames that came whole."""

    def __init__(self, seed=0):
        self.clock, self.rng, self.number, self.sent = Clock(), random.Random(seed), 0, 0
        self.fault, self.began_s, self.stubborn, self.children, self.last = None, None, 0, 0, None
        self.incurable = False

    def inject(self, kind):
        self.fault, self.began_s = kind, None

    def start(self):
        self.children += 1
        if self.fault and self.stubborn:
            self.stubborn -= 1
            return FakeChild(self, dead=True)
        if self.fault != "time jump" and not self.incurable and self.began_s is not None:
            self.fault = None  # a new process is a whole one
        return FakeChild(self)

    def pixels(self):
        """The next picture, of which no two are alike: its number is in its first bytes."""
        self.number += 1
        rows = np.full((HEIGHT, 68), 100 + self.number % 100, np.uint8)
        rows[0, :4] = np.frombuffer(np.uint32(self.number).tobytes(), np.uint8)
        return rows


class FakeChild:
    """As child.Child: frames at 30 per second of the world's clock."""

    def __init__(self, world, dead=False):
        self.world, self.caps, self.closed = world, CAPS % (WIDTH, HEIGHT), False
        self.due_s, self.bytes, self.at, self.whole = world.clock.now + PERIOD_S, b"", 0, False
        self.end = (1, "ERROR: from element x: Internal data stream error.") if dead else None
        self.silent = False

    def wait(self, timeout_s):
        clock = self.world.clock
        if self.at < len(self.bytes) or self.end:
            clock.now += 1e-4
            return True
        if not self.silent and self.due_s <= clock.now + timeout_s:
            clock.now = max(clock.now, self.due_s)
            self.due_s += PERIOD_S
            self._make()
            return self.at < len(self.bytes) or bool(self.end)
        clock.now += max(timeout_s, 1e-3)
        return False

    def _make(self):
        world = self.world
        kind, rng = world.fault, world.rng
        if kind and world.began_s is None:
            world.began_s = world.clock.now
        rows = world.pixels()
        if kind == "no frame":
            self.silent = True
            return
        if kind == "frozen":
            rows = world.last
        elif kind == "black":
            rows = np.full_like(rows, rng.randrange(9))
        elif kind == "time jump" and world.clock.jump == world.base:
            world.clock.jump += rng.choice([-1, 1]) * rng.uniform(1.5, 1e5)
        world.last = rows
        data = rows.tobytes()
        head = child.PREFIX + b"%d" % len(data) + child.BLANK
        self.at, self.whole = 0, kind in (None, "frozen", "black", "time jump")
        self.bytes = head + data + child.TRAILER
        if kind == "torn frame":
            cut = rng.randrange(len(self.bytes) - 2)
            self.bytes = self.bytes[:cut] + self.bytes[cut + rng.randrange(1, 40):] if rng.random() < 0.5 else \
                self.bytes[:cut] + bytes(bytearray([7] * rng.randrange(1, 40))) + self.bytes[cut:]
        elif kind == "short frame":
            self.bytes = self.bytes[:rng.randrange(1, len(self.bytes) - 1)]
            self.silent = rng.random() < 0.5
            self.end = None if self.silent else (0, "")
        elif kind == "wrong size" and rng.random() < 0.5:
            self.caps = CAPS % (HEIGHT, WIDTH)
        elif kind == "wrong size":
            self.bytes = child.PREFIX + b"%d" % (len(data) * 4) + child.BLANK + data * 4 + child.TRAILER
        elif kind in ("end", "killed"):
            self.bytes, self.end = b"", (0, "") if kind == "end" else (-9, "WARNING: x")
        elif kind == "decoder exit":
            self.bytes, self.end = b"", rng.choice([(0, ""), (-9, ""), (-11, ""), (1, "ERROR: from element x: gone."), (255, "")])

    def read_into(self, view):
        part = self.bytes[self.at:self.at + min(len(view), self.world.rng.randrange(1, 3000))]
        view[:len(part)] = part
        self.at += len(part)
        if self.whole and self.at == len(self.bytes):
            self.world.sent, self.whole = self.world.sent + 1, False
        return len(part)

    def ended(self):
        return self.end

    def close(self, _grace_s=0.0):
        assert not self.closed
        self.closed = True


def camera(world, kind="v4l2", newest=False, **options):
    """A Video of the world, and the list of what it says."""
    said = []
    place = uri.Place(kind, 0 if kind == "csi" else "/dev/video0", "csi://0" if kind == "csi" else "/dev/video0")
    options = uri.Options(policy="newest" if newest else "every", frozen_s=1.0, black_s=1.0, **options)
    return video.Video(place, options, 0, world.start, world.clock, lambda text: said.append((world.clock.now, text))), said


def number_in(frame):
    pixels = frame.open().array
    return int(np.frombuffer(np.concatenate([pixels[0, 0], pixels[0, 1, :1]]).tobytes(), np.uint32)[0])


def torment(count, kind, seed, newest=False):
    """`count` faults, one after the other. Returns a list of (fault, seconds to its detection, to the next good frame)."""
    world = World(seed)
    source, said = camera(world, kind, newest)
    times, last, handed, buffers, memory = [], 0, 0, set(), []
    if newest:
        tracemalloc.start()  # slow

    def frame():
        nonlocal last, handed
        while True:
            if newest:
                assert source.read()
                if world.rng.random() < 0.4:
                    continue  # whoever asks is slow: a newer frame takes its place
                got = source.take()
            else:
                got = next(source)
            handed += 1
            health = got.health
            assert health["received"] == health["processed"] + health["dropped"] == world.sent
            assert health["processed"] == handed
            assert not got.open().array.flags.owndata and got.open().array.shape == (HEIGHT, WIDTH, 3)
            buffers.add(got.open().array.__array_interface__["data"][0])
            if got.open().array.max() > 16:
                number = number_in(got)
                assert number > last, "a stale frame was passed off as fresh"
                last = number
                return got
            assert world.fault == "black"

    for index in range(count):
        for _ in range(world.rng.randrange(2, 6)):
            frame()
        fault, heard = KINDS[index % len(KINDS)], len(said)
        world.base, world.stubborn = world.clock.jump, world.rng.choice([0, 0, 1, 2]) if kind != "csi" else 0
        world.inject(fault)
        while True:
            got = frame()
            if len(said) > heard and (world.fault is None or fault == "time jump"):
                break
        # the first words are of this fault, the last ones of processes that did not start
        times.append((fault, said[heard][0] - world.began_s, world.clock.now - world.began_s))
        words = {fault, "decoder exit"} | ({"wrong size"} if fault == "torn frame" else set())  # a digit of its length is lost
        assert got.health["last_fault"] in words, (fault, said[heard:])
        world.fault = None
        if newest and index % 40 == 39:
            del said[:]
            memory.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(buffers) <= video.BUFFERS
    assert not memory or memory[-1] - memory[0] < 1 << 20, memory
    source.close()
    health = source.health()
    assert health["received"] == health["processed"] + health["dropped"] == world.sent
    assert health["restarts"] == world.children - 1 and health["time_jumps"] == sum(t[0] == "time jump" for t in times)
    return times


@pytest.mark.parametrize("count, newest", [(1000, False), (200, True)], ids=["every", "newest"])
def test_a_thousand_faults(count, newest):
    before = set(threading.enumerate())
    times = torment(count, "v4l2", 1, newest)
    assert {kind: sum(t[0] == kind for t in times) for kind in KINDS} == dict.fromkeys(KINDS, count // 8)
    assert max(detected for _kind, detected, _healed in times) <= 2.0
    assert max(healed for _kind, _detected, healed in times) <= 5.0
    assert set(threading.enumerate()) <= before


def test_csi_waits_for_argus_and_comes_back():
    times = torment(80, "csi", 2)
    assert max(detected for _kind, detected, _healed in times) <= 2.0
    assert max(healed for _kind, _detected, healed in times) <= 5.0


# --- patience -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, error", list(zip(KINDS[:-1], (
    NoFrame, FrozenFrames, BlackFrames, TornFrame, ShortFrame, WrongSize, DecoderExit))))
def test_lost_only_after_the_patience_set(kind, error):
    world = World()
    source, said = camera(world, patience_s=20.0)
    for _ in range(3):
        next(source)
    world.incurable = True  # the new processes are as bad
    world.inject(kind)
    with pytest.raises(error) as caught:
        while True:
            last_good_s = world.clock.now
            next(source)
    assert caught.value.exit_code == 6 and caught.value.kind == kind and isinstance(caught.value, SourceLost)
    assert "/dev/video0" in str(caught.value) and "--patience 20" in str(caught.value)
    assert 19.9 <= world.clock.now - last_good_s <= 22.0
    assert len(said) >= 2
    with pytest.raises(StopIteration):
        for _ in range(3):
            next(source)
    health = source.health()
    assert health["received"] == health["processed"] + health["dropped"]


def test_a_camera_that_never_comes():
    world = World()
    world.fault, world.stubborn = "decoder exit", 10 ** 9
    source, said = camera(world, "csi", patience_s=15)
    with pytest.raises(DecoderExit, match="sudo systemctl restart nvargus-daemon"):
        next(source)
    assert 15 <= world.clock.now - 5000 <= 17 and 3 <= len(said) <= 8  # each pause longer than the one before


def test_patience_0_is_the_first_fault():
    world = World()
    world.inject("decoder exit")
    with pytest.raises(DecoderExit):
        next(camera(world, patience_s=0)[0])
    assert world.children == 1


def test_off_unless_asked_for():
    world = World()
    source = video.Video(uri.Place("v4l2", "/dev/video0", "x"), uri.Options(policy="every"), 0, world.start, world.clock)
    next(source)
    for kind in ("black", "frozen"):
        world.inject(kind)
        for _ in range(300):
            next(source)
    assert source.health()["restarts"] == source.health()["dropped"] == 0


def test_black_from_the_start_and_light_later():
    """What was black when it was told stays dropped until it is not."""
    dog = faults.Watchdog(black_s=1.0)
    dark, light = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 90, np.uint8)
    assert [dog.look(dark, t) for t in (0, 0.5)] == [True, True]
    with pytest.raises(BlackFrames):
        dog.look(dark, 1.0)
    dog.restarted()
    assert not dog.look(dark, 1.2) and dog.look(light, 1.3) and dog.look(dark, 1.4)
    light[17, 23] = 0
    light[3:] = 0
    assert dog.look(light, 9)


def test_frozen_sees_one_byte():
    dog = faults.Watchdog(frozen_s=1.0)
    pixels = np.zeros((30, 31, 4), np.uint8)[..., :3]  # rows that are not together in memory
    assert dog.look(pixels, 0) and not dog.look(pixels, 0.1)
    pixels[29, 30, 2] = 1
    assert dog.look(pixels, 0.2) and not dog.look(pixels, 1.3)
    with pytest.raises(FrozenFrames):
        dog.look(pixels, 2.4)


# --- the newest frame, with its thread ----------------------------------------------------------------------------------

def test_thread_gives_the_newest_and_ends():
    world = World()
    before = set(threading.enumerate())
    source, _said = camera(world, newest=True)
    seen = [number_in(next(source)) for _ in range(50)]
    assert seen == sorted(set(seen))
    source.close()
    source.close()
    health = source.health()
    assert set(threading.enumerate()) <= before and health["received"] == health["processed"] + health["dropped"]
    assert health["processed"] == 50
    with pytest.raises(StopIteration):
        next(source)


def test_what_ends_the_thread_is_raised_to_who_asks():
    world, before = World(), set(threading.enumerate())
    world.fault, world.stubborn = "decoder exit", 10 ** 9
    with camera(world, newest=True, patience_s=3)[0] as source:
        with pytest.raises(DecoderExit):
            next(source)
    assert set(threading.enumerate()) <= before


def test_limit():
    world = World()
    for newest in (False, True):
        source = video.Video(uri.Place("v4l2", "/dev/video0", "x"), uri.Options(policy="newest" if newest else "every"), 7,
                             world.start, world.clock)
        assert len(list(source)) == 7 and source.health()["processed"] == 7


# --- files ------------------------------------------------------------------------------------------------------------

class Film(World):
    """A file of 40 frames, which every new process begins anew; `times` times the frame after the 12th is spoilt."""

    def __init__(self, error, times=10 ** 9):
        super().__init__()
        self.error, self.times = error, times

    def start(self):
        self.children, self.number, self.fault = self.children + 1, 0, None
        return FakeChild(self)

    def pixels(self):
        rows = super().pixels()
        if self.number == 12 and self.times:
            self.times, self.fault = self.times - 1, self.error
        elif self.number == 40:
            self.fault = "end"
        return rows


def film(world):
    return video.Video(uri.Place("file", "/x/a.avi", "/x/a.avi"), uri.Options(), 0, world.start, world.clock, lambda text: None)


@pytest.mark.parametrize("error", ["no frame", "killed", "torn frame"])
def test_a_file_goes_on_where_it_was(error, monkeypatch):
    monkeypatch.setattr(video, "missing_bytes", lambda path: 0)
    world = Film(error, times=2)
    source = film(world)
    assert [number_in(frame) for frame in source] == list(range(1, 41)) and world.children == 3
    assert source.health() == {"received": 40, "processed": 40, "dropped": 0, "restarts": 2, "time_jumps": 0,
                               "last_fault": "decoder exit" if error == "killed" else error}
    source = film(Film(error))
    with pytest.raises(BadFile, match="beyond frame 12"):
        list(source)


# --- GStreamer's words ----------------------------------------------------------------------------------------------------

PLACES = {"csi": uri.Place("csi", 0, "csi://0"), "v4l2": uri.Place("v4l2", "/dev/video0", "/dev/video0"),
          "rtsp": uri.parse("rtsp://bob:hun%40ter2@10.0.0.9/x?token=t0ken"), "file": uri.Place("file", "a.mp4", "a.mp4"),
          "gst": uri.parse("gst://rtspsrc location=rtsp://bob:hunter3@h/x user-pw=pw1 ! decodebin")}
ERROR = "ERROR: from element /GstPipeline:pipeline0/Gst%s:x0: %s\nAdditional debug info:\nx.c(1): f ():\n%s\n"


@pytest.mark.parametrize("kind, text, error, hint", [
    ("v4l2", ERROR % ("V4l2Src", "Cannot identify device '/dev/video0'.", "system error: No such file or directory"), NoCamera,
     "--list-sources"),
    ("v4l2", ERROR % ("V4l2Src", "Device '/dev/video0' is busy", "system error: Device or resource busy"), None, "fuser"),
    ("v4l2", ERROR % ("V4l2Src", "Could not open device '/dev/video0' for reading and writing.", "system error: Permission denied"),
     UsageError, "usermod"),
    ("v4l2", ERROR % ("V4l2Src", "Internal data stream error.", "streaming stopped, reason not-negotiated (-4)"), UsageError,
     "--list-sources"),
    ("csi", "Error generated. /dvs/git/gstnvarguscamerasrc.cpp, execute:645 No cameras available\n", NoCamera, "cable"),
    ("csi", "Error generated. /dvs/git/gstnvarguscamerasrc.cpp, execute:751 Failed to create CaptureSession\n", DecoderExit,
     "sudo systemctl restart nvargus-daemon"),
    ("csi", "(Argus) Error Timeout:  (propagating from src/rpc/socket/client/ClientSocketManager.cpp)", DecoderExit, "nvargus-daemon"),
    ("rtsp", ERROR % ("RTSPSrc", "Could not open resource for reading and writing.", "Failed to connect. (Generic error)"),
     DecoderExit, "Could not open"),
    ("rtsp", ERROR % ("RTSPSrc", "Unauthorized", "rtsp://bob:hun%40ter2@10.0.0.9/x (401)"), UsageError, "password"),
    ("rtsp", ERROR % ("RTSPSrc", "cannot play rtsp://bob:hun@ter2@10.0.0.9/x?token=t0ken hun@ter2", ""), DecoderExit, "cannot play"),
    ("gst", ERROR % ("RTSPSrc", "no rtsp://bob:hunter3@h/x with pw1", ""), DecoderExit, "no rtsp"),
    ("gst", 'WARNING: erroneous pipeline: no element "nosuch"', MissingElement, "apt install"),
    ("gst", 'WARNING: erroneous pipeline: no element "h264parse"', MissingElement, "gstreamer1.0-plugins-bad"),
    ("gst", 'WARNING: erroneous pipeline: no element "avdec_h264"', MissingElement, "gstreamer1.0-libav"),
    ("gst", "WARNING: erroneous pipeline: syntax error", UsageError, "syntax error"),
    ("file", ERROR % ("DecodeBin", "Your GStreamer installation is missing a plug-in.",
                      "no suitable plugins found:\nMissing decoder: H.265 (Main Profile) (video/x-h265)"), MissingElement, "H.265"),
    ("file", ERROR % ("TypeFind", "Could not determine type of stream.", ""), BadFile, "damaged"),
    ("file", ERROR % ("QTDemux", "This file is corrupt and cannot be played.", ""), BadFile, "corrupt"),
])
def test_one_clear_sentence(kind, text, error, hint):
    exit_error = DecoderExit("GStreamer ended with status 1")
    exit_error.status, exit_error.text = 1, text
    known = faults.explain(exit_error, PLACES[kind])
    assert type(known) is (error or faults.BusyCamera), known
    assert hint in str(known) and "\n" not in str(known)
    for secret in ("bob", "hun", "hunter3", "t0ken", "pw1"):
        assert secret not in str(known)
    assert known.exit_code == {BadFile: 5, UsageError: 2, MissingElement: 2}.get(error, 6)


def test_a_killed_decoder_is_no_damaged_file():
    error = DecoderExit("GStreamer was killed by signal 9")
    error.status, error.text = -9, "WARNING: from element x: late."
    assert faults.explain(error, PLACES["file"]) is error


def test_every_kind_is_in_the_schema():
    from edge import schema
    kinds = schema.load("result")["properties"]["health"]["properties"]["last_fault"]["enum"]
    assert {cls.kind for cls in SourceLost.__subclasses__()} | {"time jump", None} == set(kinds)


def test_a_camera_that_gave_frames_does_not_lack_rights_for_good():
    """udev gives the node of a camera that is plugged in again to its group some 100 ms late."""
    world = World()
    source, said = camera(world)
    next(source)

    class Denied(FakeChild):
        def __init__(self):
            super().__init__(world, dead=True)
            self.end = (1, "ERROR: from element x: Could not open device '/dev/video0'. system error: Permission denied")

    starts = iter([Denied(), Denied()])
    source._healer._start = lambda: next(starts, None) or world.start()
    world.fault = "killed"
    for _ in range(5):
        next(source)
    assert sum("no permission" in text for _at, text in said) == 2
    never = World()
    source, _said = camera(never)
    source._healer._start = lambda: Denied()
    with pytest.raises(UsageError, match="usermod"):
        next(source)


def test_the_time_that_a_caller_takes_is_no_fault_of_the_source():
    world = World()
    source, said = camera(world, patience_s=20.0)
    next(source)
    world.clock.now += 60
    world.fault = "killed"
    next(source)
    assert len(said) == 1


def test_no_memory_to_start_gstreamer_may_pass(monkeypatch):
    def refuse(*_args, **_named):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    monkeypatch.setattr(child.subprocess, "Popen", refuse)
    with pytest.raises(DecoderExit, match="Cannot allocate memory"):
        child.Process(["fakesrc"])


def test_names_of_cameras_are_any_bytes(tmp_path):
    (tmp_path / "video0").mkdir()
    (tmp_path / "video0" / "name").write_bytes("Microsoft\u00ae LifeCam".encode()[:-1] + b"\xc2")
    video.check_node(uri.Place("v4l2", "/dev/video0", "/dev/video0"), str(tmp_path))
    code = "import sys; from edge import cli; from edge.sources import cameras; cameras.list_cameras.__defaults__ = (%r, 'none'); sys.exit(cli.main())"
    done = subprocess.run([sys.executable, "-c", code % str(tmp_path), "--list-sources"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=dict(os.environ, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONPATH=ROOT))
    assert done.returncode == 0 and b"Microsoft? LifeCa" in done.stdout, (done.stdout, done.stderr)
