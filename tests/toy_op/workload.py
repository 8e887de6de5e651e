"""How toy is benchmarked and tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.codegen import FieldSet, integer
from kvfold.ops.toy.spec import SPEC, Arguments, Problem
from kvfold.workload import EXACT, Case, Measurement, Workload


@dataclass(frozen=True, kw_only=True)
class Options(FieldSet):
    """A case beside its problem."""

    padding: int = integer(range(0, 65, 4), default=0, help="columns between two rows of x")


def make(
    problem: Problem,
    rows: int,
    scenario: str,
    options: Options,
    device: torch.device | str,
    seed: int = 0,
) -> Case:
    """Makes one call."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.randn(rows, problem.columns + options.padding, generator=generator, device=device)
    x = wide[:, : problem.columns]
    y = torch.full((rows, problem.columns), torch.nan, device=device)
    factor = {"double": 2, "negate": -1}[scenario]
    return Case(Arguments(x, y, factor), moved_bytes=8 * y.numel(), rows=rows)


def expected(arguments: Arguments) -> Mapping[str, Tensor]:
    """What a call must leave."""
    return {"y": arguments.x.double() * arguments.factor}


WORKLOAD = Workload(
    spec=SPEC,
    options=Options,
    scenarios={"double": "factor 2", "negate": "factor -1"},
    defaults={"columns": 64},
    sizes=(1, 1024),
    check_size=32,
    make=make,
    expected=expected,
    tolerances={"y": EXACT},
    suite=(Measurement(options={"padding": [0, 4]}),),
)
