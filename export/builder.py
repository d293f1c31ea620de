"""The child that builds one TensorRT engine; torch is never in its process, and a crash or a kill by the kernel ends it alone.

    python -m export.builder JOB

JOB is a JSON object: onnx, plan, cache (paths), fp16 (bool), workspace_mib, lean (bool), float32 (layer names); without
'onnx' it only looks around. On stdout come lines of {"phase", "at"}, what TensorRT is at, and as the last one the answer:
{"tensorrt", "device", "compute_capability"} and, after a build, "failed": null or TensorRT's own words."""
import json
import os
import re
import sys

from edge.backends.trt import logger
from edge.command import guarded, written
from edge.gpu import Gpu
from edge.optional import need

LIBRARIES = ("CUBLAS", "CUBLAS_LT", "CUDNN")  # tactic sources that load hundreds of MB of code before the first layer


@guarded
def main(argv):
    job, trt, gpu = json.loads(argv[0]), need("tensorrt"), Gpu()
    try:
        answer = {"tensorrt": trt.__version__, "device": gpu.name, "compute_capability": gpu.capability,
                  "half_flag": hasattr(trt.BuilderFlag, "FP16")}
        if "onnx" in job:
            answer["failed"] = build(trt, job)
    finally:
        gpu.close()
    print(json.dumps(answer))
    return 0


def build(trt, job):
    """Build job['plan'] from job['onnx']. Returns None, or why it was not possible, in TensorRT's words."""
    monitored = hasattr(trt, "IProgressMonitor")
    log = logger(trt, (lambda message: None) if monitored else listener())
    tell("parsing")
    trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # a must before 10, gone in 11
    network = builder.create_network(1 << int(explicit) if explicit is not None else 0)
    parser = trt.OnnxParser(network, log)
    with open(job["onnx"], "rb") as handle:
        if not parser.parse(handle.read()):
            return "; ".join("%s (node %d)" % (error.desc(), error.node()) for error in map(
                parser.get_error, range(parser.num_errors))) or log.tail()
    config = builder.create_builder_config()
    _configure(trt, config, network, job)
    if os.path.isfile(job["cache"]):
        with open(job["cache"], "rb") as handle:
            cache = config.create_timing_cache(handle.read())
    else:
        cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    tell("optimising")
    if monitored:
        config.progress_monitor = monitor(trt)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return log.tail()
    with written(job["plan"], "wb") as handle:
        handle.write(plan)
    with written(job["cache"], "wb") as handle:
        handle.write(config.get_timing_cache().serialize())
    return None


def tell(phase, at=""):
    sys.stdout.write(json.dumps({"phase": phase, "at": at}) + "\n")
    sys.stdout.flush()


def listener():
    """A function of TensorRT's messages that tells which layer's kernels are timed: before 10 there is no other sign."""
    layers = {"timed": 0, "all": 0}

    def hear(message):
        fused = re.match(r"After [\w -]+: (\d+) layers", message)
        if fused:
            layers["all"] = int(fused.group(1))
        elif message.startswith("=============== Computing costs for"):
            layers["timed"] += 1
            tell("timing kernels", ", layer %d of %d" % (layers["timed"], max(layers.values())))
        elif message.startswith("Formats and tactics selection completed"):
            tell("making the engine")
    return hear


def monitor(trt):
    """An IProgressMonitor that tells the phases down to the net's layers; the ones below are of one layer each."""
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.phases = {}  # of those begun: depth and steps

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.phases[phase_name] = self.phases.get(parent_phase, (-1, 0))[0] + 1, num_steps
            self.step_complete(phase_name, -1)

        def step_complete(self, phase_name, step):
            depth, steps = self.phases.get(phase_name, (9, 0))
            if depth <= 3:
                tell(phase_name.lower(), ", step %d of %d" % (step + 1, steps))
            return True  # False would end the build

        def phase_finish(self, phase_name):
            self.phases.pop(phase_name, None)

    return Monitor()


def _configure(trt, config, network, job):
    size = job["workspace_mib"] << 20
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    else:  # 8.2
        config.max_workspace_size = size
    if job["fp16"] and hasattr(trt.BuilderFlag, "FP16"):  # 11 takes the types of the file
        config.set_flag(trt.BuilderFlag.FP16)
        for layer in (network.get_layer(index) for index in range(network.num_layers)) if job["float32"] else ():
            if layer.name in job["float32"]:
                config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
                layer.precision = trt.DataType.FLOAT
    heavy = [getattr(trt.TacticSource, name) for name in LIBRARIES if hasattr(trt.TacticSource, name)]
    if job["lean"] and heavy:
        config.set_tactic_sources(config.get_tactic_sources() & ~sum(1 << int(source) for source in heavy))


if __name__ == "__main__":
    sys.exit(main())
