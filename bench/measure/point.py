"""A place to measure: its cases, and whether a kernel is right there."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvfold.bench.measure import timing
from kvfold.bench.measure.verify import WrongResult, verify
from kvfold.codegen import FieldSet, Problem
from kvfold.workload import Case, Workload, workload

SIZES = range(1, 2**20 + 1)  # of a case; a larger one fits in no GPU's memory

Call = Callable[[Any], None]  # takes the op's arguments


@dataclass(frozen=True)
class Point:
    """A problem, a case's options, a scenario and a size."""

    problem: Problem
    options: FieldSet
    scenario: str
    size: int

    def __str__(self) -> str:
        axis = f"size {self.size}"
        return ", ".join(filter(None, (self.scenario, axis, str(self.problem), str(self.options))))

    @property
    def workload(self) -> Workload:
        """The op's workload."""
        return workload(self.problem.op)

    def case(self, device: torch.device, seed: int = 0) -> Case:
        """A case of the point."""
        return self.workload.make(
            self.problem, self.size, self.scenario, self.options, device=device, seed=seed
        )

    def cold_cases(self, device: torch.device, most: int = timing.MAX_CALLS) -> list[Case]:
        """As many cases as make the L2 cold, or as memory and `most` allow."""
        metadata = self.workload.metadata
        return timing.cold_cases(lambda seed: self.case(device, seed), metadata, device, most)

    def verify(self, call: Call, name: str, device: torch.device) -> "Checked":
        """Checks a kernel. Raises WrongResult that names it and the point if it is wrong."""
        case = self.case(device)
        try:
            return Checked(self, case.rows, verify(call, self.workload, case))
        except WrongResult as error:
            raise WrongResult(f"{name} is wrong at {self}: {error}") from None


@dataclass(frozen=True)
class Checked:
    """A point found right: the rows that the call writes, and the largest error in them."""

    point: Point
    rows: int
    largest_error: float


def with_scalars(call: Call, scalars: Mapping[str, Any]) -> Call:
    """The call with other scalar arguments."""
    return lambda arguments: call(replace(arguments, **scalars))


def combinations(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the fields' values, of which some are lists."""
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in fields.values()]
    for values in itertools.product(*lists):
        yield dict(zip(fields, values, strict=True))
