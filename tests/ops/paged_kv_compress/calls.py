"""Small calls of paged_kv_compress for tests: made to order, random, in wide block tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import torch
from state_calls import LAYOUTS, Guarded, guarded, make_arguments
from torch import Tensor

from kvfold.ops.paged_kv_compress import workload
from kvfold.ops.paged_kv_compress.spec import Arguments, Problem
from kvfold.runtime.arguments import DTYPE_NAMES

STATE = ("paged_kv", "paged_score")
MUTATED = (*STATE, "output")
WORK = ("all", "store", "reduce")
PREFETCH = ("none", "metadata", "state")


@dataclass(frozen=True)
class Call(Guarded, Arguments):
    """The arguments of one call."""

    @property
    def problem(self) -> Problem:
        """What dispatch must find in the arguments."""
        return Problem(
            head_dim=self.output.size(1),
            compress_ratio=self.compress_ratio,
            overlap=self.paged_kv.size(2) != self.output.size(1),
            kv_dtype=DTYPE_NAMES[self.kv_score.dtype],
            state_dtype=DTYPE_NAMES[self.paged_kv.dtype],
            next_n=self.next_n,
            ape_in_state=self.ape_in_state,
        )

    def pass_to(self, op: Callable[..., None]) -> None:
        """Calls the op."""
        args, kwargs = self.args_and_kwargs()
        op(*args, **kwargs)

    def alone(self, request: int) -> Call:
        """The same call for one request only, on the same pools and tokens."""
        one, ends = slice(request, request + 1), slice(request, request + 2)
        return replace(
            self,
            block_table_kv=self.block_table_kv[one],
            block_table_score=self.block_table_score[one],
            kv_lens=self.kv_lens[one],
            cu_seq_lens=self.cu_seq_lens[ends],
            cu_outputs=self.cu_outputs[ends],
            new_tokens=None if self.new_tokens is None else self.new_tokens[one],
        )

    def without_last(self, tokens: Sequence[int]) -> Call:
        """The same call without the last tokens of each request, whose rows of kv_score stay."""
        less = torch.tensor(tokens, dtype=torch.int32, device=self.kv_lens.device)
        counts = self.cu_seq_lens.diff() - less
        return replace(
            self, kv_lens=guarded(self.kv_lens - less), new_tokens=guarded(counts, odd=True)
        )


def make(
    spans: Sequence[tuple[int, int]],
    *,
    next_n: int = 4,
    ape_in_state: bool = True,
    work: str = "all",
    device: str | torch.device = "cpu",
    **fields,
) -> Call:
    """A well-formed call on random data.

    Args:
        spans: each request's (tokens before the call, new tokens).
        fields: as make_arguments takes them.
    """
    shared = make_arguments(spans, **fields)
    return Call(**shared, next_n=next_n, ape_in_state=ape_in_state, work=work).clone(device)


def random_call(seed: int, **fixed) -> Call:
    """A well-formed call with every argument of `make` drawn at random, but for the fixed ones."""
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
        "next_n": int(rng.integers(1, 7)),
        "page_size": one_of(1, 3, 4, 7, 16, 32),
        "layout": one_of(*LAYOUTS),
        "reserve": one_of(None, 8),
        "ape_in_state": one_of(True, False),
        "work": one_of("all", *WORK),
    } | fixed
    ratio, next_n = drawn["compress_ratio"], drawn["next_n"]
    spans = []
    for _ in range(rng.integers(1, 7)):
        new = int(rng.integers(next_n + 1))
        # Half of the requests are about to close a window.
        near = max(0, ratio * int(rng.integers(1, 4)) - int(rng.integers(new + 1)))
        start = one_of(near, int(rng.integers(3 * ratio + 1)))
        spans.append((start, new))
    call = make(spans, **{"seed": seed} | drawn)
    if rng.integers(2):
        return call
    return call.without_last([int(rng.integers(new + 1)) for _, new in spans])


def in_wide_tables(call: Call, columns: int, *, shared: bool) -> Call:
    """The same call on windows far from the first, in block tables of so many columns.

    Each request's pages lie in columns of their own; all other columns hold -1.

    Args:
        shared: all requests share one row of each table, which has stride 0.
    """
    ratio, page_size = call.compress_ratio, call.paged_kv.size(1)
    batch, pages = call.block_table_kv.shape
    step = lcm(ratio, page_size) // page_size  # columns that hold whole windows
    stretch = -(-pages // step) * step
    first = columns // step * step - stretch * (1 + torch.arange(batch, dtype=torch.int32))
    places = first[:, None] + torch.arange(pages)

    def widen(table: Tensor) -> Tensor:
        row = torch.full((columns,), -1, dtype=torch.int32)
        row[places.flatten()] = table.flatten()
        row = row.expand(batch, columns)
        return row if shared else row.contiguous()

    tables = {
        f"block_table_{pool}": widen(getattr(call, f"block_table_{pool}"))
        for pool in ("kv", "score")
    }
    return replace(call, kv_lens=call.kv_lens + first * page_size, **tables)


def decode_step(
    *,
    batch: int = 16,
    scenario: str = "all-hit",
    device: str | torch.device = "cpu",
    seed: int = 0,
    **fields,
) -> Call:
    """A case of the workload as a call. fields are problem fields and the case's options."""
    names = {field.name for field in Problem.fields()}
    problem = {name: value for name, value in fields.items() if name in names}
    options = {name: value for name, value in fields.items() if name not in names}
    case = workload.make(
        Problem.of(dict(workload.WORKLOAD.defaults) | problem),
        batch,
        scenario,
        workload.Options.of(options),
        device,
        seed,
    )
    return Call(*case.arguments.args())
