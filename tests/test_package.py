"""The package as installed: metadata, light import, names that are ours, documents that do not lie."""
import configparser
import os
import re
import subprocess
import sys

import pytest

import edge
import export
import jetson
import train_lite
from conftest import ROOT


def test_import_edge_is_light():
    """Under 60 MB, and none of the big packages; the time is in docs/measured.md (timed tests do not exist)."""
    code = ("import sys, edge; from jetson.memory import peak_rss_mib; "
            "print(peak_rss_mib(), ','.join(sorted(set(sys.modules) & {'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL'})))")
    out = subprocess.check_output([sys.executable, "-c", code], env=dict(os.environ, PYTHONPATH=ROOT)).decode().split(" ")
    assert float(out[0]) < 60 and out[1].strip() == ""


def test_the_runtime_loads_no_torch():
    code = "import sys, edge.cli; from jetson.memory import peak_rss_mib; print(peak_rss_mib(), 'torch' in sys.modules)"
    out = subprocess.check_output([sys.executable, "-c", code], env=dict(os.environ, PYTHONPATH=ROOT)).decode().split()
    assert float(out[0]) < 60 and out[1] == "False"


@pytest.mark.parametrize("package", [edge, export, jetson, train_lite], ids=lambda p: p.__name__)
def test_packages_are_ours(package):
    """jetson-inference installs a `jetson` too; whichever comes first on the path would win."""
    assert os.path.dirname(os.path.abspath(package.__file__)) == os.path.join(ROOT, package.__name__)


def test_setup_cfg_names_every_package():
    config = configparser.ConfigParser()
    config.read(os.path.join(ROOT, "setup.cfg"))
    named = set(config["options"]["packages"].split())
    found = {os.path.relpath(folder, ROOT).replace(os.sep, ".") for top in ("edge", "export", "jetson", "train_lite")
             for folder, _dirs, files in os.walk(os.path.join(ROOT, top)) if "__init__.py" in files}
    assert named == found
    assert config["metadata"]["version"] == edge.__version__
    assert "torch" not in config["options"]["install_requires"], "pip would replace a Jetson's torch"


def test_readme_names_files_that_exist():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as handle:
        text = handle.read()
    for path in re.findall(r"(?:\./)?((?:scripts|docs|edge)/[\w./-]+\w)", text):
        assert os.path.exists(os.path.join(ROOT, path)), path


def test_nothing_unpickles_without_its_flag():
    for folder, _dirs, files in os.walk(ROOT):
        for name in files:
            if name.endswith(".py") and os.sep + "tests" not in folder and os.sep + ".venv" not in folder:
                with open(os.path.join(folder, name), encoding="utf-8") as handle:
                    text = handle.read()
                assert "import pickle" not in text and "np.load(" not in text, name
                assert "torch.load(" not in text or "weights_only" in text, name


def test_a_package_that_does_not_load_is_named(monkeypatch):
    """NVIDIA's torch without libopenblas: its own message, not a bug of ours."""
    import importlib

    from edge import optional
    from edge.errors import UsageError

    def load(_name):
        raise OSError("libopenblas.so.0: cannot open shared object file: No such file or directory")
    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(UsageError, match="'torch' does not load: libopenblas.*jetson doctor"):
        optional.need("torch")


@pytest.mark.slow
def test_two_processes_collect_the_same_tests():
    """scripts/test takes two files at a time, in processes that must agree on every name."""
    found = []
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests"], cwd=ROOT, stdout=subprocess.PIPE,
                              env=dict(os.environ, PYTHONHASHSEED=seed))
        assert done.returncode == 0, done.stdout.decode()[-2000:]
        found.append([line for line in done.stdout.decode().splitlines() if "::" in line])
    assert found[0] == found[1] and len(found[0]) > 3000
