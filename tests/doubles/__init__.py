"""Stand-ins for TensorRT, pycuda and a GPU, for tests on machines that have none.

In this process: `trt, pycuda = install(monkeypatch, "8.2")`; the code under test then imports them as usual.
In a child: `subprocess.run(..., env=child_env("8.2"))`; there `import tensorrt, pycuda.driver` finds them too.
"""
import os
import sys
from typing import NamedTuple, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
GENERATIONS = ("8.2", "8.5", "8.6", "10.3", "10.13", "11.4")


class Gpu(NamedTuple):
    name: str
    compute_capability: Tuple[int, int]
    memory_mib: int
    integrated: bool


NANO = Gpu("NVIDIA Tegra X1", (5, 3), 3964, True)
ORIN = Gpu("Orin", (8, 7), 7620, True)
CARD = Gpu("NVIDIA GeForce RTX 3060", (8, 6), 12288, False)
GPUS = {"nano": NANO, "orin": ORIN, "card": CARD}


def default_gpu(generation):
    return NANO if generation == "8.2" else ORIN


def api_folder():
    """Folder of the listed names of TensorRT's bindings: trt_api, beside the data sets."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
    data = os.environ.get("NANOPATCH_DATA", os.path.join(root, "shared", "data"))
    return os.path.join(os.path.dirname(os.path.abspath(data)), "trt_api")


def install(monkeypatch, generation, gpu=None):
    """Put fresh doubles into sys.modules until the test ends. Returns (tensorrt, pycuda)."""
    from doubles.pycuda_double import make_pycuda
    from doubles.tensorrt_double import make_tensorrt
    gpu = gpu or default_gpu(generation)
    trt, pycuda = make_tensorrt(generation, gpu), make_pycuda(gpu)
    for name, module in (("tensorrt", trt), ("pycuda", pycuda), ("pycuda.driver", pycuda.driver),
                         ("pycuda.compiler", pycuda.compiler)):
        monkeypatch.setitem(sys.modules, name, module)
    return trt, pycuda


def child_env(generation, gpu="", kill_mib=None, **knobs):
    """os.environ for a child process in which `import tensorrt` and `import pycuda.driver` find the doubles.

    gpu: a key of GPUS; kill_mib, knobs: as trt.double (fail_build="text", out_of_memory="1", needs_cudnn="1"), and
    no_nvcc="1": pycuda.compiler finds no nvcc."""
    path = [os.path.join(HERE, "site"), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in path if p), NANOPATCH_DOUBLE=generation)
    if gpu:
        env["NANOPATCH_DOUBLE_GPU"] = gpu
    if kill_mib is not None:
        env["NANOPATCH_DOUBLE_KILL_MIB"] = str(kill_mib)
    env.update({"NANOPATCH_DOUBLE_" + name.upper(): str(value) for name, value in knobs.items()})
    return env


def child_gpu():
    """(generation, Gpu) that child_env asked for; called by the modules in site/."""
    generation = os.environ["NANOPATCH_DOUBLE"]
    gpu = os.environ.get("NANOPATCH_DOUBLE_GPU")
    return generation, GPUS[gpu] if gpu else default_gpu(generation)
