"""Imports point one way: jetson <- edge <- train_lite <- export; only the floor of edge is open to train_lite."""
import ast
import os

import pytest

from conftest import ROOT

FLOOR = {"edge." + name for name in ("boxes", "command", "contract", "errors", "geometry", "glnet", "images", "optional", "schema", "scores",
                                     "tiles", "warp.path", "warp.pictures", "warp.reference")}
OWN = ("jetson", "edge", "train_lite", "export")
ALLOWED = {"jetson": {"jetson", "edge.command", "edge.errors"},  # how every command behaves
            "edge": {"edge", "jetson"}, "train_lite": {"train_lite", "jetson"} | FLOOR,
           "export": set(OWN)}
HEAVY = {"torch", "onnx", "onnxruntime", "tensorrt", "pycuda", "cv2"}


def sources(package):
    for folder, _dirs, files in os.walk(os.path.join(ROOT, package)):
        for name in files:
            if name.endswith(".py"):
                yield os.path.join(folder, name)


def imports(path):
    """(module, at module level?) for every import in a file; 'from a import b' counts as a.b and as a."""
    with open(path, encoding="utf-8") as handle:
        tree = ast.parse(handle.read())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "%s: relative import" % path
            names = ["%s.%s" % (node.module, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) in top


def allowed(name, package):
    return any(name == entry or name.startswith(entry + ".") for entry in ALLOWED[package]) or name == "edge.__version__"


@pytest.mark.parametrize("package", OWN)
def test_imports_point_one_way(package):
    wrong = ["%s imports %s" % (os.path.relpath(path, ROOT), name) for path in sources(package)
             for name, _top in imports(path) if name.split(".")[0] in OWN and not allowed(name, package)]
    assert not wrong


@pytest.mark.parametrize("package", ["jetson", "edge", os.path.join("train_lite", "data")])
def test_no_heavy_import_below_training(package):
    wrong = ["%s imports %s" % (os.path.relpath(path, ROOT), name) for path in sources(package)
             for name, _top in imports(path) if name.split(".")[0] in HEAVY]
    assert not wrong, "take it through edge.optional.need"


def test_floor_is_below_the_runtime():
    wrong = ["%s imports %s" % (module, name) for module in FLOOR
             for name, _top in imports(os.path.join(ROOT, *module.split(".")) + ".py")
             if name.startswith("edge.") and not allowed(name, "train_lite")]
    assert not wrong


def test_the_rules_are_not_vacuous():
    assert not allowed("edge.pipeline.Segmenter", "train_lite") and allowed("edge.tiles.plan", "train_lite")
    assert not allowed("edge.images", "jetson")
    assert not allowed("train_lite.loop", "edge") and not allowed("edge", "train_lite")
