"""The first load of a foreign model: what eats memory or time ends the child, at a limit far above that of honest models."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from edge import contract, trial
from edge.errors import BadFile, EdgeError, OverBudget

onnx = pytest.importorskip("onnx")
helper, numpy_helper = pytest.importorskip("onnx.helper"), pytest.importorskip("onnx.numpy_helper")
pytest.importorskip("onnxruntime")
SIDE, HUGE = 32, 30000  # px; HUGE x HUGE float32 are 3.6 GB


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def seen(monkeypatch):
    """What watched() gave, call by call."""
    kept, real = [], trial.watched

    def keep(*args):
        kept.append(real(*args))
        return kept[-1]

    monkeypatch.setattr(trial, "watched", keep)
    return kept


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def whole(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def scalar(name="one"):
    return numpy_helper.from_array(np.ones((1, 1), np.float32), name)


def tensor(name, dims, location=None):
    """One whose data is four bytes, or in a file."""
    made = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=dims)
    if location is None:
        made.raw_data = b"\0\0\0\0"
    else:
        made.data_location = onnx.TensorProto.EXTERNAL
        made.external_data.add(key="location", value=location)
    return made


def forever():
    """A Loop that counts to 10^15."""
    body = helper.make_graph(
        [node("Add", "carried one_", "next"), node("Identity", "going", "still")], "body",
        [helper.make_tensor_value_info("turn", 7, []), helper.make_tensor_value_info("going", 9, []),
         helper.make_tensor_value_info("carried", 1, None)],
        [helper.make_tensor_value_info("still", 9, []), helper.make_tensor_value_info("next", 1, None)],
        [scalar("one_")])
    true = numpy_helper.from_array(np.array(True), "true")
    turns = numpy_helper.from_array(np.array(10 ** 15, np.int64), "turns")
    return [node("Loop", "turns true mean", "huge", body=body)], [turns, true]


# name: (nodes that make 'huge' of 'pixels' (1, 3, SIDE, SIDE) and their mean over the channels 'mean', initialisers)
HOSTILE = {
    "10^12 values said, one there": lambda: ([], [tensor("huge", [10 ** 12])]),
    "sizes whose product is past 2^64": lambda: ([], [tensor("huge", [2 ** 32, 2 ** 32])]),
    "weights in /dev/zero": lambda: ([], [tensor("huge", [HUGE, HUGE], "/dev/zero")]),
    "ConstantOfShape": lambda: ([node("ConstantOfShape", "s", "huge")], [whole("s", HUGE, HUGE)]),
    "Expand": lambda: ([node("Expand", "one s", "huge")], [scalar(), whole("s", HUGE, HUGE)]),
    "Tile": lambda: ([node("Tile", "one s", "huge")], [scalar(), whole("s", HUGE, HUGE)]),
    "a product of constants": lambda: ([node("Expand", "one s", "c"), node("Transpose", "c", "t"),
                                        node("MatMul", "c t", "huge")], [scalar(), whole("s", HUGE, 1)]),
    "Resize": lambda: ([node("Resize", "pixels none none s", "huge", mode="nearest")], [whole("s", 1, 3, HUGE, HUGE)]),
    "Pad": lambda: ([node("Pad", "pixels s", "huge")], [whole("s", 0, 0, HUGE // 2, HUGE // 2, 0, 0, HUGE // 2, HUGE // 2)]),
    "22 doublings": lambda: ([node("Identity", "pixels", "d0")] + [
        node("Concat", "d%d d%d" % (n, n), "d%d" % (n + 1), axis=2) for n in range(22)] + [node("Identity", "d22", "huge")], []),
    "a Loop without end": forever}


def write(folder, nodes, weights, size=SIDE):
    """A model whose contract agrees with it. Returns its path."""
    path = os.path.join(str(folder), "model.onnx")
    for one in nodes:
        for index, name in enumerate(one.input):
            one.input[index] = "" if name == "none" else name
    nodes = [node("ReduceMean", "pixels", "mean", axes=[1])] + nodes + [
        node("ReduceMean", "huge", "one_number", keepdims=0), node("Add", "mean one_number", "scores")]
    shapes = {"pixels": [1, 3, size, size], "scores": [1, 1, size, size]}
    values = [helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    made = helper.make_model(helper.make_graph(nodes, "net", values[:1], values[1:], weights),
                                  opset_imports=[helper.make_opsetid("", 13)])
    made.ir_version = 7
    with open(path, "wb") as handle:
        handle.write(made.SerializeToString())
    sides = [[{"name": name, "dtype": "float32", "shape": shape}] for name, shape in shapes.items()]
    contract.write(contract.path_beside(path), {
        "format": "nanopatch-contract", "schema_version": 1, "task": "segmentation", "pipeline": "tiled",
        "geometry_version": 1, "stages": [{"name": "net", "file": "model.onnx", "sha256": contract.sha256(path),
                                           "inputs": sides[0], "outputs": sides[1]}],
        "image": {"colour": "RGB", "mean": [0.5] * 3, "std": [0.2] * 3, "resize": "none", "resize_px": 1},
        "tile": {"size": size, "overlap": 0, "batch": 1}, "overview": None,
        "classes": [{"name": name, "colour": [0, 0, 0]} for name in "ab"]})
    return path


def sound(folder):
    return write(folder, [node("Identity", "pixels", "huge")], [])


def load(path):
    trial.demand(path, "ort", contract.load(path)[0])


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_a_hostile_graph_is_a_bad_file_before_it_eats_the_machine(kind, tmp_path, monkeypatch, seen):
    path = write(tmp_path, *HOSTILE[kind]())
    most_mib, _most_s = trial.limits(path, "ort", contract.load(path)[0])
    monkeypatch.setattr(trial, "limits", lambda *unused: (most_mib, 3))
    before = os.times()
    with pytest.raises(BadFile) as error:
        load(path)
    after = os.times()
    _code, _words, held, _ended = seen[0]
    assert "Export it again" in str(error.value) and "bug" not in str(error.value), str(error.value)
    assert most_mib < 300 and held < most_mib + 300
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5


def test_a_sound_graph_passes_and_is_not_tried_again(tmp_path, monkeypatch, seen):
    path = sound(tmp_path)
    load(path)
    assert len(seen) == 1 and seen[0][0] == 0
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("tried again"))
    load(path)
    assert len(seen) == 1


def test_a_board_without_memory_is_told_from_a_hostile_file(tmp_path, monkeypatch):
    path = sound(tmp_path)
    monkeypatch.setattr(trial, "watched", lambda *unused: (-signal.SIGKILL, "", 99.0, ""))
    with pytest.raises(OverBudget, match="kernel killed.*swap"):
        load(path)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "LEFT_MIB", 10 ** 9)
    with pytest.raises(OverBudget, match="we killed.*swap"):
        load(path)


def test_a_process_is_ended_by_each_limit():
    def status(code, most_mib=500, most_s=60):
        return trial.watched([sys.executable, "-c", code], most_mib, most_s)

    code, _words, held, ended = status("b = bytes(b'1') * (1 << 30); import time; time.sleep(60)", most_mib=200)
    assert (code, ended) == (-signal.SIGKILL, "memory") and held > 200
    assert status("import time; time.sleep(60)", most_s=0.2)[::3] == (-signal.SIGKILL, "time")
    assert status("import os; os.kill(os.getpid(), 9)")[::3] == (-signal.SIGKILL, "")
    code, words, held, ended = status("import sys; sys.stderr.write('x' * 200000 + 'end'); sys.exit(5)")
    assert (code, ended, words[-3:]) == (5, "", "end")


def test_ctrl_c_ends_the_child(monkeypatch):
    started, real = [], subprocess.Popen

    def popen(*args, **more):
        started.append(real(*args, **more))
        return started[0]

    def interrupt(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(trial.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trial.watched([sys.executable, "-c", "import time; time.sleep(600)"], 500, 600)
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("size", [10 ** 6, 10 ** 12, 10 ** 400])
def test_a_contract_of_any_size_has_limits(size, tmp_path):
    """The contract is as foreign as the file: what it says the tensors are raises the limits, but not beyond all bounds."""
    path = sound(tmp_path)
    made = contract.load(path)[0]
    made["tile"]["size"] = size
    for side, channels in (("inputs", 3), ("outputs", 1)):
        made["stages"][0][side][0]["shape"] = [1, channels, size, size]
    with open(contract.path_beside(path), "w") as handle:
        json.dump(made, handle)
    most_mib, most_s = trial.limits(path, "ort", contract.load(path)[0])
    assert most_mib > 10 ** 6 and most_s <= 3600
    with pytest.raises(EdgeError) as error:
        load(path)
    assert error.value.exit_code in (3, 5) and "bug" not in str(error.value), str(error.value)


def test_an_honest_model_stays_below_a_third(trained, seen):
    path = str(trained["model"])
    most_mib, _most_s = trial.limits(path, "ort", contract.load(path)[0])
    load(path)
    assert seen[0][0] == 0 and 3 * seen[0][2] < most_mib


@pytest.mark.slow
@pytest.mark.parametrize("model, width, tile, batch, outputs, fusion", [
    ("unet", 4, 128, 1, 1, "concat"), ("unet", 4, 512, 1, 1, "none"), ("unet", 16, 256, 4, 1, "concat"),
    ("unet", 16, 256, 1, 254, "add"), ("deeplabv3", 64, 128, 1, 1, "concat"), ("unet", 4, 1024, 1, 1, "concat")])
def test_nets_of_this_package_stay_below_a_third(model, width, tile, batch, outputs, fusion, tmp_path, seen):
    pytest.importorskip("torch")
    from train_lite import models
    from train_lite.config import TrainConfig
    from train_lite.data import dataset
    from edge.scores import Recipe
    from export import to_onnx
    net = models.build(model, width, "group", outputs, fusion)
    names = ["class %d" % index for index in range(max(2, outputs))]
    classes = dataset.Classes(names, [(index, 0, 0) for index in range(len(names))], outputs, False, ())
    recipe = Recipe("none", tile, tile, 16, batch, 0 if fusion == "none" else tile, (0.5,) * 3, (0.2,) * 3)
    made, _files = to_onnx.write(str(tmp_path), "model", to_onnx.folded(net), TrainConfig(global_patch=fusion), classes,
                                 recipe, "tiled" if fusion == "none" else "patch")
    path = str(tmp_path / "model.onnx")
    contract.write(contract.path_beside(path), made)
    most_mib, most_s = trial.limits(path, "ort", made)
    before = os.times()
    load(path)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert 3 * seen[0][2] < most_mib and 10 * spent < most_s, (seen[0], most_mib, spent, most_s)
