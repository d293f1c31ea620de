"""The parity gate: seeded faults are stopped with the stage in which they begin; sound exports pass."""
import itertools

import numpy as np
import onnx
import pytest
import torch

from edge import contract, images
from edge.backends import ort
from edge.errors import ParityError
from edge.pipeline import Segmenter
from export import halve, parity, to_onnx
from train_lite import evaluate
from train_lite.config import TrainConfig, mode_settings
from train_lite.data.dataset import Classes
from train_lite.models import build, norm

COLOURS = ((0, 0, 0), (200, 30, 30), (30, 200, 30))
FRAME = images.ArrayPicture(np.random.RandomState(3).randint(0, 256, (61, 83, 3)).astype(np.uint8))


def exported(folder, model="unet", kind="group", fusion="concat", outputs=1, seed=0, scale=1.0):
    """(net, recipe, classes, contract, files) of a net with random weights."""
    torch.manual_seed(seed)
    config = TrainConfig(model=model, width=4, norm=kind, global_patch=fusion, patch=48, overlap=16, res=80,
                         mode="patch" if fusion != "none" else "tiled")
    classes = Classes(("ground", "vessel", "disc")[:max(2, outputs)], COLOURS[:max(2, outputs)], outputs, False, (255,))
    settings = mode_settings(config)
    net = build(model, 4, "group" if kind == "frozen" else kind, outputs, fusion).eval()
    if kind == "frozen":
        norm.put_frozen(net, norm.group_norms(net))
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.bias = torch.nn.Parameter(0.1 * torch.randn(module.out_channels))
    with torch.no_grad():
        next(net.parameters()).mul_(scale)
    recipe = evaluate.recipe(settings, config.patch, 1)
    made, files = to_onnx.write(str(folder), "model", to_onnx.folded(net), config, classes, recipe,
                                to_onnx.pipeline_of(config, settings.fusion))
    return net, recipe, classes, made, files


def gate(net, recipe, classes, made, files, other=Segmenter, backend=ort):
    """The gate as export passes it. Returns the report, or raises ParityError."""
    with other(made, files, backend) as candidate, Segmenter(made, files, parity.TorchBackend(net)) as reference:
        reference.recipe, reference.classes, reference.palette = recipe, list(classes.names), list(classes.palette)
        report, _calls = parity.compare(reference, candidate, [parity.Frame("frame", FRAME)])
    parity.demand(report, 1e-4, "model.onnx")
    return report


class SwapsChannels(Segmenter):
    def score(self, pixels, *rest):
        return super().score(np.ascontiguousarray(pixels[:, ::-1]), *rest)


class RepeatsTheBorder(Segmenter):
    def score(self, pixels, *rest):
        pixels = pixels.copy()
        pixels[:, :, :, 0] = pixels[:, :, :, 1]
        return super().score(pixels, *rest)


class CropsOffByOne(Segmenter):
    def score(self, *given):
        return np.roll(super().score(*given), 1, axis=3)


class InterpolatesFromCorners(Segmenter):
    def score(self, pixels, overview, rows, cols):
        return super().score(pixels, overview, np.roll(rows, 1, axis=2), cols)


class TransposedSession(ort.Session):
    def run(self, stage, inputs, keep=False):
        return {name: array.swapaxes(2, 3) if stage == "head" else array for name, array in super().run(stage, inputs).items()}


class Transposed:
    Session, describe = TransposedSession, staticmethod(ort.describe)


def stale(folder, parts):
    other = exported(folder, seed=1)
    return parts[:3] + other[3:]


def halved(folder, parts):
    made, files = parts[3:]
    target = files["encoder"] + ".half.onnx"
    halve.halve(files["encoder"], target)
    return parts[:3] + (made, dict(files, encoder=target))


def edited(part, **change):
    def edit(folder, parts):
        return parts[:3] + (dict(parts[3], **{part: dict(parts[3][part], **change)}), parts[4])
    return edit


def unchanged(folder, parts):
    return parts


def reordered(folder, parts):
    return parts[:3] + (dict(parts[3], classes=parts[3]["classes"][::-1]), parts[4])


FAULTS = {  # name: (change of the export, Segmenter, backend, scale of the first weights, stage)
    "channel swap": (unchanged, SwapsChannels, ort, 1, "prepare"),
    "mean and std": (edited("image", mean=[0.5, 0.5, 0.5]), Segmenter, ort, 1, "prepare"),
    "resize rule": (edited("image", resize="stretch"), Segmenter, ort, 1, "prepare"),
    "half overflow": (halved, Segmenter, ort, 3e4, "encoder"),
    "class order": (reordered, Segmenter, ort, 1, "decode"),
    "off-by-one crop": (unchanged, CropsOffByOne, ort, 1, "stitch"),
    "stale weights": (stale, Segmenter, ort, 1, "encoder"),
    "transposed output": (unchanged, Segmenter, Transposed, 1, "head"),
    "border rule": (unchanged, RepeatsTheBorder, ort, 1, "prepare"),
    "interpolation": (unchanged, InterpolatesFromCorners, ort, 1, "interpolate")}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_seeded_fault_is_stopped_in_its_stage(name, tmp_path):
    change, segmenter, backend, scale, stage = FAULTS[name]
    parts = exported(tmp_path, scale=scale)
    with pytest.raises(ParityError, match="begins in stage %s " % stage):
        gate(*change(tmp_path, parts), other=segmenter, backend=backend)


SOUND = [(model, kind, fusion, outputs, seed) for seed in (0, 1) for model, kind, fusion, outputs in itertools.product(
    ("unet",), ("group", "frozen"), ("concat", "add", "none"), (1, 3))][:17]
# torch 1.10 takes half a minute for the larger net
SOUND += [("deeplabv3", "group", "concat", 1, 0), ("deeplabv3", "frozen", "add", 3, 0), ("deeplabv3", "group", "none", 3, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("model, kind, fusion, outputs, seed", SOUND)
def test_sound_export_raises_no_alarm(model, kind, fusion, outputs, seed, tmp_path):
    report = gate(*exported(tmp_path, model, kind, fusion, outputs, seed=len(model) + outputs + 10 * seed))
    assert report["changed_share"] <= 1e-4 and report["stages"]["prepare"] == report["stages"]["decode"] == 0
    assert set(report["class_iou"].values()) == {1.0} or min(report["class_iou"].values()) > 0.999


def test_twenty_sound_exports():
    assert len(SOUND) == 20


def test_the_layer_that_half_precision_spoils_is_named(tmp_path):
    _net, _recipe, _classes, _made, files = exported(tmp_path, scale=3e4)
    target = str(tmp_path / "half.onnx")
    halve.halve(files["encoder"], target)
    pixels = np.random.RandomState(0).randn(1, 3, 48, 48).astype(np.float32)
    first, off = halve.spoiled(files["encoder"], target, {"pixels": pixels})[0]
    assert first == next(node.name for node in onnx.load(files["encoder"]).graph.node if node.op_type == "Conv") and not off <= 1
    report = {"max_abs_error": float("inf"), "largest_score": 1.0, "changed_share": 0.5, "frames": ["a"],
              "stages": {"prepare": 0.0, "interpolate": 0.0, "encoder": float("inf"), "head": 0.0, "stitch": 1.0, "decode": 0.0}}
    with pytest.raises(ParityError, match="begins in stage encoder .*--float32 \"%s\"" % first):
        parity.demand_engine(report, "float16", "model.plan", [first])


def test_contract_of_a_sound_export_is_accepted(tmp_path):
    _net, _recipe, _classes, made, _files = exported(tmp_path)
    contract.write(str(tmp_path / "model.json"), made)
    assert contract.load(str(tmp_path / "model.onnx"))[0]["pipeline"] == "patch"
