"""The declaration of norm_rope_store; docs/ops.md explains the parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvfold import codegen
from kvfold.codegen import Launch, OpSpec, dtype, integer, scalar, tensor
from kvfold.codegen.variant import check_min_ctas, refuse
from kvfold.ops.row_spec import (
    HEAD_DIMS,
    ROW_CONSTANTS,
    ROW_PARAMS,
    OptionalRowTensors,
    RowKeywords,
    RowScalars,
    RowTensors,
    check_rows,
    row_constants,
)

if TYPE_CHECKING:
    from torch import Tensor

WARPS = (1, 2, 4, 8, 16)
ROW_WARPS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Problem(codegen.Problem):
    """What a kernel of norm_rope_store solves."""

    op: ClassVar[str] = "norm_rope_store"

    head_dim: int = integer(HEAD_DIMS, symbol="hd{}", help="columns of a row")
    rows_dtype: str = dtype("bf16", "fp32", help="dtype of rows")


@dataclass(frozen=True, kw_only=True)
class Tuning(codegen.Tuning):
    """How a kernel of norm_rope_store solves it."""

    warps: int = integer(WARPS, symbol="w{}", help="warps of a CTA")
    row_warps: int = integer(
        ROW_WARPS,
        symbol="r{}",
        default=1,
        help="cuda: warps that share a row, each 128 columns or more of it. More suit few rows. One"
        " has it where a rotation or a block of a scale needs more columns",
    )
    min_ctas: int = integer(
        range(1, 33),
        symbol="c{}",
        default=1,
        help="CTAs that the registers of an SM must suffice for. cuda: the grid has no more",
    )


@dataclass(frozen=True)
class Rows(codegen.Arguments):
    """The first argument."""

    rows: Tensor = tensor("num_rows, head_dim", "bf16, fp32", help="compressed rows")


@dataclass(frozen=True)
class Prefetch(codegen.Arguments):
    """The last scalar."""

    prefetch: str = scalar(
        str,
        default="none",
        choices=("none", "metadata", "state"),
        keyword=True,
        help="what may be read while the kernel before this one still runs: nothing; positions,"
        " slots, weight and rope_table; the same",
    )


@dataclass(frozen=True)
class Arguments(OptionalRowTensors, Prefetch, RowKeywords, RowScalars, RowTensors, Rows):
    """The arguments of norm_rope_store."""


def problem_of(
    dimensions: Mapping[str, int], arguments: Arguments, dtypes: Mapping[str, str]
) -> Problem:
    """The problem of a call."""
    check_rows(arguments, dimensions)
    return Problem(head_dim=dimensions["head_dim"], rows_dtype=dtypes["rows"])


def launch(problem: Problem, backend: str, tuning: Tuning) -> Launch:
    """What a variant needs. Raises TableError if it cannot run."""
    threads = 32 * tuning.warps
    most = min(tuning.warps, problem.head_dim // 128)
    if tuning.row_warps > most:
        what = f"is more than {most}, of {tuning.warps} warps and {problem.head_dim} columns"
        raise refuse(tuning, "row_warps", what, f"{most} or less")
    check_min_ctas(tuning, threads)
    return Launch(threads=threads, min_ctas=tuning.min_ctas)


def propose(problem: Problem, backend: str) -> Iterator[Tuning]:
    """Tuning to start from, for a problem without a row."""
    yield Tuning(warps=4)


def explain(problem: Problem, backend: str, tuning: Tuning, rows: int) -> str:
    """How a variant runs at a number of rows."""
    if backend == "triton":
        return f"{rows} CTAs, one per row, of {tuning.warps} warps"
    at_once = tuning.warps // tuning.row_warps
    shared = "a warp" if tuning.row_warps == 1 else f"{tuning.row_warps} warps"
    return f"{-(-rows // at_once)} CTAs or as many as run at once, {shared} per row"


SPEC = OpSpec(
    problem=Problem,
    tuning=Tuning,
    arguments=Arguments,
    axis="rows",
    axis_help="rows in the call",
    size_dimension="num_rows",
    problem_of=problem_of,
    launch=launch,
    propose=propose,
    explain=explain,
    params=("num_rows", "prefetch", *ROW_PARAMS),
    constants=ROW_CONSTANTS,
    specialise=row_constants,
)
