"""Who computes a model's stages. A backend module has NAME, DEVICE, `describe()` and a class `Session(contract, files, threads)`
with `tensors(stage, side)` -> {name: (dtype, shape)}, `run(stage, {name: array}, keep=False) -> {name: array}`,
`hold(value)` -> the first item of one of them, beyond the stage's next run, `pixels` (an edge.scores.Host or the like) and
`close()`. With keep, a backend may return handles to what it holds on its device; run() takes those as inputs too."""
import importlib
import os

from edge.errors import UsageError

NAMES = {"ort": "edge.backends.ort", "trt": "edge.backends.trt"}
BY_SUFFIX = {".onnx": "ort", ".plan": "trt"}


def choose(name, model=""):
    """The backend module called `name`, or for "auto" the one for the suffix of the file `model`. Raises UsageError."""
    suffix = os.path.splitext(model)[1]
    if name == "auto":
        name = BY_SUFFIX.get(suffix)
    if name not in NAMES:
        raise UsageError("no backend for %s; known suffixes: %s; known backends: %s" % (
            model, ", ".join(sorted(BY_SUFFIX)), ", ".join(sorted(NAMES))))
    if suffix and BY_SUFFIX.get(suffix, name) != name:
        raise UsageError("--backend %s does not run %s files; leave --backend out, or give --engine a %s file" % (
            name, suffix, " or ".join(s for s, backend in BY_SUFFIX.items() if backend == name)))
    return importlib.import_module(NAMES[name])
