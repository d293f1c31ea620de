"""CUDA sources on the CPU: g++ compiles them behind cuda_shim.h, a loop calls them thread by thread."""
import atexit
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile

from doubles import HERE

MAGIC = b"CUDA source for the double\n"
_BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
_KERNEL = re.compile(r"__global__\s+" + _BOUNDS + r"void\s+" + _BOUNDS + r"(\w+)\s*\(")
_libraries, _folder = {}, []


class NotSimulated(Exception):
    """Listed on the board's software, but the double has no behaviour for it."""


class CompileError(Exception):
    pass


def wrap(source_text):
    """What stands for a cubin in tests: bytes for module_from_buffer, or for a file."""
    return MAGIC + source_text.encode("utf-8")


def unwrap(image):
    return image[len(MAGIC):].decode("utf-8")


def _exported(source):
    """Names of the kernels that a driver finds: those with C linkage."""
    everywhere = re.search(r'extern\s+"C"\s*\{', source)
    return [match.group(1) for match in _KERNEL.finditer(source)
            if everywhere or re.search(r'extern\s+"C"\s*$', source[:match.start()])]


def compile_on_cpu(source_text):
    """Path of a shared library of the kernels in a .cu source. Skips the test without g++; CompileError with its words."""
    compiler = shutil.which("g++")
    if compiler is None:
        import pytest
        pytest.skip("g++ is missing; it compiles CUDA kernels for the CPU")
    if not _folder:
        _folder.append(tempfile.mkdtemp(prefix="kernels-"))
        atexit.register(shutil.rmtree, _folder[0], True)
    stem = os.path.join(_folder[0], hashlib.sha256(source_text.encode("utf-8")).hexdigest()[:16])
    if os.path.exists(stem + ".so"):
        return stem + ".so"
    text = re.sub(r"#\s*include\s*<cuda[\w.]*>", "", source_text)
    with open(stem + ".cpp", "w", encoding="utf-8") as handle:
        handle.write('#include "cuda_shim.h"\n#line 1 "kernel.cu"\n%s\n%s\n'
                     % (text, "\n".join("EXPORT_KERNEL(%s)" % name for name in _exported(text))))
    # -ffp-contract=off: the same sums as numpy's, whatever the processor offers
    words = "-std=c++14 -O1 -w -fPIC -shared -ffp-contract=off".split() + ["-I", HERE, stem + ".cpp", "-o", stem + ".so"]
    done = subprocess.run([compiler] + words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise CompileError(done.stdout.decode("utf-8", "replace"))
    return stem + ".so"


def _load(library):
    if library not in _libraries:
        _libraries[library] = ctypes.CDLL(library)
    return _libraries[library]


def parameters(library, name):
    """Codes of a kernel's parameters, as `code` gives them, 'P' for a pointer. KeyError when there is no such kernel."""
    try:
        describe = getattr(_load(library), "describe_" + name)
    except AttributeError:
        raise KeyError(name)
    describe.restype = ctypes.c_char_p
    return describe().decode().split()


def code(dtype):
    """'f4', 'i4', 'u1'... of a numpy dtype."""
    return "%s%d" % (dtype.kind, dtype.itemsize)


def launch(library, name, grid, block, args):
    """Run a kernel for every thread of every block.

    grid, block: three numbers each; args: numpy scalars of the parameters' types, pointers as uintp."""
    if len(args) != len(parameters(library, name)):
        raise TypeError("%s takes %d arguments, got %d" % (name, len(parameters(library, name)), len(args)))
    held = [ctypes.create_string_buffer(arg.tobytes(), arg.dtype.itemsize) for arg in args]
    pointers = (ctypes.c_void_p * max(1, len(held)))(*[ctypes.addressof(h) for h in held])
    sizes = (ctypes.c_uint * 6)(*(tuple(grid) + tuple(block)))
    getattr(_load(library), "launch_" + name)(sizes, pointers)
