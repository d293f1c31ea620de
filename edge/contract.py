"""The contract: the .json beside a model that says what the model takes, gives and was trained for.

The schema is contract.schema.json. Nothing here trusts a file: sizes, hashes and names are checked before any
runtime sees a byte of the model."""
import contextlib
import hashlib
import json
import os
import tempfile

from edge import boxes, glnet, schema
from edge.command import read_json, written
from edge.errors import BadFile, UsageError
from edge.scores import Recipe, grid
from edge.warp.path import WarpRecipe

SCHEMA_VERSION = 1
GEOMETRY_VERSION = 1  # raised when edge.geometry changes what a coordinate means
FEATURES = 8  # maps between encoder and head
STAGES = {"whole": ["net"], "tiled": ["net"], "patch": ["encoder", "head"], "uniform": ["net"], "deform": ["deform", "net"],
          "grid": ["encoder", "head"], "boxes": ["encoder", "head"], "glnet": ["overview", "local", "whole", "fusion"]}
MISSING = {"glnet": "whole"}  # the stage that a pipeline may lack
TILED = ("tiled", "patch", "boxes", "glnet")  # pipelines that cut a frame into tiles, as many as its size asks for
TASKS = {"grid": "classification", "boxes": "detection"}  # of a pipeline; of all others segmentation
WARPED = ("uniform", "deform")  # pipelines whose net sees samples of the whole image


def path_beside(model):
    """The contract's path for the first stage's file `model`: model.json of model.onnx; an engine built beside it has one of
    its own, model.plan.json."""
    stem, suffix = os.path.splitext(model)
    return (model if suffix == ".plan" else stem) + ".json"


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def identity(contract):
    """The model's name for people and results: 12 hex digits of a hash over its contract, which holds its files' hashes."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()[:12]


def write(path, contract):
    """Check `contract` (dict) against the schema and write it, atomically."""
    wrong = schema.violations(contract, schema.load("contract"))
    assert not wrong, wrong
    with written(path) as handle:
        json.dump(contract, handle, indent=1, sort_keys=True)


@contextlib.contextmanager
def publishing(out):
    """Yields (scratch folder, publish) for making the model file `out`. publish(contract) moves the stages' files out of
    the scratch folder, and the contract last, which makes them valid; without it nothing of them remains."""
    folder = os.path.dirname(os.path.abspath(out))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
        def publish(contract):
            for stage in contract["stages"]:
                os.replace(os.path.join(scratch, stage["file"]), os.path.join(folder, stage["file"]))
            write(path_beside(os.path.join(folder, os.path.basename(out))), contract)

        try:
            yield scratch, publish
        except OSError as exc:  # torch and onnx do not say which file a full disk cut short
            exc.filename = exc.filename or out
            raise


def load(model):
    """Read and check the contract of the model file `model`. Returns (contract, {stage name: path}).

    Raises UsageError when there is no such model, BadFile when the contract is missing, malformed, or disagrees
    with the files beside it."""
    if not os.path.isfile(model):
        raise UsageError("no such model: %s. Make one: python -m export runs/train/last --out model.onnx" % model)
    path = path_beside(model)
    if not os.path.isfile(path):
        raise BadFile("%s has no contract beside it; expected %s. Export the model again, or give --engine the first "
                      "stage's file" % (model, path))
    contract = read_json(path, "the contract")
    wrong = schema.violations(contract, schema.load("contract"))
    if not wrong:
        wrong = _disagreements(contract, model)
    if wrong:
        raise BadFile("%s is not the contract of %s:\n  %s\nExport the model again: python -m export CHECKPOINT --out %s"
                      % (path, model, "\n  ".join(wrong[:10]), model))
    folder = os.path.dirname(model)
    return contract, {stage["name"]: os.path.join(folder, stage["file"]) for stage in contract["stages"]}


def _disagreements(contract, model):
    wrong = []
    names = [stage["name"] for stage in contract["stages"]]
    known = STAGES[contract["pipeline"]]
    if names not in (known, [name for name in known if name != MISSING.get(contract["pipeline"])]):
        wrong.append("stages are %s, a %s pipeline has %s" % (names, contract["pipeline"], known))
    task = TASKS.get(contract["pipeline"], "segmentation")
    if contract["task"] != task:
        wrong.append("a %s pipeline is for another task than %s" % (contract["pipeline"], contract["task"]))
    if ("boxes" in contract) != (task == "detection"):
        wrong.append("a %s pipeline has %s" % (contract["pipeline"], "rules for boxes" if task == "detection" else "no rules for boxes"))
    if len(contract["classes"]) < 2 and task != "detection":
        wrong.append("there is one class")
    if task == "segmentation" and (contract["overview"] is None) == (contract["pipeline"] in ("patch", "glnet")):
        wrong.append("overview is %s in a %s pipeline" % (contract["overview"], contract["pipeline"]))
    if ("glnet" in contract) != (contract["pipeline"] == "glnet"):
        wrong.append("a %s pipeline has %s" % (contract["pipeline"], "a glnet part" if "glnet" in contract else "no glnet part"))
    warped = contract["pipeline"] in WARPED
    if (contract["tile"] is None, "warp" in contract) != (warped, warped):
        return wrong + ["a %s pipeline has %s" % (contract["pipeline"], "a warp and no tile" if warped else "a tile and no warp")]
    if warped and any(reach > nodes for reach, nodes in zip(contract["warp"]["radius"], contract["warp"]["density"])):
        wrong.append("the density's pull, radius %(radius)s, reaches further than its %(density)s px" % contract["warp"])
    if not warped and contract["overview"] and contract["overview"]["size"] != contract["tile"]["size"]:
        wrong.append("the overview has %d px, its encoder takes %d" % (contract["overview"]["size"], contract["tile"]["size"]))
    if contract["pipeline"] == "grid" and (contract["image"]["resize"], contract["tile"]["overlap"]) != ("stretch", 0):
        return wrong + ["a grid pipeline stretches images and shares no pixels between tiles"]
    if task == "detection" and (contract["tile"]["overlap"] or contract["tile"]["size"] % boxes.STRIDES[-1]):
        return wrong + ["tiles of a boxes pipeline share no pixels and are multiples of %d px" % boxes.STRIDES[-1]]
    if contract["pipeline"] == "glnet" and contract["tile"]["size"] % glnet.STRIDES[-1]:
        return wrong + ["tiles of a glnet pipeline are multiples of %d px" % glnet.STRIDES[-1]]
    if not warped and contract["tile"]["overlap"] >= contract["tile"]["size"]:
        wrong.append("tile overlap %(overlap)d is not smaller than the tile, %(size)d" % contract["tile"])
    for stage in contract["stages"]:
        if stage["file"].endswith(".plan") != ("engine" in contract):
            wrong.append("%s %s the contract's 'engine' part" % (stage["file"], "goes with" if "engine" in contract else "lacks"))
    if contract["stages"][0]["file"] != os.path.basename(model):
        wrong.append("its first stage is %s" % contract["stages"][0]["file"])
    if contract["pipeline"] == "glnet" and len(contract["stages"][0]["outputs"]) != 3:
        return wrong + ["its overview gives other tensors than maps, deep and rough"]
    for stage in contract["stages"]:
        for side in ("inputs", "outputs"):
            got = {tensor["name"]: tensor["shape"] for tensor in stage[side]}
            want = _shapes(contract, stage["name"])[side]
            if got != want:
                wrong.append("%s of %s are %s, tile, overview and classes ask for %s" % (side, stage["name"], got, want))
        file = os.path.join(os.path.dirname(model), stage["file"])
        if not os.path.isfile(file):
            wrong.append("%s is missing" % file)
        elif sha256(file) != stage["sha256"]:
            wrong.append("%s has other contents than the contract was written for (sha256)" % file)
    return wrong


def _shapes(contract, stage):
    """What tile, overview, warp and classes say about the tensors of a stage: {side: {name: shape}}."""
    outputs = 1 if len(contract["classes"]) == 2 else len(contract["classes"])
    if contract["pipeline"] in WARPED:
        size = contract["warp"]["density" if stage == "deform" else "task"]
        if stage == "deform":
            return {"inputs": {"image": [1, 3] + size}, "outputs": {"logits": [1, 1] + size}}
        return {"inputs": {"samples": [1, 3] + size}, "outputs": {"scores": [1, outputs] + size}}
    side, batch = contract["tile"]["size"], contract["tile"]["batch"]
    if contract["pipeline"] == "grid":
        features = contract["stages"][0]["outputs"][0]["shape"][-1]
        if stage == "encoder":
            return {"inputs": {"pixels": [batch, 3, side, side]}, "outputs": {"features": [batch, features]}}
        cells = {"cells": [1, features] + list(grid(recipe(contract)))}
        return {"inputs": dict(cells, overview=[1, features]) if contract["overview"] else cells,
                "outputs": {"scores": [1, len(contract["classes"])]}}
    if contract["pipeline"] == "boxes":
        channels = contract["stages"][0]["outputs"][0]["shape"][1]
        if stage == "encoder":
            cells = sum((side // stride) ** 2 for stride in boxes.STRIDES)
            return {"inputs": {"pixels": [batch, 3, side, side]}, "outputs": {"features": [batch, channels, cells]}}
        window = [1, channels, boxes.WINDOW, boxes.WINDOW]
        given = {"cells": window, "inside": [1, 1] + window[2:]}
        return {"inputs": dict(given, context=window) if contract["overview"] else given,
                "outputs": {"scores": [1, len(contract["classes"]) + 5] + window[2:]}}
    pixels, scores = {"pixels": [batch, 3, side, side]}, {"scores": [batch, outputs, side, side]}
    if contract["pipeline"] == "glnet":
        return _branch_shapes(contract, stage, pixels, scores)
    if stage == "net":
        return {"inputs": pixels, "outputs": scores}
    features = {"features": [batch, FEATURES, side, side]}
    if stage == "encoder":
        return {"inputs": pixels, "outputs": features}
    view = contract["overview"]["size"] if contract["overview"] else 0
    return {"inputs": dict(features, overview=[1, FEATURES, view, view], rows=[batch, side, view], cols=[batch, side, view]),
            "outputs": scores}


def _branch_shapes(contract, stage, pixels, scores):
    """_shapes() of a glnet pipeline. pixels, scores: of tiles."""
    maps, deep = [tensor["shape"] for tensor in contract["stages"][0]["outputs"][:2]]
    batch, outputs, side = scores["scores"][:3]
    cells = side // glnet.STRIDES[0]
    matrices = [batch, sum((side // stride) ** 2 for stride in glnet.STRIDES)]
    one = {"pixels": [1, 3, side, side]}
    if stage == "overview":
        return {"inputs": one, "outputs": {"maps": maps, "deep": deep, "rough": [1, outputs, cells, cells]}}
    if stage == "whole":
        return {"inputs": dict(one, merged=maps), "outputs": {"deep": deep}}
    part = {"part": [batch, outputs, cells, cells]}
    if stage == "fusion":
        return {"inputs": dict(part, deep=deep, rows=[batch, cells ** 2], cols=[batch, cells ** 2]), "outputs": scores}
    given = dict(pixels, maps=maps, rows=matrices, cols=matrices)
    if len(contract["stages"]) == 3:
        return {"inputs": given, "outputs": part}
    return {"inputs": dict(given, put_rows=matrices, put_cols=matrices, merged=maps), "outputs": dict(part, sum=maps)}


def recipe(contract):
    """The contract's Recipe, of edge.scores or edge.glnet, or WarpRecipe: how its nets want their pixels."""
    image, tile, overview = contract["image"], contract["tile"], contract["overview"]
    colours = tuple(image["mean"]), tuple(image["std"])
    if contract["pipeline"] in WARPED:
        warp = contract["warp"]
        return WarpRecipe(image["resize"], image["resize_px"], tuple(warp["task"]), tuple(warp["density"]), tuple(warp["radius"]),
                          *colours)
    found = Recipe(image["resize"], image["resize_px"], tile["size"], tile["overlap"], tile["batch"],
                   overview["size"] if overview else 0, *colours)
    if contract["pipeline"] == "glnet":
        merges = "whole" in [stage["name"] for stage in contract["stages"]]
        return glnet.Recipe(*found + (merges, contract["glnet"]["coarse"]))
    return found


def check_tensors(stage, side, found):
    """Compare what a runtime found in a file with the contract. side: 'inputs' or 'outputs'; found: dict
    name -> (dtype name, shape list). Raises BadFile naming the first difference."""
    for tensor in stage[side]:
        got = found.get(tensor["name"])
        want = (tensor["dtype"], list(tensor["shape"]))
        if got != want:
            raise BadFile("%s: %s %r is %s in the model, the contract says %s. Export the model again"
                          % (stage["file"], side[:-1], tensor["name"], got, want))
    extra = set(found) - {tensor["name"] for tensor in stage[side]}
    if extra:
        raise BadFile("%s has %s that its contract does not name: %s. Export the model again"
                      % (stage["file"], side, ", ".join(sorted(extra))))
