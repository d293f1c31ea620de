"""Headless Chromium over the DevTools protocol, through a pipe: JSON objects that end with a zero byte."""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find():
    """Path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page of a browser of its own. Use as a context manager. width, height: px of its window; scale: device px per
    px; phone: as a phone lays pages out. .complaints: console errors, exceptions and warnings of security so far."""

    def __init__(self, width=1280, height=900, scale=1, phone=False, dark=False):
        self._home = tempfile.mkdtemp(prefix="chromium-")
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # copies far above 3 and 4, where Chromium looks for them
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in (theirs_in, theirs_out)]
        self._process = subprocess.Popen(
            [find(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
             "--disable-background-networking", "--disable-component-update", "--user-data-dir=" + self._home,
             "--remote-debugging-pipe", "about:blank"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, pass_fds=(3, 4), start_new_session=True,
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)))
        for fd in [theirs_in, theirs_out] + high:
            os.close(fd)
        self._in, self._out, self._count, self._session, self._rest = ours_in, ours_out, 0, None, b""
        self.complaints = []
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.call(domain + ".enable")
            self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)
            self.call("Emulation.setScrollbarsHidden", hidden=True)
            self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        except BaseException:
            self.close()
            raise

    def call(self, method, timeout_s=60, **params):
        """The result of one command of the protocol. Raises RuntimeError with Chromium's words."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end_s = time.monotonic() + timeout_s
        while True:
            while b"\0" not in self._rest:
                if not select.select([self._in], [], [], max(0, end_s - time.monotonic()))[0]:
                    raise RuntimeError("%s: no answer within %g s" % (method, timeout_s))
                data = os.read(self._in, 1 << 16)
                if not data:
                    raise RuntimeError("Chromium has ended")
                self._rest += data
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text.decode())
            self._note(answer)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError("%s: %s" % (method, answer["error"]))
                return answer["result"]

    def _note(self, event):
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown" or kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning") \
                or kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params))

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState !== 'loading'")

    def value(self, expression):
        """What a JavaScript expression gives, a promise's result too."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError("%s: %s" % (expression, answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, expression, timeout_s=60):
        """Until a JavaScript expression is true; returns its value. Raises RuntimeError with what the page shows."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            value = self.value(expression)
            if value:
                return value
            time.sleep(0.1)
        raise RuntimeError("not within %g s: %s; the page shows: %s; complaints: %s" % (
            timeout_s, expression, self.value("document.body.innerText"), self.complaints))

    def screenshot(self, **options):
        """The page as bytes of a PNG, or as Page.captureScreenshot's options say."""
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])

    def close(self):
        try:
            self._session = None
            self.call("Browser.close", timeout_s=5)
            self._process.wait(10)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            pass
        finally:
            try:
                os.killpg(self._process.pid, 9)  # its own session: helpers too
            except OSError:
                pass  # all of them have ended
            self._process.wait()
            os.close(self._in)
            os.close(self._out)
            shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()
