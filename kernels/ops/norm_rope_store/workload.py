"""How norm_rope_store is benchmarked, tuned and tested."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.norm_rope_store import reference
from kvfold.ops.norm_rope_store.spec import ROW_WARPS, SPEC, WARPS, Arguments, Problem, Tuning
from kvfold.ops.row_workload import (
    ROW_METADATA,
    ROW_TOLERANCES,
    RowOptions,
    row_arguments,
    row_bytes,
)
from kvfold.runtime.arguments import DTYPES
from kvfold.workload import Case, Measurement, Search, Workload, copy_of

SCENARIOS = {
    "store": "every row is stored",
    "sparse": "one row in 32 has a slot, as where one request in 32 closes a window",
}


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """A case beside its problem."""


def make(
    problem: Problem,
    rows: int,
    scenario: str,
    options: Options,
    device: torch.device | str,
    seed: int = 0,
) -> Case:
    """Makes one call.

    A call must move the bytes of the rows that are stored and their entries of the RoPE table. The
    rows themselves do not count: in a model the kernel before has just written them.
    """
    slot = np.arange(rows) % (32 if scenario == "sparse" else 1) == 0
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(rows, problem.head_dim, generator=generator, device=device)
    arguments = Arguments(
        rows=values.to(DTYPES[problem.rows_dtype]),
        **row_arguments(options, problem.head_dim, slot, device, seed),
    )
    stored = int(slot.sum())
    return Case(arguments, moved_bytes=stored * row_bytes(options, problem.head_dim), rows=stored)


def expected(arguments: Arguments) -> Mapping[str, Tensor]:
    """What a call must leave."""
    copies = copy_of(arguments, ("cache",))
    reference.run(copies)
    return {"cache": copies.cache}


def candidates(problem: Problem, backend: str, arch: str) -> Iterator[Tuning]:
    """Tuning worth a trial."""
    if backend != "cuda":
        yield from (Tuning(warps=warps) for warps in WARPS)
        return
    for warps, row_warps in itertools.product((1, 2, 4, 8), ROW_WARPS):
        if row_warps <= min(warps, problem.head_dim // 128):
            for sm_warps in (16, 20, 24, 32, 48):
                yield Tuning(warps=warps, row_warps=row_warps, min_ctas=min(sm_warps // warps, 32))


WORKLOAD = Workload(
    spec=SPEC,
    options=Options,
    scenarios=SCENARIOS,
    defaults={"head_dim": 512, "rows_dtype": "bf16"},
    sizes=(16, 512, 16384),
    check_size=64,
    make=make,
    expected=expected,
    tolerances=ROW_TOLERANCES,
    metadata=("rows", *ROW_METADATA),
    prefetch={name: {"prefetch": name} for name in ("none", "metadata")},
    search=Search(
        candidates=candidates,
        shared_field=None,
        mixture={"store": 1.0},
        prefetch={"none": 0.3, "metadata": 0.7},
        sizes=(16, 512, 2048, 16384),
    ),
    suite=(
        Measurement(),
        Measurement(options={"format": ["bf16", "fp8_528", "fp4_288"]}, scenarios=("store",)),
        Measurement(
            problem={"head_dim": 128},
            options={"format": ["fp8_block128", "mxfp4"], "rotate": True},
            scenarios=("store",),
        ),
        Measurement(scenarios=("store",), override={"backend": "triton"}),
    ),
)
