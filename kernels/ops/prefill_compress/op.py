"""prefill_compress: the public function."""

from __future__ import annotations

from torch import Tensor

from kvfold.runtime.torch_op import torch_op

_op = torch_op("prefill_compress")


def prefill_compress(
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
    *,
    write_state: str = "all",
    max_rollback: int = 0,
    state_period: int = 0,
    prefetch: str = "none",
    ape_in_state: bool = True,
    work: str = "all",
) -> None:
    """Compresses the windows that close, and stores new tokens in the paged state.

    A request may have any number of new tokens, from none to all of a long prompt, and requests of
    all sizes may be mixed. A window may begin in an earlier call. Whole, chunked and token-by-token
    runs give the same bits, because new rows are rounded to the state's dtype before they are
    reduced, whether they are stored or not. Work is balanced by rows and windows.

    The op never synchronises. It launches on torch's current stream. state_dim is 2 * head_dim for
    an overlapping window, else head_dim. Last dimensions are contiguous, and the rows of
    floating-point tensors are 16-byte aligned; all outer strides are honoured.

    Args:
        kv_score: [num_tokens, 2 * state_dim], bf16 or fp32: the new tokens' KV, then their score.
        ape: [compress_ratio, state_dim], fp32: absolute position embedding. Row
            position % compress_ratio is added to a token's score.
        paged_kv: [num_pages, page_size, state_dim], bf16 or fp32, mutated: the KV state.
        paged_score: like paged_kv, mutated: the score state. The two may be one pool, as those of
            paged_kv_compress.
        block_table_kv: [batch, max_pages], int32: logical page -> physical page of paged_kv.
        block_table_score: [batch, max_pages], int32: the same for paged_score.
        output: [num_outputs, head_dim], bf16 or fp32, mutated: the compressed rows.
        kv_lens: [batch], int32: tokens per request after this call.
        cu_seq_lens: [batch + 1], int32: prefix sums of the new tokens per request.
        cu_outputs: [batch + 1], int32: prefix sums of the output rows reserved per request.
        compress_ratio: tokens per window, R.
        write_state: which new rows go to the state. "all": every one. "tail": those that a later
            call may read. With L tokens after the call, S before it, and O = 1 for an overlapping
            window, else 0, these are the positions p >= ((L - max_rollback) // R - O) * R, and for
            each multiple m of state_period with S <= m <= L the positions
            (m // R - O) * R <= p < m. A new row that is to be stored and has no page is absent; one
            that is not to be stored counts whatever its page.
        max_rollback: for "tail": the most tokens that a decode after this call may reject.
        state_period: for "tail": a request may restart at every multiple of this many tokens, for
            example for prefix reuse at a page's end. 0: nowhere.
        prefetch, ape_in_state, work: as those of paged_kv_compress.

    Raises:
        ValueError: an argument's type, shape, dtype, device, strides or memory is not accepted.
            Nothing is launched or written.
        TableError: no row of the table serves the problem. Nothing is launched or written.
    """
    _op(
        kv_score, ape, paged_kv, paged_score, block_table_kv, block_table_score, output, kv_lens,
        cu_seq_lens, cu_outputs, compress_ratio, write_state=write_state,
        max_rollback=max_rollback, state_period=state_period, prefetch=prefetch,
        ape_in_state=ape_in_state, work=work,
    )  # fmt: skip
