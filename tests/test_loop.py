"""Training as a user runs it: every mode and net through the one loop, and what it leaves behind."""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, command, real_data, rest_slow, write_set
from train_lite import checkpoint, loop
from train_lite.config import HELPS, TrainConfig
from train_lite.data import demo
from train_lite.run import main
from train_lite.runfolder import RunFolder

SMALL = ("--res", 56, "--patch", 32, "--overlap", 8, "--width", 4, "--epochs", 2, "--threads", 1)


def train(folder, *flags):
    """Run the command in this process (torch is imported once). Returns the run folder."""
    name = flags[flags.index("--name") + 1] if "--name" in flags else "run"
    words = ("--data", write_set(folder / "set"), "--out", folder / "runs", "--name", name) + SMALL + flags
    assert main([str(word) for word in words]) == 0
    return folder / "runs" / name


def losses_of(run):
    with open(str(run / "log.jsonl")) as handle:
        return [json.loads(line)["loss"] for line in handle]


@pytest.mark.parametrize("flags", rest_slow([(flags,) for flags in (
    ("--gradient", "exact"), ("--model", "deeplabv3"), ("--batch", 2, "--accumulation", 3), ("--fit", "none", "--mode", "full"),
    ("--mode", "full"), ("--mode", "down"), ("--mode", "tiled"), ("--fill", "image"),
    ("--global-patch", "add"), ("--global-patch", "none"), ("--norm", "batch"), ("--norm", "frozen"),
    ("--model", "deeplabv3", "--norm", "batch", "--gradient", "exact"), ("--fit", "stretch"), ("--classes", 2),
)], 4), ids=lambda flags: " ".join(map(str, flags)))
def test_every_way_trains_to_the_end(tmp_path, flags):
    run = train(tmp_path, *flags)
    summary = json.loads((run / "summary.json").read_text())
    assert np.isfinite(summary["val"]["pooled"]["acc"]) and summary["steps"] > 0
    assert {"config.json", "log.jsonl", "metrics.csv", "last.safetensors", "best.safetensors", "curves.png", "samples",
            "summary.json"} <= set(os.listdir(str(run)))
    assert os.path.realpath(str(tmp_path / "runs" / "last")) == os.path.realpath(str(run))
    losses = losses_of(run)
    assert len(losses) == summary["steps"] and np.isfinite(losses).all()


@pytest.mark.slow
def test_what_torch_loads_late_and_nobody_needs(tmp_path):
    """backward(tensor) makes torch 2 load its symbolic shapes and sympy: 35 MiB, and half a second of every start."""
    code = "import sys; from train_lite.run import main; print(main(sys.argv[1:]), 'sympy' in sys.modules)"
    words = ("--data", write_set(tmp_path / "set", count=3), "--out", "runs", "--gradient", "exact") + SMALL + ("--epochs", 1)
    out = subprocess.check_output([sys.executable, "-c", code] + [str(word) for word in words], cwd=str(tmp_path),
                                  env=dict(os.environ, PYTHONPATH=ROOT), stderr=subprocess.DEVNULL)
    assert out.decode().splitlines()[-1] == "0 False"


def test_first_line_says_version_device_backend(tmp_path):
    done = command("train_lite", "--res", 100, "--demo-images", 3, "--epochs", 1, "--width", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr  # no data given: the demo set
    first = done.stderr.splitlines()[0]
    assert first.startswith("nanopatch ") and "device cpu" in first and torch.__version__ in first


def test_it_learns(trained):
    """The discs of conftest.write_set are plain to see: a net that did not learn them stays near 0."""
    with open(str(trained["run"] / "metrics.csv")) as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])
    assert float(rows[-1]["iou"]) > 0.5


def test_norms_are_frozen_and_best_is_of_the_final_kind(trained):
    tensors, meta = checkpoint.read(str(trained["run"] / "best.safetensors"))
    levels = {name.rsplit(".", 1)[0] for name in meta["frozen"]}
    assert levels == {"encoder.%s.%d" % (part, level) for part in ("down", "merge") for level in (0, 1)}, "the large maps: whole and half of the size"
    assert len(meta["frozen"]) == 8 == sum(name.endswith("running_var") for name in tensors)


@pytest.mark.slow
def test_config_of_a_run_repeats_it(tmp_path):
    run = train(tmp_path, "--freeze-at", 0.5)
    assert main(["--resume", str(run)]) == 0
    assert main(["--config", str(run / "config.json"), "--name", "again"]) == 0
    one, two = (checkpoint.read(str(tmp_path / "runs" / name / "last.safetensors"))[0] for name in ("run", "again"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_chunks_do_not_change_the_training(tmp_path):
    """micro-batch is memory, not mathematics: exact and sampled steps stay the same up to rounding."""
    for gradient in ("exact", "sampled"):
        losses = []
        for micro in (1, 8):
            run = train(tmp_path, "--gradient", gradient, "--micro-batch", micro, "--name", "%s-%d" % (gradient, micro))
            losses.append(losses_of(run))
        assert np.allclose(losses[0][:4], losses[1][:4], rtol=1e-3)


def test_one_process_per_run_folder(tmp_path, capsys):
    run = train(tmp_path)
    held = RunFolder(str(run))
    held.hold()
    assert main(["--resume", str(run)]) == 2 and "another process" in capsys.readouterr().err
    held._lock.close()
    assert main(["--resume", str(run)]) == 0


def test_every_flag_is_explained():
    assert set(HELPS) == set(TrainConfig._fields)


def test_learning_rate_warms_up_and_decays():
    from train_lite.tasks.segmentation import Segmentation
    problem = Segmentation.__new__(Segmentation)
    problem.steps, problem.config = 1000, TrainConfig(lr=1.0, beta2=0.99, warm_up=0.5)
    rates = [problem.learning_rate(step) for step in range(1, 1001)]
    assert abs(rates[99] - 0.5 * 0.901) < 1e-9      # untuned: 2 / (1 - 0.99) = 200 steps
    assert abs(rates[199] - 0.801) < 1e-9 and rates[-1] <= 0.0011
    problem.config = TrainConfig(lr=1.0, beta2=0.999, warm_up=0.1)
    assert abs(problem.learning_rate(100) - 0.901) < 1e-9  # 2000 steps, capped at a tenth of the run


def peak(way, res, width, folder, steps=1):
    """MiB that training steps peak at, by the benchmark's own child."""
    for kind in ("images", "masks"):
        os.makedirs(os.path.join(folder, kind))
    paths = [os.path.join(folder, kind, "0.png") for kind in ("images", "masks")]
    demo.draw(paths[0], paths[1], 1024, (0, 0))
    for path in paths:  # larger ones would take longer to draw than to train on
        with Image.open(path) as drawn:
            drawn.resize((res, res), Image.NEAREST).save(path, compress_level=1)
    out = subprocess.check_output(
        [sys.executable, os.path.join(ROOT, "scripts", "bench", "train_memory.py"), "--child", way, folder, "--res", str(res),
         "--width", str(width), "--steps", str(steps), "--threads", "1"], env=dict(os.environ, PYTHONPATH=ROOT, OMP_WAIT_POLICY="PASSIVE"))
    return json.loads(out.decode().splitlines()[-1])["peak_mib"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """Nine times the pixels, which would be 1 GB more. Two processes differ by some 15 MiB of 380 by themselves."""
    small, large = (peak("patch-exact", res, 4, str(tmp_path / str(res))) for res in (1024, 3072))
    assert large <= 1.10 * small, (small, large)


@pytest.mark.slow
def test_published_unet_trains_in_a_gigabyte(tmp_path):
    """Four patches: chunks of every kind. Two steps: the second has AdamW's moments beside the activations."""
    assert peak("patch-exact", 256, 64, str(tmp_path / "s"), steps=2) <= 1024


@pytest.mark.slow
def test_real_retina_images_train(tmp_path):
    """Two real photographs, few steps: the loss falls by a tenth (scores need more steps than a test has)."""
    folder = real_data("chasedb1")
    with open(str(tmp_path / "pairs.csv"), "w") as handle:
        handle.write("image,mask,split\n")
        for name, split in (("01L", "train"), ("01R", "train"), ("02L", "val")):
            handle.write("%s/Image_%s.jpg,%s/Image_%s_1stHO.png,%s\n" % (folder, name, folder, name, split))
    done = command("train_lite", "--data", tmp_path / "pairs.csv", "--res", 512, "--width", 4, "--epochs", 4, "--lr", 3e-3,
                   "--name", "run", "--out", "runs", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["val"]["pooled"]["acc"] <= 1
    losses = losses_of(tmp_path / "runs" / "run")
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_losses_of_the_cpu(tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        losses.append(losses_of(train(tmp_path, "--device", device, "--name", device))[:3])
    assert np.allclose(losses[0], losses[1], rtol=1e-2)


@pytest.mark.slow
def test_a_best_net_is_kept_even_where_there_is_nothing_to_find(tmp_path):
    """Masks without foreground, and none predicted: every score is undefined."""
    data = write_set(tmp_path / "set", count=4)
    for name in os.listdir(os.path.join(data, "masks")):
        Image.fromarray(np.zeros((40, 56), np.uint8)).save(os.path.join(data, "masks", name))
    words = ("--data", data, "--out", tmp_path / "runs", "--name", "run") + SMALL + ("--epochs", 6, "--lr", 1e-2)
    assert main([str(word) for word in words]) == 0
    assert checkpoint.exists(str(tmp_path / "runs" / "run" / "best.safetensors"))


def test_a_stop_while_the_last_epoch_is_scored(tmp_path, monkeypatch, capsys):
    """Neither the test set nor a stage that would follow is begun."""
    real = loop.end_epoch

    def stopped(problem, run, state, started):
        result = real(problem, run, state, started)
        if state.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    words = ["--data", write_set(tmp_path / "set"), "--out", tmp_path / "runs", "--name", "run"] + list(SMALL)
    monkeypatch.setattr(loop, "end_epoch", stopped)
    assert main([str(word) for word in words]) == 130
    assert not (tmp_path / "runs" / "run" / "summary.json").exists() and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(loop, "end_epoch", real)
    assert main(["--resume", str(tmp_path / "runs" / "run")]) == 0 and (tmp_path / "runs" / "run" / "summary.json").exists()


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    """Sent to all of a service's processes it comes through the supervisor too."""
    with loop.asked_to_stop() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert len(stop) == 1
        monkeypatch.setattr(loop, "AGAIN_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_validation_images_that_hold_nothing_choose_no_net(tmp_path, capsys):
    """There is no score: the newest net is kept, not the first that was asked."""
    data = write_set(tmp_path / "set", count=5)
    for name in ("03.png", "04.png"):
        mask = tmp_path / "set" / "masks" / name
        Image.new("L", Image.open(str(mask)).size).save(str(mask))
    lines = ["images/%02d.png,masks/%02d.png,%s" % (at, at, "val" if at > 2 else "train") for at in range(5)]
    (tmp_path / "set" / "pairs.csv").write_text("\n".join(["image,mask,split"] + lines))
    words = ["--data", data, "--out", tmp_path / "runs", "--name", "run", "--validate-every", 1] + list(SMALL)
    assert main([str(word) for word in words]) == 0
    _tensors, meta = checkpoint.read(str(tmp_path / "runs" / "run" / "best.safetensors"))
    assert meta["epoch"] == 2 and capsys.readouterr().err.count("the newest net counts as the best") == 1
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["best_val_iou"] is None


def test_names_of_pictures_are_short_enough(tmp_path):
    run = RunFolder(str(tmp_path))
    os.makedirs(os.path.join(run.path, "samples"))
    names = ["%s/%s" % ("train", "图" * 75 + str(at)) for at in range(2)]
    for name in names:
        with open(run.sample(name) + ".12345.part", "w"):
            pass
    assert run.sample(names[0]) != run.sample(names[1]) and run.sample("a/b").endswith(os.path.join("samples", "a_b.png"))
