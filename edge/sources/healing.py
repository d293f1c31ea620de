"""Frames from a child process that is started anew whenever it fails, until the user's patience is over."""
import time

from edge.command import say
from edge.errors import BadFile, DecoderExit, SourceLost, UsageError
from edge.sources import faults
from edge.sources.child import FrameReader

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 4.0
ARGUS_PAUSE_S = 2.0        # what Argus needs to let go of a sensor
START_S = 10.0             # the first frame of a child may take so long: a sensor that starts, a stream's next whole picture
CAMERA_S, FILE_S = 1.5, 10.0
CLOCK_JUMP_S = 1.0         # the wall clock against the monotonic one: a board without a battery gets the date late
SAME_PLACE = 3             # so many faults at one frame of a file: the file is at fault


class Healer:
    """place: uri.Place; options: uri.Options; start() -> a child, as child.Child; tell(text) is called with each fault;
    clock: time, or what has its monotonic(), time() and sleep(); refused(): called for each frame that came whole and was
    not good; fault(): called for each fault; looks(): called several times a second while next() waits."""

    def __init__(self, place, options, start, clock=time, tell=say, refused=lambda: None, fault=lambda: None,
                 looks=lambda: None):
        self._place, self._start, self._clock, self._tell = place, start, clock, tell
        self._refused, self._on_fault, self._looks = refused, fault, looks
        self._timeout_s = options.frame_timeout_s or (CAMERA_S if place.kind != "file" else FILE_S)
        self._patience_s = options.patience_s
        self._watchdog = faults.Watchdog(*(0.0, 0.0) if place.kind == "file" else (options.frozen_s, options.black_s))
        self._pauses = (ARGUS_PAUSE_S if place.kind == "csi" else FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._child = self._reader = self._jump_base = self._good_s = None
        self._pause_s, self._fresh, self._skip, self._stopped = self._pauses[0], True, 0, False
        self._failed_at = [None, 0]
        self.given, self.restarts, self.time_jumps, self.last_fault = 0, 0, 0, None

    def next(self, buffer):
        """The next good child.Shot, in `buffer`; None at the end or after stop(). Raises what trying again cannot cure, and
        the last fault, a SourceLost, when patience is over."""
        self._good_s = self._clock.monotonic()  # what our caller took since the last one is no fault of the source
        while not self._stopped:
            try:
                if self._child is None:
                    self._child = self._start()
                    self._reader = FrameReader(self._child, self._clock, self._shall_stop)
                    self._fresh = True
                shot = self._reader.next(buffer, self._allowed_s())
                if self._stopped:
                    break
                if shot is None:
                    if self._place.live:
                        raise DecoderExit("the stream ended")
                    return self._end()
                self._fresh = False
                if self._skip:  # of a file that is read again
                    self._skip -= 1
                    continue
                try:
                    good = self._watchdog.look(shot.pixels, shot.arrived_s)
                except SourceLost:
                    self._refused()
                    raise
                if not good:
                    self._refused()
                    continue
            except SourceLost as error:
                if self._stopped:
                    break
                self._heal(error)
                continue
            self._check_clock(shot)
            self._good_s, self._pause_s = self._clock.monotonic(), self._pauses[0]
            self.given += 1
            return shot
        return None

    def _allowed_s(self):
        """How long the next frame may take: the first one of a child longer, within our patience."""
        left_s = self._good_s + self._patience_s - self._clock.monotonic()
        return max(self._timeout_s, min(START_S, left_s)) if self._fresh else self._timeout_s

    def _end(self):
        if not self.given and self._place.kind == "file":
            raise BadFile("%s holds no frame of video" % self._place.shown)
        return None

    def _heal(self, error):
        """Say what happened, end the child, wait; or raise what cannot be cured."""
        self._on_fault()
        self._close_child()
        self._watchdog.restarted()
        known = faults.explain(error, self._place) if isinstance(error, DecoderExit) else error
        if isinstance(known, UsageError) and self._place.kind == "v4l2" and self.given:
            known = DecoderExit(str(known))  # a camera that gave frames: plugged in again, its rights are not set yet
        if not isinstance(known, SourceLost):
            raise known from error
        if self._place.kind == "file":
            self._demand_progress(known)
            self._skip = self.given
        self.last_fault = known.kind
        self._demand_patience(known)
        self._tell("%s. Starting it again in %.1f s" % (self._named(known), self._pause_s))
        self._sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, self._pauses[1])
        self.restarts += 1

    def _named(self, error):
        text = str(error)
        return text if text.startswith(self._place.shown) else "%s: %s" % (self._place.shown, text)

    def _demand_patience(self, error):
        without_s = self._clock.monotonic() - self._good_s
        if without_s >= self._patience_s:
            cure = ". Type: %s" % faults.RESTART_ARGUS if self._place.kind == "csi" and faults.RESTART_ARGUS not in str(error) else ""
            raise type(error)("%s. No good frame for %.0f s (--patience %g)%s"
                              % (self._named(error), without_s, self._patience_s, cure)) from error

    def _demand_progress(self, error):
        self._failed_at = [self.given, self._failed_at[1] + 1 if self._failed_at[0] == self.given else 1]
        if self._failed_at[1] >= SAME_PLACE:
            raise BadFile("%s cannot be read beyond frame %d: %s. Copy it again from its source"
                          % (self._place.shown, self.given, error)) from error

    def _check_clock(self, shot):
        base = shot.capture_time_s - shot.arrived_s
        if self._jump_base is not None and abs(base - self._jump_base) > CLOCK_JUMP_S:
            self.time_jumps += 1
            self.last_fault = "time jump"
            self._tell("%s: the clock of this machine jumped by %+.1f s" % (self._place.shown, base - self._jump_base))
        self._jump_base = base

    def _sleep(self, seconds):
        until = self._clock.monotonic() + min(seconds, max(0.0, self._good_s + self._patience_s - self._clock.monotonic()))
        while not self._shall_stop() and self._clock.monotonic() < until:
            self._clock.sleep(min(0.1, max(0.001, until - self._clock.monotonic())))

    def _shall_stop(self):
        self._looks()
        return self._stopped

    def stop(self):
        """Make next() return None soon, from another thread too."""
        self._stopped = True

    def _close_child(self):
        if self._child is not None:
            self._child.close(ARGUS_PAUSE_S if self._place.kind == "csi" else 0.3 if self._place.live else 0.0)
            self._child = self._reader = None

    def close(self):
        """End the child. Call it where next() is called."""
        self.stop()
        self._close_child()
