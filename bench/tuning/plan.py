"""What to tune: problems, the points at which their variants are timed, and the points' weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

from kvfold.bench.measure.point import SIZES, combinations
from kvfold.codegen import OpSpec, Problem, op_spec
from kvfold.codegen.fields import Value, check_names, check_value
from kvfold.codegen.spec import BACKENDS
from kvfold.workload import Search, Workload, workload


class TimePoint(NamedTuple):
    """Where a variant is timed."""

    prefetch: str
    scenario: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to tune.

    Attributes:
        op: name of the op.
        problem: problem field -> values; every combination is tuned.
        backend: 'cuda' or 'triton'.
        sizes: on the size axis, ascending.
        mixture: scenario -> weight; the scenarios to time.
        prefetch: how to call, names of the workload's prefetch that the op's search weighs.

    Raises:
        TableError: a name or a value that is not accepted.
        ValueError: the op has nothing to tune.
    """

    op: str
    problem: dict[str, list[Value]]
    backend: str
    sizes: list[int]
    mixture: dict[str, float]
    prefetch: list[str]

    def __post_init__(self):
        check_value("backend", self.backend, BACKENDS)
        for size in self.sizes:
            check_value(self.spec.axis, size, SIZES)
        check_names(self.mixture, self.workload.scenarios, "scenario")
        check_names(
            self.prefetch, _prefetches(self.op, self.backend), f"prefetch of {self.backend}"
        )
        if not self.mixture or self.sizes != sorted(set(self.sizes)):
            raise ValueError("mixture is empty, or sizes are not ascending")
        _ = self.families

    @property
    def spec(self) -> OpSpec:
        """The op's declaration."""
        return op_spec(self.op)

    @property
    def workload(self) -> Workload:
        """The op's workload."""
        return workload(self.op)

    @cached_property
    def families(self) -> list[list[Problem]]:
        """The problems. Those of one family differ in the op's shared field alone.

        They share the measurements and rows of the last, which has the field's largest value.
        """
        shared = search_of(self.op).shared_field
        own = {name: values for name, values in self.problem.items() if name == shared}
        others = {name: values for name, values in self.problem.items() if name != shared}
        what = f"problem field of {self.op}"
        families = [
            [self.spec.problem.of(one | last, what) for last in combinations(own)]
            for one in combinations(others)
        ]
        if shared is not None:
            for family in families:
                family.sort(key=attrgetter(shared))
        return families

    @cached_property
    def points(self) -> dict[TimePoint, float]:
        """Every point and its weight. The weights of one size add up to 1."""
        modes = {name: search_of(self.op).prefetch[name] for name in self.prefetch}
        total = sum(self.mixture.values()) * sum(modes.values())
        return {
            TimePoint(prefetch, scenario, size): weight * mode / total
            for prefetch, mode in modes.items()
            for scenario, weight in self.mixture.items()
            for size in self.sizes
        }

    @property
    def command(self) -> str:
        """What to type for it."""
        words = [f"{name}={_list(values)}" for name, values in self.problem.items()]
        mixture = _list(f"{name}={weight:g}" for name, weight in self.mixture.items())
        return (
            f"kvfold tune {self.op} {' '.join(words)} --backend {self.backend}"
            f" --{self.spec.axis} {_list(self.sizes)} --prefetch {_list(self.prefetch)}"
            f" --mixture {mixture}"
        )


def plan(
    op: str,
    problem: Mapping[str, Any],
    *,
    backend: str = "cuda",
    sizes: Iterable[int] | None = None,
    mixture: Mapping[str, float] | None = None,
    prefetch: Iterable[str] | None = None,
) -> Plan:
    """A plan in which what is left out is the workload's.

    Args:
        problem: problem field -> value or list of values; fields with a default may be left out.
    """
    search = search_of(op)
    return Plan(
        op=op,
        problem={name: v if isinstance(v, list) else [v] for name, v in problem.items()},
        backend=backend,
        sizes=sorted(set(sizes or search.sizes)),
        mixture=dict(mixture or search.mixture),
        prefetch=list(prefetch or _prefetches(op, backend)),
    )


def search_of(op: str) -> Search:
    """What the tuner searches for an op. Raises ValueError if the op has nothing to tune."""
    found = workload(op).search
    if found is None:
        raise ValueError(f"{op} declares no search, so it cannot be tuned")
    return found


def parse_mixture(text: str) -> dict[str, float]:
    """'all-hit=1, no-hit=3' -> {'all-hit': 1.0, 'no-hit': 3.0}. Raises ValueError."""
    pairs = [[part.strip() for part in item.split("=")] for item in text.split(",")]
    try:
        found = {name: float(weight) for name, weight in pairs}
    except ValueError:
        found = {}
    if len(found) < len(pairs) or not all(0 < weight < 1e30 for weight in found.values()):
        accepted = "weights of scenarios, as in SCENARIO=0.5,SCENARIO=0.5"
        raise ValueError(f"mixture is {text!r}; accepted: {accepted}")
    return found


def _prefetches(op: str, backend: str) -> Sequence[str]:
    """The prefetches that the search of a backend weighs; Triton knows none."""
    return tuple(search_of(op).prefetch) if backend == "cuda" else ("none",)


def _list(values: Iterable[Any]) -> str:
    return ",".join(str(value).lower() for value in values)
