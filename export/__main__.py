"""Export a checkpoint to ONNX with its contract, and check that the files give the trained net's answers."""
import functools
import json
import os
import shlex
import sys
from typing import NamedTuple

from edge import contract, images, proof, trial
from edge.command import banner, ends_cleanly, guarded, parse, say
from edge.errors import BadFile, UsageError
from edge.optional import need
from export import targets


class ExportConfig(NamedTuple):
    source: str = ""
    out: str = ""
    tile_batch: int = 1
    target: str = "nano"
    check: bool = False
    tolerance: float = 1e-4
    frames: str = ""
    fp16: bool = False
    float32: str = ""
    workspace: int = 512
    reuse: bool = True
    json: bool = False
    debug: bool = False


HELPS = {
    "source": "a run folder (runs/train/last) or one of its checkpoints",
    "out": "the file to write, ending in .onnx; further stages and the contract go beside it. None given: SOURCE/model.onnx",
    "tile_batch": "tiles that go through the net together",
    "target": "board or TensorRT release that the files are for: nothing is written that it cannot build (exit code 5)",
    "check": "only say whether --target takes the ONNX file SOURCE",
    "tolerance": "largest difference of a score from the trained net's, of scores up to 10; larger ones may differ in "
                 "proportion. Beyond it nothing is written (exit code 4)",
    "fp16": "engines: compute in half precision (inputs and outputs stay float32)",
    "float32": "engines: names of nodes that stay float32 with --fp16, in quotes",
    "workspace": "engines: MiB of scratch memory that the builder may try tactics with, at most",
    "reuse": "engines: take one built before on this board from the same file",
    "frames": "image, folder or glob, of which the first two images are compared on; none given: the run's validation images, of engines a test picture",
    "json": "print one JSON object on stdout at the end",
    "debug": "show the traceback of an error",
}


OF_SOURCES = {"fp16": ".onnx", "float32": ".onnx", "workspace": ".onnx", "reuse": ".onnx",
              "tile_batch": "checkpoint", "tolerance": "checkpoint", "target": "checkpoint"}  # flags that only these take


@guarded
def main(argv):
    config = parse(ExportConfig, argv, "python -m export", __doc__, HELPS, positional="source")
    if not config.source:
        raise UsageError("what shall be exported? Type: python -m export runs/train/last --out model.onnx")
    if config.tile_batch < 1 or not 0 < config.tolerance < float("inf") or config.workspace < 1:
        raise UsageError("--tile-batch and --workspace must be 1 or more and --tolerance a number above 0")
    targets.target(config.target)
    if config.check and not config.source.endswith(".onnx"):
        raise UsageError("--check looks at an .onnx file; %s is exported and checked in one: leave --check out" % config.source)
    with ends_cleanly():
        if config.check:
            return _check(config)
        _demand_flags(config)
        return _build(config) if config.source.endswith(".onnx") else _write(config)


def _write(config):
    """Checkpoint -> ONNX."""
    torch, _onnx, _ort = need("torch"), need("onnx"), need("onnxruntime")
    from train_lite import checkpoint
    path = checkpoint.find(config.source)
    out = config.out or os.path.join(os.path.dirname(path), "model.onnx")
    if not out.endswith(".onnx"):
        raise UsageError("--out %s: expected a name ending in .onnx" % out)
    from edge.backends import ort
    banner("export", "cpu", "torch %s, %s" % (torch.__version__, ort.describe()))
    return _finish(config, out, export(path, out, config, ort))


def _demand_flags(config):
    """Raise UsageError for a flag that would do nothing."""
    kind = ".onnx" if config.source.endswith(".onnx") else "checkpoint"
    for name, takes in OF_SOURCES.items():
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        if takes != kind and value != ExportConfig._field_defaults[name]:
            raise UsageError("%s is a flag for %s; %s is %s. Leave it out" % (
                "--no-reuse" if name == "reuse" else flag if value is True else "%s %s" % (flag, value),
                "building engines from an .onnx file" if takes == ".onnx" else "exporting a checkpoint", config.source,
                "exported already" if kind == ".onnx" else "to be exported first, as FILE.onnx"))
    if config.float32 and not config.fp16:
        raise UsageError("--float32 %s without --fp16: everything stays float32 then. Add --fp16, or leave it out" % config.float32)


def _finish(config, out, report):
    say("next: edge-run --engine %s --input frame.png" % shlex.quote(out))
    if config.json:
        print(json.dumps(report))
    return 0


def _check(config):
    """Will the target take a graph, ours or anybody's?"""
    banner("export", "cpu", "onnx " + need("onnx").__version__)
    found = targets.findings(config.source, config.target)
    for finding in found:
        say("%s: %s. Cure: %s" % finding)
    say("%s: %d finding%s for %s (%s)" % (config.source, len(found), "" if len(found) == 1 else "s", config.target,
                                          targets.target(config.target).about))
    if config.json:
        print(json.dumps({"target": config.target, "findings": [finding._asdict() for finding in found]}))
    return BadFile.exit_code if found else 0


def _build(config):
    """ONNX -> engine, on the board."""
    from edge.backends import ort
    from export import build
    out = config.out or os.path.splitext(config.source)[0] + ".plan"
    if not out.endswith(".plan"):
        raise UsageError("--out %s: expected a name ending in .plan; %s is exported already" % (out, config.source))
    banner("export", "TensorRT", ort.describe())
    return _finish(config, out, build.build(config.source, out, config))


def export(path, out, config, backend):
    """Write the files of checkpoint `path` as `out`, all of them or none. Returns the report."""
    from edge import pipeline as pipelines
    from export import parity, to_onnx
    from train_lite import evaluate, state
    from train_lite.config import mode_settings
    net, trained, classes, tile, meta = state.restore(path)
    settings = mode_settings(trained)
    recipe = evaluate.recipe(settings, tile, config.tile_batch)
    pipeline = to_onnx.pipeline_of(trained, settings.fusion)
    frames = parity.chosen(config.frames, [] if config.frames else _validation(trained, classes))
    with contract.publishing(out) as (scratch, publish):
        made, files = to_onnx.write(scratch, os.path.splitext(os.path.basename(out))[0], to_onnx.folded(net), trained,
                                    classes, recipe, pipeline)
        for file in files.values():
            targets.demand(file, config.target)
        kind = pipelines.of(made)
        with kind(made, files, backend) as segmenter, kind(made, files, parity.TorchBackend(net)) as reference:
            # not what the contract says of them, but what they were trained with
            reference.recipe, reference.classes = recipe, list(classes.names)
            reference.palette = [tuple(colour) for colour in classes.palette]
            measured, _calls = parity.compare(reference, segmenter, frames)
            made["proof"] = proof.make(reference, config.tolerance)  # a share: ten times the gate's, for other machines
        say("%s pipeline: %s" % (pipeline, ", ".join("%s %.1f MB" % (os.path.basename(f), os.path.getsize(f) / 1e6)
                                                     for f in files.values())))
        operators = sorted(set(sum((to_onnx.operators(f) for f in files.values()), [])))
        say("operators, all of them known to %s: %s" % (config.target, " ".join(operators)))
        allowed = parity.demand(measured, config.tolerance, out)
        say("parity with torch on %s: scores differ by at most %.2g (allowed %.2g), class of %.4f %% of the pixels" % (
            ", ".join(measured["frames"]), measured["max_abs_error"], allowed, 100 * measured["changed_share"]))
        for index, before in measured.get("task_iou", ({},))[0].items():
            say("  IoU of %s against the labels: %.4f, exported %.4f" % (
                classes.names[int(index)], before, measured["task_iou"][1].get(index, 0.0)))
        made["parity"] = dict(measured, tolerance=allowed, against="torch, by " + backend.describe())
        made["target"] = config.target
        made["trained"] = {"checkpoint": os.path.basename(meta["file"]), "sha256": contract.sha256(meta["file"]), "model": trained.model,
                           "width": trained.width, "mode": trained.mode if trained.sampler == "none" else trained.sampler,
                           "frozen_norms": len(meta["frozen"]), "step": meta["step"]}
        publish(made)
    trial.passed("ort", made)
    return {"out": out, "pipeline": pipeline, "operators": operators, "parity": made["parity"]}


def _validation(trained, classes):
    """(name, path, labels) of the run's validation images, as parity.chosen takes them; [] where its data is not here."""
    from train_lite.data import store
    from train_lite.tasks.problem import task
    data = trained.data or os.path.join("runs", "demo-%d" % trained.res)
    try:
        pairs, _classes = task(trained).find(trained, data)
    except (BadFile, UsageError):
        return []

    def labels(pair, box):
        return store.LabelDecoder(pair.mask, classes)(images.open_mask(pair.mask, classes.by_colour).window(*box))
    return [(pair.name, pair.image, functools.partial(labels, pair) if pair.mask else None)
            for pair in [p for p in pairs if p.split == "val"] or pairs]


if __name__ == "__main__":
    sys.exit(main())
