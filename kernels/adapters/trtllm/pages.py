"""The cache as pages of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.adapters.trtllm.step import refuse

CAPACITY = 1024  # of _known

# (address, bytes, bytes of a page) -> the pages. They do not own the memory, and are used only when
# a tensor is there that does. So they outlive a tensor and serve the next one in its place.
_known: dict[tuple[int, int, int], Tensor] = {}


def cache_pages(kv_cache: Tensor, page_bytes: int) -> Tensor:
    """The cache as [num_pages, page_bytes] of bytes.

    Raises:
        ValueError: it is not contiguous.
    """
    if not kv_cache.is_contiguous():
        value = f"of shape {list(kv_cache.shape)} and strides {kv_cache.stride()}"
        refuse("kv_cache", value, "contiguous pages")
    place = (kv_cache.data_ptr(), kv_cache.nbytes, page_bytes)
    pages = _known.get(place)
    if pages is None:
        if len(_known) >= CAPACITY:
            _known.clear()
        pages = _known[place] = _alias(*place, kv_cache.device)
    return pages


def _alias(address: int, nbytes: int, page_bytes: int, device: torch.device) -> Tensor:
    memory = _Memory(address, (nbytes // page_bytes, page_bytes))
    with torch.inference_mode(False):  # such a tensor serves in inference mode and outside of it
        if device.type == "cpu":
            return torch.from_numpy(np.asarray(memory))
        return torch.as_tensor(memory, device=device)


class _Memory:
    """Bytes at an address, as numpy and torch take them without a copy."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        interface: dict[str, Any] = {
            "data": (address, False),
            "shape": shape,
            "typestr": "|u1",
            "version": 3,
        }
        self.__array_interface__ = self.__cuda_array_interface__ = interface
