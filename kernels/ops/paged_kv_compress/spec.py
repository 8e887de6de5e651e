"""The declaration of paged_kv_compress; docs/ops.md explains the parts."""

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
    items_at_once,
    launch,
    propose,
)
from kvfold.ops.state_spec import (
    NewTokensTensor,
    StateArguments,
    StateKeywords,
    state_fields,
    window_shape,
)

__all__ = ["SPEC", "Arguments", "Problem", "Tuning", "items_at_once", "window_shape"]


@dataclass(frozen=True, kw_only=True)
class Problem(DecodeProblem):
    """What a kernel of paged_kv_compress solves."""

    op: ClassVar[str] = "paged_kv_compress"


@dataclass(frozen=True)
class Arguments(NewTokensTensor, StateKeywords, NextNScalar, StateArguments):
    """The arguments of paged_kv_compress."""


def problem_of(
    dimensions: Mapping[str, int], arguments: Arguments, dtypes: Mapping[str, str]
) -> Problem:
    """The problem of a call."""
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
    launch=launch,
    propose=propose,
    explain=explain,
    may_be_same=(("block_table_kv", "block_table_score"),),
    one_pool=("paged_kv", "paged_score", "block_table_kv", "block_table_score"),
    params=(*DECODE_PARAMS, "output_is_bf16"),
)
