"""locate_rows in torch: what CPU tensors run and what the kernels must match."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.ops.locate_rows.spec import Arguments, token_bounds
from kvfold.ops.state_reference import Requests


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Writes positions and slots.

    It synchronises, so it cannot be captured in a CUDA graph.

    Args:
        arguments: checked; kvfold.locate_rows documents them.
    """
    a, ratio = arguments, arguments.compress_ratio
    requests = Requests.read(a.kv_lens, a.cu_seq_lens, *token_bounds(a), a.new_tokens)
    # In 64 bits, in which no sum of int32 metadata overflows.
    reserved = a.cu_outputs.long()
    num_outputs, batch = a.positions.numel(), a.kv_lens.numel()
    first = int(reserved[0].clamp(0, num_outputs))
    row = torch.arange(first, num_outputs, device=a.positions.device)

    # The last request whose rows begin at or before a row. All tensors below have one element for
    # each row that is left.
    request = torch.searchsorted(reserved, row, right=True) - 1
    owned = (request >= 0) & (request < batch)
    row, request = row[owned], request[owned]
    number = row - reserved[request]
    window = requests.start[request] // ratio + number
    filled = (number >= 0) & (row < reserved[request + 1])
    filled &= window < requests.length[request] // ratio
    row, request, window = row[filled], request[filled], window[filled]

    a.positions[first:] = -1
    a.slots[first:] = -1
    a.positions[row] = (window * ratio).int()
    a.slots[row] = _slots(arguments, requests, request, window)


def _slots(arguments: Arguments, requests: Requests, request: Tensor, window: Tensor) -> Tensor:
    """The slots of windows; -1 for one without a page."""
    a = arguments
    slot = torch.full_like(window, -1)
    if a.block_table_cache is not None:
        logical = window // a.rows_per_page
        known = logical < a.block_table_cache.size(1)
        page = a.block_table_cache[request[known], logical[known]].long()
        place = page * a.rows_per_page + window[known] % a.rows_per_page
        slot[known] = torch.where(page >= 0, place, -1)
    else:
        assert a.token_slots is not None
        last = (window + 1) * a.compress_ratio - 1 - requests.start[request]
        token = requests.begin[request] + last
        known = token < a.token_slots.numel()
        slot[known] = a.token_slots[token[known]]
    return slot
