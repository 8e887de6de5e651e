"""How prefill_compress_store is benchmarked, tuned and tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold.codegen import choice
from kvfold.ops.prefill_compress_store.spec import SPEC, Arguments, Problem
from kvfold.ops.prefill_workload import SCENARIOS, StateOptions, candidates, make_prompts
from kvfold.ops.row_workload import (
    ROW_METADATA,
    ROW_TOLERANCES,
    RowOptions,
    by_two_ops,
    row_arguments,
    row_bytes,
)
from kvfold.ops.state_workload import METADATA, PREFETCH, TOLERANCES
from kvfold.workload import Case, Measurement, Search, Workload


@dataclass(frozen=True, kw_only=True)
class Options(StateOptions, RowOptions):
    """A case beside its problem."""

    row_dtype: str = choice("bf16", "fp32", default="bf16", help="of a row between the two steps")


def make(
    problem: Problem,
    tokens: int,
    scenario: str,
    options: Options,
    device: torch.device | str,
    seed: int = 0,
) -> Case:
    """Makes one call."""
    prompts = make_prompts(problem, tokens, scenario, options, device, seed)
    slot = np.ones(prompts.closed, bool)
    return Case(
        arguments=Arguments(
            **prompts.arguments,
            **row_arguments(options, problem.head_dim, slot, device, seed),
            row_dtype=options.row_dtype,
        ),
        moved_bytes=prompts.moved_bytes + prompts.closed * row_bytes(options, problem.head_dim),
        rows=prompts.closed,
    )


def expected(arguments: Arguments) -> Mapping[str, Tensor]:
    """What a call must leave."""
    return by_two_ops("prefill_compress", arguments)


_WHOLE = ("whole",)

WORKLOAD = Workload(
    spec=SPEC,
    options=Options,
    scenarios=SCENARIOS,
    defaults={
        "head_dim": 512,
        "compress_ratio": 128,
        "kv_dtype": "bf16",
        "state_dtype": "fp32",
    },
    sizes=(8192, 65536),
    check_size=256,
    make=make,
    expected=expected,
    tolerances=TOLERANCES | ROW_TOLERANCES,
    metadata=(*METADATA, *ROW_METADATA),
    prefetch=PREFETCH,
    search=Search(
        candidates=candidates,
        shared_field=None,
        mixture={"whole": 0.7, "chunk": 0.2, "mixed": 0.1},
        prefetch={"none": 0.2, "metadata": 0.2, "state": 0.6},
        sizes=(1024, 8192, 65536),
    ),
    suite=(
        Measurement(problem={"compress_ratio": [128, 4]}, scenarios=_WHOLE),
        Measurement(
            problem={"compress_ratio": 4, "head_dim": 128},
            options={"format": "fp8_block128", "rotate": True},
            scenarios=_WHOLE,
        ),
    ),
)
