"""edge-run under systemd: the datagrams it sends, the signs of life that an engine which hangs does not give, and the unit."""
import errno
import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from conftest import ROOT
from edge import cli, loop, service
from edge.errors import NoCamera, UsageError
from edge.pipeline import Segmenter
from edge.pressure import Pressure
from edge.sources import open_source, uri, video
from test_edge_run import colour_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colour_model(tmp_path_factory, 3, 64, 0)


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def told(self):
        """Messages that have come since the last call."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return found

    def close(self):
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    address = str(tmp_path / "notify") if request.param == "path" else "@nanopatch-test-%d" % os.getpid()
    made = Manager(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setattr(service, "_last_beat_s", [-service.BEAT_S])
    yield made
    made.close()


def fast(monkeypatch):
    monkeypatch.setattr(service, "BEAT_S", 0.02)


def test_a_run_tells_that_it_is_ready_alive_and_stopping(manager, model, tmp_path):
    assert cli.main(["--engine", model, "--input", "synthetic://64x48", "--frames", "3", "--output", str(tmp_path / "r.jsonl")]) == 0
    told = manager.told()
    digits = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["model"]
    ready = "READY=1\nSTATUS=model %s loaded" % digits
    assert told.count("WATCHDOG=1") == 1, "one sign of life a second is enough"
    assert [line for line in told if line != "WATCHDOG=1"][0] == ready and told[-1] == "STOPPING=1"
    assert sum(line.startswith("STATUS=synthetic://64x48: 64x48") for line in told) == 3


def test_a_run_that_fails_tells_that_it_stops_and_never_that_it_is_ready_before_the_engine(manager, model, tmp_path):
    assert cli.main(["--engine", str(tmp_path / "none.onnx"), "--input", "synthetic://64x48"]) == 2
    assert manager.told() == []
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more of it")
    assert cli.main(["--engine", model, "--input", str(tmp_path / "broken.png"), "--output", str(tmp_path / "o")]) == 5
    assert manager.told()[-1] == "STOPPING=1"


def test_nobody_is_told_without_a_manager(monkeypatch, tmp_path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(socket, "socket", lambda *args: pytest.fail("a socket was opened"))
    service.notify("READY=1")
    monkeypatch.undo()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "daemon"))
    service.notify("READY=1")


def test_a_manager_that_does_not_listen_holds_nobody_up(manager):
    for _ in range(3000):  # more than its queue takes
        service.notify("WATCHDOG=1")
    assert manager.told()


class Engine:
    """A pipeline whose engine hangs from frame `hangs` on, until it is let go."""
    classes, palette, positions, model = ["a", "b"], [(0, 0, 0), (9, 9, 9)], None, "0" * 12
    results = Segmenter.results

    def __init__(self, hangs):
        self.left, self.go, self.hung = hangs, threading.Event(), threading.Event()

    def bands(self, picture, lap):
        self.left -= 1
        if self.left < 0:
            self.hung.set()
            self.go.wait(30)
        lap("run")
        time.sleep(0.005)
        yield np.zeros((picture.height, picture.width), np.uint8)

    def blend(self, pixels, labels):
        return pixels

    def attempt(self, work):
        return work()


class Camera:
    """A child process of a camera that gives frames for ever, 100 a second."""
    caps = "video/x-raw, format=(string)RGB, width=(int)4, height=(int)2, framerate=(fraction)100/1"

    def __init__(self):
        self._bytes = b""

    def wait(self, timeout_s):
        if not self._bytes:
            time.sleep(0.01)
            self._bytes = b"--nanopatch\r\nContent-Type: video/x-raw\r\nContent-Length: 24\r\n\r\n" + bytes(24) + b"\r\n"
        return True

    def read_into(self, view):
        count = min(len(view), len(self._bytes))
        view[:count], self._bytes = self._bytes[:count], self._bytes[count:]
        return count

    def close(self, grace_s=0.0):
        pass


def no_camera():
    raise NoCamera("it is not there")


def camera(start, policy, patience_s=30.0):
    options = uri.Options(policy=policy, patience_s=patience_s)
    return video.Video(uri.parse("rtsp://127.0.0.1/x"), options, 0, start, tell=lambda text: None)


@pytest.mark.parametrize("source", [lambda: open_source("synthetic://8x6"), lambda: camera(Camera, "newest"),
                                    lambda: camera(Camera, "every")], ids=["stills", "newest", "every"])
def test_a_hung_engine_gives_no_sign_of_life(source, manager, monkeypatch):
    fast(monkeypatch)
    engine, frames = Engine(hangs=30), source()
    thread = threading.Thread(target=lambda: loop.run(frames, engine, loop.Memory(), Pressure(False, "off")), daemon=True)
    thread.start()
    try:
        assert engine.hung.wait(30)
        assert manager.told().count("WATCHDOG=1") > 2
        time.sleep(0.4)  # 20 signs of life long
        assert manager.told() == []
    finally:
        engine.left = 10 ** 9
        engine.go.set()
        time.sleep(0.1)
        assert "WATCHDOG=1" in manager.told()
        engine.left = -1  # hangs again, and is left there: daemon threads do not hold the tests up
        engine.go.clear()


@pytest.mark.parametrize("policy", ["newest", "every"])
def test_a_lost_camera_is_alive_while_patience_lasts(policy, manager, monkeypatch):
    fast(monkeypatch)
    with camera(no_camera, policy, patience_s=0.5) as lost:
        with pytest.raises(NoCamera):
            next(lost)
    assert manager.told().count("WATCHDOG=1") >= 4


def test_a_reader_that_hangs_gives_no_sign_of_life(manager, monkeypatch):
    fast(monkeypatch)
    monkeypatch.setattr(video, "HUNG_S", 0.2)
    go = threading.Event()

    def start():
        go.wait(30)
        raise NoCamera("it is not there")
    frames = camera(start, "newest", patience_s=0.1)
    thread = threading.Thread(target=lambda: pytest.raises(NoCamera, next, frames), daemon=True)
    thread.start()
    time.sleep(0.5)
    manager.told()
    time.sleep(0.3)
    assert manager.told() == []
    go.set()
    thread.join(30)
    assert not thread.is_alive()


# --- the unit -------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def not_root(monkeypatch):
    """As if the command had been typed by a user, where root runs the tests."""
    monkeypatch.delenv(service.INPUT_VARIABLE, raising=False)
    if os.getuid() == 0:
        monkeypatch.setenv("SUDO_USER", "daemon")
    else:
        monkeypatch.delenv("SUDO_USER", raising=False)


@pytest.fixture
def typed(model, capfd, tmp_path, monkeypatch):
    """typed(*words, code=0): stdout and stderr of edge-run --write-service in a folder of its own."""
    monkeypatch.chdir(str(tmp_path))

    def call(*words, code=0):
        capfd.readouterr()
        assert cli.main(["--engine", model, "--write-service"] + list(words)) == code
        return capfd.readouterr()
    return call


def unquoted(line):
    """The words of an ExecStart as systemd reads them; written from systemd.service(5), not from the code under test."""
    words = []
    for quoted, plain in re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line):
        word = re.sub(r"\\(x[0-9a-f]{2}|.)", lambda m: chr(int(m.group(1)[1:], 16)) if len(m.group(1)) > 1 else m.group(1), quoted)
        words.append((word or plain).replace("%%", "%").replace("$$", "$"))
    return words


def settings(text):
    return [line.partition("=")[::2] for line in text.splitlines() if "=" in line]


def verify(text, folder):
    """What systemd itself thinks of a unit; skips where it is not installed."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    path = os.path.join(str(folder), "edge-run.service")
    with open(path, "w") as handle:
        handle.write(text)
    done = subprocess.run(["systemd-analyze", "verify", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # other units of the machine may have faults of their own; systemd 252 wishes groups of version 1 away
    return [line for line in done.stdout.decode().splitlines() if "edge-run.service" in line
            and "nvargus" not in line and "MemoryLimit=" not in line]


ODD = ["50 % of it", "a$b ${HOME}", 'say "so"', "back\\slash", "it's", "tab\there", "semi;colon", "-", "ünï"]


def test_the_unit_runs_exactly_this_command(typed, model, tmp_path):
    out, err = typed("--input", "synthetic://64x48", "--frames", "2", "--output", "out", "--no-overlay", "--threads", "1")
    unit = dict(settings(out))
    words = unquoted(unit["ExecStart"])
    assert words == [sys.executable, "-m", "edge.cli", "--engine", model, "--input", "synthetic://64x48", "--output",
                     str(tmp_path / "out"), "--no-overlay", "--frames", "2", "--threads", "1"]
    assert not (tmp_path / "out").exists() and "sudo tee " in err and "enable --now edge-run" in err and "daemon-reload" in err
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=ROOT))
    assert done.returncode == 0 and len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2, done.stderr
    want = {"Type": "notify", "Restart": "always", "RestartPreventExitStatus": "2 7", "StartLimitIntervalSec": "0",
            "KillSignal": "SIGTERM", "KillMode": "mixed", "SuccessExitStatus": "143", "NoNewPrivileges": "yes", "WatchdogSec": "60",
            "WantedBy": "multi-user.target", "User": "daemon" if os.getuid() == 0 else getpass.getuser(), "WorkingDirectory": str(tmp_path)}
    assert {key: unit[key] for key in want} == want and "EnvironmentFile" not in unit and "After" not in unit
    assert verify(out, tmp_path) == []


def test_every_word_reaches_the_command_as_it_is(tmp_path):
    line = " ".join(service.quoted(word) for word in ODD)
    assert unquoted(line) == ODD and "\t" not in line
    config = cli.EdgeConfig(engine="/a b/50 % $x.onnx", input="gst://videotestsrc ! a=\"$b %i\"", output="-")
    assert unquoted(dict(settings(service.unit(config, False)))["ExecStart"])[3:] == [
        "--engine", config.engine, "--input", config.input, "--output", "-"]
    assert verify(service.unit(config, False), tmp_path) == []


@pytest.mark.parametrize("given, kind", [("csi://0", "nvargus-daemon.service"), ("rtsp://10.0.0.9/a", "network-online.target"),
                                         ("/dev/video0", None)])
def test_what_a_camera_waits_for(typed, given, kind, tmp_path):
    out, _err = typed("--input", given)
    unit = dict(settings(out))
    assert unit.get("After") == unit.get("Wants") == kind and unit["Restart"] == "always"
    assert verify(out, tmp_path) == []


def test_a_file_that_is_done_is_not_done_again(typed, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    unit = dict(settings(typed("--input", "a.png")[0]))
    assert unit["Restart"] == "on-failure" and str(tmp_path / "a.png") in unquoted(unit["ExecStart"])


def test_a_password_is_in_the_environment_only(typed, monkeypatch, tmp_path):
    secret = "rtsp://me:tellnobody@10.0.0.9:554/a"
    monkeypatch.setenv("NANOPATCH_INPUT", secret)
    for words in (("--input", secret), ()):
        out, err = typed(*words)
        unit = dict(settings(out))
        assert "tellnobody" not in out + err and "--input" not in unit["ExecStart"]
        assert unit["EnvironmentFile"] == "/etc/edge-run.env" and "umask 077; cat > /etc/edge-run.env" in err
        assert "NANOPATCH_INPUT='rtsp://***@10.0.0.9:554/a'" in err and verify(out, tmp_path) == []


def test_the_input_is_read_from_the_environment(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NANOPATCH_INPUT", "synthetic://16x12")
    assert cli.main(["--engine", model, "--output", str(tmp_path / "r.jsonl"), "--frames", "1"]) == 0
    assert json.loads((tmp_path / "r.jsonl").read_text())["width"] == 16
    assert cli.main(["--engine", model, "--input", "synthetic://8x8", "--output", str(tmp_path / "r.jsonl"), "--frames", "1"]) == 0
    assert json.loads((tmp_path / "r.jsonl").read_text())["width"] == 8


@pytest.mark.parametrize("words, message", [
    (("--input", "synthetic://axb"), "expected synthetic://WIDTHxHEIGHT"), ((), "--input is missing"),
    (("--input", "csi://0", "--engine", "/nowhere/m.onnx"), "no such model"),
    (("--input", "csi://0", "--patience", "-1"), "--patience"),
    (("--input", "csi://0", "--memory-max", "much"), "no amount of memory"),
    (("--input", "csi://0", "--update", "m.onnx"), "two commands"),
    (("--input", "csi://0", "--output", "sealed/new/folder"), "sealed cannot be written")])
def test_what_would_not_run_is_not_printed(typed, words, message, tmp_path, monkeypatch):
    (tmp_path / "sealed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("sealed"))  # root may write everywhere
    out, err = typed(*words, code=2)
    assert out == "" and message in err


def test_memory(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:        4059228 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("4:memory:/user.slice\n")
    nano = cli.EdgeConfig(engine="/m.plan", input="csi://0", output="-")
    unit = dict(settings(service.unit(nano, False, "aarch64", str(tmp_path))))
    assert unit["MemoryMax"] == unit["MemoryLimit"] == "3452M" and unit["Environment"].endswith("OPENBLAS_CORETYPE=ARMV8")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/user.slice\n")
    unit = dict(settings(service.unit(nano._replace(memory_max="1.5GiB"), False, "x86_64", str(tmp_path))))
    assert unit["MemoryMax"] == "1536M" and "MemoryLimit" not in unit and "ARMV8" not in str(unit)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:        600000 kB\n")
    assert service.memory_most_mib("", str(tmp_path)) == 292
    with pytest.raises(UsageError, match="--memory-max"):
        service.memory_most_mib("", str(tmp_path / "nothing"))


def test_root_is_refused(typed, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setenv("SUDO_USER", "root")
    assert "must not run as root" in typed("--input", "csi://0", code=2)[1]
    monkeypatch.setenv("SUDO_USER", "somebody")
    assert "User=somebody\n" in typed("--input", "csi://0")[0]


def test_a_video_of_the_start_before_is_kept(tmp_path, monkeypatch):
    from edge.sinks import kept_apart
    film = str(tmp_path / "rec.mp4")
    assert kept_apart(film) == film
    (tmp_path / "rec.mp4").write_bytes(b"")
    assert kept_apart(film) == film
    (tmp_path / "rec.mp4").write_bytes(b"film")
    names = []
    for _ in range(3):
        names.append(kept_apart(film))
        with open(names[-1], "wb") as handle:
            handle.write(b"film")
    assert len(set(names)) == 3 and all(name.startswith(str(tmp_path / "rec-20")) and name.endswith(".mp4") for name in names)


def test_a_page_that_others_see_waits_for_the_network_and_keeps_its_token(monkeypatch):
    monkeypatch.setattr(service, "user", lambda: "somebody")
    for kind, page, wants, kept in (("csi://0", "http://192.168.1.5:8080", "nvargus-daemon.service network-online.target", True),
                                    ("csi://0", "http://127.0.0.1:8080", "nvargus-daemon.service", False),
                                    ("/data/frames", "http://0.0.0.0:8080", "network-online.target", True)):
        text = service.unit(cli.EdgeConfig(engine="/m.onnx", input=kind, live=page), False, "x86_64")
        assert "Wants=%s\nAfter=%s\n" % (wants, wants) in text and ("EnvironmentFile=-/etc/edge-run.env" in text) == kept
        assert ("RestartPreventExitStatus=2 5 7" in text) == (kind[0] == "/")


def test_a_service_waits_for_its_address(manager, monkeypatch):
    """At boot the network may come later; a person at a terminal is told at once."""
    from edge.sinks import live
    tries = []

    def server(host, port, page):
        tries.append(host)
        if len(tries) < 3:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return "server"

    monkeypatch.setattr(live, "_Server", server)
    monkeypatch.setattr(live, "LISTEN_PAUSE_S", 0.01)
    assert live._listen("http://10.9.8.7:1", "10.9.8.7", 1, None) == "server" and len(tries) == 3
    del tries[:]
    monkeypatch.delenv("NOTIFY_SOCKET")
    with pytest.raises(UsageError, match="no address of this machine"):
        live._listen("http://10.9.8.7:1", "10.9.8.7", 1, None)
    assert len(tries) == 1


def test_a_status_of_any_name(manager):
    service.notify("STATUS=\udcfc.png")
    assert manager.told() == ["STATUS=?.png"]
