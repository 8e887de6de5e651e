"""The limit: read bandwidth and copy bandwidth of the device, and the cost of a graph node."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from kvfold.bench.measure import timing
from kvfold.runtime import compiler, dispatch

# Enough to fill every SM of today's GPUs with 16-byte loads.
CTAS = 528
THREADS = 512
BUFFER_BYTES = 1 << 30  # far larger than the L2, and so long that the start does not count
BUFFERS = 2
NODES = 200  # empty kernels in a graph


@dataclass(frozen=True)
class Limit:
    """What a kernel is judged by. GB are 1e9 bytes; a copy counts bytes read plus written."""

    read_bandwidth_gbs: float
    copy_bandwidth_gbs: float
    empty_node_us: float

    def us(self, moved_bytes: int) -> float:
        """The least time of a kernel that moves so many bytes, in microseconds."""
        return moved_bytes / (1000 * self.read_bandwidth_gbs) + self.empty_node_us


class Kernels:
    """The kernels of limit.cu, loaded on torch's current device."""

    def __init__(self, device: torch.device):
        from cupy_backends.cuda.api import driver  # pyright: ignore[reportAttributeAccessIssue]

        source = Path(__file__).with_name("limit.cu").read_text()
        compiled = compiler.compile_source("limit", source, {}, dispatch.arch_of(device))
        # The tensor also binds the device's context, which the driver needs to load a module.
        self._sink = torch.zeros(1, dtype=torch.int32, device=device)
        self._module = driver.moduleLoadData(compiled.cubin)
        self._read = driver.moduleGetFunction(self._module, "read_words")
        self._empty = driver.moduleGetFunction(self._module, "empty")
        self._launch = driver.launchKernel

    def read(self, words: torch.Tensor) -> None:
        """Reads all of a contiguous tensor on torch's current stream."""
        values = (
            ctypes.c_void_p(words.data_ptr()),
            ctypes.c_longlong(words.nbytes // 16),
            ctypes.c_void_p(self._sink.data_ptr()),
        )
        pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
        stream = torch.cuda.current_stream().cuda_stream
        self._launch(
            self._read, CTAS, 1, 1, THREADS, 1, 1, 0, stream, ctypes.addressof(pointers), 0
        )

    def empty(self) -> None:
        """Does nothing, on torch's current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        self._launch(self._empty, 1, 1, 1, 32, 1, 1, 0, stream, 0, 0)


def measure(device: torch.device) -> Limit:
    """Measures the device, which must be torch's current one. Takes 2 GiB for the time.

    Raises:
        ValueError: there is no NVRTC to compile the kernels.
    """
    if (why := compiler.unavailable()) is not None:
        raise ValueError(f"the limit needs NVRTC ({why}); pip install 'kvfold[cuda]'")
    kernels = Kernels(device)
    # Random, because memory full of zeros can be faster.
    buffers = [
        torch.empty(BUFFER_BYTES // 4, dtype=torch.int32, device=device).random_()
        for _ in range(BUFFERS)
    ]
    read = timing.replay([lambda words=words: kernels.read(words) for words in buffers])
    quarters = [list(words.chunk(4)) for words in buffers]
    pairs = list(zip(*quarters, strict=True))
    copy = timing.replay([lambda a=a, b=b: b.copy_(a) for a, b in pairs])
    empty = timing.replay([kernels.empty] * NODES)
    return Limit(
        read_bandwidth_gbs=BUFFER_BYTES / (1000 * read.median_us),
        copy_bandwidth_gbs=2 * BUFFER_BYTES / 4 / (1000 * copy.median_us),
        empty_node_us=empty.median_us,
    )
