"""The profiler: what a command takes, seen from outside and compared with what it is known to take."""
import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from conftest import ROOT, command
from jetson import __main__, profile, timeline, tegrastats

HOLD = ("import mmap, time; m = mmap.mmap(-1, %d << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); "
        "[m.__setitem__(at, 1) for at in range(0, len(m), 4096)]; ")  # MiB, every page touched


def watched(folder, *words, interval=20, **options):
    """Profile a command. Returns (process, summary, rows of samples.csv)."""
    done = command("jetson", "profile", "--out", folder / "out", "--interval", interval, "--", *words, **options)
    with open(str(folder / "out" / "summary.json")) as handle:
        summary = json.load(handle)
    with open(str(folder / "out" / "samples.csv"), newline="") as handle:
        return done, summary, list(csv.DictReader(handle))


def script(folder, text):
    path = folder / "cmd.py"
    path.write_text("import os, signal, subprocess, sys, time\nfrom jetson.phases import mark\n" + text)
    return [sys.executable, str(path)]


def tree(folder, files):
    for path, text in files.items():
        full = os.path.join(str(folder), path.lstrip("/"))
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "wb") as handle:
            handle.write(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def test_a_child_counts_in_its_phase(tmp_path):
    hold = repr(HOLD % 120 + "time.sleep(0.8)")
    done, summary, rows = watched(tmp_path, *script(tmp_path, """
time.sleep(0.3)
mark("the child's")
subprocess.check_call([sys.executable, "-c", %s])
mark("after it \\x1b[31m\\u00e9")
time.sleep(0.3)
""" % hold))
    assert done.returncode == 0, done.stderr
    phases = {one["name"]: one for one in summary["phases"]}
    assert list(phases) == ["(start)", "the child's", "after it ?[31m?"]
    start, child, after = (one["peak"] for one in phases.values())
    assert start["rss_mib"] < 40 and after["rss_mib"] < 40
    assert abs(child["pss_mib"] - start["pss_mib"] - 120) < 12
    assert abs(child["rss_mib"] - 2 * start["rss_mib"] - 120) < 12  # two interpreters
    assert summary["peak"]["rss_mib"] == child["rss_mib"] and max(phases["the child's"]["owners"].values()) > 120
    assert abs(sum(one["seconds"] for one in phases.values()) - summary["seconds"]) < 1e-6
    assert 0.8 < phases["the child's"]["seconds"] < summary["seconds"] - 0.6
    names = [row["phase"] for row in rows]
    assert names == sorted(names, key=list(phases).index) and len(rows) == summary["cost"]["samples"] > 30
    assert max(float(row["rss_mib"]) for row in rows) == pytest.approx(child["rss_mib"], abs=0.001)
    assert summary["cost"]["cpu_s"] < summary["seconds"] / 2 and summary["cost"]["rss_mib"] < 60
    with Image.open(str(tmp_path / "out" / "memory.png")) as picture:
        colours = {colour for _count, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert set(timeline.BANDS[:3]) < colours and {timeline.SHOWN[name][1] for name in ("rss_mib", "pss_mib")} < colours
    assert "the child's" in done.stderr and "not seen: " in done.stderr and not done.stdout


def test_peak_is_the_kernel_s(tmp_path):
    done, summary, _rows = watched(tmp_path, sys.executable, "-c", HOLD % 150 + "time.sleep(0.5); m.close(); "
                                   "print(open('/proc/self/status').read())")
    kernel = float(done.stdout.split("VmHWM:")[1].split()[0]) / 1024
    assert kernel > 150 and summary["owners"][0]["hwm_mib"] == pytest.approx(kernel, rel=0.02)
    assert summary["peak"]["rss_mib"] == pytest.approx(kernel, rel=0.02)
    assert summary["peak"]["hwm_mib"] == pytest.approx(kernel, rel=0.02)


def test_grandchildren_and_orphans_count(tmp_path):
    """Two levels down, and one whose parent ended and who left the session after it was seen."""
    wait = "time.sleep(0.3); __import__('os').setsid(); time.sleep(0.5)"
    shell = "sh -c '%s -c \"$A\"; :' & (%s -c \"$B\" &); sleep 1; wait" % (sys.executable, sys.executable)
    _done, summary, rows = watched(tmp_path, "sh", "-c", shell,
                                   env={"A": HOLD % 40 + "time.sleep(0.8)", "B": HOLD % 70 + wait})
    assert 110 < summary["peak"]["rss_mib"] < 150 and max(int(row["processes"]) for row in rows) >= 4
    assert [one["rss_mib"] > 40 for one in summary["owners"][:3]] == [True, True, False]
    late = [float(row["rss_mib"]) for row in rows if 0.55 < float(row["seconds"]) < 0.75]
    assert late and min(late) > 105, "lost one after setsid()"


BOARD = {
    "/proc/meminfo": "MemTotal: 4059000 kB\nMemAvailable: 1024000 kB\nSwapTotal: 2048 kB\nSwapFree: 1024 kB\n"
                     "NvMapMemUsed: 307200 kB\n",
    "/sys/kernel/debug/nvmap/iovmm/clients": "CLIENT   PROCESS   PID   SIZE\nuser  python3  11  204800K\n"
                                             "user  a b (c)  12 2M\nuser gnome 99 1G\nnonsense\ntotal  307200K\n",
    "/proc/10/stat": "10 (sh) S 1 10 10 0", "/proc/10/status": "Name:\tsh\nVmHWM:\t 2048 kB\nVmRSS:\t 1024 kB\n",
    "/proc/10/smaps": "Pss: 300 kB\nPss_Anon: 7 kB\nSwapPss: 5 kB\nPss:  212 kB\nPss: 1,5 kB\n",
    "/proc/11/stat": "11 (a) S 1 (b) S 10 5 5 0",
    "/proc/11/status": "Name:\tpython3\nVmHWM:\t 5120 kB\nVmRSS:\t 4096 kB\n",
    "/proc/11/smaps_rollup": "00-ff ---p\nRss: 1 kB\nPss: 2560 kB\n",
    "/proc/9/stat": "9 (x) S 11 7 7 0", "/proc/9/status": "Name:\tdead\nState:\tZ\n",  # a lower number than its parent
    "/proc/12/stat": "12 (y) S 1 10 10 0", "/proc/12/status": b"Name:\tv\xff\nVmRSS:\t 1,5 kB\n",
    "/proc/13/stat": b"\xff\xfe garbage", "/proc/14/status": "VmRSS: 9 kB", "/proc/99/stat": "99 (g) S 1 9 9 0",
    "/proc/99/status": "VmRSS: 999999 kB", "/proc/self/stat": "", "/proc/12abc/stat": "",
    "/proc/10/cgroup": "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/x\n",
    "/sys/fs/cgroup/memory/a/memory.max_usage_in_bytes": "3145728\n", "/sys/fs/cgroup/x/memory.peak": "1\n",
}


def test_a_board_in_files(tmp_path):
    root = tree(tmp_path / "root", BOARD)
    marks = io.BytesIO(b"1000.5 10 load net\nx\n\xff\n9 9\n1002.0 11 st")
    watch = profile.Watch(10, 1000.0, 0.05, {"available": 1200.0, "swap": 0.5, "nvmap": 100.0}, marks, root)
    row = watch.sample(tegrastats.parse("RAM 717/3964MB (lfb 140x4MB) GR3D_FREQ 7%@76"))
    assert profile.tree(10, {}, root) == [9, 10, 11, 12]
    assert row == dict(row, phase="load net", processes=2, rss_mib=5.0, hwm_mib=5.0, pss_mib=3.0, nvmap_mib=200.0,
                       available_drop_mib=200.0, swap_mib=0.5, gpu_mib=200.0, gpu_percent=7, tegrastats_ram_mib=717)
    marks.write(b"ep\n")
    marks.seek(-3, os.SEEK_CUR)
    tree(root, dict.fromkeys(["/proc/11/stat", "/proc/11/status"], ""))  # gone between listing and reading
    assert watch.sample()["phase"] == "step" and watch.sample()["processes"] == 1
    tree(root, {"/proc/15/stat": "15 (sh) R 10 10 10 0", "/proc/15/status": "Name:\tsh\nVmRSS:\t 1024 kB\n"})
    assert [watch.sample()["rss_mib"], watch.sample()["rss_mib"]] == [1.0, 2.0], "a fork counts when it has lasted"
    summary = watch.summary(1003.0)
    assert [one["name"] for one in summary["phases"]] == ["(start)", "load net", "step"]
    assert [one["seconds"] for one in summary["phases"]] == [0.5, 1.5, 1.0]
    assert summary["phases"][1]["owners"] == {"sh 10": 1.0, "python3 11": 4.0, "GPU": 200.0}
    assert summary["owners"][0] == {"name": "python3", "pid": 11, "rss_mib": 4.0, "hwm_mib": 5.0, "gpu_mib": 200.0}
    assert summary["control_group"] == {"file": "/sys/fs/cgroup/memory/a/memory.max_usage_in_bytes", "peak_mib": 3.0}
    assert summary["missing"] == []
    tree(root, {"/proc/10/cgroup": "0::/x\n"})
    assert profile.group_peak(10, root)[0] == "/sys/fs/cgroup/x/memory.peak"


def test_nothing_to_read(tmp_path):
    root = tree(tmp_path, {"/proc/meminfo": "MemAvailable: much\n", "/proc/10/stat": ""})
    watch = profile.Watch(10, 0.0, 0.05, profile.machine(root), io.BytesIO(), root)
    row = watch.sample()
    assert row == dict(row, processes=0, rss_mib=0, nvmap_mib=None, available_drop_mib=None, gpu_mib=None)
    assert len(watch.summary(1.0)["missing"]) == 6


@pytest.mark.parametrize("line, code", [("exit 3", 3), ("kill -9 $$", 137), ("kill -TERM $$", 143)])
def test_exit_code_is_the_command_s(tmp_path, line, code):
    done, summary, _rows = watched(tmp_path, "sh", "-c", "sleep 0.1; " + line)
    assert done.returncode == summary["exit_code"] == code and (tmp_path / "out" / "memory.png").exists()


@pytest.mark.parametrize("words, code, text", [
    ([], 2, "-- python -m train_lite"), (["--"], 2, "-- python -m train_lite"), (["sleep", "1"], 2, "after --"),
    (["--", "no-such-program-here"], 2, "no-such-program-here"),
    (["--interval", "5", "--", "touch", "ran"], 2, "10 to 1000"),
    (["--interval", "often", "--", "touch", "ran"], 2, "often"),
    (["--out", "file/x", "--", "touch", "ran"], 5, "--out FOLDER"),
    (["--uot", "x", "--", "touch", "ran"], 2, "--out"),
])
def test_wrong_usage(tmp_path, monkeypatch, capsys, words, code, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert profile.main(words) == code
    shown = capsys.readouterr().err
    assert text in shown and "bug" not in shown and os.listdir(str(tmp_path)) == ["file"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 7), (signal.SIGTERM, 143)])
def test_signals_are_passed_on(tmp_path, number, code):
    words = script(tmp_path, "try:\n    open('ready', 'w').close()\n    time.sleep(30)\n"
                             "except KeyboardInterrupt:\n    sys.exit(7)\n")
    words = [sys.executable, "-m", "jetson", "profile", "--out", "out", "--"] + words
    started = subprocess.Popen(words, cwd=str(tmp_path), stderr=subprocess.PIPE,
                               env=dict(os.environ, PYTHONPATH=ROOT),
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored under nohup
    while not (tmp_path / "ready").exists():
        assert started.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    started.send_signal(number)
    shown = started.communicate(timeout=20)[1].decode()
    assert started.returncode == code, shown
    assert (tmp_path / "out" / "summary.json").exists() and (tmp_path / "out" / "memory.png").exists()


def test_json_and_tegrastats(tmp_path):
    """With --json stdout holds one object; a tegrastats on the PATH is read, and ended."""
    meter = tmp_path / "tegrastats"
    meter.write_text("#!/bin/sh\necho $$ > %s/pid\nwhile :; do echo 'RAM 717/3964MB (lfb 1x4MB) GR3D_FREQ 55%%@76'; "
                     "sleep 0.1; done\n" % tmp_path)
    meter.chmod(0o755)
    done = command("jetson", "profile", "--json", "--out", tmp_path / "out", "--", "sh", "-c", "echo mine; sleep 0.6",
                   timeout=30, env={"PATH": "%s:%s" % (tmp_path, os.environ["PATH"])})
    shown = json.loads(done.stdout)
    assert shown["peak"]["gpu_percent"] == 55 and shown["peak"]["tegrastats_ram_mib"] == 717 and "mine\n" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_full_disk_ends_the_rows_not_the_command(tmp_path):
    class Full:
        written = 0

        def write(self, text):
            self.written += 1
            if self.written > 2:
                raise OSError(errno.ENOSPC, "full")

    before = signal.getsignal(signal.SIGINT)
    summary, problem = profile.run(["sh", "-c", "sleep 0.3; touch %s/done" % tmp_path], 0.02, Full())
    assert problem.errno == errno.ENOSPC and summary["peak"]["rss_mib"] > 0 and summary["cost"]["samples"] > 3
    assert (tmp_path / "done").exists() and signal.getsignal(signal.SIGINT) == before


def test_figures_are_shown_when_they_cannot_be_written(tmp_path, monkeypatch, capfd):
    def full(*_words):
        raise OSError(errno.ENOSPC, "No space left on device", "memory.png")
    monkeypatch.setattr(profile, "draw", full)
    assert profile.main(["--out", str(tmp_path), "--", "sh", "-c", "exit 4"]) == 5
    err = capfd.readouterr().err
    assert "exit code 4" in err and "VmHWM" in err and "disk is full" in err


def test_a_peak_between_two_samples(tmp_path):
    _done, summary, _rows = watched(tmp_path, sys.executable, "-c", "import time; time.sleep(0.1); b'x' * (300 << 20)", interval=1000)
    assert 300 < summary["peak"]["hwm_mib"] < 340 and summary["peak"]["rss_mib"] < 100


def test_two_profiles_at_once(tmp_path):
    """The same second, no --out: a folder each. The same --out: the second is refused, the first goes on."""
    inner = [sys.executable, "-m", "jetson", "profile", "--"]
    done = command("jetson", "profile", "--", *inner + ["sh", "-c", "exit 3"], cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    folders = os.listdir(str(tmp_path / "runs" / "profile"))
    assert len(folders) == 2 and all((tmp_path / "runs" / "profile" / name / "summary.json").exists() for name in folders)
    done = command("jetson", "profile", "--out", "one", "--", *inner[:-1] + ["--out", "one", "--", "true"], cwd=tmp_path)
    assert done.returncode == 2 and "another profile writes to one" in done.stderr
    assert (tmp_path / "one" / "summary.json").exists()


def test_no_pillow_no_picture(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert profile.main(["--out", str(tmp_path), "--", "sh", "-c", "exit 4"]) == 4
    assert "Pillow is not installed" in capfd.readouterr().err
    assert sorted(os.listdir(str(tmp_path))) == ["samples.csv", "summary.json"]


def test_dispatch(capsys):
    assert __main__.main([]) == 2 and "error" not in capsys.readouterr().err
    assert __main__.main(["prolife"]) == 2 and "'prolife'" in capsys.readouterr().err
    assert __main__.main(["--help"]) == 0
    assert capsys.readouterr().out.count("python -m jetson ") == len(__main__.COMMANDS)
    for name in __main__.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            __main__.main([name, "--help"])
        assert stopped.value.code == 0 and "python -m jetson " + name in capsys.readouterr().out
