"""One door for packages that may be absent."""
import importlib

from edge.errors import MissingPart

INSTALL = {
    "onnxruntime": "python3 -m pip install onnxruntime",
    "onnx": "python3 -m pip install onnx",
    "tqdm": "python3 -m pip install tqdm",
    "torch": "see the README, 'Installing torch' (on a Jetson take NVIDIA's wheel, not pip's)",
}


def need(name):
    """Import and return the module `name`, or raise MissingPart with the line that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise MissingPart(name, INSTALL.get(name, "python3 -m pip install " + name)) from exc
