"""Calls as dictionaries of arguments, whose whole storages are copied and compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Call = dict[str, Any]  # argument -> value, in the order of the op's schema


def copied(call: Call, device: str | torch.device | None = None) -> Call:
    """The call on memory of its own; tensors that share a storage do so again."""
    storages: dict[int, Tensor] = {}

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        address = x.untyped_storage().data_ptr()
        if address not in storages:
            storages[address] = storage_bytes(x).to(device or x.device, copy=True)
        flat = torch.empty(0, dtype=x.dtype, device=storages[address].device)
        storage = storages[address].untyped_storage()
        return flat.set_(storage, x.storage_offset(), x.size(), x.stride())

    return {name: copy(value) for name, value in call.items()}


def storage_bytes(x: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    storage = x.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=x.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))


def assert_same_memory(actual: Call, expected: Call) -> None:
    """The storages of all tensors are equal to the byte: guards, gaps and inputs too."""
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor):
            found, wanted = storage_bytes(actual[name]).cpu(), storage_bytes(tensor).cpu()
            at = (found != wanted).nonzero().flatten()[:4].tolist()
            assert not at, f"bytes {at}, ... of the storage of {name} differ"
