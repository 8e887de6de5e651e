"""The ops that reduce windows. Names and order of arguments are TensorRT-LLM's."""

from __future__ import annotations

import torch
from torch import Tensor

import kvfold
from kvfold.adapters.trtllm.step import first, refuse
from kvfold.runtime import internals

MAX_NEXT_N = 8
OVERLAP_RATIO = 4  # windows of this ratio overlap, those of others do not

# (device, batch, next_n) -> stream -> [batch], int32, next_n in every element, made on that stream.
# Captured graphs read these tensors, so they are never freed.
_uniform_counts: dict[tuple, dict[int, Tensor]] = {}


def compressor_paged_kv_compress(
    kv_score: Tensor,
    ape: Tensor,
    paged_kv: Tensor,
    paged_score: Tensor,
    block_table_kv: Tensor,
    block_table_score: Tensor,
    output: Tensor,
    kv_lens: Tensor,
    cu_seq_lens: Tensor,
    cu_kv_comp: Tensor,
    batch_size: int,
    page_size: int,
    head_dim: int,
    compress_ratio: int,
    next_n: int,
    new_tokens_per_seq: Tensor | None = None,
) -> None:
    """Decode: stores the new tokens, and compresses the windows that they close.

    kvfold.paged_kv_compress says what tensors there are, what is done, and which errors are raised;
    cu_kv_comp is its cu_outputs. Tables, lengths and prefix sums may be longer than they must be.

    Args:
        paged_kv: the KV state. Its shape is [num_pages, page_size, state_dim], or it is contiguous
            and holds such pages. state_dim is 2 * head_dim for compress_ratio 4, else head_dim.
        paged_score: the score state, likewise, in memory of its own.
        cu_seq_lens: [batch_size + 1]: the row of kv_score where a request's new tokens begin.
        next_n: new tokens of every request; with new_tokens_per_seq, the most that one has.
        new_tokens_per_seq: [batch_size], int32: the new tokens of each request.
    """
    if not 1 <= next_n <= MAX_NEXT_N:
        refuse("next_n", next_n, f"1 to {MAX_NEXT_N}")
    pools = _pools(paged_kv, paged_score, output, page_size, head_dim, compress_ratio)
    tables = _tables(block_table_kv, block_table_score, batch_size)
    if new_tokens_per_seq is None:
        new_tokens = _uniform(kv_lens, batch_size, next_n)
    else:
        new_tokens = first("new_tokens_per_seq", new_tokens_per_seq, batch_size)
    kvfold.paged_kv_compress(
        kv_score, ape, *pools, *tables, output, first("kv_lens", kv_lens, batch_size),
        first("cu_seq_lens", cu_seq_lens, batch_size + 1),
        first("cu_kv_comp", cu_kv_comp, batch_size + 1), compress_ratio, next_n,
        new_tokens=new_tokens,
    )  # fmt: skip


def compressor_prefill_reduction(
    kv_score: Tensor,
    ape: Tensor,
    paged_kv: Tensor,
    paged_score: Tensor,
    block_table_kv: Tensor,
    block_table_score: Tensor,
    output: Tensor,
    kv_lens: Tensor,
    start_pos: Tensor,
    cu_seq_lens: Tensor,
    cu_kv_comp: Tensor,
    batch_size: int,
    page_size: int,
    head_dim: int,
    compress_ratio: int,
    max_outputs: int,
) -> None:
    """Prefill: compresses the windows that close, and stores all new tokens.

    kvfold.prefill_compress says what is done, otherwise as compressor_paged_kv_compress.

    Args:
        cu_seq_lens: [batch_size + 1]: prefix sums of the new tokens.
        start_pos: not read. A request has kv_lens - (its new tokens) tokens before the call, which
            is what start_pos holds.
        max_outputs: not read. The rows that cu_kv_comp reserves bound the windows of a request.
    """
    pools = _pools(paged_kv, paged_score, output, page_size, head_dim, compress_ratio)
    tables = _tables(block_table_kv, block_table_score, batch_size)
    kvfold.prefill_compress(
        kv_score, ape, *pools, *tables, output, first("kv_lens", kv_lens, batch_size),
        first("cu_seq_lens", cu_seq_lens, batch_size + 1),
        first("cu_kv_comp", cu_kv_comp, batch_size + 1), compress_ratio,
    )  # fmt: skip


def _pools(
    paged_kv: Tensor,
    paged_score: Tensor,
    output: Tensor,
    page_size: int,
    head_dim: int,
    compress_ratio: int,
) -> tuple[Tensor, Tensor]:
    """Both pools of the state as [num_pages, page_size, state_dim]."""
    if output.shape[-1] != head_dim:
        refuse("output", f"of shape {list(output.shape)}", f"[num_outputs, head_dim = {head_dim}]")
    state_dim = 2 * head_dim if compress_ratio == OVERLAP_RATIO else head_dim
    return (
        _pool("paged_kv", paged_kv, page_size, state_dim),
        _pool("paged_score", paged_score, page_size, state_dim),
    )


def _pool(name: str, pool: Tensor, page_size: int, state_dim: int) -> Tensor:
    shape = pool.shape
    if len(shape) == 3 and shape[1] == page_size and shape[2] == state_dim:
        return pool
    page = page_size * state_dim
    if page < 1 or not pool.is_contiguous() or pool.numel() % page:
        value = f"of shape {list(shape)} and strides {pool.stride()}"
        refuse(name, value, f"[num_pages, {page_size}, {state_dim}], or contiguous pages of that")
    return pool.view(-1, page_size, state_dim)


def _tables(
    block_table_kv: Tensor, block_table_score: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The block tables of the batch; one tensor if they are one."""
    if batch_size < 0:
        refuse("batch_size", batch_size, "0 or more")
    kv = first("block_table_kv", block_table_kv, batch_size)
    if block_table_score is block_table_kv:
        return kv, kv
    return kv, first("block_table_score", block_table_score, batch_size)


def _uniform(like: Tensor, batch_size: int, next_n: int) -> Tensor:
    """[batch_size], int32, every element next_n, on the device of a tensor."""
    device, on_gpu = like.device, like.is_cuda
    stream = internals.raw_stream(device.index) if on_gpu else 0
    made = _uniform_counts.setdefault((device, batch_size, next_n), {})
    if stream in made:
        return made[stream]
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if capturing and made:  # filled long ago: a graph runs after its capture
        return next(iter(made.values()))
    counts = torch.full((batch_size,), next_n, dtype=torch.int32, device=device)
    if not capturing:  # else only a replay fills it
        made[stream] = counts
    return counts
