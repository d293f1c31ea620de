"""Video and cameras as a source of Frames: the newest frame of a camera, every frame of a file, and exact counts."""
import os
import struct
import threading
import time

from edge import images, service
from edge.command import say
from edge.errors import BadFile, UsageError
from edge.sources import Frame, child, healing, pipelines, uri

HUNG_S = 10.0  # without a look at its child, a reading thread counts as hung: it looks five times a second
BUFFERS = 3   # one being filled, one that waits, one in the hands of who asked for frames
RAW_CAMERAS = ("vi-output", "imx219", "imx477", "ov5647")  # in a video node's name: a CSI sensor, raw


def open_video(place, options, limit=0):
    """A Video of a uri.Place. Raises UsageError, MissingPart and BadFile at once; see edge.sources.open_source."""
    uri.check(options)
    if place.kind == "file":
        check_file(place.where)
    elif place.kind == "v4l2":
        check_node(place)
    words = pipelines.build(place, options, needed(pipelines.available()))
    return Video(place, options, limit, lambda: child.Child(words, headless=place.kind == "csi"))


def needed(elements):
    """`elements`, which must hold those that bring frames to us."""
    for name in ("multipartmux", "fdsink"):
        if name not in elements:
            raise pipelines.missing(name)
    return elements


def check_file(path):
    """Raise BadFile for what no decoder need be asked about."""
    if not os.path.exists(path):
        raise BadFile("no such video: %s" % path)
    if os.path.getsize(path) == 0:
        raise BadFile("%s is empty (0 bytes); expected a video" % path)
    with open(path, "rb"):
        pass  # no permission: said now


def check_node(place, root="/sys/class/video4linux"):
    """Raise UsageError for a video node that gives raw pictures of a sensor, which no program can show as they are."""
    try:
        with open(os.path.join(root, os.path.basename(os.path.realpath(place.where)), "name"), encoding="utf-8",
                  errors="replace") as handle:
            name = handle.read().strip()
    except OSError:
        return  # no such camera: the watchdog waits for it
    if any(word in name for word in RAW_CAMERAS):
        raise UsageError("%s is the CSI camera %r, whose raw pictures need Argus. Use --input csi://0" % (place.where, name))


def missing_bytes(path):
    """How many bytes an MP4 or MOV file lacks by its own account; 0 for a whole one and for other formats."""
    with open(path, "rb") as handle:
        total, at, first = os.path.getsize(path), 0, True
        while at < total:
            handle.seek(at)
            head = handle.read(16)
            if len(head) < 8:
                return 0 if first else 8 - len(head)
            size, kind = struct.unpack(">I4s", head[:8])
            if first and kind not in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
                return 0
            if size == 1 and len(head) == 16:
                size = struct.unpack(">Q", head[8:])[0]
            if size == 0:
                return 0  # as far as the file goes
            if size < 8:
                return 0  # no box: GStreamer will say what it thinks of it
            at, first = at + size, False
        return at - total


class Video:
    """An iterator over the Frames of one source. start() -> a child.Child; clock: time, or what has its monotonic(), time()
    and sleep(). Close it, or use it as a context manager.

    With the policy newest a thread reads, and a frame that waits gives way to a newer one; else who asks reads.
    processed + dropped = received, in the health of every Frame and after close()."""

    def __init__(self, place, options, limit, start, clock=time, tell=say):
        self.place, self.newest = place, options.policy == "newest" or options.policy == "auto" and place.live
        self._limit, self._changed, self._clock, self._looked_s = limit, threading.Condition(), clock, clock.monotonic()
        self._received = self._processed = self._dropped = 0
        self._waiting = self._held = self._error = self._thread = None
        self._ended = self._closed = False
        self._spare = [child.Buffer() for _ in range(BUFFERS if self.newest else 1)]
        self._healer = healing.Healer(place, options, start, clock, tell, self._refuse, self._drop_waiting,
                                      self._looks)

    def health(self):
        """dict: frames received, processed and dropped; restarts of GStreamer; jumps of the clock; the last fault or None."""
        with self._changed:
            return self._health()

    def _health(self):
        return {"received": self._received, "processed": self._processed, "dropped": self._dropped,
                "restarts": self._healer.restarts, "time_jumps": self._healer.time_jumps, "last_fault": self._healer.last_fault}

    def _refuse(self):
        """A frame came that nobody shall see."""
        with self._changed:
            self._received += 1
            self._dropped += 1

    def _looks(self):
        """The reader waits for its child, or until that may be started again."""
        self._looked_s = self._clock.monotonic()
        if not self.newest:
            service.alive()

    def _drop_waiting(self):
        """After a fault the frame that waits is stale."""
        with self._changed:
            if self._waiting:
                self._dropped += 1
                self._spare.append(self._waiting[1])
                self._waiting = None

    def read(self):
        """Take one frame from the source into the place of the one that waits. False at the end."""
        with self._changed:
            buffer = self._spare.pop()
        try:
            shot = self._healer.next(buffer)
        except BaseException:
            with self._changed:
                self._spare.append(buffer)
            raise
        with self._changed:
            if shot is None:
                self._spare.append(buffer)
                return False
            self._received += 1
            if self._waiting:
                self._dropped += 1
                self._spare.append(self._waiting[1])
            self._waiting = (shot, buffer, self._received - 1)
            self._changed.notify_all()
        return True

    def _run(self):
        try:
            while self.read():
                pass
        except Exception as exc:  # given to who asks for frames
            self._error = exc
        finally:
            self._healer.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def __iter__(self):
        return self

    def __next__(self):
        if self._closed or self._limit and self._processed >= self._limit:
            self.close()
            raise StopIteration
        self._give_back()
        if not self.newest:
            try:
                more = self.read()
            except BaseException:  # Ctrl-C too
                self.close()
                raise
            if not more:
                self._finish()
        else:
            if not self._thread:
                self._thread = threading.Thread(target=self._run, name="frames of %s" % self.place.kind, daemon=True)
                self._thread.start()
            with self._changed:
                while not self._waiting and not self._ended:
                    self._changed.wait(service.BEAT_S)
                    if self._clock.monotonic() - self._looked_s < HUNG_S:
                        service.alive()
            if not self._waiting:
                self._finish()
        return self.take()

    def take(self):
        """The frame that waits, as a Frame, which is now processed; None when none waits."""
        self._give_back()
        with self._changed:
            if not self._waiting:
                return None
            shot, buffer, index = self._waiting
            self._waiting, self._held = None, buffer
            self._processed += 1
            health = self._health()
        return Frame(index, "frame-%06d" % index, self.place.shown, lambda: images.ArrayPicture(shot.pixels),
                     shot.capture_time_s, shot.arrived_s, health, shot.rate)

    def _give_back(self):
        with self._changed:
            if self._held:
                self._spare.append(self._held)
                self._held = None

    def _finish(self):
        """The end: raise what ended the source, or StopIteration."""
        self.close()
        if self._error:
            raise self._error
        lost = missing_bytes(self.place.where) if self.place.kind == "file" else 0
        if lost:
            raise BadFile("%s is truncated: %d bytes are missing, and the video ends after %d frames. Copy it again from its "
                          "source" % (self.place.shown, lost, self._received))
        raise StopIteration

    def close(self):
        """End GStreamer and the thread; a frame that waits is dropped. The last Frame's pixels stay valid."""
        self._closed = True
        self._healer.stop()
        if self._thread:
            self._thread.join()
        self._healer.close()
        self._drop_waiting()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()
