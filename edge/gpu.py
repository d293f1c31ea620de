"""The GPU of this process through pycuda: one context, one stream, and buffers that host and device see.

The device's primary context is used, so that TensorRT, torch and pycuda meet in the same one. Everything here belongs to
the thread that made it; CUDA answers another thread with 'invalid device context'."""
import threading

import numpy as np

from edge.errors import EdgeError
from edge.optional import need

KINDS = ("device", "mapped", "managed")

# (driver, thread) -> [context, how many Gpus use it]: contexts are a stack, and the older of two models may be closed first
_shared = {}


class Gpu:
    """name: as the driver says it; capability: '5.3'; integrated: whether it shares the host's memory."""

    def __init__(self):
        self.driver = need("pycuda.driver")
        self.driver.init()
        device, attribute = self.driver.Device(0), self.driver.device_attribute
        self.name, self.capability = device.name(), "%d.%d" % device.compute_capability()
        self.integrated = bool(device.get_attribute(attribute.INTEGRATED))
        self._thread = threading.get_ident()
        self._key = self.driver, self._thread
        if self._key not in _shared:
            _shared[self._key] = [device.retain_primary_context(), 0]
            _shared[self._key][0].push()
        _shared[self._key][1] += 1
        self.stream = self.driver.Stream()
        self._held = []

    def demand_own_thread(self):
        """Raise EdgeError in another thread than the one that made this."""
        if threading.get_ident() != self._thread:
            raise EdgeError("the GPU is used from a second thread; hand arrays to the thread that opened the model")

    def buffer(self, shape, dtype, kind="device"):
        """Room for one array, as a Buffer that lives until close() or free()."""
        self._held.append(Buffer(self, shape, dtype, kind))
        return self._held[-1]

    def room(self, nbytes):
        """Memory of the device alone, until close() or free(). int() of it is its address."""
        self._held.append(self.driver.mem_alloc(int(nbytes)))
        return self._held[-1]

    def free(self, held):
        """Give back a buffer or a room before close()."""
        self.stream.synchronize()
        self._held.remove(held)
        held.free()

    def close(self):
        """Give everything back, in the order that the driver demands: buffers, stream, context."""
        for held in self._held:
            held.free()
        self._held, self.stream = [], None
        if self._key is not None:
            _shared[self._key][1] -= 1
            if not _shared[self._key][1]:
                self.driver.Context.pop()
                _shared.pop(self._key)[0].detach()
            self._key = None


class Buffer:
    """One array on host and device. host: numpy array; address: int, on the device.

    kind 'device': two copies, page-locked on the host; 'mapped': the device reads the host's own pages; 'managed': pages
    that move. On a Jetson all three are the same DRAM, and which is fastest depends on the board (CUDA for Tegra)."""

    def __init__(self, gpu, shape, dtype, kind):
        driver, self._gpu, self._device = gpu.driver, gpu, None
        if kind == "managed":
            self.host = driver.managed_empty(shape, dtype, mem_flags=driver.mem_attach_flags.GLOBAL)
        else:
            flags = driver.host_alloc_flags.DEVICEMAP if kind == "mapped" else 0
            self.host = driver.pagelocked_empty(shape, dtype, mem_flags=flags)
        if kind == "device":
            self._device = driver.mem_alloc(self.host.nbytes)
        self.address = int(self._device or self.host.base.get_device_pointer())

    def put(self, array):
        """Write an array of the same shape, and send it."""
        if array.shape != self.host.shape:
            raise EdgeError("a buffer of shape %s was given %s" % (self.host.shape, array.shape))
        self._send(self.host, array)

    def put_first(self, array):
        """Write an array over the first bytes of a flat uint8 buffer, and send those."""
        self._send(self.host[:array.nbytes], np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def _send(self, part, array):
        self._gpu.stream.synchronize()  # earlier work may still read what is overwritten here
        np.copyto(part, array, casting="same_kind")
        if self._device is not None:
            self._gpu.driver.memcpy_htod_async(self._device, part, self._gpu.stream)

    def get(self):
        """Fetch, wait for all work, and return a copy of the array."""
        return self._fetch(self.host)

    def get_first(self, shape, dtype=np.uint8):
        """As get(): the array of that shape and dtype in the first bytes of a flat uint8 buffer."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._fetch(self.host[:size]).view(dtype).reshape(shape)

    def _fetch(self, part):
        if self._device is not None:
            self._gpu.driver.memcpy_dtoh_async(part, self._device, self._gpu.stream)
        self._gpu.stream.synchronize()
        return np.array(part)

    def __len__(self):
        return len(self.host)

    def __getitem__(self, index):
        if index >= len(self.host):
            raise IndexError(index)
        return Part(self, index)

    def __array__(self, dtype=None, copy=None):
        return self.get()

    def free(self):
        if self._device is not None:
            self._device.free()
        self._device = self.host = None


class Part:
    """One item of a Buffer's first axis, still on the device."""

    def __init__(self, buffer, index):
        self._buffer, self._index = buffer, index
        self.shape = buffer.host.shape[1:]
        self.address = buffer.address + index * buffer.host.strides[0]

    def __array__(self, dtype=None, copy=None):
        return self._buffer.get()[self._index]


class Rooms:
    """Memory by name, the same for each name while it is large enough: frames of a camera then allocate once."""

    def __init__(self, gpu, kind):
        self.gpu, self.kind, self._buffers, self._rooms = gpu, kind, {}, {}

    def sent(self, name, array):
        """The address of an array on the device."""
        buffer = self.buffer(name, array.nbytes)
        buffer.put_first(array)
        return buffer.address

    def buffer(self, name, nbytes):
        """At least nbytes that both sides see, as a flat uint8 Buffer."""
        if name not in self._buffers or len(self._buffers[name]) < nbytes:
            if name in self._buffers:
                self.gpu.free(self._buffers.pop(name))
            self._buffers[name] = self.gpu.buffer((nbytes,), np.uint8, self.kind)
        return self._buffers[name]

    def room(self, name, nbytes):
        """At least nbytes of the device alone. Returns the address."""
        if name not in self._rooms or self._rooms[name][1] < nbytes:
            if name in self._rooms:
                self.gpu.free(self._rooms.pop(name)[0])
            self._rooms[name] = self.gpu.room(nbytes), nbytes
        return int(self._rooms[name][0])
