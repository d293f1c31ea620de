"""ONNX Runtime on the CPU."""
from edge.errors import BadFile
from edge.optional import need
from edge.warp.path import WarpHost

NAME, DEVICE = "ort", "cpu"
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8",
          "tensor(int32)": "int32", "tensor(int64)": "int64"}


def describe():
    """Name and version, for the first line of output. Raises MissingPart without onnxruntime."""
    return "ort (ONNX Runtime %s, CPU)" % need("onnxruntime").__version__


class Session:
    """The ONNX files of a model, loaded. files: {stage name: path}; threads: CPU threads, 0 for all cores. Raises BadFile
    when one is no model."""

    def __init__(self, contract, files, threads=0):
        self._loaded = {stage: _load(path, threads) for stage, path in files.items()}
        self.pixels = WarpHost()
        self._outputs = {stage: [node.name for node in session.get_outputs()] for stage, session in self._loaded.items()}

    def tensors(self, stage, side):
        """side 'inputs' or 'outputs' -> {name: (dtype name, shape list)}."""
        session = self._loaded[stage]
        nodes = session.get_inputs() if side == "inputs" else session.get_outputs()
        return {node.name: (DTYPES.get(node.type, node.type), list(node.shape)) for node in nodes}

    def run(self, stage, inputs, keep=False):
        """{input name: array} -> {output name: array}."""
        names = self._outputs[stage]
        return dict(zip(names, self._loaded[stage].run(names, inputs)))

    def hold(self, value):
        """The first item of what a stage gave, kept beyond its next run."""
        return value[:1]

    def close(self):
        self._loaded = {}


def _load(path, threads):
    ort = need("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: they reach the user as exceptions
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime raises classes of its own, which differ between releases
        raise BadFile("%s is no model that ONNX Runtime %s can load: %s. Export it again"
                      % (path, ort.__version__, (str(exc).strip() or type(exc).__name__).splitlines()[0])) from exc
