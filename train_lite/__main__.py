"""Train a net on images of any size, patch by patch. Without --data: makes a demo set and trains on it.

This process holds no torch. It starts the training (train_lite.run) and goes on with it from its last checkpoint when it
is killed, one notch smaller when that was for want of memory."""
import os
import signal
import subprocess
import sys

from edge.command import end_with_parent, guarded, on_signals, parse, say
from edge.errors import OverBudget
from jetson.memory import oom_kills
from train_lite.config import CHOICES, HELPS, RETRY_SMALLER, RUN_PIPE, TrainConfig, check

FRUITLESS = 3        # times in a row that a training may be killed without a new checkpoint before we give up
FRUITLESS_SHORT = 15  # the same when memory was short in the training itself: more notches than plan.ladder() ever has

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ILLEGAL = ("A package was built for another processor. On a Nano that is numpy's OpenBLAS; type: export OPENBLAS_CORETYPE=ARMV8, then the "
           "command again")


@guarded
def main(argv):
    config = parse(TrainConfig, argv, "python -m train_lite", __doc__.splitlines()[0], HELPS, CHOICES)
    check(config)
    words, folder, smaller, fruitless, progress = argv, config.resume, config.smaller, 0, None
    while True:
        kills = oom_kills()
        code, held = _run(words)
        if code not in (RETRY_SMALLER, -signal.SIGKILL):
            if code < 0 and -code not in STOPS:  # nobody else would say it: it is not the shell's child
                say("error: the training died of signal %d (%s). %s" % (-code, signal.Signals(-code).name, ILLEGAL if code == -signal.SIGILL else
                    "Go on: python -m train_lite --resume %s" % held if held else "Type the command again with --debug and report it"))
            return code if code >= 0 else 128 - code
        folder = held or folder
        short = code == RETRY_SMALLER or not kills or oom_kills() != kills
        saved = _saved(folder)
        fruitless, progress = fruitless + 1 if saved == progress else 1, saved
        if fruitless > (FRUITLESS_SHORT if short and held else FRUITLESS):
            raise OverBudget("the training %s %d times without getting further. %s" % (
                "ran out of memory" if short else "was killed", fruitless,
                "Go on by hand: python -m train_lite --resume %s" % folder if folder else
                "See what takes the memory: python -m jetson doctor; then type the command again"))
        smaller = (0 if held else smaller) + int(short)  # the config.json of a run that was held has the levers it ran with
        words = ["--resume", folder] + _own_words(config) if folder else argv
        words = words + ["--smaller", str(smaller)]
        say("the training %s; %s%s" % (
            "ran out of memory" if code == RETRY_SMALLER else "was killed by the kernel, for want of memory" if short
            else "was killed", "going on from its last checkpoint" if folder else "starting again",
            ", one notch smaller" if short else ""))


def _own_words(config):
    """The flags that a command which goes on with a run may have."""
    words = [word for flag, value in (("--data", config.data), ("--budget", config.budget)) if value for word in (flag, value)]
    return words + [flag for flag, on in (("--json", config.json), ("--debug", config.debug)) if on]


def _run(words):
    """Train in a child until it ends. Returns (exit code; negative: the signal that killed it, the run folder that it held last, '' when
    it did not get so far)."""
    def prepare():
        os.setpgid(0, 0)           # Ctrl-C in a terminal reaches us only; we pass it on, once
        end_with_parent()          # no training without its supervisor

    reading, writing = os.pipe()
    env = dict(os.environ, **{RUN_PIPE: str(writing)})
    if sys.getfilesystemencoding() == "ascii":  # Python 3.6 in the C locale, as under systemd: files of other names are not found
        env["LC_ALL"] = "C.UTF-8"
    child = subprocess.Popen([sys.executable, "-m", "train_lite.run"] + words, preexec_fn=prepare, pass_fds=[writing], env=env)
    os.close(writing)

    def pause(_number, _frame):  # Ctrl-Z
        child.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # until somebody types fg or bg
        child.send_signal(signal.SIGCONT)

    with on_signals(lambda got, _frame: child.send_signal(got), *STOPS), on_signals(pause, signal.SIGTSTP), open(reading, "rb", 0) as told:
        code = child.wait()
        os.set_blocking(reading, False)  # what it left running may hold the other end
        said = told.read(1 << 16) or b""
    return code, os.fsdecode(said).rpartition("\0")[0].rpartition("\0")[2]


def _saved(folder):
    """When a run folder's checkpoint was last written, None without."""
    try:
        return os.stat(os.path.join(folder, "last.safetensors")).st_mtime
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
