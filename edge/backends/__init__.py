"""Who computes a stage. A backend module has `describe()` and a class `Stage(path, threads)` with
`tensors(side)` -> {name: (dtype, shape)}, `run({name: array}) -> {name: array}` and `close()`."""
import importlib
import os

from edge.errors import UsageError

NAMES = {"ort": "edge.backends.ort"}
BY_SUFFIX = {".onnx": "ort"}


def choose(name, model):
    """The backend module called `name`, or for 'auto' the one for the model file's suffix. Raises UsageError."""
    if name == "auto":
        name = BY_SUFFIX.get(os.path.splitext(model)[1])
    if name not in NAMES:
        raise UsageError("no backend for %s; known suffixes: %s; known backends: %s" % (
            model, ", ".join(sorted(BY_SUFFIX)), ", ".join(sorted(NAMES))))
    return importlib.import_module(NAMES[name])
