"""locate_rows: the public function."""

from __future__ import annotations

from torch import Tensor

from kvfold.ops.locate_rows.spec import UNBOUNDED
from kvfold.runtime.torch_op import torch_op

_op = torch_op("locate_rows")


def locate_rows(
    kv_lens: Tensor,
    cu_seq_lens: Tensor,
    cu_outputs: Tensor,
    positions: Tensor,
    slots: Tensor,
    compress_ratio: int,
    rows_per_page: int,
    *,
    block_table_cache: Tensor | None = None,
    token_slots: Tensor | None = None,
    num_tokens: int | None = None,
    next_n: int | None = None,
    new_tokens: Tensor | None = None,
) -> None:
    """Finds the position and the cache slot of every output row that a window fills.

    The windows of a request are those that close in the call: numbers S // R to L // R - 1, with
    R = compress_ratio, L = kv_lens[b] and S = L - (cu_seq_lens[b + 1] - cu_seq_lens[b]). Number i
    of them, from 0, fills row cu_outputs[b] + i if that is below cu_outputs[b + 1] and num_outputs.
    These are the rows of `output` that paged_kv_compress and prefill_compress write. One call
    serves all layers of a step that have the same compress_ratio.

    All other rows from cu_outputs[0] on get -1 in positions and slots. Rows before cu_outputs[0]
    stay as they are, so that a call for prompts and a call for decodes can share positions and
    slots: the call whose rows come first goes first.

    Any metadata is safe: nothing outside the tensors is read or written. What rows from
    cu_outputs[0] on get is specified if cu_outputs does not decrease.

    The op never synchronises. It launches on torch's current stream.

    Args:
        kv_lens: [batch], int32: tokens per request after this call.
        cu_seq_lens: [batch + 1], int32: prefix sums of the new tokens per request.
        cu_outputs: [batch + 1], int32: prefix sums of the output rows reserved per request.
        positions: [num_outputs], int32, mutated: the position of the first token of the window that
            fills the row, w * R for window w; -1 if none does.
        slots: [num_outputs], int64, mutated: where the row goes in the cache,
            page * rows_per_page + row of the page; -1 if no window fills the row or it has no page.
        compress_ratio: tokens per window, R.
        rows_per_page: rows of a page of the cache.
        block_table_cache: [batch, max_pages], int32: logical page -> page of the cache. Window w
            goes to row w % rows_per_page of page block_table_cache[b, w // rows_per_page]. It has
            no page if that is negative or outside the table.
        token_slots: [number of new tokens], int64, instead of block_table_cache: the slot of each
            new token. Window w goes to that of its last token, number
            cu_seq_lens[b] + (w + 1) * R - 1 - S. A token outside the tensor has no page.
        num_tokens: the rows of kv_score. As in the state ops, a request with cu_seq_lens beyond
            them is skipped. None or -1: the length of token_slots or, without it, no bound.
        next_n: as in paged_kv_compress, a request with more new tokens is skipped. None or -1: no
            bound. Without bounds, too, a request is skipped if cu_seq_lens is negative or decreases
            or if it has more new tokens than kv_lens.
        new_tokens: [batch], int32: how many new tokens each request has, if not all up to
            cu_seq_lens[b + 1]; as in paged_kv_compress.

    Raises:
        ValueError: an argument's type, shape, dtype, device, strides, memory or value is not
            accepted, or not exactly one of block_table_cache and token_slots is given. Nothing is
            launched or written.
        TableError: the table has no row for the op. Nothing is launched or written.
    """
    _op(
        kv_lens, cu_seq_lens, cu_outputs, positions, slots, compress_ratio, rows_per_page,
        num_tokens=UNBOUNDED if num_tokens is None else num_tokens,
        next_n=UNBOUNDED if next_n is None else next_n,
        block_table_cache=block_table_cache, token_slots=token_slots, new_tokens=new_tokens,
    )  # fmt: skip
