"""paged_kv_compress in torch, on any device: what CPU tensors run and what the kernels must match.

It works on the requests, rows and windows that have work, all at once. To find them it
synchronises, so it cannot be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from kvfold.ops.paged_kv_compress.spec import Arguments

CHUNK = 1 << 20
"""Elements of state gathered at a time: bounds memory and stays in the caches."""


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Stores every request's new rows in the paged state and writes the windows that they close.

    Args:
        arguments: checked; kvfold.paged_kv_compress documents them. prefetch_state has no effect,
            and no gradient is recorded, as by the kernels.
    """
    kv_score, ape, output = arguments.kv_score, arguments.ape, arguments.output
    paged_kv, paged_score = arguments.paged_kv, arguments.paged_score
    cu_seq_lens, cu_outputs = arguments.cu_seq_lens, arguments.cu_outputs
    compress_ratio = arguments.compress_ratio
    head_dim, state_dim = output.size(1), paged_kv.size(2)
    tables = arguments.block_table_kv, arguments.block_table_score
    pages = (*tables, paged_kv.size(0), paged_kv.size(1))

    # In 64 bits, in which no sum of int32 metadata overflows.
    begin, end, length = cu_seq_lens[:-1].long(), cu_seq_lens[1:].long(), arguments.kv_lens.long()
    new = end - begin
    valid = (begin >= 0) & (end <= kv_score.size(0)) & (new >= 0) & (new <= arguments.next_n)
    new = torch.where(valid & (new <= length), new, 0)
    start = length - new

    # 1. Store.
    request, t = _expand(new)
    position = start[request] + t
    present, page_kv, page_score, slot = _locate(request, position, *pages)
    token = kv_score[(begin[request] + t)[present]]
    score = token[:, state_dim:].float() + ape[position[present] % compress_ratio]
    paged_kv[page_kv, slot] = token[:, :state_dim].to(paged_kv.dtype)
    paged_score[page_score, slot] = score.to(paged_score.dtype)

    # 2. Count.
    request, c = _expand(length // compress_ratio - start // compress_ratio)
    window = start[request] // compress_ratio + c
    target = cu_outputs[request].long() + c
    limit = cu_outputs[request + 1].long().clamp(max=output.size(0))
    written = (target >= 0) & (target < limit)
    request, window, target = request[written], window[written], target[written]

    # 3. Reduce. A window's rows lie at these offsets from its first position; an overlapping one
    # takes part 0 of the state's columns from the window before it and part 1 from its own.
    parts = state_dim // head_dim
    row = torch.arange(parts * compress_ratio, device=kv_score.device)
    offset, part = row - (parts - 1) * compress_ratio, row // compress_ratio
    kv_parts = paged_kv.unflatten(2, (parts, head_dim))
    score_parts = paged_score.unflatten(2, (parts, head_dim))
    chunk = max(1, CHUNK // (row.numel() * head_dim))
    for i in range(0, window.numel(), chunk):
        at = slice(i, i + chunk)
        position = window[at, None] * compress_ratio + offset
        present, page_kv, page_score, slot = _locate(request[at, None], position, *pages)
        column = part.expand_as(present)[present]
        kv = torch.zeros(*present.shape, head_dim, dtype=torch.float32, device=kv_score.device)
        kv[present] = kv_parts[page_kv, slot, column].float()
        score = torch.full_like(kv, -torch.inf)
        score[present] = score_parts[page_score, slot, column].float()
        weight = torch.exp(score - score.amax(1, keepdim=True))
        weight[~present] = 0
        compressed, total = _sum_rows(weight * kv), _sum_rows(weight)
        # The row of the largest score weighs 1: total is 0 just where no row is present.
        compressed /= total.masked_fill_(total == 0, 1)
        output[target[at]] = compressed.to(output.dtype)


def _sum_rows(x: Tensor) -> Tensor:
    """[windows, rows, columns] -> [windows, columns] in x's memory, halving the rows.

    sum and softmax would do, but for their last bits: those differ with the number of windows.
    """
    while x.size(1) > 1:
        half = (x.size(1) + 1) // 2
        x[:, : x.size(1) - half].add_(x[:, half:])
        x = x[:, :half]
    return x[:, 0]


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """[2, 0, 3] -> [0, 0, 2, 2, 2] and [0, 1, 0, 1, 2]: each count's index and the place in it."""
    index = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return index, torch.arange(index.numel(), device=counts.device) - first[index]


def _locate(
    request: Tensor,
    position: Tensor,
    block_table_kv: Tensor,
    block_table_score: Tensor,
    num_pages: int,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows are present, and of those the pages of both pools and the slot."""
    logical = position // page_size
    known = (position >= 0) & (logical < block_table_kv.size(1))
    page_kv, page_score = torch.full((2, *position.shape), -1, device=position.device)
    entry = request.expand_as(position)[known], logical[known]
    page_kv[known] = block_table_kv[entry].long()
    page_score[known] = block_table_score[entry].long()
    present = (page_kv >= 0) & (page_kv < num_pages) & (page_score >= 0) & (page_score < num_pages)
    slot = position % page_size
    return present, page_kv[present], page_score[present], slot[present]
