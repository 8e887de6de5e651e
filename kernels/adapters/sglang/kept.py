"""Views and copies of tensors that live as long as the model, made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Kept = TypeVar("Kept")


def kept(tensor: Tensor, kind: Hashable, make: Callable[[Tensor], Kept]) -> Kept:
    """What `make` returns for a tensor; made once per memory and shape.

    SGLang passes a new view of the same tensor at each call. The result is kept as long as the
    tensor that the view is of. `make` gets an alias, so that a view of it does not keep the tensor
    alive.
    """
    known = _of_owner(tensor)
    key = (kind, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    found = known.get(key)
    if found is None:
        found = known[key] = make(tensor.data)
    return found


def state_views(kv_score_buffer: Tensor) -> tuple[Tensor, Tensor]:
    """KV and score of a packed state [pages, rows, kv | score]."""
    return kept(kv_score_buffer, "state", lambda x: x.split(x.size(2) // 2, dim=2))


def rope_table(freq_cis: Tensor) -> Tensor:
    """[max_pos, pairs], complex64, as a view [max_pos, 2, pairs] of fp32."""
    return kept(freq_cis, "rope", lambda x: torch.view_as_real(x).transpose(1, 2))


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


def converted(tensor: Tensor, kind: Hashable, convert: Callable[[Tensor], Tensor]) -> Tensor:
    """`convert(tensor)`, converted once, and again after torch has counted a write."""
    version = 0 if tensor.is_inference() else tensor._version
    found = kept(tensor, kind, lambda x: Converted(x, convert, version))
    if found.version != version:
        found.refresh(version)
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
        return kept(tensor, "plain", lambda x: x)
    return converted(tensor, ("rounded", rounded_to), lambda x: x.to(rounded_to))


def kvfold_ape(ape: Tensor, ratio: int, rounded_to: torch.dtype) -> Tensor:
    """An ape as kvfold takes it: [ratio, state_dim], fp32, with values of another dtype.

    SGLang has the halves of an overlapping window's ape one below the other,
    [2 * ratio, head_dim], and rounds it to the dtype of kv_score_input.
    """
    if ape.size(0) == ratio and ape.dtype == rounded_to == torch.float32:
        return parameter(ape)
    return converted(
        ape,
        ("ape", rounded_to),
        lambda x: torch.cat(x.to(rounded_to).float().split(ratio), dim=1),
    )


def _of_owner(tensor: Tensor) -> dict[Hashable, Any]:
    """What is kept with a tensor, or with the one that it is a view of."""
    owner = tensor if tensor._base is None else tensor._base
    return owner.__dict__.setdefault("_kvfold_kept", {})
