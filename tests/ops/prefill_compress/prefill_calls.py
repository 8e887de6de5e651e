"""Calls of prefill_compress for tests, and a request's way through prefill and decode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from state_calls import LAYOUTS, Guarded, make_arguments
from torch import Tensor

from kvfold.ops import state_oracle
from kvfold.ops.paged_kv_compress.spec import Arguments as DecodeArguments
from kvfold.ops.prefill_compress.spec import Arguments, Problem
from kvfold.runtime.arguments import DTYPE_NAMES

MUTATED = ("paged_kv", "paged_score", "output")


@dataclass(frozen=True)
class Call(Guarded, Arguments):
    """The arguments of one call."""

    @property
    def overlap(self) -> bool:
        return self.paged_kv.size(2) != self.output.size(1)

    @property
    def problem(self) -> Problem:
        """What dispatch must find in the arguments."""
        return Problem(
            head_dim=self.output.size(1),
            compress_ratio=self.compress_ratio,
            overlap=self.overlap,
            kv_dtype=DTYPE_NAMES[self.kv_score.dtype],
            state_dtype=DTYPE_NAMES[self.paged_kv.dtype],
            ape_in_state=self.ape_in_state,
        )

    def is_stored(self, start: int, length: int, position: int) -> bool:
        """Whether a new row goes to the state, by the words of the contract."""
        ratio, overlap = self.compress_ratio, int(self.overlap)
        if self.write_state == "all":
            return True
        if position >= ((length - self.max_rollback) // ratio - overlap) * ratio:
            return True
        period = self.state_period
        restarts = range(-(-start // period) * period, length + 1, period) if period else ()
        return any((m // ratio - overlap) * ratio <= position < m for m in restarts)

    def expected(self) -> dict[str, Tensor]:
        """The mutated tensors as the call must leave them."""
        return state_oracle.expected(self, None, self.is_stored)


def make(
    spans: Sequence[tuple[int, int]],
    *,
    device: str | torch.device = "cpu",
    ape_in_state: bool = True,
    work: str = "all",
    write_state: str = "all",
    max_rollback: int = 0,
    state_period: int = 0,
    **fields,
) -> Call:
    """A well-formed call on random data; make_arguments documents spans and the other fields."""
    call = Call(
        **make_arguments(spans, **fields),
        ape_in_state=ape_in_state,
        work=work,
        write_state=write_state,
        max_rollback=max_rollback,
        state_period=state_period,
    )
    return call.clone(device)


def random_call(seed: int, **fixed) -> Call:
    """A well-formed call with every argument of `make` drawn at random, but for the fixed ones.

    It reserves output rows for all windows that its tokens could close in one request.
    """
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    drawn = {
        "head_dim": one_of(8, 16, 24, 64),
        "compress_ratio": one_of(1, 2, 4, 4, 5, 8, 16),
        "overlap": one_of(None, False, True),
        "kv_dtype": one_of("bf16", "fp32"),
        "state_dtype": one_of("bf16", "fp32"),
        "output_dtype": one_of("bf16", "fp32"),
        "page_size": one_of(1, 3, 4, 7, 16, 32),
        "layout": one_of(*LAYOUTS),
        "ape_in_state": one_of(True, False),
        "work": one_of("all", "all", "store", "reduce"),
        "write_state": one_of("all", "tail"),
        "max_rollback": one_of(0, 1, 3, 20),
        "state_period": one_of(0, 1, 4, 6, 32),
    } | fixed
    ratio = drawn["compress_ratio"]
    spans = []
    for _ in range(rng.integers(1, 7)):
        new = int(rng.integers(one_of(2, 6, 4 * ratio + 2)))
        spans.append((int(rng.integers(3 * ratio + 1)), new))
    drawn["reserve"] = sum(new for _, new in spans) // ratio + 2
    return make(spans, **{"seed": seed} | drawn)


# ---- runs of several calls -----------------------------------------------------------------------

Prefill = Callable[[Call], None]
Decode = Callable[[DecodeArguments], None]


class Run:
    """Requests that are fed their tokens in several calls, from an empty state full of NaN."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        compress_ratio: int = 4,
        head_dim: int = 16,
        kv_dtype: str = "bf16",
        state_dtype: str = "fp32",
        page_size: int = 4,
        ape_in_state: bool = True,
        missing_pages: float = 0.0,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        """
        Args:
            lengths: tokens of each request in the end.
            missing_pages: the share of block table entries that name no page.
        """
        whole = make(
            [(0, length) for length in lengths],
            head_dim=head_dim,
            compress_ratio=compress_ratio,
            kv_dtype=kv_dtype,
            state_dtype=state_dtype,
            output_dtype="fp32",
            page_size=page_size,
            ape_in_state=ape_in_state,
            device=device,
            seed=seed,
        )
        rng = np.random.default_rng(seed)
        missing = torch.from_numpy(rng.random(whole.block_table_kv.shape) < missing_pages)
        whole.block_table_kv[missing.to(device)] = -1
        whole.output.fill_(torch.nan)
        self.whole = whole
        self.length = np.zeros(len(lengths), np.int64)
        self.first_token = whole.cu_seq_lens.cpu().numpy()[:-1].astype(np.int64)
        self.first_output = whole.cu_outputs.cpu().numpy()[:-1].astype(np.int64)

    @property
    def left(self) -> np.ndarray:
        """Tokens that each request has not been fed."""
        return np.diff(self.whole.cu_seq_lens.cpu().numpy()) - self.length

    def copy_at(self, length: Sequence[int]) -> Run:
        """A run on a copy of the state, whose requests have so many tokens."""
        run = copy.copy(self)
        run.length = np.array(length)
        copies = {name: getattr(self.whole, name).clone() for name in MUTATED}
        run.whole = replace(self.whole, **copies)
        return run

    def next_call(self, new: Sequence[int], rejected: int = 0, **scalars) -> Call:
        """The call that feeds each request so many tokens, the last `rejected` being wrong ones."""
        new = np.asarray(new, np.int64)
        assert (new <= self.left).all()
        whole, ratio = self.whole, self.whole.compress_ratio
        cu_seq_lens = np.concatenate(([0], new.cumsum()))
        shift = self.first_token + self.length - cu_seq_lens[:-1]
        tokens = np.arange(new.sum()) + np.repeat(shift, new)
        kv_score = whole.kv_score[torch.from_numpy(tokens).to(whole.kv_score.device)]
        for end in cu_seq_lens[1:]:
            kv_score[end - rejected : end] = 7
        closed = (self.length + new) // ratio - self.length // ratio
        return replace(
            whole,
            kv_score=kv_score,
            output=torch.full_like(whole.output[: closed.sum()], torch.nan),
            kv_lens=self._int32(self.length + new),
            cu_seq_lens=self._int32(cu_seq_lens),
            cu_outputs=self._int32(np.concatenate(([0], closed.cumsum()))),
            **scalars,
        )

    def accept(self, call: Call | DecodeArguments, new: Sequence[int]) -> None:
        """Takes so many of a call's new tokens, and the windows that they close, for good."""
        new = np.asarray(new, np.int64)
        ratio = self.whole.compress_ratio
        closed = (self.length + new) // ratio - self.length // ratio
        first = call.cu_outputs.cpu().numpy()[:-1]
        number = np.arange(closed.sum()) - np.repeat(closed.cumsum() - closed, closed)
        taken = torch.from_numpy(np.repeat(first, closed) + number)
        rows = np.repeat(self.first_output + self.length // ratio, closed) + number
        device = call.output.device
        self.whole.output[torch.from_numpy(rows).to(device)] = call.output[taken.to(device)]
        self.length += new

    def prefill(self, run: Prefill, new: Sequence[int], rejected: int = 0, **scalars) -> None:
        """Feeds each request so many tokens, of which all but the last `rejected` are accepted."""
        call = self.next_call(new, rejected, **scalars)
        run(call)
        self.accept(call, np.asarray(new) - rejected)

    def decode(self, run: Decode, new: Sequence[int], next_n: int = 8) -> None:
        """Feeds each request so many tokens by paged_kv_compress."""
        call = decode_arguments(self.next_call(new), next_n)
        run(call)
        self.accept(call, new)

    def decode_all(self, run: Decode, most: int = 1) -> None:
        """Feeds all tokens that are left, at most so many per call, by paged_kv_compress."""
        while self.left.any():
            self.decode(run, np.minimum(self.left, most), most)

    def prefill_all(self, run: Prefill, most: int, **scalars) -> None:
        """The same by prefill_compress."""
        while self.left.any():
            self.prefill(run, np.minimum(self.left, most), **scalars)

    def _int32(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.whole.ape.device)


def decode_arguments(call: Call, next_n: int) -> DecodeArguments:
    """A call's arguments for paged_kv_compress."""
    fields = {
        one.name: getattr(call, one.name)
        for one in DecodeArguments.declared()
        if one.name not in ("next_n", "new_tokens")
    }
    return DecodeArguments(**fields, next_n=next_n)
