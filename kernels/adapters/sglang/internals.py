"""The parts of torch that are not public and that make a call cheap, each with a fallback.

A guard takes a third of the time that the shapes, strides and dtypes of two tensors take in Python,
and an allocation without the dispatcher takes less than half of the time of `new_empty`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.runtime import internals

try:  # what inductor's code allocates with, on torch's current device
    from torch._C._dynamo import guards

    _empty_on_cpu, _empty_on_gpu = guards._empty_strided_cpu, guards._empty_strided_cuda  # pyright: ignore
except (ImportError, AttributeError):
    _empty_on_cpu = _empty_on_gpu = None

if torch.backends.cuda.is_built():
    try:
        from torch._C import _cuda_isCurrentStreamCapturing as is_capturing
    except ImportError:
        is_capturing = torch.cuda.is_current_stream_capturing
else:

    def is_capturing() -> bool:
        """Whether the current stream is captured."""
        return False


def same_layouts(*tensors: Tensor) -> Callable[..., bool]:
    """A function that tells whether other tensors have the layouts and devices of these."""
    if internals.FOUND:
        guard = internals.make_guard(
            *tensors,
            dynamic_dims_sizes=[[*tensor.shape] for tensor in tensors],  # pyright: ignore
            dynamic_dims_strides=[[*tensor.stride()] for tensor in tensors],  # pyright: ignore
        )
        return guard.check
    expected = _layouts(tensors)
    return lambda *others: _layouts(others) == expected


def _layouts(tensors: tuple[Tensor, ...]) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]


def new_rows(device: int, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """An uninitialised tensor [rows, columns].

    Args:
        device: index of the GPU; -1 for the CPU.
    """
    if device < 0:
        empty = _empty_on_cpu
    else:
        empty = _empty_on_gpu if device == internals.current_device() else None
    if empty is None:
        return torch.empty((rows, columns), dtype=dtype, device="cpu" if device < 0 else device)
    return empty((rows, columns), (columns, 1), dtype)
