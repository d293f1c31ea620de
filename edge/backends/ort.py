"""ONNX Runtime on the CPU."""
from edge.errors import BadFile
from edge.optional import need

DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8",
          "tensor(int32)": "int32", "tensor(int64)": "int64"}


def describe():
    """Name and version, for the first line of output. Raises MissingPart without onnxruntime."""
    return "ort (ONNX Runtime %s, CPU)" % need("onnxruntime").__version__


class Stage:
    """One ONNX file, loaded. threads: CPU threads, 0 for all cores. Raises BadFile when it is no model."""

    def __init__(self, path, threads=0):
        ort = need("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only: they reach the user as exceptions
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime raises classes of its own, which differ between releases
            raise BadFile("%s is no model that ONNX Runtime %s can load: %s. Export it again"
                          % (path, ort.__version__, str(exc).strip().splitlines()[0])) from exc
        self._names = [output.name for output in self._session.get_outputs()]

    def tensors(self, side):
        """side 'inputs' or 'outputs' -> {name: (dtype name, shape list)}."""
        nodes = self._session.get_inputs() if side == "inputs" else self._session.get_outputs()
        return {node.name: (DTYPES.get(node.type, node.type), list(node.shape)) for node in nodes}

    def run(self, inputs):
        """{input name: array} -> {output name: array}."""
        return dict(zip(self._names, self._session.run(self._names, inputs)))

    def close(self):
        self._session = None
