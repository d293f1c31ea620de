"""A run that is interrupted or killed, and resumed, ends with the bits of the run that was left alone."""
import json
import os
import random
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import ROOT, rest_slow, write_set
from train_lite import checkpoint

EPOCHS = 8
BATCHES = 4 * EPOCHS  # of a run: one per image that is trained on
SAMPLED = ("--patches", 2, "--inner", 2)
VARIANTS = {"sampled": SAMPLED, "accumulated": SAMPLED + ("--accumulation", 3, "--norm", "batch", "--freeze-at", 1), "exact": ("--gradient", "exact")}

# Runs train_lite with checkpoint writes that die. argv[1] counts the calls of fsync and replace on checkpoints: before the one with that number the process is killed. A file that awaits its fsync is cut in half
# first, as a power cut leaves it; a kill alone would leave it whole.
KILLED_WHILE_SAVING = """
import os, signal, stat, sys
from edge import command
from train_lite import checkpoint, run
left = [int(sys.argv.pop(1))]
class DyingOs:
    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("fsync", "replace"):
            return real
        def call(*args):
            if name == "replace" and "safetensors" not in args[0]:
                return real(*args)
            left[0] -= 1
            if left[0] == 0:
                if name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode):
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        return call
checkpoint.os = command.os = DyingOs()
sys.exit(run.main(sys.argv[1:]))
"""


PLAIN = "import sys; from train_lite import run; sys.exit(run.main(sys.argv[1:]))"

# Loads what a training loads, then forks for each line it reads, [folder, code, words], a process that runs the code as `python -c`
# would. Answers with its pid and, when it has ended, how. Has not trained itself: torch may refuse to in its forks.
FORKER = """
import json, os, sys
import PIL.Image, torch, tqdm
from train_lite import loop, optimizer, pictures, plan, run, state
for line in iter(sys.stdin.readline, ""):
    folder, code, words = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["-c"] + words
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(pid, flush=True)
    status = os.waitpid(pid, 0)[1]
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""


def environment():
    return dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS="1")  # one thread: two would be slower here


def start(folder, *words):
    """`python words...` in the background, output to folder/output.txt."""
    with open(str(folder / "output.txt"), "wb") as output:
        return subprocess.Popen([sys.executable] + [str(word) for word in words], cwd=str(folder), env=environment(),
                                stdout=output, stderr=subprocess.STDOUT)


class Forked:
    """`python -c code words...` in the background, forked by the process `forker`. As a Popen; one at a time."""

    def __init__(self, forker, folder, code, *words):
        self.forker, self.code = forker, None
        forker.stdin.write(json.dumps([str(folder), code, [str(word) for word in words]]).encode() + b"\n")
        self.pid = int(forker.stdout.readline())

    def wait(self, timeout=60):
        assert self.poll(timeout) is not None, "still running after %d s" % timeout
        return self.code

    def poll(self, timeout=0):
        if self.code is None and select.select([self.forker.stdout], [], [], timeout)[0]:
            self.code = int(self.forker.stdout.readline())
        return self.code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def to_the_end(folder, process):
    code = process.wait(timeout=600)
    text = (folder / "output.txt").read_text()
    assert code == 0, text
    return text


def new_run(data, name, variant="sampled", save_every=0):
    """The words of a new run. It freezes its norms in the middle, and validates, so that all of that is resumed."""
    return ["--data", data, "--res", 48, "--patch", 16, "--overlap", 4, "--width", 4,
            "--epochs", EPOCHS, "--threads", 1, "--save-every", save_every, "--out", "runs",
            "--freeze-at", 0.5, "--name", name] + list(VARIANTS[variant])


def resume(name):
    return ["--resume", os.path.join("runs", name)]


def steps_logged(folder, name):
    path = folder / "runs" / name / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_step(process, folder, name, step):
    """Returns once the log of the run holds `step` lines, or the process has ended."""
    deadline = time.time() + 300
    while process.poll() is None and steps_logged(folder, name) < step:
        assert time.time() < deadline
        time.sleep(0.002)


def table(run):
    """metrics.csv without what depends on the clock and the machine."""
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [i for i, column in enumerate(lines[0]) if column not in ("seconds", "peak_mib")]
    return [[line[i] for i in kept] for line in lines]


def assert_same(folder, name, reference):
    """All tensors bit-equal, and each step and epoch logged once."""
    ours, theirs = folder / "runs" / name, folder / "runs" / reference
    for file in ("last.safetensors", "best.safetensors"):
        (a, at), (b, bt) = checkpoint.read(str(ours / file)), checkpoint.read(str(theirs / file))
        assert sorted(a) == sorted(b) and len(a) > 10
        assert [key for key in b if not (a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]))] == []
        assert {key: value for key, value in at.items() if key != "config"} == {
            key: value for key, value in bt.items() if key != "config"}
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (ours, theirs)]
    assert [line["step"] for line in logs[0]] == list(range(1, len(logs[1]) + 1))
    assert logs[0] == logs[1]
    assert table(ours) == table(theirs) and len(table(ours)) == 1 + EPOCHS
    assert sorted(os.listdir(str(ours))) == sorted(os.listdir(str(theirs)))  # nothing half-written is left


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a set and uninterrupted runs in runs/VARIANT, made when first asked for."""
    folder = tmp_path_factory.mktemp("resume")
    write_set(folder / "set", count=5, height=48, width=40)
    return folder


@pytest.fixture(scope="module")
def forked(place):
    """forked(code, *words) starts a Forked: half of a start's seconds go into loading torch."""
    forker = subprocess.Popen([sys.executable, "-c", FORKER], env=environment(), stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, bufsize=0)  # a buffer may hold what select() waits for
    yield lambda code, *words: Forked(forker, place, code, *words)
    forker.stdin.close()
    assert forker.wait(timeout=60) == 0
    forker.stdout.close()


def command(place):
    """As `forked`, but what a user types: a process of its own, and the supervisor above it."""
    return lambda _code, *words: start(place, "-m", "train_lite", *words)


def uninterrupted(place, begin, variant="sampled"):
    if not (place / "runs" / variant).exists():
        to_the_end(place, begin(PLAIN, *new_run("set", variant, variant)))
    return variant


@pytest.mark.parametrize("variant, stop", rest_slow([
    ("exact", signal.SIGTERM), ("sampled", signal.SIGINT), ("accumulated", signal.SIGINT)]))
def test_interrupt_and_resume(variant, stop, place, forked):
    begin = command(place) if variant == "sampled" else forked
    reference, name = uninterrupted(place, begin, variant), "stopped-" + variant
    process = begin(PLAIN, *new_run("set", name, variant, save_every=60))
    wait_for_step(process, place, name, steps_logged(place, reference) // 2 + 1)  # in mid-epoch
    process.send_signal(stop)
    code, text = process.wait(timeout=120), (place / "output.txt").read_text()
    assert code == 130, text
    assert "Traceback" not in text and "--resume runs/" + name in text.replace(os.sep, "/")
    _tensors, meta = checkpoint.read(str(place / "runs" / name / "last.safetensors"))
    assert 0 < meta["step"] < steps_logged(place, reference)
    to_the_end(place, begin(PLAIN, *resume(name)))
    assert_same(place, name, reference)


@pytest.mark.slow
def test_resume_of_a_finished_run_changes_nothing(place, forked):
    reference = uninterrupted(place, forked)
    before = (place / "runs" / reference / "last.safetensors").read_bytes()
    to_the_end(place, forked(PLAIN, *resume(reference)))
    assert (place / "runs" / reference / "last.safetensors").read_bytes() == before


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(place, forked):
    """The run's config is there, nothing else: --resume begins at the beginning."""
    reference, name = uninterrupted(place, forked), "early"
    assert forked(KILLED_WHILE_SAVING, 1, *new_run("set", name)).wait(timeout=300) == -signal.SIGKILL
    left = os.listdir(str(place / "runs" / name))
    assert "config.json" in left and "last.safetensors" not in left
    to_the_end(place, forked(PLAIN, *resume(name)))
    assert_same(place, name, reference)


@pytest.mark.slow
def test_killed_inside_checkpoint_writes(place, forked):
    """At every moment of a write: file not synced, old one moved, new one not named, folder not synced."""
    reference, name = uninterrupted(place, forked), "saving"
    assert forked(KILLED_WHILE_SAVING, 6, *new_run("set", name)).wait(timeout=300) == -signal.SIGKILL
    for call in range(1, 10):
        process = forked(KILLED_WHILE_SAVING, call, *resume(name))
        assert process.wait(timeout=300) == -signal.SIGKILL, (call, (place / "output.txt").read_text())
    to_the_end(place, forked(PLAIN, *resume(name)))
    assert_same(place, name, reference)


@pytest.mark.slow
def test_a_damaged_generation_does_not_push_out_the_good_one(place, forked):
    """Last is damaged, resume takes the one before it. A kill inside the next write must not leave the damaged one."""
    reference, name = uninterrupted(place, forked), "damaged"
    assert forked(KILLED_WHILE_SAVING, 12, *new_run("set", name)).wait(timeout=300) == -signal.SIGKILL
    last = place / "runs" / name / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    assert forked(KILLED_WHILE_SAVING, 3, *resume(name)).wait(timeout=300) == -signal.SIGKILL
    to_the_end(place, forked(PLAIN, *resume(name)))
    assert_same(place, name, reference)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(place, forked):
    reference, name, rng = uninterrupted(place, forked), "killed", random.Random(7)
    words, kills = new_run("set", name), 0
    per_batch = steps_logged(place, reference) // BATCHES
    while kills < 20:
        before = steps_logged(place, name)
        if kills % 5 == 4:  # at any moment of a start: imports, reading the checkpoint, rewinding the logs
            process, moment = start(place, "-m", "train_lite.run", *words), time.time() + rng.uniform(0, 4)
            while time.time() < moment and steps_logged(place, name) <= before:  # a fast machine must not get to the end
                time.sleep(0.002)
        else:               # within the next two batches; their saves take a good part of the time
            process = forked(PLAIN, *words)
            wait_for_step(process, place, name, before + rng.randint(1, 2 * per_batch))
            time.sleep(rng.uniform(0, 0.03))
        process.kill()
        code = process.wait()
        assert code == -signal.SIGKILL, (place / "output.txt").read_text()
        kills += 1
        if (place / "runs" / name / "config.json").exists():
            words = resume(name)
    to_the_end(place, forked(PLAIN, *words))
    assert_same(place, name, reference)
