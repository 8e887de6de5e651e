"""The declaration of prefill_compress; docs/ops.md explains the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvfold.codegen import OpSpec
from kvfold.ops.prefill_spec import (
    PREFILL_PARAMS,
    PrefillProblem,
    Tuning,
    WriteStateKeywords,
    explain,
    launch,
    prefill_fields,
    propose,
)
from kvfold.ops.state_spec import StateArguments, StateKeywords

__all__ = ["SPEC", "Arguments", "Problem", "Tuning", "propose"]


@dataclass(frozen=True, kw_only=True)
class Problem(PrefillProblem):
    """What a kernel of prefill_compress solves."""

    op: ClassVar[str] = "prefill_compress"


@dataclass(frozen=True)
class Arguments(StateKeywords, WriteStateKeywords, StateArguments):
    """The arguments of prefill_compress."""


def problem_of(
    dimensions: Mapping[str, int], arguments: Arguments, dtypes: Mapping[str, str]
) -> Problem:
    """The problem of a call."""
    return Problem(**prefill_fields(dimensions, arguments, dtypes))


SPEC = OpSpec(
    problem=Problem,
    tuning=Tuning,
    arguments=Arguments,
    axis="tokens",
    axis_help="new tokens in the call",
    size_dimension="num_tokens",
    defined_by={"state_dim": "paged_kv", "batch": "kv_lens"},
    problem_of=problem_of,
    launch=launch,
    propose=propose,
    explain=explain,
    may_be_same=(("block_table_kv", "block_table_score"),),
    one_pool=("paged_kv", "paged_score", "block_table_kv", "block_table_score"),
    params=(*PREFILL_PARAMS, "output_is_bf16"),
)
