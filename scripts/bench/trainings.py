"""Trainings for tables: each is done once, and a table that was stopped goes on."""
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def summary(out, name, words, stages=("",)):
    """What the training with the flags `words`, run folder OUT/NAME, said at its end; what it prints is in OUT/NAME.txt.

    stages: what follows NAME in the run folders of a training that is made of several. Then it is what the last one said, with
    the seconds of all and the highest peak."""
    os.makedirs(out, exist_ok=True)
    runs = [os.path.join(os.path.abspath(out), name + stage) for stage in stages]
    log, flags = (os.path.join(out, name + ending) for ending in (".txt", ".flags"))
    demand_same(flags, " ".join(str(word) for word in words))
    if not os.path.exists(os.path.join(runs[-1], "summary.json")):
        begun = [run for run in runs if os.path.exists(os.path.join(run, "config.json"))]
        fresh = ["--out", os.path.abspath(out), "--name", name] + [str(word) for word in words]
        told = ["--resume", begun[-1]] if begun else fresh
        with open(log, "a") as handle:
            code = subprocess.call([sys.executable, "-m", "train_lite"] + told, stdout=handle, stderr=subprocess.STDOUT,
                                   env=dict(os.environ, PYTHONPATH=ROOT))
        if code:
            sys.exit("training %s ended with exit code %d:\n%s" % (name, code, open(log).read()[-2000:]))
    said = []
    for run in runs:
        with open(os.path.join(run, "summary.json"), encoding="utf-8") as handle:
            said.append(json.load(handle))
    return dict(said[-1], seconds=sum(one["seconds"] for one in said), peak_mib=max(one["peak_mib"] for one in said))


def demand_same(path, text):
    """Keep `text` in a file; end the program where it holds another: what lies beside it was made with other flags."""
    if not os.path.exists(path):
        with open(path, "w") as handle:
            handle.write(text)
    held = open(path).read()
    if held != text:
        sys.exit("%s says %r, now it is %r: what is there was made with other flags. Give another --work" % (path, held, text))
