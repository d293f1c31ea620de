"""Trainings for tables: each is done once, and a table that was stopped goes on."""
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def summary(out, name, words):
    """What the training with the flags `words`, run folder OUT/NAME, said at its end; what it prints is in OUT/NAME.txt."""
    os.makedirs(out, exist_ok=True)
    run, log = os.path.join(os.path.abspath(out), name), os.path.join(out, name + ".txt")
    path = os.path.join(run, "summary.json")
    if not os.path.exists(path):
        begun = os.path.exists(os.path.join(run, "config.json"))
        flags = ["--resume", run] if begun else ["--out", os.path.abspath(out), "--name", name] + [str(word) for word in words]
        with open(log, "a") as handle:
            code = subprocess.call([sys.executable, "-m", "train_lite"] + flags, stdout=handle, stderr=subprocess.STDOUT,
                                   env=dict(os.environ, PYTHONPATH=ROOT))
        if code:
            sys.exit("training %s ended with exit code %d:\n%s" % (name, code, open(log).read()[-2000:]))
    with open(path, encoding="utf-8") as handle:
        return json.load(handle)
