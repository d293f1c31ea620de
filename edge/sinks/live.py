"""The live page of a run: the picture, figures and their last minutes in a browser, through the standard library's HTTP server.

The loop only hands over: begin() gives it a View to fill, where somebody watches, show() and write_line() take what came.
Painting, encoding and sending are done in the viewers' threads, and nobody waits for a viewer. The loop takes no lock and
wakes nobody: Ctrl-C ends it between any two steps, and what it held then nobody could take any more."""
import base64
import collections
import errno
import hashlib
import hmac
import http.server
import io
import json
import os
import re
import secrets
import select
import socket
import socketserver
import sys
import threading
import time
from urllib.parse import parse_qs, quote

import numpy as np
from PIL import Image

from edge import images, service
from edge.command import say, without_secrets
from edge.errors import UsageError
from jetson import board, memory

PORT = 8080
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LONG_SIDE_PX = 960    # of the picture, at most
VIEWS_PER_S = 10.0    # at most
QUALITY = 80          # of its JPEG
POINTS = 300          # of the history
POINT_S = 1.0         # between two of them
VIEWERS = 8           # of the picture at a time
CONNECTIONS = 32      # of any kind at a time
LOOK_S = 0.03         # between two looks for a new picture
RATE_FRAMES = 20      # over which frames per second are counted
STALL_S = 10.0        # a viewer that takes nothing for so long is let go
SEND_BYTES = 1 << 17  # that wait in the kernel for a viewer: what is older than a few pictures is of no use
TOKEN, TOKEN_LENGTH = "NANOPATCH_TOKEN", 16
NETWORK_S, LISTEN_PAUSE_S = 60.0, 1.0  # how long a service waits for its address, and between two tries
BOUNDARY = b"--nanopatch\r\n"
KNOWN = {"schema_version", "frame", "source", "error", "capture_time_s", "done_time_s", "health", "height", "width", "mask",
         "overlay", "samples", "area", "boxes", "latency_ms"}  # of a result line; what else there is, the page shows as it stands


def parse_address(address):
    """(host, port) of 'http://HOST:PORT', 8080 where the port is left out. Raises UsageError."""
    match = re.match(r"(?i)^http://(?:\[([\da-f:.]+)\]|([^\s:/?#@\[\]]+))(?::(\d{1,5}))?/?$", address)
    if not match or int(match.group(3) or 0) > 65535:
        raise UsageError("%s is no address for the live page; expected http://HOST:PORT, such as http://127.0.0.1:%d"
                         % (without_secrets(address), PORT))
    return match.group(1) or match.group(2), int(match.group(3) or PORT)


def token_for(host):
    """What a visitor of `host` must show: None on loopback, else NANOPATCH_TOKEN or a random one. Raises UsageError."""
    if host.lower() in LOOPBACK:
        return None
    token = os.environ.get(TOKEN)
    if token is None:
        return secrets.token_urlsafe(24)
    if len(token) < TOKEN_LENGTH:
        raise UsageError("%s has %d characters, expected %d or more. Type: export %s=$(openssl rand -hex 16); or unset it, and "
                         "edge-run makes one" % (TOKEN, len(token), TOKEN_LENGTH, TOKEN))
    return token


class View:
    """Every step-th pixel of a frame and of its labels, filled band by band. pixels (h, w, 3), labels (h, w): uint8.
    palette: of these labels; a later model may have fewer classes."""

    def __init__(self, height, width, palette=()):
        self._palette = palette
        self._step = -(-max(height, width) // LONG_SIDE_PX)
        size = -(-height // self._step), -(-width // self._step)
        self.pixels, self.labels = np.empty(size + (3,), np.uint8), np.empty(size, np.uint8)

    def add(self, y0, pixels, labels):
        """The rows from y0 on: pixels (n, W, 3), labels (n, W), uint8."""
        step, first = self._step, -y0 % self._step
        rows = slice((y0 + first) // step, (y0 + first) // step + len(range(first, len(labels), step)))
        self.labels[rows] = labels[first::step, ::step]
        for channel in range(3):  # channel by channel: four times as fast as three bytes at a time
            self.pixels[rows, :, channel] = pixels[first::step, ::step, channel]

    def jpeg(self):
        """The class colours over the picture, as bytes."""
        coded = io.BytesIO()
        Image.fromarray(images.blend(self.pixels, self.labels, self._palette)).save(coded, "JPEG", quality=QUALITY)
        return coded.getvalue()


class Live:
    """A page of one run at `address`, until close().

    model, source: what the page calls them; classes, palette: their names and (r, g, b), by class id; health: a function that
    gives the source's health as it is now, None where it has none; clock: seconds that never go back.
    .url: what to open, with the token; .closed: whether it has ended. Raises UsageError for an address that cannot be had."""

    def __init__(self, address, model, source, classes, palette, health=None, clock=time.monotonic):
        host, port = parse_address(address)
        self.token = token_for(host)
        self._model, self._source, self._classes, self._palette = model, source, classes, palette
        self._health, self._clock, self._began_s, self._began_time_s = health or (lambda: None), clock, clock(), time.time()
        self.closed, self._number, self._next_view_s = False, 0, 0.0
        self._shown = None               # (number, View): the loop replaces it as a whole
        self._seen = {}, 0, 0, None, ()  # the same: last good line, frames done, failed, last error, when the last were done
        self._lock, self._encoding = threading.Lock(), threading.Lock()  # of the server's threads, for the rest
        self._viewers, self._encoded = 0, (0, b"")
        self._history, self._next_point_s, self._charted = collections.deque(maxlen=POINTS), 0.0, 0
        self._server = _listen(address, host, port, self)
        port = self._server.server_address[1]
        self.cookie = "nanopatch-%d" % port  # cookies are shared by all ports of a host
        shown = _own_name() if host in ("0.0.0.0", "::") else host
        self.url = "http://%s:%d/" % ("[%s]" % shown if ":" in shown else shown, port)
        if self.token:
            self.url += "?token=" + quote(self.token, safe="")
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POINT_S / 4,), name="live page", daemon=True)
        self._thread.start()

    # --- what the loop calls ---

    def take_up(self, classes, palette):
        """Names and colours of the classes from now on."""
        self._classes, self._palette = classes, palette

    def begin(self, height, width):
        """A View of the next frame to be filled; None where nobody watches or the last one is too new."""
        now_s = self._clock()
        if not self._viewers or now_s < self._next_view_s:
            return None
        self._next_view_s = now_s + 1 / VIEWS_PER_S
        return View(height, width, self._palette)

    def show(self, view):
        """The View is whole: send it to who watches."""
        self._number += 1
        self._shown = (self._number, view) if self._viewers else None

    def write_line(self, line):
        """A result, as it goes to results.jsonl."""
        before, frames, failed, error, done_s = self._seen
        done_s = (done_s + (self._clock(),))[-RATE_FRAMES:]
        if line["error"]:
            self._seen = before, frames, failed + 1, {"text": line["error"], "frame": line["frame"]}, done_s
        else:
            self._seen = line, frames + 1, failed, error, done_s

    def close(self):
        """End the server and every connection; no thread is left."""
        self.closed = True
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.end_connections()

    # --- what the server's threads call ---

    def chart(self):
        """Add a point to the history, when the last one is a second old."""
        now_s = self._clock()
        if now_s < self._next_point_s:
            return
        self._next_point_s = now_s + POINT_S
        available_mib = memory.field_mib(memory.read_text("/proc/meminfo"), "MemAvailable")
        celsius = max([zone["celsius"] for zone in board.zones()], default=None)
        line, frames = self._seen[:2]
        latency = sum(line["latency_ms"].values()) if frames > self._charted else None
        self._charted = frames
        with self._lock:
            self._history.append({"n": self._history[-1]["n"] + 1 if self._history else 1, "uptime_s": now_s - self._began_s,
                                  "latency_ms": latency, "rss_mib": memory.rss_mib(), "available_mib": available_mib,
                                  "celsius": celsius})

    def status(self, since=0):
        """What the page shows, as a dict that JSON can hold; of the history the points after number `since`."""
        health, now_s = self._health(), self._clock()
        line, frames, failed, error, done_s = self._seen
        waiting_s = now_s - (done_s[-1] if done_s else self._began_s)
        between = max(1, len(done_s) - 1)
        late = waiting_s > max(3.0, 4 * (done_s[-1] - done_s[0]) / between if done_s else 0.0)
        state = ("running" if done_s and not late else
                 "source lost" if health and health["restarts"] > (line.get("health") or {}).get("restarts", 0) else
                 "no frames" if late else "starting")
        with self._lock:
            history = [point for point in self._history if point["n"] > since]
        return {
            "state": state, "waiting_s": waiting_s, "uptime_s": now_s - self._began_s, "began_time_s": self._began_time_s,
            "model": self._model, "source": self._source, "frame": line.get("frame"), "origin": line.get("source"),
            "width": line.get("width"), "height": line.get("height"), "frames": frames, "failed": failed,
            "frames_per_s": between / max(now_s - done_s[0], 1e-6) if len(done_s) > 1 else 0.0,
            "latency_ms": line.get("latency_ms", {}),
            "area": [{"name": name, "share": line.get("area", {}).get(name), "colour": list(colour)}
                     for name, colour in zip(self._classes, self._palette)],
            "health": health or line.get("health"), "error": error, "viewers": self._viewers,
            "more": {name: value for name, value in line.items() if name not in KNOWN}, "history": history}

    def enter(self):
        """One more who watches the picture. False when there are enough."""
        with self._lock:
            free = self._viewers < VIEWERS
            self._viewers += free
            return free

    def leave(self):
        with self._lock:
            self._viewers -= 1
            if not self._viewers:
                self._shown = None  # the next one shall not see an old picture

    def jpeg(self, after, timeout_s):
        """(number, bytes) of the newest picture, encoded once for all; None when there is none after number `after`
        within timeout_s, or at the end."""
        end_s = time.monotonic() + timeout_s
        while not self.closed:
            shown = self._shown
            if shown and shown[0] > after:
                with self._encoding:
                    if self._encoded[0] < shown[0]:
                        self._encoded = shown[0], shown[1].jpeg()
                    return self._encoded
            if time.monotonic() >= end_s:
                break
            time.sleep(LOOK_S)
        return None


def _own_name():
    """The address under which others reach this machine; its name when it is on no network. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation: only the route is looked up
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def _listen(address, host, port, live):
    until_s = time.monotonic() + (NETWORK_S if service.is_ours() else 0)  # at boot the network may come after us
    while True:
        try:
            return _Server(host, port, live)
        except (OSError, UnicodeError) as exc:  # UnicodeError: no name of a host
            number = getattr(exc, "errno", None)
            if number not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE) or time.monotonic() > until_s:
                raise _no_page(address, host, port, exc) from exc
        time.sleep(LISTEN_PAUSE_S)


def _no_page(address, host, port, exc):
    """The UsageError of an address where no page can be."""
    number = getattr(exc, "errno", None)
    if number == errno.EADDRINUSE:
        cure = "port %d is in use. Take another: http://%s:%d" % (port, host, port + 1 if port < 65535 else PORT)
    elif number in (errno.EACCES, errno.EPERM):
        cure = "ports below 1024 need more rights. Take another: http://%s:%d" % (host, PORT)
    else:
        cure = ("%s is no address of this machine (%s). Take http://127.0.0.1:%d, or http://0.0.0.0:%d for the whole network"
                % (host, getattr(exc, "strerror", None) or exc, port, port))
    return UsageError("no live page at %s: %s" % (address, cure))


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = CONNECTIONS

    def __init__(self, host, port, live):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.live, self._connections = live, {}
        with open(os.path.join(os.path.dirname(__file__), "live.html"), "rb") as handle:
            self.page = handle.read()
        # its own script and style by their hashes, and nothing else: text that slipped in could not run
        hashes = {tag: b"'sha256-%s'" % base64.b64encode(hashlib.sha256(
            re.search(b"<%s>(.*?)</%s>" % (tag, tag), self.page, re.S).group(1)).digest()) for tag in (b"script", b"style")}
        self.policy = ("default-src 'none'; script-src %s; style-src %s; img-src 'self' data:; connect-src 'self'; "
                       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
                       % (hashes[b"script"].decode(), hashes[b"style"].decode()))
        super().__init__((host, port), _Handler)

    def service_actions(self):
        self.live.chart()

    def process_request(self, request, client_address):
        self._connections = {thread: socket_ for thread, socket_ in self._connections.items() if thread.is_alive()}
        if len(self._connections) >= CONNECTIONS:
            return self.shutdown_request(request)
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self._connections[thread] = request
        thread.start()

    def handle_error(self, request, client_address):
        problem = sys.exc_info()[1]
        if not isinstance(problem, OSError):  # a viewer who leaves is none
            say("error: the live page failed for one visitor: %s: %s" % (type(problem).__name__, problem))

    def end_connections(self):
        """Whatever a visitor's thread waits for ends now. Called when nobody new is let in."""
        for request in self._connections.values():
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the visitor was faster
        for thread in self._connections:
            thread.join(STALL_S)  # a source that hangs could hold the one who asks for its health


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = STALL_S
    server_version, sys_version = "nanopatch", ""

    def log_message(self, *unused):
        pass

    def send_error(self, code, message=None, explain=None):
        """What the standard library calls for a request that it refuses; an unknown method among them."""
        self._answer(405 if code == 501 else code, allow=code == 501)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        query = parse_qs(query)
        live, cookie = self.server.live, None
        if live.token is None:
            # a name that an attacker's DNS turned into 127.0.0.1 comes with that name
            hosts = self.headers.get_all("Host", [])
            if len(hosts) != 1 or not re.match(r"(?i)^(127\.0\.0\.1|localhost|\[::1\])(:\d+)?$", hosts[0]):
                return self._answer(403)
        elif not self._let_in(query):
            return self._answer(401)
        elif "token" in query:
            cookie = "%s=%s; HttpOnly; SameSite=Strict; Path=/" % (live.cookie, quote(live.token, safe=""))
        if path == "/":
            self._answer(200, "text/html; charset=utf-8", self.server.page, cookie)
        elif path == "/status":
            since = query.get("since", ["0"])[0]
            if not re.match(r"^\d{1,15}$", since):
                return self._answer(400)
            self._answer(200, "application/json", json.dumps(live.status(int(since))).encode(), cookie)
        elif path == "/stream":
            self._stream(cookie)
        else:
            self._answer(404)

    def _let_in(self, query):
        """Whether the visitor showed the token: in the address, in a header, or as the cookie that the address left."""
        live = self.server.live
        header = self.headers.get("Authorization", "")
        if "token" in query:
            shown, wanted = query["token"][0], live.token
        elif header:
            shown, wanted = header, "Bearer " + live.token
        else:
            found = re.search(r"(?:^|;\s*)%s=([^;\s]*)" % live.cookie, self.headers.get("Cookie", ""))
            shown, wanted = found.group(1) if found else "", quote(live.token, safe="")
        return hmac.compare_digest(shown.encode("utf-8", "replace"), wanted.encode("utf-8", "replace"))

    def _answer(self, code, kind=None, body=b"", cookie=None, allow=False):
        """Headers and, but for HEAD, a body. body None: it follows."""
        self.close_connection = True
        self.send_response(code)
        for name, value in (("Content-Type", kind), ("Content-Length", None if body is None else str(len(body))),
                            ("Set-Cookie", cookie), ("Allow", "GET, HEAD" if allow else None),
                            ("Content-Security-Policy", self.server.policy),
                            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
                            ("Cross-Origin-Resource-Policy", "same-origin"), ("Cache-Control", "no-store")):
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self, cookie):
        live, kind = self.server.live, "multipart/x-mixed-replace; boundary=nanopatch"
        if self.command == "HEAD":
            return self._answer(200, kind, None, cookie)
        if not live.enter():
            return self._answer(503)
        try:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            self._answer(200, kind, None, cookie)
            self.wfile.write(BOUNDARY)
            number = 0
            while not live.closed:
                coded = live.jpeg(number, POINT_S)
                if coded:
                    number, data = coded
                    # the boundary behind it too: browsers show a picture when the next one begins
                    self.wfile.write(b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n%s"
                                     % (len(data), data, BOUNDARY))
                elif select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    break  # the viewer has gone
        finally:
            live.leave()
