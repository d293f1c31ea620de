"""A GStreamer pipeline in a process of its own, and the frames that come out of its pipe or go into it.

The process may hang or crash: it is killed with all that it started, and reaped. Frames come over a pipe of their own, never
over stdout, for camera drivers print there. Each one is preceded by its length (multipartmux), so that bytes which are lost or
too many are noticed; stdout tells its size in pixels (gst-launch's -v)."""
import fcntl
import os
import re
import select
import signal
import subprocess
import time

import numpy as np

from edge.command import end_with_parent
from edge.errors import DecoderExit, NoFrame, ShortFrame, TornFrame, WrongSize
from edge.sources.pipelines import missing

MARK = b"--nanopatch"
PREFIX = MARK + b"\r\nContent-Type: video/x-raw\r\nContent-Length: "
BLANK, TRAILER = b"\r\n\r\n", b"\r\n"
CAPS = re.compile(r":pixels\.GstPad:src: caps = (video/x-raw.*)")
KEPT_TEXT = 8192          # last bytes of what the process said
TAIL_BYTES = 4096
LOOK_S = 0.2              # between looks at whether we shall stop
PIPE_BYTES = 1 << 20      # what Linux allows everybody
F_SETPIPE_SZ = 1031
CHANNELS = {"RGB": 3, "RGBA": 4, "BGRx": 4}


def _widen(pipe):
    """A large frame takes fewer turns."""
    try:
        fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass  # many pipes are open already: a smaller one will do


class Process:
    """gst-launch-1.0 with `words`, heard and ended. stdin: as of subprocess; pipes: descriptors that it is given too.
    headless: without a display, whose forwarding over ssh breaks Argus. Raises MissingElement without GStreamer, DecoderExit where it
    cannot be started."""

    def __init__(self, words, stdin=subprocess.DEVNULL, pipes=(), headless=False):
        env = {k: v for k, v in os.environ.items() if not (headless and k == "DISPLAY")}
        env.update(LC_ALL="C", LANGUAGE="C")  # messages as we know them
        try:
            # -f: a crash ends it, instead of waiting for a debugger
            self._process = subprocess.Popen(["gst-launch-1.0", "-f"] + words, stdin=stdin, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE, pass_fds=pipes, env=env, start_new_session=True,
                                             preexec_fn=end_with_parent)
        except FileNotFoundError as exc:
            raise missing("gst-launch-1.0") from exc
        except OSError as exc:  # no memory to fork, say: it may pass
            raise DecoderExit("GStreamer cannot be started: %s" % exc.strerror) from exc
        self.pid = self._process.pid
        self._text, self._line = b"", b""
        self._poll, self._talk = select.poll(), {}
        for pipe, said in ((self._process.stdout, self._stdout), (self._process.stderr, self._stderr)):
            self._talk[pipe.fileno()] = (pipe, said)
            self._poll.register(pipe, select.POLLIN)

    def listen(self, timeout_s):
        """Hear what is said for timeout_s, or until another descriptor is ready: whether one is."""
        ready = False
        for number, _event in self._poll.poll(max(0, timeout_s) * 1000):
            if number in self._talk:
                self._hear(number)
            else:
                ready = True
        return ready

    def _hear(self, number):
        said = os.read(number, 65536)
        if said:
            self._talk[number][1](said)
        else:
            self._poll.unregister(number)
            self._talk.pop(number)[0].close()

    def _stdout(self, said):
        lines = (self._line + said).split(b"\n")
        self._line = lines.pop()[-KEPT_TEXT:]
        for line in lines:
            self._stdout_line(line)

    def _stdout_line(self, line):
        if line.startswith((b"WARNING", b"ERROR")):  # newer versions print these here
            self._stderr(line + b"\n")

    def _stderr(self, said):
        self._text = (self._text + said)[-KEPT_TEXT:]

    def ended(self, timeout_s=2.0):
        """(exit status or None, what it said) after the end of the pipe."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        while self._talk:  # what was said last, without waiting for those who hold the pipe open
            ready = [number for number, _event in self._poll.poll(0) if number in self._talk]
            if not ready:
                break
            for number in ready:
                self._hear(number)
        return status, self._text.decode(errors="replace")

    def wait_for_end(self, limit_s):
        """Wait until it has ended, or for limit_s; its words are heard, for it may wait for that."""
        deadline = time.monotonic() + limit_s
        while self._process.poll() is None and time.monotonic() < deadline:
            self.listen(0.02)
            if self._process.poll() is None:
                time.sleep(0.01)

    def close(self, grace_s=0.0):
        """End the process and all that it started, and reap it. grace_s: how long it may take to let go of a camera."""
        if self._process.poll() is None and grace_s:
            self._process.send_signal(signal.SIGINT)
            self.wait_for_end(grace_s)
        try:
            os.killpg(self.pid, signal.SIGKILL)  # its children too, if it has left any; it is not reaped or is gone itself
        except (ProcessLookupError, PermissionError):
            pass
        self._process.wait()
        for pipe, _said in self._talk.values():
            pipe.close()
        self._talk = {}


class Child(Process):
    """A pipeline whose frames come to us over a pipe."""

    def __init__(self, words, headless=False):
        self.caps = None
        self._frames, theirs = os.pipe()
        try:
            _widen(theirs)
            super().__init__(["-v"] + words + ["!", "multipartmux", "boundary=nanopatch", "!", "fdsink", "fd=%d" % theirs],
                             pipes=(theirs,), headless=headless)
        except BaseException:
            os.close(self._frames)
            raise
        finally:
            os.close(theirs)
        self._poll.register(self._frames, select.POLLIN)

    def wait(self, timeout_s):
        """Wait for a frame's bytes or the end of the pipe: True; False when timeout_s are over. Hears what is said meanwhile."""
        return self.listen(timeout_s)

    def _stdout_line(self, line):
        caps = CAPS.search(line.decode(errors="replace"))
        if caps:
            self.caps = caps.group(1)
        else:
            super()._stdout_line(line)

    def read_into(self, view):
        """Bytes of the pipe into a writable memoryview. Returns how many, 0 at the end; call it when wait() said True."""
        return os.readv(self._frames, [view])

    def close(self, grace_s=0.0):
        super().close(grace_s)
        if self._frames is not None:
            os.close(self._frames)
            self._frames = None


class Feed(Process):
    """A pipeline that begins with fdsrc, and is fed by us through its standard input."""

    def __init__(self, words):
        super().__init__(words, stdin=subprocess.PIPE)
        self._pipe = self._process.stdin.fileno()
        _widen(self._pipe)
        os.set_blocking(self._pipe, False)  # an encoder that hangs may not stop us
        self._poll.register(self._pipe, select.POLLOUT)

    def write(self, view, stall_s):
        """All bytes of a memoryview into the pipe. Raises BrokenPipeError when the process has ended, TimeoutError when it
        takes nothing for stall_s."""
        deadline = time.monotonic() + stall_s
        while len(view):
            if self.listen(LOOK_S):
                try:
                    view = view[os.write(self._pipe, view):]
                    deadline = time.monotonic() + stall_s
                except BlockingIOError:
                    pass
            elif time.monotonic() >= deadline:
                raise TimeoutError("took nothing for %g s" % stall_s)

    def finish(self, limit_s):
        """Say that no more will come, and wait for its end for limit_s."""
        self._shut()
        self.wait_for_end(limit_s)

    def _shut(self):
        if not self._process.stdin.closed:
            self._poll.unregister(self._pipe)
            self._process.stdin.close()

    def close(self, grace_s=0.0):
        self._shut()
        super().close(grace_s)


class Shot:
    """A frame as it came: pixels (H, W, 3) uint8 RGB, a view of the buffer; arrived_s on the monotonic clock, capture_time_s
    since 1970; rate: frames per second as the source says, None where it does not."""

    def __init__(self, pixels, arrived_s, capture_time_s, rate=None):
        self.pixels, self.arrived_s, self.capture_time_s, self.rate = pixels, arrived_s, capture_time_s, rate


class Buffer:
    """Room for one frame, made anew only when a frame has another size."""

    def __init__(self):
        self.data = np.empty(0, np.uint8)

    def view(self, count):
        if len(self.data) != count:
            self.data = np.empty(count, np.uint8)
        return memoryview(self.data)


class FrameReader:
    """Cuts the bytes of a child into frames. clock: time, or what has its monotonic() and time(); stopped() -> whether to
    give up: next() then returns None."""

    def __init__(self, child, clock=time, stopped=lambda: False):
        self._child, self._clock, self._stopped = child, clock, stopped
        self._header, self._caps, self._count = None, None, 0

    def next(self, buffer, timeout_s):
        """The next Shot, in `buffer`; None at the end of the stream. Raises NoFrame, ShortFrame, TornFrame, WrongSize or
        DecoderExit, which has the exit status and the words of the process as .status and .text."""
        deadline = self._clock.monotonic() + timeout_s
        known = self._header or PREFIX
        head = bytearray(len(known))
        if not self._fill(memoryview(head), deadline, timeout_s, first=True):
            return None
        arrived_s, capture_time_s = self._clock.monotonic(), self._clock.time()
        self._size_checked(head, known, deadline, timeout_s)
        self._fill(buffer.view(self._count), deadline, timeout_s)
        trailer = bytearray(len(TRAILER))
        self._fill(memoryview(trailer), deadline, timeout_s)
        # where bytes were lost the next header has moved up, and it holds line ends too
        if trailer != TRAILER or MARK in bytes(buffer.data[-TAIL_BYTES:]):
            raise TornFrame("a frame of %d bytes does not end where it should: bytes are missing or too many" % self._count)
        if self._child.caps != self._caps and _layout(self._child.caps) != self._layout:  # turned frames have as many bytes
            raise WrongSize("frames changed from %dx%d %s to %dx%d %s" % (self._layout + _layout(self._child.caps)))
        height, width, channels, stride = self._shape
        pixels = buffer.data[:height * stride].reshape(height, stride)[:, :width * channels]
        return Shot(pixels.reshape(height, width, channels)[..., self._order], arrived_s, capture_time_s, self._rate)

    def _size_checked(self, head, known, deadline, timeout_s):
        """A header must be as the one before; the first one says how many bytes a frame has."""
        if head != known:
            if self._header and re.match(br"\d+\r\n\r|\d+$", head[len(PREFIX):]) and head.startswith(PREFIX):
                raise WrongSize("frames began with %d bytes and now have another size" % self._count)
            raise TornFrame("a frame begins with %r where its header was expected" % bytes(head[:16]))
        if self._header:
            return
        digits = bytearray()
        while not digits.endswith(BLANK):
            one = bytearray(1)
            self._fill(memoryview(one), deadline, timeout_s)
            digits += one
            if not re.match(br"^\d{1,10}(\r(\n(\r\n?)?)?)?$", digits):
                raise TornFrame("a frame's header says %r where its length was expected" % bytes(digits))
        while not self._child.caps:  # said before the frame came, heard after
            if self._clock.monotonic() >= deadline:
                raise NoFrame("frames without a size came for %.1f s" % timeout_s)
            self._child.wait(0.01)
        self._caps, self._count = self._child.caps, int(digits)
        self._layout, self._rate = _layout(self._caps), _rate(self._caps)
        self._shape, self._order = _shape(self._layout, self._count)
        self._header = bytes(head + digits)

    def _fill(self, view, deadline, timeout_s, first=False):
        """All of `view` from the child; False when it ends, or we stop, before the first byte of a frame."""
        got = 0
        while got < len(view):
            left = deadline - self._clock.monotonic()
            if first and not got and self._stopped():
                return False
            if self._child.wait(min(LOOK_S, max(0.0, left))):
                count = self._child.read_into(view[got:])
                if not count:
                    return self._at_end(first and not got)
                got += count
            elif left <= 0 and first and not got:
                raise NoFrame("no frame for %.1f s" % timeout_s)
            elif left <= 0 or self._stopped():
                raise ShortFrame("a frame stopped in its middle, for %.1f s" % timeout_s)
        return True

    def _at_end(self, between_frames):
        status, text = self._child.ended()
        if status == 0 and between_frames:
            return False
        if status in (0, None):
            raise ShortFrame("the stream ended in the middle of a frame" if status == 0 else
                             "the pipe was closed, and GStreamer did not end")
        error = DecoderExit("GStreamer was killed by signal %d" % -status if status < 0 else
                            "GStreamer ended with status %d" % status)
        error.status, error.text = status, text
        raise error


def _layout(caps):
    """(width, height, name of the pixels' format) of caps as gst-launch prints them; 0 and "" for what they lack."""
    found = [re.search(pattern, caps) for pattern in (r"\bwidth=\(int\)(\d+)", r"\bheight=\(int\)(\d+)", r"format=\(string\)(\w+)")]
    width, height, name = [match.group(1) if match else "" for match in found]
    return int(width or 0), int(height or 0), name


def _rate(caps):
    """Frames per second of caps; None where they do not say, or it varies (0/1)."""
    found = re.search(r"\bframerate=\(fraction\)(\d+)/(\d+)", caps)
    return int(found.group(1)) / float(found.group(2)) or None if found and int(found.group(2)) else None


def _shape(layout, count):
    """((height, width, bytes per pixel, bytes per row), order of the colours) of frames of `count` bytes."""
    width, height, name = layout
    channels = CHANNELS.get(name, 0)
    stride = (width * channels + 3) // 4 * 4  # GStreamer's rows begin at multiples of 4 bytes
    if height and count % height == 0 and count > height * stride:
        stride = count // height  # drivers may want more
    if not stride or height * stride != count:
        raise WrongSize("a frame of %d bytes is no picture of %dx%d %s" % (count, width, height, name))
    return (height, width, channels, stride), slice(2, None, -1) if name == "BGRx" else slice(0, 3)
