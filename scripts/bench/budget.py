"""Train under real memory limits and hold the plan against what happened:

    sudo python scripts/bench/budget.py --work FOLDER [--runs 30] [--only SUBSTRING]

Every run is `python -m train_lite --budget B` in a control group of exactly B without swap (scripts/nano-sim): the kernel kills
what takes more. One image of the asked side, 2 rounds of PatchGD (moments beside activations), and a validation and a test image as wide and 128 px high, so
that every phase runs: reading, plan, both passes, step, validation, checkpoint, the best net on the test image. Columns: what the plan predicted and what one
chunk measured (MiB, supervisor apart), the process's peak (VmHWM), their ratio, the exit code (3: refused), seconds until a
refusal, kernel kills. Images stay in --work and are used again."""
import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from train_lite.config import SUPERVISOR_MIB  # noqa: E402
from train_lite.data import demo  # noqa: E402

BUDGETS = ("1GB", "2GB", "3GB", "4GB")
SIDES = (512, 1024, 2048, 4096, 8192)
NETS = (("unet", 16), ("unet", 64), ("deeplabv3", 64))


def cases(count):
    """`count` of the 60 combinations: 30 hold every side with every net twice, and every budget with all of them."""
    groups = list(itertools.product(SIDES, NETS))
    every = [(BUDGETS[(2 * turn + index) % 4], side, net) for turn in range(2) for index, (side, net) in enumerate(groups)]
    every += [(BUDGETS[(2 * turn + index + 1) % 4], side, net) for turn in range(2) for index, (side, net) in enumerate(groups)]
    return sorted(every[:count], key=lambda case: (case[1], case[2], case[0]))


def data(work, side):
    """A folder with one training image and a strip each for validation and test."""
    folder = os.path.join(work, "images-%d" % side)
    if not os.path.exists(os.path.join(folder, "done")):
        for split, height in (("train", side), ("val", 128), ("test", 128)):
            paths = [os.path.join(folder, split, kind, "0.png") for kind in ("image", "mask")]
            for path in paths:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            demo.draw(paths[0], paths[1], side, (0, len(split)), height=height)
        open(os.path.join(folder, "done"), "w").close()
    return folder


def run(work, budget, side, net, width, extra):
    """One training. Returns a dict of columns."""
    name = "%s-%d-%s-%d" % (budget, side, net, width)
    out = os.path.join(work, "runs")
    shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    facts = os.path.join(work, "facts.json")
    began = time.time()
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "scripts", "nano-sim"), "--memory", budget, "--swap", "0", "--json", facts, "--",
         sys.executable, "-m", "train_lite", "--data", data(work, side), "--fit", "none", "--res", str(side), "--model", net,
         "--width", str(width), "--budget", budget, "--epochs", "1", "--inner", "2", "--threads", "1", "--out", out, "--name",
         name] + extra, env=dict(os.environ, PYTHONPATH=ROOT), stderr=subprocess.PIPE)
    text, seconds = done.stderr.decode(), time.time() - began
    row = {"predicted": _found(r"one chunk measured: .*, (\d+) predicted", text, -SUPERVISOR_MIB), "measured": _found(
        r"one chunk measured: (\d+)", text, -SUPERVISOR_MIB), "peak": None, "code": done.returncode, "seconds": seconds}
    with open(facts) as handle:
        row["kills"] = json.load(handle)["oom_kills"]
    if done.returncode == 0:
        with open(os.path.join(out, name, "summary.json")) as handle:
            row["peak"] = json.load(handle)["peak_mib"]
    elif done.returncode != 3:
        sys.stderr.write(text)
    return row


def _found(pattern, text, add):
    numbers = re.findall(pattern, text, re.MULTILINE)
    return float(numbers[-1]) + add if numbers else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--only", default="")
    args, extra = parser.parse_known_args()
    print("| budget | side | net | predicted | one chunk | peak | predicted / peak | code | kills | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for budget, side, (net, width) in cases(args.runs):
        if args.only not in "%s-%d-%s-%d" % (budget, side, net, width):
            continue
        row = run(args.work, budget, side, net, width, extra)
        cells = ["-" if row[name] is None else "%.0f" % row[name] for name in ("predicted", "measured", "peak")]
        ratio = "%.2f" % (row["predicted"] / row["peak"]) if row["peak"] and row["predicted"] else "-"
        print("| %s | %d | %s %d | %s | %s | %d | %d | %.1f |" % (budget, side, net, width, " | ".join(cells), ratio, row["code"],
                                                                 row["kills"], row["seconds"]))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
