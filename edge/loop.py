"""The runtime's loop, for the command and as edge.run, and its benchmark."""
import contextlib
import itertools
import time
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np

from edge import images, service, shelf
from edge.command import say
from edge.errors import BadFile, UsageError
from edge.pressure import Pressure
from edge.sinks import Memory
from edge.sources import open_source
from edge.sources.uri import Options
from jetson import phases

SCHEMA_VERSION = 4  # of a line of results.jsonl
STATUS_S = 10       # between two lines about a video, or about the same failure
FAILURES_KEPT = 100  # messages, for --json
STAGES = ("read", "prepare", "look", "sample", "run", "blend", "stitch", "decode", "unwarp", "write")


class Result(NamedTuple):
    mask: Optional[np.ndarray]             # (H, W) uint8 class ids, yours to keep; None with an error
    area: Optional[Dict[str, float]]       # class name -> share of the pixels, 0..1
    latency_ms: Optional[Dict[str, float]]  # stage of work -> ms
    capture_time_s: float                  # seconds since 1970
    done_time_s: float
    health: Optional[Dict[str, Any]]       # of a camera or video: see sources.video.Video.health
    error: Optional[str]                   # why a frame has no result
    level: int                             # 0: all is done; more: less, see edge.pressure
    model: str                             # contract.identity of what computed it
    label: Optional[str]                   # of a net that labels whole pictures: the likeliest class,
    scores: Optional[Dict[str, float]]     # and class name -> how likely it is, 0..1
    boxes: Optional[List[Dict[str, Any]]]  # of a net that finds boxes: class, score 0..1 and box, x0, y0, x1, y1 px


class Stopwatch:
    """Books the time since the last call to a stage of work: every moment is counted once."""

    def __init__(self):
        self.ms = {}  # of the stages that the pipeline has
        self._last = time.perf_counter()

    def lap(self, stage):
        now = time.perf_counter()
        self.ms[stage] = self.ms.get(stage, 0.0) + (now - self._last) * 1000
        self._last = now
        service.alive()


class Failures:
    """Frames without a result: .count of them, and what was wrong with the .first ones. A camera may go on failing for weeks."""

    def __init__(self):
        self.count, self.first, self._last, self._said_s = 0, [], None, None

    def add(self, text):
        """Count it, and say it: the same again now and then only."""
        self.count += 1
        if len(self.first) < FAILURES_KEPT:
            self.first.append(text)
        if text != self._last or time.monotonic() - self._said_s >= STATUS_S:
            self._last, self._said_s = text, time.monotonic()
            say("error: %s" % text)


def steps(source, pipeline, sinks, pressure):
    """Frames in, results out: yields (frame, line) after each one. line: what results.jsonl says, see result.schema.json.
    A frame that cannot be read has a line with its error, and is passed over. pressure: a pressure.Pressure."""
    for frame in source:
        pressure.begin()
        watch = Stopwatch()
        began_s = frame.arrived_s or time.monotonic()
        line = {"schema_version": SCHEMA_VERSION, "frame": frame.index, "source": frame.origin, "error": None,
                "level": pressure.level, "pressure": pressure.cause, "capture_time_s": frame.capture_time_s or time.time()}
        if frame.health:
            line["health"] = frame.health
        try:
            found = pipeline.attempt(lambda: _work(frame, pipeline, sinks, watch.lap, pressure.scale))
        except BadFile as exc:
            line["error"] = str(exc)
        else:
            line.update(found, latency_ms={stage: round(ms, 3) for stage, ms in watch.ms.items()})
        line["model"] = pipeline.model
        # the wall clock may jump, and a result is not older than its frame
        line["done_time_s"] = line["capture_time_s"] + time.monotonic() - began_s
        sinks.write_line(line)
        yield frame, line
        pressure.rest()  # now, not before: whoever waits for a result has it


def _work(frame, pipeline, sinks, lap, scale):
    """One frame through the pipeline into the sinks. Returns what its line says of that."""
    picture, pipeline.scale = frame.open(), scale
    sinks.take_up(pipeline.classes, pipeline.palette)
    lap("read")
    found = pipeline.results(frame, picture, sinks, lap)
    return dict(found, height=picture.height, width=picture.width)


def pressure_on(source, pipeline, *options):
    """The Pressure of a run. Only frames that may be dropped may be made smaller: a file's masks depend on no temperature."""
    return Pressure(pipeline.tiled and getattr(source, "newest", False), *options)


def run(source, pipeline, sinks, pressure):
    """All of `source` through the pipeline into the sinks. Returns (frames done, Failures, health of the source or None)."""
    done, failed, health, last_s = 0, Failures(), None, None
    for frame, line in steps(source, pipeline, sinks, pressure):
        health = frame.health
        if line["error"]:
            failed.add(line["error"])
            continue
        done += 1
        if health and last_s is not None and time.monotonic() - last_s < STATUS_S:
            continue  # of a video a line now and then
        last_s = time.monotonic()
        written = line["overlay"] or line["mask"]
        text = "%s: %dx%d, %.0f ms%s%s" % (
            frame.origin, line["width"], line["height"], sum(line["latency_ms"].values()), ", " + written if written else "",
            ", %(received)d frames came, %(dropped)d dropped, %(restarts)d restarts" % health if health else "")
        say(text)
        service.notify("STATUS=" + text)
    return done, failed, health


def frames(engine, source, limit=0, backend="auto", threads=0, resize="model", still=-1.0, score=-1.0, pressure="auto", least_rate=1.0,
           least_scale=0.5, **options):
    """Yield (Frame, Result) of every frame of `source`, as edge.run says."""
    unknown = sorted(set(options) - set(Options._fields))
    if unknown:
        raise UsageError("edge.run has no option %s; expected some of %s" % (", ".join(unknown), ", ".join(Options._fields)))
    sinks = Memory()
    with contextlib.closing(open_source(source, limit, Options(**options))) as opened:
        with shelf.opened(engine, backend, threads, resize, still, score) as pipeline:
            for frame, line in steps(opened, pipeline, sinks, pressure_on(opened, pipeline, pressure, least_rate, least_scale)):
                yield frame, Result(None if line["error"] else sinks.mask, line.get("area"), line.get("latency_ms"),
                                    line["capture_time_s"], line["done_time_s"], frame.health, line["error"], line["level"],
                                    line["model"], line.get("label"), line.get("scores"), line.get("boxes"))


def benchmark(source, pipeline, warm_up, runs):
    """Time the whole path from a decoded frame to its mask, writing nothing. Returns a dict
    stage -> {p50, p95, p99} in ms, with 'total' for all of a frame; and the frame's size."""
    pictures = []
    for frame in itertools.islice(source, 8):
        picture = frame.open()  # a video's pixels are only lent
        pictures.append(images.ArrayPicture(np.array(images.whole(picture))) if frame.health else picture)
    laps = []
    phases.mark("warm-up")
    for index in range(warm_up + runs):
        if index == warm_up:
            phases.mark("run")
        watch = Stopwatch()
        pipeline.infer(pictures[index % len(pictures)], watch.lap)
        if index >= warm_up:
            laps.append(dict(watch.ms, total=sum(watch.ms.values())))
    stages = [stage for stage in STAGES if any(stage in lap for lap in laps)] + ["total"]
    table = {stage: dict(zip(("p50", "p95", "p99"), np.percentile([lap.get(stage, 0.0) for lap in laps], [50, 95, 99]).tolist()))
             for stage in stages}
    return table, (pictures[0].height, pictures[0].width)
