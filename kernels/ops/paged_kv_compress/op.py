"""paged_kv_compress: the public function."""

from __future__ import annotations

from torch import Tensor

from kvfold.runtime.torch_op import torch_op

_op = torch_op("paged_kv_compress")


def paged_kv_compress(
    kv_score: Tensor,
    ape: Tensor,
    paged_kv: Tensor,
    paged_score: Tensor,
    block_table_kv: Tensor,
    block_table_score: Tensor,
    output: Tensor,
    kv_lens: Tensor,
    cu_seq_lens: Tensor,
    cu_outputs: Tensor,
    compress_ratio: int,
    next_n: int,
    *,
    prefetch: str = "none",
    ape_in_state: bool = True,
    work: str = "all",
    new_tokens: Tensor | None = None,
) -> None:
    """Stores the new tokens in the paged state and compresses the windows that they close.

    The op never synchronises. It launches on torch's current stream. state_dim is 2 * head_dim for
    an overlapping window, else head_dim. Last dimensions are contiguous, and the rows of
    floating-point tensors are 16-byte aligned; all outer strides are honoured.

    Args:
        kv_score: [num_tokens, 2 * state_dim], bf16 or fp32: the new tokens' KV, then their score.
        ape: [compress_ratio, state_dim], fp32: absolute position embedding. Row
            position % compress_ratio is added to a token's score.
        paged_kv: [num_pages, page_size, state_dim], bf16 or fp32, mutated: the KV state.
        paged_score: like paged_kv, mutated: the score state. The two may be one pool, if the block
            tables are two tensors: a page is then named by one of them alone.
        block_table_kv: [batch, max_pages], int32: logical page -> physical page of paged_kv.
        block_table_score: [batch, max_pages], int32: the same for paged_score.
        output: [num_outputs, head_dim], bf16 or fp32, mutated: the compressed rows.
        kv_lens: [batch], int32: tokens per request after this step.
        cu_seq_lens: [batch + 1], int32: prefix sums of the new tokens per request.
        cu_outputs: [batch + 1], int32: prefix sums of the output rows reserved per request.
        compress_ratio: tokens per window.
        next_n: the most new tokens that any request has in this step.
        prefetch: what the CUDA kernels (sm_90 and later) read while the kernel before them on the
            stream still runs. "none": nothing. "metadata": kv_lens, cu_seq_lens, cu_outputs,
            new_tokens and the block tables. "state": these, and old rows of the state. They wait
            for its end before they read anything else, and before they write. The caller promises
            that no kernel that may still run then writes what is read early; docs/kernel.md says
            which kernels these are. "metadata" is safe for two calls in a row on one state.
        ape_in_state: true: the score state holds score + ape. False: it holds the raw score, and
            ape is added in fp32 as rows are read. With fp32 state both give the same bits.
        work: "all", or one of the two steps, "store" or "reduce". Two calls, "reduce" and then
            "store", serve a state in which new rows overwrite rows that a window still reads. New
            rows come from kv_score in every case.
        new_tokens: [batch], int32: how many new tokens each request has, from row cu_seq_lens[b] of
            kv_score on. cu_seq_lens[b + 1] then says nothing of request b. It serves an engine that
            gives requests more rows of kv_score than they use. None: all rows up to
            cu_seq_lens[b + 1].

    Raises:
        ValueError: an argument's type, shape, dtype, device, strides or memory is not accepted.
            Nothing is launched or written.
        TableError: no row of the table serves the problem. Nothing is launched or written.
    """
    _op(
        kv_score, ape, paged_kv, paged_score, block_table_kv, block_table_score, output, kv_lens,
        cu_seq_lens, cu_outputs, compress_ratio, next_n,
        prefetch=prefetch, ape_in_state=ape_in_state, work=work, new_tokens=new_tokens,
    )  # fmt: skip
