"""Models that change while edge-run runs: a bad one is noticed and taken back, no frame lacks a result, and whatever ends an
update leaves a model that loads."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import edge
from conftest import ROOT
from edge import cli, contract, loop, proof, shelf
from edge.backends import ort
from edge.errors import BadFile, ParityError, UsageError
from edge.pipeline import Segmenter
from edge.pressure import Pressure
from edge.sources import open_source
from test_edge_run import agree, colour_model, lines_of

BACK_S = 10  # within which a bad model is gone again
SIZE = "synthetic://64x48"  # one tile a frame


class Faulty(ort.Session):
    """An engine whose contract says in `trained` what goes wrong on which call."""

    def __init__(self, made, files, threads=0):
        super().__init__(made, files, threads)
        self.fault, self.calls = made.get("trained", {}), 0

    def run(self, stage, inputs, keep=False):
        self.calls += 1
        outputs = super().run(stage, inputs, keep)
        if self.calls == self.fault.get("call"):
            if self.fault["kind"] == "abort":
                os.abort()
            if self.fault["kind"] == "raise":
                raise RuntimeError("seeded fault")
            outputs = {name: value * np.float32("nan") for name, value in outputs.items()}
        return outputs


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A model with its proof: the file."""
    path = colour_model(tmp_path_factory, 3, 64, 0)
    made, files = contract.load(path)
    with Segmenter(made, files, ort) as segmenter:
        contract.write(contract.path_beside(path), dict(made, proof=proof.make(segmenter, 1e-4)))
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory, first):
    """First loads are tried once: models here differ in their contracts only."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(os.path.dirname(first), "cache"))


@pytest.fixture
def model(first, tmp_path):
    """model(name, **changes of its contract): a copy of the first with another identity. Returns its file."""
    def make(name, **changes):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        path = shutil.copy(first, str(folder / "model.onnx"))
        made = contract.load(first)[0]
        contract.write(contract.path_beside(path), dict(made, trained=changes.pop("trained", {"name": name}), **changes))
        return path
    return make


@pytest.fixture
def place(model, tmp_path):
    """A shelf that holds the model "a"."""
    folder = str(tmp_path / "shelf")
    assert shelf.update(folder, model("a"))[1]
    return folder


def digits(path):
    return contract.identity(contract.load(path)[0])


def loads(folder):
    """The current model of a shelf, which must load."""
    state = shelf.read(folder)
    made, _files = contract.load(shelf.model_of(folder))
    assert contract.identity(made) == state.current
    assert state.previous is None or contract.load(shelf.path_of(folder, state.previous))
    return state


# --- update ---------------------------------------------------------------------------------------------------------

def test_update_by_its_command(model, tmp_path, capfd):
    folder, names = str(tmp_path / "s"), [digits(model(name)) for name in "abc"]
    for index, name in enumerate("abc"):
        assert cli.main(["--engine", folder, "--update", str(tmp_path / "models" / name / "model.onnx"), "--json"]) == 0
        out, err = capfd.readouterr()
        previous = names[0] if index else None  # b has not passed when c comes: a stays the one to go back to
        assert json.loads(out) == {"model": names[index], "previous": previous, "changed": True} and names[index] in err
        assert loads(folder) == shelf.State(names[index], previous, 0 if index else None, {})
    kept = {name for name in os.listdir(folder) if len(name) == 12}
    assert kept == set(names), "at most three: the new one, the one before, the one to go back to"
    before = sorted(os.walk(folder)), (tmp_path / "s" / "state.json").read_bytes()
    assert cli.main(["--engine", folder, "--update", str(tmp_path / "models" / "c" / "model.onnx")]) == 0
    assert "nothing is changed" in capfd.readouterr()[1]
    assert before == (sorted(os.walk(folder)), (tmp_path / "s" / "state.json").read_bytes())
    assert cli.main(["--engine", folder, "--input", SIZE, "--frames", "2", "--output", str(tmp_path / "r.jsonl")]) == 0
    assert {line["model"] for line in lines_of(tmp_path / "r.jsonl")} == {names[2]}
    assert shelf.read(folder).on_probation == 0, "a start that ended well is no mark against it"


def test_older_models_are_removed_and_foreign_files_never(model, place, tmp_path):
    (tmp_path / "shelf" / "notes.txt").write_text("mine")
    for name in "bcd":
        shelf.update(place, model(name))
        shelf.change(place, lambda state: state._replace(on_probation=None))
    held = sorted(name for name in os.listdir(place) if len(name) == 12)
    state = loads(place)
    assert len(held) == 3 and {state.current, state.previous} < set(held) and (tmp_path / "shelf" / "notes.txt").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="other things than models"):
        shelf.update(str(tmp_path / "home"), model("e"))
    assert os.listdir(str(tmp_path / "home")) == ["letter.txt"]


def test_back_to_the_model_before(model, place, tmp_path):
    a, b = shelf.read(place).current, model("b")
    shelf.update(place, b)
    assert shelf.update(place, str(tmp_path / "models" / "a" / "model.onnx"))[0] == shelf.State(a, None, None, {})
    shelf.update(place, b)
    shelf.change(place, lambda state: state._replace(on_probation=None))
    assert shelf.update(place, str(tmp_path / "models" / "a" / "model.onnx"))[0] == shelf.State(a, digits(b), 0, {})
    loads(place)
    state = shelf.State(a, None, None, {})
    assert shelf._switched(state, a) is None, "a roll-back may come between an update's look and its switch"


def bad_proof(model):
    made = contract.load(model("x"))[0]["proof"]
    return model("bad", proof=dict(made, scores=[[value + 0.01 for value in row] for row in made["scores"]]))


def no_proof(model):
    path = model("bad")
    made = contract.load(path)[0]
    contract.write(contract.path_beside(path), {name: part for name, part in made.items() if name != "proof"})
    return path


def damaged(model):
    path = model("bad")
    with open(path, "r+b") as handle:
        handle.write(b"\xff" * 40)
    return path


def no_model(model):
    path = damaged(model)
    made = json.load(open(contract.path_beside(path)))
    made["stages"][0]["sha256"] = contract.sha256(path)  # only the runtime can tell
    contract.write(contract.path_beside(path), made)
    return path


def other_tensors(model):
    path = model("bad")
    made = contract.load(path)[0]
    made["tile"]["size"] = 32
    for tensor in made["stages"][0]["inputs"] + made["stages"][0]["outputs"]:
        tensor["shape"][2:] = [32, 32]
    contract.write(contract.path_beside(path), made)
    return path


@pytest.mark.parametrize("make, error, words", [
    (bad_proof, ParityError, "0.01 .allowed"), (no_proof, BadFile, "Export it again"), (damaged, BadFile, "sha256"),
    (no_model, BadFile, "Export it again"), (other_tensors, BadFile, "the contract says")])
def test_a_bad_model_never_gets_onto_the_shelf(make, error, words, model, place):
    path, before = make(model), shelf.read(place)
    with pytest.raises(error, match=words):
        shelf.update(place, path)
    assert loads(place) == before and len([name for name in os.listdir(place) if len(name) == 12]) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"current": "../../etc", "previous": null, "on_probation": null, "refused": {}}',
                                  '{"current": "0123456789ab", "previous": null, "on_probation": 1, "refused": {}}'])
def test_a_damaged_state_is_a_bad_file(text, place, tmp_path):
    (tmp_path / "shelf" / "state.json").write_text(text)
    with pytest.raises(BadFile, match="state.json"):
        shelf.opened(place, "auto")
    assert cli.main(["--engine", place, "--input", SIZE]) == 5


def test_a_folder_that_is_no_shelf(tmp_path, capfd):
    assert cli.main(["--engine", str(tmp_path), "--input", SIZE]) == 2
    assert "--update MODEL.onnx" in capfd.readouterr()[1]


# --- updates that are cut off ---------------------------------------------------------------------------------------

# an updater without the checks before it, which write nothing to the shelf
DRIVER = """
import contextlib, os, signal, sys
from edge import shelf
shelf.trial.demand = lambda *given: None
shelf.proof.demand = lambda *given: None
shelf.Segmenter = lambda *given: contextlib.closing(open(os.devnull))
folder, models = sys.argv[1], sys.argv[2:]
"""
CUT = DRIVER + """
calls, last = [0], int(models.pop())
def cut(module, name):
    real = getattr(module, name)
    def counted(*given, **more):
        calls[0] += 1
        if calls[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **more)
    setattr(module, name, counted)
for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (shelf.shutil, "rmtree"), (os, "remove")):
    cut(module, name)
shelf.update(folder, models[0])
"""
RANDOM = DRIVER + """
import random, time
for seed in range(24):
    child = os.fork()
    if not child:
        shelf.update(folder, models[seed % 3])
        os._exit(0)
    time.sleep(random.Random(seed).uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
    shelf.contract.load(shelf.model_of(folder))
"""


def driver(code, *words):
    return subprocess.Popen([sys.executable, "-c", code] + [str(word) for word in words], env=dict(os.environ, PYTHONPATH=ROOT),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.slow
def test_an_update_that_is_killed_before_any_of_its_writes(model, place):
    new, seen = [model("b"), model("c")], 0
    shelf.update(place, model("o"))
    shelf.change(place, lambda state: state._replace(on_probation=None))  # so that there is something to remove
    for last in range(1, 30):
        code, _out, err = ended(driver(CUT, place, new[last % 2], last))
        assert code in (0, -signal.SIGKILL), err
        seen += code != 0
        loads(place)
        if not code:
            break
    assert 5 <= seen < 29 and shelf.read(place).current == digits(new[last % 2])
    shelf.update(place, model("d"))
    assert not [name for name in os.listdir(place) if name.startswith(".new-") or name.endswith(".part")], "leftovers are removed"


def test_updates_that_are_killed_at_random_moments(model, place):
    code, out, err = ended(driver(RANDOM, place, *[model(name) for name in "bcd"]))
    assert code == 0, err
    assert len(out.split()) == 24 and out.split().count("9") >= 3, "some must have been killed"
    loads(place)


def test_two_updaters_take_turns(model, place):
    new = [model(name) for name in "bc"]
    with shelf.locked(place, "update"):
        waiting = [driver(DRIVER + "shelf.update(folder, models[0])", place, path) for path in new]
        for process in waiting:
            assert b"another update" in process.stderr.readline()
        assert digits(new[0]) != shelf.read(place).current != digits(new[1])
    assert [ended(process)[0] for process in waiting] == [0, 0]
    assert loads(place).current in map(digits, new)


def test_a_full_disk_leaves_the_shelf_as_it_was(model, place):
    before = loads(place)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d))\n"
    for most in (10, 900):  # bytes: less than the state, less than a contract
        code, _out, err = ended(driver(limit % (most, most) + DRIVER + "shelf.update(folder, models[0])", place, model("m%d" % most)))
        assert code == 1 and "OSError" in err, err
        assert loads(place) == before and not [name for name in os.listdir(place) if name.startswith(".new-")]


# --- probation, in this process -------------------------------------------------------------------------------------

class Run:
    """edge-run's loop on a shelf, frame by frame, with a clock of its own."""

    def __init__(self, folder, monkeypatch, fault=Faulty):
        monkeypatch.setattr(ort, "Session", fault)
        self.now_s, self.said, self.sinks = 0.0, [], loop.Memory()
        self.pipeline = shelf.Switching(folder, lambda path: shelf.load(path, "auto"), self.said.append, lambda: self.now_s)
        self._steps = loop.steps(open_source(SIZE), self.pipeline, self.sinks, Pressure(False, "off"))

    def frames(self, count, seconds=2.0):
        """Models of the next frames, each of which must have its result."""
        found = []
        for _ in range(count):
            self.now_s += seconds
            _frame, line = next(self._steps)
            agree(line, "result")
            assert line["error"] is None and sum(line["area"].values()) == pytest.approx(1)
            found.append(line["model"])
        return found

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.pipeline.close()


def test_a_good_model_passes(model, place, monkeypatch):
    a, b = shelf.read(place).current, model("b")
    with Run(place, monkeypatch) as run:
        assert run.frames(3) == [a] * 3
        shelf.update(place, b)
        assert run.frames(5, seconds=0.1)[0] == a, "state.json is looked at once a second"
        assert set(run.frames(99)) == {digits(b)} and shelf.read(place).on_probation == 1
        assert run.pipeline._trusted is not None
        run.frames(1)
        assert shelf.read(place) == shelf.State(digits(b), a, None, {}) and run.pipeline._trusted is None
        assert isinstance(run.pipeline.session, Faulty), "scores are looked at during probation only"
        assert set(run.frames(20)) == {digits(b)}
    assert [line for line in run.said if "passed" in line] == ["model %s has passed its probation" % digits(b)]


@pytest.mark.parametrize("kind, call, words", [("raise", 37, "frame 36 of its probation: seeded fault"),
                                               ("nan", 50, "frame 49 of its probation: scores of the stage net are not finite")])
def test_a_model_that_fails_on_a_frame(kind, call, words, model, place, monkeypatch, capfd):
    a, b = shelf.read(place).current, model("b", trained={"kind": kind, "call": call})
    shelf.update(place, b)
    shelf.change(place, lambda state: state._replace(on_probation=None, current=a, previous=None))
    with Run(place, monkeypatch) as run:
        plain = run.frames(1) and run.sinks.mask
        shelf.change(place, lambda state: shelf.State(digits(b), a, 0, {}))
        assert run.frames(call - 1) == [digits(b)] * (call - 1)
        assert run.frames(3) == [a] * 3 and plain.shape == run.sinks.mask.shape
        state = loads(place)
        assert state == shelf.State(a, None, None, {digits(b): words})
    assert run.said[-1] == "model %s failed, %s: back to %s" % (digits(b), words, a)
    assert cli.main(["--engine", place, "--update", b]) == 5
    assert words in capfd.readouterr()[1]


def test_a_fault_after_probation_is_an_error_as_ever(model, place, monkeypatch):
    shelf.update(place, model("b", trained={"kind": "raise", "call": 102}))
    with Run(place, monkeypatch) as run:
        run.frames(101)
        with pytest.raises(RuntimeError, match="seeded"):
            run.frames(1)
    assert shelf.read(place).on_probation is None


@pytest.mark.parametrize("spoil", ["file", "folder", "tensors"])
def test_a_model_that_does_not_load(spoil, model, place, monkeypatch):
    a = shelf.read(place).current
    with Run(place, monkeypatch) as run:
        run.frames(1)
        state, _changed = shelf.update(place, model("b"))
        if spoil == "file":
            with open(shelf.model_of(place), "r+b") as handle:
                handle.write(b"\xff" * 40)
        elif spoil == "folder":
            shutil.rmtree(os.path.join(place, state.current))
        else:
            monkeypatch.setattr(Faulty, "tensors", lambda self, stage, side: {})
        assert run.frames(3) == [a] * 3
    assert shelf.read(place).current == a and "does not load" in shelf.read(place).refused[state.current]


@pytest.mark.parametrize("spoil", ["file", "folder"])
def test_a_model_that_does_not_load_at_the_start(spoil, model, place, tmp_path, capfd):
    a, (state, _changed) = shelf.read(place).current, shelf.update(place, model("b"))
    if spoil == "file":
        with open(shelf.model_of(place), "r+b") as handle:
            handle.write(b"\xff" * 40)
    else:
        shutil.rmtree(os.path.join(place, state.current))
    assert cli.main(["--engine", place, "--input", SIZE, "--frames", "2", "--output", str(tmp_path / "r.jsonl")]) == 0
    assert {line["model"] for line in lines_of(tmp_path / "r.jsonl")} == {a} and "does not load" in capfd.readouterr()[1]
    assert shelf.read(place).current == a and state.current in shelf.read(place).refused


def test_other_classes_are_said(model, place, monkeypatch):
    made = contract.load(shelf.model_of(place))[0]
    shelf.update(place, model("b", classes=[dict(entry, name="new " + entry["name"]) for entry in made["classes"]]))
    shelf.change(place, lambda state: state._replace(current=state.previous, previous=None, on_probation=None))
    other = [name for name in os.listdir(place) if len(name) == 12 and name != shelf.read(place).current][0]
    with Run(place, monkeypatch) as run:
        run.frames(1)
        shelf.change(place, lambda state: shelf.State(other, state.current, 0, {}))
        assert run.frames(2) == [other] * 2
    assert any("has other classes: new class 0, new class 1" in line for line in run.said)


def test_a_frame_that_both_models_fail_on_says_nothing_of_the_model(model, place, monkeypatch, tmp_path):
    shelf.update(place, model("b"))
    with Run(place, monkeypatch) as run:
        run.frames(10)

        def broken():
            raise BadFile("a damaged photo")
        with pytest.raises(BadFile, match="damaged photo"):
            run.pipeline.attempt(broken)
        assert set(run.frames(89)) == {shelf.read(place).current} and shelf.read(place).on_probation == 1
        run.frames(1)
    assert shelf.read(place).on_probation is None


def test_the_second_start_on_probation_goes_back(model, place, monkeypatch):
    a = shelf.read(place).current
    state, _changed = shelf.update(place, model("b"))
    monkeypatch.setattr(shelf.Switching, "close", lambda self: self._hold.close())  # as if the process had been killed
    with Run(place, monkeypatch) as run:
        assert run.frames(5) == [state.current] * 5 and shelf.read(place).on_probation == 1
    with Run(place, monkeypatch) as run:
        assert run.frames(2) == [a] * 2
    assert "ended its process" in shelf.read(place).refused[state.current] and len(run.said) == 1


def test_a_newer_model_during_probation(model, place, monkeypatch, tmp_path):
    a = shelf.read(place).current
    with Run(place, monkeypatch) as run:
        run.frames(1)
        for name in "bc":
            state, _changed = shelf.update(place, model(name))
            assert run.frames(5) == [state.current] * 5 and state.previous == a
        shelf.update(place, str(tmp_path / "models" / "a" / "model.onnx"))
        assert run.frames(2) == [a] * 2 and run.pipeline._left == 0
        state, _changed = shelf.update(place, model("d"))
        assert set(run.frames(100)) == {state.current}
    assert shelf.read(place) == shelf.State(state.current, a, None, {})


def test_a_full_disk_at_run_time_keeps_the_old_model(model, place, monkeypatch):
    a = shelf.read(place).current
    with Run(place, monkeypatch) as run:
        run.frames(1)
        state, _changed = shelf.update(place, model("b"))

        def full(path):
            raise OSError(28, "No space left on device", path)
        monkeypatch.setattr(shelf, "written", full)
        assert run.frames(5) == [a] * 5 and any("warning" in line and "No space" in line for line in run.said)
    with Run(place, monkeypatch) as run:
        assert run.frames(2) == [a] * 2, "a try that cannot be counted is not made"
    monkeypatch.undo()
    assert shelf.read(place) == state


def test_a_shelf_is_for_one_edge_run(place, monkeypatch):
    with Run(place, monkeypatch), pytest.raises(UsageError, match="in use by another"):
        shelf.opened(place, "auto")
    shelf.opened(place, "auto").close()


def test_in_python(model, place, first):
    models = [result.model for _frame, result in edge.run(place, SIZE, limit=2)] + [
        result.model for _frame, result in edge.run(first, SIZE, limit=1)]
    assert models == [shelf.read(place).current] * 2 + [digits(first)]


# --- the whole, in processes of its own -----------------------------------------------------------------------------

SERVICE = "import sys; sys.path.insert(0, %r); import test_shelf; test_shelf.ort.Session = test_shelf.Faulty; " \
          "from edge.cli import main; sys.exit(main())"


class Service:
    """edge-run on a shelf, started again whenever it ends: what systemd does. .starts: lines of results, start by start."""

    def __init__(self, folder, work):
        self._folder, self._work, self._stopped, self.codes = folder, str(work), False, []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stopped and len(self.codes) < 5:
            with open(os.path.join(self._work, "%d.out" % len(self.codes)), "wb") as out, \
                    open(os.path.join(self._work, "%d.err" % len(self.codes)), "wb") as err:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", SERVICE % os.path.dirname(__file__), "--engine", self._folder, "--input", SIZE, "--output",
                     "-", "--frames", "1000000"], stdout=out, stderr=err, env=dict(os.environ, PYTHONPATH=ROOT),
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)))
                self.codes.append(self._process.wait())

    def newest(self):
        """The model of the newest result; None before the first."""
        for index in range(len(self.codes), -1, -1):
            path = os.path.join(self._work, "%d.out" % index)
            lines = open(path).read().splitlines()[:-1] if os.path.exists(path) else []
            if lines:
                return json.loads(lines[-1])["model"]
        return None

    def wait(self, what, limit_s=60):
        """Seconds until what() is true."""
        began_s = time.monotonic()
        while not what():
            assert time.monotonic() - began_s < limit_s and self._thread.is_alive(), self.said()[-4000:]
            time.sleep(0.02)
        return time.monotonic() - began_s

    def said(self):
        names = sorted(name for name in os.listdir(self._work) if name.endswith("err"))
        return "".join(open(os.path.join(self._work, name)).read() for name in names)

    def stop(self):
        """End it as systemd does. Returns the lines of results, start by start."""
        self._stopped = True
        self._process.terminate()
        self._thread.join(60)
        return [lines_of(os.path.join(self._work, "%d.out" % index)) for index in range(len(self.codes))]


@pytest.mark.parametrize("kind, call", [("raise", 37), ("nan", 50), ("abort", 20), ("file", 0), ("proof", 0)])
def test_a_bad_update_is_taken_back_while_results_go_on(kind, call, model, place, tmp_path, request):
    a = shelf.read(place).current
    bad = bad_proof(model) if kind == "proof" else model("bad", trained={"kind": kind, "call": call})
    (tmp_path / "log").mkdir()
    service = Service(place, tmp_path / "log")
    request.addfinalizer(service.stop)
    service.wait(lambda: service.newest() == a)
    if kind == "proof":
        with pytest.raises(ParityError):
            shelf.update(place, bad)
        took_s = service.wait(lambda: shelf.read(place).current == a == service.newest())
    else:
        if kind == "file":  # damaged after it was checked
            shelf._put(place, digits(bad), bad, *contract.load(bad))
            with open(os.path.join(place, digits(bad), "model.onnx"), "r+b") as handle:
                handle.write(b"\xff" * 40)
            shelf.change(place, lambda state: shelf._switched(state, digits(bad)))
        else:
            shelf.update(place, bad)
        took_s = service.wait(lambda: digits(bad) in shelf.read(place).refused and service.newest() == a)
        service.wait(lambda: digits(bad) in service.said())
    print("roll-back of %s after %.2f s" % (kind, took_s))
    assert took_s < BACK_S, service.said()
    starts = service.stop()
    assert service.codes == [-signal.SIGABRT, 143][kind != "abort":]
    for lines in starts:
        assert [line["frame"] for line in lines] == list(range(len(lines))) and lines, "no frame lacks its result"
        assert all(line["error"] is None for line in lines)
    used = {line["model"] for lines in starts for line in lines}
    assert used == ({a} if kind in ("proof", "file") else {a, digits(bad)})
    assert loads(place).current == a


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_us_while_a_model_loads_says_nothing_of_it(stop, running, model, place, monkeypatch):
    """Ctrl-C or SIGTERM in the seconds of a load, at the start or later."""
    b, real = model("b"), Segmenter.__init__

    def stopped(segmenter, made, *rest):
        if contract.identity(made) == digits(b):
            raise stop()
        real(segmenter, made, *rest)

    if running:
        with Run(place, monkeypatch) as run:
            run.frames(1)
            shelf.update(place, b)
            monkeypatch.setattr(Segmenter, "__init__", stopped)
            with pytest.raises(stop):
                run.frames(2)
            monkeypatch.setattr(Segmenter, "__init__", real)
    else:
        shelf.update(place, b)
        monkeypatch.setattr(Segmenter, "__init__", stopped)
        with pytest.raises(stop):
            Run(place, monkeypatch)
        monkeypatch.setattr(Segmenter, "__init__", real)
    assert loads(place).current == digits(b) and loads(place).on_probation == 0
    with Run(place, monkeypatch) as run:
        assert run.frames(1) == [digits(b)]
