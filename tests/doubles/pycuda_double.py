"""A stand-in for pycuda: device memory is numpy memory, streams are queues, kernels run on the CPU.

Stricter than a GPU where a GPU would go on with wrong results: work on a stream is done at the next
synchronisation only, fresh memory is full of NaN, and guard bytes tell who wrote past an end."""
import builtins
import itertools
import os
import sys
import threading
import time
import types
import weakref

import numpy as np

from doubles import kernels

NO_CONTEXT = "explicit_context_dependent failed: invalid device context - no currently active context?"
GUARD, ALIGN = 64, 256  # bytes; cuMemAlloc aligns to 256
MIB = 1 << 20
QUARANTINE = 256 * MIB  # freed memory kept aside, so that an address is not soon given out again


class Error(Exception):
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


class RuntimeError(Error):  # noqa: A001 - pycuda's own name
    pass


class MemoryError(Error, MemoryError):  # noqa: A001 - pycuda's own name
    pass


class CompileError(Error):
    def __init__(self, msg, command_line, stdout=None, stderr=None):
        self.msg, self.command_line, self.stdout, self.stderr = msg, command_line, stdout, stderr

    def __str__(self):
        return "%s\n[command: %s]\n[stderr:\n%s]" % (self.msg, " ".join(self.command_line), self.stderr)


class Block:
    """One live range of memory that the device sees: device, pinned or managed."""

    def __init__(self, nbytes, kind):
        self.nbytes, self.kind = nbytes, kind
        self._raw = np.full(nbytes + 2 * GUARD + ALIGN, 0xA5, np.uint8)
        start = GUARD + -(self._raw.ctypes.data + GUARD) % ALIGN
        self.address = self._raw.ctypes.data + start
        self.view = self._raw[start:start + nbytes]
        self._guards = self._raw[start - GUARD:start], self._raw[start + nbytes:start + nbytes + GUARD]
        self.view[:] = 0xFF  # NaN as float32 and as float16

    def intact(self):
        return all(guard.tobytes() == b"\xa5" * GUARD for guard in self._guards)


class Board:
    """State of one GPU as one process sees it. `pycuda.double` in the tests."""

    def __init__(self, gpu):
        self.gpu, self.ready = gpu, False
        self.blocks, self.quarantine = {}, []
        self.charged = 0            # bytes of TensorRT's own: weights, activations
        self.pending = []           # (stream handle, work) in the order of the calls
        self.streams = weakref.WeakValueDictionary()
        self.handles = itertools.count(0x5000, 16)
        self.retained = []          # contexts not yet detached
        self.stacks, self._local = [], threading.local()
        self.natives = weakref.WeakSet()  # living objects of TensorRT
        self.complaints = []

    # contexts

    def stack(self):
        if not hasattr(self._local, "stack"):
            self._local.stack = []
            self.stacks.append((threading.current_thread().name, self._local.stack))
        return self._local.stack

    def need_context(self, call=None):
        stack = self.stack()
        if not stack:
            raise LogicError("%s failed: invalid device context" % call if call else NO_CONTEXT)
        if not stack[-1].valid:
            raise LogicError("%s failed: context is destroyed" % (call or "cuCtxGetCurrent"))
        return stack[-1]

    # memory

    def used(self):
        shared = self.gpu.integrated  # there host and device take from one pool
        return self.charged + sum(b.nbytes for b in self.blocks.values() if shared or b.kind != "pinned")

    def allocate(self, nbytes, kind, call):
        nbytes = int(nbytes)
        if nbytes <= 0:
            raise LogicError("%s failed: invalid argument" % call)
        if self.used() + nbytes > self.gpu.memory_mib * MIB:
            raise MemoryError("%s failed: out of memory" % call)
        block = Block(nbytes, kind)
        self.blocks[block.address] = block
        return block

    def release(self, block):
        self.drain()  # cuMemFree waits for the device
        del self.blocks[block.address]
        self.quarantine.append(block)
        while sum(b.nbytes for b in self.quarantine) > QUARANTINE:
            self.quarantine.pop(0)
        self.check_guards([block])
        block.view[:] = 0xFF

    def check_guards(self, blocks=None):
        for block in list(self.blocks.values()) if blocks is None else blocks:
            if not block.intact():
                raise LogicError("an illegal memory access was encountered: written outside the %d bytes at 0x%x"
                                 % (block.nbytes, block.address))

    def span(self, pointer, nbytes, call, aligned=False):
        """The bytes [pointer, pointer + nbytes) as a numpy view, if they lie in one live block."""
        pointer = int(pointer)
        for block in self.blocks.values():
            if block.address <= pointer < block.address + block.nbytes:
                start = pointer - block.address
                if start + nbytes > block.nbytes:
                    raise LogicError("%s failed: invalid argument: %d bytes at 0x%x, the allocation has %d left"
                                     % (call, nbytes, pointer, block.nbytes - start))
                if aligned and start % ALIGN:
                    raise LogicError("%s failed: misaligned address 0x%x" % (call, pointer))
                return block.view[start:start + nbytes]
        raise LogicError("%s failed: invalid argument: 0x%x is no live device allocation" % (call, pointer))

    def pinned(self, array):
        address = array.ctypes.data
        return any(b.kind != "device" and b.address <= address < b.address + b.nbytes for b in self.blocks.values())

    # streams

    def enqueue(self, handle, work):
        if handle and handle not in self.streams:
            raise LogicError("cuLaunchKernel failed: invalid resource handle")
        self.pending.append((handle, work))

    def drain(self, handle=0):
        """Do the work of one stream and of the default one; 0: of all, since the default stream waits for all."""
        while True:
            mine = [entry for entry in self.pending if handle in (0, entry[0]) or not entry[0]]
            if not mine:
                return
            self.pending.remove(mine[0])
            mine[0][1]()

    # the end

    def check_teardown(self):
        """AssertionError naming what a program left behind, and what went wrong while it cleaned up."""
        left = list(self.complaints)
        left += ["PyCUDA ERROR: The context stack was not empty upon module cleanup: thread %s has %d" % (name, len(stack))
                 for name, stack in self.stacks if stack]
        left += ["%d contexts retained and never detached" % len(self.retained)] if self.retained else []
        left += ["%s of %d bytes never freed" % (b.kind, b.nbytes) for b in self.blocks.values()]
        left += ["%s still alive" % type(native).__name__ for native in self.natives]
        left += ["%d bytes of TensorRT's never given back" % self.charged] if self.charged else []
        left += ["%d calls queued on streams and never waited for" % len(self.pending)] if self.pending else []
        assert not left, "\n".join(left)


_board = None


def board():
    """The board of the pycuda that was made last; TensorRT's double works on it."""
    if _board is None:
        raise LogicError(NO_CONTEXT)
    return _board


def _flags(name, **values):
    return type(name, (), values)


host_alloc_flags = _flags("host_alloc_flags", PORTABLE=1, DEVICEMAP=2, WRITECOMBINED=4)
mem_attach_flags = _flags("mem_attach_flags", GLOBAL=1, HOST=2, SINGLE=4)
event_flags = _flags("event_flags", DEFAULT=0, BLOCKING_SYNC=1, DISABLE_TIMING=2)
device_attribute = _flags("device_attribute", INTEGRATED=18, CAN_MAP_HOST_MEMORY=19, MULTIPROCESSOR_COUNT=16,
                          CONCURRENT_KERNELS=31, UNIFIED_ADDRESSING=41, MANAGED_MEMORY=83, CONCURRENT_MANAGED_ACCESS=89)


def _pointer(value):
    """The address behind what pycuda takes as a device pointer; a numpy integer is none, as in Boost.Python."""
    if isinstance(value, (DeviceAllocation, ManagedAllocation)) or isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    raise TypeError("Python argument types did not match C++ signature: %s is no device pointer" % type(value).__name__)


def _host(value, writable=False):
    """Flat uint8 view of a contiguous host buffer."""
    array = value if isinstance(value, (np.ndarray, np.generic)) else np.frombuffer(value, np.uint8)
    array = np.asarray(array)
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ValueError("ndarray is not contiguous")
    if writable and not (array.flags.writeable and isinstance(value, (np.ndarray, bytearray, memoryview))):
        raise ValueError("buffer source array is read-only")
    return array.reshape(-1, order="A").view(np.uint8)


def _check_stream(stream):
    if not (stream is None or isinstance(stream, Stream)):
        raise TypeError("Python argument types did not match C++ signature: %s is no Stream" % type(stream).__name__)
    return stream.handle if stream is not None else 0


def _copy(call, target, source, host, stream=False):
    """target, source: functions that give the bytes; host: the array at the host's end, if there is one."""
    board().need_context(call)
    handle = 0 if stream is False else _check_stream(stream)

    def work():
        np.copyto(target(), source())

    target(), source()  # a wrong address is found now, not at the next synchronisation
    if stream is False or host is not None and not board().pinned(host):
        board().drain(handle)  # a copy from or to pageable memory waits, whatever it is called
        work()
    else:
        board().enqueue(handle, work)


def _htod(call, dest, src, stream=False):
    host, pointer = _host(src), _pointer(dest)
    _copy(call, lambda: board().span(pointer, host.nbytes, call), lambda: host, host, stream)


def _dtoh(call, dest, src, stream=False):
    host, pointer = _host(dest, writable=True), _pointer(src)
    _copy(call, lambda: host, lambda: board().span(pointer, host.nbytes, call), host, stream)


def _dtod(call, dest, src, size, stream=False):
    to, start = _pointer(dest), _pointer(src)
    _copy(call, lambda: board().span(to, size, call), lambda: board().span(start, size, call), None, stream)


def memcpy_htod(dest, src):
    _htod("cuMemcpyHtoD", dest, src)


def memcpy_htod_async(dest, src, stream=None):
    _htod("cuMemcpyHtoDAsync", dest, src, stream)


def memcpy_dtoh(dest, src):
    _dtoh("cuMemcpyDtoH", dest, src)


def memcpy_dtoh_async(dest, src, stream=None):
    _dtoh("cuMemcpyDtoHAsync", dest, src, stream)


def memcpy_dtod(dest, src, size):
    _dtod("cuMemcpyDtoD", dest, src, size)


def memcpy_dtod_async(dest, src, size, stream=None):
    _dtod("cuMemcpyDtoDAsync", dest, src, size, stream)


def memset_d8(dest, data, size):
    board().need_context("cuMemsetD8")
    board().drain()
    board().span(_pointer(dest), size, "cuMemsetD8")[:] = data


def memset_d8_async(dest, data, size, stream=None):
    board().need_context("cuMemsetD8Async")
    pointer, handle = _pointer(dest), _check_stream(stream)

    def work():
        board().span(pointer, size, "cuMemsetD8Async")[:] = data

    board().span(pointer, size, "cuMemsetD8Async")  # a wrong address is found now
    board().enqueue(handle, work)


def mem_get_info():
    """(free, total) bytes."""
    board().need_context("cuMemGetInfo")
    total = board().gpu.memory_mib * MIB
    return total - board().used(), total


def init(flags=0):
    board().ready = True


def get_version():
    return (10, 2, 0) if board().gpu.compute_capability < (7, 0) else (12, 6, 0)


def get_driver_version():
    major, minor, _ = get_version()
    return 1000 * major + 10 * minor


class Device:
    def __init__(self, number):
        if not board().ready:
            raise LogicError("cuDeviceGet failed: initialization error")
        if number:
            raise LogicError("cuDeviceGet failed: invalid device ordinal")
        self._gpu = board().gpu

    @staticmethod
    def count():
        if not board().ready:
            raise LogicError("cuDeviceGetCount failed: initialization error")
        return 1

    def name(self):
        return self._gpu.name

    def compute_capability(self):
        return self._gpu.compute_capability

    def total_memory(self):
        return self._gpu.memory_mib * MIB

    def get_attribute(self, attr):
        known = {device_attribute.INTEGRATED: int(self._gpu.integrated), device_attribute.CAN_MAP_HOST_MEMORY: 1,
                 device_attribute.MULTIPROCESSOR_COUNT: 1, device_attribute.CONCURRENT_KERNELS: 1,
                 device_attribute.UNIFIED_ADDRESSING: 1, device_attribute.MANAGED_MEMORY: 1,
                 device_attribute.CONCURRENT_MANAGED_ACCESS: int(not self._gpu.integrated)}
        return known[attr]

    def retain_primary_context(self):
        return Context(_key)


_key = object()  # a Context cannot be made by hand


class Context:
    def __init__(self, key=None):
        if key is not _key:
            raise builtins.RuntimeError("This class cannot be instantiated from Python")
        self.valid, self.thread, self._board = True, threading.get_ident(), board()
        self._board.retained.append(self)

    def push(self):
        if not self.valid:
            raise LogicError("cuCtxPushCurrent failed: context is destroyed")
        self.thread = threading.get_ident()
        self._board.stack().append(self)

    @staticmethod
    def pop():
        if not board().stack():
            raise LogicError("context::pop failed: invalid device context - cannot pop non-current context")
        board().stack().pop()

    def detach(self):
        """Release the primary context; a current one leaves the stack, as in pycuda."""
        if not self.valid:
            raise LogicError("context::detach failed: invalid device context - cannot detach from invalid context")
        stack = self._board.stack()
        if stack and stack[-1] is self:
            stack.pop()
        self.valid = False
        self._board.retained.remove(self)
        if not self._board.retained:
            self._board.complaints += ["context detached before %s was deleted" % type(native).__name__
                                       for native in self._board.natives]

    @staticmethod
    def get_current():
        stack = board().stack()
        return stack[-1] if stack else None

    @staticmethod
    def get_device():
        board().need_context("cuCtxGetDevice")
        return Device(0)

    @staticmethod
    def synchronize():
        board().need_context("cuCtxSynchronize")
        board().drain()


class _Owned:
    """Memory that belongs to the context in which it was made, freed by free() or with its last reference."""

    def _take(self, nbytes, kind, call):
        self._block = None
        self._board = board()
        self._context = self._board.need_context()
        self._block = self._board.allocate(nbytes, kind, call)
        self._address = self._block.address

    def free(self):
        if self._block is None:
            raise LogicError("%s::free failed: invalid resource handle" % type(self).__name__)
        if not self._context.valid:
            raise LogicError("%s::free failed: context is destroyed" % type(self).__name__)
        if self._context.thread != threading.get_ident():
            raise LogicError("scoped_context_activation failed: invalid device context - cannot activate out-of-thread "
                             "context")
        block, self._block = self._block, None
        self._board.release(block)

    def __del__(self):
        if getattr(self, "_block", None) is not None and not sys.is_finalizing():
            try:
                self.free()
            except Error as exc:
                self._board.complaints.append("PyCUDA WARNING: a clean-up operation failed (dead context maybe?) %s" % exc)
                self._board.blocks.pop(self._address, None)


class DeviceAllocation(_Owned):
    def __init__(self, nbytes):
        self._take(nbytes, "device", "cuMemAlloc")

    def __int__(self):
        return self._address

    def as_buffer(self, size, offset=0):
        raise kernels.NotSimulated("the double does not simulate DeviceAllocation.as_buffer")


class _HostOwned(_Owned):
    """Memory that numpy sees as well: the array's `base`."""

    def _array(self, shape, dtype, order, kind, call):
        dtype = np.dtype(dtype)
        self._take(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, kind, call)
        # numpy makes the object behind an __array_interface__ the base of the array, as pycuda does in C
        self.__array_interface__ = np.ndarray(shape, dtype, self._block.view, order=order).__array_interface__
        array = np.asarray(self)
        del self.__array_interface__
        return array

    def _alive(self, call):
        if self._block is None:
            raise LogicError("%s failed: invalid argument" % call)
        return self._address


class PagelockedHostAllocation(_HostOwned):
    _flags = 0

    def get_device_pointer(self):
        if not self._flags & host_alloc_flags.DEVICEMAP:
            raise LogicError("cuMemHostGetDevicePointer failed: invalid argument")
        return self._alive("cuMemHostGetDevicePointer")

    def get_flags(self):
        return self._flags


class ManagedAllocation(_HostOwned):
    def get_device_pointer(self):
        return self._alive("cuMemAllocManaged")

    def __int__(self):
        return self._address

    def attach(self, mem_flags, stream=None):
        _check_stream(stream)


def mem_alloc(bytes):  # noqa: A002 - pycuda's own name
    if isinstance(bytes, bool) or not isinstance(bytes, int):
        raise TypeError("Python argument types in mem_alloc(%s) did not match C++ signature: mem_alloc(unsigned long bytes)"
                        % type(bytes).__name__)
    return DeviceAllocation(bytes)


def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
    made = PagelockedHostAllocation()
    made._flags = mem_flags
    return made._array(shape, dtype, order, "pinned", "cuMemHostAlloc")


def pagelocked_zeros(shape, dtype, order="C", mem_flags=0):
    array = pagelocked_empty(shape, dtype, order, mem_flags)
    array.fill(0)
    return array


def managed_empty(shape, dtype, order="C", mem_flags=0):
    if mem_flags not in (mem_attach_flags.GLOBAL, mem_attach_flags.HOST):
        raise LogicError("cuMemAllocManaged failed: invalid argument")
    return ManagedAllocation()._array(shape, dtype, order, "managed", "cuMemAllocManaged")


def managed_zeros(shape, dtype, order="C", mem_flags=0):
    array = managed_empty(shape, dtype, order, mem_flags)
    array.fill(0)
    return array


class Stream:
    def __init__(self, flags=0):
        board().need_context()
        self._board = board()
        self._handle = next(self._board.handles)
        self._board.streams[self._handle] = self

    @property
    def handle(self):
        return self._handle

    def synchronize(self):
        self._board.need_context("cuStreamSynchronize")
        self._board.drain(self._handle)

    def is_done(self):
        return all(handle != self._handle for handle, _ in self._board.pending)

    def wait_for_event(self, event):
        self._board.enqueue(self._handle, lambda: self._board.drain(event._stream))

    def __del__(self):
        if hasattr(self, "_handle"):
            self._board.drain(self._handle)


class Event:
    def __init__(self, flags=0):
        board().need_context()
        self._board, self._stream, self._time, self._flags = board(), None, None, flags

    def _stamp(self):
        self._time = time.time()

    def record(self, stream=None):
        self._board.need_context("cuEventRecord")
        self._stream, self._time = _check_stream(stream), None
        self._board.enqueue(self._stream, self._stamp)
        return self

    def synchronize(self):
        self._board.need_context("cuEventSynchronize")
        if self._stream is not None:
            self._board.drain(self._stream)
        return self

    def query(self):
        return self._time is not None or self._stream is None

    def time_since(self, event):
        """Milliseconds."""
        if self._stream is None or event._stream is None or (self._flags | event._flags) & event_flags.DISABLE_TIMING:
            raise LogicError("cuEventElapsedTime failed: invalid resource handle")
        if self._time is None or event._time is None:
            raise RuntimeError("cuEventElapsedTime failed: device not ready")
        return 1e3 * (self._time - event._time)

    def time_till(self, event):
        return event.time_since(self)


def module_from_buffer(buffer, options=(), message_handler=None):
    """buffer: what kernels.wrap made of a source."""
    board().need_context("cuModuleLoadDataEx")
    if not bytes(buffer).startswith(kernels.MAGIC):
        raise RuntimeError("cuModuleLoadDataEx failed: device kernel image is invalid")
    return Module(kernels.unwrap(bytes(buffer)))


def module_from_file(filename):
    with open(filename, "rb") as handle:
        return module_from_buffer(handle.read())


class Module:
    def __init__(self, source):
        self._library = kernels.compile_on_cpu(source)

    def get_function(self, name):
        board().need_context("cuModuleGetFunction")
        try:
            kernels.parameters(self._library, name)
        except KeyError:
            raise LogicError("cuModuleGetFunction failed: named symbol not found")
        return Function(self._library, name)

    def get_global(self, name):
        raise kernels.NotSimulated("the double does not simulate Module.get_global")


class Function:
    def __init__(self, library, name):
        self._library, self._name, self._format = library, name, None

    def __call__(self, *args, **kwargs):
        grid, block = kwargs.pop("grid", (1, 1)), kwargs.pop("block", None)
        stream, shared = kwargs.pop("stream", None), kwargs.pop("shared", 0)
        if kwargs:
            raise ValueError("extra keyword arguments: %s" % ",".join(kwargs))
        if block is None:
            raise ValueError("must specify block size")
        values = []
        for index, arg in enumerate(args):
            if isinstance(arg, np.number):
                values.append(arg)
            elif isinstance(arg, DeviceAllocation):
                values.append(np.uintp(int(arg)))
            elif isinstance(arg, np.ndarray) and isinstance(arg.base, ManagedAllocation):
                values.append(np.uintp(int(arg.base)))
            else:
                raise TypeError("invalid type on parameter #%d (0-based)" % index)
        self._launch(grid, block, values, stream, shared)

    def prepare(self, arg_types, texrefs=None):
        self._format = [np.dtype({"P": np.uintp}.get(kind, kind)) if isinstance(kind, (str, np.dtype)) or
                        isinstance(kind, type) and issubclass(kind, np.number) else np.dtype(np.uintp) for kind in arg_types]
        return self

    def _prepared(self, args, kwargs):
        shared = kwargs.pop("shared_size", 0)
        if kwargs:
            raise TypeError("unknown keyword arguments: " + ", ".join(kwargs))
        if self._format is None:
            raise AttributeError("'Function' object has no attribute 'arg_format'")
        if len(args) != len(self._format):
            raise ValueError("pack requires exactly %d arguments" % len(self._format))
        return [kind.type(int(arg) if kind.kind in "iu" else arg) for kind, arg in zip(self._format, args)], shared

    def prepared_call(self, grid, block, *args, **kwargs):
        values, shared = self._prepared(args, kwargs)
        self._launch(grid, block, values, None, shared)

    def prepared_async_call(self, grid, block, stream, *args, **kwargs):
        values, shared = self._prepared(args, kwargs)
        self._launch(grid, block, values, stream, shared)

    def _launch(self, grid, block, values, stream, shared):
        board().need_context("cuLaunchKernel")
        if shared:
            raise kernels.NotSimulated("the double does not simulate shared memory")
        if not (isinstance(grid, tuple) and isinstance(block, tuple) and len(block) == 3):
            raise TypeError("grid is a tuple of one to three numbers and block one of three, got %r and %r" % (grid, block))
        grid += (1,) * (3 - len(grid))
        sizes = [int(n) for n in grid + block]
        limits = [2 ** 31 - 1, 65535, 65535, 1024, 1024, 64]
        if any(not 0 < n <= limit for n, limit in zip(sizes, limits)) or sizes[3] * sizes[4] * sizes[5] > 1024:
            raise LogicError("cuLaunchKernel failed: invalid argument: grid %r, block %r" % (grid, block))
        wanted = kernels.parameters(self._library, self._name)
        given = [kernels.code(value.dtype) for value in values]
        given = ["P" if w == "P" and g in ("i8", "u8") else g for w, g in itertools.zip_longest(wanted, given)]
        if wanted != given:
            raise LogicError("cuLaunchKernel failed: kernel %s takes %s, got %s" % (self._name, wanted, given))

        def check():
            for kind, value in zip(wanted, values):
                if kind == "P" and int(value):  # a null pointer is a value that a kernel may test for
                    board().span(int(value), 1, "cuLaunchKernel")

        def work():
            check()
            kernels.launch(self._library, self._name, tuple(sizes[:3]), tuple(sizes[3:]), values)
            board().check_guards()

        check()
        board().enqueue(_check_stream(stream), work)


# pycuda.compiler

NVCC_OPTIONS = {"-std=c++11", "-std=c++14", "-O2", "-O3", "-lineinfo"}  # those that change no result here


def compile(source, nvcc="nvcc", options=None, keep=False, no_extern_c=False, arch=None,  # noqa: A001 - pycuda's own name
            code=None, cache_dir=None, include_dirs=[], target="cubin"):
    """bytes for module_from_buffer, made for the board's own GPU. NANOPATCH_DOUBLE_NO_NVCC: as where nvcc is absent."""
    assert target in ["cubin", "ptx", "fatbin"]
    linked = source if no_extern_c else 'extern "C" {\n%s\n}\n' % source
    own = "sm_%d%d" % board().gpu.compute_capability
    arch = arch or (own if board().stack() else "of nvcc itself")  # pycuda asks the current context
    options = [] if options is None else options
    words = [nvcc, "--cubin"] + options + ["-arch", arch] + ["-I" + name for name in include_dirs + ["cuda"]] + ["kernel.cu"]
    if os.environ.get("NANOPATCH_DOUBLE_NO_NVCC"):  # pytools.prefork.ExecError is an OSError
        raise OSError("error invoking '%s --version': [Errno 2] No such file or directory: '%s'" % (nvcc, nvcc))
    unknown = [option for option in options if option not in NVCC_OPTIONS]
    if unknown or keep or code is not None or cache_dir or target != "cubin":
        raise kernels.NotSimulated("the double does not simulate nvcc's %s, keep, code, cache_dir and target" % unknown)

    def failed(text):
        return CompileError("nvcc compilation of /tmp/tmpdouble/kernel.cu failed", words, "", text)

    if arch != own:
        raise failed("nvcc fatal   : the double compiles for its own GPU only, %s, not %s" % (own, arch))
    if not no_extern_c and "#include" in source:  # the templates of a C++ header
        raise failed('error: this declaration may not have extern "C" linkage')
    try:
        kernels.compile_on_cpu(linked)
    except kernels.CompileError as exc:
        raise failed(str(exc))
    return kernels.wrap(linked)


_PUBLIC = """Error LogicError LaunchError RuntimeError MemoryError CompileError host_alloc_flags mem_attach_flags event_flags
device_attribute memcpy_htod memcpy_htod_async memcpy_dtoh memcpy_dtoh_async memcpy_dtod memcpy_dtod_async memset_d8
memset_d8_async mem_get_info init get_version get_driver_version Device Context DeviceAllocation PagelockedHostAllocation
ManagedAllocation mem_alloc pagelocked_empty pagelocked_zeros managed_empty managed_zeros Stream Event module_from_buffer
module_from_file Module Function""".split()


def make_pycuda(gpu):
    """A fresh package `pycuda`: `.driver`, `.compiler`, `.VERSION`, and for tests `.double`, the Board. No autoinit."""
    global _board
    _board = Board(gpu)
    pycuda, driver, compiler = [types.ModuleType("pycuda" + name) for name in ("", ".driver", ".compiler")]
    pycuda.__path__ = []  # a package, so that `import pycuda.autoinit` says ModuleNotFoundError
    for name in _PUBLIC:
        setattr(driver, name, globals()[name])
    compiler.compile = compile
    pycuda.driver, pycuda.compiler, pycuda.double = driver, compiler, _board
    pycuda.VERSION, pycuda.VERSION_STATUS, pycuda.VERSION_TEXT = (2022, 1), "", "2022.1"
    return pycuda
