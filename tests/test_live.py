"""The live page: its server alone, through edge-run, and in a real browser."""
import contextlib
import http.client
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

import chromium
from conftest import ROOT, wait_for
from edge import images
from edge.cli import EdgeConfig, check
from edge.cli import main as edge_run
from edge.errors import UsageError
from edge.sinks import Sinks, live
from edge.sources import open_source
from test_edge_run import colour_model

PALETTE = [(0, 0, 0), (255, 64, 64), (64, 64, 255)]
CLASSES = ["background", "<b>red</b>", "blue"]
TOKEN = "correct horse; battery=staple/é"


class Clock:
    def __init__(self):
        self.now_s = 50.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def serve(monkeypatch):
    """serve(host): a Live with a clock that stands still as its .clock; closed after the test, and no thread is left."""
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        def make(host="127.0.0.1", **options):
            clock = options.pop("clock", Clock())
            page = live.Live("http://%s:0" % host, "net.onnx", "synthetic://9x9", CLASSES, PALETTE, clock=clock, **options)
            page.clock, page.port = clock, int(re.search(r":(\d+)/", page.url).group(1))
            stack.callback(page.close)
            return page
        monkeypatch.delenv(live.TOKEN, raising=False)
        yield make
    assert set(threading.enumerate()) <= before


def ask(page, path="/", method="GET", host=None, **headers):
    """(status, headers, body) of one request over loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    try:
        connection.request(method, path, headers=dict({name.replace("_", "-"): value for name, value in headers.items()},
                                                      **({"Host": host} if host else {})))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def status(page, since=0):
    code, _headers, body = ask(page, "/status?since=%d" % since)
    assert code == 200
    return json.loads(body.decode())


def line(index=0, error=None, **more):
    made = {"schema_version": 2, "frame": index, "source": "synthetic://9x9", "error": error, "capture_time_s": 1.0,
            "done_time_s": 2.0}
    if not error:
        made.update({"height": 40, "width": 60, "area": dict(zip(CLASSES, (0.5, 0.25, 0.25))),
                     "latency_ms": {"read": 1.0, "run": 9.5}, "mask": None, "overlay": None, "samples": None})
    return dict(made, **more)


class Viewer:
    """Reads a page's stream."""

    def __init__(self, page, path="/stream"):
        self.connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
        self.connection.request("GET", path)
        self.answer = self.connection.getresponse()
        self.status = self.answer.status

    def next(self):
        """The next picture, (h, w, 3) uint8."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.answer.read(1)
            assert len(head) < 1000, head
        data = self.answer.read(int(re.search(rb"Content-Length: (\d+)", head).group(1)))
        assert b"image/jpeg" in head and self.answer.read(2 + len(live.BOUNDARY)).endswith(live.BOUNDARY)
        return np.asarray(Image.open(io.BytesIO(data)))

    def close(self):
        self.answer.close()
        self.connection.close()


# --- address and token ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("address, found", [
    ("http://127.0.0.1:8080", ("127.0.0.1", 8080)), ("http://localhost", ("localhost", 8080)), ("HTTP://[::1]:9/", ("::1", 9)),
    ("http://nano.local:0", ("nano.local", 0))])
def test_addresses(address, found):
    assert live.parse_address(address) == found


@pytest.mark.parametrize("address", [
    "http://", "http://:8080", "https://127.0.0.1:8080", "http://127.0.0.1:80800", "http://a:b", "127.0.0.1:8080", "http://a b",
    "http://127.0.0.1:8080/x", "http://me:hunter2@h:80", "http://h:80?token=hunter2", "http://::1:80"])
def test_no_addresses(address):
    with pytest.raises(UsageError, match="expected http://HOST:PORT") as caught:
        live.parse_address(address)
    assert "hunter2" not in str(caught.value)


def test_only_loopback_needs_no_token(monkeypatch):
    monkeypatch.delenv(live.TOKEN, raising=False)
    assert [live.token_for(host) for host in ("127.0.0.1", "::1", "LOCALHOST")] == [None] * 3
    made = {live.token_for(host) for host in ("0.0.0.0", "::", "127.0.0.2", "nano.local", "0.0.0.0")}
    assert len(made) == 5 and min(map(len, made)) >= 32
    monkeypatch.setenv(live.TOKEN, "x" * 16)
    assert live.token_for("0.0.0.0") == "x" * 16
    for short in ("", "x" * 15):
        monkeypatch.setenv(live.TOKEN, short)
        with pytest.raises(UsageError, match="export NANOPATCH_TOKEN=.*openssl"):
            live.token_for("0.0.0.0")
        assert live.token_for("localhost") is None


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("path", ["/", "/status", "/stream", "/absent"])
def test_nothing_without_the_token(token, path, serve, monkeypatch):
    if token:
        monkeypatch.setenv(live.TOKEN, token)
    page = serve("0.0.0.0")
    query, good = page.url.partition("?")[2], {"/": 200, "/status": 200, "/stream": 200, "/absent": 404}[path]
    wrong = [dict(), {"Authorization": "Bearer x"}, {"Authorization": "Basic " + "x" * 32}, {"Authorization": "Bearer"},
             {"Cookie": page.cookie + "=x"}, {"Cookie": "other=" + query[len("token="):]}]
    for headers in wrong:
        for end in ("", "?token=", "?token=x", "?token=x&" + query, "?Token" + query[len("token"):]):
            code, answered, body = ask(page, path + end, **headers)
            assert (code, body) == (401, b"") and "Set-Cookie" not in answered
    assert ask(page, path + "?token=x", Cookie=page.cookie + "=" + query[len("token="):])[0] == 401, "what is shown is wrong"
    right = [({}, "?" + query), ({"Cookie": "a=b; %s=%s; c=d" % (page.cookie, query[len("token="):])}, "")]
    if not token:  # a header holds plain letters
        right.append(({"Authorization": "Bearer " + page.token}, ""))
    for headers, end in right:
        code, answered, _body = ask(page, path + end, "HEAD", host="anything.example", **headers)
        assert code == good
        assert answered.get("Set-Cookie") == ("%s=%s; HttpOnly; SameSite=Strict; Path=/" % (page.cookie, query[len("token="):])
                                              if end and good == 200 else None)


def test_a_name_that_is_not_loopback_is_refused(serve):
    page = serve()
    for host in ("evil.example", "evil.example:%d" % page.port, "127.0.0.1.evil.example", "localhost@evil.example", "", "127.0.0.2"):
        for path in ("/", "/status", "/stream"):
            assert ask(page, path, host=host or " ")[0] == 403, host
    for host in ("127.0.0.1", "LocalHost:8080", "[::1]:%d" % page.port):
        assert ask(page, "/", host=host)[0] == 200
    with socket.create_connection(("127.0.0.1", page.port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.0 403")


# --- answers ----------------------------------------------------------------------------------------------------------

def test_headers_methods_and_paths(serve, capfd):
    page = serve()
    for method, path, code in (
            ("GET", "/", 200), ("HEAD", "/", 200), ("HEAD", "/stream", 200), ("GET", "/status", 200), ("GET", "/absent", 404),
            ("GET", "/../live.py", 404), ("GET", "/%2e%2e/etc/passwd", 404), ("GET", "//etc/passwd", 404), ("GET", "/live.html", 404),
            ("GET", "/status?since=x", 400), ("GET", "/status?since=-1", 400), ("POST", "/", 405), ("PUT", "/x", 405),
            ("DELETE", "/", 405), ("OPTIONS", "/", 405), ("PROPFIND", "/", 405), ("TRACE", "/", 405)):
        got, headers, body = ask(page, path, method)
        assert got == code, (method, path)
        assert bool(body) == (code == 200 and method == "GET")
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert "Python" not in str(headers) and headers.get("Allow") == ("GET, HEAD" if code == 405 else None)
    text = ask(page, "/")[2].decode()
    assert "innerHTML" not in text and not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text), "nothing from elsewhere"
    for junk in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70000 + b"\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", page.port)) as raw:
            raw.sendall(junk)
            raw.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert b" 200 " not in raw.recv(100)
    assert ask(page, "/")[0] == 200 and capfd.readouterr() == ("", ""), "the log is silent"


def test_status(serve):
    page = serve(health=lambda: health)
    health = None
    first = status(page)
    assert first["state"] == "starting" and first["frames"] == 0 and first["model"] == "net.onnx" and first["error"] is None
    for index in range(5):
        page.clock.now_s += 0.5
        page.write_line(line(index, level=1, pressure={"some": 3.5}))
    page.write_line(line(5, "5.png is damaged"))
    said = status(page)
    assert (said["state"], said["frames"], said["failed"], said["uptime_s"]) == ("running", 5, 1, 2.5)
    assert said["frames_per_s"] == pytest.approx(2.5) and said["latency_ms"] == {"read": 1.0, "run": 9.5}
    assert said["area"] == [{"name": name, "share": share, "colour": list(colour)}
                            for name, share, colour in zip(CLASSES, (0.5, 0.25, 0.25), PALETTE)]
    assert said["more"] == {"level": 1, "pressure": {"some": 3.5}} and said["error"] == {"text": "5.png is damaged", "frame": 5}
    page.clock.now_s += 4
    assert status(page)["state"] == "no frames" and status(page)["waiting_s"] == 4 and status(page)["frames_per_s"] < 1
    health = {"received": 5, "processed": 5, "dropped": 0, "restarts": 1, "time_jumps": 0, "last_fault": "no frame"}
    assert status(page)["state"] == "source lost" and status(page)["health"] == health
    page.write_line(line(6, health=health))
    assert status(page)["state"] == "running", "it came back"


def test_a_slow_net_is_not_a_lost_source(serve):
    page = serve()
    for index in range(3):
        page.write_line(line(index))
        page.clock.now_s += 8
    assert status(page)["state"] == "running"
    page.clock.now_s += 25
    assert status(page)["state"] == "no frames"


def test_history(serve, monkeypatch):
    monkeypatch.setattr(live.board, "zones", lambda: [{"celsius": 41.5}, {"celsius": 52.0}] if page.clock.now_s < 99 else [])
    page = serve()
    points = []
    for index in range(live.POINTS + 20):
        if index % 2:
            page.write_line(line(index))
        page.clock.now_s += live.POINT_S
        page.chart()
        page.chart()  # too early: no point
        if index == 9:
            points = status(page)["history"]
    # the server's own thread may have taken a point instead of ours, never one more than the clock allows
    assert [p["n"] for p in points] == list(range(1, len(points) + 1)) and 10 <= len(points) <= 11
    assert {p["latency_ms"] for p in points} == {None, 10.5} and all(p["rss_mib"] > 1 and p["available_mib"] > 1 for p in points)
    assert {p["celsius"] for p in points} == {52.0} and status(page)["history"][-1]["celsius"] is None
    full = status(page)["history"]
    assert len(full) == live.POINTS and full[-1]["uptime_s"] - full[0]["uptime_s"] == live.POINT_S * (live.POINTS - 1)
    assert status(page, full[-4]["n"])["history"] == full[-3:] and status(page, full[-1]["n"])["history"] == []


# --- the picture ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(48, 64), (1, 1), (961, 7), (100, 1921), (5, 4000)])
def test_a_view_is_every_nth_pixel_whatever_the_bands(height, width):
    rng = np.random.RandomState(0)
    pixels, labels = rng.randint(0, 256, (height, width, 3)).astype(np.uint8), rng.randint(0, 3, (height, width)).astype(np.uint8)
    step = -(-max(height, width) // live.LONG_SIDE_PX)
    for rows in (1, 7, 128, height):
        view = live.View(height, width)
        for y in range(0, height, rows):
            view.add(y, pixels[y:y + rows], labels[y:y + rows])
        assert np.array_equal(view.pixels, pixels[::step, ::step]) and np.array_equal(view.labels, labels[::step, ::step])
        assert max(view.labels.shape) <= live.LONG_SIDE_PX


def shown(page, value):
    """Let a frame of one grey value pass, class 2 in its right half. Returns whether it was wanted."""
    page.clock.now_s += 1 / live.VIEWS_PER_S
    view = page.begin(40, 60)
    if view:
        view.add(0, np.full((40, 60, 3), value, np.uint8), np.repeat([[0, 2]], 30, axis=1).repeat(40, axis=0).astype(np.uint8))
        page.show(view)
    return view is not None


def test_nothing_is_painted_while_nobody_watches(serve, monkeypatch):
    page, painted = serve(), []
    monkeypatch.setattr(live.images, "blend", lambda *given: painted.append(1) or given[0])
    assert page.begin(40, 60) is None and status(page)["viewers"] == 0
    viewers = [Viewer(page) for _ in range(3)]
    assert status(page)["viewers"] == 3 and not painted
    assert shown(page, 100) and page.begin(40, 60) is None, "one in a tenth of a second"
    for viewer in viewers:
        assert abs(viewer.next().astype(int) - 100).max() < 4
    assert painted == [1], "once for all"
    page.clock.now_s += 1
    begun = page.begin(40, 60)
    for viewer in viewers:
        viewer.close()
    wait_for(lambda: status(page)["viewers"] == 0)  # those who leave are noticed without a picture
    page.show(begun)
    assert not shown(page, 101)
    late = Viewer(page)
    assert status(page)["viewers"] == 1 and page.jpeg(0, 0) is None and shown(page, 200)
    assert late.next()[5, 5, 0] > 190, "not the picture of before"
    late.close()


def test_the_picture_is_the_overlay(serve):
    page = serve()
    viewer = Viewer(page)
    wait_for(lambda: shown(page, 100))
    picture = viewer.next().astype(int)
    wanted = images.blend(np.full((1, 1, 3), 100, np.uint8), np.full((1, 1), 2, np.uint8), PALETTE)[0, 0]
    assert picture.shape == (40, 60, 3) and abs(picture[20, 10] - 100).max() < 8 and abs(picture[20, 50] - wanted).max() < 8
    viewer.close()


def test_the_loop_waits_for_no_lock(serve):
    """Ctrl-C between two steps of the loop can leave nothing locked, where it locks nothing."""
    page = serve()
    viewer = Viewer(page)
    wait_for(lambda: status(page)["viewers"] == 1)
    with page._lock, page._encoding:
        loop = threading.Thread(target=lambda: (shown(page, 100), page.write_line(line())), daemon=True)
        loop.start()
        loop.join(30)
        assert not loop.is_alive()
    assert viewer.next().shape == (40, 60, 3) and status(page)["frames"] == 1
    viewer.close()


def test_more_viewers_than_places(serve):
    page = serve()
    viewers = [Viewer(page) for _ in range(live.VIEWERS)]
    assert Viewer(page).status == 503 and status(page)["viewers"] == live.VIEWERS
    viewers.pop().close()
    wait_for(lambda: status(page)["viewers"] == live.VIEWERS - 1)
    viewers.append(Viewer(page))
    assert viewers[-1].status == 200
    for viewer in viewers:
        viewer.close()


def test_a_viewer_who_reads_nothing_holds_nobody_up(serve, monkeypatch):
    monkeypatch.setattr(live._Handler, "timeout", 1.0)
    noise = np.random.RandomState(0).randint(0, 256, (400, 500, 3)).astype(np.uint8)  # 170 kB each
    page = serve()
    with socket.create_connection(("127.0.0.1", page.port)) as stalled:
        stalled.sendall(b"GET /stream HTTP/1.0\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: status(page)["viewers"] == 1)
        viewer = Viewer(page)
        for _ in range(40):
            page.clock.now_s += 1
            view = page.begin(400, 500)
            view.add(0, noise, np.zeros((400, 500), np.uint8))
            page.show(view)
            viewer.next()  # in time, whatever the other does
        wait_for(lambda: status(page)["viewers"] == 1)
    viewer.close()


def test_closing_ends_every_connection(serve):
    before = set(threading.enumerate())  # of other tests
    page = serve()
    viewers = [Viewer(page) for _ in range(2)]
    silent = socket.create_connection(("127.0.0.1", page.port))
    wait_for(lambda: status(page)["viewers"] == 2)
    page.close()
    assert silent.recv(1) == b"" and set(threading.enumerate()) <= before
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", page.port), timeout=5)
    silent.close()
    for viewer in viewers:
        viewer.close()


# --- edge-run ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colour_model(tmp_path_factory, 3, 64, 0)


class Run:
    """edge-run in a process of its own, endless unless words say otherwise; .url: where its page is, .port, .token."""

    def __init__(self, model, *words, token=None):
        environment = dict({k: v for k, v in os.environ.items() if k != live.TOKEN}, PYTHONPATH=ROOT, OMP_NUM_THREADS="1")
        environment.update({live.TOKEN: token} if token else {})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge.cli", "--engine", model] + [str(word) for word in words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        self.said, self.url = b"", None
        while b"live page: " not in self.said:
            assert select.select([self.process.stderr], [], [], 120)[0], "edge-run says nothing"
            data = os.read(self.process.stderr.fileno(), 1 << 16)
            assert data, self.said.decode()
            self.said += data
        self.url = re.search(r"live page: (\S+)\n", self.said.decode()).group(1)
        self.port, self.token = int(re.search(r":(\d+)/", self.url).group(1)), self.url.partition("token=")[2]

    def end(self, number=signal.SIGINT):
        """(exit code, stderr as text)"""
        self.process.send_signal(number)
        _out, err = self.process.communicate(timeout=60)
        return self.process.returncode, (self.said + err).decode()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


MOVING = ("--input", "synthetic://320x240", "--frames", 10 ** 6)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_page_alone(number, code, model, tmp_path):
    with Run(model, *MOVING + ("--output", "http://localhost:0")) as run:
        viewer = Viewer(run)
        one, two = viewer.next(), viewer.next()
        assert one.shape == (240, 320, 3) and not np.array_equal(one, two)
        said = status(run)
        assert said["state"] == "running" and said["width"] == 320 and said["frames"] > 0 and said["source"] == "synthetic://320x240"
        assert "run" in said["latency_ms"] and sum(one["share"] for one in said["area"]) == pytest.approx(1)
        assert run.end(number)[0] == code
        viewer.close()
    assert "Traceback" not in run.said.decode() and not list(tmp_path.iterdir())


def test_page_beside_files(model, tmp_path):
    with Run(model, *MOVING + ("--output", tmp_path / "out", "--live", "http://127.0.0.1:0", "--no-overlay")) as run:
        viewer = Viewer(run)
        assert viewer.next().shape == (240, 320, 3)
        code, err = run.end()
        viewer.close()
    assert code == 130 and "Traceback" not in err
    assert (tmp_path / "out" / "results.jsonl").stat().st_size and (tmp_path / "out" / "frame-000000.mask.png").exists()


def test_the_token_is_said_once(model, tmp_path):
    with Run(model, *MOVING + ("--output", tmp_path / "out", "--live", "http://0.0.0.0:0")) as run:
        assert ask(run, "/status")[0] == 401 and ask(run, "/status", Authorization="Bearer " + run.token)[0] == 200
        code, err = run.end()
    assert err.count(run.token) == 1 and run.token not in (tmp_path / "out" / "results.jsonl").read_text()


def test_results_are_the_same_with_and_without_a_page(model, tmp_path):
    """Bands of a large picture too: the page's reader is one of its own."""
    class Watched:  # somebody who always watches
        def begin(self, height, width):
            self.view = live.View(height, width)
            return self.view

        def show(self, view):
            self.shown = view

        def write_line(self, result):
            self.line = result
    rng = np.random.RandomState(0)
    pixels, labels = rng.randint(0, 256, (300, 1000, 3)).astype(np.uint8), rng.randint(0, 3, (300, 1000)).astype(np.uint8)
    bands = lambda array: (array[y:y + 41] for y in range(0, 300, 41))  # noqa: E731
    frame = next(open_source("synthetic://9x9"))._replace(open=lambda: images.BandPicture(300, 1000, lambda: bands(pixels)))
    made = []
    for name, page in (("a", None), ("b", Watched())):
        sinks = Sinks(str(tmp_path / name), PALETTE, True, live=page)
        paths = sinks.write_bands(frame, frame.open(), bands(labels), lambda stage: None, lambda p, n: images.blend(p, n, PALETTE))
        sinks.write_line({"a": 1})
        sinks.close()
        made.append([open(path, "rb").read() for path in paths[:2]] + [paths[2].tolist()])
    assert made[0] == made[1] and page.shown is page.view and page.line == {"a": 1}
    assert np.array_equal(page.view.pixels, pixels[::2, ::2]) and np.array_equal(page.view.labels, labels[::2, ::2])


@pytest.mark.parametrize("words, hint", [
    ("--live http://127.0.0.1:{taken}", "port {taken} is in use. Take another: http://127.0.0.1:"),
    ("--output http://127.0.0.1:{taken}", "port {taken} is in use"), ("--live http://203.0.113.77:8080", "no address of this machine"),
    ("--live http://nosuch.invalid", "no address of this machine"), ("--live 8080", "expected http://HOST:PORT"),
    ("--output https://127.0.0.1:8080", "expected http://HOST:PORT"),
    ("--output http://127.0.0.1:8080 --live http://127.0.0.1:8081", "both name a page"),
    ("--live http://127.0.0.1:8080 --benchmark", "leave --live out")])
def test_wrong_usage(words, hint, model, tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        fill = {"taken": taken.getsockname()[1]}
        out = [] if "--output" in words else ["--output", str(tmp_path / "out")]
        assert edge_run(["--engine", model, "--input", "synthetic://9x9"] + out + words.format(**fill).split()) == 2
    err = capfd.readouterr().err
    assert hint.format(**fill) in err and err.count("error:") == 1 and not list(tmp_path.glob("out/*")), "before any frame"


def test_a_low_port_is_refused_kindly(monkeypatch):
    def refuse(*unused):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(live, "_Server", refuse)  # root may have any port
    with pytest.raises(UsageError, match="more rights. Take another: http://127.0.0.1:8080"):
        live.Live("http://127.0.0.1:80", "m", "s", [], [])


def test_output_alone_needs_no_more(model):
    check(EdgeConfig(engine=model, input="x.png", output="http://127.0.0.1:8080"))


# --- a real browser ---------------------------------------------------------------------------------------------------

@pytest.fixture
def browse():
    """browse(**options of chromium.Page): a page of a browser, closed after the test."""
    if not chromium.find():
        message = "no %s is installed here: apt install chromium" % ", ".join(chromium.NAMES)
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(chromium.Page(**options))


PIXELS = """(() => { const canvas = document.createElement("canvas"), img = document.getElementById("stream");
  canvas.width = 32; canvas.height = 24; const pen = canvas.getContext("2d"); pen.drawImage(img, 0, 0, 32, 24);
  return Array.from(pen.getImageData(0, 0, 32, 24).data).join(); })()"""
CURVE = "(document.querySelector('#%s .curve') || {getAttribute: () => ''}).getAttribute('d').split('L').length"


@pytest.mark.slow
def test_the_page_moves_and_says_when_the_run_has_ended(browse, model):
    page = browse()
    with Run(model, *MOVING + ("--output", "http://127.0.0.1:0")) as run:
        page.open(run.url)
        page.wait("document.getElementById('stream').naturalWidth === 320")
        before = page.value(PIXELS)
        page.wait("%s !== %s" % (PIXELS, json.dumps(before)))
        for chart in ("latency", "memory", "available"):
            points = page.value(CURVE % chart)
            page.wait("%s > %d" % (CURVE % chart, max(points, 1)))
        assert page.value("document.getElementById('state').textContent") == "running"
        assert page.value("document.querySelectorAll('#areas li').length") == 3
        assert page.value("document.getElementById('lost').hidden")
        assert page.value("[...document.querySelectorAll('#latency text')].map(t => t.textContent).includes('now')")
        assert page.complaints == []
        port = run.port
        assert run.end()[0] == 130
    page.wait("document.getElementById('lost').innerText.includes('Connection lost')")
    assert page.value("document.getElementById('state').textContent") == "connection lost"
    page.complaints.clear()  # Chromium itself writes down each failed request
    with Run(model, *MOVING + ("--output", "http://127.0.0.1:%d" % port)) as run:
        page.wait("document.getElementById('lost').hidden && document.getElementById('state').textContent === 'running'")
        before = page.value(PIXELS)
        page.wait("%s !== %s" % (PIXELS, json.dumps(before)))
        assert status(run)["viewers"] == 1 and all("ERR_" in text for text in page.complaints)


def test_the_token_in_a_browser(browse, model):
    page = browse()
    with Run(model, *MOVING + ("--output", "http://0.0.0.0:0"), token=TOKEN) as run:
        bare = "http://127.0.0.1:%d/" % run.port
        page.open(bare)
        assert "401" in page.value("document.documentElement.innerText") and not page.value("!!document.getElementById('stream')")
        page.complaints.clear()
        page.open(bare + "?token=" + run.token)
        page.wait("document.getElementById('stream').naturalWidth === 320")
        assert page.value("location.href") == bare and page.value("document.cookie") == "", "out of reach of scripts"
        page.open(bare)  # by the cookie
        page.wait("document.getElementById('stream').naturalWidth === 320")
        assert page.complaints == []


@pytest.mark.parametrize("phone", [True, False])
def test_it_fits_and_shows_text_as_text(phone, browse, serve):
    page = serve(clock=time.monotonic, health=lambda: {"restarts": 0, "last_fault": None})
    page.write_line(line(0, "%s is damaged" % ("x" * 300), level=2))
    page.write_line(line(1, pressure={"stall": 1.5}, model="y" * 200))
    seen = browse(width=390, height=844, scale=2, phone=True) if phone else browse(dark=True)
    seen.open(page.url)
    seen.wait("document.querySelectorAll('#areas li').length === 3")
    assert seen.value("document.documentElement.scrollWidth <= innerWidth") and seen.value("innerWidth") == (390 if phone else 1280)
    boxes = seen.value("""['picture', 'figures', 'charts'].map(id => document.getElementById(id).getBoundingClientRect())
        .map(box => [box.left, box.right])""")
    assert not phone or len({tuple(box) for box in boxes}) == 1, "one column"
    assert CLASSES[1] in seen.value("document.getElementById('areas').innerText")
    assert not seen.value("!!document.querySelector('#areas b')")
    assert "stall 1.5" in seen.value("document.getElementById('run').innerText")
    assert "is damaged" in seen.value("document.body.innerText")
    assert seen.value("""[...document.querySelectorAll('img, svg[role=img]')].every(e => e.alt || e.getAttribute('aria-label'))""")
    assert seen.complaints == []
