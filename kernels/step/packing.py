"""The layout of several arrays in one block of bytes, the same on the host and on the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvfold.step.sizes import aligned

Array = torch.Tensor | np.ndarray


class PackedArray(NamedTuple):
    """One array of a block. It is contiguous, and its bytes are `start` to `start + nbytes`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    start: int
    nbytes: int


@dataclass(frozen=True)
class Packing:
    """The layout of a block.

    Attributes:
        arrays: the arrays in order, each at a multiple of 256 bytes.
        size: bytes of the block, the gaps between the arrays included.
        nbytes: bytes of the arrays alone.
    """

    arrays: tuple[PackedArray, ...]
    size: int
    nbytes: int

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Packing:
        """The layout for these arrays.

        Raises:
            ValueError: an array is not a strided tensor on the CPU or a numpy array, or torch does
                not have its dtype.
        """
        signature = tuple((name, _dtype(name, a), tuple(a.shape)) for name, a in arrays.items())
        return _packing(signature)

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Checks that arrays fit this layout; their order is free.

        Raises:
            ValueError: names, shapes or dtypes differ from those of the layout, or as `of`.
        """
        if arrays.keys() != {packed.name for packed in self.arrays}:
            raise ValueError(
                f"arrays are {_quoted(arrays)}; "
                f"accepted: {_quoted(packed.name for packed in self.arrays)}"
            )
        for packed in self.arrays:
            array = arrays[packed.name]
            if _dtype(packed.name, array) != packed.dtype or array.shape != packed.shape:
                raise ValueError(
                    f"array {packed.name!r} is of shape {tuple(array.shape)}, {array.dtype}; "
                    f"accepted: {packed.shape}, {packed.dtype}, as in the first upload"
                )

    def write(self, arrays: Mapping[str, Array], block: torch.Tensor) -> None:
        """Copies the arrays into `block`, a uint8 tensor [size] on the host."""
        raw = block.numpy()
        for packed in self.arrays:
            array, end = arrays[packed.name], packed.start + packed.nbytes
            values = _as_numpy(array)
            if values is not None:  # several times as fast as a copy by torch
                raw[packed.start : end].view(values.dtype).reshape(packed.shape)[...] = values
            else:
                assert isinstance(array, torch.Tensor)
                part = block[packed.start : end].view(packed.dtype).view(packed.shape)
                part.copy_(array.detach())

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the arrays in `block`, a uint8 tensor [aligned(size)] on any device."""
        typed = {dtype: block.view(dtype) for dtype in {packed.dtype for packed in self.arrays}}
        return {
            packed.name: typed[packed.dtype].as_strided(
                packed.shape, packed.strides, packed.start // packed.dtype.itemsize
            )
            for packed in self.arrays
        }


@functools.lru_cache(maxsize=256)
def _packing(signature: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> Packing:
    """The layout for arrays of these names, dtypes and shapes."""
    packed, size = [], 0
    for name, dtype, shape in signature:
        start, nbytes = aligned(size), math.prod(shape) * dtype.itemsize
        packed.append(PackedArray(name, dtype, shape, _contiguous_strides(shape), start, nbytes))
        size = start + nbytes
    return Packing(tuple(packed), size, sum(array.nbytes for array in packed))


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _as_numpy(array: Array) -> np.ndarray | None:
    """A numpy array that shares the memory; None if numpy does not have the dtype (bfloat16)."""
    if isinstance(array, np.ndarray):
        return array
    try:
        return array.detach().numpy()
    except (TypeError, RuntimeError):
        return None


def _dtype(name: str, array: Array) -> torch.dtype:
    """The torch dtype of an array.

    Raises:
        ValueError: the array cannot be uploaded.
    """
    if isinstance(array, np.ndarray):
        try:
            return _torch_dtype(array.dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"array {name!r} is of dtype {array.dtype!r}; accepted: dtypes that torch has"
            ) from error
    if not isinstance(array, torch.Tensor):
        raise ValueError(
            f"array {name!r} is of type {type(array).__name__}; accepted: tensors, numpy arrays"
        )
    if array.device.type != "cpu":
        raise ValueError(f"array {name!r} is on {str(array.device)!r}; accepted: 'cpu'")
    if array.layout != torch.strided:
        raise ValueError(f"array {name!r} is of layout {array.layout}; accepted: torch.strided")
    return array.dtype


@functools.cache
def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
