"""The tuner's search: which variants to time, at which points, and which sizes each shall serve.

Nothing here touches a GPU or a file. Times come from a function that is passed in.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvfold.bench.measure.runner import SIZES, combinations
from kvfold.codegen import Problem, TableError, Variant, op_spec
from kvfold.codegen.fields import check_names, check_value
from kvfold.codegen.spec import BACKENDS
from kvfold.runtime.compiler import Compiled
from kvfold.workload import Search, Workload, workload

RANGE_GAIN = 1.01  # that a further range must gain, over all points, to be worth its row
KEPT = 20  # variants that are timed everywhere, at most
KEPT_WITHIN = 1.35  # of the best at any of the first points


class TimePoint(NamedTuple):
    """Where a variant is timed."""

    prefetch: str
    scenario: str
    size: int


Times = dict[Variant, dict[TimePoint, float]]  # microseconds
Timer = Callable[[Variant, TimePoint], float]


@dataclass(frozen=True)
class Family:
    """Problems that share their measurements and rows: equal in all but the shared field.

    Attributes:
        problem: the one that is timed; its shared field has the largest value.
        shared_field: name of that field, or None.
        shared: every value of it that the rows name.
    """

    problem: Problem
    shared_field: str | None
    shared: tuple[int, ...]

    def __str__(self) -> str:
        return str(self.problem)

    def problems(self) -> list[Problem]:
        """Every problem of the family."""
        if self.shared_field is None:
            return [self.problem]
        values = self.problem.values()
        return [type(self.problem).of(values | {self.shared_field: one}) for one in self.shared]


@dataclass(frozen=True)
class Range:
    """The sizes that one variant serves; max_size None for no bound."""

    variant: Variant
    min_size: int
    max_size: int | None


@dataclass(frozen=True)
class Tuned:
    """A family, what was measured of it, and the ranges chosen, ascending."""

    family: Family
    times: Times
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Plan:
    """What to tune.

    Attributes:
        op: name of the op.
        families: the problems.
        backend: 'cuda' or 'triton'.
        sizes: on the size axis, ascending.
        mixture: scenario -> weight; they add up to 1.
        prefetch: how to call, names of the workload's prefetch.
        command: what to type for it, without its mixture.
    """

    op: str
    families: tuple[Family, ...]
    backend: str
    sizes: tuple[int, ...]
    mixture: Mapping[str, float]
    prefetch: tuple[str, ...]
    command: str

    @property
    def workload(self) -> Workload:
        """The op's workload."""
        return workload(self.op)

    @property
    def scenarios(self) -> tuple[str, ...]:
        """Where to time."""
        return tuple(self.mixture)

    @property
    def full_command(self) -> str:
        """What to type for it."""
        if self.mixture == search_of(self.workload).mixture:
            return self.command
        mixture = ",".join(f"{name}={weight:g}" for name, weight in self.mixture.items())
        return f"{self.command} --mixture {mixture}"


def plan(
    op: str,
    problems: Mapping[str, Any],
    *,
    backend: str = "cuda",
    sizes: Sequence[int] | None = None,
    mixture: Mapping[str, float] | None = None,
    prefetch: Sequence[str] | None = None,
) -> Plan:
    """A plan.

    Args:
        problems: problem field -> value or list of values; fields with a default may be left out.
        sizes, mixture, prefetch: by default the workload's. Triton knows no prefetch.

    Raises:
        TableError: a value that is not accepted.
        ValueError: the op has nothing to tune.
    """
    spec, work = op_spec(op), workload(op)
    search = search_of(work)
    check_value("backend", backend, BACKENDS)
    sizes = tuple(sorted(set(search.sizes if sizes is None else sizes)))
    for size in sizes:
        check_value(spec.axis, size, SIZES)
    modes = ("none",) if backend != "cuda" else tuple(work.prefetch)
    prefetch = modes if prefetch is None else tuple(prefetch)
    check_names(prefetch, modes, f"prefetch of {backend}")
    return Plan(
        op=op,
        families=tuple(_families(op, problems, search.shared_field)),
        backend=backend,
        sizes=sizes,
        mixture=search.mixture if mixture is None else mixture,
        prefetch=prefetch,
        command=_command(op, problems, backend, sizes, prefetch),
    )


def _families(op: str, problems: Mapping[str, Any], shared: str | None) -> Iterator[Family]:
    spec = op_spec(op)
    fields = dict(problems)
    values: Sequence[Any] = ()
    if shared is not None and shared in fields:
        values = sorted(_as_list(fields[shared]))
        for value in values:
            spec.problem.field(shared).check(value)
        fields[shared] = values[-1]
    for one in combinations(fields):
        problem = spec.problem.of(one, f"problem field of {op}")
        default = () if shared is None else (getattr(problem, shared),)
        yield Family(problem, shared, tuple(values) or default)


def _command(op: str, problems: Mapping[str, Any], backend: str, sizes, prefetch) -> str:
    work, axis = workload(op), op_spec(op).axis
    words = [f"kvfold tune {op}"]
    for name, values in problems.items():
        words.append(f"{name}={','.join(str(value).lower() for value in _as_list(values))}")
    if sizes != search_of(work).sizes:
        words.append(f"--{axis} {','.join(map(str, sizes))}")
    if backend != "cuda":
        words.append(f"--backend {backend}")
    if backend == "cuda" and prefetch != tuple(work.prefetch):
        words.append(f"--prefetch {','.join(prefetch)}")
    return " ".join(words)


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def search_of(work: Workload) -> Search:
    """What the tuner searches for an op. Raises ValueError if the op has nothing to tune."""
    if work.search is None:
        raise ValueError(f"{work.spec.name} declares no search, so it cannot be tuned")
    return work.search


def weights(mixture: Mapping[str, float], prefetch: Sequence[str]) -> dict[tuple[str, str], float]:
    """(prefetch, scenario) -> weight; they add up to 1, and each prefetch counts the same."""
    return {(mode, name): w / len(prefetch) for mode in prefetch for name, w in mixture.items()}


def parse_mixture(text: str, scenarios: Iterable[str]) -> dict[str, float]:
    """'all-hit=1,no-hit=3' -> {'all-hit': 0.25, 'no-hit': 0.75}; a weight of 0 is left out.

    Raises:
        ValueError: an unknown scenario, one that is given twice, a weight that is no number.
    """
    known = list(scenarios)
    accepted = f"weights of {', '.join(known)}, as in {known[0]}=0.5,{known[-1]}=0.5"
    refused = ValueError(f"mixture is {text!r}; accepted: {accepted}")
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        try:
            weight = float(number)
        except ValueError:
            raise refused from None
        if name not in known or name in found or not 0 <= weight < math.inf:
            raise refused
        found[name] = weight
    total = sum(found.values())
    if not 0 < total < math.inf:
        raise refused
    return {name: weight / total for name, weight in found.items() if weight}


# ---- candidates ----------------------------------------------------------------------------------


def candidates(plan: Plan, problem: Problem, arch: str) -> list[Variant]:
    """Every variant of a problem that is worth a trial and can run on a GPU of this arch.

    Raises:
        TableError: no variant can run.
    """
    found = []
    for tuning in search_of(plan.workload).candidates(problem, plan.backend, arch):
        try:
            variant = Variant(problem=problem, backend=plan.backend, tuning=tuning)
            variant.check_arch(arch)
        except TableError:  # what cannot run is no candidate
            continue
        found.append(variant)
    if not found:
        raise TableError(f"no {plan.backend} variant can run on {arch} ({problem})")
    return found


def distinct(compiled: Iterable[tuple[Variant, Compiled]]) -> list[Variant]:
    """The candidates that do not spill, each kernel once.

    min_ctas only limits the registers. Where it changes none, the kernel is that of a smaller one.
    """
    found: dict[tuple, Variant] = {}
    for variant, code in sorted(compiled, key=lambda pair: pair[0].launch.min_ctas):
        if not code.spill_bytes:
            tuning = variant.tuning.values()
            tuning.pop("min_ctas", None)
            found.setdefault((*tuning.values(), code.registers), variant)
    if not found:
        raise TableError("every variant that could be timed spills registers")
    return list(found.values())


# ---- timing --------------------------------------------------------------------------------------


def all_points(plan: Plan) -> list[TimePoint]:
    """Every point of the plan."""
    points = itertools.product(plan.prefetch, plan.scenarios, plan.sizes)
    return list(itertools.starmap(TimePoint, points))


def first_points(plan: Plan) -> list[TimePoint]:
    """Where all candidates are timed.

    With the plan's last prefetch and in its first two scenarios, at the ends and the middle of the
    size axis; the smallest size in the first scenario only.
    """
    sizes = (plan.sizes[0], plan.sizes[len(plan.sizes) // 2], plan.sizes[-1])
    points = [
        TimePoint(plan.prefetch[-1], scenario, size)
        for number, scenario in enumerate(plan.scenarios[:2])
        for size in sizes[min(number, 1) :]
    ]
    return list(dict.fromkeys(points))


def most_times(plan: Plan, count: int) -> int:
    """The most times that `measure` takes of so many candidates."""
    first = len(first_points(plan))
    return count * first + min(count, KEPT) * (len(all_points(plan)) - first)


def measure(found: Sequence[Variant], time: Timer, plan: Plan) -> Times:
    """Times all candidates at the first points, and the best of them everywhere.

    All candidates are timed at a point before the next point.
    """
    times: Times = {variant: {} for variant in found}
    first = first_points(plan)
    for point in first:
        for variant in found:
            times[variant][point] = time(variant, point)
    kept = survivors(times, first)
    # Calls with and without prefetch share their cases, so they are timed one after the other.
    for point in sorted(all_points(plan), key=lambda one: (one.scenario, one.size)):
        if point not in first:
            for variant in kept:
                times[variant][point] = time(variant, point)
    return times


def survivors(times: Times, points: Sequence[TimePoint]) -> list[Variant]:
    """At most KEPT variants, each close to the best at one of the points or more.

    The points take turns, so that many similar variants that are good at one point do not crowd out
    one that is good at another.
    """
    queues = []
    for point in points:
        ranking = sorted(times, key=lambda variant, at=point: times[variant][at])
        bound = KEPT_WITHIN * times[ranking[0]][point]
        queues.append([variant for variant in ranking if times[variant][point] <= bound])
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(dict.fromkeys(variant for variant in in_turn if variant is not None))[:KEPT]


# ---- choosing ------------------------------------------------------------------------------------


def choose(times: Times, plan: Plan) -> tuple[Range, ...]:
    """The ranges that make the weighted geometric mean of the times least, over all sizes.

    Args:
        times: a variant that was not timed at every point is left out.

    Raises:
        TableError: no variant was timed at every point.
    """
    shares, sizes = weights(plan.mixture, plan.prefetch), plan.sizes
    found = timed_everywhere(times, plan)
    if not found:
        raise TableError("none of the variants was timed at every point")
    costs = [
        [
            sum(w * math.log(times[variant][TimePoint(*at, size)]) for at, w in shares.items())
            for size in sizes
        ]
        for variant in found
    ]
    ranges, first = [], 1
    for index, last in cut(costs, math.log(RANGE_GAIN)):
        # Between two sizes that were measured, the geometric middle separates the ranges.
        bound = math.isqrt(sizes[last] * sizes[last + 1]) if last + 1 < len(sizes) else None
        ranges.append(Range(found[index], first, bound))
        first = bound + 1 if bound is not None else first
    return tuple(ranges)


def timed_everywhere(times: Times, plan: Plan) -> list[Variant]:
    """The variants that were timed at every point."""
    points = all_points(plan)
    return [variant for variant, found in times.items() if all(point in found for point in points)]


def untimed(plan: Plan, arch: str) -> list[Tuned]:
    """Each family's first candidate for all sizes: rows to try whether a table accepts them."""
    return [
        Tuned(family, {}, (Range(candidates(plan, family.problem, arch)[0], 1, None),))
        for family in plan.families
    ]


def cut(costs: Sequence[Sequence[float]], penalty: float) -> list[tuple[int, int]]:
    """Cuts an axis into ranges of one candidate each, at least cost.

    Args:
        costs: per candidate, its cost at every place of the axis.
        penalty: what every range costs beside.

    Returns:
        per range (candidate, its last place), ascending.
    """
    places = len(costs[0])
    sums = [list(itertools.accumulate(row, initial=0.0)) for row in costs]
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]
    for end in range(1, places + 1):
        options = (
            (
                best[start][0] + penalty + row[end] - row[start],
                [*best[start][1], (index, end - 1)],
            )
            for start in range(end)
            for index, row in enumerate(sums)
        )
        best.append(min(options, key=lambda option: (option[0], len(option[1]))))
    return best[places][1]
