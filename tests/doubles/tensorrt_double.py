"""A stand-in for TensorRT's Python package, one per API generation.

Names, members and signatures come from the listings in the folder trt_api; behaviour from the classes below, whose
methods carry the listed names. What is listed and has no behaviour here raises NotSimulated. Engines run their ONNX with
ONNX Runtime, in the memory of doubles.pycuda_double. Times, sizes and layer counts mean nothing."""
import json
import os
import re
import signal
import sys
import time
import types
import weakref

import numpy as np

from doubles import api_folder, pycuda_double
from doubles.kernels import NotSimulated

# generation: listing, __version__, serialisation version (the listings do not give it: made up, but different)
RELEASES = {"8.2": ("8.2.1", "8.2.1.8", 205), "8.5": ("8.5.2", "8.5.2.2", 232), "8.6": ("8.6.1", "8.6.1", 239),
            "10.3": ("10.3.0", "10.3.0", 240), "10.13": ("10.13.3.9", "10.13.3.9", 242),
            "11.4": ("11.4.0.106", "11.4.0.106", 250)}
# the listings give no numbers: members written here have the real ones, others follow in the listing's order
NUMBERS = {"NetworkDefinitionCreationFlag": ["EXPLICIT_BATCH", ("EXPLICIT_PRECISION", "STRONGLY_TYPED")],
           "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4 E8M0".split(),
           "BuilderFlag": ["FP16", "INT8", "DEBUG", "GPU_FALLBACK"], "TensorIOMode": ["NONE", "INPUT", "OUTPUT"],
           "MemoryPoolType": "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM TACTIC_DRAM".split(),
           "TacticSource": "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS".split(),
           "ExecutionContextAllocationStrategy": "STATIC ON_PROFILE_CHANGE USER_MANAGED".split(),
           "ProfilingVerbosity": [("LAYER_NAMES_ONLY", "DEFAULT"), "NONE", ("DETAILED", "VERBOSE")],
           "LayerInformationFormat": ["ONELINE", "JSON"], "TensorFormat": ["LINEAR"]}
# enumerations named in __all__ whose members the listings leave out
UNLISTED = {
    "TensorLocation": "DEVICE HOST".split(),
    "LayerType": """CONVOLUTION ACTIVATION POOLING SOFTMAX DECONVOLUTION CONCATENATION ELEMENTWISE PLUGIN_V2 UNARY PADDING
                    SHUFFLE REDUCE TOPK GATHER MATRIX_MULTIPLY CONSTANT IDENTITY SLICE SHAPE RESIZE SELECT CAST
                    NORMALIZATION""".split(),
    "ErrorCode": """SUCCESS INTERNAL_ERROR MEM_ALLOC_FAILED MODEL_DESERIALIZE_FAILED INVALID_VALUE INVALID_GRAPH
                    INVALID_NODE UNSUPPORTED_GRAPH UNSUPPORTED_NODE""".split()}
# a class named in __all__ that the listings leave out: the arguments are those of the documentation and pyCore.cpp
UNLISTED_METHODS = {"IProgressMonitor": ["__init__(self: tensorrt.IProgressMonitor) -> None",
                                         "phase_start(self: X, phase_name: str, parent_phase: str, num_steps: int) -> None",
                                         "step_complete(self: X, phase_name: str, step: int) -> bool",
                                         "phase_finish(self: X, phase_name: str) -> None"]}
SEVERITY = "INTERNAL_ERROR ERROR WARNING INFO VERBOSE".split()
LAYERS = {op: kind for kind, ops in {
    "CONVOLUTION": "Conv", "DECONVOLUTION": "ConvTranspose", "ACTIVATION": "Relu Sigmoid LeakyRelu Clip Tanh Elu Selu",
    "ELEMENTWISE": "Add Sub Mul Div Pow Min Max Equal Greater Less And Or", "POOLING": "MaxPool AveragePool",
    "UNARY": "Sqrt Exp Log Abs Neg Floor Ceil Erf Reciprocal Not", "TOPK": "ArgMax ArgMin TopK",
    "SOFTMAX": "Softmax LogSoftmax", "REDUCE": "ReduceMean ReduceSum ReduceMax ReduceMin GlobalAveragePool",
    "MATRIX_MULTIPLY": "MatMul Gemm", "SHUFFLE": "Reshape Transpose Unsqueeze Squeeze Flatten", "CONCATENATION": "Concat",
    "CONSTANT": "Constant", "SLICE": "Slice Pad", "RESIZE": "Resize Upsample", "GATHER": "Gather GatherElements GatherND",
    "SHAPE": "Shape", "SELECT": "Where", "CAST": "Cast", "IDENTITY": "Identity Dropout",
    "NORMALIZATION": "InstanceNormalization LayerNormalization"}.items() for op in ops.split()}
# operators and the first generation that imports them
SINCE = {op: (8, 5) for op in "GridSample Mod NonZero OneHot RoiAlign Trilu MeanVarianceNormalization".split()}
SINCE.update({op: (8, 6) for op in "LayerNormalization IsInf Xor ReverseSequence HardSwish GroupNormalization".split()})
SINCE.update({op: (99,) for op in "Unique DeformConv StringNormalizer".split()})
# ONNX element type: DataType, the same in numpy, the numpy type that ONNX Runtime takes
ONNX_TYPES = {1: ("FLOAT", np.float32), 2: ("UINT8", np.uint8), 3: ("INT8", np.int8), 6: ("INT32", np.int32),
              7: ("INT64", np.int64), 9: ("BOOL", np.bool_), 10: ("HALF", np.float16), 11: ("FLOAT", np.float64)}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "BOOL": np.bool_, "UINT8": np.uint8,
         "INT64": np.int64}
# what TensorRT writes to its logger
WORDS = {
    "no output": "4: [network.cpp::validate::2633] Error Code 4: Internal Error (Network must have at least one "
                 "output)",
    "no profile": "4: [network.cpp::validate::2738] Error Code 4: Internal Error (Network has dynamic or shape "
                  "inputs, but no optimization profile has been defined.)",
    "no tactic": "10: [optimizer.cpp::computeCosts::2011] Error Code 10: Internal Error (Could not find any "
                 "implementation for node %s.)",
    "no memory": "2: [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (Requested amount of "
                 "memory (%d bytes) could not be allocated. There may not be enough free memory for allocation to "
                 "succeed.)",
    "no batch": "This version of the ONNX parser only supports TensorRT INetworkDefinitions with an explicit batch "
                "dimension. Please ensure the network was created using the EXPLICIT_BATCH "
                "NetworkDefinitionCreationFlag.",
    "importer": "No importer registered for op: %s. Attempting to import as plugin.",
    "no importer": "No importer registered for op: %s. Plugin not found, are the plugin name, version, and namespace "
                   "correct?",
    "int64": "Your ONNX model has been generated with INT64 weights, while TensorRT does not natively support INT64. "
             "Attempting to cast down to INT32.",
    "failed": "4: [runtime.cpp::deserializeCudaEngine::50] Error Code 4: Internal Error (Engine deserialization "
              "failed.)",
    "magic": "1: [stdArchiveReader.cpp::StdArchiveReader::40] Error Code 1: Serialization (Serialization assertion "
             "magicTagRead == kMAGIC_TAG failed.Magic tag does not match)",
    "tag": "1: [stdArchiveReader.cpp::StdArchiveReader::35] Error Code 1: Serialization (Serialization assertion "
           "stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current Version: %d, "
           "Serialized Engine Version: %d)",
    "cut off": "1: [stdArchiveReader.cpp::StdArchiveReader::54] Error Code 1: Serialization (Serialization assertion "
               "remainingSize >= size failed.The archive is cut off)",
    "version": "6: The engine plan file is not compatible with this version of TensorRT, expecting library version %s "
               "got %s, please rebuild.",
    "device": "6: The engine plan file is generated on an incompatible device, expecting compute %d.%d got compute "
              "%d.%d, please rebuild.",
    "model": "Using an engine plan file across different models of devices is not recommended and is likely to affect "
             "performance or even cause errors.",
    "plugin": "3: getPluginCreator could not find plugin: %s version: 1",
    "no plugin": "1: [pluginV2Runner.cpp::load::290] Error Code 1: Serialization (Serialization assertion creator "
                 "failed.Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin Registry)",
    "order": "3: [runtime.cpp::~Runtime::346] Error Code 3: API Usage Error (Destroying a runtime before destroying "
             "deserialized engines created by the runtime leads to undefined behavior.)",
    "usage": "3: [%s] Error Code 3: API Usage Error (%s)",
}
MAGIC = b"ptrt-double\n"
MIB = 1 << 20


# --- the binding: listed names, and no others

class _Meta(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        if not hasattr(made, "_d"):  # as pybind11: a subclass that forgets its base
            raise TypeError("%s.__init__() must be called when overriding __init__" % cls.__mro__[-3].__name__)
        return made


class _Object(metaclass=_Meta):
    __slots__ = ("_d", "__weakref__")  # _d: the object that behaves


class _Enum(_Object):
    __slots__ = ()
    name = property(lambda self: self._d[0])
    value = property(lambda self: self._d[1])

    def __init__(self, value):
        if not hasattr(value, "__int__"):
            raise TypeError("__init__(): incompatible constructor arguments: an int is wanted, got %r" % (value,))
        self._d = next((m._d for m in type(self)._members if m.value == int(value)), ("???", int(value)))

    def __int__(self):
        return self._d[1]

    __index__ = __hash__ = __int__

    def __eq__(self, other):
        return type(other) is type(self) and other._d[1] == self._d[1]

    def __repr__(self):
        return "<%s.%s: %d>" % (type(self).__name__, self._d[0], self._d[1])

    def __str__(self):
        return "%s.%s" % (type(self).__name__, self._d[0])


def _split(text):
    """Split at the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _parameters(signature):
    """'f(self: X, a: int = 0) -> T' -> [('a', 'int', True)]."""
    result = []
    for part in _split(signature[signature.index("(") + 1:signature.rindex(") ->")]):
        left, _, default = part.partition(" = ")
        name, _, kind = left.partition(": ")
        result.append((name, kind, bool(default)))
    return result[1:] if result and result[0][0] == "self" else result


class Library:
    """Everything behind one `tensorrt` module."""

    def __init__(self, generation, gpu):
        listing, self.version, self.tag = RELEASES[generation]
        self.generation = tuple(int(part) for part in generation.split("."))
        self.gpu, self.types, self.plugins_ready = gpu, {}, False
        path = os.path.join(api_folder(), listing + ".json")
        if not os.path.isfile(path):
            import pytest
            pytest.skip("the listing %s is not here; it lies in trt_api, beside the folder that NANOPATCH_DATA names" % path)
        with open(path, encoding="utf-8") as handle:
            self.listing = json.load(handle)
        self.knobs = Knobs()
        self._severity()
        for name, members in self.listing.items():
            if isinstance(members, dict):
                if any(member["kind"] == "value" for member in members.values()):
                    self._enum(name, [m for m, member in members.items() if member["kind"] == "value"])
                else:
                    self.types[name] = self._bind(name, members)
        for name, signatures in UNLISTED_METHODS.items():
            if name in self.listing["__all__"]:
                self.types[name] = self._bind(name, {
                    text.partition("(")[0]: {"kind": "method", "signatures": [text]} for text in signatures})
        self.types["IHostMemory"] = IHostMemory
        for name, members in UNLISTED.items():
            self._enum(name, members, members)

    def _severity(self):
        self._enum("Severity", SEVERITY, SEVERITY)
        self.Severity = self.types.pop("Severity")

    def _enum(self, name, members, order=None):
        cls = self.types[name] = type(_Object)(name, (_Enum,), {"__slots__": (), "__module__": "tensorrt.tensorrt"})
        order = list(order or NUMBERS.get(name, ()))
        named = [n for entry in order for n in (entry if isinstance(entry, tuple) else (entry,))]
        order += [m for m in members if m not in named]
        cls._members = []
        for number, entry in enumerate(order):
            for member in (entry if isinstance(entry, tuple) else (entry,)):
                if member in members:
                    made = cls.__new__(cls)
                    made._d = (member, number)
                    cls._members.append(made)
                    setattr(cls, member, made)

    def _bind(self, name, members):
        behaviour = BEHAVIOUR.get(name)
        space = {"__slots__": (), "__module__": "tensorrt.tensorrt", "__init__": self._init(name, members, behaviour)}
        for member, entry in members.items():
            if entry["kind"] == "attr":  # Logger.ERROR ...
                space[member] = getattr(self.Severity, member)
            elif member == "Severity":
                space[member] = self.Severity
            elif entry["kind"] == "property":
                space[member] = self._property(name, member, behaviour)
            elif member != "__init__":
                space[member] = self._method(name, member, entry.get("signatures", []), behaviour)
        base = self.types["ILogger"] if name == "Logger" else _Object
        return type(_Object)(name, (base,), space)

    def _init(self, name, members, behaviour):
        signatures = members.get("__init__", {}).get("signatures")

        def __init__(this, *args, **kwargs):
            if not signatures:
                raise TypeError("tensorrt.tensorrt.%s: No constructor defined!" % name)
            values = self.match("__init__", signatures, this, args, kwargs)
            if behaviour is None:
                raise NotSimulated("the double does not simulate %s" % name)
            this._d = behaviour.__new__(behaviour)
            this._d.lib = self
            this._d.me = weakref.ref(this)
            this._d.__init__(*values)

        return __init__

    def _property(self, owner, name, behaviour):
        stored = getattr(behaviour, "stored", {})
        where = "%s.%s" % (owner, name)

        def get(this):
            if name in stored:
                return this._d.__dict__.setdefault("kept", {}).get(name, self.default(stored[name]))
            if not hasattr(behaviour, name):
                raise NotSimulated("the double does not simulate %s" % where)
            return getattr(this._d, name)

        def put(this, value):
            if name in stored:
                wanted = type(self.default(stored[name]))
                if not (isinstance(value, wanted) or wanted is int and hasattr(value, "__index__")):
                    raise TypeError("(): incompatible function arguments: %s is wanted, got %r" % (wanted.__name__, value))
                this._d.__dict__.setdefault("kept", {})[name] = value
            elif not hasattr(behaviour, name):
                raise NotSimulated("the double does not simulate %s" % where)
            elif owner == "ITensor" and getattr(behaviour, name).fset is None:  # it could be set, with effects
                raise NotSimulated("the double does not simulate setting %s" % where)
            elif getattr(behaviour, name).fset is None:
                raise AttributeError("can't set attribute '%s'" % name)
            else:
                setattr(this._d, name, value)

        return property(get, put)

    def default(self, value):
        """A stored default: itself, or the enumeration member that 'Type.MEMBER' names."""
        if isinstance(value, str) and "." in value:
            owner, _, member = value.partition(".")
            return getattr(self.types[owner], member)
        return value

    def _method(self, owner, name, signatures, behaviour):
        def call(this, *args, **kwargs):
            values = self.match(name, signatures, this, args, kwargs)
            if not hasattr(behaviour, name):
                raise NotSimulated("the double does not simulate %s.%s" % (owner, name))
            return getattr(this._d, name)(*values)

        call.__name__ = name
        return call

    def match(self, name, signatures, this, args, kwargs):
        """The arguments in order, by the first listed signature that they fit. TypeError as pybind11's otherwise."""
        for signature in signatures:
            parameters = _parameters(signature)
            names = [parameter[0] for parameter in parameters]
            given = dict(zip(names, args))
            if len(args) > len(parameters) or set(given) & set(kwargs) or set(kwargs) - set(names):
                continue
            given.update(kwargs)
            if all(self.fits(given[n], kind) or optional and given[n] is None if n in given else optional
                   for n, kind, optional in parameters):
                last = max([i for i, n in enumerate(names) if n in given], default=-1)
                return [given.get(n) for n in names[:last + 1]]
        kind = "constructor" if name == "__init__" else "function"
        raise TypeError("%s(): incompatible %s arguments. The following argument types are supported:\n%s\n\n"
                        "Invoked with: %s" % (name, kind, "\n".join("    " + s for s in signatures), ", ".join(
                            [repr(this)] + [repr(a) for a in args] + ["%s=%r" % pair for pair in kwargs.items()])))

    def fits(self, value, kind):
        if kind.endswith("]"):  # List[int], collections.abc.Sequence[typing.SupportsInt]
            return isinstance(value, (list, tuple)) and all(self.fits(v, kind[kind.index("[") + 1:-1]) for v in value)
        kind = re.split(r"\.|::", kind)[-1]
        if kind in ("int", "SupportsInt"):
            return hasattr(value, "__int__") and not isinstance(value, (float, np.floating, np.ndarray))
        if kind in ("buffer", "Buffer"):
            try:
                memoryview(value)
            except TypeError:
                return False
            return True
        if kind == "Dims" and isinstance(value, (list, tuple)):
            return all(isinstance(v, (int, np.integer)) for v in value)
        plain = {"str": str, "bool": (bool, np.bool_), "tuple": tuple, "list": list}
        wanted = plain.get(kind) or self.types.get(kind) or (self.Severity if kind == "Severity" else None)
        return wanted is None or isinstance(value, wanted)

    def new(self, name, *values, **fields):
        """An object of the module that Python cannot construct."""
        made = self.types[name].__new__(self.types[name])
        made._d = BEHAVIOUR[name].__new__(BEHAVIOUR[name])
        made._d.lib, made._d.me = self, weakref.ref(made)
        made._d.__init__(*values, **fields)
        return made

    def enum(self, path):
        return self.default(path)

    def say(self, logger, severity, text):
        logger.log(getattr(self.Severity, severity), text)


class Knobs:
    """`trt.double`: what tests set. A child process reads the environment instead."""

    fixed_mib = 600  # of a process that builds, before the workspace

    def __init__(self):
        names = ("KILL_MIB", "FAIL_BUILD", "OUT_OF_MEMORY", "NEEDS_CUDNN", "PAUSE_S")
        env = {name: os.environ.get("NANOPATCH_DOUBLE_" + name) for name in names}
        self.kill_above_mib = int(env["KILL_MIB"]) if env["KILL_MIB"] else None  # then SIGKILL, as the kernel does
        self.fail_build = env["FAIL_BUILD"] or ""                # text for the logger; the build gives None
        self.out_of_memory = bool(env["OUT_OF_MEMORY"])          # the build logs it and gives None
        self.needs_cudnn = bool(env["NEEDS_CUDNN"])              # no tactic found when CUDNN is not among the sources
        self.pause_s = float(env["PAUSE_S"] or 0)                # that timing the kernels of a layer takes

    def needs_mib(self, workspace_mib):
        return self.fixed_mib + workspace_mib


# --- behaviour; methods and properties carry the listed names, `stored` are properties that only keep a value

class _Flags:
    """A set of enumeration members as bits."""

    bits = 0

    @property
    def flags(self):
        return self.bits

    @flags.setter
    def flags(self, value):
        self.bits = int(value)

    def set_flag(self, flag):
        self.bits |= 1 << int(flag)

    def clear_flag(self, flag):
        self.bits &= ~(1 << int(flag))

    def get_flag(self, flag):
        return bool(self.bits >> int(flag) & 1)


def _typed(field, kind):
    """A property kept in `field` that takes a value of the listed type only."""
    def put(self, value):
        if not self.lib.fits(value, kind):
            raise TypeError("(): incompatible function arguments: %s is wanted, got %r" % (kind, value))
        setattr(self, field, value)

    return property(lambda self: getattr(self, field), put)


class ILogger:
    def log(self, severity, msg):
        raise RuntimeError('Tried to call pure virtual function "nvinfer1::ILogger::log"')


class Logger:
    def __init__(self, min_severity=None):
        self.min_severity_ = min_severity or self.lib.Severity.WARNING

    min_severity = _typed("min_severity_", "Severity")

    def log(self, severity, msg):
        if int(severity) <= int(self.min_severity_):
            sys.stderr.write("[TRT] [%s] %s\n" % (severity.name[0], msg))


class IProfiler:
    def report_layer_time(self, layer_name, ms):
        raise RuntimeError('Tried to call pure virtual function "nvinfer1::IProfiler::reportLayerTime"')


class IProgressMonitor:
    def phase_start(self, phase_name, parent_phase, num_steps):
        raise RuntimeError('Tried to call pure virtual function "nvinfer1::IProgressMonitor::phaseStart"')

    def step_complete(self, phase_name, step):
        raise RuntimeError('Tried to call pure virtual function "nvinfer1::IProgressMonitor::stepComplete"')

    def phase_finish(self, phase_name):
        raise RuntimeError('Tried to call pure virtual function "nvinfer1::IProgressMonitor::phaseFinish"')


class Dims:
    MAX_DIMS = 8

    def __init__(self, shape=()):
        self.shape = tuple(int(n) for n in shape)

    def __len__(self):
        return len(self.shape)

    def __getitem__(self, index):
        return self.shape[index]


class IHostMemory(bytes):
    """bytes for the buffer protocol, which Python code cannot give before 3.12; looks like nothing but the listed class."""

    def __getattribute__(self, name):
        if name == "nbytes":
            return bytes.__len__(self)
        if name == "dtype":
            raise NotSimulated("the double does not simulate IHostMemory.dtype")
        if name in ("__class__", "__dict__", "__repr__"):
            return bytes.__getattribute__(self, name)
        raise AttributeError("'tensorrt.tensorrt.IHostMemory' object has no attribute '%s'" % name)

    def __len__(self):
        raise TypeError("object of type 'tensorrt.tensorrt.IHostMemory' has no len()")

    def __getitem__(self, index):
        raise TypeError("'tensorrt.tensorrt.IHostMemory' object is not subscriptable")

    def __iter__(self):
        raise TypeError("'tensorrt.tensorrt.IHostMemory' object is not iterable")

    def __setattr__(self, name, value):
        raise AttributeError("'tensorrt.tensorrt.IHostMemory' object has no attribute '%s'" % name)

    __repr__ = object.__repr__


class ITensor:
    stored = {"allowed_formats": 1, "broadcast_across_batch": False}

    def __init__(self, name, onnx_type, shape, is_input=False, is_output=False):
        if onnx_type not in ONNX_TYPES:
            onnx_type = 1
        self.name_, self.shape_, self.onnx_type, self.is_network_input_, self.is_network_output_ = (
            name, tuple(shape), onnx_type, is_input, is_output)
        kind = ONNX_TYPES[onnx_type][0]
        self.dtype_ = self.lib.enum("DataType." + ("INT32" if kind == "INT64" and self.lib.generation < (9,) else kind))

    is_network_input = property(lambda self: self.is_network_input_)
    is_network_output = property(lambda self: self.is_network_output_)
    is_shape_tensor = property(lambda self: False)
    is_execution_tensor = property(lambda self: True)
    location = property(lambda self: self.lib.enum("TensorLocation.DEVICE"))
    shape = property(lambda self: self.lib.types["Dims"](self.shape_))
    name = property(lambda self: self.name_)
    dtype = _typed("dtype_", "DataType")


class ILayer:
    def __init__(self, node, index, inputs, outputs, native_norm):
        self.inputs, self.outputs, self.op, self.native_norm = inputs, outputs, node.op_type, native_norm
        self.name_ = node.name or "(Unnamed Layer* %d) [%s]" % (index, node.op_type)
        self.types_, self.unset = {}, self.lib.types["DataType"](0)  # FLOAT, but not the object that anyone sets
        self.precision_ = self.unset

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    precision_is_set = property(lambda self: self.precision_ is not self.unset)

    name = _typed("name_", "str")
    precision = _typed("precision_", "DataType")

    @property
    def type(self):
        kind = LAYERS.get(self.op)
        if kind is None:
            raise NotSimulated("the double does not simulate ILayer.type of %s" % self.op)
        if kind == "NORMALIZATION" and not self.native_norm:
            kind = "PLUGIN_V2"
        if kind == "CAST" and self.lib.generation < (8, 6):
            kind = "IDENTITY"
        return self.lib.enum("LayerType." + kind)

    def reset_precision(self):
        self.precision_ = self.unset

    def get_input(self, index):
        return self.inputs[index] if 0 <= index < len(self.inputs) else None

    def get_output(self, index):
        return self.outputs[index] if 0 <= index < len(self.outputs) else None

    def set_output_type(self, index, dtype):
        self.types_[index] = dtype

    def get_output_type(self, index):
        return self.types_.get(index, self.outputs[index].dtype)

    def output_type_is_set(self, index):
        return index in self.types_

    def reset_output_type(self, index):
        self.types_.pop(index, None)


class INetworkDefinition(_Flags):
    stored = {"name": "Unnamed Network 0"}

    def __init__(self, flags, builder):
        self.bits, self.builder_ = flags, builder
        self.model, self.inputs, self.outputs, self.layers, self.native_norm = None, [], [], [], False

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))
    builder = property(lambda self: self.builder_)

    @property
    def has_implicit_batch_dimension(self):
        return self.lib.generation < (9,) and not self.bits & 1

    def get_input(self, index):
        return self.inputs[index] if 0 <= index < len(self.inputs) else None

    def get_output(self, index):
        return self.outputs[index] if 0 <= index < len(self.outputs) else None

    def get_layer(self, index):
        return self.layers[index] if 0 <= index < len(self.layers) else None

    def __len__(self):
        return len(self.layers)

    def __getitem__(self, index):
        return self.layers[index]


class ParserError:
    def __init__(self, code, text, node=-1, operator="", name=""):
        self.values = code, text, node, operator, name

    def code(self):
        return self.lib.enum("ErrorCode." + self.values[0])

    def desc(self):
        return self.values[1]

    def node(self):
        return self.values[2]

    def node_operator(self):
        return self.values[3]

    def node_name(self):
        return self.values[4]

    def file(self):
        return "ModelImporter.cpp"

    def func(self):
        return "parse"

    def line(self):
        return 1


class OnnxParser(_Flags):
    def __init__(self, network, logger):
        self.network, self.logger, self.errors = network, logger, []

    num_errors = property(lambda self: len(self.errors))

    def get_error(self, index):
        return self.errors[index]

    def clear_errors(self):
        self.errors = []

    def supports_operator(self, op_name):
        return self.lib.generation >= SINCE.get(op_name, ())

    def _fail(self, code, text, node=-1, operator="", name=""):
        words = "In node %d (%s): %s: %s" % (node, operator or "parse", code, text)
        self.errors.append(self.lib.new("ParserError", code, words, node, operator, name))
        self.lib.say(self.logger, "ERROR", "ModelImporter.cpp:%d: ERROR: %s" % (773, words))
        return False

    def parse(self, model, path=None):
        import onnx.checker
        import onnx.external_data_helper
        try:
            proto = onnx.load_from_string(bytes(model))
            if not proto.graph.node:
                raise ValueError("it holds no graph")
        except Exception as exc:  # protobuf's and onnx's classes differ between releases
            return self._fail("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model: %s" % str(exc).splitlines()[0])
        if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in proto.graph.initializer):
            try:
                if path is None:
                    raise OSError("the model's weights lie in files of their own, and no path was given")
                onnx.external_data_helper.load_external_data_for_model(proto, os.path.dirname(path))
            except (OSError, ValueError, onnx.checker.ValidationError) as exc:
                return self._fail("INVALID_GRAPH", "Failed to open file: %s" % exc)
        return self._import(proto)

    def parse_from_file(self, model):
        try:
            with open(model, "rb") as handle:
                return self.parse(handle.read(), os.path.abspath(model))
        except OSError:
            return self._fail("MODEL_DESERIALIZE_FAILED", "Could not open file %s" % model)

    def _import(self, proto):
        import onnx.shape_inference
        network, lib = self.network._d, self.lib
        if network.has_implicit_batch_dimension:
            return self._fail("INVALID_VALUE", WORDS["no batch"], operator="importModel")
        weights = {tensor.name for tensor in proto.graph.initializer}
        inputs = [value for value in proto.graph.input if value.name not in weights]
        for value in inputs + list(proto.graph.output):
            kind = value.type.tensor_type.elem_type
            if kind not in ONNX_TYPES or kind == 2 and lib.generation < (8, 5):
                text = "Unsupported ONNX data type: %s (%d)" % (onnx.TensorProto.DataType.Name(kind), kind)
                return self._fail("UNSUPPORTED_NODE", text, operator="importInput")
        for index, node in enumerate(proto.graph.node):
            if not self.supports_operator(node.op_type) or node.domain not in ("", "ai.onnx"):
                lib.say(self.logger, "INFO", WORDS["importer"] % node.op_type)
                return self._fail("UNSUPPORTED_NODE", WORDS["no importer"] % node.op_type, index, node.op_type, node.name)
        if lib.generation < (9,) and any(tensor.data_type == 7 for tensor in proto.graph.initializer):
            lib.say(self.logger, "WARNING", WORDS["int64"])
        try:
            graph = onnx.shape_inference.infer_shapes(proto).graph
        except Exception:  # a net above 2 GB; shapes inside it stay unknown
            graph = proto.graph
        outputs, fed = {value.name for value in proto.graph.output}, {value.name for value in inputs}
        tensors = {}
        for value in list(graph.value_info) + inputs + list(graph.output):
            shape = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
            tensors[value.name] = lib.new("ITensor", value.name, value.type.tensor_type.elem_type, shape, value.name in fed,
                                          value.name in outputs)
        network.native_norm = lib.generation >= (9,) or lib.generation >= (8, 6) and self.get_flag(
            lib.enum("OnnxParserFlag.NATIVE_INSTANCENORM"))
        for index, node in enumerate(proto.graph.node):
            sides = [[tensors.setdefault(name, lib.new("ITensor", name, 1, ())) for name in names
                      if name and name not in weights] for names in (node.input, node.output)]
            network.layers.append(lib.new("ILayer", node, index, sides[0], sides[1], network.native_norm))
        network.model = proto
        network.inputs = [tensors[value.name] for value in inputs]
        network.outputs = [tensors[value.name] for value in proto.graph.output]
        return True


class ITimingCache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return IHostMemory(json.dumps(self.content, sort_keys=True).encode())

    def combine(self, input_cache, ignore_mismatch):
        if input_cache._d.content["made"] != self.content["made"] and not ignore_mismatch:
            return False
        self.content["layers"] = sorted(set(self.content["layers"]) | set(input_cache._d.content["layers"]))
        return True

    def reset(self):
        self.content["layers"] = []
        return True


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):  # noqa: A002 - TensorRT's own names
        shapes = [tuple(s) for s in (min, opt, max)]
        if len({len(s) for s in shapes}) > 1 or any(not a <= b <= c for a, b, c in zip(*shapes)):
            raise ValueError("Shape provided for min is inconsistent with other shapes.")
        self.shapes[input] = shapes

    def get_shape(self, input):  # noqa: A002
        return [self.lib.types["Dims"](shape) for shape in self.shapes[input]] if input in self.shapes else []


class IBuilderConfig(_Flags):
    stored = {"avg_timing_iterations": 1, "min_timing_iterations": 1, "builder_optimization_level": 3, "max_aux_streams": 0,
              "profiling_verbosity": "ProfilingVerbosity.LAYER_NAMES_ONLY", "engine_capability": "EngineCapability.STANDARD",
              "default_device_type": "DeviceType.GPU", "hardware_compatibility_level": "HardwareCompatibilityLevel.NONE",
              "max_num_tactics": -1}

    def __init__(self):
        self.reset()

    def reset(self):
        self.pools, self.cache, self.profiles, self.previews, self.monitor_ = {}, None, [], set(), None
        self.bits = 1 << int(self.lib.enum("BuilderFlag.TF32"))
        self.sources = (1 << len(self.lib.types["TacticSource"]._members)) - 1
        self.workspace = 0 if self.lib.generation < (8, 4) else self.lib.gpu.memory_mib * MIB
        self.__dict__.pop("kept", None)

    max_workspace_size = _typed("workspace", "int")
    progress_monitor = _typed("monitor_", "IProgressMonitor")

    def set_memory_pool_limit(self, pool, pool_size):
        if pool.name == "WORKSPACE":
            self.workspace = int(pool_size)
        self.pools[pool.name] = int(pool_size)

    def get_memory_pool_limit(self, pool):
        return self.workspace if pool.name == "WORKSPACE" else self.pools.get(pool.name, 0)

    def set_tactic_sources(self, tactic_sources):
        self.sources = int(tactic_sources)
        return True

    def get_tactic_sources(self):
        return self.sources

    def _made(self):
        return [self.lib.tag, self.lib.gpu.name, list(self.lib.gpu.compute_capability)]

    def create_timing_cache(self, serialized_timing_cache):
        content = {"made": self._made(), "layers": []}
        if bytes(serialized_timing_cache):
            try:
                content = json.loads(bytes(serialized_timing_cache).decode())
            except ValueError:
                return None
        return self.lib.new("ITimingCache", content)

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache._d.content["made"] != self._made() and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache

    def set_preview_feature(self, feature, enable):
        (self.previews.add if enable else self.previews.discard)(feature.name)

    def get_preview_feature(self, feature):
        return feature.name in self.previews

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    num_optimization_profiles = property(lambda self: len(self.profiles))


class Builder:
    stored = {"max_batch_size": 1, "max_threads": 1}

    def __init__(self, logger):
        self.logger_ = logger

    logger = property(lambda self: self.logger_)
    num_DLA_cores = property(lambda self: 0)
    platform_has_fast_fp16 = property(lambda self: self.lib.gpu.compute_capability not in ((5, 0), (5, 2), (6, 1)))
    platform_has_fast_int8 = property(lambda self: self.lib.gpu.compute_capability >= (6, 1))
    platform_has_tf32 = property(lambda self: self.lib.gpu.compute_capability >= (8, 0))

    def create_network(self, flags=0):
        return self.lib.new("INetworkDefinition", int(flags), self.me())

    def create_builder_config(self):
        return self.lib.new("IBuilderConfig")

    def create_optimization_profile(self):
        return self.lib.new("IOptimizationProfile")

    def is_network_supported(self, network, config):
        return bool(network._d.outputs)

    def reset(self):
        self.__dict__.pop("kept", None)

    def _fail(self, text):
        self.lib.say(self.logger_, "ERROR", text)

    def _time(self, layers, monitor):
        """What the log and an IProgressMonitor get while kernels are timed. False when the monitor ends the build."""
        lib, count = self.lib, len(layers)
        for text in ("Original: %d layers" % count, "After dead-layer removal: %d layers" % count,
                     "After concat removal: %d layers" % count, "=============== Computing reformatting costs",
                     "--------------- Timing Runner: Optimizer Reformat(x -> y) (Reformat)"):
            lib.say(self.logger_, "VERBOSE", text)
        phases = ["Building engine", "Building engine from subgraph", "Computing profile costs", "Timing graph nodes"]
        go_on = True
        for phase, parent in zip(phases, [None] + phases) if monitor is not None else ():
            monitor.phase_start(phase, parent, count if phase == phases[-1] else 1)
        for index, layer in enumerate(layers):
            for text in ("=============== Computing costs for %s" % (layer if lib.generation >= (9,) else ""),
                         "*************** Autotuning format combination: Float(8,1) -> Float(8,1) ***************",
                         "--------------- Timing Runner: %s (CaskConvolution)" % layer,
                         "Tactic: 0x0000000000000000 Time: 0.01"):
                lib.say(self.logger_, "VERBOSE", text)
            time.sleep(lib.knobs.pause_s)
            if monitor is not None:
                own = "Finding fastest tactic for %s" % layer
                monitor.phase_start(own, phases[-1], 1)
                go_on = monitor.step_complete(own, 0) and go_on
                monitor.phase_finish(own)
                go_on = monitor.step_complete(phases[-1], index) and go_on
            if not go_on:
                break
        for phase in reversed(phases) if monitor is not None else ():
            monitor.phase_finish(phase)
        lib.say(self.logger_, "VERBOSE", "Formats and tactics selection completed in 0.01 seconds.")
        lib.say(self.logger_, "VERBOSE", "After reformat layers: %d layers" % count)
        return go_on

    def build_serialized_network(self, network, config, kernel_text=None):
        if kernel_text is not None:
            raise NotSimulated("the double does not simulate build_serialized_network(kernel_text=...)")
        lib, knobs, network, config = self.lib, self.lib.knobs, network._d, config._d
        if not network.outputs:
            return self._fail(WORDS["no output"])
        need = knobs.needs_mib(config.workspace // MIB)
        if knobs.kill_above_mib is not None and need > knobs.kill_above_mib:
            os.kill(os.getpid(), signal.SIGKILL)
        if knobs.out_of_memory:
            return self._fail(WORDS["no memory"] % config.workspace)
        if knobs.fail_build:
            return self._fail(knobs.fail_build)
        cudnn = getattr(lib.types["TacticSource"], "CUDNN", None)
        if knobs.needs_cudnn and cudnn is not None and not config.sources >> int(cudnn) & 1:
            return self._fail(WORDS["no tactic"] % network.layers[0].name)
        profiles = [profile._d.shapes for profile in config.profiles]
        for tensor in network.inputs:
            if -1 in tensor._d.shape_ and not (profiles and all(tensor.name in shapes for shapes in profiles)):
                return self._fail(WORDS["no profile"])
        flags = {flag.name for flag in lib.types["BuilderFlag"]._members if config.get_flag(flag)}
        strict = flags & {"OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS", "STRICT_TYPES"}
        full = [tensor.name for layer in network.layers for tensor in layer._d.outputs
                if strict and layer._d.precision_is_set and layer._d.precision.name == "FLOAT"]
        layers = [layer.name for layer in network.layers]
        if not self._time(layers, config.monitor_):
            return None
        if config.cache is not None:
            config.cache._d.content["layers"] = sorted(set(config.cache._d.content["layers"]) | set(layers))
        plugins = [] if network.native_norm else ["InstanceNormalization_TRT"] * any(
            node.op_type == "InstanceNormalization" for node in network.model.graph.node)
        body = network.model.SerializeToString()
        head = {"tag": lib.tag, "version": lib.module.__version__, "cc": lib.gpu.compute_capability, "device": lib.gpu.name,
                "half": "FP16" in flags, "full": full, "layers": layers, "plugins": plugins, "profiles": profiles or [{}],
                "name": network.__dict__.get("kept", {}).get("name", "Unnamed Network 0"), "bytes": len(body),
                "io": [[t.name, t.dtype.name, t._d.onnx_type, list(t._d.shape_), t in network.inputs]
                       for t in network.inputs + network.outputs]}
        head = json.dumps(head, sort_keys=True).encode()
        return IHostMemory(MAGIC + b"%08d" % len(head) + head + body)


class Runtime:
    stored = {"max_threads": 1, "engine_host_code_allowed": False}

    def __init__(self, logger):
        self.logger_, self.engines = logger, weakref.WeakSet()
        _live(self)

    logger = property(lambda self: self.logger_)
    num_DLA_cores = property(lambda self: 0)

    def _refuse(self, *texts):
        for text in texts + (WORDS["failed"],):
            self.lib.say(self.logger_, "ERROR", text)

    def deserialize_cuda_engine(self, serialized_engine):
        lib, plan = self.lib, bytes(serialized_engine)
        pycuda_double.board().need_context()
        start = len(MAGIC) + 8
        if not plan.startswith(MAGIC) or not plan[len(MAGIC):start].isdigit():
            return self._refuse(WORDS["magic"])
        end = start + int(plan[len(MAGIC):start])
        try:
            head = json.loads(plan[start:end].decode())
        except ValueError:
            head = {"tag": lib.tag, "version": lib.module.__version__, "bytes": -1}
        if head["tag"] != lib.tag:
            return self._refuse(WORDS["tag"] % (lib.tag, head["tag"]))
        if head["version"] != lib.module.__version__:
            return self._refuse(WORDS["version"] % (lib.module.__version__, head["version"]))
        if head["bytes"] != len(plan) - end:
            return self._refuse(WORDS["cut off"])
        if tuple(head["cc"]) != tuple(lib.gpu.compute_capability):
            return self._refuse(WORDS["device"] % (tuple(lib.gpu.compute_capability) + tuple(head["cc"])))
        if head["device"] != lib.gpu.name:
            lib.say(self.logger_, "WARNING", WORDS["model"])
        if head["plugins"] and not lib.plugins_ready:
            return self._refuse(WORDS["plugin"] % head["plugins"][0], WORDS["no plugin"])
        if not _room(len(plan)):
            return self._refuse(WORDS["no memory"] % len(plan))
        engine = lib.new("ICudaEngine", self.me(), head, plan, plan[end:])
        self.engines.add(engine._d)
        return engine

    def __del__(self):
        if len(getattr(self, "engines", ())):
            pycuda_double.board().complaints.append(WORDS["order"])
            self.lib.say(self.logger_, "ERROR", WORDS["order"])


def _live(native):
    if pycuda_double._board is not None:
        pycuda_double._board.natives.add(native)


def _room(nbytes):
    board = pycuda_double.board()
    return board.used() + nbytes <= board.gpu.memory_mib * MIB


class _Native:
    """Of the engine and its context: gone when what made it is gone."""

    def _begin(self, maker, nbytes):
        self.maker, self.board, self.charged = weakref.ref(maker), pycuda_double.board(), nbytes
        self.context = self.board.need_context()
        self.board.charged += nbytes
        _live(self)

    def check(self):
        """Raise when this object must not be used any more, or not by this thread."""
        maker = self.maker()
        if maker is None:
            raise RuntimeError("%s used after the object that made it was deleted" % type(self).__name__)
        if not self.context.valid:
            raise pycuda_double.LogicError("%s used after its CUDA context: context is destroyed" % type(self).__name__)
        self.board.need_context()
        if isinstance(maker._d, _Native):
            maker._d.check()
        return maker

    def __del__(self):
        if hasattr(self, "charged"):
            self.board.charged -= self.charged


class ICudaEngine(_Native):
    def __init__(self, runtime, head, plan, body):
        import onnxruntime
        self._begin(runtime, len(plan))
        self.head, self.plan, self.logger, self.contexts = head, plan, runtime._d.logger_, weakref.WeakSet()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.session = onnxruntime.InferenceSession(body, options, providers=["CPUExecutionProvider"])
        self.io = head["io"]
        self.names = [entry[0] for entry in self.io]

    name = property(lambda self: self.head["name"])
    num_io_tensors = property(lambda self: len(self.io))
    num_bindings = property(lambda self: len(self.io) * len(self.head["profiles"]))
    num_layers = property(lambda self: len(self.head["layers"]))
    num_optimization_profiles = property(lambda self: len(self.head["profiles"]))
    max_batch_size = property(lambda self: 1)
    has_implicit_batch_dimension = property(lambda self: False)
    refittable = property(lambda self: False)
    engine_capability = property(lambda self: self.lib.enum("EngineCapability.STANDARD"))

    @property
    def device_memory_size(self):
        """Scratch memory of one context: here the inputs' and outputs' size at the largest shapes, in pages."""
        total = 0
        for name, kind, _, shape, _ in self.io:
            largest = [profile.get(name, [shape])[-1] for profile in self.head["profiles"]]
            total += max(int(np.prod(np.abs(one), dtype=np.int64)) for one in largest) * np.dtype(NUMPY[kind]).itemsize
        return -(-total // 4096) * 4096

    device_memory_size_v2 = device_memory_size

    def _entry(self, which, call):
        """The I/O tensor of a name or number; None, and an error in the log, when there is none."""
        if isinstance(which, str) and which in self.names:
            return self.io[self.names.index(which)]
        if not isinstance(which, str) and 0 <= which < len(self.io):
            return self.io[which]
        self.lib.say(self.logger, "ERROR", WORDS["usage"] % (call, "%s is no tensor of this engine" % which))
        return None

    def get_tensor_name(self, index):
        entry = self._entry(index, "getIOTensorName")
        return entry and entry[0]

    get_binding_name = get_tensor_name

    def get_tensor_mode(self, name):
        entry = self._entry(name, "getTensorIOMode")
        return self.lib.enum("TensorIOMode." + ("NONE" if entry is None else "INPUT" if entry[4] else "OUTPUT"))

    def get_tensor_shape(self, name):
        entry = self._entry(name, "getTensorShape")
        return self.lib.types["Dims"](entry[3] if entry else ())

    get_binding_shape = get_tensor_shape

    def get_tensor_dtype(self, name):
        entry = self._entry(name, "getTensorDataType")
        return self.lib.enum("DataType." + (entry[1] if entry else "FLOAT"))

    get_binding_dtype = get_tensor_dtype

    def get_tensor_bytes_per_component(self, name, profile_index=0):
        return np.dtype(NUMPY[self._entry(name, "getTensorBytesPerComponent")[1]]).itemsize

    get_binding_bytes_per_component = get_tensor_bytes_per_component

    def get_tensor_location(self, name):
        return self.lib.enum("TensorLocation.DEVICE")

    get_location = get_tensor_location

    def get_tensor_format(self, name, profile_index=0):
        return self.lib.enum("TensorFormat.LINEAR")

    get_binding_format = get_tensor_format

    def get_tensor_profile_shape(self, name, profile_index):
        return [self.lib.types["Dims"](shape) for shape in self.head["profiles"][profile_index][name]]

    def get_profile_shape(self, profile_index, binding):
        return self.get_tensor_profile_shape(binding if isinstance(binding, str) else self.names[binding], profile_index)

    def binding_is_input(self, which):
        entry = self._entry(which, "bindingIsInput")
        return bool(entry and entry[4])

    def get_binding_index(self, name):
        return self.names.index(name) if name in self.names else -1

    def __len__(self):
        return len(self.io)

    def __getitem__(self, which):
        if isinstance(which, str):
            return self.get_binding_index(which)
        return self.names[which]

    def serialize(self):
        return IHostMemory(self.plan)

    def create_execution_context(self, strategy=None):
        self.check()
        if strategy is not None and strategy.name == "ON_PROFILE_CHANGE":
            raise NotSimulated("the double does not simulate ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE")
        return self._context(self.device_memory_size if strategy is None or strategy.name == "STATIC" else 0)

    def create_execution_context_without_device_memory(self):
        self.check()
        return self._context(0)

    def _context(self, nbytes):
        if not _room(nbytes):
            self.lib.say(self.logger, "ERROR", WORDS["no memory"] % nbytes)
            return None
        made = self.lib.new("IExecutionContext", self.me(), nbytes)
        self.contexts.add(made._d)
        return made

    def __del__(self):
        if len(getattr(self, "contexts", ())):
            self.board.complaints.append("ICudaEngine deleted before its IExecutionContext")
        _Native.__del__(self)


class IExecutionContext(_Native):
    stored = {"debug_sync": False, "enqueue_emits_profile": True, "name": "Unnamed Context 0", "persistent_cache_limit": 0}

    def __init__(self, engine, nbytes):
        self._begin(engine, nbytes)
        self.e = engine._d
        self.logger, self.own, self.scratch = self.e.logger, bool(nbytes), None
        self.addresses, self.profile, self.profiler_ = {}, 0, None
        self.e = weakref.proxy(self.e)  # the engine must not live on because its context does
        self.shapes = {name: tuple(shape) for name, _, _, shape, is_input in self.e.io if is_input and -1 not in shape}

    engine = property(lambda self: self.maker())
    active_optimization_profile = property(lambda self: self.profile)
    all_shape_inputs_specified = property(lambda self: True)
    all_binding_shapes_specified = property(lambda self: not self.infer_shapes())

    def _error(self, call, text):
        self.lib.say(self.logger, "ERROR", WORDS["usage"] % (call, text))
        return False

    def set_optimization_profile_async(self, profile_index, stream_handle):
        if not 0 <= profile_index < len(self.e.head["profiles"]):
            return self._error("setOptimizationProfileAsync", "profile %d does not exist" % profile_index)
        self.profile = profile_index
        return True

    def set_input_shape(self, name, shape):
        self.check()
        shape = tuple(int(n) for n in shape)
        entry = self.e._entry(name, "setInputShape")
        if entry is None or not entry[4]:
            return False
        allowed = self.e.head["profiles"][self.profile].get(entry[0], [entry[3]] * 3)
        if len(shape) != len(entry[3]) or any(not low <= n <= high for low, n, high in zip(allowed[0], shape, allowed[2])):
            return self._error("setInputShape", "Supplied binding dimension %s for %s exceeds min ~ max range %s" % (
                list(shape), entry[0], [allowed[0], allowed[2]]))
        self.shapes[entry[0]] = shape
        return True

    set_binding_shape = set_input_shape

    def infer_shapes(self):
        return [entry[0] for entry in self.e.io if entry[4] and entry[0] not in self.shapes]

    def _shape(self, entry):
        if entry[4]:
            return self.shapes.get(entry[0], tuple(entry[3]))
        if -1 not in entry[3] or self.infer_shapes():
            return tuple(entry[3])
        blank = {e[0]: np.zeros(self.shapes[e[0]], ONNX_TYPES[e[2]][1]) for e in self.e.io if e[4]}
        return self.e.session.run([entry[0]], blank)[0].shape  # what shape inference could not tell, a run does

    def get_tensor_shape(self, name):
        entry = self.e._entry(name, "getTensorShape")
        return self.lib.types["Dims"](self._shape(entry) if entry else ())

    get_binding_shape = get_tensor_shape

    def set_tensor_address(self, name, memory):
        self.check()
        if self.e._entry(name, "setTensorAddress") is None:
            return False
        self.addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name):
        return self.addresses.get(name, 0)

    @property
    def device_memory(self):
        return self.scratch or 0

    @device_memory.setter
    def device_memory(self, memory):
        self.set_device_memory(memory, self.e.device_memory_size)

    def set_device_memory(self, memory, size):
        self.check()
        if self.own:
            return self._error("setDeviceMemory", "this context has device memory of its own")
        if int(size) < self.e.device_memory_size:
            return self._error("setDeviceMemory", "%d bytes are less than the %d needed" % (size, self.e.device_memory_size))
        self.board.span(memory, self.e.device_memory_size, "setDeviceMemory", aligned=True)
        self.scratch = int(memory)

    def update_device_memory_size_for_shapes(self):
        return self.e.device_memory_size

    profiler = _typed("profiler_", "IProfiler")

    def report_to_profiler(self):
        return False

    def _buffers(self, pointers):
        """{name: numpy view of device memory}; raises for what would be an illegal access."""
        found = {}
        for entry, pointer in zip(self.e.io, pointers):
            shape, kind = self._shape(entry), NUMPY[entry[1]]
            nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
            view = self.board.span(pointer, nbytes, "tensor %s" % entry[0], aligned=True)
            found[entry[0]] = view.view(kind).reshape(shape)
        return found

    def _ready(self, call, pointers):
        self.check()
        if len(pointers) != len(self.e.io):
            raise ValueError("%s: %d pointers for %d tensors; TensorRT would read past the end"
                             % (call, len(pointers), len(self.e.io)))
        if self.infer_shapes():
            return self._error(call, "not all input dimensions are specified: %s" % ", ".join(self.infer_shapes()))
        if not self.own and self.scratch is None and self.e.device_memory_size:
            return self._error(call, "device memory is not set")
        self._buffers(pointers)
        return True

    def _run(self, pointers):
        engine = self.check()._d
        if self.scratch is not None:  # scratch memory is written: who shares it with something else finds out
            self.board.span(self.scratch, engine.device_memory_size, "scratch memory")[:] = 0xFF
        start = time.time()
        arrays = self._buffers(pointers)
        inputs = {e[0]: arrays[e[0]].astype(ONNX_TYPES[e[2]][1]) for e in engine.io if e[4]}
        outputs = [e for e in engine.io if not e[4]]
        with np.errstate(over="ignore"):
            for entry, value in zip(outputs, engine.session.run([e[0] for e in outputs], inputs)):
                if engine.head["half"] and value.dtype == np.float32 and entry[0] not in engine.head["full"]:
                    value = value.astype(np.float16)
                np.copyto(arrays[entry[0]], value.astype(NUMPY[entry[1]]))
        for layer in engine.head["layers"] if self.profiler_ is not None else ():
            self.profiler_.report_layer_time(layer, 1e3 * (time.time() - start) / len(engine.head["layers"]))

    def execute_v2(self, bindings):
        if not self._ready("executeV2", bindings):
            return False
        self.board.drain()
        self._run(list(bindings))
        return True

    def _enqueue(self, call, pointers, stream_handle):
        if not self._ready(call, pointers):
            return False
        pointers, me = list(pointers), weakref.ref(self)

        def work():
            if me() is None:
                raise RuntimeError("an IExecutionContext was deleted while its work was still queued")
            me()._run(pointers)

        self.board.enqueue(int(stream_handle), work)
        return True

    def execute_async_v2(self, bindings, stream_handle, input_consumed=None):
        return self._enqueue("enqueueV2", bindings, stream_handle)

    def execute_async_v3(self, stream_handle):
        self.check()
        missing = [name for name in self.e.names if not self.addresses.get(name)]
        if missing:
            return self._error("enqueueV3", "Address is not set for tensor %s" % missing[0])
        return self._enqueue("enqueueV3", [self.addresses[name] for name in self.e.names], stream_handle)


BEHAVIOUR = {cls.__name__: cls for cls in (
    ILogger, Logger, IProfiler, IProgressMonitor, Dims, IHostMemory, ITensor, ILayer, INetworkDefinition, ParserError,
    OnnxParser, ITimingCache, IOptimizationProfile, IBuilderConfig, Builder, Runtime, ICudaEngine, IExecutionContext)}


class _Module(types.ModuleType):
    """A module that knows which of its names exist and are not simulated."""

    def __getattr__(self, name):
        if not name.startswith("__") and name in self.__dict__.get("_listed", ()):
            raise NotSimulated("the double does not simulate tensorrt.%s" % name)
        raise AttributeError("module 'tensorrt' has no attribute '%s'" % name)


def make_tensorrt(generation, gpu):
    """A fresh module `tensorrt` of a generation in RELEASES on a Gpu; `.double` are the test's knobs."""
    lib = Library(generation, gpu)
    module = lib.module = _Module("tensorrt", "The double of TensorRT %s" % generation)
    listed = set(lib.listing["__all__"])
    module.__dict__["_listed"] = listed
    module.__version__, module.double = lib.version, lib.knobs
    for name, cls in lib.types.items():
        if name in listed:
            setattr(module, name, cls)
    dtype = lib.types["DataType"]
    for name, member in (("float32", "FLOAT"), ("float16", "HALF"), ("int8", "INT8"), ("int32", "INT32"), ("bool", "BOOL"),
                         ("uint8", "UINT8"), ("int64", "INT64")):
        if name in listed and hasattr(dtype, member):
            setattr(module, name, getattr(dtype, member))

    def volume(iterable):
        return int(np.prod(list(iterable), dtype=np.int64))

    def nptype(trt_type):
        table = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32}
        table["BOOL"] = np.bool if lib.generation < (8, 6) else np.bool_  # so it was: numpy 1.24 to 1.26 have no np.bool
        table.update({"UINT8": np.uint8, "INT64": np.int64})
        if trt_type.name not in table:
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return table[trt_type.name]

    def init_libnvinfer_plugins(logger, namespace):
        if not (logger is None or lib.fits(logger, "ILogger")) or not isinstance(namespace, str):
            raise TypeError("init_libnvinfer_plugins(): incompatible function arguments.")
        lib.plugins_ready = True
        return True

    module.volume, module.nptype, module.init_libnvinfer_plugins = volume, nptype, init_libnvinfer_plugins
    return module
