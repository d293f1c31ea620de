"""Fitting a memory budget: the levers, the estimate, the choice, what is measured apart, and what the kernel says."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, alive, command, wait_for, write_set
from edge import images
from edge.errors import BadFile, MissingPart, OverBudget, UsageError
from jetson import memory
from train_lite import checkpoint, device, plan
from train_lite.config import TrainConfig
from train_lite.run import main

SMALL = ("--res", 128, "--patch", 64, "--width", 8, "--threads", 1)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ORDER = {"half": (False, True), "optimizer": ("adamw", "adamw8", "sgd"), "tight": (False, True), "recompute": (False, True), "spill": (False, True)}


def config(**change):
    return TrainConfig(width=8, res=256, patch=256)._replace(**change)


@pytest.mark.parametrize("change", [
    {}, {"mode": "full"}, {"mode": "tiled"}, {"mode": "full", "norm": "batch"}, {"optimizer": "sgd"}, {"tight": True},
    {"micro_batch": 1}, {"micro_batch": 7}, {"resume": "runs/x"}, {"recompute": True}, {"optimizer": "adamw8"},
    {"model": "glnet", "stage": "3", "base": "x", "batch": 2}])
def test_ladder_goes_down_one_change_at_a_time(change):
    start = config(**change)
    notches = plan.ladder(start, CPU)
    assert plan.apply(start, notches[0]) == start._replace(micro_batch=start.micro_batch or 8)
    for above, below in zip(notches, notches[1:]):
        changed, = [name for name in plan.Levers._fields if getattr(above, name) != getattr(below, name)]
        a, b = getattr(above, changed), getattr(below, changed)
        assert ORDER[changed].index(b) > ORDER[changed].index(a) if changed in ORDER else 0 < b < a
    assert notches[-1].micro_batch == 1 and notches[-1].tight
    whole, steady = start.mode == "full", start.mode == "full" or bool(start.resume or start.base)
    for notch in notches:  # an image that is seen whole has no patch to make smaller
        assert notch.patch == 0 if whole else notch.patch % 16 == 0 and notch.patch >= plan.LEAST_PATCH
        assert ("patch" in notch.words()) != whole
        assert plan.apply(start, notch).patch == (notch.patch or start.patch)
    assert (notches[-1].patch == notches[0].patch) == steady
    assert notches[-1].recompute == (whole and start.norm != "batch" or start.recompute)
    assert notches[-1].spill == (start.stage == "3")


@pytest.mark.parametrize("change, patches", [
    ({"mode": "down"}, [256]), ({"model": "glnet"}, [256]), ({"model": "glnet", "mode": "down"}, [256]), ({"overlap": 100}, [256, 128]),
    ({"overlap": 128}, [256]), ({"model": "glnet", "mode": "tiled", "overlap": 0}, [256, 128, 64]), ({"model": "mobilenetv2"}, [256, 128, 64])])
def test_a_smaller_patch_is_one_that_training_would_take(change, patches):
    """Larger than the overlap; not where images are stored at its size: they are in the store by then."""
    assert sorted({notch.patch for notch in plan.ladder(config(**change), CPU)}, reverse=True) == patches


def test_on_cuda_half_precision_comes_before_the_moments():
    notches = plan.ladder(config(), GPU)
    assert [n.half for n in notches].index(True) < [n.optimizer for n in notches].index("adamw8")
    assert not any(n.tight for n in notches) and not any(n.half for n in plan.ladder(config(), CPU))


def test_a_jetson_counts_host_and_gpu_together_and_a_card_for_itself(monkeypatch):
    monkeypatch.setattr(device, "limit_mib", lambda: 3964.0)
    monkeypatch.setattr(device, "in_use_mib", lambda: 500.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of: (6000 << 20, 8000 << 20), raising=False)
    here = {}
    for jetson in (True, False):
        monkeypatch.setattr(device.board, "is_jetson", lambda: jetson)
        here[jetson] = plan.budget("", GPU), plan.estimates(config(), 1, 0, [(256, 256, True)], GPU)
    assert here[True][0][1:4] == (3964.0, 500.0, 3464.0) and here[False][0][1:4] == (8000.0, 2000.0, 6000.0)
    assert here[True][1][0]["runtime libraries"] > device.JETSON_CUDA_MIB + 50
    assert here[False][1][0]["runtime libraries"] == here[False][1][0]["loader"] == 0
    first, halved = here[False][1][0], here[False][1][[n.half for n in plan.ladder(config(), GPU)].index(True)]
    assert halved["activations"] < first["activations"] and halved["weights"] == 1.5 * first["weights"]
    assert device.memory_mib(CPU) == (3964.0, 500.0)


def test_what_a_gpu_holds_counts_on_a_jetson(monkeypatch):
    """The pool's highest point, and what the driver has taken beside it since training came."""
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda of: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda of: 700 << 20)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda of: 400 << 20)
    monkeypatch.setattr(device, "in_use_mib", lambda: 500.0 + 400 + 600)  # others, pool, context and libraries
    monkeypatch.setattr(device, "peak_rss_mib", lambda since_reset: 250.0)
    monkeypatch.setattr(device, "reset_peak", lambda: True)
    monkeypatch.setattr(device.board, "is_jetson", lambda: True)
    assert device.Peak(GPU, 500.0).mib() == 250 + 600 + 700
    monkeypatch.setattr(device.board, "is_jetson", lambda: False)
    assert device.Peak(GPU, 500.0).mib() == 700
    monkeypatch.setattr(device, "reset_peak", lambda: False)
    assert device.Peak(CPU, 0.0).mib() is None


@pytest.mark.parametrize("exc, ours", [
    (MemoryError(), True), (RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB"), True), (ValueError("out of memory"), False),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True), (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True), (RuntimeError("NvMapMemAllocInternalTagged: 1 error 12"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True), (RuntimeError("shape mismatch"), False)])
def test_words_for_memory_that_ran_out(exc, ours):
    assert device.out_of_memory(exc) == ours


def here(*words):
    """The exit code of the command in this process, where torch is loaded."""
    return main([str(word) for word in words])


def test_half_precision_is_refused_on_a_cpu(capsys):
    assert here("--half", "--device", "cpu", *SMALL) == 2
    assert "--half needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("text, mib", [("4GB", 4e9 / 2 ** 20), ("512MiB", 512), ("1.5G", 1536), (" 64 k", 1 / 16)])
def test_budget_is_an_amount_of_memory(text, mib, monkeypatch):
    monkeypatch.setattr(device, "limit_mib", lambda: 5000.0)
    monkeypatch.setattr(device, "in_use_mib", lambda: 1500.0)
    got = plan.budget(text, CPU)
    assert abs(got.total_mib - mib) < 1e-6 and got.free_mib == min(got.total_mib, 3500)


def test_no_budget_is_what_the_machine_has_left(monkeypatch):
    monkeypatch.setattr(device, "limit_mib", lambda: 5000.0)
    monkeypatch.setattr(device, "in_use_mib", lambda: 1500.0)
    assert plan.budget("", CPU).free_mib == 3500
    monkeypatch.setattr(device, "limit_mib", lambda: None)
    assert plan.budget("", CPU).free_mib == float("inf") and plan.budget("1MiB", CPU).free_mib == 1


@pytest.mark.parametrize("text", ["4 potatoes", "4", "9" * 400, "-1GB", "0", "0.0GB", "GB", "1e3MB", "4 GB of it"])
def test_budget_refuses_and_names_what_to_type(text):
    with pytest.raises(UsageError, match="--budget: .*such as 4GB"):
        plan.budget(text, CPU)


def test_choose_takes_the_first_that_fits():
    notches = plan.ladder(config(), CPU)
    predicted = [{"runtime libraries": 100.0, "weights": 300.0 - 20 * i, "loader": 30.0} for i in range(len(notches))]
    free = plan.peak(predicted[2]) * plan.MARGIN
    assert plan.choose(notches, predicted, plan.Budget("1GB", free, 0, free)) == 2
    assert plan.choose(notches, predicted, plan.Budget("1GB", free, 0, free), first=4) == 4
    assert plan.choose(notches, predicted, plan.Budget("1GB", free - 0.1, 0, free - 0.1)) == 3
    with pytest.raises(OverBudget) as error:
        plan.choose(notches, predicted, plan.Budget("9MB", 9, 0, 9))
    assert error.value.exit_code == 3
    least = memory.parse_bytes(re.search(r"--budget (\d+MB)$", str(error.value)).group(1)) / plan.MIB
    assert plan.choose(notches, predicted, plan.Budget("", least, 0, least)) == len(notches) - 1
    with pytest.raises(OverBudget):
        plan.choose(notches, predicted, plan.Budget("", least - 4, 0, least - 4))


def test_no_notch_left_is_another_reason():
    """All estimates fit, but training took more."""
    notches = plan.ladder(config(), CPU)
    with pytest.raises(OverBudget) as error:
        plan.choose(notches, [{"loader": 1, "runtime libraries": 300}] * len(notches), plan.Budget("", 1e4, 1e3, 9e3),
                    first=len(notches))
    assert "smallest budget" not in str(error.value)


def test_no_budget_helps_a_machine_that_is_too_small():
    with pytest.raises(OverBudget) as error:
        plan.choose(plan.ladder(config(), CPU), [{"loader": 1, "runtime libraries": 9e3}] * 9, plan.Budget("", 500, 400, 9))
    assert "--budget" not in str(error.value)
    with pytest.raises(OverBudget) as error:  # asked for more than is free: no number would do
        plan.choose(plan.ladder(config(), CPU), [{"loader": 1, "runtime libraries": 9e3}] * 9, plan.Budget("4GB", 3815, 0, 3000, 3000))
    with pytest.raises(OverBudget, match="this machine has 3000 MiB free"):  # not the 954 that were asked for
        plan.choose(plan.ladder(config(), CPU), [{"loader": 1, "runtime libraries": 9e3}] * 9, plan.Budget("1GB", 954, 0, 954, 3000))
    assert "--budget" not in str(error.value) and "3000 MiB free. Close other programs" in str(error.value)
    never = float("inf")  # nothing was measured, on a system that does not say how much memory it has
    assert plan.smallest_budget(never, plan.Budget("1GB", 954, 0, 954)) == "" and "1104MB" in plan.smallest_budget(1000, plan.Budget("1GB", 954, 0, 954))


def test_images_are_read_before_the_net_is_there():
    assert plan.peak({"runtime libraries": 100, "weights": 50, "loader": 20}) == 150
    assert plan.peak({"runtime libraries": 100, "weights": 50, "loader": 80}) == 180


def estimate(notch=0, tile_px=0, headers=((256, 256, True),), **change):
    return plan.estimates(config(**change), 1, tile_px, list(headers), CPU)[notch]


def test_estimate_grows_with_what_takes_memory():
    base = estimate(patch=128, micro_batch=2)
    for larger in ({"width": 16}, {"micro_batch": 4}, {"patch": 192}):
        assert plan.peak(estimate(**dict({"patch": 128, "micro_batch": 2}, **larger))) > plan.peak(base) + 1, larger
    whole = plan.estimates(config(mode="full", width=16), 1, 512 * 512, [(512, 512, True)], CPU)
    rungs = plan.ladder(config(mode="full", width=16), CPU)
    at = [n.recompute for n in rungs].index(True)
    assert whole[at]["activations"] < 0.8 * whole[at - 1]["activations"]
    even, deform, wider = [plan.estimates(config(sampler=kind, deform_width=width), 1, 256 * 256, [(512, 512, True)], CPU)[0]
                           for kind, width in (("uniform", 32), ("deform", 32), ("deform", 192))]
    assert plan.peak(even) < plan.peak(deform) < plan.peak(wider) - 20
    assert estimate(headers=((9000, 9000, False),))["loader"] > 9000 * 9000 * 7.5 / plan.MIB - 1


READING = """
import sys
from jetson import memory
from train_lite.data import store
from train_lite.data.dataset import Pair
path, cache, resize_px = sys.argv[1:]
before = memory.rss_mib()
assert memory.reset_peak()
store.ingest([Pair("x", path, "", "train")], None, "long", int(resize_px), cache, 1, None, 0, [])
print(memory.peak_rss_mib(since_reset=True) - before)
"""


@pytest.mark.parametrize("name, height, width, resize_px", [("whole.jpg", 4000, 5000, 5000), ("banded.png", 900, 20000, 10000)])
def test_reading_takes_what_is_predicted(name, height, width, resize_px, tmp_path):
    path = str(tmp_path / name)
    noise = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, **({"compress_level": 0} if "png" in name else {}))
    # a threshold that stays: glibc moves its own, and where the bands then lie in the heap costs up to a third, by luck
    env = dict(os.environ, PYTHONPATH=ROOT, MALLOC_MMAP_THRESHOLD_="65536")
    took = float(subprocess.check_output([sys.executable, "-c", READING, path, str(tmp_path / "cache"), str(resize_px)], env=env))
    predicted = estimate(headers=(images.photo_header(path),))["loader"]
    assert 0.8 < predicted / took < 1.6


@pytest.mark.parametrize("model, share", [("unet", 0.43), ("deeplabv3", 0.9)])
def test_what_is_held_at_the_largest_weight(model, share):
    """A U-Net's is in the middle, a DeepLabv3's (pyramid pooling) near the end, where the backward pass begins."""
    look = plan.Look(config(model=model, width=64), 1, CPU, 0.0)
    kept, _largest, below = look.kept(1, False)
    assert abs(below / kept - share) < 0.05
    if model == "unet":
        recomputed, _largest, below = look.kept(1, True)
        assert 0 < below <= recomputed < kept


def test_each_notch_takes_less():
    """But for one: torch 1.10 convolves a single tile in another way, which keeps more than two tiles do."""
    peaks = [plan.peak(owners) for owners in plan.estimates(config(), 1, 0, [(256, 256, True)], CPU)]
    rises = [after - before for before, after in zip(peaks, peaks[1:]) if after > before]
    assert len(peaks) == len(plan.ladder(config(), CPU)) and len(rises) <= (1 if torch.__version__ < "2" else 0)
    assert peaks[-1] == min(peaks) and peaks[0] == max(peaks)


def test_apart_brings_back_values_and_errors():
    assert plan.apart(lambda unseen: {"a": [1, 2.5], "b": unseen >= 0 or unseen}) == {"a": [1, 2.5], "b": True}
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        plan.apart(lambda unseen: (_ for _ in ()).throw(ValueError("no such thing")))
    assert plan.apart(lambda unseen: os.kill(os.getpid(), signal.SIGKILL)) is None
    before = memory.rss_mib()
    assert plan.apart(lambda unseen: [np.ones(200 << 17), memory.rss_mib()][1]) > 200
    assert abs(memory.rss_mib() - before) < 5


def test_apart_dies_of_what_its_fork_dies_of():
    """A library for another processor: the supervisor has the words for it."""
    code = "from train_lite import plan; import os, signal; plan.apart(lambda unseen: os.kill(os.getpid(), signal.SIGILL)); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert done.returncode == -signal.SIGILL and not done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_is_apart_ends_with_us(number, tmp_path):
    code = ("from train_lite import plan; import os, sys, time\n"
            "plan.apart(lambda unseen: [open(sys.argv[1] + '.part', 'w').write(str(os.getpid())), os.rename(sys.argv[1] + '.part', sys.argv[1]), time.sleep(60)])")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.wait()
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())), 5)  # its parent is gone: somebody else reaps it


def test_a_chunk_that_never_fits_names_the_budget_that_would(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan, "confirm", lambda *_words: 1000.0)
    assert here("--data", write_set(tmp_path / "set", 4, 160, 200), "--out", tmp_path / "runs", "--budget", "900MB", *SMALL) == 3
    assert "The smallest budget that would do: --budget 1104MB, or take a smaller --width" in capsys.readouterr().err


def test_an_estimate_that_the_kernel_kills_is_over_budget(monkeypatch):
    """Or anything else with a documented exit code; not a bug report."""
    monkeypatch.setattr(plan, "Look", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises((OverBudget, MemoryError)):
        plan.choose(plan.ladder(config(), CPU), plan.estimates(config(), 1, 0, [(9, 9, True)], CPU), plan.Budget("", 1e6, 0, 1e6))


def peaks_of(text):
    """{levers: MiB} of a printed plan, and the owners' lines as {owner: MiB}."""
    rungs = re.findall(r"^>?\s*\d+\s+(\d+)   (micro-batch .*)$", text, re.M)
    owners = re.findall(r"^(\S.{19}) +(\d+)$", text[text.index("owner of memory"):], re.M)
    return {words: int(mib) for mib, words in rungs}, {owner.strip(): int(mib) for owner, mib in owners}


@pytest.mark.slow
def test_plan_only_prints(tmp_path, monkeypatch, capsys):
    done = command("train_lite", "--plan", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.listdir(str(tmp_path)) == []
    rungs, owners = peaks_of(done.stdout)
    assert len(rungs) >= 6 and done.stdout.count("\n>") == 1
    training = sum(mib for owner, mib in owners.items() if owner not in ("peak", "loader"))
    assert abs(training - owners["peak"]) <= 4 and owners["peak"] == max(rungs.values())
    data = write_set(tmp_path / "set", count=3)
    monkeypatch.chdir(tmp_path)
    assert here("--plan", "--data", data, "--budget", "4GB", *SMALL) == 0
    assert "micro-batch 8" in capsys.readouterr().out
    assert here("--plan", "--json", "--data", data, "--budget", "4GB", *SMALL) == 0
    told, = json.loads(capsys.readouterr().out)["plans"]
    assert len(told["notches"]) >= 6 and told["notches"][told["chosen"]]["peak_mib"] <= told["free_mib"] <= told["budget_mib"] == 4e9 / 2 ** 20
    assert told["notches"][0]["levers"]["micro_batch"] == 8
    assert sorted(os.listdir(str(tmp_path))) == ["set"] and sorted(os.listdir(data)) == ["images", "masks"]


def test_what_does_not_fit_is_refused_before_a_demo_set_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert here("--res", 8192, "--budget", "60MB") == 3
    assert "The smallest budget that would do" in capsys.readouterr().err and not os.listdir(str(tmp_path))


@pytest.mark.slow
def test_the_smallest_budget_named_is_the_smallest(tmp_path):
    done = command("train_lite", "--plan", "--budget", "50MB", *SMALL, cwd=tmp_path)
    assert done.returncode == 3 and done.stdout == "", done.stderr
    least = int(re.search(r"--budget (\d+)MB\s*$", done.stderr).group(1))
    for _ in range(3):
        done = command("train_lite", "--plan", "--budget", "%dMB" % least, *SMALL, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert command("train_lite", "--plan", "--budget", "%dMB" % (least - 12), *SMALL, cwd=tmp_path).returncode == 3
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize("words, answer", [
    (("--budget", "4 potatoes"), "such as 4GB"), (("--budget=-1GB",), "such as 4GB"),
    (("--budget", "0"), "such as 4GB"), (("--recompute", "--norm", "batch"), "leave one out")])
def test_wrong_usage(words, answer, capsys):
    assert here("--plan", *words + SMALL) == 2
    assert answer in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of the runs `free` and `tight`; budget of the latter, a bit less than the first took; its output)."""
    folder = tmp_path_factory.mktemp("plan")
    words = ("--data", write_set(folder / "set", 4, 160, 200), "--gradient", "exact", "--epochs", 1, "--out", "runs",
             "--micro-batch", 8, "--res", 256) + SMALL[2:]
    done = command("train_lite", "--name", "free", "--budget", "4GB", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    taken = int(re.search(r"one chunk measured: (\d+) MiB", done.stderr).group(1))
    rungs, _owners = peaks_of(done.stderr)
    one, = [mib for levers, mib in rungs.items() if "micro-batch 1, tight" in levers and "adamw," in levers]
    budget = max(taken * plan.MARGIN - 15, one * plan.MARGIN + 8)
    done = command("train_lite", "--name", "tight", "--budget", "%.0fMiB" % budget, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs", budget, done.stderr


@pytest.mark.slow
def test_a_tight_budget_keeps_the_gradients(runs):
    folder, _budget, _text = runs
    levers = json.loads((folder / "tight" / "config.json").read_text())
    assert levers["micro_batch"] < 8 and (levers["optimizer"], levers["patch"]) == ("adamw", 64)
    a, b = (checkpoint.read(str(folder / name / "last.safetensors"))[0] for name in ("free", "tight"))
    losses = [float(list(csv.DictReader(open(str(folder / name / "metrics.csv"))))[0]["loss"]) for name in ("free", "tight")]
    # moments, not weights: AdamW divides a gradient by its size, so where there is next to none rounding decides the step's sign
    names = [name for name in b if name.startswith("adamw.exp_avg.")]
    size, apart = (np.linalg.norm(np.concatenate([found(name).ravel() for name in names])) for found in (b.get, lambda name: a[name] - b[name]))
    assert len(names) > 50 and apart <= 1e-2 * size, "on two PCs 1e-4 and 1.2e-3; a lost patch would be a tenth"
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]


@pytest.mark.slow
def test_the_prediction_and_the_budget_hold(runs):
    folder, budget, text = runs
    with open(str(folder / "tight" / "metrics.csv")) as handle:
        measured = max(float(row["peak_mib"]) for row in csv.DictReader(handle))
    kept = json.loads((folder / "tight" / "config.json").read_text())
    levers = plan.Levers(*[kept[name] for name in plan.Levers._fields])
    predicted = peaks_of(text)[0][levers.words()] - plan.SUPERVISOR_MIB
    assert abs(measured - predicted) < 0.15 * predicted, (measured, predicted)
    assert measured + plan.SUPERVISOR_MIB <= budget


V1 = {"/proc/self/cgroup": "9:name=systemd:/\n4:memory:/a/b\n1:cpu,cpuacct:/\n0::/\n",
      "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "419430400\n",
      "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
      "/sys/fs/cgroup/memory/a/b/memory.stat": "rss 1\ntotal_cache 999999999\ntotal_rss 209715200\n",
      "/sys/fs/cgroup/memory/a/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}
V2 = {"/proc/self/cgroup": "0::/x\n", "/sys/fs/cgroup/x/memory.max": "419430400\n", "/sys/fs/cgroup/x/memory.stat":
      "anon 209715200\nfile 999999999\n", "/sys/fs/cgroup/x/memory.events": "low 0\noom 4\noom_kill 3\n"}
MACHINE = {"/proc/meminfo": "MemTotal: 1024000 kB\nMemFree: 9 kB\nMemAvailable: 512000 kB\n",
           "/proc/self/status": "VmHWM: 204800 kB\nVmRSS: 102400 kB\n", "/proc/vmstat": "nr_free_pages 9\noom_kill 5\n"}


@pytest.mark.parametrize("group, limit, used, kills", [
    (V1, 400, 100, {"/sys/fs/cgroup/memory/a/b/memory.oom_control": 3}),
    (dict(V1, **{"/sys/fs/cgroup/memory/a/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n", "/proc/vmstat": "nr_free_pages 9\n"}),
     400, 100, {}),  # Linux 4.9, the Nano's
    (V2, 400, 100, {"/sys/fs/cgroup/x/memory.events": 3}), ({}, 1000, 400, {"machine": 5})])
def test_memory_as_the_kernel_says_it(group, limit, used, kills, monkeypatch):
    files = dict(MACHINE, **group)
    monkeypatch.setattr(memory, "read_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(memory, "_before_reset", [0.0])  # this process has trained, and its peak been reset
    assert memory.limit_mib() == limit and memory.in_use_mib() == used and memory.oom_kills() == kills
    assert memory.rss_mib() == 100 and memory.peak_rss_mib() == 200
    files = {}
    assert (memory.limit_mib(), memory.in_use_mib(), memory.oom_kills(), memory.rss_mib()) == (None, None, {}, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_is_held_to_the_budget(tmp_path):
    """Half precision is taken before anything else is given up, and torch's pool stays below what was free."""
    data = write_set(tmp_path / "set", count=3)
    done = command("train_lite", "--data", data, "--device", "cuda", "--width", 64, "--res", 512, "--epochs", 1, "--micro-batch", 8,
                   "--budget", "2GB", cwd=tmp_path)
    assert done.returncode == 0 and "half precision" in done.stderr, done.stderr


@pytest.mark.parametrize("raised", [BadFile("m.png is damaged"), OSError(28, "No space left on device", "x.edges"), MissingPart("a", "pip install a")])
def test_what_is_raised_apart_is_what_it_was(raised):
    """A full disk in the trial is no bug of ours."""
    def fail(_unseen):
        raise raised
    with pytest.raises(type(raised)) as caught:
        plan.apart(fail)
    assert str(caught.value) == str(raised) and getattr(caught.value, "filename", None) == getattr(raised, "filename", None)


def test_bands_of_many_classes_are_counted():
    """(classes, tile, width) scores are there when an image is scored, whatever the net's own activations take."""
    few, many = (plan.estimates(config(patch=128), outputs, 0, [(8192, 8192, True)], CPU, 8192)[0]["activations"] for outputs in (2, 150))
    assert many >= 150 * 128 * 8192 * 4 / 2.0 ** 20 > few
