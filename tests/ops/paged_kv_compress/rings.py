"""States that keep the last rows of a request alone, against states that keep all of them.

A ring has fewer rows than its request has tokens: position p lies in row p % rows. Decoding in it
must give the bits of decoding in a state without bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import torch
from calls import STATE, Call, make
from numerics import assert_same_bits
from torch import Tensor

REQUESTS = 2
RunAll = Callable[[Sequence[Call]], None]


def each(run: Callable[[Call], None]) -> RunAll:
    """Makes calls in turn."""

    def run_all(calls: Sequence[Call]) -> None:
        for call in calls:
            run(call)

    return run_all


@dataclass(frozen=True)
class Ring:
    """How the state of each request is a ring, and how calls address it.

    Attributes:
        rows: of the ring.
        rebased: lengths are less by whole windows, and the block table has the touched pages alone.
        two_calls: a step is a call with work="reduce" and one with work="store". Else it is one
            call, so no token may overwrite a row that a window of the step still reads.
    """

    compress_ratio: int
    rows: int
    page_size: int
    next_n: int
    rebased: bool
    two_calls: bool
    ape_in_state: bool = True

    def __post_init__(self):
        assert self.rows >= self.window_rows and not self.rows % self.page_size
        # At worst the first of next_n new tokens closes a window, whose first row is still read.
        assert self.two_calls or self.window_rows + self.next_n - 1 <= self.rows

    def __str__(self) -> str:
        how = ("rebased",) * self.rebased + ("two_calls",) * self.two_calls
        raw = ("raw_score",) * (not self.ape_in_state)
        return "_".join((f"r{self.compress_ratio}_rows{self.rows}_n{self.next_n}", *how, *raw))

    @property
    def window_rows(self) -> int:
        """Rows that a window reads."""
        return self.compress_ratio * (2 if self.compress_ratio == 4 else 1)


def _rings():
    for ratio, rows, page_size, next_n in (
        (4, 8, 1, 1),
        (4, 16, 2, 8),
        (4, 128, 4, 8),
        (4, 256, 8, 5),
        (128, 128, 8, 1),
        (128, 256, 4, 8),
    ):
        yield Ring(ratio, rows, page_size, next_n, rebased=True, two_calls=False)
    for ratio, rows, page_size, next_n in (
        (4, 8, 4, 8),
        (4, 16, 8, 8),
        (4, 128, 1, 4),
        (4, 256, 2, 8),
        (128, 128, 8, 8),
        (128, 256, 16, 8),
    ):
        yield Ring(ratio, rows, page_size, next_n, rebased=False, two_calls=True)
    yield Ring(4, 8, 8, 8, rebased=True, two_calls=True, ape_in_state=False)
    yield Ring(128, 128, 16, 8, rebased=True, two_calls=True, ape_in_state=False)


RINGS = tuple(_rings())


@dataclass(frozen=True)
class Decoding:
    """The calls that decode the same tokens in states without bound and in rings.

    Attributes:
        plain: one call per step.
        ring: one call per step, or two; both of a step have one output.
    """

    kind: Ring
    plain: list[Call]
    ring: list[Call]

    def compare(self, run: RunAll, run_ring: RunAll | None = None) -> None:
        """Makes all calls and compares outputs and states to the bit.

        Args:
            run: makes calls in turn.
            run_ring: makes those on the rings, if they are to be made in another way.
        """
        run(self.plain)
        (run_ring or run)(self.ring)
        per_step = len(self.ring) // len(self.plain)
        closed = 0
        for step, call in enumerate(self.plain):
            output = self.ring[per_step * (step + 1) - 1].output
            assert_same_bits(output, call.output, f"output of step {step}")
            closed += int((~call.output.isnan()).any(1).sum())
        assert closed >= REQUESTS
        plain, ring = self.plain[-1], self.ring[-1]
        for name in STATE:
            rows = getattr(ring, name).view(REQUESTS, self.kind.rows, -1)
            every = getattr(plain, name).view(REQUESTS, -1, rows.size(2))
            for request, length in enumerate(plain.kv_lens.tolist()):
                last = torch.arange(length - self.kind.rows, length, device=rows.device)
                mine = rows[request, last % self.kind.rows]
                assert_same_bits(mine, every[request, last], f"{name} of request {request}")


def decoding(kind: Ring, steps: int, device: torch.device | str = "cpu", **fields) -> Decoding:
    """Calls of 0 to next_n tokens per request. All rings are full at first.

    Args:
        fields: as `make` takes them.
    """
    rng = np.random.default_rng(0)
    ratio, page_size = kind.compress_ratio, kind.page_size
    new = rng.integers(int(kind.next_n == 1), kind.next_n + 1, (steps, REQUESTS))
    start = 2 * kind.rows + ratio - 1 - 3 * np.arange(REQUESTS)  # the first closes a window at once
    pages = -(-int((start + new.sum(0)).max()) // page_size)
    first = make(
        [(0, 0)] * REQUESTS, compress_ratio=ratio, page_size=page_size, next_n=kind.next_n,
        ape_in_state=kind.ape_in_state, output_dtype="fp32", **fields,
    )  # fmt: skip
    tokens = torch.from_numpy(
        rng.standard_normal((int(new.sum()), first.kv_score.size(1)), dtype=np.float32)
    ).to(first.kv_score.dtype)
    pools, rings = _states(kind, first, pages, start, device)
    per_ring = kind.rows // page_size
    calls: tuple[list[Call], list[Call]] = [], []
    logical = torch.arange(pages)
    request = torch.arange(REQUESTS)[:, None]
    for step in range(steps):
        begin, lens = new[:step].sum(), start + new[: step + 1].sum(0)
        plain = replace(
            first,
            **pools,
            kv_score=tokens[begin : begin + new[step].sum()].to(device),
            ape=first.ape.to(device),
            output=torch.full((REQUESTS * 8, first.output.size(1)), torch.nan, device=device),
            **_metadata(lens, new[step], device),
            **_tables((request * pages + logical).int(), device),
        )
        calls[0].append(plain)
        table, shift = request * per_ring + logical % per_ring, np.zeros(REQUESTS, int)
        if kind.rebased:
            table, shift = _touched(kind, table, lens - new[step], lens)
        in_ring = replace(
            plain,
            **rings,
            output=plain.output.clone(),
            **_metadata(lens - shift, new[step], device),
            **_tables(table.int(), device),
        )
        works = ("reduce", "store") if kind.two_calls else ("all",)
        calls[1].extend(replace(in_ring, work=work) for work in works)
    return Decoding(kind, *calls)


def _states(
    kind: Ring, like: Call, pages: int, lengths: np.ndarray, device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random states without bound, and rings with their last rows.

    Page p of request b is number b * pages + p; in a ring, b * (pages of a ring) + p.
    """
    pools, rings = {}, {}
    for seed, name in enumerate(STATE):
        shape = REQUESTS, pages * kind.page_size, like.paged_kv.size(2)
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        rows = rows.to(like.paged_kv.dtype)
        ring = torch.empty_like(rows[:, : kind.rows])
        for request, length in enumerate(lengths.tolist()):
            last = torch.arange(length - kind.rows, length)
            ring[request, last % kind.rows] = rows[request, last]
        pools[name], rings[name] = (
            x.reshape(-1, kind.page_size, shape[2]).clone().to(device) for x in (rows, ring)
        )
    return pools, rings


def _touched(kind: Ring, table: Tensor, start: np.ndarray, end: np.ndarray):
    """The columns of a table that a step touches, and by how many tokens these are rebased."""
    whole = kind.page_size // gcd(kind.page_size, kind.compress_ratio)  # windows that fill pages
    overlap = kind.window_rows // kind.compress_ratio - 1
    windows = np.maximum(0, start // kind.compress_ratio - overlap) // whole * whole
    shift = windows * kind.compress_ratio
    columns = -(-int((end - shift).max()) // kind.page_size)
    touched = torch.full((REQUESTS, columns), -1)
    for request, (by, last) in enumerate(zip(shift.tolist(), end.tolist(), strict=True)):
        pages = slice(by // kind.page_size, -(-last // kind.page_size))
        found = table[request, pages]
        touched[request, : found.numel()] = found
    return touched, shift


def _metadata(lens: np.ndarray, new: np.ndarray, device) -> dict[str, Tensor]:
    sums = np.concatenate(([0], new.cumsum()))
    values = {"kv_lens": lens, "cu_seq_lens": sums, "cu_outputs": 8 * np.arange(REQUESTS + 1)}
    return {name: torch.from_numpy(x.astype(np.int32)).to(device) for name, x in values.items()}


def _tables(table: Tensor, device) -> dict[str, Tensor]:
    table = table.to(device)
    return {"block_table_kv": table, "block_table_score": table}
