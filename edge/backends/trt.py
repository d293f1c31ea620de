"""TensorRT 8.2 to 11 through pycuda. What a release offers is felt for, not read off its version: engines whose tensors
have numbers (8.2) or names (8.5 and later), scratch memory set in the old way or the new."""
import collections
import time

from edge.command import say
from edge.errors import BadFile, EdgeError, EngineMismatch, MissingPart
from edge.gpu import KINDS, Buffer, Gpu
from edge.kernels.device import Device
from edge.optional import need
from edge.warp.device import WarpDevice
from edge.warp.path import WarpHost

NAME, DEVICE = "trt", "gpu"
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "INT8": "int8", "UINT8": "uint8",
          "BOOL": "bool"}
BUILD = "Build it here: python -m export MODEL.onnx --out MODEL.plan"
TRIALS = 4  # runs per kind of memory when the fastest is sought


def describe():
    """Name and version, for the first line of output. Raises MissingPart without tensorrt or pycuda."""
    need("pycuda.driver")
    return "trt (TensorRT %s)" % need("tensorrt").__version__


def logger(trt, hear=lambda message: None):
    """An ILogger that keeps the last warnings and errors, in .lines: TensorRT raises nothing, it only logs. hear: called with
    every other message."""
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.lines = collections.deque(maxlen=8)

        def log(self, severity, msg):
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.lines.append(msg)
            else:
                hear(msg)

        def tail(self):
            return "; ".join(self.lines) or "TensorRT gave no reason"

    return Logger()


def demand_match(contract, tensorrt, gpu):
    """Raise EngineMismatch when the plans of `contract` were built for another TensorRT or another GPU."""
    built, here = contract["engine"], {"tensorrt": tensorrt, "compute_capability": gpu.capability, "device": gpu.name}
    wrong = ["%s %s, here %s" % (key.replace("_", " "), built[key], value) for key, value in here.items() if built[key] != value]
    if wrong:
        raise EngineMismatch("%s was built for %s. A plan runs only where it was built. %s" % (
            contract["stages"][0]["file"], "; ".join(wrong), BUILD))


class Session:
    """The plans of a model, loaded, one after the other on one stream, with one scratch memory for all of them.

    contract, files: from contract.load(). Raises EngineMismatch (another TensorRT or GPU), BadFile (no plan)."""

    def __init__(self, contract, files, threads=0):
        self._trt = need("tensorrt")
        self._gpu = Gpu()
        self._stages, self._runtime, self._scratch = collections.OrderedDict(), None, None
        try:
            demand_match(contract, self._trt.__version__, self._gpu)
            self._log = logger(self._trt)
            self._trt.init_libnvinfer_plugins(self._log, "")  # before any engine that holds a plugin
            self._runtime = self._trt.Runtime(self._log)
            for name, path in files.items():
                self._stages[name] = Stage(self._trt, self._engine(path))
            size = max(stage.scratch_bytes for stage in self._stages.values())
            self._scratch = self._gpu.driver.mem_alloc(max(1, size))
            for stage in self._stages.values():
                stage.begin(int(self._scratch), size)
            self.kind = self._fastest_kind() if self._gpu.integrated else "device"
            self._make_buffers(self.kind)
            self.pixels, self._kept = self._device(), None
        except Exception:
            self.close()
            raise

    def _engine(self, path):
        with open(path, "rb") as handle:
            engine = self._runtime.deserialize_cuda_engine(handle.read())
        if engine is None:
            raise BadFile("TensorRT %s cannot load %s: %s. %s" % (self._trt.__version__, path, self._log.tail(), BUILD))
        return engine

    def _make_buffers(self, kind):
        for stage in self._stages.values():
            for port in stage.ports:
                if port.name in stage.buffers:
                    self._gpu.free(stage.buffers[port.name])
                stage.buffers[port.name] = self._gpu.buffer(port.shape, port.dtype, kind)

    def _fastest_kind(self):
        """The kind of memory with which all stages, copies included, take the least time on this board."""
        took = {}
        for kind in KINDS:
            self._make_buffers(kind)
            for _ in range(TRIALS):
                began = time.perf_counter()
                for name, stage in self._stages.items():
                    self.run(name, {port.name: stage.buffers[port.name].host for port in stage.ports if port.is_input})
                took[kind] = min(took.get(kind, float("inf")), time.perf_counter() - began)
        return min(took, key=took.get)

    def _device(self):
        """Who prepares pixels and decodes scores: the GPU, or the host where kernels cannot be compiled."""
        found = {name: buffer for stage in self._stages.values() for name, buffer in stage.buffers.items()}
        if sum("pixels" in stage.buffers for stage in self._stages.values()) > 1:  # they are prepared into one net's input
            return WarpHost()
        made, pixels = (WarpDevice, found["samples"]) if "samples" in found else (Device, found["pixels"])
        try:
            return made(self._gpu, pixels, found["scores"].host.shape[1], self.kind)
        except MissingPart as exc:
            say("warning: pixels are prepared and decoded on the CPU: %s" % exc)
            return WarpHost()

    def hold(self, value):
        """The first item of what a stage gave, kept beyond its next run, as a Buffer."""
        if self._kept is None:
            self._kept = self._gpu.buffer((1,) + value.host.shape[1:], value.host.dtype, "device")
        self._gpu.driver.memcpy_dtod_async(self._kept.address, value.address, self._kept.host.nbytes, self._gpu.stream)
        return self._kept

    def tensors(self, stage, side):
        """side 'inputs' or 'outputs' -> {name: (dtype name, shape list)}."""
        return {port.name: (port.dtype, list(port.shape)) for port in self._stages[stage].ports
                if port.is_input == (side == "inputs")}

    def run(self, stage, inputs, keep=False):
        """{input name: array or Buffer} -> {output name: array}; with keep the outputs' Buffers, still on the device and
        valid until the stage runs again."""
        self._gpu.demand_own_thread()
        loaded = self._stages[stage]
        addresses = {name: buffer.address for name, buffer in loaded.buffers.items()}
        for name, value in inputs.items():
            if isinstance(value, Buffer):
                addresses[name] = value.address
            else:
                loaded.buffers[name].put(value)
        if not loaded.enqueue(addresses, self._gpu.stream.handle):
            raise EdgeError("TensorRT did not run %s: %s" % (stage, self._log.tail()))
        outputs = {port.name: loaded.buffers[port.name] for port in loaded.ports if not port.is_input}
        return outputs if keep else {name: buffer.get() for name, buffer in outputs.items()}

    def close(self):
        """Contexts, engines, runtime, memory, CUDA: in this order, or the driver aborts the process at its end."""
        for stage in self._stages.values():
            stage.end()
        self._stages.clear()
        self._runtime = None
        if self._scratch is not None:
            self._scratch.free()
            self._scratch = None
        self._gpu.close()


Port = collections.namedtuple("Port", "name is_input dtype shape")  # one tensor that goes in or out


class Stage:
    """An engine with its one context. ports: list of Port, in the engine's order; buffers: {name: Buffer}."""

    def __init__(self, trt, engine):
        self._trt, self._engine, self._context, self.buffers = trt, engine, None, {}
        self._named = hasattr(engine, "num_io_tensors")
        self.ports = _named_ports(trt, engine) if self._named else _numbered_ports(trt, engine)
        self.scratch_bytes = getattr(engine, "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2")
                                     else "device_memory_size")

    def begin(self, scratch, size):
        """Make the context, its scratch memory at address `scratch`."""
        if hasattr(self._engine, "create_execution_context_without_device_memory"):
            self._context = self._engine.create_execution_context_without_device_memory()
            if self._context is not None:
                self._context.device_memory = scratch
        else:
            self._context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if self._context is not None:
                self._context.set_device_memory(scratch, size)
        if self._context is None:
            raise EdgeError("TensorRT made no execution context; is there memory left? Type: python -m jetson doctor")

    def enqueue(self, addresses, stream):
        """Start the work on the stream handle `stream`. False when TensorRT refuses."""
        if not self._named:
            return self._context.execute_async_v2([addresses[port.name] for port in self.ports], stream)
        return (all(self._context.set_tensor_address(port.name, addresses[port.name]) for port in self.ports)
                and self._context.execute_async_v3(stream))

    def end(self):
        self._context = self._engine = None


def _named_ports(trt, engine):
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [Port(name, engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT, _dtype(engine.get_tensor_dtype(name)),
                 tuple(engine.get_tensor_shape(name))) for name in names]


def _numbered_ports(trt, engine):
    return [Port(engine.get_binding_name(index), engine.binding_is_input(index), _dtype(engine.get_binding_dtype(index)),
                 tuple(engine.get_binding_shape(index))) for index in range(engine.num_bindings)]


def _dtype(kind):
    """'float32' of DataType.FLOAT; trt.nptype fails with numpy 1.24 on TensorRT before 8.5.3."""
    return DTYPES.get(kind.name, kind.name)
