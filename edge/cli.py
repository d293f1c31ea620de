"""Run an exported model on images: masks, overlays and results out."""
import json
import os
import sys
from typing import NamedTuple

from edge import backends, contract, run, trial
from edge.command import banner, guarded, parse, say
from edge.errors import UsageError
from edge.pipeline import Segmenter
from edge.sinks import Sinks
from edge.sources import open_source


class EdgeConfig(NamedTuple):
    engine: str = ""
    input: str = ""
    output: str = "runs/edge"
    overlay: bool = True
    backend: str = "auto"
    resize: str = "model"
    still: float = -1.0
    frames: int = 0
    threads: int = 0
    benchmark: bool = False
    warm_up: int = 5
    runs: int = 30
    json: bool = False
    debug: bool = False


HELPS = {
    "engine": "the model: the file that `python -m export` wrote, its contract beside it",
    "input": "an image, a folder, a glob in quotes, or synthetic://WIDTHxHEIGHT",
    "output": "a folder for masks, overlays and results.jsonl; or FILE.png, FILE.jsonl, or - for JSON lines on stdout",
    "overlay": "also write the mask painted over the image; deform: and where the samples were taken",
    "backend": "who computes the net; auto: by the model file's suffix",
    "resize": "model: frames are brought to the size the net was trained at; none: taken as they are",
    "still": "deform: keep the samples' places while a frame differs by at most this much of 255, on average over the small image; "
             "0: while it is exactly the same; -1: never",
    "frames": "stop after this many frames; 0: all of them, 10 of a synthetic source",
    "threads": "CPU threads; 0: all cores",
    "benchmark": "time the path from decoded frame to mask, per stage, and write nothing",
    "warm_up": "benchmark: frames that are not counted",
    "runs": "benchmark: frames that are counted",
    "json": "print one JSON object on stdout at the end",
    "debug": "show the traceback of an error",
}
CHOICES = {"backend": ["auto"] + sorted(backends.NAMES), "resize": ["model", "none"]}


def check(config):
    for name in ("engine", "input"):
        if not getattr(config, name):
            raise UsageError("--%s is missing. Type: edge-run --engine model.onnx --input frame.png" % name)
    for name, least in (("frames", 0), ("threads", 0), ("warm_up", 0), ("runs", 1)):
        if getattr(config, name) < least:
            raise UsageError("--%s is %d, expected %d or more" % (name.replace("_", "-"), getattr(config, name), least))
    if config.json and config.output == "-":
        raise UsageError("--json and --output - both write to stdout; give one of them")


@guarded
def main(argv):
    config = parse(EdgeConfig, argv, "edge-run", __doc__, HELPS, CHOICES)
    check(config)
    made, files = contract.load(config.engine)
    if config.still >= 0 and made["pipeline"] != "deform":
        raise UsageError("--still %s: %s is of the pipeline %s, which does not move samples; expected one of deform. Leave --still out"
                         % (config.still, config.engine, made["pipeline"]))
    backend = backends.choose(config.backend, config.engine)
    banner("edge-run", backend.DEVICE, backend.describe())
    trial.demand(config.engine, backend.NAME, made)
    limit = config.frames or (10 if config.input.startswith("synthetic://") else 0)
    source = open_source(config.input, limit)
    with Segmenter(made, files, backend, config.threads, config.resize, config.still) as pipeline:
        if config.benchmark:
            return _benchmark(config, source, pipeline)
        sinks = Sinks(config.output, pipeline.palette, config.overlay)
        try:
            done, failed = run.run(source, pipeline, sinks)
        finally:
            sinks.close()
    say("%d frame%s done, %d failed%s" % (done, "" if done == 1 else "s", len(failed),
                                          "" if config.output == "-" else ", results in %s" % config.output))
    if config.json:
        print(json.dumps({"frames": done, "failed": failed, "output": config.output}))
    return 5 if failed else 0


def _benchmark(config, source, pipeline):
    table, (height, width) = run.benchmark(source, pipeline, config.warm_up, config.runs)
    if config.json:
        print(json.dumps({"engine": os.path.basename(config.engine), "height": height, "width": width,
                          "runs": config.runs, "warm_up": config.warm_up, "ms": table}))
        return 0
    print("%dx%d, %d frames after %d warm-up, ms" % (width, height, config.runs, config.warm_up))
    print("%-8s %9s %9s %9s %9s" % ("stage", "p50", "p95", "p99", "share"))
    for stage, row in table.items():
        print("%-8s %9.2f %9.2f %9.2f %7.0f %%" % (stage, row["p50"], row["p95"], row["p99"], 100 * row["p50"] / table["total"]["p50"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
