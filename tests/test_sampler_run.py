"""Learned down-sampling by the commands users type: train, stop, go on, export, build, run; and what stops a wrong file."""
import json
import os
import shutil
import signal
import types

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import BLOCKS, STEP, command, peaks_kib, rest_slow, write_large, write_set
from doubles import api_folder
from edge import cli, contract, images
from edge.backends import ort
from edge.errors import ParityError
from edge.geometry import nearest_index
from edge.pipeline import Segmenter
from edge.warp import pictures, reference
from export import __main__ as export
from export import parity, to_onnx
from test_engine import board, build
from test_resume import KILLED_WHILE_SAVING, start, table
from train_lite import checkpoint, evaluate, run, state
from train_lite.config import TrainConfig, mode_settings
from train_lite.data.dataset import Classes
from train_lite.models import FEATURES, MODELS, norm
from train_lite.models.deform import DeformNet
from train_lite.samplers.deform import Sampler, WarpNet

SMALL = ("--res", 120, "--task-size", "64x32", "--density", 32, "--deform-width", 8, "--width", 4, "--threads", 1)
LEARNS = SMALL + ("--epochs", 6, "--lr", 1e-2, "--freeze-at", 0.5, "--freeze", "all")
SEEDS = {"deform": 2, "uniform": 1}  # with which so small a net learns its set in seconds


def ran(main, *words):
    """A command in this process: torch is imported once. Returns the exit code."""
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a set and, under models, the nets that were asked for."""
    folder = tmp_path_factory.mktemp("sampler")
    write_set(folder / "set", count=5, height=56, width=70)
    return folder


@pytest.fixture(scope="module")
def deform(place):
    """A trained and exported net, made by commands in processes of their own: dict of run, model, data."""
    done = command("train_lite", "--data", "set", "--sampler", "deform", *LEARNS, "--seed", SEEDS["deform"], "--name",
                   "deform", "--out", "runs", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "sampler deform" in done.stderr and "64x32" in done.stderr and "32x16" in done.stderr, done.stderr
    done = command("export", "runs/deform", "--out", "models/deform.onnx", cwd=place)
    assert done.returncode == 0, done.stderr
    return {"run": place / "runs" / "deform", "model": place / "models" / "deform.onnx", "data": str(place / "set")}


@pytest.fixture(scope="module")
def uniform(place):
    words = LEARNS + ("--seed", SEEDS["uniform"], "--name", "uniform", "--out", place / "runs")
    assert ran(run.main, "--data", place / "set", "--sampler", "uniform", *words) == 0
    model = place / "models" / "uniform.onnx"
    assert ran(export.main, place / "runs" / "uniform", "--out", model) == 0
    return {"run": place / "runs" / "uniform", "model": model, "data": str(place / "set")}


@pytest.fixture(params=["deform", "uniform"])
def model(request):
    return request.getfixturevalue(request.param)


def photo(file, height, width, seed=0):
    """Discs on noise, as the set's."""
    rng = np.random.RandomState([seed, height, width])
    y, x = np.ogrid[:height, :width]
    array = rng.randint(0, 90, (height, width, 3)).astype(np.uint8)
    for _ in range(5):
        array[np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) < 0.12 * max(height, width)] += 120
    Image.fromarray(array).save(str(file))
    return images.open_photo(str(file))


def mask_of(file):
    with Image.open(str(file)) as mask:
        return np.asarray(mask)


def edge_run(*words, **env):
    """edge-run in a process of its own. Returns it."""
    done = command("edge.cli", *words, env=env)
    assert "Traceback" not in done.stderr
    return done


# --- from training to masks ---------------------------------------------------------------------------------------

def test_contract(deform, uniform):
    made, _files = contract.load(str(deform["model"]))
    assert made["pipeline"] == "deform" and made["tile"] is None and made["overview"] is None
    assert made["warp"] == {"task": [32, 64], "density": [16, 32], "radius": [4, 8]}
    look, net = made["stages"]
    assert (look["name"], look["file"], net["name"], net["file"]) == ("deform", "deform.onnx", "net", "deform.net.onnx")
    assert look["inputs"][0]["shape"] == [1, 3, 16, 32] and net["outputs"][0]["shape"] == [1, 1, 32, 64]
    for stage in (look, net):  # the graphs end at density logits and scores; norms are folded, and nothing is resampled
        operators = set(to_onnx.operators(str(deform["model"].parent / stage["file"])))
        assert operators <= {"Conv", "Relu", "Clip", "Constant", "ConvTranspose", "MaxPool", "Concat", "Identity"}, operators
    made, _files = contract.load(str(uniform["model"]))
    assert made["pipeline"] == "uniform" and [stage["name"] for stage in made["stages"]] == ["net"]


@pytest.mark.parametrize("height, width", [(96, 120), (333, 250), (40, 300)])
def test_mask_agrees_with_training_s_evaluation(model, height, width, tmp_path):
    picture = photo(tmp_path / "a.png", height, width)
    net, config, _classes, tile, _meta = state.restore(checkpoint.find(str(model["run"])))
    how = Sampler(config.sampler, evaluate.recipe(mode_settings(config), tile, 1))
    shown = types.SimpleNamespace(picture=picture, height=height, width=width)
    expected = np.concatenate([labels for _y, labels in evaluate.label_bands(net, shown, how, torch.device("cpu"))])
    done = edge_run("--engine", model["model"], "--input", tmp_path / "a.png", "--output", tmp_path / "mask.png")
    assert done.returncode == 0, done.stderr
    assert expected.any() and not expected.all() and (mask_of(tmp_path / "mask.png") == expected).mean() >= 0.9999


def test_a_machine_that_has_not_seen_the_model(model, tmp_path):
    """It tries the files in a child process first."""
    photo(tmp_path / "a.png", 96, 120)
    done = edge_run("--engine", model["model"], "--input", tmp_path / "a.png", "--output", tmp_path / "out",
                    XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "nanopatch" / "loaded").is_dir()


def test_degenerate_images(model, tmp_path):
    """One pixel, one row, one column, smaller than the task, all of one colour."""
    shapes = {"pixel": (1, 1), "row": (1, 300), "column": (211, 1), "small": (7, 10), "black": (96, 120), "white": (97, 31)}
    (tmp_path / "in").mkdir()
    for name, (height, width) in shapes.items():
        array = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
        flat = {"black": np.zeros_like(array), "white": np.full_like(array, 255)}.get(name, array)
        Image.fromarray(flat).save(str(tmp_path / "in" / (name + ".png")))
    for resize in ("model", "none"):
        done = edge_run("--engine", model["model"], "--input", tmp_path / "in", "--output", tmp_path / resize,
                        "--resize", resize)
        assert done.returncode == 0 and "6 frames done, 0 failed" in done.stderr, done.stderr
        for name, shape in shapes.items():
            mask = mask_of(tmp_path / resize / (name + ".mask.png"))
            assert mask.shape == shape and mask.max() <= 1


def noise_set(folder, sizes):
    """A set of noise; the last image is black, and only the first three have anything labelled."""
    rng = np.random.RandomState(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index, (height, width) in enumerate(sizes):
        for kind, array in (("images", rng.randint(0, 256, (height, width, 3)) // (1 + 254 * (index == len(sizes) - 1))),
                            ("masks", (rng.rand(height, width) < 0.5) & (index < 3))):
            Image.fromarray(array.astype(np.uint8)).save(str(folder / kind / ("%d.png" % index)))
    return folder


@pytest.mark.parametrize("sampler, fit", [("deform", "none"), ("edge-oracle", "long"), ("marin", "none")])
def test_training_on_degenerate_images(sampler, fit, tmp_path):
    data = noise_set(tmp_path / "set", [(32, 64), (32, 300), (200, 64), (64, 128), (60, 80)])
    words = SMALL + ("--epochs", 1, "--name", "x", "--out", tmp_path)
    assert ran(run.main, "--data", data, "--fit", fit, "--res", 300, "--sampler", sampler, *words[2:]) == 0
    lines = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert len(lines) >= 4 and np.isfinite([line["loss"] for line in lines]).all()


@pytest.mark.parametrize("size, fit, way_out", [((31, 90), "none", "smaller --task-size, or leave"),
                                                ((90, 63), "none", "smaller --task-size, or leave"),
                                                ((3, 30), "long", "larger --res, or leave")])
def test_more_samples_than_an_image_has_are_refused(size, fit, way_out, tmp_path, capsys):
    data = noise_set(tmp_path / "set", [(64, 80), (64, 80), size, (64, 80)])
    assert ran(run.main, "--data", data, "--val-share", 0, "--fit", fit, "--sampler", "deform", "--out", tmp_path / "runs", *SMALL) == 2
    said = capsys.readouterr().err
    assert "--task-size 64x32 is larger than 1 of" in said and "2.png" in said and way_out in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_overlay_shows_where_the_samples_were_taken(deform, uniform, tmp_path):
    photo(tmp_path / "a.png", 300, 700)
    for model, words, kinds in ((deform, (), {"mask", "overlay", "samples"}), (uniform, (), {"mask", "overlay"}),
                                (deform, ("--no-overlay",), {"mask"})):
        out = tmp_path / "-".join((model["model"].stem,) + words)
        assert ran(cli.main, "--engine", model["model"], "--input", tmp_path / "a.png", "--output", out, *words) == 0
        assert {name.split(".")[1] for name in os.listdir(str(out)) if name.endswith("png")} == kinds
        line = json.loads((out / "results.jsonl").read_text())
        assert (line["samples"] or "").endswith("a.samples.png" if "samples" in kinds else "")
    made, files = contract.load(str(deform["model"]))
    with Image.open(str(tmp_path / "deform" / "a.samples.png")) as sheet:
        panels = np.asarray(sheet)[pictures.BAR_PX:]
    height, width = 219, 512  # a panel's
    assert panels.shape == (height + pictures.GAP_PX, 3 * (width + pictures.GAP_PX), 3)
    seen = panels[:height, width + pictures.GAP_PX:][:, :width]
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 50  # samples of the photo, each shown as a block
    rows = np.flatnonzero((seen[1:] != seen[:-1]).any(axis=(1, 2)))
    assert 20 < len(rows) <= 31 and np.diff(rows).min() > 4
    view = images.resized(images.open_photo(str(tmp_path / "a.png")), 51, 120)  # what the net looks at, not the smaller sheet
    with Segmenter(made, files, ort) as opened:
        opened.mask(view)
        samples = reference.sample(view, opened.positions) + 0.5
    rows, cols = nearest_index(height, 32), nearest_index(width, 64)
    assert np.array_equal(seen, samples.astype(np.uint8)[rows][:, cols])


def test_samples_that_have_collapsed_are_named_once_and_every_pixel_gets_a_class(deform, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        photo(tmp_path / "in" / (name + ".png"), 96, 120)
    words = ("--engine", deform["model"], "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert ran(cli.main, *words) == 0 and "collapsed" not in capsys.readouterr().err
    monkeypatch.setattr(reference, "grid", lambda *_given: np.full((32, 64, 2), 0.4, np.float32))
    assert ran(cli.main, *words) == 0
    said = capsys.readouterr().err
    assert said.count("have collapsed") == said.count("100.0 % of the samples of") == said.count("a.png have collapsed onto each other") == 1, said
    assert mask_of(tmp_path / "out" / "b.mask.png").shape == (96, 120)


# --- scenes that are still ----------------------------------------------------------------------------------------

def test_still_frames_are_looked_at_once(deform, tmp_path, monkeypatch):
    """And their masks are those of frames that are looked at one by one."""
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "0.png", 96, 120)
    for name in ("1.png", "2.png"):
        shutil.copy(str(tmp_path / "in" / "0.png"), str(tmp_path / "in" / name))
    photo(tmp_path / "in" / "3.png", 96, 120, seed=1)
    asked, real = [], ort.Session.run

    def noted(self, stage, *given, **more):
        asked.append(stage)
        return real(self, stage, *given, **more)

    monkeypatch.setattr(ort.Session, "run", noted)
    looks = {"still": ["deform", "net", "net", "net", "deform", "net"], "plain": ["deform", "net"] * 4}
    for out, words in (("still", ("--still", 0)), ("plain", ())):
        words = ("--engine", deform["model"], "--input", tmp_path / "in", "--output", tmp_path / out) + words
        assert ran(cli.main, *words) == 0
        assert asked == looks[out]
        del asked[:]
    masks = [[mask_of(tmp_path / out / ("%d.mask.png" % i)) for i in range(4)] for out in looks]
    assert np.array_equal(*masks) and masks[0][0].any()
    assert all((mask == masks[0][0]).all() for mask in masks[0][:3]) and (masks[0][3] != masks[0][0]).any()


def mask_with_places_of(model, picture, other):
    """The mask of `picture` with the samples where `other` asks for them, step by step."""
    made, files = contract.load(str(model))
    recipe, session = contract.recipe(made), ort.Session(made, files)
    view, looked = [images.resized(p, *images.fitted_size(p.height, p.width, recipe.resize, recipe.resize_px))
                    for p in (picture, other)]
    small = images.whole(images.resized(looked, *recipe.density))
    logits = session.run("deform", {"image": images.normalise(small[None], recipe.mean, recipe.std)})["logits"][0, 0]
    where = reference.grid(reference.softmax(logits), *(recipe.task + recipe.radius))
    samples = images.normalise(reference.sample(view, where)[None], recipe.mean, recipe.std)
    found = session.run("net", {"samples": samples})["scores"][0]
    return np.concatenate([band for _y0, band in reference.unwarp_labels(found, where, picture.height, picture.width)])


def test_places_of_the_first_frame_serve_frames_that_differ_by_no_more(deform, tmp_path):
    (tmp_path / "in").mkdir()
    first, second = [photo(tmp_path / "in" / ("%d.png" % i), 96, 120, seed=i) for i in range(2)]
    own, kept = [mask_with_places_of(deform["model"], second, other) for other in (second, first)]
    assert (own != kept).any()
    for still, expected in ((255, kept), (0, own), (-1, own)):
        done = edge_run("--engine", deform["model"], "--input", tmp_path / "in", "--output", tmp_path / "out",
                        "--still", still)
        assert done.returncode == 0, done.stderr
        assert (mask_of(tmp_path / "out" / "1.mask.png") == expected).all(), still
        assert (mask_of(tmp_path / "out" / "0.mask.png") == mask_with_places_of(deform["model"], first, first)).all(), still


# --- files that are wrong -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", ["edge-oracle", "marin"])
def test_a_baseline_is_not_exported(sampler, place, capsys):
    words = SMALL + ("--epochs", 1, "--name", sampler, "--out", place / "runs")
    assert ran(run.main, "--data", place / "set", "--sampler", sampler, *words) == 0
    capsys.readouterr()
    assert ran(export.main, place / "runs" / sampler, "--out", place / (sampler + ".onnx")) == 2
    said = capsys.readouterr().err
    assert sampler in said and "--sampler deform" in said and "Traceback" not in said
    assert not [name for name in os.listdir(str(place)) if sampler in name]


def test_still_is_for_samples_that_move(uniform, tmp_path, capsys):
    photo(tmp_path / "a.png", 96, 120)
    assert ran(cli.main, "--engine", uniform["model"], "--input", tmp_path / "a.png", "--output", tmp_path / "out", "--still", 0) == 2
    said = capsys.readouterr().err
    assert "--still" in said and "pipeline uniform" in said and "expected one of deform" in said
    assert not (tmp_path / "out").exists()


TILE = {"size": 64, "overlap": 0, "batch": 1}


def changed(part, **more):
    return lambda made, other: made[part].update(more)


EDITS = {  # name: (which model, change of its contract, words of the error)
    "no warp": ("deform", lambda made, other: made.pop("warp"), "a warp and no tile"),
    "no warp, uniform": ("uniform", lambda made, other: made.pop("warp"), "a warp and no tile"),
    "a tile": ("deform", lambda made, other: made.update(tile=TILE), "a warp and no tile"),
    "a tile, uniform": ("uniform", lambda made, other: made.update(tile=TILE), "a warp and no tile"),
    "an overview": ("deform", lambda made, other: made.update(overview={"size": 32, "fusion": "add"}), "overview is"),
    "another density": ("deform", changed("warp", density=[32, 32]), "ask for"),
    "density turned": ("deform", changed("warp", density=[32, 16]), "ask for"),
    "another task": ("deform", changed("warp", task=[64, 64]), "ask for"),
    "another task, uniform": ("uniform", changed("warp", task=[64, 32]), "ask for"),
    "no pull": ("deform", changed("warp", radius=[0, 8]), "radius"),
    "a pull beyond the density": ("deform", changed("warp", radius=[4, 33]), "radius"),
    "three sizes": ("deform", changed("warp", task=[32, 64, 1]), "task"),
    "deform as uniform": ("deform", lambda made, other: made.update(pipeline="uniform"), "stages are"),
    "uniform as deform": ("uniform", lambda made, other: made.update(pipeline="deform"), "stages are"),
    "deform as patch": ("deform", lambda made, other: made.update(pipeline="patch"), "stages are"),
    "uniform as whole": ("uniform", lambda made, other: made.update(pipeline="whole"), "a tile and no warp"),
    "uniform as tiled": ("uniform", lambda made, other: made.update(pipeline="tiled", tile=TILE), "a tile and no warp"),
    "stages in another order": ("deform", lambda made, other: made["stages"].reverse(), "stages are"),
    "the contract of another": ("deform", lambda made, other: made.update(other), "is not the contract of")}


@pytest.mark.parametrize("name", sorted(EDITS))
def test_an_edited_contract_is_refused(name, deform, uniform, tmp_path, capsys):
    which, change, reason = EDITS[name]
    given, other = (deform, uniform) if which == "deform" else (uniform, deform)
    for file in os.listdir(str(given["model"].parent)):
        shutil.copy(str(given["model"].parent / file), str(tmp_path / file))
    beside = tmp_path / (which + ".json")
    made = json.loads(beside.read_text())
    change(made, json.loads(other["model"].with_suffix(".json").read_text()))
    beside.write_text(json.dumps(made))
    words = ("--input", "synthetic://64x48", "--output", tmp_path / "out")
    assert ran(cli.main, "--engine", tmp_path / (which + ".onnx"), *words) == 5
    said = capsys.readouterr().err
    assert reason in said and "Export the model again" in said and not (tmp_path / "out").exists(), said


COLOURS = ((0, 0, 0), (200, 30, 30), (30, 200, 30))
FRAME = images.ArrayPicture(np.random.RandomState(3).randint(0, 256, (90, 111, 3)).astype(np.uint8))


def random_net(sampler, outputs, seed):
    torch.manual_seed(seed)
    look = DeformNet(8, "group") if sampler == "deform" else None
    net = WarpNet(MODELS["unet"](FEATURES, 4, "group"), outputs, look).eval()
    norm.put_frozen(net, norm.group_norms(net))
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            module.bias = torch.nn.Parameter(0.1 * torch.randn(module.out_channels))
    if net.deform:
        torch.nn.init.normal_(net.deform.last.weight, std=3)
    torch.nn.init.normal_(net.head.weight)
    return net


def exported(folder, sampler="deform", outputs=3, seeds=(0, 0)):
    """(net, recipe, classes, contract, files) of random weights; seeds: of the deformation and the segmentation net."""
    config = TrainConfig(sampler=sampler, task_size="48x48", density=24, width=4, deform_width=8, res=100)
    classes = Classes(("ground", "vessel", "disc")[:max(2, outputs)], COLOURS[:max(2, outputs)], outputs, False, (255,))
    net = random_net(sampler, outputs, seeds[1])
    net.deform = net.deform and random_net(sampler, outputs, seeds[0]).deform
    settings = mode_settings(config)
    recipe = evaluate.recipe(settings, 48, 1)
    made, files = to_onnx.write(str(folder), "model", to_onnx.folded(net), config, classes, recipe,
                                to_onnx.pipeline_of(config, settings.fusion))
    return net, recipe, classes, made, files


def gate(net, recipe, classes, made, files, backend=ort, frame=FRAME):
    """The gate as export passes it. Returns the report, or raises ParityError."""
    with Segmenter(made, files, backend) as candidate, Segmenter(made, files, parity.TorchBackend(net)) as trusted:
        trusted.recipe, trusted.classes, trusted.palette = recipe, list(classes.names), list(classes.palette)
        report, _calls = parity.compare(trusted, candidate, [parity.Frame("frame", frame)])
    parity.demand(report, 1e-4, "model.onnx")
    return report


def with_files_of(folder, parts, seeds):
    other = exported(folder, parts[3]["pipeline"], seeds=seeds)
    return parts[:3] + other[3:]


def edited(part, **change):
    return lambda folder, parts: parts[:3] + (dict(parts[3], **{part: dict(parts[3][part], **change)}), parts[4])


def reordered(folder, parts):
    return parts[:3] + (dict(parts[3], classes=parts[3]["classes"][::-1]), parts[4])


class TransposedSession(ort.Session):
    def run(self, stage, inputs, keep=False):
        outputs = super().run(stage, inputs)
        return {name: array.swapaxes(2, 3) for name, array in outputs.items()} if stage == "deform" else outputs


class Transposed:
    Session, describe = TransposedSession, staticmethod(ort.describe)


FAULTS = {  # name: (sampler, change of the export, backend, where it begins)
    "stale deformation net": ("deform", lambda folder, parts: with_files_of(folder, parts, (1, 0)), ort, "deform"),
    "stale net": ("deform", lambda folder, parts: with_files_of(folder, parts, (0, 1)), ort, "net"),
    "both stale": ("deform", lambda folder, parts: with_files_of(folder, parts, (1, 1)), ort, "deform"),
    "logits transposed": ("deform", lambda folder, parts: parts, Transposed, "deform"),
    "mean and std": ("deform", edited("image", mean=[0.5, 0.5, 0.5]), ort, "prepare"),
    "resize rule": ("deform", edited("image", resize="stretch", resize_px=60), ort, "prepare"),
    "stale net, uniform": ("uniform", lambda folder, parts: with_files_of(folder, parts, (0, 1)), ort, "net"),
    "radius": ("deform", edited("warp", radius=[2, 2]), ort, "sample"),
    "class order": ("uniform", reordered, ort, "decode")}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_seeded_fault_is_stopped_in_its_stage(name, tmp_path):
    sampler, change, backend, stage = FAULTS[name]
    parts = exported(tmp_path, sampler)
    with pytest.raises(ParityError, match="begins in stage %s " % stage) as error:
        gate(*change(tmp_path, parts), backend=backend)
    assert error.value.exit_code == 4


@pytest.mark.parametrize("sampler, outputs", [("deform", 1), ("deform", 3), ("uniform", 1), ("uniform", 3)])
def test_sound_export_raises_no_alarm(sampler, outputs, tmp_path):
    report = gate(*exported(tmp_path, sampler, outputs))
    assert report["changed_share"] <= 1e-4 and report["stages"]["prepare"] == report["stages"]["decode"] == 0
    assert {"net", sampler} - {"uniform"} <= set(report["stages"]) and report["largest_score"] > 0.1


class LastBitsSession(ort.Session):
    """Density logits that differ as two machines' do: by some units in the last place."""

    def run(self, stage, inputs, keep=False):
        outputs = super().run(stage, inputs)
        if stage == "deform":
            noise = np.random.RandomState(0).uniform(-1, 1, outputs["logits"].shape)
            outputs = {"logits": (outputs["logits"] + 2e-5 * np.abs(outputs["logits"]).max() * noise).astype(np.float32)}
        return outputs


class LastBits:
    Session, describe = LastBitsSession, staticmethod(ort.describe)


def test_last_bits_of_the_logits_are_no_alarm(tmp_path):
    """They move samples by a part of a pixel, and on noise that changes scores by more than rounding does."""
    net, recipe, classes, made, files = exported(tmp_path)
    made["image"]["resize"], recipe = "none", recipe._replace(resize="none")
    noise = images.ArrayPicture(np.random.RandomState(0).randint(0, 256, (900, 1500, 3)).astype(np.uint8))
    report = gate(net, recipe, classes, made, files, LastBits, noise)
    assert 0 < report["stages"]["deform"] <= 1e-4 and report["stages"]["sample"] == 0
    with Segmenter(made, files, ort) as plain, Segmenter(made, files, LastBits) as noisy:
        pairs = zip(plain.score_bands(noise), noisy.score_bands(noise))
        assert max(np.abs(a - b).max() for (_y0, a), (_y, b) in pairs) > 10 * report["max_abs_error"]


# --- engines ------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not os.path.isdir(api_folder()), reason="the listed names of TensorRT's bindings are not in %s; set "
                    "NANOPATCH_DATA" % api_folder())
@pytest.mark.parametrize("generation, sampler", rest_slow([
    ("8.2", "deform"), ("8.2", "uniform"), ("10.3", "deform")]))
def test_engine_gives_the_masks_of_onnx_runtime(generation, sampler, request, tmp_path):
    model = request.getfixturevalue(sampler)
    done = build(model, tmp_path, generation)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "model.plan.json").read_text())
    assert made["engine"]["precision"] == "float32" and made["parity"]["changed_share"] <= 1e-4 and "warp" in made
    photo(tmp_path / "a.png", 130, 117)
    masks = []
    for engine, env in ((model["model"], {}), (tmp_path / "model.plan", board(generation, tmp_path))):
        done = edge_run("--engine", engine, "--input", tmp_path / "a.png", "--output", tmp_path / "out.png", **env)
        assert done.returncode == 0, done.stderr
        masks.append(mask_of(tmp_path / "out.png"))
    assert "trt (TensorRT " + generation in done.stderr and masks[0].any() and not masks[0].all()
    assert (masks[0] == masks[1]).mean() >= 0.9999


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(api_folder()), reason="the listed names of TensorRT's bindings are not in %s; set "
                    "NANOPATCH_DATA" % api_folder())
def test_half_precision_moves_no_sample(deform, tmp_path):
    """The net of the task is built in half precision, the one that says where to look is not: the same pictures of where they lie."""
    done = build(deform, tmp_path, "8.2", "--fp16")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "model.plan.json").read_text())
    assert made["engine"]["precision"] == "float16" and made["parity"]["max_abs_error"] > 0
    photo(tmp_path / "a.png", 130, 117)
    drawn = []
    for engine, env in ((deform["model"], {}), (tmp_path / "model.plan", board("8.2", tmp_path))):
        done = edge_run("--engine", engine, "--input", tmp_path / "a.png", "--output", tmp_path / "out", **env)
        assert done.returncode == 0, done.stderr
        drawn.append(mask_of(tmp_path / "out" / "a.samples.png").astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 1


# --- runs that are killed, and large images -----------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(place):
    """In the middle of an epoch, the weight of the edge loss falling, the norms frozen later on."""
    words = ("--data", place / "set", "--sampler", "deform", "--gamma-power", 0.9) + SMALL + (
        "--epochs", 4, "--freeze-at", 0.6, "--save-every", 0, "--out", place / "runs", "--name")
    killed, whole = place / "runs" / "killed", place / "runs" / "whole"
    process = start(place, "-c", KILLED_WHILE_SAVING, 33, *(words + ("killed",)))
    assert process.wait(timeout=300) == -signal.SIGKILL, (place / "output.txt").read_text()
    _tensors, meta = checkpoint.read_newest(str(killed / "last.safetensors"))
    assert 0 < meta["step"] < 10 and meta["batch"] > 0
    assert ran(run.main, "--resume", killed) == 0
    assert ran(run.main, *(words + ("whole",))) == 0
    for file in ("last.safetensors", "best.safetensors"):
        (a, at), (b, bt) = [checkpoint.read(str(folder / file)) for folder in (killed, whole)]
        assert sorted(a) == sorted(b) and any(name.startswith("net.deform.") for name in a)
        assert [key for key in b if not np.array_equal(a[key], b[key])] == [] and at["step"] == bt["step"]
    logs = [(folder / "log.jsonl").read_text() for folder in (killed, whole)]
    assert logs[0] == logs[1] and logs[0].count("\n") == 16 and table(killed) == table(whole)


READ = """
import os, sys
import numpy as np
import torch
from edge.errors import raise_all
from train_lite.config import TrainConfig, mode_settings
from train_lite.data import dataset, store
from train_lite.state import State
from train_lite.tasks.segmentation import Segmentation
torch.set_num_threads(1)
folder, res = sys.argv[1], int(sys.argv[2])
config = TrainConfig(res=res, width=16, sampler="deform", task_size="256x256", epochs=1, shrink=0.0)
problems, settings = [], mode_settings(config)
classes = dataset.read_classes(folder, config)
stored = store.ingest(dataset.find_pairs(folder, 0.0), classes, "long", res, os.path.join(folder, "cache"), 16,
                      settings.density, 0, problems)
"""
ONE_STEP = """
raise_all(problems, "", "")
problem = Segmentation(config, classes, stored, [], [], torch.device("cpu"))
state = State(problem)
torch.nn.init.normal_(state.net.deform.last.weight, std=3)
""" + STEP


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """64 times the pixels, at most 5 % more at the peak of a step that finds the label edges, too. The smallest of two
    against the largest: processes that do the same differ by 5 % themselves. Reading the images is not in it: a first process has done that."""
    peaks = {}
    for res in (1024, 8192):
        folder = tmp_path / str(res)
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        for kind, array in (("images", BLOCKS), ("masks", BLOCKS[..., 0] % 2 * 255)):
            write_large(array, res, folder / kind / "0.png")
        peaks[res] = peaks_kib(READ, ONE_STEP, (folder, res), 2, lambda: [edges.unlink() for edges in (folder / "cache").glob("*.edges")])
    assert peaks[8192][0] <= 1.05 * peaks[1024][-1], peaks
