"""SGLang's planner in plain Python, and a simulation of requests that it plans for.

Written from the facts of its C++ planner, without a line of the adapter. A simulation keeps what
each request's tokens projected to, and what every row of the state must hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.bench.adapters.sglang import DecodePlan, PrefillPlan

ONES = -1  # a 32-bit word of ones


def as_bytes(entries: list[tuple[int, ...]], width: int, device: str) -> Tensor:
    """Entries of 32-bit words as a uint8 tensor [entries, 4 * width]."""
    array = np.array(entries, dtype=np.int64).reshape(-1, width).astype(np.uint32)
    return torch.from_numpy(array.view(np.uint8).reshape(-1, 4 * width).copy()).to(device)


@dataclass(frozen=True)
class StateLayout:
    """Where the rows of the state are.

    Attributes:
        ratio: 4 or 128.
        ring: rows per request or, if paged, per page of the sliding window.
        swa_page: tokens of such a page; 0: a ring per request.
    """

    ratio: int
    ring: int
    swa_page: int = 0

    @property
    def overlap(self) -> bool:
        return self.ratio == 4

    @property
    def window_rows(self) -> int:
        return self.ratio * (2 if self.overlap else 1)

    def row(self, request: int, pages: list[int], position: int) -> int:
        """The state row of a position."""
        if not self.swa_page:
            return request * self.ring + position % self.ring
        location = pages[position // self.swa_page] * self.swa_page + position % self.swa_page
        return location // self.swa_page * self.ring + location % self.ring

    def is_stored(self, length: int, position: int) -> bool:
        """Whether a prefill that ends at `length` stores a new row."""
        ring, window_rows = self.ring, self.window_rows
        pad = ring - window_rows + 2 if ring > window_rows else 0
        first = length // self.ratio * self.ratio - (self.ratio if self.overlap else 0)
        if position >= min(first, length - pad):
            return True
        page = self.swa_page
        return self.overlap and bool(page) and position % page >= page - self.ratio


@dataclass
class Request:
    """A request: its number, its sliding-window pages, and the inputs of its tokens."""

    number: int
    pages: list[int]
    tokens: list[Tensor] = field(default_factory=list)


@dataclass
class Call:
    """One call: what SGLang passes, and what each closing window is.

    Attributes:
        plan: of the call.
        kv_score: [tokens, width].
        out_loc: [tokens], int64.
        closing: by row of the output, the window: (request, length of the request at the window's
            end, slot); None for a row that none fills. Windows of a prefill are in the order of
            their tokens, whatever that of the plan's entries.
        history: the tokens of each request at the call, by number.
        written: state row -> row of kv_score that it must hold after the call.
    """

    plan: Any
    kv_score: Tensor
    out_loc: Tensor
    closing: list[tuple[int, int, int] | None]
    history: dict[int, list[Tensor]]
    written: dict[int, int]


class Simulation:
    """Requests, and the plans of calls for them."""

    def __init__(
        self,
        layout: StateLayout,
        head_dim: int,
        requests: int = 3,
        *,
        most_tokens: int = 640,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.layout, self.head_dim, self.device, self.dtype = layout, head_dim, device, dtype
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.width = 2 * head_dim * (2 if layout.overlap else 1)
        each = -(-most_tokens // layout.swa_page) if layout.swa_page else 1
        pages = self.random.sample(range(requests * each + 1), requests * each)
        numbers = self.random.sample(range(requests + 2), requests)
        self.requests = [
            Request(number, pages[i * each : (i + 1) * each]) for i, number in enumerate(numbers)
        ]
        owners = requests * each + 1 if layout.swa_page else requests + 2
        self.state_rows = owners * layout.ring
        most_windows = requests * (most_tokens // layout.ratio + 1)
        self.num_slots = most_windows + 1
        # Slot 0 is SGLang's reserved one.
        slots = self.random.sample(range(1, self.num_slots), most_windows)
        each = most_tokens // layout.ratio + 1
        self.slots = {r.number: slots[i * each :][:each] for i, r in enumerate(self.requests)}

    def state(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A state [pages, ratio, width] of which no row has been written: NaN."""
        shape = (self.state_rows // self.layout.ratio, self.layout.ratio, self.width)
        return torch.full(shape, torch.nan, dtype=dtype, device=self.device)

    def new_tokens(self, request: Request, count: int) -> None:
        """Appends random tokens."""
        for _ in range(count):
            token = torch.randn(self.width, generator=self.generator) * 2
            request.tokens.append(token.to(self.dtype))

    def decode(self, requests: list[Request]) -> Call:
        """One new token for each request."""
        entries, closing, written = [], [], {}
        for i, request in enumerate(requests):
            self.new_tokens(request, 1)
            length = len(request.tokens)
            position, before = length - 1, max(length - 1 - self.layout.ratio, 0)
            row = self._row(request, position)
            pages = self._row(request, before), row
            entries.append((length, row, *(page // self.layout.ratio for page in pages)))
            closing.append(self._closes(request, length))
            written[row] = i
        plan = DecodePlan(self.layout.ratio, as_bytes(entries, 4, self.device))
        return self._call(plan, requests, [1] * len(requests), closing, written)

    def extend(
        self,
        requests: list[Request],
        counts: list[int],
        *,
        shuffled: bool = False,
        padded: bool = False,
    ) -> Call:
        """New tokens for requests.

        Args:
            shuffled: the entries are in any order, as those of the device path.
            padded: there are as many entries as tokens, and those that are not used are invalid.
        """
        windows: list[tuple[int, ...]] = []
        closing: list[Any] = []
        rows: list[tuple[int, int]] = []
        written, ragged = {}, 0
        for i, (request, count) in enumerate(zip(requests, counts, strict=True)):
            self.new_tokens(request, count)
            length = len(request.tokens)
            for j in range(count):
                position = length - count + j
                if (position + 1) % self.layout.ratio == 0:
                    held = max(self.layout.window_rows - (j + 1), 0)
                    pages = ONES, i  # as the planner leaves them where no row is held
                    if held:
                        before = max(position - self.layout.ratio, 0)
                        pages = (
                            self._row(request, before) // self.layout.ratio,
                            self._row(request, position) // self.layout.ratio,
                        )
                    windows.append((position + 1, ragged | held << 16, *pages))
                    closing.append(self._closes(request, position + 1))
                if self.layout.is_stored(length, position):
                    row = self._row(request, position)
                    rows.append((ragged, row))
                    written[row] = ragged  # of a ring, the last one stays
                ragged += 1
        if shuffled:
            self.random.shuffle(windows)
            self.random.shuffle(rows)
        if padded:
            closing += [None] * (ragged - len(windows))
            windows += [(ONES, 0, ONES, ONES)] * (ragged - len(windows))
            rows += [(ONES, ONES)] * (ragged - len(rows))
        plan = PrefillPlan(
            self.layout.ratio,
            as_bytes(windows, 4, self.device),
            as_bytes(rows, 2, self.device),
        )
        return self._call(plan, requests, counts, closing, written)

    def reject(self, request: Request, count: int) -> None:
        """Takes back a request's last tokens."""
        if count:
            del request.tokens[-count:]

    def _row(self, request: Request, position: int) -> int:
        return self.layout.row(request.number, request.pages, position)

    def _closes(self, request: Request, length: int) -> tuple[int, int, int] | None:
        if length % self.layout.ratio:
            return None
        window = length // self.layout.ratio - 1
        return request.number, length, self.slots[request.number][window]

    def _call(
        self,
        plan: Any,
        requests: list[Request],
        counts: list[int],
        closing: list[Any],
        written: dict[int, int],
    ) -> Call:
        tokens = [x for r, n in zip(requests, counts, strict=True) for x in r.tokens[-n:]]
        kv_score = torch.stack(tokens).to(self.device)
        slots = []
        for request, count in zip(requests, counts, strict=True):
            for length in range(len(request.tokens) - count + 1, len(request.tokens) + 1):
                closes = self._closes(request, length)
                slots.append(closes[2] if closes else 0)
        out_loc = torch.tensor(slots, dtype=torch.int64, device=self.device)
        history = {request.number: list(request.tokens) for request in requests}
        return Call(plan, kv_score, out_loc, closing, history, written)
