"""One door for packages that may be absent."""
import importlib

from edge.errors import MissingPart, UsageError

INSTALL = {
    "onnxruntime": "python3 -m pip install onnxruntime",
    "onnx": "python3 -m pip install onnx",
    "tqdm": "python3 -m pip install tqdm",
    "tensorrt": "sudo apt install python3-libnvinfer (part of JetPack; there is none for other machines' CPUs)",
    "pycuda.driver": "python3 -m pip install pycuda (on JetPack 4: \"pycuda<=2022.1\")",
    "torch": "see the README, 'Installing torch' (on a Jetson take NVIDIA's wheel, not pip's)",
}


def need(name):
    """Import and return the module `name`, or raise MissingPart with the line that installs it, UsageError where it is there and does not
    load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name in (name, name.partition(".")[0]):
            raise MissingPart(name, INSTALL.get(name, "python3 -m pip install " + name)) from exc
        # a Jetson's torch without the libraries that it asks the system for, or without memory
        raise UsageError("the package %r does not load: %s. See what it needs: python3 -m jetson doctor" % (name, exc)) from exc
