"""The doubles of TensorRT, pycuda and CUDA kernels are as strict as what they stand for."""
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest

from conftest import ROOT
from doubles import CARD, GENERATIONS, NANO, ORIN, api_folder, child_env, default_gpu, install, kernels, pycuda_double
from doubles.tensorrt_double import RELEASES, make_tensorrt

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
TEXT = "explicit_context_dependent failed: invalid device context - no currently active context?"
BEFORE_10, NAMED = ("8.2", "8.5", "8.6"), GENERATIONS[1:]


def model(op=None, dynamic=False, input_type=1, output_type=1):
    """bytes of Conv + Relu (1, 3, 6, 8) -> (1, 2, 6, 8), or of one other operator in its place."""
    from onnx import helper, numpy_helper
    rng = np.random.RandomState(0)
    shape = ["n" if dynamic else 1, 3, 6, 8]
    weights = [numpy_helper.from_array(rng.randn(2, 3, 3, 3).astype(np.float32), "w")]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
             helper.make_node("Relu", ["c"], ["y"], "relu")]
    out = [shape[0], 2, 6, 8]
    if op == "GridSample":
        nodes = [helper.make_node(op, ["x", "w"], ["y"], "warp")]
    elif op == "InstanceNormalization":
        weights = [numpy_helper.from_array(np.ones(3, np.float32), name) for name in "sb"]
        nodes, out = [helper.make_node(op, ["x", "s", "b"], ["y"], "norm")], shape
    elif op == "Cast":
        weights, nodes, out = [], [helper.make_node(op, ["x"], ["y"], "cast", to=output_type)], shape
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("x", input_type, shape)],
                              [helper.make_tensor_value_info("y", output_type, out)], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16 if op == "GridSample" else 13)])
    made.ir_version = 7
    return made.SerializeToString()


def reference(plain, **inputs):
    import onnxruntime
    return onnxruntime.InferenceSession(plain, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def quiet(trt):
    """A logger that keeps (severity name, text)."""
    class Keeper(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.seen = []

        def log(self, severity, msg):
            self.seen.append((severity.name, msg))

        def text(self):
            return "\n".join(msg for _, msg in self.seen)

    return Keeper()


def parse(trt, logger, plain, explicit=True):
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(1 << int(flag) if explicit and flag is not None else 0)
    parser = trt.OnnxParser(network, logger)
    return builder, network, parser, parser.parse(plain)


def build(trt, logger, plain, flags=(), workspace=64, change=lambda builder, network, config: None):
    builder, network, parser, good = parse(trt, logger, plain)
    assert good, logger.text()
    config = builder.create_builder_config()
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    else:
        config.max_workspace_size = workspace << 20
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    change(builder, network, config)
    return builder.build_serialized_network(network, config)


class Machine(NamedTuple):
    trt: object
    cuda: object
    board: object
    logger: object
    context: object


def start(monkeypatch, generation, gpu=None):
    trt, pycuda = install(monkeypatch, generation, gpu)
    pycuda.driver.init()
    context = pycuda.driver.Device(0).retain_primary_context()
    context.push()
    return Machine(trt, pycuda.driver, pycuda.double, quiet(trt), context)


def stop(machine):
    gc.collect()
    machine.context.pop()
    machine.context.detach()
    machine.board.check_teardown()


@pytest.fixture(params=GENERATIONS)
def each(request, monkeypatch):
    made = start(monkeypatch, request.param)
    yield made
    stop(made)


@pytest.fixture
def nano(monkeypatch):
    made = start(monkeypatch, "8.2")
    yield made
    stop(made)


@pytest.fixture
def orin(monkeypatch):
    made = start(monkeypatch, "10.3")
    yield made
    stop(made)


def engine_of(machine, plan=None, **options):
    runtime = machine.trt.Runtime(machine.logger)
    plan = plan if plan is not None else build(machine.trt, machine.logger, model(), **options)
    return runtime, runtime.deserialize_cuda_engine(plan)


def picture():
    return np.random.RandomState(1).rand(1, 3, 6, 8).astype(np.float32)


# names and arguments

@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_names_are_the_listed_ones(generation):
    trt = make_tensorrt(generation, default_gpu(generation))
    with open(os.path.join(api_folder(), RELEASES[generation][0] + ".json"), encoding="utf-8") as handle:
        listing = json.load(handle)
    python = {"double", "volume", "nptype", "init_libnvinfer_plugins"}
    assert {name for name in vars(trt) if not name.startswith("_")} - python <= set(listing["__all__"])
    for name, members in listing.items():
        if isinstance(members, dict):
            cls = getattr(trt, name)
            for member in [m for m in members if not m.startswith("_")]:
                assert name == "IHostMemory" or hasattr(cls, member), (name, member)
            if name != "IHostMemory":
                own = {member for member in dir(cls) if not member.startswith("_")}
                assert own <= set(members), name
    for name in ("Nothing", "IHostMemories"):
        with pytest.raises(AttributeError, match="module 'tensorrt' has no attribute '%s'" % name):
            getattr(trt, name)


@pytest.mark.parametrize("name,generations", [
    ("IBuilderConfig.max_workspace_size", BEFORE_10), ("IBuilderConfig.set_memory_pool_limit", NAMED),
    ("ICudaEngine.num_bindings", BEFORE_10), ("ICudaEngine.num_io_tensors", NAMED), ("BuilderFlag.FP16", GENERATIONS[:-1]),
    ("IExecutionContext.execute_v2", GENERATIONS), ("IExecutionContext.execute_async_v2", BEFORE_10),
    ("IExecutionContext.execute_async_v3", NAMED), ("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", GENERATIONS[:-1]),
    ("ICudaEngine.device_memory_size", GENERATIONS[:-1]), ("ICudaEngine.device_memory_size_v2", GENERATIONS[3:]),
    ("Builder.platform_has_fast_fp16", GENERATIONS[:-1]), ("ILayer.precision", GENERATIONS[:-1]),
    ("DataType.UINT8", NAMED), ("DataType.INT64", GENERATIONS[3:])])
def test_a_name_exists_where_it_does(name, generations):
    owner, _, member = name.partition(".")
    found = [g for g in GENERATIONS if hasattr(getattr(make_tensorrt(g, ORIN), owner), member)]
    assert found == list(generations)


def test_wrong_arguments_are_type_errors(each):
    trt, logger = each.trt, each.logger
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    refused_calls = [
        lambda: trt.Builder(), lambda: trt.Builder(1), lambda: trt.Builder(log=logger), lambda: trt.Runtime(logger, logger),
        lambda: builder.create_network("1"), lambda: builder.create_network(1.0), lambda: builder.create_network(flag=1),
        lambda: config.set_flag(0), lambda: config.set_flag(), lambda: builder.build_serialized_network(config, config),
        lambda: trt.OnnxParser(builder.create_network(1), logger).parse("text"), lambda: trt.ICudaEngine(),
        lambda: trt.DataType("FLOAT"), lambda: trt.init_libnvinfer_plugins(logger), lambda: trt.IBuilderConfig()]
    for call in refused_calls:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError, match="incompatible function arguments. The following argument types are supported"):
        config.set_flag(0)
    with pytest.raises(TypeError, match="No constructor defined"):
        trt.ICudaEngine()
    with pytest.raises(AttributeError):
        config.max_workspace = 1
    with pytest.raises(AttributeError):
        builder.nothing
    with pytest.raises(kernels.NotSimulated, match="the double does not simulate"):
        config.DLA_core
    with pytest.raises(kernels.NotSimulated, match="the double does not simulate tensorrt.Weights"):
        trt.Weights

    class Forgetful(trt.ILogger):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        Forgetful()


def test_logger_and_dims(each, capfd):
    trt = each.trt
    logger = trt.Logger(trt.Logger.WARNING)
    logger.log(trt.Logger.INFO, "not this")
    logger.log(trt.ILogger.ERROR, "but this")
    assert capfd.readouterr().err == "[TRT] [E] but this\n"
    assert trt.Logger.Severity.ERROR == trt.Logger.ERROR and int(trt.Logger.VERBOSE) == 4
    dims = trt.Dims([1, 3, 6])
    assert tuple(dims) == (1, 3, 6) and len(dims) == 3 and dims[-1] == 6 and trt.volume(dims) == 18
    assert trt.DataType.FLOAT == trt.DataType(0) == trt.float32 and trt.DataType.FLOAT != 0
    if hasattr(np, "bool") or each.trt.__version__ > "8.5.2.2" or each.trt.__version__.startswith("1"):
        assert trt.nptype(trt.float16) is np.float16
    else:
        with pytest.raises(AttributeError, match="bool"):
            trt.nptype(trt.float16)


# building

def test_build_deserialise_execute(each):
    x, plain = picture(), model()
    runtime, engine = engine_of(each)
    assert engine is not None, each.logger.text()
    context = engine.create_execution_context()
    assert context.engine is engine
    given, taken = each.cuda.mem_alloc(x.nbytes), each.cuda.mem_alloc(4 * 96)
    each.cuda.memcpy_htod(given, x)
    assert context.execute_v2([int(given), int(taken)]) is True
    y = np.empty((1, 2, 6, 8), np.float32)
    each.cuda.memcpy_dtoh(y, taken)
    assert np.array_equal(y, reference(plain, x=x))
    if hasattr(engine, "num_io_tensors"):
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        assert [engine.get_tensor_mode(n).name for n in names] == ["INPUT", "OUTPUT"]
        assert [tuple(engine.get_tensor_shape(n)) for n in names] == [(1, 3, 6, 8), (1, 2, 6, 8)]
        assert engine.get_tensor_dtype("x") == each.trt.float32 and engine.get_tensor_mode("z").name == "NONE"
    else:
        names = list(engine)
        assert [engine.binding_is_input(n) for n in names] == [True, False] and engine.num_bindings == len(engine) == 2
        assert [tuple(engine.get_binding_shape(i)) for i in range(2)] == [(1, 3, 6, 8), (1, 2, 6, 8)]
        assert engine.get_binding_dtype("x") == each.trt.float32 and engine.get_binding_index("z") == -1 and engine[0] == "x"
    assert names == ["x", "y"]
    del context, engine, runtime


@pytest.mark.parametrize("generation", NAMED)
def test_stream_calls_come_in_order(monkeypatch, generation):
    machine = start(monkeypatch, generation)
    cuda, x = machine.cuda, picture()
    runtime, engine = engine_of(machine)
    context, stream = engine.create_execution_context(), cuda.Stream()
    given, taken = cuda.pagelocked_empty(x.shape, np.float32), cuda.pagelocked_zeros((1, 2, 6, 8), np.float32)
    given[...] = x
    device = [cuda.mem_alloc(given.nbytes), cuda.mem_alloc(taken.nbytes)]
    assert context.set_tensor_address("x", int(device[0])) and not context.set_tensor_address("z", int(device[0]))
    assert context.execute_async_v3(stream.handle) is False  # y has no address yet
    assert "Address is not set for tensor y" in machine.logger.text()
    context.set_tensor_address("y", int(device[1]))
    cuda.memcpy_htod_async(device[0], given, stream)
    assert context.execute_async_v3(stream_handle=stream.handle)
    cuda.memcpy_dtoh_async(taken, device[1], stream)
    assert not taken.any()  # nothing is done before the stream is waited for
    stream.synchronize()
    assert np.array_equal(taken, reference(model(), x=x))
    with pytest.raises(cuda.LogicError, match="invalid resource handle"):
        context.execute_async_v3(4711)
    del context, engine, runtime, device, given, taken, stream
    stop(machine)


def test_explicit_batch_is_needed_before_10(each):
    good = parse(each.trt, each.logger, model(), explicit=False)[3]
    assert good is (each.trt.__version__ > "9" or each.trt.__version__.startswith("1"))
    assert good or "explicit batch dimension" in each.logger.text()


def test_parser_names_what_it_cannot(nano):
    _, _, parser, good = parse(nano.trt, nano.logger, model("GridSample"))
    error = parser.get_error(0)
    assert not good and parser.num_errors == 1 and "No importer registered for op: GridSample" in error.desc()
    assert error.node() == 0 and error.code() == nano.trt.ErrorCode.UNSUPPORTED_NODE
    assert not parser.supports_operator("GridSample") and parser.supports_operator("Conv")
    assert not parser.parse(b"no model") and not parser.parse_from_file("/nonexistent/net.onnx") and parser.num_errors == 3
    parser.clear_errors()
    assert parser.num_errors == 0
    _, _, parser, good = parse(nano.trt, nano.logger, model("Cast", input_type=2))
    assert not good and "Unsupported ONNX data type: UINT8 (2)" in parser.get_error(0).desc()


def test_gridsample_and_uint8_from_85(monkeypatch):
    machine = start(monkeypatch, "8.5")
    if sys.version_info >= (3, 8):  # the older onnx and runtime know no GridSample themselves
        assert parse(machine.trt, machine.logger, model("GridSample"))[3], machine.logger.text()
    assert parse(machine.trt, machine.logger, model("Cast", input_type=2))[3]
    stop(machine)


def test_parse_from_file_with_weights_outside(each, tmp_path):
    import onnx.external_data_helper
    proto = onnx.load_from_string(model())
    onnx.external_data_helper.convert_model_to_external_data(proto, location="weights.bin", size_threshold=0)
    onnx.save(proto, str(tmp_path / "net.onnx"))
    parser = parse(each.trt, each.logger, model())[2]
    assert not parser.parse((tmp_path / "net.onnx").read_bytes())
    builder = each.trt.Builder(each.logger)
    network = builder.create_network(1)
    assert each.trt.OnnxParser(network, each.logger).parse_from_file(str(tmp_path / "net.onnx")), each.logger.text()
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    (tmp_path / "weights.bin").unlink()
    runtime, engine = engine_of(each, plan)  # the plan holds the weights
    assert engine is not None
    del engine, runtime


def test_layers_and_precision(each):
    trt = each.trt
    _, network, _, _ = parse(trt, each.logger, model())
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    assert [layer.name for layer in layers] == ["conv", "relu"] and layers[0].type == trt.LayerType.CONVOLUTION
    assert network.get_input(0).name == "x" and tuple(network.get_output(0).shape) == (1, 2, 6, 8)
    assert layers[1].num_outputs == 1 and layers[1].get_output(0).name == "y" and network.get_layer(2) is None
    if hasattr(layers[1], "precision"):
        layers[1].precision = trt.float32
        layers[1].set_output_type(0, trt.float32)
        assert layers[1].precision_is_set and not layers[0].precision_is_set
        with pytest.raises(TypeError):
            layers[1].precision = 0


def test_a_failed_build_is_none_and_a_word_in_the_log(each):
    trt, knobs = each.trt, each.trt.double
    builder = trt.Builder(each.logger)
    assert builder.build_serialized_network(builder.create_network(1), builder.create_builder_config()) is None
    assert "at least one output" in each.logger.text()
    knobs.fail_build = "10: Could not find any implementation for node conv."
    assert build(trt, each.logger, model()) is None and knobs.fail_build in each.logger.text()
    knobs.fail_build, knobs.out_of_memory = "", True
    assert build(trt, each.logger, model()) is None and "OutOfMemory" in each.logger.text()
    knobs.out_of_memory, knobs.needs_cudnn = False, True
    plan = build(trt, each.logger, model(), change=lambda b, n, config: config.set_tactic_sources(0))
    assert (plan is None) == hasattr(trt.TacticSource, "CUDNN")


def test_plan_is_a_buffer_and_no_more(nano, tmp_path):
    plan = build(nano.trt, nano.logger, model())
    assert isinstance(plan, nano.trt.IHostMemory) and plan.nbytes == len(bytes(plan)) == memoryview(plan).nbytes
    with open(str(tmp_path / "plan"), "wb") as handle:
        handle.write(plan)
    assert (tmp_path / "plan").read_bytes() == bytes(plan)
    for wrong in (lambda: len(plan), lambda: plan[0], lambda: list(plan)):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(AttributeError):
        plan.decode


@pytest.mark.parametrize("generation", GENERATIONS[:-1])
def test_fp16_rounds_the_results(monkeypatch, generation):
    machine = start(monkeypatch, generation)
    x = picture()

    def run(**options):
        runtime, engine = engine_of(machine, **options)
        context = engine.create_execution_context()
        given, taken = machine.cuda.mem_alloc(x.nbytes), machine.cuda.mem_alloc(4 * 96)
        machine.cuda.memcpy_htod(given, x)
        assert context.execute_v2([int(given), int(taken)])
        y = np.empty((1, 2, 6, 8), np.float32)
        machine.cuda.memcpy_dtoh(y, taken)
        del context, engine, runtime
        return y

    def keep(builder, network, config):
        network.get_layer(1).precision = machine.trt.float32

    full = reference(model(), x=x)
    half = full.astype(np.float16).astype(np.float32)
    assert not np.array_equal(half, full) and np.array_equal(run(flags=["FP16"]), half)
    assert np.array_equal(run(flags=["FP16", "OBEY_PRECISION_CONSTRAINTS"], change=keep), full)
    stop(machine)


def test_int64_becomes_int32_before_10(each):
    plain = model("Cast", output_type=7)
    runtime, engine = engine_of(each, build(each.trt, each.logger, plain))
    kind = engine.get_tensor_dtype("y") if hasattr(engine, "get_tensor_dtype") else engine.get_binding_dtype("y")
    small = each.trt.__version__.startswith("8")
    assert kind.name == ("INT32" if small else "INT64")
    x = 10 * picture()
    y = np.empty(x.shape, np.int32 if small else np.int64)
    given, taken = each.cuda.mem_alloc(x.nbytes), each.cuda.mem_alloc(y.nbytes)
    each.cuda.memcpy_htod(given, x)
    context = engine.create_execution_context()
    assert context.execute_v2([int(given), int(taken)])
    each.cuda.memcpy_dtoh(y, taken)
    assert np.array_equal(y, x.astype(np.int64))
    del context, engine, runtime


def test_dynamic_shapes_need_a_profile(each):
    plain, trt = model(dynamic=True), each.trt
    assert build(trt, each.logger, plain) is None and "no optimization profile has been defined" in each.logger.text()

    def profile(builder, network, config):
        made = builder.create_optimization_profile()
        made.set_shape("x", (1, 3, 6, 8), (2, 3, 6, 8), (4, 3, 6, 8))
        assert config.add_optimization_profile(made) == 0

    runtime, engine = engine_of(each, build(trt, each.logger, plain, change=profile))
    context = engine.create_execution_context()
    named = hasattr(context, "set_input_shape")
    shape = context.set_input_shape if named else context.set_binding_shape
    which, out = ("x", "y") if named else (0, 1)
    x = np.repeat(picture(), 3, axis=0)
    given, taken = each.cuda.mem_alloc(x.nbytes), each.cuda.mem_alloc(3 * 4 * 96)
    assert not context.all_binding_shapes_specified and context.execute_v2([int(given), int(taken)]) is False
    assert shape(which, (5, 3, 6, 8)) is False and shape(which, (3, 3, 6, 8)) is True
    assert context.all_binding_shapes_specified
    assert tuple((context.get_tensor_shape if named else context.get_binding_shape)(out)) == (3, 2, 6, 8)
    each.cuda.memcpy_htod(given, x)
    assert context.execute_v2([int(given), int(taken)])
    y = np.empty((3, 2, 6, 8), np.float32)
    each.cuda.memcpy_dtoh(y, taken)
    assert np.array_equal(y, reference(plain, x=x))
    del shape, context, engine, runtime


def test_timing_cache_knows_its_device(each):
    trt = each.trt
    config = trt.Builder(each.logger).create_builder_config()
    cache = config.create_timing_cache(b"")
    assert config.set_timing_cache(cache, False) and config.get_timing_cache() is cache
    kept = bytes(cache.serialize())
    other = make_tensorrt("8.2" if trt.__version__ != "8.2.1.8" else "8.5", CARD)
    config = other.Builder(other.Logger()).create_builder_config()
    assert not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False)
    assert config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=True)


# plans of elsewhere

def refused(machine, plan):
    runtime = machine.trt.Runtime(machine.logger)
    assert runtime.deserialize_cuda_engine(plan) is None
    return machine.logger.text()


def test_plans_of_elsewhere_are_refused(nano):
    plan = bytes(build(nano.trt, nano.logger, model()))
    other = make_tensorrt("10.3", NANO)
    assert "Version tag does not match. Note: Current Version: 205" in refused(nano, build(other, quiet(other), model()))
    other = make_tensorrt("8.2", ORIN)
    assert "expecting compute 5.3 got compute 8.7, please rebuild" in refused(nano, build(other, quiet(other), model()))
    assert "Magic tag does not match" in refused(nano, b"garbage" * 9) and "cut off" in refused(nano, plan[:-9])
    assert "Engine deserialization failed" in refused(nano, plan[:20])
    nano.trt.__version__ = "8.2.3.0"
    assert "expecting library version 8.2.3.0 got 8.2.1.8, please rebuild" in refused(nano, plan)
    nano.trt.__version__ = "8.2.1.8"
    other = make_tensorrt("8.2", NANO._replace(name="Tegra X1 of another make"))
    runtime, engine = engine_of(nano, build(other, quiet(other), model()))
    assert engine is not None and "across different models of devices is not recommended" in nano.logger.text()
    del engine, runtime


def test_plugins_are_registered_first_on_8(each):
    plan = build(each.trt, each.logger, model("InstanceNormalization"))
    if each.trt.__version__.startswith("8"):
        assert "could not find plugin: InstanceNormalization_TRT" in refused(each, plan)
        assert each.trt.init_libnvinfer_plugins(each.logger, "")
    runtime, engine = engine_of(each, plan)
    assert engine is not None
    del engine, runtime


# order, threads, the end

def test_pointers_are_checked(each):
    runtime, engine = engine_of(each)
    context = engine.create_execution_context()
    x, y, small = (each.cuda.mem_alloc(n) for n in (4 * 144, 4 * 96, 64))
    host = np.zeros(600, np.float32)
    for pointers, words in (([host.ctypes.data, int(y)], "no live device allocation"), ([int(x), int(small)], "has 64 left"),
                            ([int(x) + 4, int(y)], "has|misaligned")):
        with pytest.raises(each.cuda.LogicError, match=words):
            context.execute_v2(pointers)
    with pytest.raises(ValueError, match="1 pointers for 2 tensors"):
        context.execute_v2([int(x)])
    y.free()
    with pytest.raises(each.cuda.LogicError, match="no live device allocation"):
        context.execute_v2([int(x), int(y)])
    del context, engine, runtime


def test_scratch_memory_of_the_user(each):
    trt, cuda = each.trt, each.cuda
    runtime, engine = engine_of(each)
    x, y = cuda.mem_alloc(4 * 144), cuda.mem_alloc(4 * 96)
    cuda.memcpy_htod(x, picture())
    size = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
    assert size > 0
    if hasattr(engine, "create_execution_context_without_device_memory"):
        context = engine.create_execution_context_without_device_memory()
    else:
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert context.execute_v2([int(x), int(y)]) is False and "device memory is not set" in each.logger.text()
    scratch, little = cuda.mem_alloc(size), cuda.mem_alloc(size - 1)
    with pytest.raises(cuda.LogicError):
        context.device_memory = int(little)
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(int(scratch), size)
    else:
        context.device_memory = int(scratch)
    assert context.execute_v2([int(x), int(y)]) is True
    del context, engine, runtime


def test_a_thread_needs_a_context(each):
    runtime, engine = engine_of(each)
    context = engine.create_execution_context()
    found = []

    def work():
        for call in (lambda: context.execute_v2([1, 2]), lambda: each.cuda.mem_alloc(4), each.cuda.Stream,
                     lambda: runtime.deserialize_cuda_engine(b"")):
            try:
                call()
            except each.cuda.LogicError as exc:
                found.append(str(exc))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [TEXT] * 4
    del context, engine, runtime, work, thread


def test_use_after_the_end(each):
    runtime, engine = engine_of(each)
    context = engine.create_execution_context()
    del engine
    with pytest.raises(RuntimeError, match="deleted"):
        context.execute_v2([1, 2])
    del context
    engine = runtime.deserialize_cuda_engine(build(each.trt, each.logger, model()))
    del runtime
    with pytest.raises(RuntimeError, match="deleted"):
        engine.create_execution_context()
    assert "Destroying a runtime before destroying deserialized engines" in each.logger.text()
    del engine
    gc.collect()
    complaints = [each.board.complaints.pop(0), each.board.complaints.pop(0)]
    assert complaints[0].startswith("ICudaEngine deleted before") and "Destroying a runtime" in complaints[1]


def test_teardown_tells_what_was_left(monkeypatch):
    machine = start(monkeypatch, "8.5")
    runtime, engine = engine_of(machine)
    context = engine.create_execution_context()
    allocation = machine.cuda.mem_alloc(40)
    with pytest.raises(AssertionError) as caught:
        machine.board.check_teardown()
    for words in ("context stack was not empty upon module cleanup", "never detached", "40 bytes never freed",
                  "ICudaEngine still alive", "IExecutionContext still alive", "Runtime still alive"):
        assert words in str(caught.value)
    machine.context.detach()
    with pytest.raises(machine.cuda.LogicError, match="context is destroyed"):
        context.execute_v2([1, 2])
    with pytest.raises(machine.cuda.LogicError, match="cannot pop non-current context"):
        machine.context.pop()
    with pytest.raises(machine.cuda.LogicError, match="cannot detach from invalid context"):
        machine.context.detach()
    del context, engine, runtime, allocation
    with pytest.raises(AssertionError, match="context detached before .* was deleted(.|\n)*dead context maybe"):
        machine.board.check_teardown()


def test_a_full_board_refuses_engines(monkeypatch):
    machine = start(monkeypatch, "8.6", NANO._replace(memory_mib=1))
    most = machine.cuda.mem_alloc((1 << 20) - 4000)
    runtime, engine = engine_of(machine)
    assert engine is None or engine.create_execution_context() is None
    assert "could not be allocated" in machine.logger.text()
    del engine, runtime, most
    stop(machine)


# pycuda

def test_device_and_memory_info(monkeypatch):
    machine = start(monkeypatch, "8.2")
    cuda = machine.cuda
    device, attribute = cuda.Device(0), cuda.device_attribute
    assert (device.name(), device.compute_capability(), device.total_memory()) == ("NVIDIA Tegra X1", (5, 3), 3964 << 20)
    assert device.get_attribute(attribute.INTEGRATED) == device.get_attribute(attribute.CAN_MAP_HOST_MEMORY) == 1
    free, total = cuda.mem_get_info()
    block = cuda.mem_alloc(1 << 20)
    assert total == 3964 << 20 and cuda.mem_get_info()[0] == free - (1 << 20)
    with pytest.raises(MemoryError, match="cuMemAlloc failed: out of memory"):
        cuda.mem_alloc(4 << 30)
    with pytest.raises(cuda.LogicError):
        cuda.mem_alloc(0)
    with pytest.raises(TypeError):
        cuda.mem_alloc(4.0)
    block.free()
    assert cuda.mem_get_info()[0] == free and cuda.Context.get_current() is machine.context
    with pytest.raises(ImportError):
        import pycuda.autoinit  # noqa: F401
    stop(machine)
    fresh = pycuda_double.make_pycuda(NANO).driver
    with pytest.raises(fresh.LogicError, match="initialization error"):
        fresh.Device(0)


def test_copies_check_sizes_and_order(nano):
    cuda, data = nano.cuda, np.arange(12, dtype=np.float32).reshape(3, 4)
    block, back = cuda.mem_alloc(48), np.empty((3, 4), np.float32)
    cuda.memcpy_htod(block, data)
    cuda.memcpy_dtoh(back[1:2], int(block) + 16)
    assert np.array_equal(back[1], data[1])
    other = cuda.mem_alloc(48)
    cuda.memcpy_dtod(other, block, 48)
    cuda.memcpy_dtoh(back, other)
    assert np.array_equal(back, data)
    for call in (lambda: cuda.memcpy_htod(block, data.T[:2]), lambda: cuda.memcpy_dtoh(back[:, 1:], block)):
        with pytest.raises(ValueError, match="not contiguous"):
            call()
    for call in (lambda: cuda.memcpy_htod(int(block) + 4, data), lambda: cuda.memcpy_dtod(other, block, 49),
                 lambda: cuda.memcpy_dtoh(back, 4096)):
        with pytest.raises(cuda.LogicError, match="invalid argument"):
            call()
    for call in (lambda: cuda.memcpy_htod(np.int64(int(block)), data), lambda: cuda.memcpy_htod_async(block, data, 0)):
        with pytest.raises(TypeError):
            call()
    back.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        cuda.memcpy_dtoh(back, block)
    fresh = np.empty(12, np.float32)
    cuda.memcpy_dtoh(fresh, cuda.mem_alloc(48))
    assert np.isnan(fresh).all()  # memory is not zero when it is new
    block.free()
    with pytest.raises(cuda.LogicError, match="invalid resource handle"):
        block.free()
    with pytest.raises(cuda.LogicError, match="no live device allocation"):
        cuda.memcpy_htod(block, data)


def test_pinned_and_managed_memory(nano):
    cuda = nano.cuda
    plain = cuda.pagelocked_empty((2, 3), np.float32)
    with pytest.raises(cuda.LogicError, match="cuMemHostGetDevicePointer"):
        plain.base.get_device_pointer()
    mapped = cuda.pagelocked_empty((2, 3), np.uint8, mem_flags=cuda.host_alloc_flags.DEVICEMAP)
    mapped[...] = 7
    back = np.empty(6, np.uint8)
    cuda.memcpy_dtoh(back, mapped.base.get_device_pointer())
    assert (back == 7).all() and mapped.shape == (2, 3)
    managed = cuda.managed_empty(5, np.float32, mem_flags=cuda.mem_attach_flags.GLOBAL)
    cuda.memcpy_htod(managed.base.get_device_pointer(), np.arange(5, dtype=np.float32))
    assert managed.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(cuda.LogicError):
        cuda.managed_empty(5, np.float32)


def test_events(nano):
    cuda = nano.cuda
    stream, start_, end = cuda.Stream(), cuda.Event(), cuda.Event()
    with pytest.raises(cuda.LogicError):
        end.time_since(start_)
    assert start_.record(stream) is start_
    end.record(stream)
    with pytest.raises(cuda.RuntimeError, match="not ready"):
        end.time_since(start_)
    assert end.synchronize() is end and end.time_since(start_) >= 0 and stream.is_done()


# kernels

ADD = """#include <cuda_fp16.h>
extern "C" __global__ void __launch_bounds__(256)
add(const float* __restrict__ a, const float *b, float* c, float scale, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = scale * a[i] + b[i];
}
extern "C" __global__ void halve(const float* a, __half* b, float* c, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) { b[i] = __float2half(a[i]); c[i] = __half2float(b[i]); }
}
__global__ void hidden(float* a) { a[0] = 1; }
"""


@pytest.fixture
def compiler():
    if not shutil.which("g++"):
        pytest.skip("g++ is missing; it compiles CUDA kernels for the CPU")


def test_vector_add(nano, compiler):
    cuda, n = nano.cuda, 1000
    module = cuda.module_from_buffer(kernels.wrap(ADD))
    add = module.get_function("add")
    a, b = np.random.RandomState(2).rand(2, n).astype(np.float32)
    blocks = [cuda.mem_alloc(4 * n) for _ in range(3)]
    cuda.memcpy_htod(blocks[0], a)
    cuda.memcpy_htod(blocks[1], b)
    add(blocks[0], blocks[1], blocks[2], np.float32(2), np.int32(n), block=(256, 1, 1), grid=(4, 1))
    c = np.empty(n, np.float32)
    cuda.memcpy_dtoh(c, blocks[2])
    assert np.array_equal(c, 2 * a + b)
    stream = cuda.Stream()
    assert add.prepare("PPPfi") is add
    add.prepared_async_call((4, 1), (256, 1, 1), stream, blocks[0], blocks[1], int(blocks[2]), 3.0, n)
    stream.synchronize()
    cuda.memcpy_dtoh(c, blocks[2])
    assert np.array_equal(c, np.float32(3) * a + b)
    good = blocks + [np.float32(2), np.int32(n)]
    for change, error in ((dict(block=(1025, 1, 1)), cuda.LogicError), (dict(grid=(0, 1)), cuda.LogicError),
                          (dict(block=(256,)), TypeError), (dict(threads=3), ValueError)):
        with pytest.raises(error):
            add(*good, **dict(dict(block=(256, 1, 1), grid=(4, 1)), **change))
    for args in (good[:4] + [n], good[:3] + [2.0, np.int32(n)], good[:4] + [a]):
        with pytest.raises((TypeError, cuda.LogicError)):
            add(*args, block=(256, 1, 1))
    for args in (good[:4], good[:3] + [np.float64(2), np.int32(n)], good[:2] + [np.intp(a.ctypes.data)] + good[3:]):
        with pytest.raises(cuda.LogicError):
            add(*args, block=(256, 1, 1))
    add(*(blocks + [np.float32(2), np.int32(n + 8)]), block=(256, 1, 1), grid=(4, 1))
    with pytest.raises(cuda.LogicError, match="illegal memory access"):
        cuda.Context.synchronize()
    for block in nano.board.blocks.values():  # healed, for the teardown
        for guard in block._guards:
            guard[:] = 0xA5


def test_kernel_modules(nano, compiler, tmp_path):
    cuda = nano.cuda
    (tmp_path / "k.cubin").write_bytes(kernels.wrap(ADD))
    module = cuda.module_from_file(str(tmp_path / "k.cubin"))
    for name in ("hidden", "absent"):  # without extern "C" a name is mangled
        with pytest.raises(cuda.LogicError, match="named symbol not found"):
            module.get_function(name)
    with pytest.raises(cuda.RuntimeError, match="device kernel image is invalid"):
        cuda.module_from_buffer(ADD.encode())
    with pytest.raises(kernels.CompileError, match="__syncthreads"):
        kernels.compile_on_cpu('extern "C" __global__ void k(int* a) { __syncthreads(); }')


def test_half_is_numpys(nano, compiler):
    rng = np.random.RandomState(3)
    values = np.array([0, -0.0, 1, -1.5, 65504, 65519, 65520, 1e9, 6e-5, 6e-8, 2.9e-8, 3.1e-8, 1e-9, 1.0004883, 1.0014648,
                       np.inf, -np.inf, np.nan] + list(rng.randn(2000) * 10 ** rng.uniform(-9, 5, 2000)), np.float32)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    a, b, c = values, np.empty(len(values), np.uint16), np.empty(len(values), np.float32)
    library = kernels.compile_on_cpu(ADD)
    pointers = [np.uintp(array.ctypes.data) for array in (a, b, c)]
    kernels.launch(library, "halve", (1, 1, 1), (7, 1, 1), pointers + [np.int32(len(a))])
    assert np.array_equal(c[:-1][~np.isnan(c[:-1])], halves.astype(np.float32)[:-1][~np.isnan(halves[:-1])])
    assert np.isnan(c[17]) and np.array_equal(np.delete(b, 17), np.delete(halves.view(np.uint16), 17))


# a child process

CHILD = """
import sys, pycuda.driver as cuda, tensorrt as trt
logger = trt.Logger()
builder = trt.Builder(logger)
network = builder.create_network(1)
assert trt.OnnxParser(network, logger).parse(open(sys.argv[1], "rb").read())
config = builder.create_builder_config()
if hasattr(config, "set_memory_pool_limit"):
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(sys.argv[2]) << 20)
else:
    config.max_workspace_size = int(sys.argv[2]) << 20
plan = builder.build_serialized_network(network, config)
if plan is None:
    sys.exit(9)
open(sys.argv[3], "wb").write(plan)
cuda.init()
print(trt.__version__, cuda.Device(0).name())
"""


@pytest.mark.parametrize("generation", GENERATIONS)
def test_in_a_child_process(generation, tmp_path):
    make_tensorrt(generation, ORIN)  # skips here, not in the child, when the listings are absent
    (tmp_path / "net.onnx").write_bytes(model())

    def child(workspace, **options):
        words = [sys.executable, "-c", CHILD, str(tmp_path / "net.onnx"), str(workspace), str(tmp_path / "plan")]
        return subprocess.run(words, env=child_env(generation, **options), cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)

    done = child(256, kill_mib=1000)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == (RELEASES[generation][1] + " " + default_gpu(generation).name).split()
    assert child(512, kill_mib=1000).returncode == -9  # as the kernel does it: no word
    done = child(64, fail_build="no tactic", gpu="card")
    assert done.returncode == 9 and b"[TRT] [E] no tactic" in done.stderr
    assert b"OutOfMemory" in child(64, out_of_memory=1).stderr


def test_profiler_hears_of_every_layer(orin):
    class Times(orin.trt.IProfiler):
        def __init__(self):
            orin.trt.IProfiler.__init__(self)
            self.seen = []

        def report_layer_time(self, layer_name, ms):
            self.seen.append(layer_name)

    runtime, engine = engine_of(orin)
    context = engine.create_execution_context()
    context.profiler = times = Times()
    x, y = orin.cuda.mem_alloc(4 * 144), orin.cuda.mem_alloc(4 * 96)
    start_ = time.time()
    assert context.execute_v2([int(x), int(y)]) and times.seen == ["conv", "relu"] and time.time() - start_ < 60
    del context, engine, runtime
