"""Boxes from patches at their place in a pyramid: gradients, targets, the head in windows, and what is found."""
import copy
import json
import os
import shutil
import tracemalloc
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from conftest import BLOCKS, LOOK, STEP, command, peaks_kib, rest_slow, write_large
from doubles import api_folder
from edge import boxes
from edge.errors import BadFile, ParityError
from edge.images import ArrayPicture
from edge.scores import Host, Recipe
from train_lite.config import ModeSettings
from train_lite.data.dataset import Box, Pair
from train_lite.gradient import Gradient
from train_lite.models import fcos
from train_lite.patches import MEAN, STD
from train_lite.tasks import boxloss
from train_lite.tasks.boxloss import BoxLoss
from train_lite.tasks.detection import BoxBatch, BoxView, Detection
from train_lite.tasks.field import Field
from test_engine import board

TILE = 128
MODELS = ["fcos-mobilenetv2", "fcos-resnet50"]


class Memory:
    """A Stored whose pixels are an array, and whose boxes are given in px."""

    def __init__(self, rng, height, width, found, folder):
        self.height, self.width, self.path = height, width, str(folder / "x")
        self.pair = Pair("x", "", "", "train", boxes=tuple(
            Box(label, x0 / width, y0 / height, x1 / width, y1 / height, crowd) for x0, y0, x1, y1, label, crowd in found))
        self.picture = ArrayPicture(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        self._overview = rng.randint(0, 256, (TILE, TILE, 3)).astype(np.uint8)

    def overview(self, height, width):
        assert height == width == TILE
        return self._overview


BOXES = [(10, 20, 60, 90, 0, False), (100, 40, 330, 190, 1, False), (30, 30, 42, 44, 2, False), (200, 100, 290, 160, 1, True)]


def problem(folder, model="fcos-mobilenetv2", norm="group", fusion="add", size=(200, 340), seed=0):
    """(net, batch) of toy size in float64: an image as it is and one mirrored, both cut by the border of their last tiles."""
    rng = np.random.RandomState(seed)
    torch.manual_seed(seed)
    net = fcos.build(model, 4, norm, 3, fusion).double()
    for module in net.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(std=0.1)
    for ending in net.encoder.residual_ends():  # they begin at zero, and then nothing behind them has a gradient
        torch.nn.init.uniform_(ending.weight, 0.1, 0.4)
    torch.nn.init.normal_(net.last.bbox.weight, std=0.02)
    views = [BoxView(Memory(rng, *size, found=found, folder=folder), turn, TILE) for turn, found in ((0, BOXES), (4, BOXES[:2]))]
    return net, BoxBatch(views, TILE if fusion != "none" else 0, torch.device("cpu"), torch.float64)


def plain(net, batch):
    """(loss, {name: gradient}): all patches in one pass, whole maps, one graph; the loss written out anew."""
    every = batch.every_patch()
    parts = boxes.split(net.encoder(batch.chunk(every).pixels), TILE)
    g = boxes.split(net.encoder(batch.overviews([0, 1])), TILE) if batch.side else None
    total, own = 0.0, 0
    for image, view in enumerate(batch.views):
        rows, cols = view.grid
        for level, part in enumerate(parts):
            stride, here = boxes.STRIDES[level], part[image * rows * cols:(image + 1) * rows * cols]
            side, channels = here.shape[3], here.shape[1]
            whole = here.reshape(rows, cols, channels, side, side).permute(2, 0, 3, 1, 4).reshape(1, channels, rows * side, cols * side)
            height, width = -(-view.height // stride), -(-view.width // stride)
            whole = whole[:, :, :height, :width]
            if g is not None:
                down, across = (torch.from_numpy(m).double() for m in boxes.spread(level, view.height, view.width, side, 0, 0, height, width))
                spread = down @ g[level][image:image + 1] @ across.t()
                whole = net.join(torch.cat([whole, spread], 1) if net.fusion == "concat" else whole + spread)
            outputs = []
            for tower, last in ((net.last.classes, net.last.cls_logits), (net.last.places, net.last.bbox)):
                y = whole
                for conv in tower:
                    y = torch.relu(conv(y))
                outputs.append(last(y)[0])
            logits, bbox = outputs
            labels, distances = boxloss.targets(level, 0, 0, height, width, view.truth())
            for y in range(height):
                for x in range(width):
                    if labels[y, x] == boxloss.CROWD:
                        continue
                    for c in range(3):
                        p = torch.sigmoid(logits[c, y, x])
                        total = total - (0.25 * (1 - p) ** 2 * torch.log(p) if labels[y, x] == c else 0.75 * p ** 2 * torch.log(1 - p))
                    if labels[y, x] >= 0:
                        own += 1
                        total = total + place_loss(bbox[:, y, x], distances[:, y, x])
    loss = total / own
    loss.backward()
    return float(loss.detach()), taken(net)


def place_loss(said, told):
    """1 - GIoU by corners, and the entropy of the centre-ness, of one cell."""
    a, b = torch.exp(said[:4]), torch.from_numpy(told)
    a, b = torch.cat([-a[:2], a[2:]]), torch.cat([-b[:2], b[2:]])
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    common = area(torch.cat([torch.max(a[:2], b[:2]), torch.min(a[2:], b[2:])]))
    hull = area(torch.cat([torch.min(a[:2], b[:2]), torch.max(a[2:], b[2:])]))
    union = area(a) + area(b) - common
    left, up, right, down = told
    centre = np.sqrt(min(left, right) / max(left, right) * min(up, down) / max(up, down))
    p = torch.sigmoid(said[4])
    return 1 - (common / union - (hull - union) / hull) - centre * torch.log(p) - (1 - centre) * torch.log(1 - p)


def taken(net):
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for p in net.parameters():
        p.grad = None
    return found


def ours(net, batch, how="exact", micro=2, patches=1, inner=1):
    """(losses, {name: gradient}) as training computes them."""
    made = Gradient(net, BoxLoss(), ModeSettings("none", 0, TILE, net.fusion, how, "image", 0), patches, inner, micro)
    losses = list(made.rounds(batch, np.random.RandomState(0)))
    made.finish(clip=0)
    return losses, taken(net)


def assert_same(got, want):
    assert sorted(got) == sorted(want)
    scale = max(float(g.abs().max()) for g in want.values())
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= 1e-9 * max(float(want[name].abs().max()), 1e-3 * scale), name


@pytest.mark.parametrize("model, norm, fusion, micro", [
    ("fcos-mobilenetv2", "group", "add", 2), ("fcos-mobilenetv2", "frozen", "concat", 100), ("fcos-resnet50", "group", "none", 5),
    ("fcos-resnet50", "frozen", "concat", 1)])
def test_exact_equals_plain_autograd(model, norm, fusion, micro, tmp_path):
    net, batch = problem(tmp_path, model, norm, fusion)
    value, want = plain(net, batch)
    (got_value,), got = ours(net, batch, micro=micro)
    assert abs(got_value - value) < 1e-10 * abs(value)
    assert_same(got, want)


def test_sampled_with_every_patch_is_exact(tmp_path):
    net, batch = problem(tmp_path)
    _losses, want = ours(net, batch)
    _losses, got = ours(net, batch, "sampled", patches=6)
    assert_same(got, want)


def test_sampled_gradients_are_k_of_n_on_average(tmp_path):
    """Each patch's own gradient, all cells fresh: over every choice of one of six they sum to the encoder's exact one."""
    net, batch = problem(tmp_path, fusion="none")
    _losses, want = ours(net, batch)
    total = {}
    for tile in range(6):
        made = Gradient(net, BoxLoss(), ModeSettings("none", 0, TILE, "none", "sampled", "image", 0), 1, 1, 4)
        table = made.objective.table(batch)
        made.fill(batch, batch.every_patch(), table, 0)
        made.add(batch, [(0, tile), (1, tile)], table, 0, filled=True)
        made.finish(clip=0)
        for name, gradient in taken(net).items():
            total[name] = total.get(name, 0) + gradient
    assert_same({name: value for name, value in total.items() if name.startswith("encoder")},
                {name: value for name, value in want.items() if name.startswith("encoder")})


@pytest.mark.parametrize("model", MODELS)
def test_either_path_alone_trains_all_of_the_backbone(model, tmp_path):
    """The local patches without a global one; the global patch where no local one carries gradient."""
    net, batch = problem(tmp_path, model, fusion="none")
    _losses, local = ours(net, batch, "sampled", patches=1)
    assert all(float(local["encoder." + name].abs().max()) > 0 for name, _p in net.encoder.named_parameters())
    net, batch = problem(tmp_path, model, fusion="add")
    made = Gradient(net, BoxLoss(), ModeSettings("none", 0, TILE, "add", "sampled", "image", 0), 1, 1, 4)
    table = made.objective.table(batch)
    made.fill(batch, batch.every_patch(), table, 0)
    table.surrogate = lambda _picks, kept, _factor: 0 * kept.sum()
    made.add(batch, batch.every_patch()[:1], table, 0, filled=True)
    assert all(float(p.grad.abs().max()) > 0 for p in net.encoder.parameters())


def test_the_head_in_windows_is_the_head_on_the_whole_map(tmp_path):
    """Rows that come and go, halos, the mask beyond the border: as one pass over whole maps; every cell once."""
    net, batch = problem(tmp_path, fusion="concat", size=(600, 470))
    net = net.float().eval()
    view = batch.views[0]
    recipe = Recipe("none", 0, TILE, 0, 3, TILE, MEAN, STD)
    with torch.no_grad():
        found = list(boxes.windows(view.stored.picture, recipe, lambda p: net.encoder(torch.from_numpy(p)).numpy(),
                                   lambda *given: net.head(*map(torch.from_numpy, given)).numpy()))
    whole = [np.full((8,) + size, np.nan, np.float32) for size in boxes.sizes(600, 470)]
    for level, y, x, scores in found:
        part = whole[level][:, y:y + scores.shape[1], x:x + scores.shape[2]]
        assert part.shape == scores.shape and np.isnan(part).all()
        part[...] = scores
    batch = BoxBatch([view], 0, torch.device("cpu"))
    with torch.no_grad():
        parts = boxes.split(net.encoder(batch.chunk(batch.every_patch()).pixels), TILE)
        host = Host()
        small = host.prepared(host.fitted(view.stored.picture, TILE, TILE), [(0, 0, TILE, TILE)], recipe)
        g = boxes.split(net.encoder(torch.from_numpy(small)), TILE)
        for level, (got, (height, width)) in enumerate(zip(whole, boxes.sizes(600, 470))):
            side, (rows, cols) = parts[level].shape[3], view.grid
            cells = parts[level].reshape(rows, cols, -1, side, side).permute(2, 0, 3, 1, 4).reshape(1, -1, rows * side, cols * side)
            down, across = (torch.from_numpy(m) for m in boxes.spread(level, 600, 470, side, 0, 0, height, width))
            want = net.head(cells[:, :, :height, :width], down @ g[level] @ across.t())[0].numpy()
            assert np.abs(got - want).max() < 2e-5 * max(1, np.abs(want).max()), level


def test_targets_by_hand():
    """A box of 40 x 24 px: its middle lies on level 0, whose reach is 64 px; cells within 12 px of it stand for it."""
    truth = np.array([[20, 12, 60, 36, 3, 0]], float)
    labels, distances = boxloss.targets(0, 0, 0, 8, 10, truth)
    assert sorted(zip(*np.nonzero(labels == 3))) == [(2, 4), (2, 5), (3, 4), (3, 5)]
    assert distances[:, 2, 4].tolist() == [(36 - 20) / 8, (20 - 12) / 8, (60 - 36) / 8, (36 - 20) / 8]
    assert (boxloss.targets(1, 0, 0, 4, 5, truth)[0] == boxloss.NOTHING).all(), "no side lies 64 px away"


def test_the_smaller_of_two_boxes_counts_and_crowds_do_not():
    truth = np.array([[0, 0, 60, 60, 0, 0], [24, 24, 40, 40, 1, 0], [40, 0, 64, 64, 2, 1]], float)
    labels, _distances = boxloss.targets(0, 0, 0, 8, 8, truth)
    assert labels[3, 3] == 1 and labels[0, 0] == boxloss.NOTHING and labels[7, 7] == boxloss.CROWD
    assert labels[2, 2] == 0 and labels[3, 4] == 1, "a crowd takes no cell from a box"


def test_decoding_gives_back_what_targets_say():
    rng = np.random.RandomState(0)
    truth = np.array([(x, y, x + w, y + h, label, 0) for x, y, w, h, label in zip(
        rng.randint(0, 300, 12), rng.randint(0, 200, 12), rng.randint(9, 200, 12), rng.randint(9, 200, 12), rng.randint(0, 4, 12))], float)
    seen = set()
    for level, (rows, columns) in enumerate(boxes.sizes(400, 500)):
        labels, distances = boxloss.targets(level, 0, 0, rows, columns, truth)
        scores = np.full((9, rows, columns), -20.0)
        scores[:4][np.arange(4)[:, None, None] == labels] = 20
        scores[4:8], scores[8] = np.log(np.maximum(distances, 1e-9)), 20
        for found in boxes.decoded(scores, level, 0, 0, 0.5):
            off = np.abs(truth[:, [0, 1, 2, 3, 4]] - found[[0, 1, 2, 3, 5]]).max(axis=1)
            assert off.min() < 1e-6
            seen.add(int(off.argmin()))
    assert len(seen) > 8, "boxes whose middle smaller ones cover may have no cell"


def test_overlapping_boxes_of_a_class_leave_the_best():
    found = np.array([[0, 0, 10, 10, .9, 1], [1, 0, 10, 10, .8, 1], [1, 0, 10, 10, .7, 2], [20, 0, 30, 10, .6, 1]])
    assert boxes.apart(found, 0.6, 100)[:, 4].tolist() == [.9, .7, .6]
    assert boxes.apart(found, 0.95, 100)[:, 4].tolist() == [.9, .8, .7, .6]
    assert boxes.apart(found, 0.6, 2)[:, 4].tolist() == [.9, .7]
    assert boxes.apart(found[:0], 0.6, 2).shape == (0, 6)


def test_boxes_that_are_kept_do_not_hold_the_others_in_memory():
    """10,000 boxes of 0.5 MB, 300 kept: each of them would hold what was left when it was taken, 140 MB in all."""
    grid = np.arange(10000)
    found = np.stack([grid * 2, grid * 0, grid * 2 + 1, grid * 0 + 1, 1 - grid / 20000.0, grid * 0], axis=1)
    tracemalloc.start()
    try:
        assert len(boxes.apart(found, 0.6, 300)) == 300
        assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


def test_field_reads_what_was_written(tmp_path):
    rng = np.random.RandomState(0)
    field, want = Field(str(tmp_path), 300, 400, 3, np.float32), np.zeros((3, 38, 50), np.float32)
    for _ in range(20):
        y, x, h, w = rng.randint(0, 30), rng.randint(0, 40), rng.randint(1, 9), rng.randint(1, 11)
        cells = rng.rand(3, h, w).astype(np.float32)
        if y + h <= 38 and x + w <= 50:
            field.add(0, y, x, cells)
            want[:, y:y + h, x:x + w] += cells
    assert (field.read(0, 0, 0, 38, 50) == want).all() and (field.read(1, 0, 0, 19, 25) == 0).all()
    field.clear()
    assert (field.read(0, 0, 0, 38, 50) == 0).all()
    tile = rng.rand(3, 16 * 16 + 64 + 16 + 4 + 1).astype(np.float32)
    field.write_tile((256, 256, 384, 384), boxes.split(tile[None], 128) and [part[0] for part in boxes.split(tile[None], 128)])
    again = boxes.split(field.read_tile((256, 256, 384, 384))[None], 128)
    for level, (part, kept) in enumerate(zip(boxes.split(tile[None], 128), again)):
        rows, cols = [full - 256 // boxes.STRIDES[level] for full in field.sizes[level]]
        assert (kept[0, :, :rows, :cols] == part[0, :, :rows, :cols]).all() and (kept[0, :, rows:] == 0).all()
    assert list(tmp_path.iterdir()) == [], "the file has no name"


# --- the command ----------------------------------------------------------------------------------------------------

NAMES = ("disc", "square")


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A set in YOLO form that a net learns in seconds: red discs and blue squares on grey, of several shapes; one image without."""
    folder, rng = tmp_path_factory.mktemp("things"), np.random.RandomState(0)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    for split, count in (("train", 10), ("val", 3)):
        for part in ("images", "labels"):
            (folder / split / part).mkdir(parents=True)
        for index in range(count):
            width, height = 192, 128 + 32 * (index % 3)
            image, lines = Image.fromarray((120 + rng.randint(-10, 11, (height, width, 3))).astype(np.uint8)), []
            for place in range(3 if index else 0):
                side = rng.randint(24, 56)
                x, y, label = 64 * place + rng.randint(0, 64 - side), rng.randint(0, height - side), rng.randint(0, 2)
                pen = ImageDraw.Draw(image)
                (pen.ellipse if label == 0 else pen.rectangle)((x, y, x + side, y + side), fill=((220, 40, 40), (40, 60, 220))[label])
                lines.append("%d %f %f %f %f" % (label, (x + side / 2) / width, (y + side / 2) / height, side / width, side / height))
            image.save(str(folder / split / "images" / ("%d.png" % index)))
            if lines:
                (folder / split / "labels" / ("%d.txt" % index)).write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(things, tmp_path_factory):
    """Folder of a run, and of its model.onnx, made by the commands."""
    folder = tmp_path_factory.mktemp("detected")
    done = command("train_lite", "--data", things, "--res", 192, "--patch", 128, "--model", "fcos-mobilenetv2", "--width", 8, "--epochs", 16,
                   "--inner", 1, "--lr", "5e-3", "--validate-every", 8, "--out", folder, "--name", "run", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "summary").write_text(done.stdout)
    done = command("export", folder / "run", "--out", folder / "model.onnx")
    assert done.returncode == 0, done.stderr
    assert "boxes pipeline" in done.stderr and "operators, all of them known to nano" in done.stderr
    return folder


@pytest.mark.slow
def test_trains_and_resumes(trained):
    summary = json.loads((trained / "summary").read_text())
    assert summary["val"]["ap50"] > 0.5 and summary["best_val_ap"] > 0.2, summary
    header = (trained / "run" / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,step,loss,lr,seconds,peak_mib,ap,ap50,ap75,ap_small,ap_medium,ap_large,ar"
    assert len(os.listdir(str(trained / "run" / "samples"))) == 3
    done = command("train_lite", "--resume", trained / "run")
    assert done.returncode == 0 and "val  AP" not in done.stderr and "done in" in done.stderr, done.stderr


@pytest.mark.slow
def test_edge_run_gives_trainings_own_boxes(trained, things, tmp_path):
    from edge import schema
    from train_lite import state
    from train_lite.data import boxed, store
    from train_lite.tasks.detection import Detection
    net, config, classes, _tile, _meta = state.restore(str(trained / "run" / "best.safetensors"))
    pairs, _classes = boxed.find(str(things))
    stored = store.ingest([pair for pair in pairs if pair.split == "val"], classes, "long", 192, str(tmp_path / "cache"), 1, (128, 128), 0, [])
    problem_ = Detection(config, classes, stored, [], [], torch.device("cpu"))
    done = command("edge.cli", "--engine", trained / "model.onnx", "--input", things / "val" / "images", "--output", tmp_path / "out", "--overlay")
    assert done.returncode == 0, done.stderr
    seen = 0
    for line in [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]:
        assert schema.violations(line, schema.load("result")) == [] and line["mask"] is None
        entry, = [s for s in stored if s.pair.image == line["source"]]
        want = problem_.boxes(net, entry, boxes.rules(100))
        want[:, :4] *= line["width"] / float(entry.width)
        assert len(want) == len(line["boxes"])
        for box, found in zip(want, line["boxes"]):
            assert found["class"] == NAMES[int(box[5])] and abs(found["score"] - box[4]) < 1e-4
            assert np.abs(np.array(found["box"]) - box[:4]).max() < 0.05
        seen += len(want)
        assert Image.open(line["overlay"]).size == (line["width"], line["height"])
    assert seen, "a net that finds nothing proves nothing"
    import edge
    result = [result for _frame, result in edge.run(str(trained / "model.onnx"), str(things / "val" / "images"))][-1]
    assert result.mask is None and result.boxes == line["boxes"]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(api_folder()), reason="the listed names of TensorRT's bindings are not in %s; set NANOPATCH_DATA" % api_folder())
@pytest.mark.parametrize("generation", ["8.2", "11.4"])
def test_engine_gives_the_boxes_of_onnx_runtime(generation, trained, things, tmp_path):
    """On the doubles, through the kernels that prepare pixels on the device."""
    images, env = things / "val" / "images", board(generation, tmp_path)
    done = command("export", trained / "model.onnx", "--out", tmp_path / "model.plan", "--frames", images, env=env)
    assert done.returncode == 0, done.stderr
    lines = []
    for engine, more in ((trained / "model.onnx", {}), (tmp_path / "model.plan", env)):
        done = command("edge.cli", "--engine", engine, "--input", images, "--output", "-", env=more)
        assert done.returncode == 0, done.stderr
        lines.append([json.loads(text)["boxes"] for text in done.stdout.splitlines()])
    assert len(lines[0]) == len(lines[1]) == 3 and any(lines[0])
    for one, other in zip(*lines):
        assert [box["class"] for box in one] == [box["class"] for box in other]
        for a, b in zip(one, other):
            assert abs(a["score"] - b["score"]) < 1e-3 and np.abs(np.array(a["box"]) - b["box"]).max() < 0.1


@pytest.mark.parametrize("model, fusion", [("fcos-mobilenetv2", "none"), ("fcos-resnet50", "add")])
def test_exports_pass_the_target_check_and_the_gate(model, fusion, tmp_path):
    from edge import pipeline, proof
    from edge.backends import ort
    from export import parity, targets, to_onnx
    from train_lite import evaluate
    from train_lite.config import TrainConfig, mode_settings
    from train_lite.data.dataset import Classes
    config = TrainConfig(model=model, global_patch=fusion, width=4, res=256, patch=128, max_boxes=7)
    torch.manual_seed(0)
    net = fcos.build(model, 4, "group", 1, fusion).eval()
    for ending in net.encoder.residual_ends():
        torch.nn.init.uniform_(ending.weight, 0.1, 0.4)
    classes = Classes(("thing",), ((0, 0, 0),), 1, False, ())
    recipe = evaluate.recipe(mode_settings(config), 128, 1)
    made, files = to_onnx.write(str(tmp_path), "model", to_onnx.folded(net), config, classes, recipe, to_onnx.pipeline_of(config, fusion))
    assert made["boxes"] == {"score": 0.2, "overlap": 0.6, "level": 1000, "limit": 7}
    for file in files.values():
        targets.demand(file, "nano")
    kind = pipeline.of(made)
    with kind(made, files, ort) as candidate, kind(made, files, parity.TorchBackend(net)) as reference:
        reference.recipe = recipe
        frame = parity.Frame("frame", ArrayPicture(np.random.RandomState(3).randint(0, 256, (61, 183, 3)).astype(np.uint8)))
        report, _calls = parity.compare(reference, candidate, [frame])
        parity.demand(report, 1e-4, "model.onnx")
        made["proof"] = proof.make(reference, 1e-4)
        assert proof.demand(candidate, made, "model.onnx") < 1
        wrong = copy.deepcopy(net)
        torch.nn.init.normal_(wrong.encoder.fpn.extra_blocks["p7"].weight)
        with kind(made, files, parity.TorchBackend(wrong)) as other, pytest.raises(ParityError, match="other answers"):
            other.recipe = recipe
            proof.demand(other, made, "model.onnx")
        candidate.recipe = candidate.recipe._replace(mean=candidate.recipe.mean[::-1])
        report, _calls = parity.compare(reference, candidate, [frame])
        with pytest.raises(ParityError, match="begins in stage prepare"):
            parity.demand(report, 1e-4, "model.onnx")


@pytest.mark.slow
def test_contracts_that_disagree_are_refused(trained, tmp_path):
    from edge import contract
    for change, said in (({"boxes": None}, "rules for boxes"), ({"task": "segmentation"}, "another task"), ({"tile": {"size": 64, "overlap": 0, "batch": 1}}, "multiples of 128"),
                         ({"classes": [{"name": "one", "colour": [0, 0, 0]}]}, "scores")):
        folder = tmp_path / said.replace(" ", "_")
        folder.mkdir()
        for name in ("model.onnx", "model.head.onnx"):
            (folder / name).write_bytes((trained / name).read_bytes())
        made = json.loads((trained / "model.json").read_text())
        made.update(change)
        made = {key: value for key, value in made.items() if value is not None}
        (folder / "model.json").write_text(json.dumps(made))
        with pytest.raises(BadFile, match=said):
            contract.load(str(folder / "model.onnx"))


@pytest.mark.parametrize("flags, code, said", [
    (["--patch", "64"], 2, "multiple of 128"), (["--sampler", "deform"], 2, "--sampler deform and --model fcos-mobilenetv2"),
    (["--data", "nowhere"], 2, "does not exist"), (["--max-boxes", "0"], 2, "--max-boxes is 0"), (["--data", ""], 2, "needs --data")])
def test_usage(flags, code, said, things, tmp_path):
    done = command("train_lite", "--data", things, "--res", 192, "--patch", 128, "--model", "fcos-mobilenetv2", "--width", 4, "--out", tmp_path, *flags)
    assert done.returncode == code and said in done.stderr and done.stderr.count("error:") == 1, done.stderr


READ = """
import os, sys
import torch
from train_lite.config import TrainConfig
from train_lite.data import boxed, store
from train_lite.state import State
from train_lite.tasks.detection import Detection
torch.set_num_threads(1)
folder, res = sys.argv[1], int(sys.argv[2])
config = TrainConfig(model="fcos-mobilenetv2", width=8, res=res, patch=256, patches=2, inner=1, global_patch="add", epochs=1,
                     micro_batch=4)  # a row of the small image has no more tiles
pairs, classes = boxed.find(folder, 0.0)
stored = store.ingest(pairs, classes, "long", res, os.path.join(folder, ".cache"), 16, (256, 256), 0, [])
"""
ONE_BATCH = """
problem = Detection(config, classes, stored, [], [], torch.device("cpu"))
state = State(problem)
""" + STEP + LOOK


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """16 times the pixels, at most 5 % more at the peak of filling the maps, a step and a look at a validation image."""
    folders = []
    for res in (1024, 4096):
        folder = tmp_path / str(res)
        for part in ("images", "labels"):
            (folder / part).mkdir(parents=True)
        (folder / "classes.txt").write_text("thing")
        write_large(BLOCKS, res, folder / "images" / "0.png")
        (folder / "labels" / "0.txt").write_text("0 0.5 0.5 0.02 0.02\n0 0.2 0.7 0.3 0.2")
        folders.append(folder)
    small, large = peaks_kib(READ, ONE_BATCH, (folders[0], 1024), 1), peaks_kib(READ, ONE_BATCH, (folders[1], 4096), 1)
    assert large[0] <= 1.05 * small[-1], (small, large)  # processes that do the same differ by 5 % themselves


@pytest.mark.slow
def test_only_boxes_above_the_asked_score(trained, things, capsys):
    import edge
    images = str(things / "val" / "images")
    counts = []
    for score in (0.05, -1.0, 0.5, 1.0):
        found = [box["score"] for _frame, result in edge.run(str(trained / "model.onnx"), images, score=score) for box in result.boxes]
        assert all(value > score for value in found)
        counts.append(len(found))
    assert counts[0] > counts[1] >= counts[2] and counts[3] == 0
    done = command("edge.cli", "--engine", trained / "model.onnx", "--input", images, "--score", 2)
    assert done.returncode == 2 and "--score is 2, expected 0 to 1" in done.stderr


@pytest.mark.parametrize("flags", rest_slow([
    (["--gradient", "exact", "--global-patch", "add"],), (["--mode", "full"],)]))
def test_other_modes_train_export_and_run(flags, things, tmp_path):
    """And --tile-batch gives the same boxes, up to rounding."""
    done = command("train_lite", "--data", things, "--res", 192, "--patch", 128, "--model", "fcos-mobilenetv2", "--width", 4, "--epochs", 1,
                   "--out", tmp_path, "--name", "run", *flags)
    assert done.returncode == 0, done.stderr
    found = []
    for batch in (1, 2) if "exact" in flags else (1,):
        model = tmp_path / ("%d.onnx" % batch)
        done = command("export", tmp_path / "run", "--out", model, "--tile-batch", batch)
        assert done.returncode == 0, done.stderr
        done = command("edge.cli", "--engine", model, "--input", things / "val" / "images", "--output", "-", "--score", 0)
        assert done.returncode == 0, done.stderr
        found.append([[box["score"] for box in json.loads(text)["boxes"]] for text in done.stdout.splitlines()])
    assert [len(scores) for scores in found[0]] == [100] * 3 and np.abs(np.array(found[0]) - found[-1]).max() < 1e-4


def test_boxes_lie_where_they_are_whatever_the_scale(tmp_path):
    """A head that says one box for every cell of one level, at scale 1, at half the size, and of images smaller than anything."""
    def head(cells, _context, _inside):
        scores = np.full((1, 6) + cells.shape[2:], -9.0, np.float32)
        scores[0, 1:5], scores[0, 5] = 0.0, 9
        scores[0, 0, boxes.HALO + 1, boxes.HALO + 2] = 9  # one cell of every window
        return scores

    for size in ((200, 300), (7, 5), (1, 1)):
        picture = ArrayPicture(np.zeros(size + (3,), np.uint8))
        for recipe in (Recipe("none", 0, 128, 0, 2, 0, MEAN, STD), Recipe("long", 150, 128, 0, 2, 0, MEAN, STD)):
            found = boxes.detect(picture, recipe, boxes.rules(100), lambda p: np.zeros((len(p), 4, 341), np.float32), head)
            assert (found[:, :2] >= 0).all() and (found[:, 2] <= size[1] + 1e-9).all() and (found[:, 3] <= size[0] + 1e-9).all()
            if size == (200, 300):
                scale = 300 / 150.0 if recipe.resize == "long" else 1.0
                first = found[np.argmin(found[:, 2] - found[:, 0])]
                assert np.abs(first[:4] - scale * np.array([12, 4, 28, 20])).max() < 1e-6, "middle (20, 12), one stride each way"


def test_scores_that_are_no_numbers_are_an_error():
    with pytest.raises(BadFile, match="no finite numbers"):
        boxes.detect(ArrayPicture(np.zeros((60, 60, 3), np.uint8)), Recipe("none", 0, 128, 0, 1, 0, MEAN, STD), boxes.rules(100),
                     lambda p: np.zeros((1, 4, 341), np.float32), lambda cells, _c, _i: np.full((1, 6, 42, 42), np.nan, np.float32))


def test_only_cells_that_give_a_box_are_compared_by_class():
    """Where nothing is, the likeliest of many classes is noise, and half precision changes it; a box that comes or goes counts."""
    from edge.pipeline import Detector
    rng = np.random.RandomState(0)
    found = rng.uniform(-12, -9, (80 + 5, 1, 1000)).astype(np.float32)
    found[7, 0, 3], found[-1, 0, 3] = 3, 3
    judge = types.SimpleNamespace(rules=boxes.rules(100), classes=["c"] * 80)
    ids = Detector.decoded(judge, found)
    assert ids.shape == (1, 1000) and ids[0, 3] == 8 and ids.sum() == 8 and Detector.kinds.fget(judge) == 81
    assert (Detector.decoded(judge, found + rng.uniform(-0.5, 0.5, found.shape).astype(np.float32)) == ids).all()
    found[7, 0, 3] = -9
    assert not Detector.decoded(judge, found).any()
    assert len(boxes.decoded(found, 0, 0, 0, judge.rules.score)) == 0


@pytest.mark.parametrize("name, drawn", [(u"\u732b 99 %", "? 99 %"), (u"gr\xf6\xdfe", "grosse"), ("cat", "cat")])
def test_names_in_any_script_are_drawn(name, drawn):
    """An old Pillow's font raises for letters that it does not have, a new one's draws them as empty rectangles."""
    from edge.warp import pictures
    small = np.full((60, 80, 3), 120, np.uint8)
    sheets = [pictures.outlined(small, np.array([[5, 5, 40, 40, 1.0, 0]]), 1.0, [words], ((255, 0, 0),)) for words in (name, drawn)]
    assert pictures.drawable(name) == drawn and (sheets[0] == sheets[1]).all() and (sheets[0] != small).any()
    assert (pictures.beside([(name, small)]) == pictures.beside([(drawn, small)])).all()


def test_words_do_not_cover_those_of_a_better_box():
    """Hundreds of boxes lie on a canvas: each frame is drawn, the words where there is room."""
    from edge.warp import pictures
    small, palette = np.zeros((120, 200, 3), np.uint8), ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    found = np.array([[10, 10, 60, 60, 0.9, 0], [14, 14, 180, 110, 0.8, 1], [120, 10, 190, 60, 0.7, 2]], float)
    alone = [pictures.outlined(small, found[[at]], 1.0, "abc", palette) for at in range(3)]
    sheet = pictures.outlined(small, found, 1.0, "abc", palette)
    assert (sheet[10:20, 10:20] == alone[0][10:20, 10:20]).all() and (sheet[10:20, 122:130] == alone[2][10:20, 122:130]).all()
    assert (sheet[16:100, 14:16] == (0, 255, 0)).sum() > 2 * 80 and not (sheet[24:30, 16:40] == (0, 255, 0)).all(axis=2).any()


@pytest.mark.parametrize("height, width", [(30, 1000), (9, 2000), (2000, 9), (600, 800)])
def test_boxes_are_drawn_where_they_are_on_narrow_pictures(height, width, tmp_path, monkeypatch):
    """The short side of a shrunk picture is a whole number of px: it does not say by how much the picture was shrunk."""
    from edge import sinks
    judge = types.SimpleNamespace(config=types.SimpleNamespace(max_boxes=10), classes=types.SimpleNamespace(names=["a"], palette=[(255, 0, 0)]),
                                  boxes=lambda _net, _stored, _rules: np.zeros((0, 6)))
    picture = ArrayPicture(np.zeros((height, width, 3), np.uint8))
    Detection.draw(judge, None, types.SimpleNamespace(height=height, width=width, picture=picture,
                                                      pair=types.SimpleNamespace(boxes=[Box(0, 0.0, 0.0, 1.0, 1.0)])), str(tmp_path / "0.png"))
    red = np.argwhere((np.array(Image.open(str(tmp_path / "0.png"))) == (255, 0, 0)).all(axis=2))
    assert abs(red[:, 1].max() + 1 - 512.0 * width / max(height, width)) <= 1
    monkeypatch.setattr(sinks.images, "STREAM_ABOVE_PX", 1000)
    page, scales = sinks.Sinks(str(tmp_path), [(255, 0, 0)], True), []
    page.write_sheet(types.SimpleNamespace(name="x", open=lambda: picture), lambda small, scale: scales.append(scale) or small)
    assert scales == [min(1.0, 1024.0 / max(height, width))]


def test_hundreds_of_boxes_are_found():
    """576 boxes on one level, each of nine cells that stand for it: more cells than the published thousand of a level."""
    truth = np.array([(8 + 64 * x, 8 + 64 * y, 48 + 64 * x, 48 + 64 * y, 0, 0) for y in range(24) for x in range(24)], float)
    rng, size = np.random.RandomState(0), 24 * 64
    maps = []
    for level, (rows, columns) in enumerate(boxes.sizes(size, size)):
        labels, distances = boxloss.targets(level, 0, 0, rows, columns, truth)
        scores = np.full((6, rows, columns), -9.0)
        scores[0][labels == 0] = rng.uniform(1, 9, int((labels == 0).sum()))
        scores[1:5], scores[5] = np.log(np.maximum(distances, 1e-9)), 9
        maps.append(scores)
    assert sum(int((scores[0] > 0).sum()) for scores in maps) > 4000
    for limit, least, most in ((100, 100, 100), (1000, 576, 576)):
        rules = boxes.rules(limit)
        kept = np.concatenate([boxes.best(boxes.decoded(scores, level, 0, 0, rules.score), rules.level) for level, scores in enumerate(maps)])
        assert least <= len(boxes.apart(boxes.best(kept, len(kept)), rules.overlap, rules.limit)) <= most


@pytest.mark.slow
def test_other_classes_do_not_go_on_with_a_run(trained, things, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(str(trained / "run"), str(run))
    data = tmp_path / "things"
    shutil.copytree(str(things), str(data), ignore=shutil.ignore_patterns(".nanopatch"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(dict(config, data=str(data))))
    (data / "classes.txt").write_text("square\ndisc")
    done = command("train_lite", "--resume", run)
    assert done.returncode == 2 and "the first that differs is number 0: 'disc', now 'square'" in done.stderr, done.stderr


@pytest.mark.slow
def test_boxes_that_no_cell_stands_for_are_said(things, tmp_path):
    done = command("train_lite", "--data", things, "--res", 32, "--patch", 128, "--model", "fcos-mobilenetv2", "--width", 4, "--epochs", 1, "--inner", 1,
                   "--out", tmp_path, "--name", "run", "--json")
    assert done.returncode == 0 and "no cell stands for" in done.stderr, done.stderr
    assert json.loads(done.stdout, parse_constant=pytest.fail)["val"]["ap_large"] is None, "NaN is no JSON"
