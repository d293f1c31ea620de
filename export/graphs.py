"""What can be known of an ONNX graph without running it: order, constants, types and shapes, what is missing.

Graphs come from strangers: every question has an answer for one that makes no sense."""
import faulthandler
import heapq
import os
from typing import Any, Dict, NamedTuple, Tuple

import numpy as np

from edge.errors import BadFile
from edge.optional import need
from export import operators

STANDARD_DOMAINS = ("", "ai.onnx")
SMALL = 1 << 16  # values; larger constants are weights, and no rule asks what weights are
GRAPH, GRAPHS = 5, 10  # ONNX's numbers of attribute types
INT64 = 7
EXTERNAL = 1
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, OverflowError, MemoryError)


class Scope(NamedTuple):
    """What is known where a node stands."""
    version: Tuple[int, int]    # of TensorRT
    opset: int
    constants: Dict[str, Any]   # name -> array, or None when its value was not read
    types: Dict[str, Any]       # name -> (element number, dims: list of int or None, or None)
    producers: Dict[str, Any]   # name -> node that makes it


def read(path):
    """The ModelProto of a file, external weights left where they are. Raises BadFile when it is none."""
    from google.protobuf.message import DecodeError
    try:
        return need("onnx").load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError) as exc:
        raise BadFile("cannot read %s as ONNX: %s" % (path, exc)) from exc


def attribute(node, name, default=None):
    """The value of an attribute, text as str. `default` when it is absent."""
    for found in node.attribute:
        if found.name == name:
            value = need("onnx.helper").get_attribute_value(found)
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return default


def operand(node, index):
    """Name of an input, '' when it is absent."""
    return node.input[index] if index < len(node.input) else ""


def element(scope, name):
    """'FP32', 'INT64', ... of a tensor, '' when unknown. FP64 counts as FP32, which the parser makes of it."""
    found = operators.ELEMENTS.get(scope.types.get(name, (0, None))[0], ("", None))[0]
    return "FP32" if found == "FP64" else found


def dims(scope, name):
    """Dims of a tensor (None: unknown one), or None when its rank is unknown."""
    return scope.types.get(name, (0, None))[1]


def value(scope, name):
    """A constant as a flat array; None when it is none, or was not read."""
    found = scope.constants.get(name)
    return None if found is None else found.ravel()


def described(info):
    """(element number, dims) of a ValueInfoProto; (0, None) for what is no tensor."""
    if not info.type.HasField("tensor_type"):
        return 0, None
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    sizes = [d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor.shape.dim]
    return tensor.elem_type, sizes


def bodies(node):
    """The graphs inside a node: list of (attribute name, GraphProto)."""
    return [(found.name, graph) for found in node.attribute if found.type in (GRAPH, GRAPHS)
            for graph in ([found.g] if found.type == GRAPH else found.graphs)]


def label(node, index, where=""):
    """How a person finds a node."""
    name = node.name or ("-> %s" % node.output[0] if node.output else "without a name")
    return "%s%s #%d %s" % (where, node.op_type or "node", index, name)


def own_names(graph):
    """Names that a graph holds before its first node."""
    return {info.name for info in graph.input} | {t.name for t in graph.initializer} | {
        t.values.name for t in graph.sparse_initializer}


def reads(node):
    """Names that a node needs from outside: its inputs, and what its inner graphs take from around them."""
    names = set(node.input)
    for _name, graph in bodies(node):
        inner = set().union(*[reads(n) for n in graph.node]) | {out.name for out in graph.output}
        names |= inner - own_names(graph) - {made for n in graph.node for made in n.output}
    return names - {""}


def readers(graph):
    """name -> set of (operator, input index) that read it, inner graphs included."""
    found = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            found.setdefault(name, set()).add((node.op_type, index))
        for _name, body in bodies(node):
            for name, uses in readers(body).items():
                found.setdefault(name, set()).update(uses)
    return found


def order(graph, outside):
    """Node indices so that each comes after what it reads. outside: names known around the graph.

    Returns (indices that can be ordered, problems: list of (index or None, rule, cure)): a name that nothing makes or
    that two nodes make, a circle. The file's own order does not matter, TensorRT's parser sorts too."""
    cure = "the file is damaged, or was edited by hand: export again"
    known, maker, problems = own_names(graph) | set(outside), {}, []
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in maker or name in known - set(outside):
                problems.append((index, "%r is made twice" % name, cure))
            maker[name] = index
    waiting, followers = {}, {}
    for index, node in enumerate(graph.node):
        names = reads(node)
        lost = sorted(name for name in names if name not in known and name not in maker)
        if lost:
            problems.append((index, "nothing makes its input %r" % lost[0], cure))
        waiting[index] = {maker[name] for name in names if name in maker}
        for before in waiting[index]:
            followers.setdefault(before, []).append(index)
    ready, sorted_ones = [index for index in waiting if not waiting[index]], []
    while ready:
        index = heapq.heappop(ready)
        sorted_ones.append(index)
        for after in followers.get(index, ()):
            waiting[after].discard(index)
            if not waiting[after]:
                heapq.heappush(ready, after)
    stuck = sorted(set(waiting) - set(sorted_ones))
    if stuck:
        problems.append((stuck[0], "it waits for its own output: a circle among %d nodes" % len(stuck), cure))
    problems += [(None, "nothing makes the output %r" % out.name, cure) for out in graph.output
                 if out.name not in known and out.name not in maker]
    return sorted_ones, problems


def _count(tensor):
    return np.prod(list(tensor.dims), dtype=float)


def inferred(model, indices):
    """The graph with its nodes in the order `indices`, and types and shapes as far as ONNX can infer them, inner graphs
    included. Weights are left out (they become inputs), so that nothing large is copied.

    Returns (GraphProto, '' or why inference failed)."""
    onnx, graph = need("onnx"), model.graph
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = "graph"
    light.graph.node.extend([graph.node[i] for i in indices])
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    light.graph.value_info.extend(graph.value_info)
    inputs = {info.name for info in graph.input}
    for tensor in graph.initializer:
        if tensor.data_location != EXTERNAL and _count(tensor) <= SMALL:
            light.graph.initializer.extend([tensor])
        elif tensor.name not in inputs:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            light.graph.input.extend([info])
    answer = _in_a_fork(lambda: onnx.shape_inference.infer_shapes(light).SerializeToString())
    if answer[:1] != b"+":
        return light.graph, answer[1:].decode("utf-8", "replace") or "onnx crashed on it"
    light.ParseFromString(answer[1:])
    return light.graph, ""


def _in_a_fork(function):
    """b'+' and the bytes that function() returns, b'-' and the first line of its error, or b'' when the process died:
    onnx 1.11 ends in a segmentation fault on many graphs that make no sense."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # the parent reports it
        try:
            try:
                answer = b"+" + function()
            except Exception as exc:  # its C++ part raises what it likes
                answer = b"-" + (str(exc).strip().splitlines() or [type(exc).__name__])[0].encode()
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)  # nothing of the parent is run or flushed twice
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def types_of(graph):
    """name -> (element number, dims) of everything that the graph declares."""
    found = {t.name: (t.data_type, list(t.dims)) for t in graph.initializer}
    for info in list(graph.input) + list(graph.output) + list(graph.value_info):
        found[info.name] = described(info)
    return found


def constant(node):
    """The TensorProto or array that a Constant node holds, or None."""
    for found in node.attribute:
        if found.name == "value":
            return found.t
        if found.name in ("value_int", "value_ints"):
            return np.array([found.i] if found.name == "value_int" else list(found.ints), np.int64)
        if found.name in ("value_float", "value_floats"):
            return np.array([found.f] if found.name == "value_float" else list(found.floats), np.float32)
    return None


def array(tensor, folder):
    """(value of a constant, '') or (None, why it cannot be had); (None, '') for large ones, which are not read.

    tensor: TensorProto or array; folder: where the model's file lies, None when there is no file."""
    if isinstance(tensor, np.ndarray):
        return tensor, ""
    wanted = _count(tensor) <= SMALL or tensor.data_type == INT64
    try:
        if tensor.data_location == EXTERNAL:
            tensor, problem = _external(tensor, folder, wanted)
            if problem:
                return None, problem
        return (need("onnx.numpy_helper").to_array(tensor) if wanted else None), ""
    except DAMAGED as exc:
        return None, "its values cannot be read: %s" % exc


def _external(tensor, folder, wanted):
    """(the tensor with its values from the file beside the model, when they are wanted; why not)."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    name, start = place.get("location", ""), int(place.get("offset") or 0)
    if not name or os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        return None, "its values lie outside the model's folder: %r" % name
    path = None if folder is None else os.path.join(folder, name)
    if path is None or not os.path.isfile(path):
        return None, "its values lie in %r, which is not here" % name
    length = int(place.get("length") or os.path.getsize(path) - start)
    if start < 0 or length < 0 or start + length > os.path.getsize(path):
        return None, "its values lie in %r, which is too short" % name
    whole = need("onnx").TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
    if wanted:
        with open(path, "rb") as handle:
            handle.seek(start)
            whole.raw_data = handle.read(length)
    return whole, ""


def malformed(node, opset):
    """What ONNX itself would not accept of a node, or ''. Nothing is said of domains that are not ONNX's own."""
    defs = need("onnx.defs")
    if node.domain not in STANDARD_DOMAINS or not defs.has(node.op_type):
        return ""
    try:
        schema = defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:  # newer than the opset: judge it by what it became
        schema = defs.get_schema(node.op_type)
    given = sum(map(bool, node.input))
    needed = [p for p in schema.inputs if str(p.option).endswith("Single")]
    lost = any(not name for name, p in zip(node.input, schema.inputs) if p in needed)
    if lost or not max(schema.min_input, len(needed)) <= len(node.input) <= schema.max_input:
        return "%s wants %d inputs, got %d" % (node.op_type, max(schema.min_input, len(needed)), given)
    if not schema.min_output <= len(node.output) <= schema.max_output:
        return "%s gives %d outputs, got %d names" % (node.op_type, schema.max_output, len(node.output))
    kinds = {found.name: found.type for found in node.attribute}
    if 0 in kinds.values():
        return "%s has an attribute of no kind" % node.op_type
    for name, expected in schema.attributes.items():
        if name not in kinds and expected.required:
            return "%s wants the attribute %r" % (node.op_type, name)
        if name in kinds and kinds[name] != int(getattr(expected.type, "value", expected.type)):
            return "%s has an attribute %r of the wrong kind" % (node.op_type, name)
    return ""
