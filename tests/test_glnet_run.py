"""Two nets that see each other's maps, from the trained net to masks: export, the parity gate, edge-run, engines on the doubles."""
import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import command, write_set
from doubles import api_folder
from edge import contract, pipeline, proof
from edge.backends import ort
from edge.errors import BadFile, ParityError
from edge.images import ArrayPicture
from export import parity, targets, to_onnx
from test_engine import board
from train_lite import evaluate, state
from train_lite.config import TrainConfig, mode_settings
from train_lite.data import dataset, store
from train_lite.data.dataset import Classes
from train_lite.models import glnet

PLAN = ["--model", "glnet", "--width", 16, "--res", 512, "--patch", 128, "--plan"]
STAGES = {"2": ["overview", "local", "fusion"], "3": ["overview", "local", "whole", "fusion"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a set of two classes, of the runs of all stages, and of their models 1, 2 and 3, made by the commands."""
    folder = tmp_path_factory.mktemp("branches")
    write_set(folder / "set", count=5, height=96, width=120)
    done = command("train_lite", "--data", "set", "--model", "glnet-mobilenetv2", "--res", 120, "--patch", 32, "--overlap", 8, "--width", 4,
                   "--epochs", 3, "--lr", 1e-2, "--validate-every", 3, "--name", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    for stage, run in (("1", "run"), ("2", "run-2"), ("3", "run-3")):
        done = command("export", os.path.join("runs", "train", run), "--out", os.path.join(stage, "model.onnx"), "--tile-batch", 2, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "operators, all of them known to nano" in done.stderr
    return folder


def masks_of(net, config, classes, tile, folder, cache):
    """{image: class ids} of the set by train_lite's own path."""
    settings = mode_settings(config)
    how = evaluate.recipe(settings, tile, 2)
    found = store.ingest(dataset.find_pairs(str(folder / "set"), 0.0), classes, "long", 120, str(cache), 1, (tile, tile), 0, [])
    return {entry.pair.image: np.concatenate([band for _y0, band in evaluate.label_bands(net, entry, how, torch.device("cpu"))]) for entry in found}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_edge_run_gives_train_lites_masks(stage, trained, tmp_path):
    run = trained / "runs" / "train" / ("run" if stage == "1" else "run-" + stage)
    net, config, classes, tile, _meta = state.restore(str(run / "best.safetensors"))
    expected = masks_of(net, config, classes, tile, trained, tmp_path / "cache")
    done = command("edge.cli", "--engine", trained / stage / "model.onnx", "--input", trained / "set" / "images", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    seen = 0
    for line in [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]:
        mask = np.asarray(Image.open(line["mask"]))
        want, = [labels for image, labels in expected.items() if os.path.basename(image) == os.path.basename(line["source"])]
        assert mask.shape == want.shape and (mask == want).mean() >= 0.9999
        seen += int(want.any() and not want.all())
    assert seen or stage == "1", "a net that sees one class proves nothing"
    made = json.loads((trained / stage / "model.json").read_text())
    assert [part["name"] for part in made["stages"]] == STAGES.get(stage, ["net"])
    assert made["pipeline"] == ("whole" if stage == "1" else "glnet")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(api_folder()), reason="the listed names of TensorRT's bindings are not in %s; set NANOPATCH_DATA" % api_folder())
@pytest.mark.parametrize("generation", ["8.2", "11.4"])
def test_engines_give_the_masks_of_onnx_runtime(generation, trained, tmp_path):
    images, env = trained / "set" / "images", board(generation, tmp_path)
    done = command("export", trained / "3" / "model.onnx", "--out", tmp_path / "model.plan", "--frames", images, env=env)
    assert done.returncode == 0, done.stderr
    for engine, more, out in ((trained / "3" / "model.onnx", {}, "a"), (tmp_path / "model.plan", env, "b")):
        done = command("edge.cli", "--engine", engine, "--input", images, "--output", tmp_path / out, env=more)
        assert done.returncode == 0, done.stderr
    names = [name for name in os.listdir(str(tmp_path / "a")) if name.endswith("mask.png")]
    assert len(names) == 5
    for name in names:
        a, b = (np.asarray(Image.open(str(tmp_path / part / name))) for part in "ab")
        assert (a == b).mean() >= 0.9999


def toy(model, stage, outputs):
    """(net, config, classes) with weights that all matter."""
    config = TrainConfig(model=model, stage=str(stage), base="x", width=4, res=150, patch=64, overlap=16)
    torch.manual_seed(0)
    net = glnet.build(stage, model, 4, "group", outputs).eval()
    for branch in [net.overview, net.local] + ([net.whole] if stage == 3 else []):
        for ending in branch.encoder.residual_ends():
            torch.nn.init.uniform_(ending.weight, 0.1, 0.4)
    names = ("background", "thing") if outputs == 1 else tuple("class %d" % index for index in range(outputs))
    return net, config, Classes(names, tuple((index, 0, 0) for index in range(len(names))), outputs, False, ())


@pytest.mark.parametrize("model, stage, outputs", [("glnet", 2, 1), ("glnet-mobilenetv2", 3, 3)])
def test_exports_pass_the_target_check_and_the_gate(model, stage, outputs, tmp_path):
    net, config, classes = toy(model, stage, outputs)
    recipe = evaluate.recipe(mode_settings(config), 64, 2)
    made, files = to_onnx.write(str(tmp_path), "model", to_onnx.folded(net), config, classes, recipe, to_onnx.pipeline_of(config, "maps"))
    contract.write(str(tmp_path / "model.json"), made)
    assert contract.recipe(contract.load(str(tmp_path / "model.onnx"))[0]) == recipe
    for file in files.values():
        targets.demand(file, "nano")
    kind = pipeline.of(made)
    with kind(made, files, ort) as candidate, kind(made, files, parity.TorchBackend(net)) as reference:
        frame = parity.Frame("frame", ArrayPicture(np.random.RandomState(3).randint(0, 256, (131, 183, 3)).astype(np.uint8)))
        report, _calls = parity.compare(reference, candidate, [frame])
        parity.demand(report, 1e-4, "model.onnx")
        made["proof"] = proof.make(reference, 1e-4)
        assert proof.demand(candidate, made, "model.onnx") < 1
        for part in ([net.whole.pyramid.smooth] if stage == 3 else [net.local.pyramid.lateral[3]]) + [net.fuse_deep, net.overview.pyramid.smooth1[0]]:
            wrong = copy.deepcopy(net)
            name, = [name for name, module in net.named_modules() if module is part]
            torch.nn.init.normal_(wrong.get_submodule(name).weight)
            with kind(made, files, parity.TorchBackend(wrong)) as other, pytest.raises(ParityError, match="other answers"):
                proof.demand(other, made, "model.onnx")


@pytest.mark.slow
def test_coarse_to_fine_works_on_what_is_proposed(trained):
    made, files = contract.load(str(trained / "2" / "model.onnx"))
    made["glnet"]["coarse"] = 0.3
    picture = ArrayPicture(np.random.RandomState(3).randint(0, 256, (120, 120, 3)).astype(np.uint8))
    with pipeline.of(made)(made, files, ort) as segmenter:
        assert segmenter.recipe.coarse == 0.3
        worked, rough = [], {}
        run = segmenter.session.run

        def counted(stage, inputs, keep=False):
            worked.append(stage)
            found = run(stage, inputs, keep)
            if stage == "overview":
                found["rough"] = rough["scores"]
            return found
        segmenter.session.run = counted
        for value, least, most in ((-5.0, 0, 0), (5.0, 4, 20)):
            rough["scores"] = np.full((1, 1, 8, 8), value, np.float32)
            del worked[:]
            mask = segmenter.mask(picture)
            assert least <= worked.count("local") <= most and worked.count("overview") == 1
            assert value > 0 or not mask.any()


@pytest.mark.slow
@pytest.mark.parametrize("change, said", [
    ({"glnet": None}, "no glnet part"), ({"tile": {"size": 48, "overlap": 8, "batch": 2}}, "multiples of 32"), ({"overview": None}, "overview is None"),
    ({"classes": [{"name": str(index), "colour": [0, 0, 0]} for index in range(3)]}, "rough"), ({"glnet": {"coarse": 0.9}}, "at most 0.5")])
def test_contracts_that_disagree_are_refused(change, said, trained, tmp_path):
    for name in os.listdir(str(trained / "3")):
        shutil.copy(str(trained / "3" / name), str(tmp_path / name))
    made = dict(json.loads((tmp_path / "model.json").read_text()), **change)
    (tmp_path / "model.json").write_text(json.dumps({key: value for key, value in made.items() if value is not None or key == "overview"}))
    with pytest.raises(BadFile, match=said):
        contract.load(str(tmp_path / "model.onnx"))


@pytest.mark.slow
def test_a_model_without_one_of_its_files_is_refused(trained, tmp_path):
    for name in os.listdir(str(trained / "3")):
        if "whole" not in name:
            shutil.copy(str(trained / "3" / name), str(tmp_path / name))
    done = command("edge.cli", "--engine", tmp_path / "model.onnx", "--input", trained / "set" / "images")
    assert done.returncode == 5 and "model.whole.onnx is missing" in done.stderr


@pytest.mark.slow
def test_a_plan_looks_at_all_stages(tmp_path):
    done = command("train_lite", *PLAN, "--budget", "8GB", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    assert len(peaks) == 3 and peaks[0] < peaks[1] < peaks[2] and "then stage 3: budget" in done.stdout
    done = command("train_lite", *PLAN, "--stage", "12", "--budget", "8GB", cwd=tmp_path)
    assert done.stdout.count("budget") == 2
