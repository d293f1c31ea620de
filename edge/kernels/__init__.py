"""CUDA sources and how they become functions: each `.cu` file is compiled once for this GPU and kept in the cache folder."""
import hashlib
import os
import shutil

from edge.command import cache_home, written
from edge.errors import MissingPart
from edge.optional import need

FOLDER = os.path.dirname(os.path.abspath(__file__))
NVCC = "/usr/local/cuda/bin/nvcc"  # where JetPack puts it, outside PATH
BLOCK = (32, 8, 1)  # threads


class Kernels:
    """The kernels of one `.cu` file, by name: kernels.launch('decode', (width, height), arguments...).

    gpu: an edge.gpu.Gpu; signatures: {kernel: letters of its parameters, P pointer, i int, f float}. Raises MissingPart when
    the file must be compiled and CUDA's compiler is not here."""

    def __init__(self, gpu, path, signatures):
        self._stream = gpu.stream
        with open(path, encoding="utf-8") as handle:
            source = handle.read()
        module = _load(gpu, source)
        self._functions = {}
        for name, letters in signatures.items():
            self._functions[name] = module.get_function(name)
            self._functions[name].prepare(letters)

    def launch(self, name, size, *arguments):
        """Start a kernel on size = (columns, rows) threads, after what is already on the stream."""
        grid = (-(-size[0] // BLOCK[0]), -(-size[1] // BLOCK[1]))
        self._functions[name].prepared_async_call(grid, BLOCK, self._stream, *arguments)


def _load(gpu, source):
    arch = "sm_" + gpu.capability.replace(".", "")
    kept = os.path.join(cache_home(), "kernels", "%s-%s.cubin" % (hashlib.sha256(source.encode()).hexdigest()[:32], arch))
    if os.path.isfile(kept):
        with open(kept, "rb") as handle:
            try:
                return gpu.driver.module_from_buffer(handle.read())
            except gpu.driver.Error:  # cut short, or of a driver that was taken back: made again
                pass
    made = _compiled(gpu, source, arch)
    try:
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        with written(kept, "wb") as handle:
            handle.write(made)
    except OSError:
        pass  # a read-only home: compiled again next time
    return gpu.driver.module_from_buffer(made)


def _compiled(gpu, source, arch):
    try:
        return need("pycuda.compiler").compile(source, nvcc=shutil.which("nvcc") or NVCC, no_extern_c=True, arch=arch)
    except (OSError, gpu.driver.Error) as exc:
        raise MissingPart("CUDA's compiler nvcc (%s)" % str(exc).strip().splitlines()[0],
                          "sudo apt install cuda-nvcc-10-2 (part of JetPack 4.6)") from exc
