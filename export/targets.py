"""Will TensorRT on a named board take this ONNX graph? Answered on any machine, from the graph alone."""
import os
from typing import NamedTuple, Tuple

import numpy as np

from edge.errors import UsageError, raise_all
from export import graphs, operators, restrictions

INT64_SINCE = (10, 0)
EXPORT_AGAIN = "the file is damaged, or was edited by hand: export again"


class Target(NamedTuple):
    version: Tuple[int, int]  # of TensorRT
    about: str
    dtypes: str               # element types that an engine takes and gives
    opsets: Tuple[int, int]   # oldest and newest that the release documents
    ir: int = 0               # newest IR version that the board's ONNX Runtime reads; 0: any
    static: bool = False      # demand fixed shapes
    fp16: bool = True         # worth building
    int8: bool = True


NARROW = "FP32 FP16 INT8 INT32 BOOL"
BYTES = NARROW + " UINT8"
WIDE = BYTES + " INT64 BF16"
TARGETS = {
    "nano": Target((8, 2), "Jetson Nano, JetPack 4.6.1 or later", NARROW, (7, 13), ir=8, static=True, int8=False),
    "orin-nano-jp5": Target((8, 5), "Jetson Orin Nano, JetPack 5", BYTES, (7, 17)),
    "orin-nano-jp6": Target((10, 3), "Jetson Orin Nano, JetPack 6.1 or later", WIDE, (9, 20)),
    "jp7": Target((10, 3), "Jetson Orin Nano, JetPack 7: a 10.x, checked as an early one", WIDE, (9, 20)),
    "trt-8.2": Target((8, 2), "TensorRT 8.2", NARROW, (7, 13)),
    "trt-8.4": Target((8, 4), "TensorRT 8.4", NARROW, (7, 17)),
    "trt-8.5": Target((8, 5), "TensorRT 8.5", BYTES, (7, 17)),
    "trt-8.6": Target((8, 6), "TensorRT 8.6", BYTES, (7, 17)),
    "trt-10.0": Target((10, 0), "TensorRT 10.0", WIDE, (9, 20)),
    "trt-10.3": Target((10, 3), "TensorRT 10.3", WIDE, (9, 20)),
    "trt-11.0": Target((11, 0), "TensorRT 11.0: computes in the types of the file, half precision too", WIDE, (9, 24)),
}


class Finding(NamedTuple):
    node: str  # 'Conv #12 /enc/conv1/Conv', or "input 'pixels'"
    rule: str  # what TensorRT refuses
    cure: str  # what to do in the net or the export


def target(name):
    """The Target of a name. Raises UsageError, which lists the names, for an unknown one."""
    if name not in TARGETS:
        raise UsageError("unknown target %r; known are %s" % (name, ", ".join(TARGETS)))
    return TARGETS[name]


def _aim(given):
    return given if isinstance(given, Target) else target(given)


def demand(path, target):
    """Raise BadFile with every finding about an ONNX file; return when there is none. target: a Target or its name."""
    aim = _aim(target)
    raise_all(["%s: %s. Cure: %s" % found for found in findings(path, aim)],
              "%s does not fit %s (TensorRT %s)" % (path, aim.about, operators.words(aim.version)),
              "Change the net or its export, or choose another target: %s" % ", ".join(TARGETS))


def findings(model, target):
    """Everything that stands between a graph and an engine: list of Finding, [] when there is nothing.

    model: an onnx.ModelProto, or the path of a file; target: a Target or its name. Raises BadFile when the file
    cannot be read as ONNX; a graph that makes no sense is no error but a finding."""
    aim, folder = _aim(target), None
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        model, folder = graphs.read(path), os.path.dirname(os.path.abspath(path))
    try:
        return _all(model, folder, aim)
    except UnicodeDecodeError:
        return [Finding("the file", "a name in it is no text", EXPORT_AGAIN)]


def _all(model, folder, aim):
    opset = max([0] + [entry.version for entry in model.opset_import if entry.domain in graphs.STANDARD_DOMAINS])
    found = _header(model, opset, aim)
    indices, problems = graphs.order(model.graph, ())
    found += _ordered(problems, model.graph, "")
    light, failure = graphs.inferred(model, indices)
    if failure:
        found.append(Finding("the graph", "its shapes cannot be inferred: %s" % failure, EXPORT_AGAIN))
    outer = graphs.Scope(aim.version, opset, {}, {}, {})
    local = {(function.domain, function.name) for function in model.functions}
    scope, problems = _enter(outer, light, model.graph, folder, aim, "")
    found += problems + _edges(model.graph, scope, aim)
    found += _walk(light.node, indices, scope, graphs.own_names(model.graph), local, folder, aim, "")
    for function in model.functions:
        for index, node in enumerate(function.node):
            found += _operator(node, graphs.label(node, index, "function %s: " % function.name), local, aim)
    return found


def _header(model, opset, aim):
    oldest, newest = aim.opsets
    version, found = operators.words(aim.version), []
    if not model.graph.node:
        found.append(Finding("the graph", "it has no nodes", "the file is empty, or is no ONNX model: export again"))
    if not opset:
        found.append(Finding("the file", "it names no ONNX opset", EXPORT_AGAIN))
    elif not oldest <= opset <= newest:
        found.append(Finding("the file", "opset %d is outside what TensorRT %s documents, %d to %d; its parser may take "
                             "it, but nobody promises" % (opset, version, oldest, newest),
                             "export with opset_version=%d" % newest))
    if not model.ir_version:
        found.append(Finding("the file", "it names no IR version", EXPORT_AGAIN))
    elif aim.ir and model.ir_version > aim.ir:
        found.append(Finding("the file", "IR version %d; this stack reads up to %d" % (model.ir_version, aim.ir),
                             "set model.ir_version = %d before saving" % aim.ir))
    return found


def _ordered(problems, graph, where):
    return [Finding(where + "the graph" if index is None else graphs.label(graph.node[index], index, where), rule, cure)
            for index, rule, cure in problems]


def _enter(outer, graph, original, folder, aim, where):
    """The Scope inside a graph, and Findings about its constants. original: the graph that still has its weights."""
    constants, types, producers, found = dict(outer.constants), dict(outer.types), dict(outer.producers), []
    types.update(graphs.types_of(graph))
    uses = graphs.readers(original)
    held = [("%sinitializer %r" % (where, t.name), t.name, t) for t in original.initializer]
    for index, node in enumerate(original.node):
        producers.update((name, node) for name in node.output if name)
        tensor = graphs.constant(node) if node.op_type == "Constant" else None
        if tensor is not None and node.output:
            held.append((graphs.label(node, index, where), node.output[0], tensor))
    for text, name, tensor in held:
        constants[name], problem = graphs.array(tensor, folder)
        if problem:
            cure = "keep the file with the weights beside the model" if "lie" in problem else EXPORT_AGAIN
            found.append(Finding(text, problem, cure))
        found += _integers(text, constants[name], uses.get(name, ()), aim)
    found += [_typed("%sinitializer %r" % (where, t.name), t.data_type, aim) for t in original.initializer]
    if original.sparse_initializer:
        found.append(Finding(where + "the graph", "sparse initializers are not read", "store them as dense tensors"))
    return graphs.Scope(outer.version, outer.opset, constants, types, producers), [f for f in found if f]


def _integers(text, values, uses, aim):
    """INT64 becomes INT32 before TensorRT 10, clamped: harmless only for slices that run to the end."""
    harmless = aim.version >= INT64_SINCE or not set(uses) - set(operators.CLAMPED_ALIKE)
    if harmless or values is None or values.dtype != np.int64:
        return []
    worst = [int(v) for v in values.ravel() if abs(int(v)) > 2 ** 31 - 1 and int(v) != -2 ** 31]
    if not worst:
        return []
    return [Finding(text, "INT64 is narrowed to INT32, and %d does not fit" % worst[0],
                    "use numbers below 2147483648, or floats")]


def _typed(text, number, aim):
    """A Finding when TensorRT has no such element type, else None."""
    name, since = operators.ELEMENTS.get(number, ("element type %d" % number, None))
    if number == 0 or operators.lifted(since, aim.version):
        return None
    later = ", first in %s" % operators.words(since) if since else ""
    return Finding(text, "TensorRT %s has no %s%s" % (operators.words(aim.version), name, later),
                   "convert it before the engine, to FP32 or INT32")


def _edges(graph, scope, aim):
    """The types and sizes of what goes in and comes out."""
    found, weights = [], {t.name for t in graph.initializer}
    for kind, infos in (("input", [i for i in graph.input if i.name not in weights]), ("output", graph.output)):
        for info in infos:
            text, (number, shape) = "%s %r" % (kind, info.name), scope.types[info.name]
            name = operators.ELEMENTS.get(number, ("of element type %d" % number, None))[0]
            cure = {"INT64": "cast to INT32 at the edge of the graph"}.get(name, "convert it outside, and use FP32")
            if info.type.WhichOneof("value") not in (None, "tensor_type"):
                found.append(Finding(text, "it is no tensor", "give tensors only"))
            elif number == 0 and kind == "input":
                found.append(Finding(text, "it has no type", EXPORT_AGAIN))
            elif number and name not in aim.dtypes.split():
                change = {"INT64": ", it becomes INT32", "FP64": ", it becomes FP32"}.get(name, "")
                found.append(Finding(text, "an engine of TensorRT %s has no %s %s%s" % (
                    operators.words(aim.version), name, kind, change), cure))
            if aim.static and kind == "input" and (shape is None or not all(shape)):
                found.append(Finding(text, "its size is not fixed: %s" % shape, "export without dynamic_axes"))
    return found


def _operator(node, text, local, aim):
    """Findings when there is no importer for a node's operator."""
    if (node.domain, node.op_type) in local:
        if aim.version >= operators.LOCAL_FUNCTIONS:
            return []
        return [Finding(text, "functions inside the model (%s) are first in TensorRT %s" % (
            node.op_type, operators.words(operators.LOCAL_FUNCTIONS)), "export with export_modules_as_functions=False")]
    if node.domain not in graphs.STANDARD_DOMAINS:
        return [Finding(text, "operator %s of domain %r is not ONNX's; it would be looked up as a plugin" % (
            node.op_type, node.domain), "write it with ONNX's own operators")]
    problem = operators.unknown(node.op_type, aim.version)
    return [Finding(text, *problem)] if problem else []


def _walk(nodes, indices, scope, names, local, folder, aim, where):
    """Findings about nodes and the graphs inside them. indices: their places in the file; names: known around them."""
    found, names = [], set(names) | {name for node in nodes for name in node.output}
    for index, node in zip(indices, nodes):
        text = graphs.label(node, index, where)
        problems = _operator(node, text, local, aim)
        broken = "" if problems else graphs.malformed(node, scope.opset)
        if broken:
            problems = [Finding(text, broken, EXPORT_AGAIN)]
        elif not problems:
            problems = [Finding(text, *pair) for pair in restrictions.check(node, scope)]
        made = [_typed(text, scope.types.get(name, (0, None))[0], aim) for name in node.output if name]
        found += problems + [problem for problem in made[:1] if problem]
        for attribute, body in graphs.bodies(node):
            inside = "%s / %s / " % (text, attribute)
            inner, problems = graphs.order(body, names)
            found += _ordered(problems, body, inside)
            within, problems = _enter(scope, body, body, folder, aim, inside)
            found += problems + _walk([body.node[i] for i in inner], inner, within, names | graphs.own_names(body),
                                      local, folder, aim, inside)
    return found
