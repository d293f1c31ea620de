"""Run an exported model on images: masks, overlays and results out."""
import contextlib
import json
import os
import sys
from typing import NamedTuple

from edge import backends, contract, loop, service, shelf
from edge.command import banner, ends_cleanly, guarded, parse, say
from edge.errors import UsageError
from edge.pressure import MODES
from edge.pressure import check as check_pressure
from edge.sinks import ENDINGS, Sinks, is_film, is_page, kept_apart, lines_beside
from edge.sources import open_source, stills, uri
from jetson import phases


class EdgeConfig(NamedTuple):
    engine: str = ""
    input: str = ""
    output: str = "runs/edge"
    live: str = ""
    overlay: bool = True
    backend: str = "auto"
    resize: str = "model"
    still: float = -1.0
    score: float = -1.0
    input_width: int = 0
    input_height: int = 0
    input_rate: float = 0.0
    input_flip: str = "none"
    input_codec: str = ""
    input_rtsp_latency: int = 200
    policy: str = "auto"
    frame_timeout: float = 0.0
    frozen_after: float = 0.0
    black_after: float = 0.0
    patience: float = 30.0
    pressure: str = "auto"
    least_rate: float = 1.0
    least_scale: float = 0.5
    list_sources: bool = False
    frames: int = 0
    threads: int = 0
    benchmark: bool = False
    warm_up: int = 5
    runs: int = 30
    update: str = ""
    write_service: bool = False
    memory_max: str = ""
    json: bool = False
    debug: bool = False


HELPS = {
    "engine": "the model: the file that `python -m export` wrote, its contract beside it; or a shelf, the folder of --update",
    "input": "an image, a folder, a glob in quotes, a sequence (img_%%04d.png), a video, csi://N, /dev/videoN, rtsp://HOST/PATH, "
             "'gst://PIPELINE' up to raw video, or synthetic://WIDTHxHEIGHT; left out: what NANOPATCH_INPUT in the environment says",
    "output": "a folder for masks, overlays and results.jsonl; or FILE.png, FILE.jsonl, a video of the overlays as FILE.mp4 or "
              "FILE.mkv (with FILE.jsonl), - for JSON lines on stdout, or http://HOST:PORT for the live page alone",
    "live": "http://HOST:PORT of a page that shows the run in a browser, beside --output: http://127.0.0.1:8080 for this machine "
            "alone; http://0.0.0.0:8080 for the network, with a token",
    "overlay": "also write the mask painted over the image; deform: and where the samples were taken. A video without it "
               "shows the mask in its colours",
    "backend": "who computes the net; auto: by the model file's suffix",
    "resize": "model: frames are brought to the size the net was trained at; none: taken as they are",
    "still": "deform: keep the samples' places while a frame differs by at most this much of 255, on average over the small image; "
             "0: while it is exactly the same; -1: never",
    "score": "boxes: the least score of one that is kept, 0 to 1; -1: what the model was exported with, 0.2",
    "input_width": "px that a camera is asked for, or to which video is scaled; 0: as it comes, 1280 of csi://",
    "input_height": "px, as --input-width; 0: as it comes, 720 of csi://",
    "input_rate": "frames per second that a camera is asked for, or at most of other video; 0: as it comes, 30 of csi://",
    "input_flip": "turn the picture; every source comes as its sensor gives it otherwise, csi:// too",
    "input_codec": "what a camera or stream is compressed with; left out: found out",
    "input_rtsp_latency": "ms of an rtsp:// stream that are held back for packets that come late",
    "policy": "newest: a frame that waits gives way to a newer one; every: no frame is dropped; auto: newest of cameras, every of "
              "the rest",
    "frame_timeout": "s without a frame after which GStreamer is started again; 0: 1.5 of cameras, 10 of files",
    "frozen_after": "s of the very same picture after which it is started again; 0: never",
    "black_after": "s of nothing but black after which it is started again; 0: never (a dark room is black too)",
    "patience": "s without a good frame after which a camera counts as lost (exit code 6)",
    "pressure": "auto: do less while the board is short of memory, hot or throttled; off: never",
    "least_rate": "frames per second that the pauses under pressure never go below; 0: no such floor",
    "least_scale": "of a frame's side, which is never made smaller under pressure; 1: never smaller than it is",
    "list_sources": "show the cameras of this machine and stop",
    "frames": "stop after this many frames; 0: all of them, 10 of a synthetic source",
    "threads": "CPU threads; 0: all cores",
    "benchmark": "time the path from decoded frame to mask, per stage, and write nothing",
    "warm_up": "benchmark: frames that are not counted",
    "runs": "benchmark: frames that are counted",
    "update": "put this model on the shelf --engine, which is made when there is none, and stop; an edge-run on it takes the model up",
    "write_service": "print the systemd unit that runs this command, say how it is installed, and stop",
    "memory_max": "memory that the service may hold, such as 3GiB; left out: the machine's but %d MiB" % service.RESERVE_MIB,
    "json": "print one JSON object on stdout at the end",
    "debug": "show the traceback of an error",
}
CHOICES = {"backend": ["auto"] + sorted(backends.NAMES), "resize": ["model", "none"], "policy": list(uri.POLICIES),
           "pressure": list(MODES), "input_flip": list(uri.FLIPS), "input_codec": list(uri.CODECS)}


def check(config):
    for name in ("engine", "input", "output"):
        if not getattr(config, name) and not (name == "input" and config.update):
            raise UsageError("--%s is missing. Type: edge-run --engine model.onnx --input frame.png" % name)
    for name, least in (("frames", 0), ("threads", 0), ("warm_up", 0), ("runs", 1)):
        if getattr(config, name) < least:
            raise UsageError("--%s is %d, expected %d or more" % (name.replace("_", "-"), getattr(config, name), least))
    if not (config.score == -1 or 0 <= config.score <= 1):
        raise UsageError("--score is %g, expected 0 to 1, or -1 for the model's own" % config.score)
    if not (config.still == -1 or config.still >= 0):
        raise UsageError("--still is %g, expected 0 or more, or -1 for never" % config.still)
    if config.update and config.write_service:
        raise UsageError("--update and --write-service are two commands; give one of them")
    if config.memory_max and not config.write_service:
        raise UsageError("--memory-max goes with --write-service")
    if config.json and config.output == "-":
        raise UsageError("--json and --output - both write to stdout; give one of them")
    if config.live and is_page(config.output):
        raise UsageError("--live and --output both name a page; give one of them")
    if config.live and config.benchmark:
        raise UsageError("--benchmark shows no page; leave --live out")


def check_not_input(config):
    """Raise UsageError where a file to be written is one that is read."""
    place, stem = uri.parse(config.input), os.path.splitext(config.output)[0]
    if place.kind not in ("file", "stills"):
        return
    read = stills.find_files(place.where) if place.kind == "stills" else [place.where]
    if os.path.isdir(config.output):  # others are new
        written = [os.path.join(config.output, frame.name + ending) for frame in stills.from_files(read) for ending in ENDINGS]
    else:
        written = [config.output] if is_film(config.output) else [
            config.output] + [stem + ending for ending in ENDINGS[1:]] if config.output.lower().endswith(".png") else []
    inputs = {_identity(path) for path in read}
    lost = [path for path in written if os.path.exists(path) and _identity(path) in inputs]
    if lost:
        raise UsageError("--output %s: %s is the input itself, which would be lost; give another name" % (config.output, lost[0]))
    if os.path.isdir(place.where) and os.path.isdir(config.output) and os.path.samefile(place.where, config.output):
        raise UsageError("--output %s is the folder of the images: its masks would be images of the next run; give another one" % config.output)


def _identity(path):
    """What two names of one file have in common."""
    found = os.stat(path) if os.path.exists(path) else None
    return (found.st_dev, found.st_ino) if found else path


def source_options(config):
    """uri.Options of an EdgeConfig."""
    return uri.Options(config.input_width, config.input_height, config.input_rate, config.input_flip, config.input_rtsp_latency,
                       config.input_codec, config.policy, config.frame_timeout, config.frozen_after, config.black_after,
                       config.patience)


@contextlib.contextmanager
def live_page(config, source, pipeline):
    """A live.Live of the run, or None where none is asked for."""
    address = config.live or is_page(config.output) and config.output
    if not address:
        yield None
        return
    from edge.sinks.live import Live  # a server costs nothing where there is none
    page = Live(address, os.path.basename(config.engine), uri.parse(config.input).shown, pipeline.classes, pipeline.palette,
                getattr(source, "health", None))
    with contextlib.closing(page):
        say("live page: %s" % page.url)
        yield page


@guarded
def main(argv):
    config = parse(EdgeConfig, argv, "edge-run", __doc__, HELPS, CHOICES)
    if config.list_sources:
        return _list_sources(config)
    # a unit is read by everybody: what is secret stays in the environment
    hidden = not config.input or bool(uri.secrets_of(config.input))
    config = config._replace(input=config.input or os.environ.get(service.INPUT_VARIABLE, ""))
    check(config)
    if config.update:
        return _update(config)
    uri.check(source_options(config))
    check_pressure(config.pressure, config.least_rate, config.least_scale)
    if uri.parse(config.input).kind in ("stills", "synthetic"):
        for name in ("input_width", "input_height", "input_flip"):
            if getattr(config, name) != getattr(EdgeConfig(), name):
                raise UsageError("--%s is for cameras and video; pictures are taken as they are. Leave it out" % name.replace("_", "-"))
    model = shelf.model_of(config.engine)
    # a shelf's model may fail: the one before is at hand
    found = contract.load(model) if config.write_service or model == config.engine else None
    backend = backends.choose(config.backend, model)
    check_not_input(config)
    if config.write_service:
        return service.write(config, hidden)
    if service.is_ours() and is_film(config.output):
        config = config._replace(output=kept_apart(config.output))
    banner("edge-run", backend.DEVICE, backend.describe())
    phases.mark("load")
    limit = config.frames or (10 if config.input.startswith("synthetic://") else 0)
    with ends_cleanly(), contextlib.closing(open_source(config.input, limit, source_options(config))) as source, \
            shelf.opened(config.engine, config.backend, config.threads, config.resize, config.still, config.score, found=found) as pipeline:
        if config.benchmark:
            return _benchmark(config, source, pipeline)
        with live_page(config, source, pipeline) as page, service.running("model %s loaded" % pipeline.model), \
                contextlib.closing(Sinks(config.output, pipeline.palette, config.overlay, config.input_rate, page)) as sinks:
            pressure = loop.pressure_on(source, pipeline, config.pressure, config.least_rate, config.least_scale)
            phases.mark("run")
            done, failed, health = loop.run(source, pipeline, sinks, pressure)
    if health:
        health = source.health()  # what was dropped at the end counts too
    film = {"frames": sinks.recorder.frames, "error": sinks.recorder.error} if sinks.recorder else None
    say("%d frame%s done, %d failed%s%s" % (
        done, "" if done == 1 else "s", failed.count, ", %(dropped)d dropped, %(restarts)d restarts" % health if health else "",
        "" if config.output == "-" or is_page(config.output) else ", results in %s" % config.output if not film else
        ", results in %s, %d frames of video in %s" % (lines_beside(config.output), film["frames"], config.output)))
    if config.json:
        said = {"frames": done, "failed": failed.first, "output": config.output, "health": health, "recording": film}
        print(json.dumps({name: value for name, value in said.items() if value is not None}))
    return 5 if failed.count or film and film["error"] else 0


def _update(config):
    backend = backends.choose(config.backend, config.update)
    banner("edge-run", backend.DEVICE, backend.describe())
    state, changed = shelf.update(config.engine, config.update, config.backend)
    say("%s: model %s %s" % (config.engine, state.current, "was there already; nothing is changed" if not changed else
                             "is current" if state.previous is None else
                             "is current; edge-run tries it for %d frames, and goes back to %s if it fails" % (
                                 shelf.PROBATION, state.previous)))
    if config.json:
        print(json.dumps({"model": state.current, "previous": state.previous, "changed": changed}))
    return 0


def _list_sources(config):
    from edge.sources import cameras
    found = cameras.list_cameras()
    text = json.dumps({"cameras": found}) if config.json else cameras.as_text(found)
    coding = sys.stdout.encoding or "ascii"  # a camera may be called what this terminal cannot show
    print(text.encode(coding, "replace").decode(coding))
    return 0


def _benchmark(config, source, pipeline):
    table, (height, width) = loop.benchmark(source, pipeline, config.warm_up, config.runs)
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
