"""ONNX -> engine -> masks on the doubles of TensorRT and pycuda, one generation after the other, by the commands users type."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, command, rest_slow
from doubles import api_folder, child_env, install
from edge import contract, trial
from edge.backends import trt as backend
from edge.errors import BadFile, EdgeError, EngineMismatch, OverBudget
from export.build import ladder

pytestmark = pytest.mark.skipif(not os.path.isdir(api_folder()), reason="the listed names of TensorRT's bindings are not in %s; "
                                "set NANOPATCH_DATA" % api_folder())
GENERATIONS = ("8.2", "8.6", "10.3", "11.4")  # numbers for tensors, both, names, no FP16 flag


def board(generation, cache, **knobs):
    """Environment of a command on a board with this TensorRT; its caches in the folder `cache`."""
    env = child_env(generation, **knobs)
    env.update(PYTHONPATH=os.pathsep.join([env["PYTHONPATH"], ROOT]), XDG_CACHE_HOME=os.path.join(str(cache), "cache"))
    return env


def build(trained, folder, generation, *words, **knobs):
    """`python -m export model.onnx --out model.plan` in `folder`. Returns the ended process."""
    os.makedirs(str(folder), exist_ok=True)
    frames = os.path.join(trained["data"], "images")
    return command("export", trained["model"], "--out", os.path.join(str(folder), "model.plan"), "--frames", frames, *words,
                   env=board(generation, folder, **knobs))


def run(folder, generation, engine, frame, **knobs):
    return command("edge.cli", "--engine", engine, "--input", frame, "--output", os.path.join(str(folder), "out.png"),
                   env=board(generation, folder, **knobs))


@pytest.fixture(scope="module")
def frame(trained):
    return os.path.join(trained["data"], "images", "00.png")


@pytest.fixture(scope="module")
def expected(trained, frame, tmp_path_factory):
    """The mask that ONNX Runtime computes."""
    out = tmp_path_factory.mktemp("ort") / "out.png"
    done = command("edge.cli", "--engine", trained["model"], "--input", frame, "--output", out)
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(str(out)))


@pytest.fixture(scope="module")
def built(trained, tmp_path_factory):
    """{generation: folder} with model.plan, built once per generation."""
    made = {}

    def get(generation):
        if generation not in made:
            folder = tmp_path_factory.mktemp("engine")
            done = build(trained, folder, generation)
            assert done.returncode == 0, done.stderr
            made[generation] = folder
        return made[generation]

    return get


@pytest.mark.parametrize("generation", rest_slow([(one,) for one in GENERATIONS]))
def test_engine_gives_the_masks_of_onnx_runtime(generation, built, frame, expected):
    folder = built(generation)
    done = run(folder, generation, folder / "model.plan", frame)
    assert done.returncode == 0 and "trt (TensorRT " + generation in done.stderr, done.stderr
    assert (np.asarray(Image.open(str(folder / "out.png"))) == expected).all() and expected.any() and not expected.all()
    made = json.loads((folder / "model.plan.json").read_text())
    assert made["engine"]["precision"] == "float32" and made["parity"]["changed_share"] == 0
    assert set(made["parity"]["stages"]) >= {"prepare", "encoder", "head", "stitch"}
    assert sorted(os.listdir(str(folder)))[:4] == ["cache", "model.head.plan", "model.plan", "model.plan.json"]


def test_without_nvcc_the_cpu_prepares_and_decodes(built, frame, expected):
    folder = built("8.2")
    shutil.rmtree(str(folder / "cache" / "nanopatch" / "kernels"))
    done = run(folder, "8.2", folder / "model.plan", frame, no_nvcc=1)
    assert done.returncode == 0 and "warning: pixels are prepared and decoded on the CPU" in done.stderr, done.stderr
    assert (np.asarray(Image.open(str(folder / "out.png"))) == expected).all()
    done = run(folder, "8.2", folder / "model.plan", frame)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert len(os.listdir(str(folder / "cache" / "nanopatch" / "kernels"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["8.2", "10.3", "11.4"])
def test_half_precision_keeps_inputs_and_outputs_in_float32(generation, trained, frame, expected, tmp_path):
    done = build(trained, tmp_path, generation, "--fp16")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "model.plan.json").read_text())
    assert made["engine"]["precision"] == "float16" and made["parity"]["max_abs_error"] > 0
    assert {t["dtype"] for s in made["stages"] for t in s["inputs"] + s["outputs"]} == {"float32"}
    done = run(tmp_path, generation, tmp_path / "model.plan", frame)
    assert done.returncode == 0, done.stderr
    assert (np.asarray(Image.open(str(tmp_path / "out.png"))) != expected).mean() < 0.01


@pytest.mark.slow
def test_a_second_build_is_taken_from_the_cache(trained, tmp_path):
    for words in ((), ("--no-reuse",), ("--fp16",)):
        done = build(trained, tmp_path, "8.6", *words)
        assert done.returncode == 0 and "taken from" not in done.stderr, done.stderr
    done = build(trained, tmp_path, "8.6")
    assert done.returncode == 0 and done.stderr.count("taken from") == 2, done.stderr


@pytest.mark.parametrize("kill_mib", rest_slow([(600 + more,) for more in (8, 512, 31, 32, 128, 511)], 2))
def test_a_builder_that_is_killed_tries_with_less(kill_mib, trained, tmp_path, monkeypatch, capsys):
    """The double takes 600 MiB and the workspace; more than kill_mib and it dies as by the kernel."""
    for name, value in board("8.2", tmp_path, kill_mib=kill_mib).items():
        monkeypatch.setenv(name, value)
    job = {"onnx": str(trained["folder"] / "model.head.onnx"), "plan": str(tmp_path / "a.plan"), "cache": str(tmp_path / "timing"),
           "fp16": False, "float32": []}
    ladder("head", job, 512)
    said = capsys.readouterr().err
    assert said.count("head: building") <= 5 and ("killed the builder" in said) == (kill_mib < 600 + 512)
    assert os.path.getsize(job["plan"]) > 1000


@pytest.mark.parametrize("code, error", [(3, OverBudget), (5, BadFile), (1, EngineMismatch), (-9, None)])
def test_how_a_builder_ended(code, error, tmp_path, monkeypatch):
    """Out of memory and a full disk are not an engine of another device."""
    import export.build as building
    script = tmp_path / "builder"
    script.write_text("#!/bin/sh\necho 'error: the disk is full' >&2\n%s\n" % ("kill -9 $$" if code < 0 else "exit %d" % code))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    if error is None:
        assert building._child({}) is None
        monkeypatch.setattr(building.contract, "load", lambda _model: ({}, {}))
        with pytest.raises(OverBudget, match="killed while it looked at the device"):
            building.build("m.onnx", str(tmp_path / "m.plan"), None)
        return
    with pytest.raises(error, match="the disk is full"):
        building._child({})


def test_engines_of_nodes_with_slashes_are_kept(tmp_path, monkeypatch):
    """torch 2 calls nodes /encoder/0/Conv; many of them are longer than a file's name may be."""
    import export.build as building
    from export.__main__ import ExportConfig
    made = []
    monkeypatch.setattr(building, "cache_home", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(building, "ladder", lambda _name, job, _mib: (made.append(job["plan"]), open(job["plan"], "w").close()))
    (tmp_path / "a.onnx").write_bytes(b"x")
    facts = {"tensorrt": "8.2", "device": "NVIDIA/Tegra X1", "compute_capability": "5.3"}
    for nodes in ("/encoder/0/Conv /head/Conv", "/head/Conv /encoder/0/Conv", "/head/Conv", " ".join("/encoder/%d/Conv" % at for at in range(50)), ""):
        building._stage({"name": "net"}, str(tmp_path / "a.onnx"), str(tmp_path / "a.plan"), facts, ExportConfig(fp16=True, float32=nodes))
    assert len(made) == 4 and len(set(made)) == 4 and len({os.path.dirname(path) for path in made}) == 1


@pytest.mark.parametrize("words, said", [
    (("--fp16", "--float32", "no-such-node"), "no node is called no-such-node"), (("--float32", "Conv_0"), "without --fp16"),
    (("--tolerance", "1e-3"), "--tolerance 0.001 is a flag for exporting a checkpoint"), (("--tile-batch", "2"), "is exported already")])
def test_flags_that_would_do_nothing_are_refused(words, said, trained, tmp_path):
    done = build(trained, tmp_path, "8.2", *words)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not [name for name in os.listdir(str(tmp_path)) if "plan" in name]


def test_flags_of_the_builder_are_refused_for_a_checkpoint(trained, tmp_path):
    for words, said in ((("--fp16",), "--fp16 is a flag for building engines"), (("--no-reuse",), "--no-reuse is"), (("--workspace", 64), "--workspace 64 is")):
        done = command("export", trained["run"], "--out", tmp_path / "m.onnx", *words, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and not os.listdir(str(tmp_path)), done.stderr


@pytest.mark.slow
def test_a_board_too_small_to_build_says_so(trained, tmp_path):
    done = build(trained, tmp_path, "8.2", kill_mib=600)
    assert done.returncode == 3 and "killed for want of memory" in done.stderr and "swap" in done.stderr, done.stderr
    assert not [name for name in os.listdir(str(tmp_path)) if "plan" in name or name.startswith(".")]


@pytest.mark.slow
def test_cudnn_is_loaded_only_where_nothing_else_works(trained, tmp_path):
    done = build(trained, tmp_path, "8.2", needs_cudnn="1")
    assert done.returncode == 0 and "with cuBLAS and cuDNN" in done.stderr, done.stderr


def test_what_tensorrt_says_reaches_the_user(trained, tmp_path):
    done = build(trained, tmp_path, "8.2", fail_build="no tactic for node Conv_3 on a Tuesday")
    assert done.returncode == 5 and "on a Tuesday" in done.stderr, done.stderr


def test_a_machine_without_tensorrt_says_where_engines_are_built(trained, tmp_path):
    done = command("export", trained["model"], "--out", tmp_path / "model.plan", env={"XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 2 and "built on the board" in done.stderr, done.stderr


@pytest.fixture
def engine(built, tmp_path):
    """A copy of the engine of 8.2 to spoil: the path of model.plan."""
    for name in os.listdir(str(built("8.2"))):
        if "plan" in name:
            shutil.copy(str(built("8.2") / name), str(tmp_path / name))
    return tmp_path / "model.plan"


def edit(engine, change):
    path = str(engine) + ".json"
    with open(path) as handle:
        made = json.load(handle)
    change(made)
    with open(path, "w") as handle:
        json.dump(made, handle)


def rehash(engine):
    """Make the contract agree with whatever is in model.plan now."""
    edit(engine, lambda made: made["stages"][0].update(sha256=contract.sha256(str(engine))))


MISMATCHES = {
    "another TensorRT": (lambda engine: edit(engine, lambda made: made["engine"].update(tensorrt="8.0.1.6")), 7, "8.0.1.6, here 8.2"),
    "another GPU": (lambda engine: edit(engine, lambda made: made["engine"].update(
        device="Orin", compute_capability="8.7")), 7, "8.7, here 5.3"),
    "another model": (lambda engine: shutil.copy(str(engine).replace("model.plan", "model.head.plan"), str(engine)), 5, "sha256"),
    "cut short": (lambda engine: engine.write_bytes(engine.read_bytes()[:1000]), 5, "sha256"),
    "zero bytes": (lambda engine: engine.write_bytes(b""), 5, "sha256"),
    "a text file": (lambda engine: engine.write_text("no plan"), 5, "sha256"),
    "an edited contract": (lambda engine: edit(engine, lambda made: made["tile"].update(size=64)), 5, "ask for"),
    "a stage missing": (lambda engine: os.remove(str(engine).replace("model.plan", "model.head.plan")), 5, "is missing"),
    "no contract": (lambda engine: os.remove(str(engine) + ".json"), 5, "has no contract"),
    "the contract of an ONNX file": (lambda engine: edit(engine, lambda made: made.pop("engine")), 5, "engine")}


@pytest.mark.parametrize("kind", sorted(MISMATCHES))
def test_what_does_not_match_is_refused_before_it_is_deserialised(kind, engine, monkeypatch):
    trt, pycuda = install(monkeypatch, "8.2")
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda *unused: pytest.fail("it was deserialised"))
    spoil, code, words = MISMATCHES[kind]
    spoil(engine)
    with pytest.raises(EdgeError) as error:
        backend.Session(*contract.load(str(engine)))
    assert error.value.exit_code == code and words in str(error.value), str(error.value)
    pycuda.double.check_teardown()


@pytest.mark.parametrize("content", [b"", b"no plan", os.urandom(5000)], ids=["empty", "text", "noise"])
def test_a_file_with_the_right_hash_that_is_no_plan(content, engine, frame, tmp_path):
    engine.write_bytes(content)
    rehash(engine)
    done = run(tmp_path, "8.2", engine, frame)
    assert done.returncode == 5 and "cannot load" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_runtime_that_crashes_takes_only_the_child(engine, frame, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tensorrt.py").write_text("import os, signal, sys\n__version__ = '8.2.1.8'\n"
                                                     "if 'trial' in ' '.join(sys.argv): os.kill(os.getpid(), signal.SIGSEGV)\n")
    env = board("8.2", tmp_path)
    env["PYTHONPATH"] = str(tmp_path / "broken") + os.pathsep + env["PYTHONPATH"]
    done = command("edge.cli", "--engine", engine, "--input", frame, "--output", tmp_path / "x.png", env=env)
    assert done.returncode == 5 and "signal 11" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_file_that_passed_is_not_tried_again(engine, frame, tmp_path, monkeypatch):
    assert run(tmp_path, "8.2", engine, frame).returncode == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, "8.2")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("tried again"))
    trial.demand(str(engine), "trt", contract.load(str(engine))[0])


@pytest.mark.parametrize("generation", rest_slow([(one,) for one in GENERATIONS]))
def test_session_gives_everything_back(generation, built, monkeypatch):
    _trt, pycuda = install(monkeypatch, generation)
    session = backend.Session(*contract.load(str(built(generation) / "model.plan")))
    assert session.kind in ("device", "mapped", "managed")
    tile = contract.load(str(built(generation) / "model.plan"))[0]["tile"]["size"]
    with pytest.raises(EdgeError, match="shape"):
        session.run("encoder", {"pixels": np.zeros((1, 3, tile, tile + 1), np.float32)})
    session.close()
    session.close()
    pycuda.double.check_teardown()


def test_features_stay_on_the_device(built, monkeypatch):
    _trt, pycuda = install(monkeypatch, "8.6")
    made, files = contract.load(str(built("8.6") / "model.plan"))
    session = backend.Session(made, files)
    pixels = np.random.RandomState(0).rand(1, 3, made["tile"]["size"], made["tile"]["size"]).astype(np.float32)
    kept = session.run("encoder", {"pixels": pixels}, keep=True)["features"]
    assert isinstance(kept.address, int) and not isinstance(kept, np.ndarray)
    plain = session.run("encoder", {"pixels": pixels})["features"]
    rest = {t["name"]: np.random.RandomState(1).rand(*t["shape"]).astype(np.float32)
            for t in made["stages"][1]["inputs"] if t["name"] != "features"}
    one, two = (session.run("head", dict(rest, features=f))["scores"] for f in (kept, plain))
    assert np.array_equal(one, two) and one.any()
    session.close()
    pycuda.double.check_teardown()


def test_another_thread_is_told_so(built, monkeypatch):
    import threading
    install(monkeypatch, "8.2")
    session, caught = backend.Session(*contract.load(str(built("8.2") / "model.plan"))), []

    def work():
        try:
            session.run("encoder", {})
        except EdgeError as exc:
            caught.append(str(exc))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    session.close()
    assert caught and "second thread" in caught[0]


SAID = r"(?m)^head: (.*?)(?:, (?:layer|step) (\d+) of (\d+))?, \d+ s, builder at (\d+) MiB$"


def head_job(trained, folder):
    return {"onnx": str(trained["folder"] / "model.head.onnx"), "plan": str(folder / "a.plan"), "cache": str(folder / "timing"),
            "fp16": False, "float32": []}


@pytest.mark.parametrize("generation, pace_s", rest_slow([("8.2", 0), ("11.4", 10 ** 6), ("10.3", 0), ("8.6", 10 ** 6)], 2))
def test_a_build_says_what_it_is_at(generation, pace_s, trained, tmp_path, monkeypatch, capsys):
    import re
    import export.build as building
    for name, value in board(generation, tmp_path, pause_s=0.1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(building, "PACE_S", pace_s)
    ladder("head", head_job(trained, tmp_path), 512)
    said = re.findall(SAID, capsys.readouterr().err)
    timing = [line for line in said if line[0] == ("timing graph nodes" if generation[0] == "1" else "timing kernels")]
    layers = [int(done) for _phase, done, _all, _mib in timing]
    assert layers == sorted(layers) and layers[-1] <= int(timing[-1][2]) > 3 and all(int(line[3]) > 10 for line in timing), said
    assert len(timing) == 1 if pace_s else len(set(layers)) > 3, said
    assert not [phase for phase, _done, _all, _mib in said if "finding" in phase], said


def test_the_listener_counts_layers_and_not_reformats(capsys):
    """Lines as 8.x wrote them, and 10.x."""
    from export.builder import listener
    hear = listener()
    for line in ("Original: 12 layers", "After vertical fusions: 5 layers", "After concat removal: 2 layers",
                 "=============== Computing reformatting costs", "--------------- Timing Runner: Optimizer Reformat (Reformat)",
                 "=============== Computing costs for ", "--------------- Timing Runner: Conv_0 + Relu_1 (CaskConvolution)",
                 "Tactic: 0x00000000000003ea Time: 0.00364102", "=============== Computing costs for /features/features.0/Conv",
                 "Formats and tactics selection completed in 178.061 seconds.", "After reformat layers: 4 layers"):
        hear(line)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"phase": "timing kernels", "at": ", layer 1 of 2"}, {"phase": "timing kernels", "at": ", layer 2 of 2"},
        {"phase": "making the engine", "at": ""}]


def test_ctrl_c_ends_the_builder(trained, tmp_path, monkeypatch):
    import export.build as building
    started, real = [], subprocess.Popen

    def popen(*args, **more):
        started.append(real(*args, **more))
        return started[0]

    def interrupt(_seconds):
        raise KeyboardInterrupt

    for name, value in board("8.2", tmp_path, pause_s=60).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(building.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ladder("head", head_job(trained, tmp_path), 512)
    assert len(started) == 1 and started[0].returncode == -9 and not (tmp_path / "a.plan").exists()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_double_knows_a_progress_monitor_where_tensorrt_does(generation, trained, monkeypatch):
    trt, _pycuda = install(monkeypatch, generation)
    log = backend.logger(trt)
    builder = trt.Builder(log)
    config = builder.create_builder_config()
    if generation in ("8.2", "8.6"):
        with pytest.raises(AttributeError):
            config.progress_monitor = None
        assert not hasattr(trt, "IProgressMonitor") and not hasattr(config, "progress_monitor")
        return

    class Forgets(trt.IProgressMonitor):
        def __init__(self):
            pass

    class Ends(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        phase_start = phase_finish = lambda *unused: None

        def step_complete(self, phase_name, step):
            return step < 1

    with pytest.raises(TypeError, match="__init__"):
        Forgets()
    with pytest.raises(TypeError):
        config.progress_monitor = object()
    with pytest.raises(RuntimeError, match="pure virtual"):
        trt.IProgressMonitor().phase_start("x", "", 1)
    network = builder.create_network(0 if generation == "11.4" else 1)
    assert trt.OnnxParser(network, log).parse((trained["folder"] / "model.head.onnx").read_bytes())
    config.progress_monitor = monitor = Ends()
    assert config.progress_monitor is monitor and builder.build_serialized_network(network, config) is None


EXCHANGE = """
import sys
import edge
from edge import shelf
shelf.LOOK_S, shelf.PROBATION = 0, 2
folder, first, second = sys.argv[1:]
shelf.update(folder, first)
used = []
for frame, result in edge.run(folder, "synthetic://120x96", limit=6):
    used.append((result.model, result.mask.tobytes()))
    if len(used) == 2:
        shelf.update(folder, second)
assert [model == used[0][0] for model, _mask in used] == [True] * 2 + [False] * 4, used
assert shelf.read(folder).on_probation is None and shelf.read(folder).current == used[-1][0]
"""


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["8.2", "10.3"])
def test_an_engine_is_exchanged_for_another_while_it_runs(generation, built, tmp_path):
    made = json.loads((built(generation) / "model.plan.json").read_text())
    assert made["proof"]["tolerance"] == pytest.approx(1e-3)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for stage in made["stages"]:
            shutil.copy(str(built(generation) / stage["file"]), str(tmp_path / name))
        contract.write(str(tmp_path / name / "model.plan.json"), dict(made, trained={"name": name}))
    words = [sys.executable, "-c", EXCHANGE] + [str(tmp_path / name) for name in ("shelf", "first/model.plan", "second/model.plan")]
    done = subprocess.run(words, env=board(generation, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
    assert b"on probation" in done.stderr and b"has passed" in done.stderr
