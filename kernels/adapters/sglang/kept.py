"""Tensors as kvfold takes them, and what is kept for as long as an engine's tensors live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.sglang.internals import is_capturing

ATTRIBUTE = "_kvfold_converted"  # of a parameter: what it has been converted to


class Record:
    """What is prepared for calls with some tensors, and is found by their addresses.

    It has views of their memory, so no other memory gets these addresses while it is kept.
    """

    def keep(self, records: dict[Hashable, Any], key: Hashable, *tensors: Tensor) -> None:
        """Puts the record into `records`, for as long as all the tensors live."""

        def forget(_: object) -> None:
            records.pop(key, None)

        records[key] = self
        self._owners = [weakref.ref(owner(tensor), forget) for tensor in tensors]


def owner(tensor: Tensor) -> Tensor:
    """A tensor, or the one that it is a view of: SGLang passes a new view at each call."""
    return tensor if tensor._base is None else tensor._base


def state_views(kv_score_buffer: Tensor) -> tuple[Tensor, Tensor]:
    """KV and score of a packed state [pages, rows, kv | score]."""
    packed, width = kv_score_buffer.data, kv_score_buffer.size(2) // 2
    return packed[..., :width], packed[..., width:]


def rope_table(freq_cis: Tensor) -> Tensor:
    """[max_pos, pairs], complex64, as a view [max_pos, 2, pairs] of fp32."""
    return torch.view_as_real(freq_cis.data).transpose(1, 2)


class Converted:
    """A parameter as kvfold takes it: a plain tensor that requires no gradient.

    If its values or its layout differ, it has memory of its own. It is then written again, in
    place, after the parameter has changed: a CUDA graph has its address.

    Attributes:
        source: the parameter's memory and count of writes; it does not keep the parameter alive.
        tensor: the result.
        version: of the parameter, as torch counts its writes; None if the result is for one call.
    """

    def __init__(
        self, parameter: Tensor, convert: Callable[[Tensor], Tensor], version: int | None
    ) -> None:
        self._convert, self.version = convert, version
        self.source = parameter.detach()
        self.tensor = convert(self.source)

    def refresh(self) -> None:
        """Converts the parameter's values again."""
        if self.tensor.data_ptr() != self.source.data_ptr():
            self.tensor.copy_(self._convert(self.source))
        self.version = self.source._version


def converted(parameter: Tensor, key: Hashable, convert: Callable[[Tensor], Tensor]) -> Converted:
    """`convert(parameter)`, converted once, and again after torch has counted a write.

    Args:
        key: tells `convert` apart.
    """
    # Torch counts no writes to an inference tensor. What a capture writes is not there after it.
    if parameter.is_inference():
        return Converted(parameter, convert, None)
    known = getattr(owner(parameter), ATTRIBUTE, None)
    if known is None:
        known = {}
        setattr(owner(parameter), ATTRIBUTE, known)
    key = (key, parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype)
    found = known.get(key)
    if found is None or found.version != parameter._version:
        if is_capturing():
            return Converted(parameter, convert, None)
        if found is None:
            found = known[key] = Converted(parameter, convert, parameter._version)
        else:
            found.refresh()
    return found


def refresh(parameter: Tensor) -> None:
    """Converts a parameter again whose values have changed without a count, as by `.data`."""
    for found in getattr(owner(parameter), ATTRIBUTE, {}).values():
        found.refresh()


def rounded(parameter: Tensor, dtype: torch.dtype) -> Converted:
    """A parameter with values of a dtype."""
    return converted(parameter, dtype, lambda x: x.to(dtype))


def kvfold_ape(ape: Tensor, ratio: int, rounded_to: torch.dtype) -> Converted:
    """An ape as kvfold takes it: [ratio, state_dim], fp32, with values of another dtype.

    SGLang has the halves of an overlapping window's ape one below the other,
    [2 * ratio, head_dim], and rounds it to the dtype of kv_score_input.
    """

    def relaid(ape: Tensor) -> Tensor:
        parts = ape.to(rounded_to).float().split(ratio)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return converted(ape, (ratio, rounded_to), relaid)
