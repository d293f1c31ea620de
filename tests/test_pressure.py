"""Doing less under pressure: boards as trees of files, an injected clock, and scripted traces of memory, heat and clocks."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import edge
from conftest import ROOT
from edge import backends, cli, contract, images, loop, pressure
from edge.errors import UsageError
from edge.pipeline import Segmenter
from edge.pressure import Pressure
from edge.sinks import Memory, Sinks
from edge.sources import open_source, uri
from test_doctor import devfreq, meminfo, thermal, tree
from test_edge_run import agree, colour_model
from test_video import TEST
from test_video_faults import Clock

TOTAL_KB = 4059272  # of a Nano
TRIPS = [("critical", 102500), ("hot", 100500), ("passive", 97000)]
GPU, CPU = "57000000.gpu", "/sys/devices/system/cpu/cpu%d/cpufreq/scaling_max_freq"
V1, V2 = "/sys/fs/cgroup/memory/box/", "/sys/fs/cgroup/box/"


class Board:
    """A Nano as files below a root, and a Pressure that looks at it. said: list of (clock's seconds, line)."""

    def __init__(self, folder, **options):
        self.root, self.clock, self.said = str(folder), Clock(), []
        self.write(mib=3000, celsius=50, mhz=921, cpu_mhz=1479)
        self.write({"/var/lib/nvpmodel/status": "pmode:0000", "/sys/class/hwmon/hwmon4/oc1_event_cnt": "7\n",
                    "/var/log/kern.log": "[1] soctherm: OC ALARM 0x1\nmore\n"})
        self.pressure = self.make(**options)

    def make(self, tiled=True, **options):
        return Pressure(tiled, root=self.root, clock=self.clock, tell=lambda text: self.said.append((self.clock.now, text)),
                        **options)

    def write(self, files=(), mib=None, celsius=None, mhz=None, cpu_mhz=None):
        files = dict(files)
        if mib is not None:
            files["/proc/meminfo"] = meminfo(TOTAL_KB, mib * 1024)
        if celsius is not None:
            files.update(thermal(0, "AO-therm", 45000))
            files.update(thermal(1, "CPU-therm", celsius * 1000, TRIPS))
            files.update(thermal(2, "PMIC-Die", 100000, [("passive", 90000)]))
        if mhz is not None:
            files.update(devfreq(GPU, 76800000, 76800000, mhz * 10 ** 6, [76800000, 921600000]))
        if cpu_mhz is not None:
            files.update({CPU % core: "%d\n" % (cpu_mhz * 1000) for core in range(4)})
        tree(self.root, files)

    def run(self, seconds, step_s=0.5):
        """Look for so long, as between short frames. Returns the levels seen."""
        until, levels = self.clock.now + seconds - 1e-6, []
        while self.clock.now < until:
            self.clock.now += step_s
            self.pressure.begin()
            levels.append(self.pressure.level)
        return levels

    @property
    def gaps(self):
        times = [now for now, _text in self.said]
        return [after - before for before, after in zip(times, times[1:])]


@pytest.fixture
def nano(tmp_path):
    return Board(tmp_path)


TROUBLES = {
    "memory": (dict(mib=200), "memory", "200 of 3964 MiB of memory left, limit 256"),
    "heat": (dict(celsius=95), "temperature", "95.0 C at CPU-therm, limit 94"),
    "gpu clock": (dict(mhz=640), "throttled", "gpu at most 640 MHz, 921 before"),
    "cpu clock": (dict(cpu_mhz=918), "throttled", "cpu0 at most 918 MHz, 1479 before"),
    "counted alarm": (dict(files={"/sys/class/hwmon/hwmon4/oc1_event_cnt": "8\n"}), "throttled",
                      "oc1 counted 8 alarms of the power supply, 7 before"),
    "logged alarm": (dict(files={"/var/log/kern.log": "[1] soctherm: OC ALARM 0x1\nmore\n[9] soctherm: OC ALARM 0x1\n"}),
                     "throttled", "the kernel logged an alarm of the power supply"),
    "group, version 1": (dict(files={
        "/proc/self/cgroup": "4:memory:/box\n", V1 + "memory.limit_in_bytes": "%d\n" % (1024 << 20),
        V1 + "memory.usage_in_bytes": "%d\n" % (1020 << 20),
        V1 + "memory.stat": "total_inactive_file %d\ntotal_active_file %d\n" % (60 << 20, 36 << 20)}), "memory",
        "100 of 1024 MiB of memory left, limit 128"),
    "group, version 2": (dict(files={
        "/proc/self/cgroup": "0::/box/inner\n", V2 + "memory.max": "%d\n" % (3000 << 20),
        V2 + "memory.current": "%d\n" % (2904 << 20), V2 + "memory.stat": "anon 1\ninactive_file %d\n" % (60 << 20),
        V2 + "inner/memory.max": "max\n"}), "memory",
        "156 of 3000 MiB of memory left, limit 256"),
}


@pytest.mark.parametrize("files, cause, text", list(TROUBLES.values()), ids=list(TROUBLES))
def test_reacts_within_a_second_and_says_so_once(nano, files, cause, text):
    assert set(nano.run(50)) == {0} and nano.pressure.cause is None
    nano.write(**files)
    before = nano.clock.now
    nano.run(20)
    assert nano.pressure.level == 1 and nano.pressure.cause == cause and nano.pressure.scale == 1.0
    ((now, said),) = nano.said
    assert 0 < now - before <= 1.0
    assert said == "pressure: %s: level 1 of 4, working half of the time" % text


def test_down_level_by_level_and_back(nano):
    nano.write(celsius=96)
    levels = nano.run(200)
    assert levels[-1] == 4 and nano.pressure.scale == 0.5
    nano.write(celsius=80)
    levels += nano.run(200)
    assert levels[-1] == 0 and nano.pressure.cause is None and nano.pressure.scale == 1.0
    assert all(abs(after - before) <= 1 for before, after in zip(levels, levels[1:]))
    assert len(nano.said) == 8 and 30 <= min(nano.gaps) and all(gap <= 31 for gap in nano.gaps[:3] + nano.gaps[4:])
    assert nano.said[-1][1] == "pressure: 80.0 C at CPU-therm, fine below 89: level 0 of 4, working all of the time"


@pytest.mark.parametrize("values, period_s", [((93.6, 94.4), 1.5), ((93, 95), 20), ((60, 95), 20), ((88, 95), 7)])
def test_around_the_mark_nothing_flaps(nano, values, period_s):
    levels = []
    for index in range(round(200 / period_s)):
        nano.write({"/sys/class/thermal/thermal_zone1/temp": "%d\n" % (1000 * values[index % 2])})
        levels += nano.run(period_s, 0.25)
    assert levels == sorted(levels), "a step back between two steps down"
    assert levels[-1] > 0 and all(gap >= 30 for gap in nano.gaps)


@pytest.mark.parametrize("between", [dict(celsius=92), dict(mib=300)])
def test_between_the_marks_nothing_changes(nano, between):
    nano.write(**between)
    assert set(nano.run(100)) == {0}
    nano.write(celsius=95)
    nano.run(10)
    nano.write(celsius=50)
    nano.write(**between)
    assert set(nano.run(300)) == {1}


@pytest.mark.parametrize("files, cause", [(dict(mib=90), "memory"), (dict(celsius=100.5), "temperature")])
def test_critical_goes_to_the_deepest_at_once(nano, files, cause):
    nano.write(**files)
    before = nano.clock.now
    nano.run(5)
    assert nano.pressure.level == 4 and nano.pressure.cause == cause and len(nano.said) == 1 and nano.said[0][0] - before <= 1
    nano.write(mib=3000, celsius=50)
    nano.run(29.5)
    assert nano.pressure.level == 4
    nano.run(121)
    assert nano.pressure.level == 0 and all(gap >= 30 for gap in nano.gaps) and len(nano.said) == 5


def test_critical_soon_after_a_change_waits_for_its_turn(nano):
    nano.write(mib=200)
    nano.run(10)
    nano.write(mib=50)
    nano.run(19)
    assert nano.pressure.level == 1
    nano.run(3)
    assert nano.pressure.level == 4 and nano.gaps[0] >= 30


def test_two_kinds_at_once(nano):
    nano.write(mib=200, celsius=95)
    nano.run(10)
    assert nano.pressure.cause == "memory"
    nano.write(mib=3000)
    levels = nano.run(100)
    assert nano.pressure.cause == "temperature" and levels[-1] == 4 and levels == sorted(levels)
    nano.write(mib=200, celsius=101)
    nano.run(1)
    assert nano.pressure.cause == "temperature", "the worse of the two"
    nano.write(celsius=50)
    nano.run(200)
    assert nano.pressure.level == 4 and nano.pressure.cause == "memory"


# --- what is no pressure --------------------------------------------------------------------------------------------

def test_power_modes_are_no_throttling(tmp_path):
    nano = Board(tmp_path)
    nano.write({"/var/lib/nvpmodel/status": "pmode:0001"}, mhz=640, cpu_mhz=918)
    assert set(nano.run(60)) == {0}, "another mode while we run"
    nano.pressure = nano.make()
    assert set(nano.run(60)) == {0}, "5W from the start: high is below top"
    nano.write({"/var/lib/nvpmodel/status": "pmode:0000"}, mhz=921, cpu_mhz=1479)
    assert set(nano.run(60)) == {0}
    nano.write(cpu_mhz=1224)
    nano.run(1)
    assert nano.pressure.level == 1, "within the new mode it counts"
    for core in (0, 1, 2, 3):
        os.remove(nano.root + CPU % core)
    nano.run(31)
    assert nano.pressure.level == 0, "cores that are off"


NONSENSE = [b"", b"-1\n", b"99999999999999999999\n", b"nan\n", b"inf\n", b"\xff\xfe\x00\n", "\u00b2\u0663".encode(), b"0x10\n",
            b"9" * 5000, b"hot\n", b"1 2 3\n"]


@pytest.mark.parametrize("content", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_no_pressure(nano, content):
    zone = "/sys/class/thermal/thermal_zone1/"
    files = [zone + "temp", zone + "trip_point_0_temp", zone + "trip_point_2_temp", zone + "trip_point_2_type", CPU % 0,
             "/sys/class/devfreq/%s/max_freq" % GPU, "/sys/class/hwmon/hwmon4/oc1_event_cnt", "/var/log/kern.log",
             "/proc/self/cgroup", "/proc/meminfo", V1 + "memory.limit_in_bytes", V1 + "memory.usage_in_bytes", V1 + "memory.stat"]
    nano.write({"/proc/self/cgroup": "4:memory:/box\n", V1 + "memory.limit_in_bytes": "%d\n" % (1 << 30),
                V1 + "memory.usage_in_bytes": "%d\n" % (1 << 28), V1 + "memory.stat": "total_inactive_file 5\n"})
    for path in files:
        with open(nano.root + path, "rb") as handle:
            before = handle.read()
        nano.write({path: content})
        nano.pressure = nano.make()  # from the start
        assert set(nano.run(2, 0.5)) == {0}, path
        nano.write({path: before})
        nano.pressure = nano.make()
        nano.run(1, 0.5)
        torn = b"TotalMem 5\nMemAvailable: %s kB\nMemTotal: %s kB\n" % (content, content)
        nano.write({path: torn if "meminfo" in path else content})
        assert set(nano.run(2, 0.5)) == {0}, path  # and in between
        nano.write({path: before})


@pytest.mark.parametrize("milli", [-41000, 127000, 255000])
def test_what_broken_sensors_say(nano, milli):
    nano.write({"/sys/class/thermal/thermal_zone1/temp": "%d\n" % milli})
    assert set(nano.run(3)) == {0}


def test_no_sensors_at_all(tmp_path):
    board = Board(tmp_path / "a")
    shutil.rmtree(board.root)
    assert set(board.run(70)) == {0}
    board.pressure = board.make()
    assert set(board.run(70)) == {0} and board.said == []
    tree(board.root, thermal(0, "x", 120000))
    board.run(1)
    assert board.pressure.level == 4  # the first sensor that comes counts
    shutil.rmtree(board.root)
    assert board.run(125)[-1] == 0 and "no temperature can be read" in board.said[-1][1]


@pytest.mark.parametrize("trips, expected", [
    (TRIPS, (97, 100.5)), ([], (95, 100)), ([("passive", 30000), ("active", 50000)], (95, 100)),
    ([("critical", 85000)], (80, 85)), ([("passive", 97000)], (97, 102)),
    ([("passive", 97000), ("hot", 70000), ("critical", 105000)], (97, 102)),
    ([("passive", 250000), ("hot", 99000)], (94, 99))])
def test_trip_points(tmp_path, trips, expected):
    from jetson import board
    (zone,) = board.zones(tree(tmp_path, thermal(0, "soc", 40000, trips)))
    assert pressure.trips(zone) == expected


def test_old_alarms_and_a_log_that_is_turned_over(nano):
    for text in ("", "quiet\n", "[2] Out of memory: Kill process 3\n" * 300):
        nano.write({"/var/log/kern.log": text, "/sys/class/hwmon/hwmon4/oc1_event_cnt": "0\n"})
        assert set(nano.run(5)) == {0}


def test_marks_shrink_with_a_small_limit():
    assert [pressure.judge_memory([(left, 300.0)]).state for left in (14, 37, 50, 57)] == [
        pressure.CRITICAL, pressure.SHORT, pressure.UNEASY, pressure.FINE]
    assert [pressure.judge_memory([(left, 65536.0)]).state for left in (96, 256, 383, 384)] == [
        pressure.CRITICAL, pressure.SHORT, pressure.UNEASY, pressure.FINE]
    assert pressure.judge_memory([(9000.0, 65536.0), (10.0, 512.0)]).state == pressure.CRITICAL, "the group alone is short"


# --- invariants -----------------------------------------------------------------------------------------------------

def test_random_traces(tmp_path, monkeypatch):
    """Of whatever trace: a first change within 1 s, never two in 30 s, steps of one unless critical, and at last back to full."""
    seen = {"mib": 3000.0, "celsius": 50.0, "khz": 921600}
    monkeypatch.setattr(pressure.memory, "rooms_mib", lambda root: [(seen["mib"], 4096.0)])
    monkeypatch.setattr(pressure.board, "zones", lambda root, with_trips=True: [
        {"name": "GPU", "celsius": seen["celsius"], "trips": {"passive": 97.0, "hot": 100.0} if with_trips else {}}])
    monkeypatch.setattr(pressure.board, "clocks", lambda root, wanted: {"gpu": {"high": seen["khz"]}})
    monkeypatch.setattr(pressure.board, "line", lambda root, path: None)
    monkeypatch.setattr(pressure.board, "over_currents", lambda root: {})
    monkeypatch.setattr(pressure.board, "last_over_current", lambda root: None)
    changes = 0
    for seed in range(200):
        rng = random.Random(seed)
        seen.update(mib=3000.0, celsius=50.0, khz=921600)
        clock, said, levels = Clock(), [], []
        one = Pressure(True, least_scale=rng.choice([0.5, 0.6, 1.0]), root=str(tmp_path), clock=clock, tell=said.append)
        changed_s = short_s = float("-inf")
        level, until_s, end_s = 0, 0.0, clock.now + 180
        while clock.now < end_s + 160:
            if clock.now >= end_s:
                seen.update(mib=3000.0, celsius=50.0, khz=921600)
            elif clock.now >= until_s:
                seen.update(mib=rng.choice([3000.0, 3000.0, 380.0, 300.0, 256.0, 120.0, 90.0]),
                            celsius=rng.choice([50.0, 50.0, 88.9, 91.0, 93.9, 94.1, 99.0, 100.1, 300.0]),
                            khz=rng.choice([921600, 921600, 921600, 640000]))
                until_s = clock.now + rng.choice([0.3, 2, 10, 45])
            critical = seen["mib"] <= 96 or 100 <= seen["celsius"] <= 125
            short = critical or seen["mib"] <= 256 or 94 <= seen["celsius"] <= 125 or seen["khz"] < 921600
            fine = seen["mib"] >= 384 and not 89 < seen["celsius"] <= 125 and seen["khz"] == 921600
            short_s = (clock.now if short_s == float("-inf") else short_s) if short else float("-inf")
            one.begin()
            deepest = len(one.levels) - 1
            if one.level != level:
                assert clock.now - changed_s >= 30, (seed, clock.now)
                assert short if one.level > level else fine, (seed, clock.now)
                assert abs(one.level - level) == 1 or one.level == deepest and critical, (seed, clock.now)
                level, changed_s, changes = one.level, clock.now, changes + 1
            elif short and level < deepest and short_s > float("-inf"):
                assert clock.now - max(short_s, changed_s + 30) <= 1.0, (seed, clock.now)
            assert (one.cause is None) == (level == 0)
            clock.now += rng.uniform(0.05, 0.45)
            levels.append(level)
        assert level == 0 and len(said) == sum(a != b for a, b in zip([0] + levels, levels)), seed
    assert changes > 1000


# --- floors and pauses ----------------------------------------------------------------------------------------------

def test_floors():
    def scales(*given):
        return [level.scale for level in Pressure(*given).levels]

    assert scales(True) == [1.0, 1.0, 1.0, 0.7, 0.5] and scales(True, "auto", 1.0, 0.6) == [1.0, 1.0, 1.0, 0.7]
    assert scales(True, "auto", 1.0, 1.0) == scales(False) == [1.0, 1.0, 1.0] and scales(True, "off") == [1.0]
    for mode, rate, scale, flag in (("on", 1.0, 0.5, "--pressure"), ("auto", -1.0, 0.5, "--least-rate"),
                                    ("auto", float("nan"), 0.5, "--least-rate"), ("off", 1.0, 1.5, "--least-scale")):
        with pytest.raises(UsageError, match=flag):
            Pressure(True, mode, rate, scale)


@pytest.mark.parametrize("level, work_s, least_rate, pause_s", [
    (0, 0.1, 1.0, 0.0), (1, 0.1, 1.0, 0.1), (2, 0.1, 1.0, 0.3), (3, 0.1, 1.0, 0.3), (2, 0.4, 1.0, 0.6), (1, 2.0, 1.0, 0.0),
    (2, 2.0, 0.0, 6.0), (2, 2.0, 0.2, 3.0)])
def test_pauses_and_the_least_rate(nano, level, work_s, least_rate, pause_s):
    nano.write(mib=300)  # neither short nor fine
    nano.pressure = nano.make(least_rate=least_rate)
    nano.pressure.level = level
    nano.pressure.begin()
    nano.clock.now += work_s
    before = nano.clock.now
    nano.pressure.rest()
    assert abs(nano.clock.now - before - pause_s) < 1e-6


def test_looks_at_most_twice_a_second_and_during_pauses(nano, monkeypatch):
    looks, real = [], pressure.memory.rooms_mib
    monkeypatch.setattr(pressure.memory, "rooms_mib", lambda root: looks.append(nano.clock.now) or real(root))
    nano.pressure = nano.make(least_rate=0.0)
    nano.run(20, 0.01)
    assert 38 <= len(looks) <= 40 and min(np.diff(looks)) >= 0.5
    nano.write(mib=300)  # neither short nor fine
    nano.pressure.level = 2
    nano.pressure.begin()
    nano.clock.now += 10
    del looks[:]
    nano.write(celsius=99)
    nano.pressure.rest()
    assert 58 <= len(looks) <= 60 and min(np.diff(looks)) >= 0.5
    assert "level 3" in nano.said[0][1] and nano.said[0][0] == looks[0], "seen within the pause"


def test_off_never_looks(nano, monkeypatch):
    monkeypatch.setattr(pressure.memory, "rooms_mib", lambda root: pytest.fail("looked"))
    nano.write(mib=10, celsius=101)
    nano.pressure = nano.make(mode="off")
    assert set(nano.run(40)) == {0} and nano.said == []
    nano.pressure.rest()


# --- the loop -------------------------------------------------------------------------------------------------------

class Work:
    """A pipeline whose frames take 0.2 s of the clock."""
    classes, palette, positions, model = ["a"], [(0, 0, 0)], None, "0" * 12
    results = Segmenter.results

    def __init__(self, clock):
        self.clock, self.scales = clock, []

    def bands(self, picture, lap):
        self.scales.append(self.scale)
        self.clock.now += 0.2
        lap("run")
        yield np.zeros((picture.height, picture.width), np.uint8)

    def blend(self, pixels, labels):
        return pixels

    def attempt(self, work):
        return work()


def test_a_pause_is_after_the_result_and_in_no_stage(nano, monkeypatch):
    monkeypatch.setattr(Clock, "perf_counter", Clock.monotonic, raising=False)
    monkeypatch.setattr(loop, "time", nano.clock)
    nano.write(mib=50)
    work, began_s, levels = Work(nano.clock), nano.clock.now, []
    done_s, sinks = [], Memory()
    for _frame, line in loop.steps(open_source("synthetic://20x10", 5), work, sinks, nano.pressure):
        done_s.append(round(nano.clock.now - began_s, 6))
        assert abs(line["latency_ms"]["run"] - 200) < 1e-6 and abs(sum(line["latency_ms"].values()) - 200) < 1e-6
        assert abs(line["done_time_s"] - line["capture_time_s"] - 0.2) < 1e-5  # the wall clock is a large number
        levels.append((line["level"], line["pressure"]))
    assert done_s == [0.2, 1.0, 1.8, 2.6, 3.4], "a quarter of the time"
    assert work.scales == [0.5] * 5 and levels == [(4, "memory")] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colour_model(tmp_path_factory, 3, 32, 8)


@pytest.fixture
def segmenter(model):
    with Segmenter(*contract.load(model), backend=backends.choose("auto", model)) as made:
        yield made


def test_lines_fit_the_schema_at_every_level(nano, segmenter, tmp_path, capsys):
    sinks = Sinks("-", segmenter.palette, False)
    (tmp_path / "x.png").write_bytes(b"no image")
    for level, cause in enumerate([None, "memory", "temperature", "throttled", "memory"]):
        nano.pressure.level, nano.pressure.cause = level, cause
        for source in (open_source("synthetic://64x48", 1), open_source(str(tmp_path / "x.png"))):
            for _frame, line in loop.steps(source, segmenter, sinks, nano.pressure):
                agree(line, "result")
                assert (line["level"], line["pressure"], line["schema_version"]) == (level, cause, 4)
                agree(json.loads(capsys.readouterr().out), "result")


def smooth_picture(height=150, width=221):
    """Three broad stripes with soft borders, in the colours of the model's classes."""
    wave = np.sin(np.arange(width) / 23.0) + np.cos(np.arange(height) / 31.0)[:, None]
    share = (np.clip((wave + 1) * 4, 0, 1), np.clip(wave * 4 - 2, 0, 1))
    return images.ArrayPicture(np.stack([np.full_like(wave, 10), np.full_like(wave, 10), 10 + 110 * share[0] + 120 * share[1]],
                                        axis=2).astype(np.uint8))


@pytest.mark.parametrize("rule, px", [("none", 1), ("long", 180), ("stretch", 160)])
def test_fewer_tiles_and_a_mask_of_the_frame_s_own_size(segmenter, rule, px, monkeypatch):
    segmenter.recipe = segmenter.recipe._replace(resize=rule, resize_px=px)
    picture, tiles, real = smooth_picture(), [], segmenter.session.run
    monkeypatch.setattr(segmenter.session, "run", lambda *given, **more: tiles.append(1) or real(*given, **more))
    full, counts = None, []
    for scale in (1.0, 0.7, 0.5, 1.0):
        segmenter.scale, before = scale, len(tiles)
        mask = segmenter.mask(picture)
        counts.append(len(tiles) - before)
        full = mask if full is None else full
        assert mask.shape == (150, 221) and mask.dtype == np.uint8
        assert (mask == full).mean() > 0.97, scale
        assert scale < 1 or np.array_equal(mask, full)
    assert {0, 1, 2} == set(np.unique(full)) and counts[0] == counts[3] > counts[1] > counts[2]
    assert counts[1] < 0.65 * counts[0] and counts[2] < 0.4 * counts[0]


def test_one_pixel_frames_at_every_scale(segmenter):
    for scale in (1.0, 0.7, 0.5):
        segmenter.scale = scale
        assert segmenter.mask(images.ArrayPicture(np.zeros((1, 1, 3), np.uint8))).shape == (1, 1)


@pytest.mark.skipif(not shutil.which("gst-launch-1.0"), reason="GStreamer is not installed: apt install gstreamer1.0-tools")
@pytest.mark.parametrize("policy", ["newest", "every"])
def test_frames_are_counted_right_with_pauses(nano, segmenter, policy, monkeypatch):
    nano.write(mib=50)
    monkeypatch.setattr(pressure, "LEVELS", [level._replace(pause=30 * level.pause) for level in pressure.LEVELS])
    one = Pressure(True, least_rate=12.0, root=nano.root)
    uri_text = TEST % ("true" if policy == "newest" else "false", "ball", 24, 64, 48, 60)
    seen, last = [], None
    with open_source(uri_text, options=uri.Options(policy=policy)) as source:
        for frame, line in loop.steps(source, segmenter, Memory(), one):
            health = line["health"]
            assert line["level"] == 4 and health["received"] == health["processed"] + health["dropped"]
            assert health["processed"] == len(seen) + 1 and health["restarts"] == 0
            seen.append(frame.index)
        last = source.health()
    assert last["received"] == last["processed"] + last["dropped"] == 24
    assert seen == list(range(24)) if policy == "every" else last["dropped"] >= len(seen)


PAUSED = """
import functools, sys
from edge import cli, loop, pressure
pressure.LEVELS = [level._replace(pause=1e6 * level.pause) for level in pressure.LEVELS]
loop.Pressure = functools.partial(pressure.Pressure, root=sys.argv.pop(1))
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pause_ends_at_once(nano, model, number, code):
    """Of a pause of hours."""
    nano.write(mib=50)
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, nano.root, "--engine", model, "--input", "synthetic://64x48", "--least-rate", "0",
         "--output", "-"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=ROOT))
    assert json.loads(process.stdout.readline().decode())["level"] == 2
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and out == b"" and b"Traceback" not in err
    assert [line for line in err.decode().splitlines() if line.startswith("pressure: 50 of 3964 MiB")]


# --- flags ----------------------------------------------------------------------------------------------------------

def under(root, monkeypatch, where):
    """Make `where` look at the board below root."""
    monkeypatch.setattr(where, "Pressure", lambda *given: Pressure(*given, root=root))


def test_flags_of_the_command(nano, model, monkeypatch, capfd):
    nano.write(mib=50)
    under(nano.root, monkeypatch, loop)
    words = ["--engine", model, "--input", "synthetic://64x48", "--frames", "1", "--output", "-"]
    for more, level in (([], 2), (["--pressure", "off"], 0)):  # a still's mask is never made of a smaller frame
        assert cli.main(words + more) == 0
        out, err = capfd.readouterr()
        assert json.loads(out)["level"] == level and err.count("pressure: ") == (level > 0)
    for more in (["--pressure", "on"], ["--least-rate", "-1"], ["--least-scale", "2"]):
        assert cli.main(words + more) == 2 and more[0] in capfd.readouterr().err


def test_benchmark_never_slows_down(model, monkeypatch):
    monkeypatch.setattr(loop, "Pressure", lambda *given, **more: pytest.fail("looked"))
    assert cli.main(["--engine", model, "--input", "synthetic://64x48", "--benchmark", "--runs", "2", "--warm-up", "0"]) == 0


def test_flags_of_the_api(nano, model, monkeypatch):
    nano.write(mib=50)
    under(nano.root, monkeypatch, loop)
    for options, level in (({}, 2), (dict(pressure="off"), 0)):
        assert [result.level for _frame, result in edge.run(model, "synthetic://64x48", limit=2, **options)] == [level] * 2
    with pytest.raises(UsageError, match="--least-rate"):
        next(edge.run(model, "synthetic://64x48", least_rate=-1.0))


@pytest.mark.parametrize("newest, tiled, options, level", [
    (True, True, (), 4), (True, True, ("auto", 9.0, 0.7), 3), (True, True, ("auto", 1.0, 1.0), 2), (False, True, (), 2), (True, False, (), 2)])
def test_only_frames_that_may_be_dropped_are_made_smaller(nano, monkeypatch, newest, tiled, options, level):
    nano.write(mib=50)
    under(nano.root, monkeypatch, loop)
    one = loop.pressure_on(types.SimpleNamespace(newest=newest), types.SimpleNamespace(tiled=tiled), *options)
    one.begin()
    assert one.level == level == len(one.levels) - 1


def test_pipelines_of_fixed_shape_only_pause():
    """The model's pipeline decides; none of fixed shape cuts tiles."""
    assert set(contract.STAGES) - set(contract.TILED) == {"whole", "uniform", "deform", "grid"}
