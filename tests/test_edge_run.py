"""edge-run as its users run it, and its results against the schemas and against train_lite's own evaluation."""
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, command
from edge import contract, images, schema

SWITCHES = "import sys, edge.images; from edge.cli import main; %s; code = main(); %s; sys.exit(code)"
PEAK = "from jetson.memory import peak_rss_mib; sys.stderr.write('PEAK %f\\n' % peak_rss_mib())"


def python(code, *words, cwd=None):
    """Run a line of Python in a process of its own; stdout and stderr as text."""
    done = subprocess.run([sys.executable, "-c", code] + [str(w) for w in words], cwd=str(cwd) if cwd else None,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=ROOT),
                          timeout=900)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def edge_run(*words, cwd=None, before="pass", after="pass", code=0):
    """The console script edge-run with `words`; before, after: statements to run around it in its process."""
    done = python(SWITCHES % (before, after), *words, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """The training set's images through edge-run once: (output folder, finished process)."""
    out = tmp_path_factory.mktemp("edge") / "out"
    folder = os.path.join(trained["data"], "images")
    return out, edge_run("--engine", trained["model"], "--input", folder, "--output", out)


def lines_of(path):
    with open(str(path), encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def agree(value, name):
    """Both readers of the schema: the runtime's small one, and the public package where it is installed."""
    assert schema.violations(value, schema.load(name)) == []
    try:
        import jsonschema
    except ImportError:
        return
    jsonschema.Draft7Validator.check_schema(schema.load(name))
    jsonschema.validate(value, schema.load(name), cls=jsonschema.Draft7Validator)


def test_folder(trained, done):
    out, process = done
    lines = lines_of(out / "results.jsonl")
    assert [line["frame"] for line in lines] == [0, 1, 2, 3, 4]
    palette = [entry["colour"] for entry in json.load(open(str(trained["folder"] / "model.json")))["classes"]]
    for line, name in zip(lines, sorted(os.listdir(os.path.join(trained["data"], "images")))):
        assert os.path.basename(line["source"]) == name and (line["height"], line["width"]) == (96, 120)
        with Image.open(line["mask"]) as mask, Image.open(line["overlay"]) as overlay, \
                Image.open(line["source"]) as photo:
            assert mask.mode == "P" and mask.size == overlay.size == (120, 96)
            stored = np.array(mask.getpalette()[:6]).reshape(2, 3).tolist()
            ids, over, pixels = np.asarray(mask), np.asarray(overlay).astype(int), np.asarray(photo).astype(int)
        assert stored == palette and ids.max() <= 1
        assert np.array_equal(over[ids == 0], pixels[ids == 0]), "background stays clear"
        middle = (pixels[ids == 1] + np.array(palette[1])) / 2.0
        assert abs(over[ids == 1] - middle).max(initial=0) <= 1
        share = [float((ids == c).mean()) for c in (0, 1)]
        assert np.allclose([line["area"][n] for n in ("background", "foreground")], share)
        assert set(line["latency_ms"]) == {"read", "prepare", "run", "blend", "decode", "write"}
    assert sorted(os.listdir(str(out))) == sorted(
        ["results.jsonl"] + ["%02d.%s.png" % (i, kind) for i in range(5) for kind in ("mask", "overlay")])
    first = process.stderr.splitlines()[0]
    assert process.stdout == "" and "nanopatch" in first and "ort" in first


def test_every_result_fits_the_schema(trained, done, tmp_path):
    lines = lines_of(done[0] / "results.jsonl")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more of it than this, and that is no image")
    Image.new("RGB", (50, 40)).save(str(tmp_path / "set" / "fine.png"))
    edge_run("--engine", trained["model"], "--input", tmp_path / "set", "--output", tmp_path / "r.jsonl", code=5)
    more = lines_of(tmp_path / "r.jsonl")
    assert "broken.png" in more[0]["error"] and more[1]["error"] is None and more[1]["mask"] is None
    for line in lines + more:
        agree(line, "result")
    assert schema.violations(dict(lines[0], frame=-1), schema.load("result"))
    assert schema.violations(dict(lines[0], more=1), schema.load("result"))


def test_contract_fits_the_schema(trained):
    made = json.load(open(str(trained["folder"] / "model.json")))
    agree(made, "contract")
    assert made["pipeline"] == "patch" and [s["name"] for s in made["stages"]] == ["encoder", "head"]
    assert made["stages"][0]["sha256"] == contract.sha256(str(trained["model"]))
    assert made["tile"] == {"size": 48, "overlap": 16, "batch": 1} and made["parity"]["max_abs_error"] <= 1e-4
    for key in ("tile", "stages", "classes", "pipeline", "overview"):
        assert schema.violations({k: v for k, v in made.items() if k != key}, schema.load("contract"))


def test_single_image_glob_and_synthetic(trained, done, tmp_path):
    folder = os.path.join(trained["data"], "images")
    edge_run("--engine", trained["model"], "--input", os.path.join(folder, "03.png"), "--output", tmp_path / "m.png")
    with Image.open(str(tmp_path / "m.png")) as one, Image.open(str(done[0] / "03.mask.png")) as same:
        assert np.array_equal(np.asarray(one), np.asarray(same))
    assert sorted(os.listdir(str(tmp_path))) == ["m.overlay.png", "m.png"]
    edge_run("--engine", trained["model"], "--input", os.path.join(folder, "0[13].*"), "--output", tmp_path / "glob",
             "--no-overlay")
    assert sorted(os.listdir(str(tmp_path / "glob"))) == ["01.mask.png", "03.mask.png", "results.jsonl"]
    edge_run("--engine", trained["model"], "--input", "synthetic://61x47", "--output", tmp_path / "s", "--frames", 3)
    lines = lines_of(tmp_path / "s" / "results.jsonl")
    assert [(line["width"], line["height"]) for line in lines] == [(61, 47)] * 3
    assert len({line["mask"] for line in lines}) == 3


def test_stdout_holds_json_lines_only(trained):
    done = edge_run("--engine", trained["model"], "--input", "synthetic://64x48", "--output", "-", "--frames", 2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["frame"] for line in lines] == [0, 1] and all(line["mask"] is None for line in lines)


def test_json_prints_one_object(trained, tmp_path):
    done = edge_run("--engine", trained["model"], "--input", "synthetic://64x48", "--output", tmp_path / "o", "--json",
                    "--frames", 2)
    assert json.loads(done.stdout) == {"frames": 2, "failed": [], "output": str(tmp_path / "o")}


def test_benchmark(trained, tmp_path, monkeypatch):
    words = ["--engine", trained["model"], "--input", "synthetic://120x96", "--benchmark", "--runs", 5, "--warm-up", 1]
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("NANOPATCH_PHASES", str(tmp_path / "phases"))  # as `python -m jetson profile` does
    text = edge_run(*words, cwd=tmp_path / "here").stdout
    assert [line.split()[2] for line in (tmp_path / "phases").read_text().splitlines()] == ["load", "warm-up", "run"]
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    assert rows["stage"] == ["p50", "p95", "p99", "share"]
    made = json.loads(edge_run(*(words + ["--json"]), cwd=tmp_path / "here").stdout)
    assert os.listdir(str(tmp_path / "here")) == [] and (made["width"], made["height"], made["runs"]) == (120, 96, 5)
    for stage in ("prepare", "run", "blend", "decode", "total"):
        row = made["ms"][stage]
        assert len(rows[stage]) == 5 and rows[stage][4] == "%" and 0 <= row["p50"] <= row["p95"] <= row["p99"]
    assert rows["total"][3] == "100" and 0 <= int(rows["run"][3]) <= 100
    assert made["ms"]["total"]["p50"] >= made["ms"]["run"]["p50"] > 0


@pytest.mark.parametrize("height,width", [(96, 120), (333, 250), (40, 300)])
def test_mask_agrees_with_training_s_evaluation(trained, tmp_path, height, width):
    torch = pytest.importorskip("torch")
    from train_lite import checkpoint, evaluate, state
    from train_lite.config import micro_batch, mode_settings
    rng = np.random.RandomState(height)
    y, x = np.ogrid[:height, :width]
    array = rng.randint(0, 90, (height, width, 3)).astype(np.uint8)
    for _ in range(6):
        array[np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) < 25] += 110
    Image.fromarray(array).save(str(tmp_path / "a.png"))
    net, config, _classes, tile, _meta = state.restore(checkpoint.find(str(trained["run"])))
    how = evaluate.recipe(mode_settings(config), tile, micro_batch(config))
    shown = types.SimpleNamespace(picture=images.open_photo(str(tmp_path / "a.png")))
    expected = np.concatenate([labels for _y, labels in evaluate.label_bands(net, shown, how, torch.device("cpu"))])
    words = ["--engine", trained["model"], "--input", tmp_path / "a.png", "--no-overlay", "--output"]
    edge_run(*(words + [tmp_path / "whole.png"]))
    edge_run(*(words + [tmp_path / "streamed.png"]), before="edge.images.STREAM_ABOVE_PX = 0")
    for name in ("whole.png", "streamed.png"):
        with Image.open(str(tmp_path / name)) as mask:
            assert (np.asarray(mask) == expected).mean() >= 0.9999, name


IMPORT = """
import sys, time
start = time.time()
import edge, edge.cli
with open("/proc/self/status") as handle:
    rss = [line.split()[1] for line in handle if line.startswith("VmRSS")][0]
heavy = {"torch", "onnx", "onnxruntime", "train_lite", "export"}
print(time.time() - start, int(rss) / 1024.0, sorted(set(sys.modules) & heavy))
"""


def test_import_is_light():
    answers = [python(IMPORT).stdout.split(" ", 2) for _ in range(3)]
    assert all(loaded.strip() == "[]" for _seconds, _rss, loaded in answers)
    assert max(float(rss) for _seconds, rss, _loaded in answers) < 60
    alone = IMPORT.replace("import edge, edge.cli", "import edge")
    seconds = min(float(python(alone).stdout.split()[0]) for _ in range(3))
    assert seconds < 0.3


# --- images that do not fit -----------------------------------------------------------------------------------------

def class_colours(count):
    """Colours far apart, and the net that tells them: 2 c.x - |c|^2 is largest for the nearest c (x in 0..1)."""
    grid = [(r, g, b) for r in (10, 120, 240) for g in (10, 120, 240) for b in (10, 120, 240)]
    colours = np.array(grid[:count], np.float64) / 255
    return (colours * 255).astype(np.uint8), 2 * colours, -(colours ** 2).sum(axis=1)


def nearest_colour_model(onnx, folder, classes, tile, overlap):
    """A convolution 3 -> classes as model.onnx, with its contract."""
    colours, weight, bias = class_colours(classes)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shapes = {"pixels": [1, 3, tile, tile], "scores": [1, classes, tile, tile]}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["pixels", "w", "b"], ["scores"])], "colours",
        [helper.make_tensor_value_info("pixels", kind, shapes["pixels"])],
        [helper.make_tensor_value_info("scores", kind, shapes["scores"])],
        [onnx.numpy_helper.from_array(weight.astype(np.float32).reshape(classes, 3, 1, 1), "w"),
         onnx.numpy_helper.from_array(bias.astype(np.float32), "b")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 7
    path = os.path.join(str(folder), "model.onnx")
    onnx.save(model, path)
    tensors = {name: {"name": name, "dtype": "float32", "shape": shape} for name, shape in shapes.items()}
    contract.write(contract.path_beside(path), {
        "format": "nanopatch-contract", "schema_version": 1, "task": "segmentation", "pipeline": "tiled",
        "geometry_version": contract.GEOMETRY_VERSION, "overview": None,
        "stages": [{"name": "net", "file": "model.onnx", "sha256": contract.sha256(path),
                    "inputs": [tensors["pixels"]], "outputs": [tensors["scores"]]}],
        "image": {"colour": "RGB", "mean": [0.0] * 3, "std": [1.0] * 3, "resize": "none", "resize_px": 1},
        "tile": {"size": tile, "overlap": overlap, "batch": 1},
        "classes": [{"name": "class %d" % i, "colour": [int(v) for v in c]} for i, c in enumerate(colours)]})
    return path


def colour_model(tmp_path_factory, *size):
    """nearest_colour_model() in a folder of its own, for fixtures; skips where it cannot be made or run."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx.numpy_helper")
    pytest.importorskip("onnxruntime")
    return nearest_colour_model(onnx, tmp_path_factory.mktemp("model"), *size)


def truth(y0, y1, width, classes):
    """Blocks of 61 x 83 px, each row of blocks in an order of its own: no two rows far apart are alike."""
    y, x = np.ogrid[y0:y1, :width]
    return ((y // 61 * 7 + x // 83 * (1 + y // 61 % 5) + (y % 61 == 0)) % classes).astype(np.uint8)


def run_large(folder, height, width, classes, tile, overlap, before="pass"):
    """Write the picture, run it, check every row of the mask. Returns the process's peak in MiB."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx.numpy_helper")
    model, colours = nearest_colour_model(onnx, folder, classes, tile, overlap), class_colours(classes)[0]
    photo = os.path.join(str(folder), "large.png")
    with images.PngWriter(photo, height, width, 3) as png:
        for y in range(0, height, 250):
            png.write(colours[truth(y, min(height, y + 250), width, classes)])
    out = os.path.join(str(folder), "out")
    done = edge_run("--engine", model, "--input", photo, "--output", out, before=before, after=PEAK)
    with Image.open(os.path.join(out, "large.mask.png")) as mask:
        got = np.asarray(mask)
    assert got.shape == (height, width)
    for y in range(0, height, 250):
        assert np.array_equal(got[y:y + 250], truth(y, min(height, y + 250), width, classes)), "rows from %d" % y
    return float(done.stderr.split("PEAK ")[1].split()[0])


@pytest.mark.parametrize("height,width,overlap", [(900, 301, 0), (301, 900, 16), (40, 1000, 63)])
def test_streamed_image_with_19_classes(tmp_path, height, width, overlap):
    run_large(tmp_path, height, width, 19, 64, overlap, before="edge.images.STREAM_ABOVE_PX = 0")


@pytest.mark.slow
def test_image_of_80_megapixels_with_19_classes(tmp_path):
    """One row of tiles is held as scores: classes x tile x width x 4 bytes, so width costs and height does not."""
    assert run_large(tmp_path, 20000, 4000, 19, 256, 32) < 600


@pytest.mark.parametrize("ending", [".mask.png", ".overlay.png", ".samples.png"])
def test_no_input_is_written_over_in_a_folder(ending, trained, tmp_path):
    """A set whose labels are called as our masks are."""
    (tmp_path / "set").mkdir()
    for name in ("a.png", "a" + ending):
        shutil.copy(os.path.join(trained["data"], "images", "00.png"), str(tmp_path / "set" / name))
    before = {name: (tmp_path / "set" / name).read_bytes() for name in os.listdir(str(tmp_path / "set"))}
    done = command("edge.cli", "--engine", trained["model"], "--input", tmp_path / "set", "--output", tmp_path / "set")
    assert done.returncode == 2 and "a%s is the input itself" % ending in done.stderr, done.stderr
    assert before == {name: (tmp_path / "set" / name).read_bytes() for name in os.listdir(str(tmp_path / "set"))}


def test_long_names_of_files(trained, tmp_path):
    """255 bytes are the most that a file's name has: results get shorter ones, and the images behind are done too."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["a.png", "n" * 250 + ".png", "n" * 249 + "m.png", "\u5b57" * 80 + ".png", "z.png"]
    for name in names:
        Image.new("RGB", (40, 30)).save(str(folder / name))
    done = command("edge.cli", "--engine", trained["model"], "--input", folder, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    masks = [line["mask"] for line in lines_of(tmp_path / "out" / "results.jsonl")]
    assert len(set(masks)) == 5 and all(os.path.isfile(mask) for mask in masks)


@pytest.mark.parametrize("output, hint", [("", "--output is missing"), ("in", "the folder of the images"), ("in/../in", "the folder of the images"),
                                          ("out.v2", "one without a dot")])
def test_outputs_that_are_none(trained, tmp_path, output, hint):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 30)).save(str(tmp_path / "in" / "a.png"))
    done = command("edge.cli", "--engine", trained["model"], "--input", "in", "--output", output, cwd=tmp_path)
    assert done.returncode == 2 and hint in done.stderr, done.stderr
    assert os.listdir(str(tmp_path / "in")) == ["a.png"] and os.listdir(str(tmp_path)) == ["in"]


def test_two_runs_do_not_write_one_file(tmp_path):
    from edge.errors import UsageError
    from edge.sinks import Sinks
    first = Sinks(str(tmp_path), [(0, 0, 0)], True)
    first.write_line({"frame": 0})
    with pytest.raises(UsageError, match="written by another edge-run"):
        Sinks(str(tmp_path), [(0, 0, 0)], True)
    first.write_line({"frame": 1})
    first.close()
    assert [line["frame"] for line in lines_of(tmp_path / "results.jsonl")] == [0, 1]
    Sinks(str(tmp_path), [(0, 0, 0)], True).close()
    assert lines_of(tmp_path / "results.jsonl") == []


def test_the_same_failure_again_and_again_is_counted_and_not_kept(capfd, monkeypatch):
    from edge import loop
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    failures = loop.Failures()
    for _ in range(1000):
        failures.add("of another size")
        now[0] += loop.STATUS_S / 100.0
    failures.add("another")
    assert failures.count == 1001 and len(failures.first) == loop.FAILURES_KEPT
    said = capfd.readouterr()[1].splitlines()
    assert said.count("error: of another size") in (10, 11) and said[-1] == "error: another"


def test_scores_that_are_no_numbers_are_no_label(trained):
    from edge import pipeline
    from edge.errors import BadFile
    net = pipeline.Classifier.__new__(pipeline.Classifier)
    net.score_bands = lambda picture, lap: iter([(0, np.array([1.0, np.nan]).reshape(2, 1, 1))])
    with pytest.raises(BadFile, match="no finite numbers"):
        net.shares(None)
