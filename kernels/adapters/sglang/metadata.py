"""kvfold's metadata of a plan: which tensors there are.

Lengths are rebased, so that a block table of few pages serves any position: a multiple of the
compress ratio is subtracted from a request's length, such that the window before the first one that
is touched is window 0. Where none precedes, nothing is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Requests:
    """What a state op gets, int32: lengths [batch], prefix sums [batch + 1], table [batch, pages].

    Every second request of a prefill is one that kvfold skips: it takes the place of the tokens
    between two others. The prefix sums of such metadata need not be monotone.
    """

    kv_lens: Tensor
    cu_seq_lens: Tensor
    cu_outputs: Tensor
    block_table: Tensor

    @classmethod
    def sizes(cls, batch: int, pages: int) -> list[int]:
        """Elements of the four tensors; `pages` are those that the table has memory for."""
        return [batch, batch + 1, batch + 1, pages]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], table: tuple[int, int], *, row_stride: int) -> Requests:
        """Four tensors of `sizes`, with a table of some shape and row stride in the last one."""
        kv_lens, cu_seq_lens, cu_outputs, pages = tensors
        return cls(kv_lens, cu_seq_lens, cu_outputs, pages.as_strided(table, (row_stride, 1)))


@dataclass(frozen=True)
class DecodeMetadata:
    """Of a decode plan.

    Attributes:
        requests: one per entry, with one new token each.
        positions: [batch], int32: of RoPE; -1 where no window closes.
    """

    requests: Requests
    positions: Tensor


@dataclass(frozen=True)
class PrefillMetadata:
    """Of a prefill plan.

    Attributes:
        reduce: of the call that reduces. A request is a run of windows that overlap.
        store: of the call that stores. A request is one token.
    """

    reduce: Requests
    store: Requests


@dataclass(frozen=True)
class RowMetadata:
    """Of the compressed rows: positions [rows], int32, and slots [rows], int64."""

    positions: Tensor
    slots: Tensor
