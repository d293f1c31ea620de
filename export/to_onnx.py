"""Trained net -> ONNX stages and their contract."""
import contextlib
import copy
import functools
import importlib
import inspect
import os
import warnings

import torch
from torch import nn

from edge import __version__, boxes, contract, glnet, scores
from edge.errors import UsageError
from edge.optional import need
from train_lite.config import GLNETS, task_of
from train_lite.models import FEATURES, norm

OPSET = 13      # the last that TensorRT 8.2 documents
IR_VERSION = 8  # the newest that ONNX Runtime 1.10 reads


class Part(nn.Module):
    """A method of a net as a graph of its own: function(inputs) of `net`."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self._function = net, function

    def forward(self, *inputs):
        return self._function(*inputs)


def pipeline_of(config, fusion):
    """The contract's pipeline for a trained config. Raises UsageError for a sampler that has none."""
    if task_of(config.model) != "segmentation":
        return {"classification": "grid", "detection": "boxes"}[task_of(config.model)]
    if config.sampler == "edge-oracle":
        raise UsageError("a net of --sampler edge-oracle looks where the labels' edges are, which a camera does not know. Train "
                         "one with --sampler deform or edge")
    if config.sampler == "marin":
        raise UsageError("a net of --sampler marin is a baseline to train beside others; the runtime has no warp for its nodes. Train "
                         "one with --sampler deform or edge")
    if config.sampler != "none":
        return "uniform" if config.sampler == "uniform" else "deform"
    if fusion != "none":
        return "glnet" if fusion == "maps" else "patch"
    if config.model in GLNETS and config.mode == "patch":
        return "whole"
    return "whole" if config.mode in ("full", "down") else "tiled"


def stages(net, pipeline, recipe):
    """The graphs of a pipeline: list of (name, module, {input: example tensor}, names of outputs, with blanks between)."""
    if pipeline in contract.WARPED:
        look = [("deform", net.deform, {"image": torch.zeros((1, 3) + recipe.density)}, "logits")]
        return look[:pipeline == "deform"] + [("net", net, {"samples": torch.zeros((1, 3) + recipe.task)}, "scores")]
    tile, batch = recipe.tile, recipe.batch
    pixels = torch.zeros(batch, 3, tile, tile)
    if pipeline == "grid":
        given = {"cells": torch.zeros((1, net.features) + scores.grid(recipe))}
        if recipe.overview:
            given["overview"] = torch.zeros(1, net.features)
        return [("encoder", net.encoder, {"pixels": pixels}, "features"),
                ("head", Part(net, lambda cells, overview=None: net.head(cells, overview)), given, "scores")]
    if pipeline == "boxes":
        window = torch.zeros(1, net.channels, boxes.WINDOW, boxes.WINDOW)
        given = {"cells": window, "inside": window[:, :1]}
        if recipe.overview:
            given["context"] = window.clone()
        return [("encoder", net.encoder, {"pixels": pixels}, "features"),
                ("head", Part(net, lambda cells, inside, context=None: net.head(cells, context, inside)), given, "scores")]
    if pipeline == "glnet":
        return branch_stages(net, pixels, recipe)
    if pipeline != "patch":
        return [("net", net, {"pixels": pixels}, "scores")]
    features, spread = torch.zeros(batch, FEATURES, tile, tile), torch.zeros(batch, tile, tile)
    return [("encoder", net.encoder, {"pixels": pixels}, "features"),
            ("head", Part(net, net.score), {"features": features, "overview": torch.zeros(1, FEATURES, tile, tile),
                                 "rows": spread, "cols": spread}, "scores")]


def branch_stages(net, pixels, recipe):
    """stages() of a models.glnet.GLNet. pixels: example tiles."""
    batch, cells = recipe.batch, recipe.tile // glnet.STRIDES[0]
    with torch.no_grad():
        maps, deep, _rough = net.look(pixels[:1])
    rows = torch.zeros(batch, sum((recipe.tile // stride) ** 2 for stride in glnet.STRIDES))
    given = {"pixels": pixels, "maps": maps, "rows": rows, "cols": rows.clone()}
    found = [("overview", Part(net, net.look), {"pixels": pixels[:1].clone()}, "maps deep rough")]
    if recipe.merges:
        given.update(put_rows=rows.clone(), put_cols=rows.clone(), merged=maps.clone())
        found += [("local", Part(net, net.merge), given, "part sum"),
                  ("whole", Part(net, net.deepen), {"pixels": pixels[:1].clone(), "merged": maps}, "deep")]
    else:
        found.append(("local", Part(net, net.work), given, "part"))
    weights = torch.zeros(batch, cells ** 2)
    part = torch.zeros(batch, net.outputs, cells, cells)
    given = {"part": part, "deep": deep, "rows": weights, "cols": weights.clone()}
    return found + [("fusion", Part(net, net.fuse_large), given, "scores")]


def folded(net):
    """A copy of `net` in eval mode with every norm that can be folded in its convolution."""
    net = copy.deepcopy(net).cpu().eval()
    norm.fold(net)
    return net


@contextlib.contextmanager
def _quick_exporter():
    """Cures of the exporter before torch 1.13, whose time is what each node of a graph costs. It registers all of ONNX's operators anew
    for every node, and hands every symbolic function a map of all nodes before it; two nodes of three are equal constants."""
    try:
        registry, utils = (importlib.import_module("torch.onnx." + name) for name in ("symbolic_registry", "utils"))
        register, split = registry.register_version, utils._split_tensor_list_constants
    except (ImportError, AttributeError):
        registry = None
    if not registry:
        yield
        return

    def split_and_pool(graph, block):
        split(graph, block)
        torch._C._jit_pass_constant_pooling(graph)

    registry.register_version, utils._split_tensor_list_constants = functools.lru_cache(maxsize=None)(register), split_and_pool
    try:
        yield
    finally:
        registry.register_version, utils._split_tensor_list_constants = register, split


def write_stage(path, module, inputs, outputs):
    """Export one graph with static shapes. outputs: their names, with blanks between. Returns {name: shape} of them."""
    onnx = need("onnx")
    extra = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings(), torch.no_grad(), _quick_exporter():
        warnings.simplefilter("ignore")  # the tracer warns of Python numbers; shapes are static on purpose
        found = module(*inputs.values())
        shapes = {name: list(one.shape) for name, one in zip(outputs.split(), found if isinstance(found, tuple) else (found,))}
        torch.onnx.export(module, tuple(inputs.values()), path, opset_version=OPSET, input_names=list(inputs),
                          output_names=list(shapes), do_constant_folding=True, **extra)
    model = onnx.load(path)
    _own_weights(onnx, model.graph)
    model.ir_version = min(model.ir_version, IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return shapes


def _own_weights(onnx, graph):
    """Undo torch's sharing of equal weights: it puts an Identity before the second user of one, and TensorRT refuses a
    convolution whose bias is computed."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Identity"]:
        if node.input[0] in weights:
            copy = graph.initializer.add()
            copy.CopyFrom(weights[node.input[0]])
            copy.name = node.output[0]
            weights[copy.name] = copy
            graph.node.remove(node)


def operators(path):
    """Operator names of an ONNX file, each once, sorted."""
    return sorted({node.op_type for node in need("onnx").load(path).graph.node})


def _tensor(name, shape):
    what = {"pixels": "(x / 255 - mean) / std, RGB", "rows": "0..1, each row sums to 1", "cols": "0..1, each row sums to 1",
            "scores": "logits", "features": "any", "overview": "any", "logits": "any; softmax over the map is the density"}
    what.update({name: "any" for name in ("maps", "deep", "part", "merged", "sum")})
    what.update(rough="logits", put_rows="0..1", put_cols="0..1")
    what.update(image=what["pixels"], samples=what["pixels"], cells="any", context="any", inside="0 or 1")
    return {"name": name, "dtype": "float32", "shape": list(shape), "range": what[name]}


def write(folder, stem, net, config, classes, recipe, pipeline):
    """Write the stages STEM.onnx (and STEM.head.onnx) to `folder`. Returns (contract dict, {stage: path})."""
    described, files = [], {}
    for name, module, inputs, outputs in stages(net, pipeline, recipe):
        file = "%s.onnx" % stem if not described else "%s.%s.onnx" % (stem, name)
        path = files[name] = os.path.join(folder, file)
        shapes = write_stage(path, module, inputs, outputs)
        described.append({"name": name, "file": file, "sha256": contract.sha256(path),
                          "inputs": [_tensor(key, value.shape) for key, value in inputs.items()],
                          "outputs": [_tensor(key, shape) for key, shape in shapes.items()]})
    warped = pipeline in contract.WARPED
    made = {
        "format": "nanopatch-contract", "schema_version": contract.SCHEMA_VERSION, "nanopatch": __version__,
        "task": task_of(config.model), "pipeline": pipeline, "geometry_version": contract.GEOMETRY_VERSION, "stages": described,
        "image": {"colour": "RGB", "mean": list(recipe.mean), "std": list(recipe.std),
                  "resize": "stretch" if pipeline == "grid" else recipe.resize,  # --fit none: all its images have that size
                  "resize_px": recipe.resize_px},
        "tile": None if warped else {"size": recipe.tile, "overlap": recipe.overlap, "batch": recipe.batch},
        "overview": None if warped or not recipe.overview else {"size": recipe.overview, "fusion": "maps" if pipeline == "glnet" else config.global_patch},
        "classes": [{"name": n, "colour": list(c)} for n, c in zip(classes.names, classes.palette)],
    }
    if pipeline == "boxes":
        made["boxes"] = boxes.rules(config.max_boxes)._asdict()
    if pipeline == "glnet":
        made["glnet"] = {"coarse": recipe.coarse}
    if warped:
        made["warp"] = {"task": list(recipe.task), "density": list(recipe.density), "radius": list(recipe.radius)}
    return made, files
