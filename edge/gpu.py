"""The GPU of this process through pycuda: one context, one stream, and buffers that host and device see.

The device's primary context is used, so that TensorRT, torch and pycuda meet in the same one. Everything here belongs to
the thread that made it; CUDA answers another thread with 'invalid device context'."""
import threading

import numpy as np

from edge.errors import EdgeError
from edge.optional import need

KINDS = ("device", "mapped", "managed")


class Gpu:
    """name: as the driver says it; capability: '5.3'; integrated: whether it shares the host's memory."""

    def __init__(self):
        self.driver = need("pycuda.driver")
        self.driver.init()
        device, attribute = self.driver.Device(0), self.driver.device_attribute
        self.name, self.capability = device.name(), "%d.%d" % device.compute_capability()
        self.integrated = bool(device.get_attribute(attribute.INTEGRATED))
        self._context = device.retain_primary_context()
        self._context.push()
        self._thread = threading.get_ident()
        self.stream = self.driver.Stream()
        self._buffers = []

    def demand_own_thread(self):
        """Raise EdgeError in another thread than the one that made this."""
        if threading.get_ident() != self._thread:
            raise EdgeError("the GPU is used from a second thread; hand arrays to the thread that opened the model")

    def buffer(self, shape, dtype, kind="device"):
        """Room for one array, as a Buffer that lives until close() or Buffer.free()."""
        self._buffers.append(Buffer(self, shape, dtype, kind))
        return self._buffers[-1]

    def close(self):
        """Give everything back, in the order that the driver demands: buffers, stream, context."""
        for buffer in self._buffers:
            buffer.free()
        self._buffers, self.stream = [], None
        if self._context is not None:
            self.driver.Context.pop()
            self._context.detach()
            self._context = None


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
        np.copyto(self.host, array, casting="same_kind")
        if self._device is not None:
            self._gpu.driver.memcpy_htod_async(self._device, self.host, self._gpu.stream)

    def get(self):
        """Fetch, wait for all work, and return a copy of the array."""
        if self._device is not None:
            self._gpu.driver.memcpy_dtoh_async(self.host, self._device, self._gpu.stream)
        self._gpu.stream.synchronize()
        return np.array(self.host)

    def free(self):
        if self._device is not None:
            self._device.free()
        self._device = self.host = None
