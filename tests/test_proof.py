"""The proof in a contract: sound exports agree with it, a seeded fault of each kind does not."""
import numpy as np
import pytest
import test_parity
import test_sampler_run

from edge import contract, proof, schema
from edge.backends import ort
from edge.errors import BadFile, ParityError
from edge.pipeline import Segmenter
from export import parity

MEAN, STD = [0.3, 0.45, 0.6], [0.2, 0.25, 0.3]
PIPELINES = {
    "patch": lambda folder, **more: test_parity.exported(folder, **more),
    "patch, deeplabv3, frozen, 3 classes": lambda folder, **more: test_parity.exported(
        folder, "deeplabv3", "frozen", outputs=3, fusion="add", **more),
    "tiled": lambda folder, **more: test_parity.exported(folder, fusion="none", outputs=3, **more),
    "whole": lambda folder, **more: renamed(test_parity.exported(folder, fusion="none", **more), "whole"),
    "uniform": lambda folder, seed=0: test_sampler_run.exported(folder, "uniform", seeds=(seed, seed)),
    "deform": lambda folder, seed=0: test_sampler_run.exported(folder, "deform", outputs=1, seeds=(seed, seed))}


def renamed(parts, pipeline):
    return parts[:3] + (dict(parts[3], pipeline=pipeline), parts[4])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """parts(kind, seed) -> (net, recipe, classes, contract, files), exported once: torch 1.10 takes seconds for one."""
    known = {}

    def get(kind, seed=0):
        if (kind, seed) not in known:
            known[kind, seed] = PIPELINES[kind](tmp_path_factory.mktemp("export"), seed=seed)
        return known[kind, seed]
    return get


def proven(exported, tolerance=1e-4):
    """(contract with its proof, files) of a net with random weights, as export makes them."""
    net, recipe, _classes, made, files = exported
    made = dict(made, image=dict(made["image"], mean=MEAN, std=STD))
    with Segmenter(made, files, parity.TorchBackend(net)) as reference:
        reference.recipe = recipe._replace(mean=tuple(MEAN), std=tuple(STD))
        made["proof"] = proof.make(reference, tolerance)
    return made, files


def demand(made, files):
    with Segmenter(made, files, ort) as segmenter:
        before = segmenter.recipe, segmenter.moves
        share = proof.demand(segmenter, made, "model.onnx")
        assert (segmenter.recipe, segmenter.moves) == before
        return share


@pytest.mark.parametrize("kind", sorted(PIPELINES))
def test_sound_exports_pass_and_stale_weights_do_not(kind, parts):
    made, files = proven(parts(kind))
    assert demand(made, files) < 0.3
    first = files[made["stages"][0]["name"]]
    contract.write(contract.path_beside(first), made)
    assert contract.load(first)[0] == made, "numbers come back as they were written"
    other = parts(kind, 1)[4]
    for stage in files:  # one stage alone, too
        with pytest.raises(ParityError, match="%s on the proof" % ("logits" if stage == "deform" else "scores")):
            demand(made, dict(files, **{stage: other[stage]}))


@pytest.mark.parametrize("kind, part", [(kind, part) for kind in sorted(PIPELINES) for part in ("mean", "std")])
def test_swapped_channels_are_refused(kind, part, parts):
    made, files = proven(parts(kind))
    with pytest.raises(ParityError, match="allowed"):
        demand(dict(made, image=dict(made["image"], **{part: made["image"][part][::-1]})), files)


def test_half_precision_passes_with_its_tolerance_and_its_overflow_does_not(tmp_path):
    """Activations rounded to half between the layers, which ONNX Runtime's CPU leaves out of a halved file."""
    for name, scale in (("sound", 1), ("overflow", 1e6)):
        (tmp_path / name).mkdir()
        net, recipe, _classes, made, files = test_parity.exported(tmp_path / name, scale=scale)
        with Segmenter(made, files, parity.TorchBackend(net)) as reference:
            reference.recipe = recipe
            made["proof"] = proof.make(reference, parity.ENGINE["float16"][0] / parity.ORDINARY_SCORE)
            assert demand(made, files) < 0.3
            for module in net.modules():
                if not list(module.children()):
                    module.register_forward_hook(lambda _module, _given, out: out.half().float())
            if scale == 1:
                assert 0 < proof.demand(reference, made, "model.plan") < 0.3
                continue
            with pytest.raises(ParityError, match="differ by inf"):
                proof.demand(reference, made, "model.plan")


def test_a_contract_without_proof_and_one_of_another_shape_are_refused(parts):
    made, files = proven(parts("tiled"))
    with pytest.raises(BadFile, match="no proof.*Export it again"):
        demand({name: part for name, part in made.items() if name != "proof"}, files)
    with pytest.raises(ParityError, match="differ by inf"):
        demand(dict(made, proof=dict(made["proof"], scores=made["proof"]["scores"][:2])), files)
    short = dict(made, proof=dict(made["proof"], scores=[row[:-1] for row in made["proof"]["scores"]]))
    assert schema.violations(made, schema.load("contract")) == [] and schema.violations(short, schema.load("contract"))


def test_the_picture_is_the_same_everywhere():
    pixels = proof.picture().window(0, 0, 192, 264)
    assert pixels.shape == (192, 264, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [172, 47, 117] and pixels[-1, -1].tolist() == pixels[191 - 23, 240].tolist()
    assert int(pixels.astype(np.int64).sum()) == SUM


SUM = 18222912
