"""Train a net on images of any size, patch by patch. Without --data: makes a demo set and trains on it.

This process holds no torch. It starts the training (train_lite.run) and goes on with it from its last checkpoint when it
is killed, one notch smaller when that was for want of memory."""
import ctypes
import glob
import os
import signal
import subprocess
import sys

from edge.command import guarded, parse, say
from edge.errors import OverBudget
from jetson.memory import oom_kills, read_text
from train_lite.config import CHOICES, HELPS, RETRY_SMALLER, TrainConfig, check

FRUITLESS = 3        # times in a row that a training may be killed without a new checkpoint before we give up
FRUITLESS_SHORT = 7  # the same when memory was short: it has that many notches to go down


@guarded
def main(argv):
    config = parse(TrainConfig, argv, "python -m train_lite", __doc__.splitlines()[0], HELPS, CHOICES)
    check(config)
    words, folder, smaller, fruitless, progress = argv, config.resume, config.smaller, 0, None
    while True:
        kills = oom_kills()
        pid, code = _run(words)
        if code not in (RETRY_SMALLER, -signal.SIGKILL):
            return code if code >= 0 else 128 - code
        folder = _folder_of(config.out, pid) or folder
        short = code == RETRY_SMALLER or not kills or oom_kills() != kills
        saved = _saved(folder)
        fruitless, progress = fruitless + 1 if saved == progress else 1, saved
        if fruitless > (FRUITLESS_SHORT if short else FRUITLESS):
            raise OverBudget("the training %s %d times without getting further. %s" % (
                "ran out of memory" if short else "was killed", fruitless,
                "Go on by hand: python -m train_lite --resume %s" % folder if folder else
                "See what takes the memory: python -m jetson doctor; then type the command again"))
        if folder:  # its config.json holds the levers it ran with: one below those
            words = ["--resume", folder, "--smaller", str(int(short))] + [w for w in argv if w in ("--json", "--debug")]
        else:
            smaller += int(short)
            words = argv + ["--smaller", str(smaller)]
        say("the training %s; %s%s" % (
            "ran out of memory" if code == RETRY_SMALLER else "was killed by the kernel, for want of memory" if short
            else "was killed", "going on from its last checkpoint" if folder else "starting again",
            ", one notch smaller" if short else ""))


def _run(words):
    """Train in a child until it ends. Returns (pid, exit code; negative: the signal that killed it)."""
    libc = ctypes.CDLL(None)

    def prepare():
        os.setpgid(0, 0)           # Ctrl-C in a terminal reaches us only; we pass it on, once
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no training without its supervisor

    child = subprocess.Popen([sys.executable, "-m", "train_lite.run"] + words, preexec_fn=prepare)
    before = [(number, signal.signal(number, lambda got, _frame: child.send_signal(got)))
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]  # ignored: nohup
    try:
        return child.pid, child.wait()
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _folder_of(out, pid):
    """The run folder that the process `pid` made and held, '' when it did not get so far."""
    for lock in glob.glob(os.path.join(out, "*", "lock")):
        if read_text(lock).strip() == str(pid) and not os.path.islink(os.path.dirname(lock)):  # not `last`
            return os.path.dirname(lock)
    return ""


def _saved(folder):
    """When a run folder's checkpoint was last written, None without."""
    try:
        return os.stat(os.path.join(folder, "last.safetensors")).st_mtime
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
