"""Where training computes, and whose memory that takes: a Jetson's GPU shares the board's, a desktop card has its own."""
import errno

import torch

from edge.errors import UsageError
from jetson import board
from jetson.memory import in_use_mib, limit_mib, peak_rss_mib, reset_peak

MIB = 2.0 ** 20
# of a process that has used torch with cuDNN on a Jetson, beside torch's host part: JetPack 4's logs, never measured by us
JETSON_CUDA_MIB = 1000.0
OUT_OF_MEMORY = ("out of memory", "memoryerror", "unable to allocate", "can't allocate memory", "cannot allocate memory",
                 "cudnn_status_alloc_failed", "cublas_status_alloc_failed", "nvmapmem", "defaultcpuallocator", "bad_alloc",
                # what cuDNN and cuBLAS say when there is no room for their workspace
                "valid cudnn algorithm", "cudnn_status_not_initialized", "cublas_status_not_initialized")


def pick(config):
    """The torch.device that --device asks for. Raises UsageError."""
    cuda = torch.cuda.is_available() and config.device != "cpu"
    if config.device == "cuda" and not cuda:
        raise UsageError("--device cuda: this torch (%s) sees no CUDA device. Use --device cpu, or install NVIDIA's wheel"
                         % torch.__version__)
    if config.half and not cuda:
        raise UsageError("--half needs a CUDA device; on a CPU, half precision is slower and saves nothing. Leave it out")
    return torch.device("cuda" if cuda else "cpu")


def out_of_memory(exc):
    """Whether an exception says that memory ran out, of either kind."""
    return isinstance(exc, MemoryError) or isinstance(exc, OSError) and exc.errno == errno.ENOMEM or isinstance(
        exc, RuntimeError) and any(words in str(exc).lower() for words in OUT_OF_MEMORY)


def own_memory(device):
    """Whether `device` has memory apart from the machine's."""
    return device.type == "cuda" and not board.is_jetson()


def memory_mib(device):
    """(all, in use) MiB of the memory that training on `device` takes from; None where the system does not say. On a
    desktop card our own CUDA context counts as in use, and so does what torch has pooled."""
    if not own_memory(device):
        return limit_mib(), in_use_mib()
    if not hasattr(torch.cuda, "mem_get_info"):  # before torch 1.11
        return torch.cuda.get_device_properties(device).total_memory / MIB, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return total / MIB, (total - free) / MIB


def hold(device, mib):
    """Let torch take no more than `mib` of a desktop card, so that it runs out of memory rather than exceed a budget."""
    if own_memory(device) and mib != float("inf"):
        total = torch.cuda.get_device_properties(device).total_memory / MIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, mib / total), device)


class Peak:
    """The highest point of our memory on `device` from now on. others_mib: what was in use before we came."""

    def __init__(self, device, others_mib):
        self.device, self.others_mib = device, others_mib
        self.known = own_memory(device) or reset_peak()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)

    def mib(self):
        """MiB; of torch's pool alone where the device has its own memory. None where the kernel does not let us measure."""
        if not self.known:
            return None
        if self.device.type != "cuda":
            return peak_rss_mib(since_reset=True)
        highest, now = (count(self.device) / MIB for count in (torch.cuda.max_memory_reserved, torch.cuda.memory_reserved))
        if own_memory(self.device):
            return highest
        # what a Jetson's GPU holds is in no process's resident set: the pool, cuDNN's code, the context
        return peak_rss_mib(since_reset=True) + max(0.0, in_use_mib() - self.others_mib) + highest - now
