"""The first load of a model file that this machine has not seen: in a child process with limits, so that a file which
crashes a runtime, or eats memory or time, ends the child and not a robot.

    python -m edge.trial ENGINE BACKEND SECONDS"""
import functools
import hashlib
import json
import math
import operator
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from edge import backends, contract
from edge.command import cache_home, guarded, written
from edge.errors import BadFile, EdgeError, EngineMismatch, OverBudget, UsageError
from jetson.memory import field_mib, read_text

BY_CODE = {error.exit_code: error for error in (UsageError, OverBudget, EngineMismatch)}
WAIT_S = 300      # what a child may wait besides computing: a card that reads a large plan
OWN_MIB = {"ort": 256, "trt": 2048}  # of Python and the runtime, before any file
LEFT_MIB = 64     # of memory and swap, which the rest of the machine keeps
LOOK_S = 0.02     # between looks at a child: it touches 20 to 100 MB in that time


def limits(engine, name, made):
    """(MiB, CPU seconds) within which the backend called `name` must load the model `engine` and run it once on zeros.
    made: its contract."""
    stages = made["stages"]
    shapes = [tensor["shape"] for stage in stages for tensor in stage["inputs"] + stage["outputs"]]
    files = _mib(sum(os.path.getsize(os.path.join(os.path.dirname(engine), stage["file"])) for stage in stages))
    tensors = _mib(sum(functools.reduce(operator.mul, shape, 4) for shape in shapes))
    megapixels = _mib(max(shape[0] * shape[-2] * shape[-1] for shape in shapes))
    # U-Nets and DeepLabs of this package hold up to 3 times their files and tensors, and per pixel what grows with their
    # width, the root of their size: 260 bytes at 1 MiB. Thrice that, and the time of a slow core thrice, is allowed
    return (OWN_MIB[name] + 10 * (files + tensors) + 800 * megapixels * math.sqrt(files),
            min(3600, int(30 + 0.2 * (files + tensors) + 10 * megapixels * files)))


def _mib(count):
    """count / 2^20, of an int of any size: a contract may hold one that no float does."""
    return min(count, 1 << 50) / 2.0 ** 20


def demand(engine, name, made):
    """Raise what is wrong with the files of the model `engine` when the backend called `name` loads and runs them once on
    zeros. made: its contract. Files that passed are remembered by their hashes."""
    mark = _mark(name, made)
    if os.path.exists(mark):
        return
    most_mib, most_s = limits(engine, name, made)
    command = [sys.executable, "-m", "edge.trial", engine, name, str(most_s)]
    code, words, held, ended = watched(command, most_mib, most_s + WAIT_S)
    if ended == "memory":
        raise BadFile("%s took %.0f MiB to load and run once, expected at most %.0f of a file and tensors of this size: it is "
                      "damaged or hostile. Export it again" % (engine, held, most_mib))
    if ended == "time" or code == -signal.SIGXCPU:
        raise BadFile("%s did not load and run once within %d s, expected of a file and tensors of this size: it is "
                      "damaged or hostile. Export it again" % (engine, most_s + WAIT_S if ended else most_s))
    if code == -signal.SIGKILL:
        raise OverBudget("%s killed the process that loaded %s at %.0f MiB: not enough memory. Close other programs, or add "
                         "swap: sudo python3 -m jetson setup --apply" % ("we" if ended else "the kernel", engine, held))
    if code < 0:
        raise BadFile("%s crashed the process that loaded it (signal %d): it is damaged or hostile. Export it again"
                      % (engine, -code))
    if code:
        raise BY_CODE.get(code, BadFile)(words.rpartition("error: ")[2] or "%s does not load" % engine)
    passed(name, made)


def watched(words, most_mib, most_s):
    """Run the command `words` until it ends, holds more than most_mib, most_s seconds are over or the machine's memory is.
    Returns (exit status, stderr, largest MiB held, why it was ended: 'memory', 'time', 'machine' or '')."""
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
        began, held, ended = time.monotonic(), 0.0, ""
        try:
            while child.poll() is None and not ended:
                time.sleep(LOOK_S)
                status, machine = read_text("/proc/%d/status" % child.pid), read_text("/proc/meminfo")
                peak, now, swapped = (field_mib(status, key) or 0 for key in ("VmHWM", "VmRSS", "VmSwap"))
                held = max(held, peak, now + swapped)  # the kernel's peak: what came and went between two looks counts too
                left = field_mib(machine, "MemAvailable")
                if held > most_mib:
                    ended = "memory"
                elif left is not None and left + (field_mib(machine, "SwapFree") or 0) < LEFT_MIB:
                    ended = "machine"  # what a GPU takes of a Jetson's memory is in no process
                elif time.monotonic() - began > most_s:
                    ended = "time"
        finally:  # Ctrl-C too
            if child.poll() is None:
                child.kill()
            child.wait()
        errors.seek(0)
        return child.returncode, errors.read().decode(errors="replace").strip(), held, ended


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
        session.run(stage["name"], {tensor["name"]: np.zeros(tensor["shape"], tensor["dtype"])
                                    for tensor in stage["inputs"]})
    except EdgeError:
        raise
    except Exception as exc:  # runtimes raise classes of their own
        words = str(exc).strip() or type(exc).__name__
        raise BadFile("%s loads but does not run: %s. Export it again" % (stage["file"], words.splitlines()[0])) from exc


def _limit_myself(most_s):
    """CPU seconds, no core file of a crash, and first in line when the kernel wants memory."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (most_s if hard == resource.RLIM_INFINITY else min(most_s, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/oom_score_adj", "w") as handle:
            handle.write("1000")
    except OSError:
        pass


@guarded
def main(argv):
    engine, name = argv[:2]
    _limit_myself(int(argv[2]))
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
