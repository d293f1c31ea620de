"""Does less while the board is short of memory, hot or throttled, and returns to full by itself.

Looking reads a few small files, without root rights. A file that is missing, unreadable or nonsense is no pressure, and
never an exception."""
import time
from typing import NamedTuple

from edge import service
from edge.command import say
from edge.errors import UsageError
from jetson import board, memory

MODES = ("auto", "off")
LOOK_S = 0.5     # at least, between two looks: a mark is seen within 1 s, and looking stays a small share of the work
CHANGE_S = 30.0  # at least, between two changes, and of calm before a step back: a heat sink shows a change that late

# MiB left: so little is critical, or short, and so much is fine. Chosen, not measured: a 4 GB board has lived off its swap for
# long at 256, and at 96 one large allocation may get us killed. Fine is half above short: what a level gives back is no recovery.
MEMORY_MIB = (96.0, 256.0, 384.0)
SMALL_MIB = 2048.0  # where there is less than this in all, the marks shrink with it: a group of 300 MiB is not always short

# C below the passive trip point, at which the board itself slows down: so near is hot, so far is fine. We begin before the
# board does; 5 C lie between the marks, so that a chip that cools in its first pause is no recovery.
HOT_C, COOL_C = 3.0, 8.0
FALLBACK_C = (95.0, 100.0)  # passive and hot trip points of a zone that names none: below a Nano's own, 97 and 100.5
TRIPS_C = (60.0, 120.0)     # trip points outside are nonsense, or not those of silicon
SENSORS_C = (-40.0, 125.0)  # and so are temperatures: broken sensors like to say 127

FINE, UNEASY, SHORT, CRITICAL = range(4)  # uneasy: neither fine nor bad enough for a change


class Level(NamedTuple):
    pause: float   # after a frame, in times that the frame took
    scale: float   # of the frame's side, before it is cut into tiles
    text: str


LEVELS = (Level(0, 1.0, "working all of the time"), Level(1, 1.0, "working half of the time"),
          Level(3, 1.0, "working a quarter of the time"),
          Level(3, 0.7, "working a quarter of the time, on frames of 0.7 of their side"),
          Level(3, 0.5, "working a quarter of the time, on frames of half their side"))


class Finding(NamedTuple):
    kind: str    # "memory", "temperature" or "throttled"
    state: int   # FINE to CRITICAL
    text: str    # what was measured, and its mark


def check(mode, least_rate, least_scale):
    """Raise UsageError for an option out of its range."""
    if mode not in MODES:
        raise UsageError("--pressure is %r, expected one of %s" % (mode, ", ".join(MODES)))
    for flag, value, most in (("rate", least_rate, 1000), ("scale", least_scale, 1)):
        if not 0 <= value <= most:  # NaN too
            raise UsageError("--least-%s is %g, expected 0 to %g" % (flag, value, most))


def _state(room, critical, short, fine):
    return CRITICAL if room <= critical else SHORT if room <= short else UNEASY if room < fine else FINE


def judge_memory(rooms):
    """The Finding of memory.rooms_mib()."""
    found = []
    for left, limit in rooms:
        critical, short, fine = [mark * min(1.0, limit / SMALL_MIB) for mark in MEMORY_MIB]
        state = _state(left, critical, short, fine)
        mark = "limit %.0f" % short if state >= SHORT else "fine above %.0f" % fine
        found.append((state, -left, "%.0f of %.0f MiB of memory left, %s" % (left, limit, mark)))
    state, _left, text = max(found, default=(FINE, 0, "memory cannot be read"))
    return Finding("memory", state, text)


def trips(zone):
    """(passive, hot) in C of one of board.zones(): its own trip points where they are plausible. hot: hot or critical, the
    lower one."""
    sane = {kind: celsius for kind, celsius in zone["trips"].items() if TRIPS_C[0] <= celsius <= TRIPS_C[1]}
    between = FALLBACK_C[1] - FALLBACK_C[0]
    hot = min([sane[kind] for kind in ("hot", "critical") if kind in sane], default=None)
    passive = sane.get("passive", FALLBACK_C[0] if hot is None else min(FALLBACK_C[0], hot - between))
    return passive, passive + between if hot is None or hot <= passive else hot


def judge_heat(zones):
    """The Finding of board.zones()."""
    found = []
    for zone in zones:
        celsius, (passive, hot) = zone["celsius"], trips(zone)
        if SENSORS_C[0] <= celsius <= SENSORS_C[1]:
            state = _state(passive - celsius, passive - hot, HOT_C, COOL_C)
            mark = "limit %g" % (passive - HOT_C) if state >= SHORT else "fine below %g" % (passive - COOL_C)
            found.append((state, celsius - passive, "%.1f C at %s, %s" % (celsius, zone["name"], mark)))
    state, _above, text = max(found, default=(FINE, 0, "no temperature can be read"))
    return Finding("temperature", state, text)


class Throttling:
    """What was lowered since the start, or since the power mode was changed: a mode such as 5W lowers clocks on purpose."""

    def __init__(self, root):
        self._root = root
        self._mode, self._highs, self._counts, self._alarm = self._read()

    def _read(self):
        highs = {name: row["high"] for name, row in board.clocks(self._root, ("high",)).items() if (row["high"] or 0) > 0}
        return (board.line(self._root, "/var/lib/nvpmodel/status"), highs, board.over_currents(self._root),
                board.last_over_current(self._root))

    def judge(self):
        """The Finding of now. An alarm of the power supply is found once."""
        mode, highs, counts, alarm = self._read()
        if mode != self._mode:
            self._highs = {}
        found = ["%s at most %d MHz, %d before" % (name, high // 1000, self._highs[name] // 1000)
                 for name, high in sorted(highs.items()) if high < self._highs.get(name, 0)]
        found += ["%s counted %d alarms of the power supply, %d before" % (name, count, self._counts[name])
                  for name, count in sorted(counts.items()) if count > self._counts.get(name, count)]
        if alarm and alarm != self._alarm:
            found.append("the kernel logged an alarm of the power supply")
        self._highs.update((name, max(high, self._highs.get(name, 0))) for name, high in highs.items())
        self._mode, self._counts, self._alarm = mode, counts, alarm or self._alarm
        return Finding("throttled", SHORT if found else FINE, found[0] if found else "no clock is lowered")


class Pressure:
    """How much less is done now. tiled: whether the pipeline cuts frames into tiles, so that their size can change; mode: one
    of MODES; least_rate: frames per second that pauses never go below, 0: no such floor; least_scale: of the frame's side,
    which is never made smaller; clock: time, or what has its monotonic() and sleep(); tell(text) is called with each change.

    Call begin() before the work on each frame and rest() after it. level: 0 is full, len(levels) - 1 the least; cause: "memory",
    "temperature", "throttled", or None at level 0. Raises UsageError for an option out of its range."""

    def __init__(self, tiled, mode="auto", least_rate=1.0, least_scale=0.5, root="/", clock=time, tell=say):
        check(mode, least_rate, least_scale)
        least_scale = least_scale if tiled else 1.0
        self.levels = [level for level in LEVELS if level.scale >= least_scale] if mode == "auto" else [LEVELS[0]]
        self.level, self.cause = 0, None
        self._root, self._clock, self._tell = root, clock, tell
        self._longest_s = 1.0 / least_rate if least_rate else float("inf")
        self._looked_s = self._changed_s = self._uneasy_s = self._began_s = float("-inf")
        self._throttling, self._known_zones = Throttling(root) if mode == "auto" else None, []

    @property
    def scale(self):
        """What the frame's side is to be multiplied by before it is cut into tiles."""
        return self.levels[self.level].scale

    def begin(self):
        """A frame is here: look, if it is time."""
        self._look()
        self._began_s = self._clock.monotonic()

    def rest(self):
        """The frame is done: pause, as long as the level says."""
        now_s = self._clock.monotonic()
        worked_s = now_s - self._began_s
        until_s = now_s + min(self.levels[self.level].pause * worked_s, max(0.0, self._longest_s - worked_s))
        while now_s < until_s:
            self._clock.sleep(min(LOOK_S, until_s - now_s))
            self._look()
            service.alive()
            now_s = self._clock.monotonic()

    def _look(self):
        now_s = self._clock.monotonic()
        if self._throttling is None or now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        findings = [judge_memory(memory.rooms_mib(self._root)), judge_heat(self._zones()), self._throttling.judge()]
        worst = max(findings, key=lambda finding: finding.state)
        if worst.state > FINE:
            self._uneasy_s = now_s
        if worst.state >= SHORT:
            deepest = len(self.levels) - 1
            self._change(deepest if worst.state == CRITICAL else min(deepest, self.level + 1), worst, now_s)
        elif now_s - self._uneasy_s >= CHANGE_S and self.level:
            self._change(self.level - 1, next(finding for finding in findings if finding.kind == self.cause), now_s)

    def _zones(self):
        """board.zones(), their trip points read only when zones come or go."""
        zones = board.zones(self._root, with_trips=False)
        if [zone["name"] for zone in zones] != [zone["name"] for zone in self._known_zones]:
            zones = self._known_zones = board.zones(self._root)
        return [dict(zone, trips=known["trips"]) for zone, known in zip(zones, self._known_zones)]

    def _change(self, level, finding, now_s):
        if level != self.level and now_s - self._changed_s >= CHANGE_S:
            self.level, self._changed_s = level, now_s
            self._tell("pressure: %s: level %d of %d, %s" % (finding.text, level, len(self.levels) - 1, self.levels[level].text))
        self.cause = finding.kind if self.level else None
