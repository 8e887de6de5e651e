"""What the layers of one step share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvfold.runtime import internals


class _Shared(threading.local):
    """What the step that this thread is in has computed; None outside of a step."""

    made: dict[Hashable, Any] | None = None


_shared = _Shared()


@contextlib.contextmanager
def step() -> Iterator[None]:
    """Calls in the body share what they compute from metadata alone.

    compressor_postprocess_scatter computes a cache slot per row from its metadata. Without a step
    every call does so, in a few small launches of its own. In a step, calls on one stream with the
    same metadata tensors do so once. So the values of the metadata must not change in the body.

    A body is one forward pass. If the pass is captured in a CUDA graph, the body is captured as a
    whole: a replay computes the slots again, from the metadata of the replay. Bodies may be nested;
    the inner one shares nothing with the outer one. Each thread has its own step.
    """
    outer, _shared.made = _shared.made, {}
    try:
        yield
    finally:
        _shared.made = outer


def shared(key: tuple, tensors: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, or has returned in this step on this stream for the same memory.

    Args:
        key: what the result depends on, beside the values of the tensors.
        tensors: are kept until the step ends, so that no other tensor takes their memory.
    """
    made = _shared.made
    if made is None:
        return make()
    layout = *map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)
    place = *key, *layout, _stream(tensors[0])
    found = made.get(place)
    if found is None:
        found = made[place] = make(), tensors
    return found[0]


def first(name: str, tensor: Tensor, count: int) -> Tensor:
    """The first rows of a tensor that may be longer.

    Raises:
        ValueError: it is shorter.
    """
    length = tensor.shape[0]
    if length == count:
        return tensor
    if length < count:
        refuse(name, f"of length {length}", f"{count} or more")
    made = _shared.made
    if made is None:
        return tensor[:count]
    place = count, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    view = made.get(place)
    if view is None:
        view = made[place] = tensor[:count]
    return view


def refuse(name: str, value: object, accepted: str) -> NoReturn:
    """Raises the ValueError of an argument."""
    raise ValueError(f"{name} is {value}; accepted: {accepted}")


def _stream(tensor: Tensor) -> tuple[int, bool] | None:
    """The current stream, and whether a graph is captured on it; None for the CPU.

    What was computed before a capture is not computed again by a replay.
    """
    if not tensor.is_cuda:
        return None
    return internals.raw_stream(tensor.device.index), torch.cuda.is_current_stream_capturing()
