"""Arrays one behind the other in a block of bytes, on the host and on the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvfold.step.align import aligned

Array = torch.Tensor | np.ndarray


class Place(NamedTuple):
    """Where an array lies in a block: its first byte, and how many it has."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    start: int
    nbytes: int


@dataclass(frozen=True)
class Packing:
    """Where arrays lie in `size` bytes, of which `nbytes` are theirs."""

    places: tuple[Place, ...]
    size: int
    nbytes: int

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Packing:
        """That of CPU arrays. Raises ValueError for what is none, or has a dtype torch has not."""
        return _packing(_look(arrays))

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Raises ValueError unless they are as those that were packed."""
        if arrays.keys() != {place.name for place in self.places}:
            raise ValueError(
                f"arrays are {', '.join(map(repr, arrays)) or 'none'}; "
                f"{accepted(place.name for place in self.places)}"
            )
        for place in self.places:
            array = arrays[place.name]
            if _dtype(place.name, array) != place.dtype or array.shape != place.shape:
                raise ValueError(
                    f"array {place.name!r} is of shape {tuple(array.shape)}, {array.dtype}; "
                    f"accepted: {place.shape}, {place.dtype}, as at first"
                )

    def write(self, arrays: Mapping[str, Array], block: torch.Tensor) -> None:
        """Puts the arrays in uint8 [size] on the host."""
        raw = block.numpy()
        for place in self.places:
            end = place.start + place.nbytes
            array = _as_numpy(arrays[place.name])
            if array is not None:  # several times as quick as through torch
                raw[place.start : end].view(array.dtype).reshape(place.shape)[...] = array
            else:
                part = block[place.start : end].view(place.dtype).view(place.shape)
                part.copy_(arrays[place.name].detach())

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays' places in uint8 [aligned(size)], with their shapes and dtypes."""
        typed = {dtype: block.view(dtype) for dtype in {place.dtype for place in self.places}}
        return {
            place.name: typed[place.dtype].as_strided(
                place.shape, place.strides, place.start // place.dtype.itemsize
            )
            for place in self.places
        }


def accepted(names: Iterable[str]) -> str:
    """How an error ends that is about names."""
    return f"accepted: {', '.join(map(repr, names)) or 'none'}"


def _look(arrays: Mapping[str, Array]) -> tuple:
    """(name, dtype, shape) of each."""
    return tuple((name, _dtype(name, array), array.shape) for name, array in arrays.items())


@functools.lru_cache(maxsize=256)
def _packing(look: tuple) -> Packing:
    places, size = [], 0
    for name, dtype, shape in look:
        start, nbytes = aligned(size), math.prod(shape) * dtype.itemsize
        places.append(Place(name, dtype, tuple(shape), _strides(shape), start, nbytes))
        size = start + nbytes
    return Packing(tuple(places), size, sum(place.nbytes for place in places))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _as_numpy(array: Array) -> np.ndarray | None:
    """The same values, not copied; None for what numpy does not have, such as bf16."""
    if isinstance(array, np.ndarray):
        return array
    try:
        return array.detach().numpy()
    except (TypeError, RuntimeError):
        return None


def _dtype(name: str, array: Array) -> torch.dtype:
    """The dtype that a CPU array has on the device; ValueError if it is none."""
    if isinstance(array, np.ndarray):
        try:
            return _torch_dtype(array.dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"array {name!r} is of dtype {array.dtype!r}; accepted: dtypes torch has"
            ) from error
    if not isinstance(array, torch.Tensor):
        raise ValueError(
            f"array {name!r} is of type {type(array).__name__}; accepted: tensors, numpy arrays"
        )
    if array.device.type != "cpu":
        raise ValueError(f"array {name!r} is on {str(array.device)!r}; accepted: 'cpu'")
    return array.dtype


@functools.cache
def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
