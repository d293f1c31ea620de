"""runs/train/NAME/: config.json, log.jsonl, metrics.csv, last, best, curves.png, samples/. `runs/train/last` points
at the newest run."""
import csv
import fcntl
import json
import os
import time

from edge.command import fitting_name, say, written
from edge.errors import UsageError
from train_lite import pictures
from train_lite.config import RUN_PIPE

COLUMNS = ("epoch", "step", "loss", "lr", "seconds", "peak_mib")  # of every task; then come its own


class RunFolder:
    """Paths and logs of one run."""

    def __init__(self, path):
        self.path = path = os.path.normpath(path)  # of runs/train/NAME/ too: its last part is its name
        self.config, self.last, self.best = (os.path.join(path, name) for name in (
            "config.json", "last.safetensors", "best.safetensors"))
        self.rows = []
        self._log = None

    @classmethod
    def create(cls, config, title):
        """A new folder for `config`, held. Raises UsageError when its name is taken."""
        run = cls(os.path.join(config.out, config.name or _dated(title)))
        while not config.name and os.path.exists(run.path):  # by one that began in this second
            time.sleep(0.1)
            run = cls(os.path.join(config.out, _dated(title)))
        if run.begun():
            raise UsageError("the run %s exists. Go on with it: --resume %s, or take another --name" % (run.path, run.path))
        os.makedirs(os.path.join(run.path, "samples"), exist_ok=True)
        run.hold()
        run.keep(config)
        return run

    def begun(self):
        """Whether a training was begun in it."""
        return os.path.isfile(self.config)

    def keep(self, config):
        """Write config.json: with a later start's levers, when it had to take smaller ones."""
        with written(self.config) as handle:
            json.dump(config._replace(resume="", smaller=0)._asdict(), handle, indent=1)

    def hold(self):
        """Keep other processes out of this run until we end, however we end. Raises UsageError when one is in it."""
        self._lock = open(os.path.join(self.path, "lock"), "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise UsageError("another process is training in %s; wait for it, or stop it first" % self.path) from exc
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))  # for who wonders which process it is
        self._lock.flush()
        for name in os.listdir(self.path):  # what a killed process was writing
            if name.endswith(".part"):
                os.remove(os.path.join(self.path, name))

    def announce(self):
        """Tell the supervisor, where there is one, which run it goes on with should this process die."""
        if RUN_PIPE in os.environ:
            os.write(int(os.environ[RUN_PIPE]), os.fsencode(self.path) + b"\0")

    def release(self):
        """Let others in."""
        self._lock.truncate(0)
        self._lock.close()

    def point_last(self):
        """Make `last` beside the run point at it."""
        link = os.path.join(os.path.dirname(self.path), "last")
        if os.path.lexists(link) and not os.path.islink(link):
            return  # a run of the user's that is called last
        part = "%s.%d.part" % (link, os.getpid())
        os.symlink(os.path.basename(self.path), part)
        os.replace(part, link)

    def rewind(self, step, epoch):
        """Drop what the logs say beyond a checkpoint that a resumed run starts from."""
        table = os.path.join(self.path, "metrics.csv")
        if os.path.exists(table):
            try:
                with open(table, newline="", encoding="utf-8") as handle:
                    read = [{key: float(v) for key, v in row.items() if v} for row in csv.DictReader(handle)]
                self.rows = [dict(row, epoch=int(row["epoch"]), step=int(row["step"])) for row in read if row["epoch"] <= epoch]
            except (ValueError, KeyError, TypeError) as exc:  # saved by a spreadsheet in its own way
                os.replace(table, table + ".old")
                say("warning: %s is not as it was written (%s): kept as %s.old, its rows begin anew" % (table, exc, table))
        log = os.path.join(self.path, "log.jsonl")
        kept = []
        if os.path.exists(log):
            with open(log, encoding="utf-8") as handle:
                for line in handle:
                    try:
                        if json.loads(line)["step"] <= step:
                            kept.append(line)
                    except (ValueError, KeyError):  # the line that a kill cut short
                        break
        with written(log) as handle:
            handle.writelines(kept)

    def log(self, **facts):
        """One line in log.jsonl."""
        if self._log is None:
            self._log = open(os.path.join(self.path, "log.jsonl"), "a", encoding="utf-8")
        self._log.write(json.dumps(facts, sort_keys=True) + "\n")
        self._log.flush()

    def add_epoch(self, row, columns, curves):
        """One row in metrics.csv, and the curves drawn again. row: dict with COLUMNS and the task's `columns`, absent where
        unknown; curves: (column, title) of those that are drawn beside the loss."""
        self.rows.append(row)
        with written(os.path.join(self.path, "metrics.csv"), newline="") as handle:
            writer = csv.DictWriter(handle, COLUMNS + columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        pictures.curves(self.rows, (("loss", "training loss"),) + curves, os.path.join(self.path, "curves.png"))

    def sample(self, name):
        return os.path.join(self.path, "samples", fitting_name(name.replace("/", "_")) + ".png")


def _dated(title):
    return "%s-%s" % (title, time.strftime("%Y%m%d-%H%M%S"))
