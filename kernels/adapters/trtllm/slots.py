"""Where compressed rows go: a cache slot per row, from TensorRT-LLM's metadata, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

import kvfold
from kvfold.adapters.trtllm.step import first


def row_slots(
    slots: Tensor,
    num_outputs: Tensor,
    cu_kv_comp: Tensor,
    start_pos: Tensor,
    block_offsets: Tensor,
    compressed_mask: Tensor,
    tokens_per_block: int,
) -> Tensor:
    """The slot of every row; -1 for one that is not stored.

    Row cu_kv_comp[b] + i of request b, with i < num_outputs[b], is row start_pos[b] + i of the
    request's cache. If there is one request, row i is row start_pos[0] + i whatever cu_kv_comp is:
    so the engine has it.

    Args:
        slots: [num_rows], int64, mutated: gets them.
        num_outputs: [batch], int32.
        cu_kv_comp, start_pos, block_offsets: [batch + 1], [batch] and [batch, max_blocks] or
            longer, int32.
        compressed_mask: [num_rows], bool.
        tokens_per_block: rows of a page of the cache.
    """
    batch, num_rows, device = num_outputs.shape[0], slots.shape[0], slots.device
    cu_outputs = first("cu_kv_comp", cu_kv_comp, batch + 1)
    start_pos = first("start_pos", start_pos, batch)
    block_offsets = first("block_offsets", block_offsets, batch)
    if batch == 1:
        cu_outputs = torch.arange(0, 2 * num_rows, num_rows, dtype=torch.int32, device=device)
    # locate_rows leaves rows before the first request's as they are.
    slots.fill_(-1)
    # With a ratio of 1, window w of a request is row w of its cache.
    kvfold.locate_rows(
        start_pos + num_outputs, cu_outputs, cu_outputs,
        torch.empty(num_rows, dtype=torch.int32, device=device), slots, 1, tokens_per_block,
        block_table_cache=block_offsets, new_tokens=num_outputs,
    )  # fmt: skip
    return slots.masked_fill_(compressed_mask.logical_not(), -1)
