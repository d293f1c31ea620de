"""What TensorRT refuses about a node whose operator it knows. Every function here takes a node and its Scope.

A rule yields (what is refused, what to do). It says nothing where the graph does not tell: no type, no shape, no
constant is no reason to refuse."""
import numpy as np

from export import operators
from export.graphs import attribute, described, dims, element, operand, value

TOPK_LARGEST = 3840
COORDINATES = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")


def check(node, scope):
    """All rules about one node: list of (rule, cure)."""
    found = list(_types(node, scope)) + list(_bytes(node, scope)) + list(_constants(node, scope))
    for names, rule in RULES:
        if node.op_type in names.split():
            found += rule(node, scope)
    return found


def _types(node, scope):
    for names, inputs, refused, lifted, cure in operators.REFUSED_TYPES:
        if node.op_type in names.split() and not operators.lifted(lifted, scope.version):
            for index, name in enumerate(node.input):
                kind = element(scope, name)
                asked = (inputs is None or index in inputs) and not _setting(node, index)
                if asked and kind and kind in refused.split():
                    yield "%s takes no %s (input %r)" % (node.op_type, kind, name), cure


def _bytes(node, scope):
    for name in node.input:
        if element(scope, name) == "UINT8" and node.op_type not in operators.UINT8_READERS:
            yield "%s takes no UINT8 (input %r)" % (node.op_type, name), "cast it to FP32 first"


def _setting(node, index):
    """Inputs that are settings, not operands, and integers by nature."""
    return index > 0 and (node.op_type in ("Resize", "Upsample", "TopK") or node.op_type.startswith("Reduce"))


def _constants(node, scope):
    for names, index, what, lifted, cure in operators.MUST_BE_CONSTANT:
        name = operand(node, index)
        if name and node.op_type in names.split() and not operators.lifted(lifted, scope.version):
            source = scope.producers.get(name)
            quantized = what == "weights" and source is not None and source.op_type == "DequantizeLinear"
            if name not in scope.constants and not quantized:
                yield "%s wants constant %s; %r is computed" % (node.op_type, what, name), cure


def _ranks(least, most, text, inputs=1, cure="reshape around it"):
    """The rule that a node's first `inputs` have from `least` to `most` dimensions."""
    def rule(node, scope):
        for name in node.input[:inputs]:
            shape = dims(scope, name)
            if shape is not None and not least <= len(shape) <= most:
                yield "%s takes %s; %r has %d dimensions" % (node.op_type, text, name, len(shape)), cure
    return rule


def _pool(node, scope):
    if any(step != 1 for step in attribute(node, "dilations", [])):
        yield "%s takes no dilations" % node.op_type, "pool without dilation, or use a strided convolution"
    if node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1]:
        yield "MaxPool gives no Indices", "return_indices=False; go up again with ConvTranspose or Resize"


def _resize(node, scope):
    mode = attribute(node, "mode", "nearest")
    coordinates = attribute(node, "coordinate_transformation_mode", "half_pixel" if scope.opset > 10 else "asymmetric")
    cubic = scope.version >= (8, 5)
    if mode not in ("nearest", "linear") and not (mode == "cubic" and cubic):
        yield "Resize in TensorRT %s has no mode %s" % (operators.words(scope.version), mode), "use linear or nearest"
    if coordinates not in COORDINATES:
        yield "Resize has no coordinates %s" % coordinates, "use half_pixel (align_corners=False); crop with Slice"
    nearest = attribute(node, "nearest_mode", "round_prefer_floor")
    if coordinates == "tf_half_pixel_for_nn" and nearest != "round_prefer_floor":
        yield "Resize takes tf_half_pixel_for_nn with round_prefer_floor only", "use half_pixel or asymmetric"
    if attribute(node, "antialias", 0):
        yield "Resize has no antialias", "antialias=False, or blur with a convolution before"
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        yield "Resize keeps no aspect ratio", "give the size that is meant"
    shape, axes = dims(scope, operand(node, 0)), attribute(node, "axes")
    if axes and (shape is None or list(axes) != list(range(len(shape)))):
        yield "Resize wants a factor for every dimension, not axes %s" % list(axes), "give all the scales; 1 for the others"
        return
    for problem in _scales(node, scope, mode, 2 if scope.opset > 10 else 1, shape):
        yield problem


def _scales(node, scope, mode, index, shape):
    """The scales of a Resize or Upsample: constant, one for each dimension, within the last dimensions."""
    name = operand(node, index)
    scales, sizes = value(scope, name), value(scope, operand(node, 3) if node.op_type == "Resize" else "")
    if name and name not in scope.constants and scope.version < (10, 0):
        yield "%s wants constant scales; %r is computed" % (node.op_type, name), "give scale_factor as a number"
    factors = scales if scales is not None and len(scales) else None
    if factors is None and sizes is not None and shape is not None and len(sizes) == len(shape):
        factors = [1 if old is None else float(new) / max(old, 1) for new, old in zip(sizes, shape)]
    if factors is None:
        return
    if shape is not None and len(factors) != len(shape):
        yield "%s wants one scale for each of %d dimensions, got %d" % (node.op_type, len(shape), len(factors)), \
            "give all the scales; 1 for batch and channels"
    last = {"linear": 3, "cubic": 2}.get(mode, len(factors))
    if any(factor != 1 for factor in factors[:max(len(factors) - last, 0)]):
        yield "%s %s scales the last %d dimensions only" % (node.op_type, mode, last), "bring the image's axes to the end"


def _upsample(node, scope):
    mode = attribute(node, "mode", "nearest")
    if mode not in ("nearest", "linear"):
        yield "Upsample has no mode %s" % mode, "use linear or nearest"
    for problem in _scales(node, scope, mode, 1, dims(scope, operand(node, 0))):
        yield problem


def _pad(node, scope):
    mode, fill = attribute(node, "mode", "constant"), value(scope, operand(node, 2))
    if mode not in ("constant", "reflect", "edge") and not (mode == "wrap" and scope.version >= (10, 0)):
        yield "Pad in TensorRT %s has no mode %s" % (operators.words(scope.version), mode), "use constant, reflect or edge"
    if fill is not None and len(fill) != 1:
        yield "Pad wants one number to pad with, got %d" % len(fill), "pad with a single value"


def _scatter(node, scope):
    reduction = attribute(node, "reduction", "none")
    if reduction != "none" and not (node.op_type == "ScatterElements" and scope.version >= (10, 0)):
        yield "%s in TensorRT %s has no reduction (%s)" % (node.op_type, operators.words(scope.version), reduction), \
            "scatter without it into a fresh tensor, then combine the two"
    data, others = dims(scope, operand(node, 0)), [dims(scope, operand(node, i)) for i in (1, 2)]
    if node.op_type != "ScatterND" and data is not None:
        if any(other is not None and len(other) != len(data) for other in others):
            yield "%s wants data, indices and updates of one rank" % node.op_type, "reshape them to the same rank"
        elif any(a is not None and b is not None and b > a for other in others if other for a, b in zip(data, other)):
            yield "%s wants indices and updates no larger than the data" % node.op_type, "enlarge the data, or split them"


def _topk(node, scope):
    k = value(scope, operand(node, 1)) if scope.opset > 9 else [attribute(node, "k", 1)]
    if k is not None and len(k) != 1:
        yield "TopK wants one K, got %d" % len(k), "give one number"
    elif k is not None and int(k[0]) > TOPK_LARGEST:
        yield "TopK gives at most %d values, not %d" % (TOPK_LARGEST, k[0]), "ask for fewer, or sort outside the engine"


def _einsum(node, scope):
    if scope.version >= (10, 0):
        return
    equation = attribute(node, "equation", "").replace(" ", "")
    left = equation.split("->")[0].split(",")
    cure = "write it with Transpose, Reshape, Mul and MatMul"
    if "." in equation:
        yield "Einsum takes no ellipsis (%s)" % equation, cure
        return
    if equation != equation.lower():
        yield "Einsum takes lower-case letters only (%s)" % equation, "rename the letters"
    if any(len(set(term)) != len(term) for term in equation.replace("->", ",").split(",")):
        yield "Einsum takes no diagonal (%s)" % equation, cure
    sizes = {}
    for term, name in zip(left, node.input):
        for letter, size in zip(term, dims(scope, name) or []):
            sizes.setdefault(letter, set()).update([size] if size is not None else [])
    if any(len(found) > 1 for found in sizes.values()):
        yield "Einsum does not broadcast (%s)" % equation, "expand the operands to the same sizes before"


def _clip(node, scope):
    computed = [name for name in node.input[1:] if name and name not in scope.constants]
    kind = element(scope, operand(node, 0))
    if computed and kind not in ("", "FP32", "INT32", "INT64") and scope.version < (10, 0):
        yield "Clip with a computed bound (%r) takes FP32 or INT32 only, got %s" % (computed[0], kind), \
            "give the bounds as numbers, or use Min and Max"


def _split(node, scope):
    lengths = attribute(node, "split") or value(scope, operand(node, 1))
    if lengths is not None and len(lengths) != len(node.output):
        yield "Split names %d lengths for %d outputs" % (len(lengths), len(node.output)), "give one length for each output"


def _range(node, scope):
    computed = [name for name in node.input if name not in scope.constants]
    if computed and scope.version < (8, 4) and element(scope, operand(node, 0)) in ("FP32", "FP16"):
        yield "Range of floats wants constants; %r is computed" % computed[0], "count in INT32 and cast, or store the row"


def _recurrent(node, scope):
    names = [str(name).lower() for name in attribute(node, "activations", [])]
    if attribute(node, "direction", "forward") == "bidirectional" and names[:len(names) // 2] != names[len(names) // 2:]:
        yield "%s wants the same activations in both directions" % node.op_type, "use one kind, or two separate layers"


def _sequence(node, scope):
    shape = dims(scope, operand(node, 0))
    if scope.version < (8, 6) and shape is not None and None in shape:
        yield "ReverseSequence wants static shapes", "export with fixed sizes"


def _zero_point(node, scope):
    point = value(scope, operand(node, 2))
    if point is not None and np.any(point != 0):
        yield "%s wants zero point 0" % node.op_type, "quantize symmetrically, to INT8"


def _sampled(node, scope):
    shapes = [dims(scope, operand(node, i)) for i in (0, 1)]
    if None not in shapes and len(shapes[0]) != len(shapes[1]):
        yield "GridSample wants image and grid of one rank", "reshape the grid"
    elif shapes[0] is not None and len(shapes[0]) != 4:
        yield "GridSample takes (N, C, H, W) only", "sample slice by slice"


def _constant(node, scope):
    kinds = {found.name for found in node.attribute} & {"sparse_value", "value_string", "value_strings"}
    if kinds:
        yield "Constant takes no %s" % ", ".join(sorted(kinds)), "store a dense tensor of numbers"


def _first_output(node, scope):
    if any(node.output[1:]):
        yield "LayerNormalization gives its first output only", "compute mean and deviation with ReduceMean"


def _branches(node, scope):
    then, other = (attribute(node, name) for name in ("then_branch", "else_branch"))
    if then is None or other is None:
        return
    same = {out.name for out in then.output} & {out.name for out in other.output}
    if same:
        yield "If wants different names for the outputs of its branches, both have %r" % sorted(same)[0], "rename one"
    for one, two in zip(then.output, other.output):
        a, b = described(one)[1], described(two)[1]
        if a is None or b is None:
            continue
        differ = any(None not in pair and pair[0] != pair[1] for pair in zip(a, b))
        if len(a) != len(b) or (differ and scope.version < (10, 0)):
            yield "If wants branches of one shape; %r and %r differ" % (one.name, two.name), \
                "pad them to one shape, or compute both and choose with Where"


RULES = (
    ("Conv ConvTranspose", _ranks(3, 5, "1, 2 or 3 spatial dimensions")),
    ("InstanceNormalization", _ranks(3, 5, "rank 3 to 5")),
    ("MaxPool AveragePool", _ranks(4, 5, "2 or 3 spatial dimensions")),
    ("MaxPool AveragePool LpPool", _pool), ("Resize", _resize), ("Upsample", _upsample), ("Pad", _pad),
    ("Scatter ScatterElements ScatterND", _scatter), ("TopK", _topk), ("Einsum", _einsum),
    ("NonMaxSuppression", _ranks(3, 3, "boxes and scores of rank 3", inputs=2)),
    ("Gemm", _ranks(2, 2, "matrices only", inputs=2, cure="use MatMul, or Flatten before it")),
    ("Clip", _clip), ("Split", _split), ("Range", _range), ("LSTM GRU RNN", _recurrent),
    ("ReverseSequence", _sequence), ("QuantizeLinear DequantizeLinear", _zero_point), ("GridSample", _sampled),
    ("Constant", _constant), ("LayerNormalization", _first_output), ("If", _branches),
)
