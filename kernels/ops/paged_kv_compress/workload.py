"""How paged_kv_compress is benchmarked, tuned and tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.codegen import choice
from kvfold.ops import state_oracle
from kvfold.ops.decode_workload import SCENARIOS, StateOptions, candidates, make_step
from kvfold.ops.paged_kv_compress import reference, row_by_row
from kvfold.ops.paged_kv_compress.spec import SPEC, Arguments, Problem
from kvfold.ops.state_workload import METADATA, PREFETCH, TOLERANCES, by_reference
from kvfold.workload import Case, Measurement, Search, Workload

ORACLE_BATCH = 16  # the largest batch that plain Python loops check in reasonable time


@dataclass(frozen=True, kw_only=True)
class Options(StateOptions):
    """A case beside its problem."""

    output_dtype: str = choice("bf16", "fp32", default="bf16", help="of the output")


def make(
    problem: Problem,
    batch: int,
    scenario: str,
    options: Options,
    device: torch.device | str,
    seed: int = 0,
) -> Case:
    """Makes one step."""
    step = make_step(problem, batch, scenario, options, device, seed)
    output = step.maker.output(int(step.reserved.sum()), problem, options)
    rows = int(step.closing.sum())
    return Case(
        arguments=Arguments(**step.arguments, output=output),
        moved_bytes=step.moved_bytes + rows * problem.head_dim * output.element_size(),
        rows=rows,
    )


def expected(arguments: Arguments) -> Mapping[str, Tensor]:
    """What a call must leave: by the oracle or, for a large batch, by the reference."""
    if arguments.kv_lens.numel() <= ORACLE_BATCH:
        return state_oracle.expected(arguments, arguments.next_n)
    return by_reference(reference, arguments)


# ---- the workload --------------------------------------------------------------------------------

_STEADY = ("all-hit", "spread", "no-hit")
_ALL_HIT = ("all-hit",)
_RATIO_4 = {"sizes": (16, 64, 128, 256, 512), "scenarios": _ALL_HIT}

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
    sizes=(1, 16, 32, 64, 128, 256, 512),
    check_size=16,
    make=make,
    expected=expected,
    tolerances=TOLERANCES,
    metadata=METADATA,
    prefetch=PREFETCH,
    yardsticks={"row_by_row": row_by_row.bind},
    search=Search(
        candidates=candidates,
        shared_field="next_n",
        # no-hit counts least: of the many requests of a large batch one nearly always closes one.
        mixture={"all-hit": 0.45, "spread": 0.45, "no-hit": 0.1},
        # An engine that cares for the time prefetches.
        prefetch={"none": 0.2, "metadata": 0.2, "state": 0.6},
        sizes=(1, 16, 32, 64, 128, 256, 512, 1024, 4096),
    ),
    suite=(
        Measurement(baseline=True, scenarios=_STEADY),
        Measurement(options={"page_size": 128}, scenarios=_ALL_HIT),
        Measurement(options={"layout": "packed"}, scenarios=_ALL_HIT),
        Measurement(
            problem={"state_dtype": "bf16"}, sizes=(16, 64, 128, 256, 512), scenarios=_STEADY
        ),
        Measurement(problem={"compress_ratio": 4, "next_n": 1}, **_RATIO_4),
        Measurement(problem={"compress_ratio": 4}, **_RATIO_4),
        Measurement(problem={"compress_ratio": 4, "next_n": 1, "head_dim": 128}, **_RATIO_4),
        Measurement(problem={"compress_ratio": 4, "head_dim": 128}, **_RATIO_4),
        Measurement(sizes=(16, 128, 256, 512), scenarios=_STEADY, override={"backend": "triton"}),
        Measurement(problem={"next_n": 1}, sizes=(16, 128, 512), scenarios=_ALL_HIT),
        Measurement(problem={"compress_ratio": 4}, sizes=(2048,), scenarios=_ALL_HIT),
        Measurement(sizes=(1024, 4096), scenarios=("spread",)),
        Measurement(
            problem={"compress_ratio": [128, 4]},
            options={"page_size": [1, 2, 4, 8]},
            sizes=(16, 256),
            scenarios=_ALL_HIT,
        ),
        Measurement(
            problem={"compress_ratio": [128, 4]},
            options={"max_pages": 262_144},
            sizes=(16, 256),
            scenarios=_ALL_HIT,
        ),
        Measurement(
            problem={"next_n": 8, "compress_ratio": [128, 4]}, sizes=(16, 256), scenarios=_ALL_HIT
        ),
        Measurement(
            problem={"ape_in_state": False, "compress_ratio": [128, 4]},
            sizes=(16, 256),
            scenarios=_ALL_HIT,
        ),
        # Beside prefill_compress, whose suite has the same requests.
        Measurement(problem={"compress_ratio": [128, 4]}, sizes=(256,), scenarios=("ragged",)),
    ),
)
