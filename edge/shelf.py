"""A folder of models for --engine that changes its model while edge-run runs, and changes back when the new one fails.

    SHELF/state.json      {"current", "previous", "on_probation", "refused"}, see State
    SHELF/0123456789ab/   a model's files and contract, under its contract.identity

Written by `edge-run --engine SHELF --update MODEL`. A change is one rename of state.json, so that whatever stops us, a power cut
too, leaves a model that was loaded and proven."""
import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from typing import Any, Dict, NamedTuple, Optional

import numpy as np

from edge import backends, contract, pipeline, proof, schema, service, trial
from edge.command import read_json, say, sync_folder, written
from edge.errors import BadFile, EdgeError, UsageError

PROBATION = 100  # frames
LOOK_S = 1.0     # between looks at state.json
OURS = re.compile(r"^([0-9a-f]{12}|\.new-\w+|state\.json\.\d+\.part|state\.json|\w+\.lock)$")
DIGITS = {"type": ["string", "null"], "pattern": "^[0-9a-f]{12}$"}
SCHEMA = {"type": "object", "required": ["current", "previous", "on_probation", "refused"], "additionalProperties": False,
          "properties": {"current": dict(DIGITS, type="string"), "previous": DIGITS,
                         "on_probation": {"type": ["integer", "null"], "minimum": 0}, "refused": {"type": "object"}}}


class State(NamedTuple):
    current: Optional[str] = None       # identity of the model for the next frame; None: an empty shelf
    previous: Optional[str] = None      # of the last one that is known to be good
    on_probation: Optional[int] = None  # how many processes began to use `current` and did not end well; None: it has passed
    refused: Dict[str, Any] = {}        # identity -> why it failed


def read(folder):
    """The State of a shelf; State() of a folder that holds none yet. Raises BadFile for a damaged one."""
    path = os.path.join(folder, "state.json")
    if not os.path.exists(path):
        return State()
    found = read_json(path, "the state of the shelf")
    wrong = schema.violations(found, SCHEMA)
    if not wrong and found["on_probation"] is not None and found["previous"] is None:
        wrong = ["on probation without a previous model"]
    if wrong:
        raise BadFile("%s is damaged: %s. Make a new shelf: edge-run --engine FOLDER --update MODEL.onnx" % (path, wrong[0]))
    return State(**found)


@contextlib.contextmanager
def locked(folder, name, wait=True):
    """Hold the lock `name` of a shelf, a file; the kernel lets go of it when we die. Raises BlockingIOError without wait."""
    with open(os.path.join(folder, name + ".lock"), "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def change(folder, changed):
    """Write what changed(State) makes of a shelf's State; nothing for None. Returns the State."""
    with locked(folder, "state"):
        before = read(folder)
        after = changed(before)
        if after is None:
            return before
        with written(os.path.join(folder, "state.json")) as handle:
            json.dump(after._asdict(), handle, indent=1, sort_keys=True)
            handle.flush()
            os.fsync(handle.fileno())
        sync_folder(folder)
        return after


def rolled_back(state, why):
    """`state` with the previous model in the place of the current one."""
    return State(state.previous, None, None, dict(state.refused, **{state.current: why}))


def path_of(folder, digits):
    """The model file of a model on a shelf, beside its contract. Raises BadFile when it is not there."""
    place = os.path.join(folder, digits)
    for name in sorted(os.listdir(place)) if os.path.isdir(place) else []:
        file = read_json(os.path.join(place, name), "the contract")["stages"][0]["file"] if name.endswith(".json") else None
        if file:
            return os.path.join(place, file)
    raise BadFile("%s lacks the model %s. Put one there: edge-run --engine %s --update MODEL.onnx" % (folder, digits, folder))


def model_of(engine):
    """The model file that an --engine means: itself, or the current one of a shelf. Raises UsageError for another folder."""
    if not os.path.isdir(engine):
        return engine
    state = read(engine)
    if state.current is None:
        raise UsageError("--engine %s is a folder, but no shelf: it has no state.json. Put a model there: edge-run --engine %s "
                         "--update MODEL.onnx; a training's run folder is exported first: python -m export %s --out MODEL.onnx" % ((engine,) * 3))
    try:
        return path_of(engine, state.current)
    except BadFile:
        if state.on_probation is None:
            raise
        return path_of(engine, state.previous)


def load(model, backend, *how, found=None):
    """The Segmenter of a model file. backend: a name; how: threads, resize, still and score of a Segmenter; found: what contract.load
    gave for it, where that is known: it hashes every file. Raises what is wrong."""
    made, files = found or contract.load(model)
    module = backends.choose(backend, model)
    trial.demand(model, module.NAME, made)
    return pipeline.of(made)(made, files, module, *how)


def opened(engine, backend, *how, found=None):
    """The pipeline of an --engine, a model file or a shelf, as load()."""
    if not os.path.isdir(engine):
        return load(engine, backend, *how, found=found)
    model_of(engine)
    return Switching(engine, lambda model: load(model, backend, *how))


# --- update ---------------------------------------------------------------------------------------------------------

def update(folder, model, backend="auto"):
    """Put the model file `model` on a shelf, made when there is none, as the current one. Returns (State, whether it changed).

    Raises UsageError for a folder of something else, BadFile for a model that does not load or was refused before, ParityError
    for one that gives other answers than the trained net. The shelf is then as it was."""
    if os.path.isfile(folder):
        raise UsageError("--engine %s is a file; with --update it is the folder of a shelf, which is made when there is none" % folder)
    if os.path.isdir(folder) and read(folder).current is None and not all(map(OURS.match, os.listdir(folder))):
        raise UsageError("--engine %s holds other things than models; give an empty or a new folder" % folder)
    os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, "update", wait=False))
        except BlockingIOError:
            say("another update of %s is at work; waiting for its end" % folder)
            stack.enter_context(locked(folder, "update"))
        made, files = contract.load(model)
        digits, state = contract.identity(made), read(folder)
        if digits == state.current:
            return state, False
        if digits in state.refused:
            raise BadFile("%s is the model %s, which failed on this shelf: %s. Train or export it again"
                          % (model, digits, state.refused[digits]))
        with load(model, backend, found=(made, files)) as segmenter:
            proof.demand(segmenter, made, model)
        change(folder, lambda state: _prune(folder, state))
        if digits != state.previous:
            _put(folder, digits, model, made, files)
        return change(folder, lambda state: _switched(state, digits)), True


def _switched(state, digits):
    """`state` with the model `digits` as the current one; None where it is that already: a roll-back came before us."""
    if digits == state.current:
        return None
    if state.current is None:
        return State(digits)  # there is nothing to go back to
    if state.on_probation is None:
        return State(digits, state.current, 0, state.refused)
    if digits == state.previous:
        return State(digits, None, None, state.refused)
    return State(digits, state.previous, 0, state.refused)


def _prune(folder, state):
    """Remove what the shelf does not need: older models, what a killed update left."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if OURS.match(name) and name not in (state.current, state.previous, "state.json") and not name.endswith(".lock"):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def _put(folder, digits, model, made, files):
    """Copy a model's files: all of them, on the disk, or nothing."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as scratch:
        place = os.path.join(scratch, digits)
        os.mkdir(place)
        for path in list(files.values()) + [contract.path_beside(model)]:
            copy = os.path.join(place, os.path.basename(path))
            with open(path, "rb") as source, written(copy, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
        if contract.load(os.path.join(place, os.path.basename(model)))[0] != made:
            raise BadFile("%s was changed while it was copied. Type the command again" % model)
        sync_folder(place)
        os.rename(place, os.path.join(folder, digits))
    sync_folder(folder)


# --- run ------------------------------------------------------------------------------------------------------------

class Finite:
    """A session whose every output must be finite: of a model on probation."""

    def __init__(self, session):
        self._session = session
        self.pixels, self.hold, self.tensors, self.close = session.pixels, session.hold, session.tensors, session.close

    def run(self, stage, inputs, keep=False):
        outputs = self._session.run(stage, inputs, keep)
        for name, value in outputs.items():
            if not np.isfinite(np.array(value)).all():
                raise BadFile("%s of the stage %s are not finite" % (name, stage))
        return outputs


class Switching:
    """In the place of a Segmenter: a shelf's current model, exchanged between frames. load(path) -> a Segmenter; clock() -> s.

    A new model is on probation for PROBATION frames. A frame that it fails on is done by the one before, for good."""

    def __init__(self, folder, load, tell=say, clock=time.monotonic):
        self._folder, self._load, self._tell, self._clock = folder, load, tell, clock
        self._looked_s, self._left, self._trusted, self._now, self._failed = clock(), 0, None, None, set()
        self._hold = contextlib.ExitStack()
        try:
            self._hold.enter_context(locked(folder, "run", wait=False))
        except BlockingIOError:
            raise UsageError("the shelf %s is in use by another edge-run; give each a shelf of its own" % folder) from None
        try:
            self._begin()
        except BaseException:
            self._hold.close()
            raise

    def _begin(self):
        self._seen = self._stamp()
        try:
            state = change(self._folder, self._started)
        except OSError as exc:  # a full disk: a try that cannot be counted is not made
            self._tell("warning: the state of the shelf cannot be written, its previous model runs: %s" % exc)
            state = rolled_back(read(self._folder), str(exc))
        try:
            self._now = self._load_new(state.current)
            if state.on_probation is not None:
                self._probation(state.current)
        except Exception as exc:
            if state.on_probation is None:
                raise
            self._now = self._load(path_of(self._folder, state.previous))
            self._refuse(state.current, "it does not load: %s" % _words(exc))

    def _started(self, state):
        """A start on probation counts until it ends well; the second one means that the first did not."""
        if not state.on_probation:
            return None if state.on_probation is None else state._replace(on_probation=1)
        self._tell("model %s ended its process before %d frames were done: back to %s" % (state.current, PROBATION, state.previous))
        return rolled_back(state, "it ended its process before %d frames were done" % PROBATION)

    def _load_new(self, digits):
        """Load a model that may be on probation. Whoever stops us meanwhile says nothing of it: the next start tries it again."""
        try:
            return self._load(path_of(self._folder, digits))
        except Exception:
            raise
        except BaseException:
            self._put_off(digits)
            raise

    def _put_off(self, digits):
        """Its probation begins anew with the next start."""
        self._note(lambda state: state._replace(on_probation=0) if state.current == digits and state.on_probation else None)

    def __getattr__(self, name):
        return getattr(self._now, name)

    @property
    def scale(self):
        return self._now.scale

    @scale.setter
    def scale(self, value):
        self._now.scale = value

    def attempt(self, work):
        """work(), by the newest model; done again by the one before when it raises on probation."""
        self._look()
        if not self._left:
            return work()
        try:
            done = work()
        except Exception as exc:
            return self._again(work, exc)
        self._left -= 1
        if not self._left:
            self._passed()
        return done

    def _stamp(self):
        found = os.stat(os.path.join(self._folder, "state.json"))
        return found.st_ino, found.st_mtime_ns

    def _look(self):
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            self._seen = stamp
            state = read(self._folder)
            if state.current != self._now.model and state.current not in self._failed:
                self._enter(state)
        except (OSError, EdgeError) as exc:
            self._tell("warning: the shelf cannot be read or written, the model stays: %s" % exc)

    def _enter(self, state):
        """Take up a model that came while we run."""
        if self._left:  # the one before it had not passed yet
            self._now.close()
            self._now, self._trusted, self._left = self._trusted or self._load(path_of(
                self._folder, state.previous or state.current)), None, 0
            if state.current == self._now.model:
                return
        # counted before the load: that may end the process
        state = change(self._folder, lambda state: state._replace(on_probation=1) if state.on_probation == 0 else None)
        service.alive()
        try:
            new = self._load_new(state.current)
        except Exception as exc:
            return self._refuse(state.current, "it does not load: %s" % _words(exc))
        if new.classes != self._now.classes:
            self._tell("model %s has other classes: %s" % (new.model, ", ".join(new.classes)))
        self._trusted, self._now = self._now, new
        self._probation(state.current)

    def _probation(self, digits):
        self._left, self._now.session = PROBATION, Finite(self._now.session)
        self._tell("model %s is on probation for %d frames" % (digits, PROBATION))

    def _again(self, work, failure):
        new = self._now
        self._now = self._trusted = self._trusted or self._load(path_of(self._folder, read(self._folder).previous))
        try:
            done = work()
        except Exception:
            self._now = new  # both fail: it is the frame, which says nothing of the model
            raise
        frame = PROBATION - self._left
        self._trusted, self._left = None, 0
        self._refuse(new.model, "frame %d of its probation: %s" % (frame, _words(failure)))
        new.close()
        return done

    def _refuse(self, digits, why):
        self._failed.add(digits)
        self._tell("model %s failed, %s: back to %s" % (digits, why, self._now.model))
        self._note(lambda state: rolled_back(state, why) if state.current == digits and state.previous else None)

    def _passed(self):
        self._now.session = self._now.session._session
        if self._trusted:
            self._trusted.close()
            self._trusted = None
        self._tell("model %s has passed its probation" % self._now.model)
        self._note(lambda state: state._replace(on_probation=None) if state.current == self._now.model else None)

    def _note(self, changed):
        """change(), which a full disk must not turn into the end of a run."""
        try:
            change(self._folder, changed)
        except (OSError, EdgeError) as exc:
            self._tell("warning: the state of the shelf cannot be written: %s" % exc)

    def close(self):
        """Ends well: a probation that is not over begins anew with the next start."""
        if self._left:
            self._put_off(self._now.model)
        for segmenter in filter(None, (self._now, self._trusted)):
            segmenter.close()
        self._hold.close()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()


def _words(exc):
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
