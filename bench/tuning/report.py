"""The tuner's results file: what was planned, and all times."""

from dataclasses import dataclass
from functools import cached_property

from kvfold.bench.records import Report
from kvfold.bench.tuning.plan import Plan, TimePoint
from kvfold.bench.tuning.search import Times
from kvfold.codegen import Problem, Variant
from kvfold.codegen.fields import Value
from kvfold.codegen.gpu import check_arch


@dataclass(frozen=True, kw_only=True)
class TunedTime:
    """The median time of a variant at one point, in microseconds."""

    prefetch: str
    scenario: str
    size: int
    median_us: float


@dataclass(frozen=True, kw_only=True)
class TunedVariant:
    """All times of one variant."""

    problem: dict[str, Value]
    tuning: dict[str, Value]
    times: list[TunedTime]


@dataclass(frozen=True, kw_only=True)
class TuneReport(Report):
    """What `kvfold tune` measures and `--json` writes.

    Attributes:
        arch: of the GPU.
        plan: what was tuned.
        rows: one per variant.
    """

    KIND = "tuning"

    arch: str
    plan: Plan
    rows: list[TunedVariant]

    def __post_init__(self):
        check_arch(self.arch)
        _ = self.times

    @cached_property
    def times(self) -> Times:
        """All times."""
        spec, backend = self.plan.spec, self.plan.backend
        return {
            Variant(
                problem=spec.problem.of(row.problem),
                backend=backend,
                tuning=spec.tuning.of(row.tuning),
            ): {TimePoint(at.prefetch, at.scenario, at.size): at.median_us for at in row.times}
            for row in self.rows
        }

    def times_of(self, family: list[Problem]) -> Times:
        """The times of a family's variants."""
        return {one: found for one, found in self.times.items() if one.problem == family[-1]}


def rows(times: Times) -> list[TunedVariant]:
    """Times as the rows of a report."""
    return [
        TunedVariant(
            problem=variant.problem.values(),
            tuning=variant.tuning.values(),
            times=[TunedTime(**at._asdict(), median_us=us) for at, us in found.items()],
        )
        for variant, found in times.items()
    ]
