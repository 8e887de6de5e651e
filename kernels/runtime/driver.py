"""Loads compiled kernels and launches them through the CUDA driver."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvfold.codegen import Arguments, Variant
from kvfold.runtime import cubin_cache, internals
from kvfold.runtime.arguments import dimensions_of

if torch.backends.cuda.is_built():
    # cupy's driver bindings import all of cupy at their first call. Do that now, and not while the
    # first kernel is waited for.
    with contextlib.suppress(ImportError):
        import cupy  # noqa: F401

DEFAULT_SHARED_BYTES = 48 << 10  # that a kernel may have without asking
MAX_PARAM_BYTES = 4096


@dataclass(frozen=True)
class GridPlan:
    """What `plan` of an op's cuda_kernel.py works out for a call.

    Attributes:
        ctas: CTAs of the grid.
        values: the members of the parameter struct that are no dimension and no scalar argument.
    """

    ctas: int
    values: Mapping[str, int | float]

    def with_values(self, **values: int | float) -> GridPlan:
        """The plan with further values."""
        return replace(self, values={**self.values, **values})


# ---- a launch, packed ----------------------------------------------------------------------------

# CUlaunchConfig: grid, block, shared bytes, then stream, attributes, their count. The parameters
# follow at once, pointers first, so that all that changes from call to call is in one piece.
_GRID = struct.Struct("7Ixxxx")
_CHANGES = "QQIxxxx{}Q"
_CHANGES_AT = _GRID.size
_CONFIG_BYTES = _CHANGES_AT + struct.calcsize(_CHANGES.format(0))

# CUlaunchAttribute: programmatic stream serialization. The kernel may begin while the kernel before
# it on the stream still runs. kvfold's kernels wait for its end (device/stream_order.cuh).
_OVERLAPPED = ctypes.create_string_buffer(struct.pack("IIi60x", 6, 0, 1))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class _LaunchBuffer(threading.local):
    """A thread's own buffer: CUlaunchConfig, then the parameters. The driver copies both."""

    parts: tuple[memoryview, ctypes.c_void_p, ctypes.Array] | None = None

    def make(self, context: int) -> tuple[memoryview, ctypes.c_void_p, ctypes.Array]:
        """Makes the buffer, and the context current if torch has not yet made one current."""
        from cupy_backends.cuda.api import driver  # pyright: ignore[reportAttributeAccessIssue]

        if not driver.ctxGetCurrent():
            driver.ctxSetCurrent(context)
        packed = ctypes.create_string_buffer(_CONFIG_BYTES + MAX_PARAM_BYTES)
        address = ctypes.addressof(packed)
        pointers = (ctypes.c_void_p * 1)(address + _CONFIG_BYTES)
        self.parts = memoryview(packed).cast("B"), ctypes.c_void_p(address), pointers
        return self.parts


_buffer = _LaunchBuffer()


class PackedLaunch:
    """A kernel's launch for calls of one layout: only the stream and the pointers are filled in."""

    def __init__(self, kernel: Kernel, arguments: Arguments) -> None:
        variant, spec = kernel.variant, kernel.variant.spec
        dimensions = dimensions_of(spec, arguments)
        plan: GridPlan = kernel.module.plan(variant, kernel.ctas_at_once, arguments, dimensions)
        scalars = {
            one.name: one.as_int(getattr(arguments, one.name))
            for one in spec.arguments.declared_scalars()
        }
        tensors = arguments.tensors()
        strides: list[int] = []
        for one, tensor in zip(arguments.declared_tensors(), tensors, strict=True):
            count = len(one.strides)
            strides += [0] * count if tensor is None else tensor.stride()[:count]
        changes = struct.Struct(_CHANGES.format(len(tensors)))
        grid = _GRID.pack(
            plan.ctas, 1, 1, variant.launch.threads, 1, 1, variant.launch.shared_bytes
        )
        params = spec.param_struct.pack(strides, {**scalars, **dimensions, **plan.values})
        self._kernel = kernel
        self._device = tensors[0].get_device()
        self._has_work = plan.ctas > 0
        self._packed = grid + bytes(changes.size) + params
        self._complete = changes.pack_into

    def __call__(self, pointers: Sequence[int]) -> None:
        """Launches on torch's current stream of the tensors' device, which must be current.

        Args:
            pointers: addresses of the op's tensors, in its order; 0 for one that is absent.
        """
        if not self._has_work:
            return  # CUDA refuses a grid without CTAs
        kernel = self._kernel
        buffer, config, params = _buffer.parts or _buffer.make(kernel.context)
        buffer[: len(self._packed)] = self._packed
        stream = internals.raw_stream(self._device)
        self._complete(buffer, _CHANGES_AT, stream, *kernel.attributes, *pointers)
        status = kernel.cu_launch(config, kernel.function, params, None)
        if status:
            raise RuntimeError(f"{kernel.variant.symbol} was not launched: CUDA error {status}")


# ---- kernels -------------------------------------------------------------------------------------


class Kernel:
    """A variant loaded on one device."""

    def __init__(self, variant: Variant, cubin: bytes, symbol: str | None = None) -> None:
        """Loads on torch's current device.

        Args:
            symbol: the kernel's name in the cubin, if it is not the variant's.
        """
        from cupy_backends.cuda.api import (
            driver,  # pyright: ignore[reportAttributeAccessIssue]
            runtime,  # pyright: ignore[reportAttributeAccessIssue]
        )

        if not driver.ctxGetCurrent():
            runtime.setDevice(torch.cuda.current_device())
        self.variant = variant
        self.module = importlib.import_module(f"kvfold.ops.{variant.op}.cuda_kernel")
        overlaps = torch.cuda.get_device_capability() >= (9, 0)
        self.attributes = (ctypes.addressof(_OVERLAPPED), int(overlaps))
        self.context = driver.ctxGetCurrent()
        self._loaded = driver.moduleLoadData(cubin)
        function = driver.moduleGetFunction(self._loaded, symbol or variant.symbol)
        self.function = ctypes.c_void_p(function)
        self.cu_launch: Callable[..., int] = _driver().cuLaunchKernelEx
        if variant.launch.shared_bytes > DEFAULT_SHARED_BYTES:
            driver.funcSetAttribute(
                function,
                driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                variant.launch.shared_bytes,
            )
        self.ctas_at_once = _ctas_at_once(variant, self.function)

    def pack(self, arguments: Arguments) -> PackedLaunch:
        """The launch for calls whose tensors are laid out as these."""
        return PackedLaunch(self, arguments)

    def __call__(self, arguments: Arguments) -> None:
        """Launches on the arguments, which have been checked."""
        self.pack(arguments)([x.data_ptr() if x is not None else 0 for x in arguments.tensors()])


def _ctas_at_once(variant: Variant, function: ctypes.c_void_p) -> int:
    """CTAs of a kernel that torch's current device runs at once: as many as the variant asks for.

    Those of a cluster lie on SMs beside each other, so that some SMs may stay without one.
    """
    launch = variant.launch
    sms = torch.cuda.get_device_properties().multi_processor_count
    wanted = sms * launch.min_ctas
    if launch.cluster == 1:
        return wanted
    grid = _GRID.pack(launch.cluster, 1, 1, launch.threads, 1, 1, launch.shared_bytes)
    config = ctypes.create_string_buffer(grid, _CONFIG_BYTES)
    clusters = ctypes.c_int()
    status = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(clusters), function, config)
    if status:
        raise RuntimeError(f"{variant.symbol} has no occupancy: CUDA error {status}")
    return min(wanted, clusters.value * launch.cluster)


_kernels: dict[tuple[Variant, int], Kernel] = {}
_loading = threading.Lock()


def load(variant: Variant, device: torch.device) -> Kernel:
    """The variant's kernel on a CUDA device; compiled or read from the cache at first use.

    Safe inside stream capture and from several threads.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _loading:
        kernel = _kernels.get((variant, index))
        if kernel is None:
            major, minor = torch.cuda.get_device_capability(index)
            code = cubin_cache.compiled(variant, f"sm_{major}{minor}")
            with torch.cuda.device(index):
                kernel = _kernels[variant, index] = Kernel(variant, code.cubin)
    return kernel
