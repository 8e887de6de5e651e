"""The metadata of a step: from vLLM's to that of kvfold's ops, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.ops.locate_rows.op import locate_rows
from kvfold.runtime.arguments import refuse

MOST_DECODE_TOKENS = 8
"""New tokens of a request up to which the kernels of paged_kv_compress_store are made."""


@dataclass(frozen=True)
class StepMetadata:
    """What layers share in a step. They have one compress_ratio, state pages and cache pages.

    Attributes:
        compress_ratio: tokens per window.
        block_size: rows of a page of the state.
        num_tokens: tokens that have a slot.
        next_n: the most new tokens of a request; None if paged_kv_compress_store has no kernel
            for so many.
        block_table: [requests, pages], int32, of the state.
        kv_lens, cu_seq_lens, cu_outputs, positions, slots: as kvfold.paged_kv_compress_store takes
            them.
    """

    compress_ratio: int
    block_size: int
    num_tokens: int
    next_n: int | None
    block_table: Tensor
    kv_lens: Tensor
    cu_seq_lens: Tensor
    cu_outputs: Tensor
    positions: Tensor
    slots: Tensor

    @classmethod
    def build(
        cls,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        slot_mapping: Tensor,
        cache_slot_mapping: Tensor,
        block_size: int,
        compress_ratio: int,
        max_query_len: int,
        *,
        replays: bool = True,
    ) -> StepMetadata:
        """Makes the metadata of a step, by a fixed number of small kernels on the current stream.

        It reads no tensor on the host, so it can be captured in a CUDA graph.

        A token whose slot is negative is not stored, and its kv_score is not used. Windows read
        what the state has in its place, and a window that it would close is not made. A request's
        other tokens must follow each other: tokens without a slot are its first, its last, or all.
        A request that has them elsewhere is skipped as a whole.

        The page of a token that is stored comes from block_table, as vLLM's slots do.

        Args:
            query_start_loc: [batch + 1], int32: prefix sums of the new tokens per request. Tokens
                beyond the last are padding.
            seq_lens: [batch], int32: tokens per request after the step.
            block_table: [batch, max_pages], int32: pages of the state.
            slot_mapping: [num_tokens], int64: a token's slot in the state; negative: none.
            cache_slot_mapping: [num_cache_tokens], int64: the slot in the cache of the window that
                a token closes; negative: none.
            block_size: rows of a page of the state.
            compress_ratio: tokens per window.
            max_query_len: the most new tokens of a request. One that has more may be skipped as a
                whole.
            replays: whether a request may have tokens without a slot beside tokens with one. False
                is faster. A request whose first token has no slot is then skipped as a whole, and
                all tokens of others are stored.

        Raises:
            ValueError: an argument's shape, dtype or value is not accepted. Nothing is launched.
        """
        batch, num_tokens = seq_lens.numel(), slot_mapping.numel()
        _check("seq_lens", seq_lens, torch.int32, (batch,))
        _check("query_start_loc", query_start_loc, torch.int32, (batch + 1,))
        _check("block_table", block_table, torch.int32, (batch, None))
        _check("slot_mapping", slot_mapping, torch.int64, (None,))
        _check("cache_slot_mapping", cache_slot_mapping, torch.int64, (None,))
        for name, value, least in (
            ("block_size", block_size, 1),
            ("compress_ratio", compress_ratio, 2),
            ("max_query_len", max_query_len, 0),
        ):
            if type(value) is not int or value < least:
                refuse(_BUILD, name, repr(value), f"an int of at least {least}")

        if not batch or not num_tokens or not block_table.size(1):
            requests = _Requests(seq_lens, seq_lens, query_start_loc, block_table)
        elif replays:
            requests = _stored_parts(
                query_start_loc, seq_lens, block_table, slot_mapping, block_size, compress_ratio,
                max_query_len,
            )  # fmt: skip
        else:
            first = slot_mapping.index_select(0, query_start_loc[:-1].clamp(0, num_tokens - 1))
            # The ops skip a request of length 0 that has new tokens.
            lengths = seq_lens * (first >= 0)
            requests = _Requests(lengths, lengths, query_start_loc, block_table)

        cu_outputs, num_outputs = _reserve_rows(
            requests.cu_seq_lens, num_tokens, compress_ratio, max_query_len
        )
        positions = torch.empty(num_outputs, dtype=torch.int32, device=seq_lens.device)
        # If query_start_loc is wrong, windows may fill rows that locate_rows does not reach.
        slots = torch.full((num_outputs,), -1, dtype=torch.int64, device=seq_lens.device)
        if num_outputs:
            locate_rows(
                requests.lengths, requests.cu_seq_lens, cu_outputs, positions, slots,
                compress_ratio, 1, token_slots=cache_slot_mapping, num_tokens=num_tokens,
            )  # fmt: skip
        return cls(
            compress_ratio=compress_ratio,
            block_size=block_size,
            num_tokens=num_tokens,
            next_n=max(max_query_len, 1) if max_query_len <= MOST_DECODE_TOKENS else None,
            block_table=requests.block_table,
            kv_lens=requests.kv_lens,
            cu_seq_lens=requests.cu_seq_lens,
            cu_outputs=cu_outputs,
            positions=positions,
            slots=slots,
        )


_BUILD = "adapters.vllm.StepMetadata.build"


@dataclass(frozen=True)
class _Requests:
    """Requests as an op takes them.

    Attributes:
        lengths: tokens per request.
        kv_lens: the same, less a multiple of compress_ratio that block_table does not cover.
        cu_seq_lens: prefix sums of their new tokens.
        block_table: pages of the state.
    """

    lengths: Tensor
    kv_lens: Tensor
    cu_seq_lens: Tensor
    block_table: Tensor


def _reserve_rows(
    cu_seq_lens: Tensor, num_tokens: int, compress_ratio: int, max_query_len: int
) -> tuple[Tensor, int]:
    """cu_outputs and its last value, or more. n tokens close at most ceil(n / R) windows."""
    count, device = cu_seq_lens.size(0), cu_seq_lens.device
    if max_query_len <= MOST_DECODE_TOKENS:
        rows = -(-max_query_len // compress_ratio) or 1
        cu_outputs = torch.arange(0, count * rows, rows, dtype=torch.int32, device=device)
        return cu_outputs, (count - 1) * rows
    # Request b's rows start at begin // R + b, so that it has n // R + 1 of them or more.
    cu_outputs = torch.arange(count, dtype=torch.int32, device=device)
    return cu_outputs.add_(cu_seq_lens // compress_ratio), num_tokens // compress_ratio + count - 1


def _stored_parts(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    block_size: int,
    compress_ratio: int,
    max_query_len: int,
) -> _Requests:
    """Requests of the tokens that are stored, and between them requests of the tokens that are not.

    A request of tokens that are not stored has length 0, so that the ops skip it: it cannot have
    more new tokens than tokens. block_table cannot have a row for it without a copy, and a block
    table of vLLM may be large. The copy holds the few pages that the step touches, and kv_lens are
    counted from the first of them.
    """
    begin, end, in_a_row = _stored_tokens(query_start_loc, slot_mapping)
    valid = in_a_row & (end - begin <= max_query_len)
    # From the end of query_start_loc: seq_lens counts the tokens without a slot too.
    lengths = (seq_lens - query_start_loc[1:] + end) * valid

    # Pages and windows start at multiples of this, so that ape's rows and windows stay the same.
    period = math.lcm(compress_ratio, block_size)
    # An overlapping window reads the window before it.
    first_read = (lengths - (end - begin) - compress_ratio).clamp_(min=0)
    base = first_read // period * period
    touched = max_query_len + compress_ratio + period
    pages = _pages(block_table, base // block_size, -(-touched // block_size))
    return _Requests(
        _alternate(lengths, torch.zeros_like(lengths)),
        _alternate(lengths - base, torch.zeros_like(lengths)),
        torch.stack([begin, end], dim=1).flatten(),
        pages.repeat_interleave(2, dim=0)[:-1],
    )


def _stored_tokens(query_start_loc: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first token of each request that has a slot, int32 [batch]; their end; are they in a row?

    Whatever query_start_loc says, the tokens are 0 .. num_tokens, and begin <= end.
    """
    count = (slot_mapping >= 0).cumsum(0, dtype=torch.int32)
    before = torch.nn.functional.pad(count, (1, 0))  # tokens with a slot before a token
    bounds = query_start_loc.clamp(0, slot_mapping.numel())
    stored = before.index_select(0, bounds)
    first = torch.searchsorted(count, stored[:-1] + 1, out_int32=True)
    begin = torch.minimum(first, bounds[1:])
    end = begin + stored.diff().clamp_(min=0)
    return begin, end, before.index_select(0, end) == stored[1:]


def _pages(block_table: Tensor, first: Tensor, count: int) -> Tensor:
    """Columns first .. first + count - 1 of each row; -1 beyond the table."""
    columns = torch.arange(count, device=block_table.device) + first[:, None]
    last = block_table.size(1) - 1
    return block_table.gather(1, columns.clamp(0, last)).masked_fill_(columns > last, -1)


def _alternate(a: Tensor, b: Tensor) -> Tensor:
    """[a0, a1], [b0, b1] -> [a0, b0, a1]."""
    return torch.stack([a, b], dim=1).flatten()[:-1]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Refuses a tensor of another dtype or shape; None stands for any length."""
    if tensor.dtype != dtype:
        refuse(_BUILD, name, f"of {tensor.dtype}", str(dtype))
    found = tensor.shape
    if len(found) != len(shape) or any(
        b is not None and a != b for a, b in zip(found, shape, strict=True)
    ):
        accepted = ["any" if length is None else str(length) for length in shape]
        refuse(_BUILD, name, f"of shape {list(found)}", f"shape [{', '.join(accepted)}]")
