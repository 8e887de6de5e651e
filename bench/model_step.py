"""The compressor's share of a model's decode step: three store ops, one after the other.

A pair of layers of DeepSeek-V4 has three compressors: that of the HCA layer (head_dim 512, ratio
128), that of the CSA layer (head_dim 512, ratio 4) and the indexer's (head_dim 128, ratio 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from kvfold.bench.environment import environment
from kvfold.bench.measure import limit, timing
from kvfold.bench.measure.limit import Limit
from kvfold.bench.measure.point import Point, with_scalars
from kvfold.bench.records import ModelStepReport, ModelStepRow
from kvfold.codegen.fields import check_names
from kvfold.runtime import dispatch
from kvfold.runtime.torch_op import call_with, torch_op
from kvfold.workload import workload

OP = "paged_kv_compress_store"
BATCHES = (16, 128, 256)
NEXT_N = (1, 4)
PREFETCH = "state"
DTYPES = {"kv_dtype": "fp32", "state_dtype": "fp32"}  # as the engines' kernels take


@dataclass(frozen=True)
class Compressor:
    """One compressor of a pair of layers.

    Attributes:
        problem: its problem fields, but for next_n and the dtypes.
        options: its options of the case.
    """

    problem: dict[str, Any]
    options: dict[str, Any]

    def point(self, next_n: int, batch: int) -> Point:
        """Where to measure it.

        Windows close as in steady decoding. With ratio 4, every request closes one where it has
        4 new tokens.
        """
        work = workload(OP)
        problem = work.spec.problem.of({**self.problem, **DTYPES, "next_n": next_n})
        all_hit = next_n % self.problem["compress_ratio"] == 0
        options = work.options(**self.options)
        return Point(problem, options, "all-hit" if all_hit else "spread", batch)


COMPRESSORS = {
    "hca": Compressor({"head_dim": 512, "compress_ratio": 128}, {"format": "mixed_584"}),
    "csa": Compressor({"head_dim": 512, "compress_ratio": 4}, {"format": "mixed_584"}),
    "indexer": Compressor(
        {"head_dim": 128, "compress_ratio": 4}, {"format": "fp8_block128", "rotate": True}
    ),
}


def check(next_n: int, batch: int, device: torch.device) -> None:
    """Raises WrongResult if a compressor of the step is wrong."""
    for name, one in COMPRESSORS.items():
        one.point(next_n, batch).verify(_call, name, device)


def measure(
    next_n: Sequence[int],
    batches: Sequence[int],
    prefetch: str,
    device: torch.device,
    started: Callable[[str], None],
) -> ModelStepReport:
    """Times steps on the GPU `device`, which must be torch's current one.

    Args:
        prefetch: of all calls.
        started: called with every step before it is measured.

    Raises:
        ValueError: there is no such prefetch. TableError: no row serves a compressor.
        WrongResult: a compressor is wrong.
    """
    check_names([prefetch], workload(OP).prefetch, "prefetch")
    best = limit.measure(device)
    rows = []
    for n, batch in itertools.product(next_n, batches):
        started(f"next_n {n}, batch {batch}")
        check(n, batch, device)
        rows.append(_measure(n, batch, prefetch, device, best))
    return ModelStepReport(**environment(device), **asdict(best), rows=rows)


def _call(arguments: Any) -> None:
    call_with(torch_op(OP), arguments)


def _measure(
    next_n: int, batch: int, prefetch: str, device: torch.device, best: Limit
) -> ModelStepRow:
    timed = with_scalars(_call, workload(OP).prefetch[prefetch])
    at = {name: one.point(next_n, batch) for name, one in COMPRESSORS.items()}
    cases = {name: point.cold_cases(device) for name, point in at.items()}
    # As many pairs of layers as the compressor with the fewest cases has: of the largest state.
    pairs = min(map(len, cases.values()))
    calls = {
        name: [partial(timed, case.arguments) for case in found[:pairs]]
        for name, found in cases.items()
    }
    in_turn = [one for pair in zip(*calls.values(), strict=True) for one in pair]
    whole = timing.replay(in_turn)
    alone = {name: timing.replay(found).median_us for name, found in calls.items()}
    return ModelStepRow(
        next_n=next_n,
        batch=batch,
        prefetch=prefetch,
        pairs=pairs,
        median_us=len(calls) * whole.median_us,
        min_us=len(calls) * whole.min_us,
        max_us=len(calls) * whole.max_us,
        alone_us=alone,
        variants={
            name: dispatch.select(point.problem, batch, device).symbol for name, point in at.items()
        },
        limit_us=sum(best.us(found[0].moved_bytes) for found in cases.values()),
    )
