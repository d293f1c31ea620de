"""A loopback RTSP server that is killed. Needs gi's GstRtspServer for some Python of this machine; skipped where it has none."""
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from conftest import ROOT
from edge.errors import SourceLost, UsageError
from edge.sources import open_source, uri
from test_video import FAULTS, tidy  # noqa: F401 (a fixture)

PYTHON = "/usr/bin/python3"
CHECK = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
pytestmark = pytest.mark.skipif(
    not shutil.which("gst-launch-1.0") or not os.path.exists(PYTHON) or
    subprocess.call([PYTHON, "-c", CHECK], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0,
    reason="no RTSP server here: apt install python3-gi gir1.2-gst-rtsp-server-1.0")


class Server:
    """rtsp://127.0.0.1:port/x, which can be killed and started again."""

    def __init__(self, *login):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.login = login
        self.start()

    def start(self):
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.process = subprocess.Popen([PYTHON, os.path.join(ROOT, "tests", "rtsp_server.py"), str(self.port)] + list(self.login),
                                        stdout=subprocess.PIPE, env=env)
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        if self.process.returncode is None:
            self.kill()


def killed_and_back(times):
    """Returns the seconds from each start of the server to the next frame."""
    back_s = []
    with Server() as server, open_source("rtsp://127.0.0.1:%d/x" % server.port, options=uri.Options(patience_s=60)) as source:
        for _ in range(times):
            for _ in range(5):
                last = next(source)
            server.kill()
            time.sleep(0.3)
            server.start()
            began_s, restarts = time.monotonic(), last.health["restarts"]
            frame = next(source)
            while frame.health["restarts"] == restarts:
                frame = next(source)
            assert frame.health["received"] == frame.health["processed"] + frame.health["dropped"]
            assert frame.arrived_s > last.arrived_s and frame.open().width == 160
            back_s.append(frame.arrived_s - began_s)
    return back_s


def test_server_killed_and_started_again(tidy):  # noqa: F811
    back_s = sorted(killed_and_back(FAULTS or 2))
    print("back after %.1f s in the middle, %.1f s at most" % (back_s[len(back_s) // 2], back_s[-1]))
    assert back_s[-1] <= 60.0


def test_password_of_a_stream(tidy, capfd):  # noqa: F811
    with Server("bob", "hunter2") as server:
        address = "@127.0.0.1:%d/x" % server.port
        with open_source("rtsp://bob:hunter2" + address) as source:
            frame = next(source)
            assert frame.origin == "rtsp://***" + address
        with pytest.raises(UsageError, match="user name or password") as caught:
            next(open_source("rtsp://bob:wr0ng" + address))
        assert "wr0ng" not in str(caught.value)
        with pytest.raises(SourceLost):
            next(open_source("rtsp://bob:hunter2" + address + "/nothing", options=uri.Options(patience_s=0.5)))
    assert "hunter2" not in "".join(capfd.readouterr())
