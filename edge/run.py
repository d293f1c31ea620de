"""The runtime's loop, and its benchmark."""
import itertools
import time

import numpy as np

from edge.command import say
from edge.errors import BadFile

STAGES = ("read", "prepare", "look", "sample", "run", "blend", "decode", "unwarp", "write")


class Stopwatch:
    """Books the time since the last call to a stage of work: every moment is counted once."""

    def __init__(self):
        self.ms = {}  # of the stages that the pipeline has
        self._last = time.perf_counter()

    def lap(self, stage):
        now = time.perf_counter()
        self.ms[stage] = self.ms.get(stage, 0.0) + (now - self._last) * 1000
        self._last = now


def run(source, pipeline, sinks):
    """Frames in, results out. A frame that cannot be read is reported and passed over.
    Returns (frames done, list of error messages)."""
    done, failed = 0, []
    for frame in source:
        watch = Stopwatch()
        try:
            picture = frame.open()
            watch.lap("read")
            bands = pipeline.bands(picture, watch.lap)
            mask, overlay, counts = sinks.write_bands(frame, picture, bands, watch.lap, pipeline.blend)
            samples = sinks.write_samples(frame, overlay, pipeline.positions)
            watch.lap("write")
        except BadFile as exc:
            failed.append(str(exc))
            say("error: %s" % exc)
            sinks.write_line({"schema_version": 1, "frame": frame.index, "source": frame.origin, "error": str(exc)})
            continue
        done += 1
        sinks.write_line({
            "schema_version": 1, "frame": frame.index, "source": frame.origin, "error": None,
            "height": picture.height, "width": picture.width, "mask": mask, "overlay": overlay, "samples": samples,
            "area": {name: float(n) / counts.sum() for name, n in zip(pipeline.classes, counts)},
            "latency_ms": {stage: round(ms, 3) for stage, ms in watch.ms.items()},
        })
        say("%s: %dx%d, %.0f ms%s" % (frame.origin, picture.width, picture.height, sum(watch.ms.values()),
                                      ", " + (overlay or mask) if mask else ""))
    return done, failed


def benchmark(source, pipeline, warm_up, runs):
    """Time the whole path from a decoded frame to its mask, writing nothing. Returns a dict
    stage -> {p50, p95, p99} in ms, with 'total' for all of a frame; and the frame's size."""
    pictures = [frame.open() for frame in itertools.islice(source, 8)]
    laps = []
    for index in range(warm_up + runs):
        watch = Stopwatch()
        for _labels in pipeline.bands(pictures[index % len(pictures)], watch.lap):
            pass
        if index >= warm_up:
            laps.append(dict(watch.ms, total=sum(watch.ms.values())))
    stages = [stage for stage in STAGES if any(stage in lap for lap in laps)] + ["total"]
    table = {stage: dict(zip(("p50", "p95", "p99"), np.percentile([lap.get(stage, 0.0) for lap in laps], [50, 95, 99]).tolist()))
             for stage in stages}
    return table, (pictures[0].height, pictures[0].width)
