"""The ops that reduce windows. Names and order of arguments are TensorRT-LLM's."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.adapters.trtllm.step import Tensors, first, refuse, shared
from kvfold.runtime import internals
from kvfold.runtime.torch_op import torch_op

MAX_NEXT_N = 8
OVERLAP_RATIO = 4  # windows of this ratio overlap, those of others do not

# kvfold's functions without the Python call around them.
_paged_kv_compress = torch_op("paged_kv_compress")
_prefill_compress = torch_op("prefill_compress")

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
        paged_score: the score state, likewise. It may be the same memory as paged_kv, if the block
            tables are two tensors: a page is then named by one of them alone.
        cu_seq_lens: [batch_size + 1]: the row of kv_score where a request's new tokens begin.
        next_n: new tokens of every request; with new_tokens_per_seq, the most that one has.
        new_tokens_per_seq: [batch_size], int32: the new tokens of each request.
    """
    metadata = (kv_lens, cu_seq_lens, cu_kv_comp, block_table_kv)
    if block_table_score is not block_table_kv:
        metadata += (block_table_score,)
    is_ragged = new_tokens_per_seq is not None
    if is_ragged:
        metadata += (new_tokens_per_seq,)
    sizes = (batch_size, page_size, head_dim, compress_ratio, next_n, is_ragged)
    views, new_tokens = shared(_decode, sizes, metadata, (output, paged_kv, paged_score))
    if views.pages is not None:
        paged_kv, paged_score = paged_kv.view(views.pages), paged_score.view(views.pages)
    _paged_kv_compress(
        kv_score, ape, paged_kv, paged_score, views.block_table_kv, views.block_table_score, output,
        views.kv_lens, views.cu_seq_lens, views.cu_kv_comp, compress_ratio, next_n,
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
    metadata = (kv_lens, cu_seq_lens, cu_kv_comp, block_table_kv)
    if block_table_score is not block_table_kv:
        metadata += (block_table_score,)
    sizes = (batch_size, page_size, head_dim, compress_ratio)
    views = shared(_Views, sizes, metadata, (output, paged_kv, paged_score))
    if views.pages is not None:
        paged_kv, paged_score = paged_kv.view(views.pages), paged_score.view(views.pages)
    _prefill_compress(
        kv_score, ape, paged_kv, paged_score, views.block_table_kv, views.block_table_score, output,
        views.kv_lens, views.cu_seq_lens, views.cu_kv_comp, compress_ratio,
    )  # fmt: skip


class _Views:
    """A call's metadata as kvfold takes it: cut to the batch.

    Attributes:
        pages: the shape of both pools of the state for kvfold; None if they have it.
    """

    def __init__(self, sizes: tuple, metadata: Tensors, state: Tensors) -> None:
        """Raises ValueError for what does not go together.

        Args:
            sizes: batch_size, page_size, head_dim, compress_ratio.
            metadata: kv_lens, cu_seq_lens, cu_kv_comp, block_table_kv and, if it is another one,
                block_table_score.
            state: output, paged_kv, paged_score.
        """
        batch_size, page_size, head_dim, compress_ratio = sizes
        output, *pools = state
        kv_lens, cu_seq_lens, cu_kv_comp, block_table_kv, *others = metadata
        if output.shape[-1] != head_dim:
            accepted = f"[num_outputs, head_dim = {head_dim}]"
            refuse("output", f"of shape {list(output.shape)}", accepted)
        if batch_size < 0:
            refuse("batch_size", batch_size, "0 or more")
        self.pages = None
        state_dim = 2 * head_dim if compress_ratio == OVERLAP_RATIO else head_dim
        for name, pool in zip(("paged_kv", "paged_score"), pools, strict=True):
            if not _has_pages(name, pool, page_size, state_dim):
                self.pages = (-1, page_size, state_dim)
        self.kv_lens = first("kv_lens", kv_lens, batch_size)
        self.cu_seq_lens = first("cu_seq_lens", cu_seq_lens, batch_size + 1)
        self.cu_kv_comp = first("cu_kv_comp", cu_kv_comp, batch_size + 1)
        self.block_table_kv = first("block_table_kv", block_table_kv, batch_size)
        self.block_table_score = self.block_table_kv
        if others:
            self.block_table_score = first("block_table_score", others[0], batch_size)


def _decode(sizes: tuple, metadata: Tensors, state: Tensors) -> tuple[_Views, Tensor]:
    """The views of a decode call, and the new tokens of each request.

    Args:
        sizes: those of _Views, next_n, and whether new_tokens_per_seq is behind the metadata.
    """
    next_n, is_ragged = sizes[4:]
    if not 1 <= next_n <= MAX_NEXT_N:
        refuse("next_n", next_n, f"1 to {MAX_NEXT_N}")
    views = _Views(sizes[:4], metadata[:-1] if is_ragged else metadata, state)
    if is_ragged:
        return views, first("new_tokens_per_seq", metadata[-1], sizes[0])
    return views, _uniform(views.kv_lens, sizes[0], next_n)


def _has_pages(name: str, pool: Tensor, page_size: int, state_dim: int) -> bool:
    """Whether a pool is [num_pages, page_size, state_dim]; else it is contiguous pages of that."""
    shape, page = pool.shape, page_size * state_dim
    if len(shape) == 3 and shape[1:] == (page_size, state_dim):
        return True
    if page < 1 or not pool.is_contiguous() or pool.numel() % page:
        value = f"of shape {list(shape)} and strides {pool.stride()}"
        refuse(name, value, f"[num_pages, {page_size}, {state_dim}], or contiguous pages of that")
    return False


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
