"""The declaration of toy: y = factor * x. tests/test_toy_op.py adds it to a copy of the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvfold import codegen
from kvfold.codegen import Launch, OpSpec, flag, integer, scalar, tensor
from kvfold.codegen.gpu import MAX_THREADS
from kvfold.codegen.variant import refuse

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Problem(codegen.Problem):
    """What a kernel of toy solves."""

    op: ClassVar[str] = "toy"

    columns: int = integer(range(4, 4097, 4), symbol="c{}", help="columns of a row")


@dataclass(frozen=True, kw_only=True)
class Tuning(codegen.Tuning):
    """How a kernel of toy solves it."""

    warps: int = integer((1, 2, 4, 8, 64), symbol="w{}", help="warps per row")
    vectors: bool = flag(symbol="v", default=False, help="whether a thread reads four columns")


@dataclass(frozen=True)
class Arguments(codegen.Arguments):
    """y = factor * x, row by row."""

    x: Tensor = tensor("rows, columns", "fp32", help="what is scaled")
    y: Tensor = tensor("rows, columns", "fp32", mutated=True, help="the scaled rows")
    factor: int = scalar(int, default=2, help="what x is multiplied by")


def problem_of(dimensions: Mapping[str, int], arguments: Arguments, dtypes: Mapping[str, str]):
    """The problem of a call."""
    return Problem(columns=dimensions["columns"])


def launch(problem: Problem, backend: str, tuning: Tuning) -> Launch:
    """What a variant needs."""
    threads = 32 * tuning.warps
    if threads > MAX_THREADS:
        raise refuse(tuning, "warps", f"makes a CTA of {threads} threads", (1, 2, 4, 8))
    return Launch(threads=threads, constants={"step": threads * (4 if tuning.vectors else 1)})


def propose(problem: Problem, backend: str) -> Iterator[Tuning]:
    """Tuning to start from."""
    yield Tuning(warps=1)


def explain(problem: Problem, backend: str, tuning: Tuning, rows: int) -> str:
    """How a variant runs at a number of rows."""
    return f"{rows} CTAs, one per row"


SPEC = OpSpec(
    problem=Problem,
    tuning=Tuning,
    arguments=Arguments,
    axis="rows",
    axis_help="rows to scale",
    size_dimension="rows",
    problem_of=problem_of,
    launch=launch,
    propose=propose,
    explain=explain,
    params=("rows", "factor"),
)
