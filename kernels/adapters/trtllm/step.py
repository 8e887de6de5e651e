"""What the calls of one step share: views, slots, and checks that depend on metadata alone."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from kvfold.runtime import internals
from kvfold.runtime.layout_guard import layout_guard

Made = TypeVar("Made")
Tensors = tuple[Tensor, ...]

_data_ptr = Tensor.data_ptr
_get_device = Tensor.get_device


class step:
    """Calls in the body share what they derive from metadata alone.

    compressor_postprocess_scatter computes a cache slot per row from its metadata. Without a step
    every call does so, in a few small launches of its own. In a step, calls on one stream with the
    same metadata tensors do so once. So the values of the metadata must not change in the body.

    A body is one forward pass. If the pass is captured in a CUDA graph, the body is captured as a
    whole: a replay computes the slots again, from the metadata of the replay. Bodies may be nested;
    the inner one shares nothing with the outer one. A step belongs to the context (contextvars) in
    which it is entered, so each thread has its own.
    """

    def __init__(self) -> None:
        self.made: dict[tuple, Any] | None = None  # None outside of the body

    def __enter__(self) -> None:
        self.made = {}
        self._token = _current.set(self)

    def __exit__(self, *_: object) -> None:
        self.made = None  # a context that was copied in the body may go on
        _current.reset(self._token)


_no_step = step()
_current = contextvars.ContextVar("step", default=_no_step)


def shared(
    make: Callable[[tuple, Tensors, Tensors], Made],
    scalars: tuple,
    tensors: Tensors,
    likes: Tensors,
) -> Made:
    """make(scalars, tensors, likes), or what that has returned in this step.

    It is made once per stream, and once more in a capture: a replay computes nothing that was
    computed before the capture.

    Args:
        tensors: of these the result may depend on the memory, values included.
        likes: of these it may depend on the layout. No tensor is there twice.
    """
    made = _current.get().made
    if made is None:
        return make(scalars, tensors, likes)
    device = _get_device(tensors[0])
    place = (make, scalars, device >= 0 and _stream(device), *map(_data_ptr, tensors))
    found = made.get(place)
    if found is None or not found[0](*tensors, *likes):
        has_layouts = layout_guard(*tensors, *likes)
        memory = [x.untyped_storage() for x in tensors]  # kept, so that no other tensor takes it
        found = made[place] = has_layouts, make(scalars, tensors, likes), memory
    return found[1]


def first(name: str, tensor: Tensor, count: int) -> Tensor:
    """The first rows of a tensor that may be longer.

    Raises:
        ValueError: it is shorter.
    """
    length = tensor.shape[0]
    if length < count:
        refuse(name, f"of length {length}", f"{count} or more")
    return tensor if length == count else tensor[:count]


def refuse(name: str, value: object, accepted: str) -> NoReturn:
    """Raises the ValueError of an argument."""
    raise ValueError(f"{name} is {value}; accepted: {accepted}")


def _stream(device: int) -> tuple[int, bool]:
    """The current stream of a GPU, and whether a graph is captured on it."""
    stream = internals.raw_stream(device)
    # CUDA cannot capture its default stream, which is 0.
    return stream, stream != 0 and torch.cuda.is_current_stream_capturing()
