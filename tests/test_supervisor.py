"""`python -m train_lite` looks after the training in a child: it passes on how it ended, or goes on where it died."""
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import ROOT, alive, command, rest_slow, wait_for, write_set
from jetson.memory import field_mib, read_text
from train_lite import __main__ as supervisor
from train_lite import checkpoint
from train_lite.run import main

EPOCHS, STEPS = 2, 2 * 4 * 4  # 4 images to train on, --inner 4

# Becomes the child's sitecustomize. COUNT: starts of a training so far, of which this is one; at(): what a step does;
# later(): from the third start on, the child ends at once as the fault ended it twice, without the seconds that torch takes to load.
HOOK = """
import os, signal
if b"train_lite.run" in open("/proc/self/cmdline", "rb").read():
    with open(%(starts)r, "a") as handle:
        handle.write("x")
    COUNT = os.path.getsize(%(starts)r)
    def no_memory(*_args, **_more):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    def die(*_args, **_more):
        os.kill(os.getpid(), signal.SIGKILL)
    def at(number, act):
        from train_lite import loop
        real = loop.step
        def step(problem, run, state, gradient, loss):
            if state.step + 1 == number:
                act()
            return real(problem, run, state, gradient, loss)
        loop.step = step
    def later(fault):
        if COUNT > 2:
            from train_lite.config import RETRY_SMALLER
            die() if fault == die else os._exit(RETRY_SMALLER)
    %(code)s
"""


def start(folder, *words, hook="", within=()):
    """The command in the background; its output goes to folder/output.txt. hook: a line of code for the child;
    within: a command that starts the command."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK % {"starts": str(folder / "starts"), "code": hook or "pass"})
    if (folder / "starts").exists():
        (folder / "starts").unlink()
    env = dict(os.environ, PYTHONPATH=str(folder / "hook") + os.pathsep + ROOT, OMP_NUM_THREADS="1")
    with open(str(folder / "output.txt"), "wb") as output:
        words = list(within) + [sys.executable, "-m", "train_lite"] + [str(word) for word in words]
        return subprocess.Popen(words, cwd=str(folder), env=env, stdout=output, stderr=subprocess.STDOUT)


def ended(folder, process, timeout=120):
    """(exit code, output, number of trainings started). A supervisor that does not end is stopped."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        pytest.fail("still running after %d s: %s" % (timeout, (folder / "output.txt").read_text()[-2000:]))
    return code, (folder / "output.txt").read_text(), os.path.getsize(str(folder / "starts"))


def new_run(name, *more):
    return ("--data", "set", "--res", 128, "--patch", 64, "--overlap", 8, "--width", 4, "--patches", 2, "--inner", 4,
            "--epochs", EPOCHS, "--threads", 1, "--save-every", 0, "--out", "runs", "--name", name) + more


def logged(folder, name):
    return [json.loads(line) for line in read_text(str(folder / "runs" / name / "log.jsonl")).splitlines(True)
            if line.endswith("\n")]


def child_at(folder, name, step, process):
    """The pid of the training of a run, once it has logged `step` steps."""
    deadline = time.time() + 120
    while len(logged(folder, name)) < step:
        assert process.poll() is None and time.time() < deadline, (folder / "output.txt").read_text()
        time.sleep(0.01)
    return int((folder / "runs" / name / "lock").read_text())


def micro_batch(folder, name):
    return json.loads((folder / "runs" / name / "config.json").read_text())["micro_batch"]


def tensors(folder, name):
    return checkpoint.read(str(folder / "runs" / name / "last.safetensors"))[0]


def assert_same(folder, name, reference="reference"):
    a, b = tensors(folder, name), tensors(folder, reference)
    assert sorted(a) == sorted(b) and len(a) > 10
    assert all(a[key].tobytes() == b[key].tobytes() for key in b)
    assert logged(folder, name) == logged(folder, reference) and len(logged(folder, name)) == STEPS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a set and an undisturbed run `reference`."""
    folder = tmp_path_factory.mktemp("supervisor")
    write_set(folder / "set", count=5, height=128, width=120)
    code, text, starts = ended(folder, start(folder, *new_run("reference")))
    assert code == 0 and starts == 1, text
    return folder


@pytest.mark.parametrize("stop", rest_slow([(signal.SIGINT,), (signal.SIGTERM,)]))
def test_interrupt(stop, place):
    """Also: the parent holds neither torch nor numpy, and next to no memory."""
    name = "stopped-%d" % stop
    process = start(place, *new_run(name))
    child = child_at(place, name, 5, process)
    assert child != process.pid and "libtorch" in read_text("/proc/%d/maps" % child)
    maps = read_text("/proc/%d/maps" % process.pid)
    assert "libc" in maps and not re.search("torch|numpy|openblas", maps)
    assert field_mib(read_text("/proc/%d/status" % process.pid), "VmRSS") < 30
    process.send_signal(stop)
    code, text, starts = ended(place, process)
    assert code == 130 and starts == 1 and "Traceback" not in text, text
    assert "python -m train_lite --resume runs/%s" % name in text
    code, text, _starts = ended(place, start(place, "--resume", "runs/" + name))
    assert code == 0, text
    assert_same(place, name)


@pytest.mark.slow
def test_exit_codes_of_the_child_pass_through(place, monkeypatch, capsys):
    """The child's own are those of its main() in this process."""
    monkeypatch.chdir(place)
    write_set(place / "broken", count=3)
    (place / "broken" / "images" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    for words, want in ((("--width", 3), 2), (("--resume", "nowhere"), 2), (("--data", "broken", "--out", "runs"), 5),
                        (("--data", "absent"), None), (new_run("reference"), 2)):
        done = command("train_lite", *words, cwd=place)
        theirs = main([str(word) for word in words])
        assert done.returncode == theirs in (2, 5), (words, done.stderr)
        assert "error: " in done.stderr and done.stderr.splitlines()[-1] == capsys.readouterr().err.splitlines()[-1]
        assert want in (None, done.returncode)


@pytest.mark.slow
def test_a_killed_child_is_started_again(place):
    name = ".[killed]"  # as good a name as any other
    process = start(place, *new_run(name))
    os.kill(child_at(place, name, 6, process), signal.SIGKILL)
    code, text, starts = ended(place, process)
    assert code == 0 and starts == 2, text
    assert "the training was killed; going on from its last checkpoint\n" in text and "smaller" not in text
    assert micro_batch(place, name) == micro_batch(place, "reference")
    assert_same(place, name)


def test_what_a_child_is_told_after_it_died(monkeypatch):
    """It goes on below the levers of the run that it held; one that died before it held the run counts on from the last order."""
    ends = [(supervisor.RETRY_SMALLER, ""), (supervisor.RETRY_SMALLER, "runs/a"), (supervisor.RETRY_SMALLER, ""), (-signal.SIGKILL, "runs/a"), (0, "")]
    told, kills = [], iter([{}] * 3 + [{"machine": 1}] * 9)
    monkeypatch.setattr(supervisor, "_run", lambda words: told.append(words) or ends[len(told) - 1])
    monkeypatch.setattr(supervisor, "oom_kills", lambda: next(kills))
    monkeypatch.setattr(supervisor, "_saved", lambda _folder: len(told))  # each gets further
    assert supervisor.main(["--budget", "4GB", "--width", "8"]) == 0
    asked, resumed = ["--budget", "4GB", "--width", "8"], ["--resume", "runs/a", "--budget", "4GB"]
    assert told == [asked, asked + ["--smaller", "1"], resumed + ["--smaller", "1"], resumed + ["--smaller", "2"], resumed + ["--smaller", "0"]]


def test_a_child_that_dies_of_a_fault_is_named(monkeypatch, capsys):
    """On a Nano without OPENBLAS_CORETYPE numpy does; the shell says nothing of a grandchild."""
    for code, held, said in ((-signal.SIGILL, "", "OPENBLAS_CORETYPE=ARMV8"), (-signal.SIGSEGV, "runs/a", "SIGSEGV). Go on: python -m train_lite --resume runs/a"),
                             (-signal.SIGABRT, "", "--debug")):
        monkeypatch.setattr(supervisor, "_run", lambda words: (code, held))
        assert supervisor.main([]) == 128 - code and said in capsys.readouterr().err
    monkeypatch.setattr(supervisor, "_run", lambda words: (-signal.SIGTERM, ""))
    assert supervisor.main([]) == 143 and not capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["SIGTERM", "SIGHUP"])
def test_a_stop_before_the_training_begins(stop, place):
    hook = "from train_lite.data import dataset; dataset.find_pairs = lambda *_args: os.kill(os.getpid(), signal.%s)" % stop
    code, text, starts = ended(place, start(place, *new_run("never-" + stop), hook=hook))
    assert code == 130 and starts == 1 and "interrupted" in text, text


@pytest.mark.slow
def test_names_beyond_ascii_in_the_c_locale(tmp_path):
    """As under systemd, which sets no LANG; Python 3.6 then takes files to be called in ASCII."""
    write_set(tmp_path / "set", count=3, height=128, width=120)
    (tmp_path / "set" / "images" / "00.png").rename(tmp_path / "set" / "images" / "naïve.png")
    lines = ["images/%s.png,masks/%02d.png" % (name, at) for at, name in enumerate(("naïve", "01", "02"))]
    (tmp_path / "set" / "pairs.csv").write_bytes("\n".join(["image,mask"] + lines).encode())
    process = start(tmp_path, *new_run("c", "--val-share", 0), within=["env", "-u", "LANG", "-u", "LC_CTYPE", "LC_ALL=C"])
    code, text, _starts = ended(tmp_path, process)
    assert code == 0, text


@pytest.mark.slow
def test_ctrl_c_beside_a_reader_that_ends_too(place):
    """`2>&1 | tee log`: the terminal stops both. The training is saved all the same, and says 130."""
    process = subprocess.Popen([sys.executable, "-m", "train_lite"] + [str(word) for word in new_run("piped")], cwd=str(place), stderr=subprocess.PIPE,
                               env=dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS="1"))
    deadline = time.time() + 120
    while len(logged(place, "piped")) < 5:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    steps = len(logged(place, "piped"))
    assert ended(place, start(place, "--resume", "runs/piped"))[0] == 0 and 5 <= steps < STEPS
    assert_same(place, "piped")
    text = (place / "output.txt").read_text()
    assert "going on after step %d" % steps in text, text


@pytest.mark.slow
def test_a_killed_supervisor_takes_its_child_with_it(place):
    process = start(place, *new_run("orphan"))
    child = child_at(place, "orphan", 5, process)
    process.kill()
    process.wait()
    deadline = time.time() + 2
    while re.search(r"^State:\s+[^Z]", read_text("/proc/%d/status" % child), re.M):
        assert time.time() < deadline, "the training goes on without its supervisor"
        time.sleep(0.02)
    code, text, _starts = ended(place, start(place, "--resume", "runs/orphan"))
    assert code == 0, text
    assert_same(place, "orphan")


@pytest.mark.slow
def test_out_of_memory_goes_on_one_notch_smaller(place):
    code, text, starts = ended(place, start(place, *new_run("short"), hook="if COUNT == 1: at(7, no_memory)"))
    assert code == 0 and starts == 2, text
    assert "ran out of memory; going on from its last checkpoint, one notch smaller" in text
    assert micro_batch(place, "reference") == 8 and micro_batch(place, "short") == 4
    ours, theirs = logged(place, "short"), logged(place, "reference")
    assert all(a[key] == b[key] for a, b in zip(ours, theirs) for key in ("step", "epoch", "lr"))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert np.allclose([row["loss"] for row in ours], [row["loss"] for row in theirs], rtol=1e-3)  # the same patches


@pytest.mark.slow
def test_when_every_notch_fails_it_says_so(place):
    """micro-batch 2, 1, tight, adamw8: four starts, and a fifth that finds nothing smaller."""
    process = start(place, *new_run("never", "--micro-batch", 2), hook="at(1, no_memory)")
    code, text, starts = ended(place, process)
    assert code == 3 and starts == 5, text
    assert text.count("one notch smaller") == 4 and "Traceback" not in text
    assert text.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_killed_again_and_again_it_gives_up(place):
    code, text, starts = ended(place, start(place, *new_run("fruitless"), hook="later(die); at(1, die)"))
    assert code == 3 and starts == supervisor.FRUITLESS + 1, text
    assert "without getting further" in text and "--resume runs/" in text


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die", "no_memory"])
def test_dead_before_there_is_a_run_it_gives_up(fault, place):
    hook = "later({0}); from train_lite.data import dataset; dataset.find_pairs = {0}".format(fault)
    process = start(place, *new_run("early-" + fault, "--micro-batch", 2), hook=hook)
    code, text, starts = ended(place, process, timeout=100)
    assert code == 3 and starts <= 8, text
    assert not re.search(r"--resume\s*$", text), text


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die", "no_memory"])
def test_a_resumed_run_that_fails_at_once_gives_up(fault, place):
    """Before its config.json holds the smaller levers."""
    name = "again-" + fault
    process = start(place, *new_run(name))
    os.kill(child_at(place, name, 3, process), signal.SIGINT)
    assert ended(place, process)[0] == 130
    hook = "later({0}); from train_lite.tasks import segmentation; segmentation.Segmentation.__init__ = {0}".format(fault)
    code, text, starts = ended(place, start(place, "--resume", "runs/" + name, hook=hook), timeout=100)
    assert code == 3 and starts <= 8, text


def test_a_pause_is_one_for_the_training_too(place):
    """Ctrl-Z and fg."""
    process = start(place, *new_run("pause"))
    child = child_at(place, "pause", 3, process)

    def states():
        return {read_text("/proc/%d/stat" % pid).rpartition(")")[2].split()[0] for pid in (process.pid, child)}

    for number, wanted in ((signal.SIGTSTP, {"T"}), (signal.SIGCONT, set("RSD"))):
        os.kill(process.pid, number)
        wait_for(lambda: states() <= wanted, 5)
    assert ended(place, process)[0] == 0


def nano_sim(*words):
    return subprocess.run([sys.executable, os.path.join(ROOT, "scripts", "nano-sim")] + list(words), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, timeout=60)


def test_nano_sim_says_what_is_wrong(tmp_path):
    for words, said in ((["no-such-command"], "no command no-such-command"), ([], "what to run is missing"),
                        (["--swap-folder", str(tmp_path / "none"), "true"], "is no folder"), (["--memory", "4 apples", "true"], "apples"),
                        (["--idle", "5GB", "true"], "--idle 5GB leaves"), (["--memory", "1MB", "true"], "16 MiB or more"),
                        (["--swap", "100kB", "true"], "1MiB or more"), (["--python", "/none/python", "true"], "is no program"),
                        (["--json", str(tmp_path / "none" / "a.json"), "true"], "cannot write --json")):
        done = nano_sim(*words)
        assert done.returncode == 2 and said in done.stdout and "Traceback" not in done.stdout, done.stdout


def test_nano_sim_leaves_nothing(tmp_path):
    """What a command leaves running ends with it, and so does the group."""
    done = nano_sim("--memory", "100MiB", "--swap", "0", "--json", str(tmp_path / "facts.json"), "sh", "-c", "sleep 100 & cat /proc/self/cgroup; exit 3")
    if "cannot make a memory control group" in done.stdout:
        pytest.skip("no memory control groups here: %s" % done.stdout.strip())
    assert done.returncode == 3 and "Traceback" not in done.stdout, done.stdout
    group = re.search(r"nano-sim-\d+", done.stdout).group(0)
    assert not glob.glob("/sys/fs/cgroup/**/" + group, recursive=True)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["simulated"] and facts["limit_mib"] == 100 and facts["oom_kills"] == 0


def test_nano_sim_killed_leaves_nothing_for_long(tmp_path):
    """Its command ends with it; group and swap file when it is run again."""
    told, words = tmp_path / "told", ["--memory", "100MiB", "--swap", "1MiB", "--swap-folder", str(tmp_path)]
    with open(str(told), "wb") as out:
        first = subprocess.Popen([sys.executable, os.path.join(ROOT, "scripts", "nano-sim")] + words + [
            "sh", "-c", "echo $$; cat /proc/self/cgroup; exec sleep 100"], stdout=out, stderr=subprocess.STDOUT)
    wait_for(lambda: first.poll() is not None or told.read_text().count("\n") > 2, 10)
    if first.poll() is not None:
        pytest.skip("no memory control groups or swap here: %s" % told.read_text().strip())
    first.kill()
    first.wait()
    pid, group = int(told.read_text().split()[0]), re.search(r"nano-sim-\d+", told.read_text()).group(0)
    done = nano_sim(*words + ["true"])
    assert done.returncode == 0, done.stdout
    assert not alive(pid) and not glob.glob("/sys/fs/cgroup/**/" + group, recursive=True)
    with open("/proc/swaps") as swaps:
        assert os.listdir(str(tmp_path)) == ["told"] and str(tmp_path) not in swaps.read()


@pytest.mark.slow
def test_killed_by_the_kernel_goes_on_one_notch_smaller(place):
    """The first training takes 900 MiB at its seventh step, in a control group of 700 MiB."""
    group = [sys.executable, os.path.join(ROOT, "scripts", "nano-sim"), "--memory", "700MiB", "--swap", "0"]
    tried = subprocess.run(group + ["true"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if tried.returncode:
        pytest.skip("no memory control groups here: %s" % tried.stdout.decode().strip())
    hook = "if COUNT == 1: at(7, lambda: [bytearray(b'x' * (1 << 20)) for _ in range(900)])"
    code, text, starts = ended(place, start(place, *new_run("kernel"), hook=hook, within=group))
    assert code == 0 and starts == 2, text
    assert "was killed by the kernel, for want of memory; going on from its last checkpoint, one notch smaller" in text
    assert re.search(r"[1-9]\d* kernel kills", text) and micro_batch(place, "kernel") == 4
    assert [row["step"] for row in logged(place, "kernel")] == list(range(1, STEPS + 1))
