"""The declaration of locate_rows; docs/ops.md explains the parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvfold import codegen
from kvfold.codegen import Launch, OpSpec, integer, scalar, tensor
from kvfold.codegen.fields import POSITIVE
from kvfold.ops.state_spec import NewTokensTensor

if TYPE_CHECKING:
    from torch import Tensor

WARPS = (1, 2, 4, 8, 16)
UNBOUNDED = -1  # of num_tokens and next_n
MOST = 2**31 - 1  # that an int32 of the metadata can say


@dataclass(frozen=True, kw_only=True)
class Problem(codegen.Problem):
    """What a kernel of locate_rows solves. One kernel serves every call."""

    op: ClassVar[str] = "locate_rows"

    def __str__(self) -> str:
        return "every call"


@dataclass(frozen=True, kw_only=True)
class Tuning(codegen.Tuning):
    """How a kernel of locate_rows solves it."""

    warps: int = integer(WARPS, symbol="w{}", help="warps of a CTA; each thread takes one row")


@dataclass(frozen=True)
class RowsArguments(codegen.Arguments):
    """The arguments of locate_rows, but for new_tokens."""

    kv_lens: Tensor = tensor("batch", "int32", help="tokens per request after this call")
    cu_seq_lens: Tensor = tensor(
        "batch+1", "int32", help="prefix sums of the new tokens per request"
    )
    cu_outputs: Tensor = tensor(
        "batch+1", "int32", help="prefix sums of the output rows reserved per request"
    )
    positions: Tensor = tensor(
        "num_outputs",
        "int32",
        mutated=True,
        help="position of the first token of a row's window; -1: no window fills the row",
    )
    slots: Tensor = tensor(
        "num_outputs",
        "int64",
        mutated=True,
        help="page * rows_per_page + row of the page; negative: none",
    )
    compress_ratio: int = scalar(int, help="tokens per window")
    rows_per_page: int = scalar(int, help="rows of a page of the cache")
    num_tokens: int = scalar(
        int,
        default=UNBOUNDED,
        keyword=True,
        help="rows of kv_score: a request that goes beyond them is skipped; -1: the length of"
        " token_slots or, without it, no bound",
    )
    next_n: int = scalar(
        int,
        default=UNBOUNDED,
        keyword=True,
        help="a request with more new tokens is skipped; -1: no bound",
    )
    block_table_cache: Tensor | None = tensor(
        "batch, max_pages", "int32", optional=True, help="logical page -> page of the cache"
    )
    # The scalar num_tokens may be another number.
    token_slots: Tensor | None = tensor(
        "num_token_slots",
        "int64",
        optional=True,
        help="each new token's slot; a row gets that of its window's last token",
    )


@dataclass(frozen=True)
class Arguments(NewTokensTensor, RowsArguments):
    """The arguments of locate_rows."""


def problem_of(
    dimensions: Mapping[str, int], arguments: Arguments, dtypes: Mapping[str, str]
) -> Problem:
    """The problem of a call."""
    legal = {
        "compress_ratio": POSITIVE,
        "rows_per_page": POSITIVE,
        "num_tokens": range(UNBOUNDED, MOST + 1),
        "next_n": range(UNBOUNDED, MOST + 1),
    }
    for name, values in legal.items():
        if (value := getattr(arguments, name)) not in values:
            raise ValueError(f"{name} is {value}; accepted: {values[0]} to {values[-1]}")
    absent = arguments.block_table_cache is None
    if absent == (arguments.token_slots is None):
        both = "None" if absent else "given"
        raise ValueError(f"block_table_cache and token_slots are both {both}; accepted: one tensor")
    return Problem()


def token_bounds(arguments: Arguments) -> tuple[int, int]:
    """The largest cu_seq_lens of a request that counts, and the most new tokens of one."""
    a = arguments
    num_tokens, next_n = a.num_tokens, a.next_n
    if num_tokens == UNBOUNDED:
        num_tokens = MOST if a.token_slots is None else a.token_slots.size(0)
    return num_tokens, MOST if next_n == UNBOUNDED else next_n


def launch(problem: Problem, backend: str, tuning: Tuning) -> Launch:
    """What a variant needs."""
    return Launch(threads=32 * tuning.warps)


def propose(problem: Problem, backend: str) -> Iterator[Tuning]:
    """Tuning to start from, for a problem without a row."""
    yield Tuning(warps=4)


def explain(problem: Problem, backend: str, tuning: Tuning, rows: int) -> str:
    """How a variant runs at a number of rows."""
    return f"{-(-rows // (32 * tuning.warps))} CTAs, a thread per row"


SPEC = OpSpec(
    problem=Problem,
    tuning=Tuning,
    arguments=Arguments,
    axis="rows",
    axis_help="output rows",
    size_dimension="num_outputs",
    problem_of=problem_of,
    launch=launch,
    propose=propose,
    explain=explain,
    params=(
        "batch",
        "num_outputs",
        "max_pages",
        "num_token_slots",
        "compress_ratio",
        "rows_per_page",
        "most_tokens",
        "most_new",
    ),
)
