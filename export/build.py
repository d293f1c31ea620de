"""ONNX -> TensorRT engines on the board: one child per stage and attempt, ever less memory, parity, contract."""
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

from edge import contract, pipeline, trial
from edge.command import cache_home, say
from edge.errors import BadFile, EngineMismatch, MissingPart, OverBudget, UsageError
from edge.optional import need
from export import parity
from jetson.memory import field_mib, read_text

WORKSPACES_MIB = (512, 128, 32, 8)  # tried in this order when the kernel kills the builder; 1 GB is too much for a Nano
WHOLE = ("deform",)  # stages kept in float32: their output says where samples lie
PACE_S = 5  # between two lines about a build in the same phase


def build(model, out, config):
    """Write the engines of the ONNX model `model` as `out` (further stages beside it) and their contract, all or none.
    config: an ExportConfig. Returns the report. Raises OverBudget, BadFile, ParityError."""
    made, files = contract.load(model)
    facts = _child({})
    if facts is None:
        raise OverBudget("the builder was killed while it looked at the device, for want of memory. Close other programs, or add swap "
                         "(sudo python3 -m jetson setup --apply)")
    _demand_nodes(config.float32.split(), files)
    stem = os.path.splitext(os.path.basename(out))[0]
    with contract.publishing(out) as (scratch, publish):
        plans, stages = {}, []
        for stage in made["stages"]:
            name = "%s.plan" % (stem if not stages else "%s.%s" % (stem, stage["name"]))
            source, half = files[stage["name"]], config.fp16 and stage["name"] not in WHOLE
            if half and not facts["half_flag"]:
                from export.halve import halve
                source = os.path.join(scratch, stage["file"])
                halve(files[stage["name"]], source, config.float32.split())
            plans[stage["name"]] = os.path.join(scratch, name)
            _stage(stage, source, plans[stage["name"]], facts, config._replace(fp16=half))
            stages.append(dict(stage, file=name, sha256=contract.sha256(plans[stage["name"]])))
        engine = {key: facts[key] for key in ("tensorrt", "device", "compute_capability")}
        engine.update(precision="float16" if config.fp16 else "float32", source={s["name"]: s["sha256"] for s in made["stages"]})
        plan = dict(made, stages=stages, engine=engine)
        if "proof" in made:
            tolerance = max(made["proof"]["tolerance"], parity.ENGINE[engine["precision"]][0] / parity.ORDINARY_SCORE)
            plan["proof"] = dict(made["proof"], tolerance=tolerance)
        plan["parity"] = _parity((made, files), (plan, plans), config, out)
        publish(plan)
    trial.passed("trt", plan)
    return {"out": out, "engine": engine, "parity": plan["parity"]}


def _demand_nodes(names, files):
    """Raise UsageError for names that no node of the graphs `files` has; without the onnx package nobody can tell."""
    try:
        onnx = need("onnx") if names else None
    except MissingPart as exc:
        say("warning: whether there are nodes called %s cannot be told: %s" % (", ".join(names), exc))
        return
    known = [node.name or node.output[0] for path in files.values() for node in onnx.load(path).graph.node] if names else []
    for name in (name for name in names if name not in known):
        near = difflib.get_close_matches(name, known, 1)
        raise UsageError("--float32: no node is called %s%s" % (name, "; did you mean %s?" % near[0] if near else ""))


def _parity(exported, built, config, out):
    """Compare the engines with the ONNX files they were built from, on the same frames. Raises ParityError."""
    from edge.backends import ort, trt
    made, files = exported
    frames = parity.chosen(config.frames, [])
    kind = pipeline.of(made)
    with kind(made, files, ort) as first, kind(built[0], built[1], trt) as second:
        report, calls = parity.compare(first, second, frames)
    precision = built[0]["engine"]["precision"]
    # which layer is to blame costs two more runs of every net: asked only when there is one
    nodes = _spoiled(files, calls, config) if precision == "float16" and not parity.passes(report, *parity.ENGINE[precision]) else []
    allowed, share = parity.demand_engine(report, precision, out, nodes)
    say("parity with the ONNX files on %s: scores differ by at most %.2g (allowed %.2g), class of %.4f %% of the pixels (allowed "
        "%.2f)" % (", ".join(report["frames"]), report["max_abs_error"], allowed, 100 * report["changed_share"], 100 * share))
    return dict(report, tolerance=allowed, against=ort.describe() + ", by " + trt.describe())


def _spoiled(files, calls, config):
    """Names of the nodes that half precision spoils, first in graph order; [] without the onnx package."""
    try:
        from export.halve import halve, spoiled
        need("onnx")
    except MissingPart:
        return []
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for stage, kept in ((stage, kept) for stage, kept in calls.items() if stage not in WHOLE):
            halved = os.path.join(scratch, "half.onnx")
            halve(files[stage], halved, config.float32.split())
            found += [node for node, _off in spoiled(files[stage], halved, kept[0][0])]
    return found


def _stage(stage, source, plan, facts, config):
    """Build one engine, or take it from the cache."""
    place = "-".join(facts[key].replace(" ", "_").replace("/", "_") for key in ("tensorrt", "device", "compute_capability"))
    shelf = os.path.join(cache_home(), "engines", place)
    whole = hashlib.sha256(" ".join(sorted(config.float32.split())).encode()).hexdigest()[:12]  # names of nodes hold slashes
    kept = os.path.join(shelf, "%s-%s-%d%s.plan" % (
        contract.sha256(source)[:32], "fp16" if config.fp16 else "fp32", config.workspace, "-" + whole if config.float32 else ""))
    if not os.path.isfile(kept) or not config.reuse:
        os.makedirs(shelf, exist_ok=True)
        job = {"onnx": source, "plan": kept, "cache": os.path.join(shelf, "timing.cache"),
               "fp16": config.fp16, "float32": config.float32.split()}
        ladder(stage["name"], job, config.workspace)
    else:
        say("%s: taken from %s; --no-reuse builds it again" % (stage["name"], kept))
    shutil.copyfile(kept, plan)


def ladder(name, job, most_mib):
    """Attempts until one succeeds: less workspace when the kernel kills the child; the libraries cuBLAS and cuDNN, which cost
    hundreds of MB, only when TensorRT finds no way without them."""
    left, lean, workspace = [mib for mib in WORKSPACES_MIB if mib < most_mib], True, most_mib
    while True:
        say("%s: building, workspace %d MiB%s; this takes minutes on a Nano" % (
            name, workspace, "" if lean else ", with cuBLAS and cuDNN"))
        answer = _child(dict(job, workspace_mib=workspace, lean=lean), name)
        if answer is not None and answer["failed"] is None:
            return
        if answer is not None and lean:
            lean = False
            say("%s: TensorRT found no way without cuBLAS and cuDNN (%s)" % (name, answer["failed"]))
        elif answer is not None:
            raise BadFile("TensorRT cannot build %s: %s. What the target takes: python -m export MODEL.onnx --target nano"
                          % (name, answer["failed"]))
        elif left:
            say("%s: the kernel killed the builder for want of memory; again with less workspace" % name)
            workspace = left.pop(0)
        else:
            raise OverBudget("building %s was killed for want of memory even with a workspace of %d MiB. Close other programs, "
                             "add swap (sudo python3 -m jetson setup --apply), or export with a smaller --patch" % (name, workspace))


def _child(job, name=""):
    """The answer of a builder process; None when it was killed. Of one with a name it says what it is at: each phase, and
    every PACE_S seconds."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen([sys.executable, "-m", "export.builder", json.dumps(job)], stdout=output, stderr=errors)
        began, told, phase = time.time(), 0, ""
        try:
            while child.poll() is None:
                time.sleep(0.05)
                last, held = _told(output.fileno()), field_mib(read_text("/proc/%d/status" % child.pid), "VmRSS")
                if name and last and held and (last["phase"] != phase or time.time() - told >= PACE_S):
                    told, phase = time.time(), last["phase"]
                    say("%s: %s%s, %.0f s, builder at %.0f MiB" % (name, phase, last["at"], told - began, held))
        finally:
            if child.poll() is None:  # Ctrl-C: the child has had it too
                child.kill()
                child.wait()
        output.seek(0), errors.seek(0)
        text, words = output.read().decode(errors="replace").strip(), errors.read().decode(errors="replace").strip()
    if child.returncode in (-9, 137):
        return None
    if child.returncode == 2:
        raise UsageError("%s. Engines are built on the board that runs them" % words.replace("error: ", ""))
    if child.returncode in (OverBudget.exit_code, BadFile.exit_code):
        raise (BadFile if child.returncode == BadFile.exit_code else OverBudget)("the builder: %s" % words.replace("error: ", "")[-400:])
    if child.returncode or not text:
        raise EngineMismatch("the builder ended with %s: %s" % (child.returncode, words[-400:] or "no word"))
    return json.loads(text.splitlines()[-1])


def _told(handle):
    """The last whole line about progress in the file that a builder is writing; None before the first."""
    tail = os.pread(handle, 4000, max(0, os.fstat(handle).st_size - 4000))  # seek() would move where the child writes
    found = re.findall(br'^\{"phase": .*\}$', tail, re.M)
    return json.loads(found[-1].decode()) if found else None
