"""The metadata of a plan in torch: what CPU tensors get and what the launch on a GPU must match."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.adapters.sglang.metadata import DecodeMetadata, PrefillMetadata, RowMetadata


def fill_decode(entries: Tensor, ratio: int, metadata: DecodeMetadata) -> None:
    """Fills the metadata of a decode plan, [batch, 4] int32."""
    length, page_before, page = entries[:, 0], entries[:, 2], entries[:, 3]
    window = (length - 1).div(ratio, rounding_mode="floor")
    first = (window - 1 if ratio == 4 else window).clamp(min=0)
    used = length > 0
    requests = metadata.requests
    requests.kv_lens.copy_(torch.where(used, length - first * ratio, 0))
    batch = torch.arange(entries.size(0) + 1)
    requests.cu_seq_lens.copy_(batch)
    requests.cu_outputs.copy_(batch)
    requests.block_table[:, 0] = page_before  # window 0 has its own page here
    requests.block_table[:, -1] = page
    closes = used & (length % ratio == 0)
    metadata.positions.copy_(torch.where(closes, length - ratio, -1))


def fill_prefill(
    windows: Tensor,
    rows: Tensor,
    num_tokens: int,
    ratio: int,
    metadata: PrefillMetadata,
    pages: Tensor,
) -> None:
    """Fills the metadata of a prefill plan, and sorts its windows.

    Args:
        windows: [num_windows, 4], int32: plan_c, mutated.
        rows: [num_rows, 2], int32: plan_w.
        pages: the storage of the block table of the runs.
    """
    _sort(windows, num_tokens, ratio)
    _fill_runs(windows, num_tokens, ratio, metadata, pages)
    token, row = rows.long().unbind(1)
    used = (token >= 0) & (token < num_tokens) & (row >= 0)
    store = metadata.store
    for tensor in (store.kv_lens, store.cu_seq_lens, store.cu_outputs):
        tensor.zero_()
    store.kv_lens[0::2] = torch.where(used, row % ratio + 1, 0).int()
    store.cu_seq_lens[0:-1:2] = torch.where(used, token, 0).int()
    store.cu_seq_lens[1::2] = torch.where(used, token + 1, 0).int()
    store.block_table.fill_(-1)
    store.block_table[0::2, 0] = torch.where(used, row // ratio, -1).int()


def fill_rows(windows: Tensor, out_loc: Tensor, ratio: int, metadata: RowMetadata) -> None:
    """Fills positions and slots of the rows of plan_c, [num_windows, 4] int32."""
    token = ragged_id(windows)
    used = _used(windows, len(out_loc), ratio)
    metadata.positions.copy_(torch.where(used, windows[:, 0] - ratio, -1))
    metadata.slots.fill_(-1)
    metadata.slots[used] = out_loc[token[used].long()]


def ragged_id(windows: Tensor) -> Tensor:
    """The row of kv_score_input of each window's last token, [num_windows] int32."""
    return windows[:, 1] & 0xFFFF


def _used(windows: Tensor, num_tokens: int, ratio: int) -> Tensor:
    """Which entries of plan_c stand for a window."""
    length = windows[:, 0]
    return (length > 0) & (length % ratio == 0) & (ragged_id(windows) < num_tokens)


def _sort(windows: Tensor, num_tokens: int, ratio: int) -> None:
    """Puts the entries that are used first, in the order of their tokens."""
    used = _used(windows, num_tokens, ratio)
    order = torch.argsort(torch.where(used, ragged_id(windows), num_tokens), stable=True)
    ordered = windows[order]
    ordered[~used[order]] = torch.tensor([-1, 0, -1, -1], dtype=torch.int32)
    windows.copy_(ordered)


def _fill_runs(
    windows: Tensor, num_tokens: int, ratio: int, metadata: PrefillMetadata, pages: Tensor
) -> None:
    """Fills the requests of the call that reduces: one per run of windows that overlap."""
    reduce, overlaps = metadata.reduce, ratio == 4
    window_rows = 2 * ratio if overlaps else ratio
    for tensor in (reduce.kv_lens, reduce.cu_seq_lens, reduce.cu_outputs, pages):
        tensor.zero_()
    used = windows[_used(windows, num_tokens, ratio)].long()
    length, token, page_before, page = used[:, 0], used[:, 1] & 0xFFFF, used[:, 2], used[:, 3]
    held = (used[:, 1] >> 16) & 0xFFFF
    new, window = window_rows - held, length // ratio - 1
    # More new rows than a window has: the window before closes in this call, too.
    continues = (new > ratio) & torch.isin(token - ratio, token) & overlaps
    ends = torch.cat([~continues[1:], torch.ones(1, dtype=torch.bool)])[: len(used)]
    runs = reduce.kv_lens.numel() // 2
    row = (~continues).nonzero()[:runs, 0]
    new, window, last = new[row], window[row], 2 * len(row)
    begin, end = token[row] - new + 1, token[ends][:runs] + 1
    # Without old rows SGLang leaves the pages unset.
    page = torch.where(held > 0, page, 0)[row]
    page_before = torch.where(held > 0, page_before, 0)[row] if overlaps else page
    first = (window - 1 if overlaps else window).clamp(min=0)
    start = length[row] - new - first * ratio
    valid = (new > 0) & (start >= 0) & (page >= 0) & (page_before >= 0)
    reduce.kv_lens[0:last:2] = torch.where(valid, start + end - begin, 0).int()
    reduce.cu_seq_lens[0:last:2] = begin.int()
    reduce.cu_seq_lens[1:last:2] = end.int()
    reduce.cu_outputs[0:last:2] = row.int()
    reduce.cu_outputs[1:last:2] = len(windows)
    pages[0:last:2] = page_before.clamp(min=0).int()
    pages[1:last:2] = page.clamp(min=0).int()
