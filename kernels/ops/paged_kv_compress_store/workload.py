"""How paged_kv_compress_store is benchmarked, tuned and tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold.codegen import choice
from kvfold.ops.decode_workload import SCENARIOS, StateOptions, candidates, make_step
from kvfold.ops.paged_kv_compress_store.spec import SPEC, Arguments, Problem
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
    batch: int,
    scenario: str,
    options: Options,
    device: torch.device | str,
    seed: int = 0,
) -> Case:
    """Makes one step. Only the rows of windows that close have a slot."""
    step = make_step(problem, batch, scenario, options, device, seed)
    reserved = np.arange(step.reserved.max(initial=1)) < step.reserved[:, None]
    closing = np.arange(reserved.shape[1]) < step.closing[:, None]
    slot = closing[reserved]
    rows = int(step.closing.sum())
    return Case(
        arguments=Arguments(
            **step.arguments,
            **row_arguments(options, problem.head_dim, slot, device, seed),
            row_dtype=options.row_dtype,
        ),
        moved_bytes=step.moved_bytes + rows * row_bytes(options, problem.head_dim),
        rows=rows,
    )


def expected(arguments: Arguments) -> Mapping[str, Tensor]:
    """What a call must leave."""
    return by_two_ops("paged_kv_compress", arguments)


_STEADY = ("all-hit", "spread")
_FP32 = {"kv_dtype": "fp32"}  # as the engines' kernels take

WORKLOAD = Workload(
    spec=SPEC,
    options=Options,
    scenarios=SCENARIOS,
    defaults={
        "head_dim": 512,
        "compress_ratio": 128,
        "kv_dtype": "bf16",
        "state_dtype": "fp32",
        "next_n": 4,
    },
    sizes=(16, 128, 256),
    check_size=16,
    make=make,
    expected=expected,
    tolerances=TOLERANCES | ROW_TOLERANCES,
    metadata=(*METADATA, *ROW_METADATA),
    prefetch=PREFETCH,
    search=Search(
        candidates=candidates,
        shared_field="next_n",
        mixture={"all-hit": 0.45, "spread": 0.45, "no-hit": 0.1},
        prefetch={"none": 0.2, "metadata": 0.2, "state": 0.6},
        sizes=(1, 16, 64, 128, 256, 512),
    ),
    suite=(
        Measurement(problem={"next_n": [1, 4], "kv_dtype": ["bf16", "fp32"]}, scenarios=_STEADY),
        Measurement(
            problem={"compress_ratio": 4, "next_n": 1, "kv_dtype": ["bf16", "fp32"]},
            scenarios=("spread",),
        ),
        Measurement(
            problem={"compress_ratio": 4, "kv_dtype": ["bf16", "fp32"]}, scenarios=("all-hit",)
        ),
        Measurement(
            problem={"compress_ratio": 4, "head_dim": 128, "next_n": 1} | _FP32,
            options={"format": ["fp8_block128", "mxfp4"], "rotate": True},
            scenarios=("spread",),
        ),
        Measurement(
            problem={"compress_ratio": 4, "head_dim": 128} | _FP32,
            options={"format": ["fp8_block128", "mxfp4"], "rotate": True},
            scenarios=("all-hit",),
        ),
    ),
)
