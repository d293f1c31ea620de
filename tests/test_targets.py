"""The check for TensorRT before TensorRT: seeded bad graphs are found, later releases take them, our own nets pass."""
import json
import os

import numpy as np
import pytest

from conftest import command
from edge.errors import BadFile, UsageError
from edge.scores import Recipe
from export import operators, targets
from export.targets import TARGETS, Finding, demand, findings, target

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (only where there is onnx)

F, H, D = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
I, L, B, U = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT8
IMAGE = (1, 4, 8, 8)
NOT_IN_82 = """BitShift Compress ConcatFromSequence ConvInteger Det DynamicQuantizeLinear Hardmax IsInf MatMulInteger
MaxRoiPool MaxUnpool MeanVarianceNormalization Mod Multinomial NegativeLogLikelihoodLoss NonZero OneHot QLinearConv
QLinearMatMul RandomNormal RandomNormalLike RoiAlign SequenceAt SequenceConstruct SequenceEmpty SequenceErase
SequenceInsert SequenceLength Shrink SoftmaxCrossEntropyLoss SplitToSequence StringNormalizer TfIdfVectorizer Unique
Xor GridSample DeformConv Trilu HardSwish LayerNormalization GroupNormalization Gelu Mish CastLike"""


def node(operator, inputs, outputs="y", **attributes):
    return helper.make_node(operator, inputs.split(","), outputs.split(","), name="the_" + operator, **attributes)


def model(nodes, inputs=None, outputs=None, constants=None, opset=13, ir=7, domains=()):
    """A ModelProto. inputs: name -> (type, shape); outputs: name -> type; constants: name -> array."""
    nodes = nodes if isinstance(nodes, list) else [nodes]
    inputs = {"x": (F, IMAGE)} if inputs is None else inputs
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in (outputs or {"y": F}).items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in (("", opset),) + tuple(domains)])
    made.ir_version = ir
    return made


def cast(source, result, kind):
    return helper.make_node("Cast", [source], [result], to=kind)


def floats(*shape):
    return np.zeros(shape, np.float32)


def ints(*values):
    return np.array(values, np.int64)


def branch(shape, name):
    value = helper.make_tensor(name + "_value", F, shape, np.zeros(shape, np.float32).ravel())
    return helper.make_graph([helper.make_node("Constant", [], [name], name="c_" + name, value=value)], name, [],
                             [helper.make_tensor_value_info(name, F, shape)])


def chosen(one, two):
    """An If between two graphs."""
    return model([node("If", "c", then_branch=one, else_branch=two)], {"c": (B, [])})


def resized(**attributes):
    return model(node("Resize", "x,,scales", **attributes), constants={"scales": np.array([1, 1, 2, 2], np.float32)})


def convolved(weights, bias):
    """A convolution; weights and bias are 'constant' or 'computed'."""
    shapes = {"w": (3, 4, 3, 3), "b": (3,)}
    fixed = {n: floats(*shapes[n]) for n, how in (("w", weights), ("b", bias)) if how == "constant"}
    given = {n: (F, shapes[n]) for n in shapes if n not in fixed}
    return model(node("Conv", "x,w,b"), dict({"x": (F, IMAGE)}, **given), constants=fixed)


ROW, MANY = {"x": (F, (1, 5000))}, dict(outputs={"y": F, "i": I})
# name: (model, operator that must be named or place, a word of the rule, first target that takes it or None)
BAD = {
    "grid sample": (model(node("GridSample", "x,g"), {"x": (F, IMAGE), "g": (F, (1, 5, 5, 2))}, opset=16), "GridSample",
                    "GridSample", "trt-8.5"),
    "deform conv": (model(node("DeformConv", "x,w,o"), {"x": (F, IMAGE), "o": (F, (1, 18, 6, 6))}, opset=19, constants={
        "w": floats(4, 4, 3, 3)}), "DeformConv", "DeformConv", "orin-nano-jp6"),
    "one hot": (model(node("OneHot", "x,d,v"), {"x": (I, (4,))}, constants={"d": ints(5), "v": floats(2)}), "OneHot",
                "OneHot", "trt-8.5"),
    "non zero": (model([node("NonZero", "x", "n"), cast("n", "y", I)], outputs={"y": I}),
                 "NonZero", "NonZero", "trt-8.5"),
    "mod": (model(node("Mod", "x,k", fmod=1), constants={"k": floats(1)}), "Mod", "Mod", "trt-8.5"),
    "trilu": (model(node("Trilu", "x"), opset=14), "Trilu", "Trilu", "trt-8.5"),
    "hard swish": (model(node("HardSwish", "x"), opset=14), "HardSwish", "HardSwish", "trt-8.4"),
    "layer norm": (model(node("LayerNormalization", "x,s,b"), constants={"s": floats(8), "b": floats(8)}, opset=17),
                   "LayerNormalization", "LayerNormalization", "trt-8.6"),
    "group norm": (model(node("GroupNormalization", "x,s,b", num_groups=2), opset=18, constants={
        "s": floats(2), "b": floats(2)}), "GroupNormalization", "GroupNormalization", "trt-10.0"),
    "mish": (model(node("Mish", "x"), opset=18), "Mish", "Mish", "orin-nano-jp6"),
    "gelu": (model(node("Gelu", "x"), opset=20), "Gelu", "Gelu", "orin-nano-jp6"),
    "unique": (model(node("Unique", "x")), "Unique", "no TensorRT", None),
    "custom domain": (model(helper.make_node("Warp", ["x"], ["y"], name="the_Warp", domain="acme"), domains=(("acme", 1),)),
                      "Warp", "acme", None),
    "conv bias": (convolved("constant", "computed"), "Conv", "bias", None),
    "shared bias": (model([helper.make_node("Identity", ["k"], ["b"]), node("Conv", "x,w,b")], constants={
        "w": floats(4, 4, 3, 3), "k": floats(4)}), "Conv", "bias", None),
    "conv weights": (convolved("computed", "constant"), "Conv", "weights", "trt-8.5"),
    "conv rank": (model(node("Conv", "x,w"), {"x": (F, (1, 4, 5, 5, 5, 5))}, constants={"w": floats(3, 4, 1, 1, 1, 1)}),
                  "Conv", "spatial", None),
    "conv transpose bias": (model(node("ConvTranspose", "x,w,b"), {"x": (F, IMAGE), "b": (F, (3,))}, constants={
        "w": floats(4, 3, 2, 2)}), "ConvTranspose", "bias", None),
    "resize cubic": (resized(mode="cubic"), "Resize", "cubic", "trt-8.5"),
    "resize crop": (resized(coordinate_transformation_mode="tf_crop_and_resize"), "Resize", "tf_crop_and_resize", None),
    "resize half pixel nn": (resized(coordinate_transformation_mode="tf_half_pixel_for_nn", nearest_mode="floor"), "Resize",
                             "round_prefer_floor", None),
    "resize antialias": (model(node("Resize", "x,,s", mode="linear", antialias=1), constants={"s": np.ones(4, np.float32)},
                               opset=18), "Resize", "antialias", None),
    "resize batch": (model(node("Resize", "x,,s", mode="linear"), constants={"s": np.array([2, 1, 1, 1], np.float32)}),
                     "Resize", "last 3", None),
    "resize computed scales": (model(node("Resize", "x,,s"), {"x": (F, IMAGE), "s": (F, (4,))}), "Resize", "scales",
                               "trt-10.0"),
    "resize integers": (model(node("Resize", "x,,s"), {"x": (I, IMAGE)}, {"y": I}, {"s": np.ones(4, np.float32)}), "Resize",
                        "INT32", None),
    "upsample scales": (model(node("Upsample", "x,s"), {"x": (F, IMAGE), "s": (F, (4,))}, opset=9), "Upsample", "scales",
                        "trt-10.0"),
    "pool indices": (model([node("MaxPool", "x", "y,i", kernel_shape=[2, 2]), cast("i", "j", I)],
                           outputs={"y": F, "j": I}), "MaxPool", "Indices", None),
    "pool dilations": (model(node("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 2])), "MaxPool", "dilations", None),
    "pool rank": (model(node("AveragePool", "x", kernel_shape=[2]), {"x": (F, (1, 4, 8))}), "AveragePool", "spatial", None),
    "topk computed": (model([node("TopK", "x,k", "y,j"), cast("j", "i", I),
                             cast("n", "k", L)], dict(ROW, n=(I, (1,))), **MANY),
                      "TopK", "constant K", "trt-8.6"),
    "topk large": (model([node("TopK", "x,k", "y,j"), cast("j", "i", I)], ROW, constants={
        "k": ints(3841)}, **MANY), "TopK", "3840", None),
    "topk integers": (model([node("TopK", "x,k", "y,j"), cast("j", "i", I)], {"x": (I, (1, 9))},
                            {"y": I, "i": I}, {"k": ints(3)}), "TopK", "INT32", "trt-8.6"),
    "argmax integers": (model([node("ArgMax", "x", "j"), cast("j", "y", I)], {"x": (I, (4, 4))},
                              {"y": I}), "ArgMax", "INT32", "trt-8.6"),
    "where bool": (model(node("Where", "c,x,z"), {n: (B, (4,)) for n in "cxz"}, {"y": B}), "Where", "BOOL", "trt-8.5"),
    "equal bool": (model(node("Equal", "x,z"), {n: (B, (4,)) for n in "xz"}, {"y": B}), "Equal", "BOOL", None),
    "add bool": (model(node("Add", "x,z"), {n: (B, (4,)) for n in "xz"}, {"y": B}), "Add", "BOOL", None),
    "gather bool": (model(node("Gather", "x,i"), {"x": (B, (4,))}, {"y": B}, {"i": ints(1)}), "Gather", "BOOL", "trt-8.5"),
    "pow integers": (model(node("Pow", "x,z"), {"x": (I, (4,)), "z": (I, (4,))}, {"y": I}), "Pow", "INT32", "trt-11.0"),
    "relu integers": (model(node("Relu", "x"), {"x": (I, (4,))}, {"y": I}, opset=14), "Relu", "INT32", "trt-10.0"),
    "matmul integers": (model(node("MatMul", "x,z"), {n: (I, (4, 4)) for n in "xz"}, {"y": I}), "MatMul", "INT32", None),
    "clip bounds": (model(node("Clip", "x,low"), {"x": (H, (4,)), "low": (H, ())}, {"y": H}), "Clip", "FP16", "trt-10.0"),
    "slice axes": (model(node("Slice", "x,s,e,a"), {"x": (F, IMAGE), "a": (I, (1,))}, constants={
        "s": np.array([0], np.int32), "e": np.array([4], np.int32)}), "Slice", "axes", "orin-nano-jp6"),
    "squeeze axes": (model([node("Squeeze", "x,a"), cast("n", "a", L)], {"x": (F, (1, 4)), "n": (I, (1,))}), "Squeeze",
                     "axes", None),
    "unsqueeze axes": (model([node("Unsqueeze", "x,a"), cast("n", "a", L)],
                             {"x": (F, IMAGE), "n": (I, (1,))}), "Unsqueeze", "axes", None),
    "reduce axes": (model([node("ReduceSum", "x,a"), cast("n", "a", L)], {"x": (F, IMAGE), "n": (I, (1,))}),
                    "ReduceSum", "axes", None),
    "cumsum axis": (model(node("CumSum", "x,a"), {"x": (F, IMAGE), "a": (I, ())}), "CumSum", "axis", None),
    "gemm rank": (model(node("Gemm", "x,w"), {"x": (F, (2, 3, 4))}, constants={"w": floats(4, 4)}), "Gemm", "matrices",
                  None),
    "einsum ellipsis": (model(node("Einsum", "x,x", equation="...ij,...jk->...ik")), "Einsum", "ellipsis", "trt-10.0"),
    "einsum diagonal": (model(node("Einsum", "x", equation="abii->abi")), "Einsum", "diagonal", "trt-10.0"),
    "einsum broadcast": (model(node("Einsum", "x,z", equation="ij,jk->ik"), {"x": (F, (2, 1)), "z": (F, (4, 5))}), "Einsum",
                         "broadcast", "trt-10.0"),
    "pad wrap": (model(node("Pad", "x,p", mode="wrap"), constants={"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}, opset=19), "Pad",
                 "wrap", "trt-10.0"),
    "scatter nd reduction": (model(node("ScatterND", "x,i,u", reduction="add"), {"x": (F, (4,)), "u": (F, (1,))}, constants={
        "i": ints(1).reshape(1, 1)}, opset=16), "ScatterND", "reduction", None),
    "scatter reduction": (model(node("ScatterElements", "x,i,u", reduction="add"), {"x": (F, (4,)), "u": (F, (1,))},
                                constants={"i": ints(1)}, opset=16), "ScatterElements", "reduction", "trt-10.0"),
    "nms limits": (model([node("NonMaxSuppression", "x,s,m", "j"), cast("j", "y", I),
                          cast("n", "m", L)],
                         {"x": (F, (1, 9, 4)), "s": (F, (1, 1, 9)), "n": (I, (1,))}, {"y": I}), "NonMaxSuppression",
                   "max_output_boxes_per_class", "trt-8.5"),
    "if shapes": (chosen(branch((2,), "p"), branch((3,), "q")), "If", "shape", "trt-10.0"),
    "in a branch": (chosen(branch((2,), "p"), helper.make_graph([helper.make_node(
        "Det", ["k"], ["q"], name="the_Det")], "b", [], [helper.make_tensor_value_info("q", F, (2,))], [
            numpy_helper.from_array(floats(2, 3, 3), "k")])), "Det", "Det", None),
    "instance norm": (model(node("InstanceNormalization", "x,s,b"), {"x": (F, IMAGE), "s": (F, (4,)), "b": (F, (4,))}),
                      "InstanceNormalization", "scale", "trt-10.0"),
    "range of floats": (model(node("Range", "a,b,c"), {n: (F, ()) for n in "abc"}), "Range", "floats", "trt-8.4"),
    "recurrent": (model(node("GRU", "x,w,r", direction="bidirectional", hidden_size=2, activations=[
        "Sigmoid", "Tanh", "Relu", "Tanh"]), {"x": (F, (5, 1, 3))}, constants={"w": floats(2, 6, 3), "r": floats(2, 6, 2)}),
        "GRU", "activations", None),
    "uint8 input": (model(node("Cast", "x", to=F), {"x": (U, IMAGE)}), "input 'x'", "UINT8", "trt-8.5"),
    "int64 output": (model(node("Cast", "x", to=L), outputs={"y": L}), "output 'y'", "INT64", "trt-10.0"),
    "double input": (model(node("Cast", "x", to=F), {"x": (D, IMAGE)}), "input 'x'", "FP64", None),
    "large integer": (model([node("Mul", "x,k", "z"), cast("z", "y", F)], {"x": (L, (1,))}, constants={
        "k": ints(2 ** 40)}), "initializer 'k'", "INT64", "trt-10.0"),
    "opset": (model(node("Relu", "x"), opset=15), "file", "opset", "trt-8.4"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_seeded_fault_is_found_for_82(name):
    made, place, word, _later = BAD[name]
    for board in ("nano", "trt-8.2"):
        hits = [f for f in findings(made, board) if place in f.node and word in f.rule]
        assert hits, findings(made, board)
        assert all(isinstance(f, Finding) and len(f.cure) > 5 for f in hits)
        assert place not in operators.SINCE or any("the_" + place in f.node for f in hits), "the node's own name"


@pytest.mark.parametrize("name", sorted(n for n in BAD if BAD[n][3]))
def test_a_later_release_takes_it(name):
    made, _place, _word, later = BAD[name]
    assert findings(made, later) == []


@pytest.mark.parametrize("name", sorted(n for n in BAD if not BAD[n][3]))
def test_no_release_takes_it(name):
    made, place, word, _later = BAD[name]
    for board in TARGETS:
        assert [f for f in findings(made, board) if place in f.node and word in f.rule], board


def test_the_earliest_release_is_the_earliest():
    """What a release takes, the releases before it refuse; else the table of first releases is too late."""
    by_age = sorted((name for name in TARGETS if name.startswith("trt")), key=lambda name: TARGETS[name].version)
    for name, (made, _place, _word, later) in BAD.items():
        if later and later.startswith("trt"):
            before = by_age[by_age.index(later) - 1]
            assert findings(made, before), (name, before)
    assert len(BAD) >= 20


@pytest.mark.slow
def test_every_operator_of_82_is_known_and_no_other():
    assert len(operators.FIRST.split()) == 130 == len(set(operators.FIRST.split()))
    for name in operators.FIRST.split():
        assert operators.unknown(name, (8, 2)) is None
        made = model(helper.make_node(name, ["x"], ["y"], name="n"))
        assert not [f for f in findings(made, "trt-8.2") if "TensorRT" in f.rule and "first" in f.rule or "plugin" in f.rule]
    for name in NOT_IN_82.split():
        rule, cure = operators.unknown(name, (8, 2))
        assert name in rule and cure
        made = model(helper.make_node(name, ["x"], ["y"], name="n"))
        assert [f for f in findings(made, "nano") if "n" in f.node and name in f.rule], name


def test_releases_only_add():
    for name, since in operators.SINCE.items():
        assert all((operators.unknown(name, t.version) is None) == (t.version >= since) for t in TARGETS.values())
    assert set(operators.INSTEAD) - set(operators.SINCE) <= set(NOT_IN_82.split())


GOOD = {
    "slice to the end": model(node("Slice", "x,s,e,a"), constants={"s": ints(0), "e": ints(2 ** 63 - 1), "a": ints(2)}),
    "constants by nodes": model([helper.make_node("Constant", [], ["a"], value=helper.make_tensor("a_", L, [1], [2])),
                                 node("Unsqueeze", "x,a")]),
    "constant outside a branch": model([node("If", "c", then_branch=helper.make_graph(
        [helper.make_node("Unsqueeze", ["x", "a"], ["p"])], "t", [], [helper.make_tensor_value_info("p", F, None)]),
        else_branch=helper.make_graph([helper.make_node("Unsqueeze", ["z", "a"], ["q"])], "e", [], [
            helper.make_tensor_value_info("q", F, None)]))],
        {"c": (B, []), "x": (F, (2,)), "z": (F, (2,))}, constants={"a": ints(0)}),
    "mean of squares": model([node("Mul", "x,x", "q"), node("ReduceMean", "q", "m", axes=[2, 3]), node("Sqrt", "m")]),
    "computed sizes": model([node("Shape", "x", "n"), node("Resize", "x,,,n", mode="linear",
                                                           coordinate_transformation_mode="align_corners")]),
    "quantized weights": model([node("DequantizeLinear", "w,s", "v"), node("Conv", "x,v")], constants={
        "w": np.zeros((3, 4, 3, 3), np.int8), "s": np.float32(0.1)}),
    "not in the file's order": model([node("Sqrt", "z"), node("Relu", "x", "z")]),
    "old file, weights among the inputs": model(node("Conv", "x,w"), {"x": (F, IMAGE), "w": (F, (3, 4, 3, 3))}, constants={
        "w": floats(3, 4, 3, 3)}, opset=9, ir=3),
    "loop": model([node("Loop", "m,,x", "y", body=helper.make_graph(
        [helper.make_node("Relu", ["v"], ["w"]), helper.make_node("Identity", ["k"], ["l"])], "body",
        [helper.make_tensor_value_info("i", L, []), helper.make_tensor_value_info("k", B, []),
         helper.make_tensor_value_info("v", F, IMAGE)],
        [helper.make_tensor_value_info("l", B, []), helper.make_tensor_value_info("w", F, IMAGE)]))], constants={
            "m": ints(3)}),
}


@pytest.mark.parametrize("name", sorted(GOOD))
def test_sound_graph_passes_everywhere(name):
    for board in TARGETS:
        assert findings(GOOD[name], board) == []


RECIPE = Recipe("none", 0, 64, 0, 1, 64, (0.5,) * 3, (0.2,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "deeplabv3"])
@pytest.mark.parametrize("norm", ["group", "batch", "frozen"])
def test_our_own_nets_pass_everywhere(tmp_path, name, norm):
    pytest.importorskip("torch")
    from export import to_onnx
    from train_lite import models
    fusions = (("concat", 1), ("add", 3), ("none", 3))
    for fusion, outputs in fusions if name == "unet" else fusions[:1]:  # torch 1.10 takes half a minute for the larger net
        net = models.build(name, 4, norm, outputs, fusion)
        net = to_onnx.folded(net)
        for part, module, inputs, output in to_onnx.stages(net, "tiled" if fusion == "none" else "patch", RECIPE):
            if (part == "head" and norm != "group") or (part == "encoder" and fusion == "add"):
                continue  # a head has no norm, and an encoder does not know the fusion: once is enough
            path = str(tmp_path / ("%s-%s.onnx" % (fusion, part)))
            to_onnx.write_stage(path, module, inputs, output)
            for board in TARGETS if fusion == "concat" else ["nano"]:  # most of the nodes are the same
                assert findings(path, board) == []
            demand(path, "nano")


BROKEN = {
    "circle": (model([node("Relu", "b", "a"), node("Sqrt", "a", "b"), node("Add", "x,a")]), "circle"),
    "lost input": (model(node("Add", "x,nowhere")), "nowhere"),
    "lost output": (model(node("Relu", "x", "z")), "'y'"),
    "made twice": (model([node("Relu", "x"), node("Sqrt", "x")]), "twice"),
    "lost in a branch": (chosen(branch((2,), "p"), helper.make_graph([node("Relu", "gone", "q")], "b", [], [
        helper.make_tensor_value_info("q", F, (2,))])), "gone"),
    "too few inputs": (model(node("Conv", "x")), "inputs"),
    "attribute of the wrong kind": (model(node("Resize", "x,,s", mode=3), constants={"s": floats(4)}), "wrong kind"),
    "onnx 1.11 crashes on it": (model(node("MeanVarianceNormalization", "nowhere")), "nowhere"),
    "attribute missing": (model(node("Concat", "x,x")), "axis"),
    "contradicting types": (model([node("Relu", "x", "z"), node("Not", "z")], outputs={"y": B}), "FP32"),
    "empty": (onnx.ModelProto(), "no nodes"),
    "number that is no type": (model(node("Relu", "x"), {"x": (77, IMAGE)}), "element type 77"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_graph_without_sense_is_a_finding(name):
    made, word = BROKEN[name]
    for board in TARGETS:
        assert [f for f in findings(made, board) if word in f.rule], findings(made, board)


@pytest.mark.slow
def test_hostile_bytes_never_crash_it():
    """Flipped bytes of a real file: read or refused, never another error."""
    whole, rng = bytearray(convolved("constant", "constant").SerializeToString()), np.random.RandomState(0)
    for _ in range(200):
        copy = bytearray(whole)
        for at in rng.randint(0, len(copy), 3):
            copy[at] = rng.randint(0, 256)
        made = onnx.ModelProto()
        try:
            made.ParseFromString(bytes(copy))
        except Exception:  # not a protobuf any more: onnx's own business
            continue
        assert isinstance(findings(made, "nano"), list)


def test_damaged_initializer_is_named():
    made = model(node("Add", "x,k"), constants={"k": floats(4, 1, 1)})
    made.graph.initializer[0].raw_data = b"abc"
    assert [f for f in findings(made, "nano") if "'k'" in f.node]


@pytest.mark.parametrize("place,word", [("weights.bin", "not here"), ("../weights.bin", "outside"),
                                        ("short.bin", "too short"), ("whole.bin", None)])
def test_weights_in_another_file(tmp_path, place, word):
    made = model(node("Conv", "x,w"), constants={"w": floats(3, 4, 3, 3)})
    tensor = made.graph.initializer[0]
    (tmp_path / "short.bin").write_bytes(b"1234")
    (tmp_path / "whole.bin").write_bytes(tensor.raw_data)
    tensor.external_data.add(key="location", value=place)
    tensor.external_data.add(key="length", value=str(len(tensor.raw_data)))
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    path = tmp_path / "net.onnx"
    path.write_bytes(made.SerializeToString())
    found = findings(path, "nano")
    assert [f for f in found if word in f.rule and "'w'" in f.node] if word else found == []
    assert findings(made, "nano"), "without its folder nobody knows where the weights are"


def test_local_functions():
    if not hasattr(helper, "make_function"):
        pytest.skip("this onnx makes no functions")
    made = model(helper.make_node("Twice", ["x"], ["y"], name="the_Twice", domain="own"), domains=(("own", 1),), ir=8)
    made.functions.extend([helper.make_function("own", "Twice", ["a"], ["b"], [helper.make_node("Det", ["a"], ["b"])],
                                                [helper.make_opsetid("", 13)])])
    assert [f for f in findings(made, "nano") if "the_Twice" in f.node]
    found, = findings(made, "trt-10.0")
    assert "Det" in found.node and "Twice" in found.node


def test_nano_wants_fixed_shapes_and_an_old_ir():
    made = model(node("Relu", "x"), {"x": (F, ("batch", 3, 8, 8))})
    assert [f.node for f in findings(made, "nano")] == ["input 'x'"] and not findings(made, "trt-8.2")
    made = model(node("Relu", "x"), ir=10)
    found, = findings(made, "nano")
    assert "IR version 10" in found.rule and not findings(made, "trt-8.2")


def test_demand_names_every_fault(tmp_path):
    made = model([node("Unique", "x", "z"), node("MaxPool", "z", "y,i", kernel_shape=[2, 2])])
    path = str(tmp_path / "bad.onnx")
    with open(path, "wb") as handle:
        handle.write(made.SerializeToString())
    with pytest.raises(BadFile) as caught:
        demand(path, "nano")
    text = str(caught.value)
    for found in findings(path, "nano"):
        assert all(part in text for part in found)
    assert "the_Unique" in text and "the_MaxPool" in text and caught.value.exit_code == 5


def test_file_that_is_no_onnx(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(os.urandom(10) + b"\xff" * 20)
    for path in (bad, tmp_path / "absent.onnx"):
        with pytest.raises(BadFile):
            demand(str(path), "nano")


def test_targets_have_names():
    with pytest.raises(UsageError) as caught:
        target("xavier")
    assert all(name in str(caught.value) for name in TARGETS)
    assert target("nano").version == (8, 2) and target("nano").fp16 and not target("nano").int8
    with pytest.raises(UsageError):
        findings(GOOD["mean of squares"], "nano-8.2")


def test_check_says_what_is_wrong_with_any_graph(tmp_path):
    path = str(tmp_path / "warp.onnx")
    onnx.save(model(node("GridSample", "x,w"), inputs={"x": (F, (1, 3, 8, 8)), "w": (F, (1, 8, 8, 2))}, opset=16), path)
    done = command("export", path, "--check", "--json")
    assert done.returncode == 5 and "GridSample #0" in done.stderr and "Cure:" in done.stderr, done.stderr
    assert len(json.loads(done.stdout)["findings"]) >= 1
    done = command("export", path, "--check", "--target", "orin-nano-jp6")
    assert done.returncode == 0 and "0 findings" in done.stderr, done.stderr


@pytest.mark.parametrize("words, answer", [
    (("a.onnx", "--check", "--target", "nanos"), "known are nano"), (("runs", "--check"), "leave --check out")])
def test_wrong_words_about_targets(words, answer):
    done = command("export", *words)
    assert done.returncode == 2 and answer in done.stderr, done.stderr


def test_a_run_is_not_exported_for_a_board_that_cannot_build_it(trained, tmp_path, monkeypatch, capsys):
    """As if a release knew no convolution: exit code 5, and nothing written."""
    from export import __main__ as export
    monkeypatch.setattr(targets, "findings", lambda path, aim: [targets.Finding("Conv #0", "unknown", "none")])
    assert export.main([str(trained["run"]), "--out", str(tmp_path / "model.onnx")]) == 5
    assert "Conv #0: unknown" in capsys.readouterr().err and os.listdir(str(tmp_path)) == []
