"""What the references of the state ops share: rows of the paged state, and the window reduction.

All functions work on the requests, rows and windows that have work, all at once. To find them they
synchronise, so they cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Stored = Callable[[Tensor, Tensor], Tensor]
"""Of (request, position), both int64 of one shape: bool, whether a new row is to be stored."""

CHUNK = 1 << 20
"""Elements of state gathered at a time: bounds memory and stays in the caches."""


@dataclass(frozen=True)
class Requests:
    """The requests of a call, int64 [batch] each. One that makes no sense has no new tokens.

    Attributes:
        begin: row of kv_score of its first new token.
        start: position of its first new token.
        new: its new tokens.
        length: its tokens after the call.
    """

    begin: Tensor
    start: Tensor
    new: Tensor
    length: Tensor

    @classmethod
    def read(
        cls,
        kv_lens: Tensor,
        cu_seq_lens: Tensor,
        num_tokens: int,
        next_n: int | None = None,
        new_tokens: Tensor | None = None,
    ) -> Requests:
        """Reads the metadata. A request with more than next_n new tokens makes no sense."""
        # In 64 bits, in which no sum of int32 metadata overflows.
        begin, length = cu_seq_lens[:-1].long(), kv_lens.long()
        new = cu_seq_lens[1:].long() - begin if new_tokens is None else new_tokens.long()
        valid = (begin >= 0) & (begin + new <= num_tokens) & (new >= 0) & (new <= length)
        if next_n is not None:
            valid &= new <= next_n
        new = torch.where(valid, new, 0)
        return cls(begin, length - new, new, length)


@dataclass(frozen=True)
class Windows:
    """Windows that close and have an output row: request, window and row, int64 [windows] each."""

    request: Tensor
    window: Tensor
    target: Tensor


def closing_windows(
    requests: Requests, cu_outputs: Tensor, num_outputs: int, compress_ratio: int
) -> Windows:
    """The windows that close in a call and whose output row is reserved and exists."""
    count = requests.length // compress_ratio - requests.start // compress_ratio
    request, c = expand(torch.where(requests.new > 0, count, 0))
    window = requests.start[request] // compress_ratio + c
    target = cu_outputs[request].long() + c
    limit = cu_outputs[request + 1].long().clamp(max=num_outputs)
    written = (target >= 0) & (target < limit)
    return Windows(request[written], window[written], target[written])


def run(arguments: Any, output: Tensor, requests: Requests, stored: Stored) -> Tensor:
    """Does what a state op does: reduces the windows that close, and stores new rows.

    Args:
        arguments: of a state op, checked.
        output: [num_outputs, head_dim], bf16 or fp32: gets the compressed rows.
        requests: of the call.
        stored: which new rows are to be stored.

    Returns:
        [num_outputs], bool: the rows of output that a window fills.
    """
    a = arguments
    rows = StateRows(
        kv_score=a.kv_score,
        ape=a.ape,
        paged_kv=a.paged_kv,
        paged_score=a.paged_score,
        tables=(a.block_table_kv, a.block_table_score),
        requests=requests,
        stored=stored,
        compress_ratio=a.compress_ratio,
        ape_in_state=a.ape_in_state,
    )
    # Reduced first: with a ring, the store may overwrite rows that a window still reads.
    filled = torch.zeros(len(output), dtype=torch.bool, device=output.device)
    if a.work != "store":
        windows = closing_windows(requests, a.cu_outputs, len(output), a.compress_ratio)
        rows.reduce(windows, output)
        filled[windows.target] = True
    if a.work != "reduce":
        rows.store()
    return filled


def run_decode(arguments: Any, output: Tensor) -> Tensor:
    """Runs a decode op: every new row is stored. Arguments and result as those of `run`."""
    a = arguments
    requests = Requests.read(a.kv_lens, a.cu_seq_lens, a.kv_score.size(0), a.next_n, a.new_tokens)
    return run(a, output, requests, lambda request, position: torch.ones_like(position).bool())


def run_prefill(arguments: Any, output: Tensor) -> Tensor:
    """Runs a prefill op: write_state says what is stored. Arguments and result as of `run`."""
    a, head_dim = arguments, output.size(1)
    requests = Requests.read(a.kv_lens, a.cu_seq_lens, a.kv_score.size(0))
    return run(
        a,
        output,
        requests,
        lambda request, position: _stored(a, head_dim, requests.length[request], position),
    )


def _stored(arguments: Any, head_dim: int, length: Tensor, position: Tensor) -> Tensor:
    """Which new rows of requests of some lengths are stored: bool, of the shape of position."""
    a = arguments
    if a.write_state == "all":
        return torch.ones_like(position, dtype=torch.bool)
    chosen = position >= _first_needed(a, head_dim, (length - a.max_rollback).clamp(min=0))
    if a.state_period:
        # The next restart after the position. The needs of later ones begin later.
        restart = (position // a.state_period + 1) * a.state_period
        chosen |= (restart <= length) & (position >= _first_needed(a, head_dim, restart))
    return chosen


def _first_needed(arguments: Any, head_dim: int, tokens: Tensor) -> Tensor:
    """The first position that a decode from this many tokens on may read."""
    overlap, ratio = arguments.paged_kv.size(2) != head_dim, arguments.compress_ratio
    return ((tokens // ratio - int(overlap)) * ratio).clamp(min=0)


@dataclass(frozen=True)
class StateRows:
    """The rows of a call: new ones in kv_score, old ones in the paged state.

    Attributes:
        kv_score, ape, paged_kv, paged_score: as the op takes them.
        tables: block_table_kv and block_table_score.
        requests: of the call.
        stored: which new rows are to be stored.
        compress_ratio: tokens per window.
        ape_in_state: whether the state holds score + ape, else the raw score.
    """

    kv_score: Tensor
    ape: Tensor
    paged_kv: Tensor
    paged_score: Tensor
    tables: tuple[Tensor, Tensor]
    requests: Requests
    stored: Stored
    compress_ratio: int
    ape_in_state: bool

    def store(self) -> None:
        """Writes every new row that is to be stored and has a page."""
        request, t = expand(self.requests.new)
        position = self.requests.start[request] + t
        place = self._locate(request, position)
        chosen = place.present & self.stored(request, position)
        kv, score = self._new(self.requests.begin[request] + t, position)
        slot = position[chosen] % self.paged_kv.size(1)
        self.paged_kv[place.page_kv[chosen], slot] = kv[chosen]
        self.paged_score[place.page_score[chosen], slot] = score[chosen]

    def reduce(self, windows: Windows, output: Tensor) -> None:
        """Writes the rows of windows to output."""
        head_dim, state_dim = output.size(1), self.paged_kv.size(2)
        # A window's rows have these offsets from its first position. An overlapping window takes
        # part 0 of the state's columns from the window before it, part 1 from its own positions.
        parts = state_dim // head_dim
        row = torch.arange(parts * self.compress_ratio, device=output.device)
        offset, part = row - (parts - 1) * self.compress_ratio, row // self.compress_ratio
        chunk = max(1, CHUNK // (row.numel() * state_dim))
        for i in range(0, windows.window.numel(), chunk):
            at = slice(i, i + chunk)
            position = windows.window[at, None] * self.compress_ratio + offset
            request = windows.request[at, None].expand_as(position)
            present, kv, score = self._rows(request, position)
            columns = part[:, None] * head_dim + torch.arange(head_dim, device=output.device)
            columns = columns.expand(*position.shape, head_dim)
            kv, score = kv.gather(2, columns), score.gather(2, columns)
            score[~present] = -torch.inf
            weight = torch.exp(score - score.amax(1, keepdim=True))
            weight[~present] = 0
            kv[~present] = 0
            compressed, total = sum_rows(weight * kv), sum_rows(weight)
            # The row of the largest score weighs 1: total is 0 only if no row is present.
            compressed /= total.masked_fill_(total == 0, 1)
            output[windows.target[at]] = compressed.to(output.dtype)

    def _rows(self, request: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Presence [...], KV and score with ape [..., state_dim] in fp32, of some positions."""
        place = self._locate(request, position)
        t = position - self.requests.start[request]
        is_new = (t >= 0) & (position >= 0)
        present = place.present | (is_new & ~self.stored(request, position))
        shape = (*position.shape, self.paged_kv.size(2))
        kv = torch.zeros(shape, dtype=torch.float32, device=position.device)
        score = torch.zeros_like(kv)
        new, old = present & is_new, present & ~is_new
        token = self.requests.begin[request] + t
        new_kv, new_score = self._new(token[new], position[new])
        kv[new], score[new] = new_kv.float(), new_score.float()
        slot = position[old] % self.paged_kv.size(1)
        kv[old] = self.paged_kv[place.page_kv[old], slot].float()
        score[old] = self.paged_score[place.page_score[old], slot].float()
        if not self.ape_in_state:
            score += self.ape[position % self.compress_ratio]
        return present, kv, score

    def _new(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """KV and score of new rows as the state holds them."""
        kv, score = self.kv_score[token].split(self.paged_kv.size(2), dim=-1)
        if self.ape_in_state:
            score = score.float() + self.ape[position % self.compress_ratio]
        return kv.to(self.paged_kv.dtype), score.to(self.paged_score.dtype)

    def _locate(self, request: Tensor, position: Tensor) -> _Place:
        """The pages of some positions' rows in both pools, and whether the rows are present."""
        logical = position // self.paged_kv.size(1)
        known = (position >= 0) & (logical < self.tables[0].size(1))
        pages = []
        present = known
        for table in self.tables:
            page = torch.full(position.shape, -1, dtype=torch.int64, device=position.device)
            page[known] = table[request[known], logical[known]].long()
            present = present & (page >= 0) & (page < self.paged_kv.size(0))
            pages.append(page)
        return _Place(present, *pages)


@dataclass(frozen=True)
class _Place:
    present: Tensor
    page_kv: Tensor
    page_score: Tensor


def sum_rows(x: Tensor) -> Tensor:
    """[windows, rows, columns] -> [windows, columns] in x's memory, halving the rows.

    The last bits of torch's sum differ with the number of windows; those of this sum do not.
    """
    while x.size(1) > 1:
        half = (x.size(1) + 1) // 2
        x[:, : x.size(1) - half].add_(x[:, half:])
        x = x[:, :half]
    return x[:, 0]


def expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """[2, 0, 3] -> [0, 0, 2, 2, 2] and [0, 1, 0, 1, 2]: each count's index and the place in it."""
    index = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return index, torch.arange(index.numel(), device=counts.device) - first[index]
