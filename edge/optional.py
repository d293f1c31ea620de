"""One door for packages that may be absent."""
import importlib

from edge.errors import MissingPart

INSTALL = {
    "onnxruntime": "python3 -m pip install onnxruntime",
    "onnx": "python3 -m pip install onnx",
    "tqdm": "python3 -m pip install tqdm",
    "tensorrt": "sudo apt install python3-libnvinfer (part of JetPack; there is none for other machines' CPUs)",
    "pycuda.driver": "python3 -m pip install pycuda (on JetPack 4: pycuda==2020.1)",
    "torch": "see the README, 'Installing torch' (on a Jetson take NVIDIA's wheel, not pip's)",
}


def need(name):
    """Import and return the module `name`, or raise MissingPart with the line that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise MissingPart(name, INSTALL.get(name, "python3 -m pip install " + name)) from exc
