"""An ONNX model in half precision whose inputs and outputs stay float32: what TensorRT 11 wants in place of its old FP16 flag,
and what tells beforehand which layer half precision would spoil."""
import numpy as np

from edge.errors import BadFile
from edge.optional import need

FLOAT_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}  # inputs that stay float32 whatever the rest is
SPOILED = 0.05  # a layer whose output is off by more than this share of its largest value


def halve(source, target, keep=()):
    """Write the model `source` in half precision as `target`. keep: names of nodes that stay float32. Raises BadFile for
    a weight that half precision cannot hold."""
    onnx, _, _, _ = map(need, ("onnx", "onnx.numpy_helper", "onnx.shape_inference", "onnx.checker"))
    model = onnx.load(source)
    graph, half, single = model.graph, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights.update({node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in graph.node
                    if node.op_type == "Constant" and node.attribute[0].name == "value"})
    floats = _float_tensors(onnx, model, single) | {name for name, array in weights.items() if array.dtype == np.float32}
    nodes, used = [], {}

    def cast(name, to, new):
        nodes.append(onnx.helper.make_node("Cast", [name], [new], name="cast%d:%s" % (len(nodes), new), to=to))
        return new

    def as_input(name, is_half):
        """The name under which a node reads a tensor: a weight in the type it wants, anything else cast back if need be."""
        if name in weights:
            wanted = weights[name].astype(np.float16) if is_half and name in floats else weights[name]
            if not np.isfinite(wanted).all() and np.isfinite(weights[name]).all():
                raise BadFile("%s: the weight %s is too large for half precision; add the node that uses it to --float32"
                              % (source, name))
            used[name + (":half" if wanted.dtype == np.float16 else "")] = wanted
            return name + (":half" if wanted.dtype == np.float16 else "")
        return name if is_half or name not in floats else cast(name, single, "%s:single%d" % (name, len(nodes)))

    renamed = {}
    for value in graph.input:
        if value.name in floats:
            renamed[value.name] = cast(value.name, half, value.name + ":half")
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in weights:
            continue
        kept, stay = node.name in keep, FLOAT_INPUTS.get(node.op_type, ())
        inputs = [renamed.get(name, name) for name in node.input]
        floats.update(renamed.values())
        node.input[:] = [as_input(name, not (kept or index in stay)) if name else "" for index, name in enumerate(inputs)]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == single and not kept:
                attribute.i = half
        outputs = list(node.output)
        if kept:
            node.output[:] = [name + ":kept" if name in floats else name for name in outputs]
        nodes.append(node)
        for name in outputs if kept else ():
            if name in floats:
                cast(name + ":kept", half, name)
    for value in graph.output:
        if value.name in floats:
            for node in nodes:
                node.output[:] = [name + ":half" if name == value.name else name for name in node.output]
                node.input[:] = [name + ":half" if name == value.name else name for name in node.input]
            cast(value.name + ":half", single, value.name)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in sorted(used.items()))
    onnx.checker.check_model(model)
    onnx.save(model, target)


def _float_tensors(onnx, model, single):
    """Names of the float32 tensors that are computed or come in."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name for value in list(graph.value_info) + list(graph.input) + list(graph.output)
            if value.type.tensor_type.elem_type == single}


def spoiled(source, halved, inputs):
    """The nodes of `source` that half precision spoils, worst of its kind first in graph order: list of (node name, share of
    its largest value by which its output is off). inputs: {name: array}; halved: what halve() made of source."""
    outputs = _computed(source)
    exact, rough = (_all_outputs(path, outputs, inputs) for path in (source, halved))
    found = []
    for name, node in outputs.items():
        largest = float(np.abs(exact[name]).max()) or 1.0
        off = np.abs(exact[name] - rough[name].astype(np.float32)).max() / largest
        if not off <= SPOILED:
            found.append((node, float(off)))
    return found


def _computed(path):
    graph = need("onnx").load(path).graph
    return {name: node.name or node.output[0] for node in graph.node if node.op_type != "Constant" for name in node.output}


def _all_outputs(path, names, inputs):
    """{name: array} of the intermediate tensors `names` that a model computes as floats."""
    onnx, ort = need("onnx"), need("onnxruntime")
    model = onnx.load(path)
    present = {name for node in model.graph.node for name in node.output}
    known = {value.name for value in model.graph.output}
    wanted = {name: name if name in known or name not in present else name for name in names}
    for name in wanted.values():
        if name not in known:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(wanted, session.run(list(wanted.values()), inputs)))
