"""Mutated files: only documented errors, quickly, and never more memory than the file is worth.

NANOPATCH_FUZZ multiplies the number of files; 50 makes the 100,000 in process and 300 through the child of docs/measured.md."""
import json
import os
import random
import resource
import shutil
import time

import numpy as np
import pytest

from edge import contract, trial
from edge.command import from_json
from edge.errors import EdgeError
from train_lite import checkpoint

TIMES = float(os.environ.get("NANOPATCH_FUZZ", "1"))
ODD = [None, True, -1, 0, 1, 10 ** 9, -0.5, float("inf"), "", "x", "../up", "a" * 10000, [], {}, [[]], {"a": 1}]
LONGEST_S = 2.0
MOST_MIB = 30  # that thousands of small files may add to this process


def mutated(rng, value):
    """A copy of a JSON value with one part replaced, dropped or doubled."""
    value = json.loads(json.dumps(value))
    where, path = value, []
    while isinstance(where, (dict, list)) and len(where) and rng.random() < 0.85:
        key = rng.choice(sorted(where)) if isinstance(where, dict) else rng.randrange(len(where))
        path.append((where, key))
        where = where[key]
    if not path:
        return rng.choice(ODD)
    holder, key = path[-1]
    kind = rng.randrange(3)
    if kind == 0:
        holder[key] = rng.choice(ODD)
    elif kind == 1:
        del holder[key]
    elif isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[str(key) + "_"] = holder[key]
    return value


def flipped(rng, data):
    """A copy of bytes with some of them changed, cut off or put in twice."""
    data, kind = bytearray(data), rng.randrange(3)
    at = rng.randrange(min(len(data), 4000)) if rng.random() < 0.7 else rng.randrange(len(data))
    if kind == 0:
        for offset in range(rng.randrange(1, 9)):
            data[(at + offset) % len(data)] = rng.randrange(256)
    elif kind == 1:
        del data[at:at + rng.choice([1, 8, len(data)])]
    else:
        data[at:at] = data[at:at + rng.randrange(1, 64)]
    return bytes(data)


def survives(function, seen):
    began = time.process_time()
    try:
        function()
        seen["accepted"] = seen.get("accepted", 0) + 1
    except EdgeError as exc:
        assert exc.exit_code in (2, 3, 5, 7) and str(exc)
        seen[exc.exit_code] = seen.get(exc.exit_code, 0) + 1
    assert time.process_time() - began < LONGEST_S


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


@pytest.mark.parametrize("engine", [False, True])
def test_contracts(engine, trained, tmp_path):
    """Of ONNX files, and of plans: what stands before a plan is read is its contract's 'engine' part."""
    rng, seen = random.Random(int(engine)), {}
    made = contract.load(str(trained["model"]))[0]
    folder, suffix = tmp_path, ".plan" if engine else ".onnx"
    for stage in made["stages"]:
        name = os.path.splitext(stage["file"])[0] + suffix
        shutil.copy(str(trained["folder"] / stage["file"]), str(folder / name))
        stage["file"] = name
    if engine:
        made["engine"] = {"tensorrt": "8.2.1.8", "device": "x", "compute_capability": "5.3", "precision": "float16", "source": {}}
    model, text = str(folder / ("model" + suffix)), json.dumps(made).encode()
    path, before = contract.path_beside(model), peak_mib()
    for number in range(int(600 * TIMES)):
        with open(path, "wb") as handle:
            handle.write(flipped(rng, text) if number % 3 == 0 else json.dumps(mutated(rng, made)).encode())
        survives(lambda: contract.load(model), seen)
    assert seen.get(5, 0) > 0.5 * sum(seen.values()) and peak_mib() - before < MOST_MIB, seen


def test_checkpoints(tmp_path):
    rng, seen = random.Random(7), {}
    path = str(tmp_path / "a.safetensors")
    tensors = {"net.%d" % n: np.random.RandomState(n).rand(3, 5).astype(np.float32) for n in range(6)}
    checkpoint.write(path, tensors, {"step": 3, "config": {"res": 64}})
    with open(path, "rb") as handle:
        data = handle.read()
    before = peak_mib()
    for number in range(int(600 * TIMES)):
        with open(path, "wb") as handle:
            handle.write(flipped(rng, data))
        survives(lambda: checkpoint.read(path, ours=bool(number % 2)), seen)
    assert seen.get(5, 0) > 0.5 * sum(seen.values()) and peak_mib() - before < MOST_MIB, seen


def test_configs(tmp_path):
    from train_lite.config import CHOICES, TrainConfig
    rng, seen = random.Random(9), {}
    path, whole, before = str(tmp_path / "config.json"), TrainConfig()._asdict(), peak_mib()
    for number in range(int(200 * TIMES)):
        with open(path, "wb") as handle:
            handle.write(flipped(rng, json.dumps(whole).encode()) if number % 2 else json.dumps(mutated(rng, dict(whole))).encode())
        survives(lambda: from_json(path, TrainConfig._field_defaults, CHOICES), seen)
    assert seen and peak_mib() - before < MOST_MIB


@pytest.mark.slow
def test_models_go_through_the_child(trained, tmp_path, monkeypatch):
    """The contract is made to agree with the mutated file, so that the runtime sees every one of them. The child takes at
    most twice the memory that it takes with the healthy file, and two seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng, seen, model = random.Random(11), {}, str(tmp_path / "model.onnx")
    made = contract.load(str(trained["model"]))[0]
    for stage in made["stages"]:
        shutil.copy(str(trained["folder"] / stage["file"]), str(tmp_path / stage["file"]))
    with open(model, "rb") as handle:
        data = handle.read()
    held, spent, real = [], [], trial.watched

    def watched(*args):
        before = os.times()
        done = real(*args)
        after = os.times()
        held.append(done[2])
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return done

    monkeypatch.setattr(trial, "watched", watched)
    for number in range(1 + int(6 * TIMES)):
        with open(model, "wb") as handle:
            handle.write(flipped(rng, data) if number else data)
        made["stages"][0]["sha256"] = contract.sha256(model)
        contract.write(contract.path_beside(model), made)
        survives(lambda: trial.demand(model, "ort", contract.load(model)[0]), seen)
        assert not held or held[-1] < 2 * held[0] and spent[-1] < LONGEST_S, (number, held[-1], held[0], spent[-1])
    print("healthy %.0f MiB %.2f s, mutated at most %.0f MiB %.2f s: %s" % (
        held[0], spent[0], max(held[1:]), max(spent[1:]), seen))
    assert sum(seen.values()) == 1 + int(6 * TIMES) and seen["accepted"]
