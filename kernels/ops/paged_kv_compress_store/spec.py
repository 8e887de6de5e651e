"""The declaration of paged_kv_compress_store; docs/ops.md explains the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvfold.codegen import OpSpec
from kvfold.ops.decode_spec import (
    DECODE_PARAMS,
    DecodeProblem,
    NextNScalar,
    Tuning,
    explain,
    launch,
    propose,
)
from kvfold.ops.row_spec import (
    FUSED_ROW_CONSTANTS,
    ROW_PARAMS,
    OptionalRowTensors,
    RowDtypeScalar,
    RowKeywords,
    RowScalars,
    RowTensors,
    check_rows,
    fused_row_constants,
    with_cache_output,
)
from kvfold.ops.state_spec import (
    MetadataTensors,
    NewTokensTensor,
    RatioScalar,
    StateKeywords,
    StateTensors,
    state_fields,
)


@dataclass(frozen=True, kw_only=True)
class Problem(DecodeProblem):
    """What a kernel of paged_kv_compress_store solves."""

    op: ClassVar[str] = "paged_kv_compress_store"


@dataclass(frozen=True)
class Arguments(
    OptionalRowTensors,
    NewTokensTensor,
    StateKeywords,
    RowKeywords,
    RowDtypeScalar,
    RowScalars,
    NextNScalar,
    RatioScalar,
    RowTensors,
    MetadataTensors,
    StateTensors,
):
    """The arguments of paged_kv_compress_store."""


def problem_of(
    dimensions: Mapping[str, int], arguments: Arguments, dtypes: Mapping[str, str]
) -> Problem:
    """The problem of a call."""
    check_rows(arguments, dimensions)
    return Problem(**state_fields(dimensions, arguments, dtypes), next_n=arguments.next_n)


SPEC = OpSpec(
    problem=Problem,
    tuning=Tuning,
    arguments=Arguments,
    axis="batch",
    axis_help="requests in the step",
    size_dimension="batch",
    defined_by={"state_dim": "paged_kv", "batch": "kv_lens"},
    problem_of=problem_of,
    launch=with_cache_output(launch),
    propose=propose,
    explain=explain,
    may_be_same=(("block_table_kv", "block_table_score"),),
    one_pool=("paged_kv", "paged_score", "block_table_kv", "block_table_score"),
    params=(*DECODE_PARAMS, *ROW_PARAMS),
    constants=FUSED_ROW_CONSTANTS,
    specialise=fused_row_constants,
)
