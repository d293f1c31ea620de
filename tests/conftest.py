"""Shared fixtures: a tiny data set, the commands run as a user runs them, the real data when it is there."""
import ctypes
import gc
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.environ.get("NANOPATCH_DATA", os.path.join(os.path.dirname(ROOT), "shared", "data"))


@pytest.fixture(scope="module", autouse=True)
def given_back():
    """What a file's tests held goes back to the system: every later fork copies the tables of all that is resident."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def real_data(name):
    """Folder of a real set. Skips the test, saying so, when it is absent; in CI that is a failure."""
    path = os.path.join(DATA, name)
    if not os.path.isdir(path):
        message = "the real set %s is not here; set NANOPATCH_DATA to the folder that holds it" % name
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def command(*words, cwd=None, timeout=900, env=None):
    """Run `python -m words...` in a process of its own. Returns it, with stdout and stderr as text."""
    full = dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    full.update(env or {})
    done = subprocess.run([sys.executable, "-m"] + [str(w) for w in words], cwd=str(cwd) if cwd else None, env=full,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


PEAK = """
with open("/proc/self/status") as handle:
    print([line.split()[1] for line in handle if line.startswith("VmHWM")][0])
"""


def rest_slow(cases, keep=1):
    """Cases for parametrize, each a tuple of arguments: after the first `keep` they are slow tests."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * (number >= keep)) for number, case in enumerate(cases)]


# Trains `state` of `problem` on one batch: the end of programs for peaks_kib().
STEP = """
gradient = problem.gradient(state)
batch, rng = problem.batch(0, 0)
for _loss in gradient.rounds(batch, rng):
    pass
gradient.finish(config.clip)
state.optimizer.step(config.lr)
"""
LOOK = """
problem.evaluate(state.net, stored[:1])
"""
BLOCKS = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)  # for write_large(): quick to draw, write and read


def write_large(array, side, path):
    """Write an array as a PNG of side x side px, its pixels as blocks."""
    Image.fromarray(array).resize((side, side), Image.NEAREST).save(str(path), compress_level=1)


def peaks_kib(read, code, words, runs, between=lambda: None):
    """VmHWM of `runs` processes that run the Python `read` and `code` with `words`, sorted; before them one runs `read` alone, which puts
    images into the store. between() is called before each. Freed memory goes back at once: how much of it an allocator keeps is chance,
    up to 30 MiB."""
    env = dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="1048576")

    def said(program):
        between()
        return subprocess.check_output([sys.executable, "-c", program] + [str(word) for word in words], env=env)

    said(read)
    return sorted(int(said(read + code + PEAK)) for _ in range(runs))


def wait_for(condition, limit_s=30):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs; one that its new parent has not reaped yet does not."""
    try:
        with open("/proc/%d/stat" % pid) as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def write_set(folder, count=3, height=40, width=56, seed=0, classes=2):
    """A set in the layout images + masks: noise with a bright disc that the mask marks. Returns the folder's path."""
    rng = np.random.RandomState(seed)
    for kind in ("images", "masks"):
        os.makedirs(os.path.join(str(folder), kind), exist_ok=True)
    y, x = np.ogrid[:height, :width]
    for index in range(count):
        image = rng.randint(0, 90, (height, width, 3)).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        for value in range(1, classes):
            disc = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) < rng.uniform(6, 14)
            image[disc] = 120 + 100 * value // classes + image[disc] // 3
            mask[disc] = value
        Image.fromarray(image).save(os.path.join(str(folder), "images", "%02d.png" % index))
        Image.fromarray(mask).save(os.path.join(str(folder), "masks", "%02d.png" % index))
    return str(folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small trained and exported net: dict of folder, run, model, data. Made once, by the commands."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_set(folder / "set", count=5, height=96, width=120)
    done = command("train_lite", "--data", data, "--res", 120, "--patch", 48, "--overlap", 16, "--width", 4, "--epochs", 6,
                   "--lr", 3e-3, "--freeze-at", 0.5, "--name", "run", "--out", folder / "runs", cwd=folder)
    assert done.returncode == 0, done.stderr
    model = folder / "model.onnx"
    done = command("export", folder / "runs" / "run", "--out", model, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {"folder": folder, "run": folder / "runs" / "run", "model": model, "data": data}
