"""The first load of a model file that this machine has not seen: in a child process, so that a file which crashes a runtime
ends the child and not a robot.

    python -m edge.trial ENGINE BACKEND"""
import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np

from edge import backends, contract
from edge.command import cache_home, guarded, written
from edge.errors import BadFile, EdgeError, EngineMismatch, OverBudget, UsageError

BY_CODE = {error.exit_code: error for error in (UsageError, OverBudget, EngineMismatch)}
LIMIT_S = 300  # a Nano takes a minute to load CUDA and a large plan from a card


def demand(engine, name, made):
    """Raise what is wrong with the files of the model `engine` when the backend called `name` loads and runs them once on
    zeros. made: its contract. Files that passed are remembered by their hashes."""
    mark = _mark(name, made)
    if os.path.exists(mark):
        return
    try:
        done = subprocess.run([sys.executable, "-m", "edge.trial", engine, name], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as exc:
        raise BadFile("%s did not load within %d s. Export it again" % (engine, LIMIT_S)) from exc
    words = done.stderr.decode(errors="replace").strip()
    if done.returncode == -signal.SIGKILL:
        raise OverBudget("the kernel killed the process that loaded %s: not enough memory. Close other programs, or add swap: "
                         "sudo python3 -m jetson setup --apply" % engine)
    if done.returncode < 0:
        raise BadFile("%s crashed the process that loaded it (signal %d): it is damaged or hostile. Export it again"
                      % (engine, -done.returncode))
    if done.returncode:
        raise BY_CODE.get(done.returncode, BadFile)(words.rpartition("error: ")[2] or "%s does not load" % engine)
    passed(name, made)


def passed(name, made):
    """Remember that the backend called `name` has run the files of the contract `made` here."""
    mark = _mark(name, made)
    try:
        os.makedirs(os.path.dirname(mark), exist_ok=True)
        with written(mark) as handle:
            json.dump({stage["file"]: stage["sha256"] for stage in made["stages"]}, handle)
    except OSError:
        pass  # a read-only home: the trial is made again next time


def _mark(name, made):
    text = "%s %s" % (backends.choose(name).describe(), " ".join(stage["sha256"] for stage in made["stages"]))
    return os.path.join(cache_home(), "loaded", hashlib.sha256(text.encode()).hexdigest()[:32])


def _run(session, stage):
    try:
        session.run(stage["name"], {tensor["name"]: np.zeros(tensor["shape"], tensor["dtype"]) for tensor in stage["inputs"]})
    except EdgeError:
        raise
    except Exception as exc:  # runtimes raise classes of their own
        raise BadFile("%s loads but does not run: %s. Export it again" % (stage["file"], str(exc).strip().splitlines()[0])) from exc


@guarded
def main(argv):
    engine, name = argv
    made, files = contract.load(engine)
    session = backends.choose(name, engine).Session(made, files)
    try:
        for stage in made["stages"]:
            for side in ("inputs", "outputs"):
                contract.check_tensors(stage, side, session.tensors(stage["name"], side))
            _run(session, stage)
    finally:
        session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
