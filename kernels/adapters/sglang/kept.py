"""Views and copies of tensors that live as long as the model, made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Kept = TypeVar("Kept")

ATTRIBUTE = "_kvfold_kept"  # of a tensor: what is kept with it
NOTHING: dict[Hashable, Any] = {}


def kept(tensor: Tensor, kind: Hashable, make: Callable[[Tensor], Kept]) -> Kept:
    """What `make` returns for a tensor; made once per memory and shape.

    SGLang passes a new view of the same tensor at each call. The result is kept as long as the
    tensor that the view is of. `make` gets an alias, so that a view of it does not keep the tensor
    alive.
    """
    base = tensor._base
    known = getattr(tensor if base is None else base, ATTRIBUTE, NOTHING)
    key = (kind, tensor.data_ptr(), tensor.shape, tensor.stride())
    found = known.get(key)
    if found is None:
        found = _of_owner(tensor)[key] = make(tensor.data)
    return found


def state_views(kv_score_buffer: Tensor) -> tuple[Tensor, Tensor]:
    """KV and score of a packed state [pages, rows, kv | score]."""
    return kept(kv_score_buffer, "state", _halves)


def _halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    width = packed.size(2) // 2
    return packed[..., :width], packed[..., width:]


def rope_table(freq_cis: Tensor) -> Tensor:
    """[max_pos, pairs], complex64, as a view [max_pos, 2, pairs] of fp32."""
    return kept(freq_cis, "rope", _cos_and_sin)


def _cos_and_sin(freq_cis: Tensor) -> Tensor:
    return torch.view_as_real(freq_cis).transpose(1, 2)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class Converted:
    """A parameter in other values or another layout, in memory of its own.

    It is written again, in place, after the parameter has changed: a CUDA graph has its address.
    """

    def __init__(self, source: Tensor, convert: Callable[[Tensor], Tensor], version: int) -> None:
        self._source, self._convert, self.version = source, convert, version
        self.tensor = convert(source)

    def refresh(self, version: int) -> None:
        """Converts the parameter's values again."""
        self.tensor.copy_(self._convert(self._source))
        self.version = version


def converted(
    tensor: Tensor, key: Hashable, convert: Callable[..., Tensor], *arguments: Any
) -> Tensor:
    """`convert(tensor, *arguments)`, converted once, and again after torch has counted a write."""
    base = tensor._base
    known = getattr(tensor if base is None else base, ATTRIBUTE, NOTHING)
    key = (key, tensor.data_ptr(), tensor.shape)
    found = known.get(key)
    if found is not None and found.version == tensor._version:
        return found.tensor
    # Torch counts no writes to an inference tensor. What a capture writes is not there after it.
    if tensor.is_inference() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return convert(tensor, *arguments)
    if found is None:
        found = Converted(tensor.data, lambda x: convert(x, *arguments), tensor._version)
        _of_owner(tensor)[key] = found
    else:
        found.refresh(tensor._version)
    return found.tensor


def refresh(tensor: Tensor) -> None:
    """Converts a parameter again whose values have changed without a count, as by `.data`."""
    for found in _of_owner(tensor).values():
        if isinstance(found, Converted):
            found.refresh(found.version)


def parameter(tensor: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
    """A parameter as a plain tensor: kvfold recognises no call with one that requires a gradient.

    Args:
        rounded_to: the dtype of its values; None is its own.
    """
    if rounded_to is None or rounded_to == tensor.dtype:
        return kept(tensor, "plain", _itself)
    return converted(tensor, rounded_to, Tensor.to, rounded_to)


def kvfold_ape(ape: Tensor, ratio: int, rounded_to: torch.dtype) -> Tensor:
    """An ape as kvfold takes it: [ratio, state_dim], fp32, with values of another dtype.

    SGLang has the halves of an overlapping window's ape one below the other,
    [2 * ratio, head_dim], and rounds it to the dtype of kv_score_input.
    """
    if ratio == 128 and ape.dtype is rounded_to is torch.float32:
        return kept(ape, "plain", _itself)
    return converted(ape, (ratio, rounded_to), _relaid, ratio, rounded_to)


def _relaid(ape: Tensor, ratio: int, rounded_to: torch.dtype) -> Tensor:
    return torch.cat(ape.to(rounded_to).float().split(ratio), dim=1)


def _of_owner(tensor: Tensor) -> dict[Hashable, Any]:
    """What is kept with a tensor, or with the one that it is a view of."""
    owner = tensor if tensor._base is None else tensor._base
    known = getattr(owner, ATTRIBUTE, None)
    if known is None:
        known = {}
        setattr(owner, ATTRIBUTE, known)
    return known
