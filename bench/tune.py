"""The search of `kvfold tune`: which variants to time, where, and which batches each shall serve.

Nothing here touches a GPU or a file: times come from a function that is passed in.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kvfold.bench import cases
from kvfold.codegen import TableError, Variant
from kvfold.codegen.variant import (
    POSITIVE,
    SHARED_KIB,
    SHARED_KIB_ELSEWHERE,
    SM_REGISTERS,
    check_value,
    with_defaults,
)
from kvfold.nvrtc import Compiled

BATCHES = (1, 4, 16, 32, 64, 128, 256, 512)
# No-hit counts least: of the many requests of a large batch one nearly always closes a window.
MIXTURE = {"all-hit": 0.45, "spread": 0.45, "no-hit": 0.1}
RANGE_GAIN = 1.01  # what a range more must gain, all batches together, to be worth its row

REDUCE_WARPS = (1, 2, 4, 8, 16)
HEAD_SLICES = (16, 32, 64, 128, 256, 512)
REGISTER_BUDGETS = (128, 96, 80)  # registers per thread to try to make do with
CTA_RESERVED = 1024  # bytes of an SM's shared memory that the system takes per CTA
TRITON_TILE = 128  # rows x columns per thread; larger tiles compile for minutes, then spill

KEPT = 20  # variants that are timed everywhere, at most
KEPT_WITHIN = 1.35  # of the best at any of the first points

Point = tuple[str, int]  # scenario, batch
Times = dict[Variant, dict[Point, float]]  # microseconds
Timer = Callable[[Variant, str, int], float]  # (variant, scenario, batch) -> microseconds


@dataclass(frozen=True)
class Family:
    """Problems that share their measurements and rows: equal in everything but next_n.

    Attributes:
        problem: the op's problem fields, next_n being the largest, at which the times are taken.
        next_n: every next_n that the rows shall name.
    """

    problem: dict[str, Any]
    next_n: tuple[int, ...]

    def __str__(self) -> str:
        words = (f"{name} {str(value).lower()}" for name, value in self.problem.items())
        return ", ".join(words)

    @property
    def keys(self) -> list[tuple]:
        """Variant.key of every problem."""
        return [tuple((self.problem | {"next_n": n}).values()) for n in self.next_n]


@dataclass(frozen=True)
class Range:
    """The batch sizes that one variant serves; max_batch None for no bound."""

    variant: Variant
    min_batch: int
    max_batch: int | None


@dataclass(frozen=True)
class Tuned:
    """A family, what was measured of it, and the ranges chosen, ascending."""

    family: Family
    times: Times
    ranges: tuple[Range, ...]


def families(problems: Mapping[str, Sequence]) -> list[Family]:
    """Every combination of the fields' values, next_n left together.

    Args:
        problems: problem field -> values; fields with a default may be left out.

    Raises:
        TableError: a value that is not accepted, or a field that is missing.
    """
    spec = Variant.spec("problem")
    names = [name for name in problems if name != "next_n"]
    found = []
    for values in itertools.product(*(problems[name] for name in names)):
        one = dict(zip(names, values, strict=True))
        for next_n in problems["next_n"]:
            check_value("next_n", next_n, spec["next_n"]["legal"])
        problem = with_defaults(one | {"next_n": max(problems["next_n"])}, spec)
        for name, value in problem.items():
            check_value(name, value, spec[name]["legal"])
        found.append(Family(problem, tuple(sorted(problems["next_n"]))))
    return found


@dataclass(frozen=True)
class Plan:
    """What to tune.

    Attributes:
        op: name of the op.
        problems: problem field -> values, which fan out; fields with a default may be left out.
        batches: the batch axis; kept ascending.
        scenarios: where to time.
        prefetch_state: how to call the cuda kernels.

    Raises:
        TableError: a value that is not accepted.
    """

    op: str
    problems: Mapping[str, Sequence]
    backend: str = "cuda"
    batches: tuple[int, ...] = BATCHES
    scenarios: tuple[str, ...] = tuple(MIXTURE)
    prefetch_state: bool = True

    def __post_init__(self):
        check_value("backend", self.backend, Variant.spec("tuning")["backend"]["legal"])
        for batch in self.batches:
            check_value("batch", batch, POSITIVE)
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))
        object.__setattr__(self, "prefetch_state", self.prefetch_state and self.backend == "cuda")
        _ = self.families  # checks the problems

    @cached_property
    def families(self) -> list[Family]:
        """Every family of the problems."""
        return families(self.problems)

    @property
    def command(self) -> str:
        """What to type for it."""
        words = ["kvfold tune"]
        for name, values in self.problems.items():
            option = name.replace("_", "-")
            if values in ((True,), (False,)):
                words.append(f"--{option}" if values[0] else f"--no-{option}")
            else:
                words.append(f"--{option} {','.join(map(str, values))}")
        if self.batches != BATCHES:
            words.append(f"--batch {','.join(map(str, self.batches))}")
        if self.backend != "cuda":
            words.append(f"--backend {self.backend}")
        elif not self.prefetch_state:
            words.append("--no-prefetch-state")
        return " ".join(words)

    def groups(self, arch: str) -> set[tuple]:
        """Bucket.group of every problem, for rows of this arch."""
        keys = itertools.chain.from_iterable(family.keys for family in self.families)
        return {(self.op, self.backend, arch, *key) for key in keys}

    def candidates(self, arch: str) -> list[list[Variant]]:
        """The candidates of each family, see `candidates`."""
        return [candidates(self.op, one.problem, self.backend, arch) for one in self.families]


def mixture(text: str) -> dict[str, float]:
    """'all-hit=1,no-hit=3' -> {'all-hit': 0.25, 'no-hit': 0.75}; scenarios of no weight left out.

    Raises:
        ValueError: an unknown scenario, one that stands twice, a weight that is none.
    """
    accepted = f"weights of {', '.join(cases.SCENARIOS)}, as in all-hit=0.5,spread=0.5"
    refused = ValueError(f"mixture is {text!r}; accepted: {accepted}")
    weights = {}
    for item in text.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        try:
            weight = float(number)
        except ValueError:
            raise refused from None
        if name not in cases.SCENARIOS or name in weights or not 0 <= weight < math.inf:
            raise refused
        weights[name] = weight
    total = sum(weights.values())
    if not total:
        raise refused
    return {name: weight / total for name, weight in weights.items() if weight}


# ---- candidates ----------------------------------------------------------------------------------


def candidates(op: str, problem: dict[str, Any], backend: str, arch: str) -> list[Variant]:
    """Every variant of a problem that is worth a trial and can run on a GPU of this arch.

    Raises:
        TableError: no variant can run.
    """
    found = []
    for schedule, warps, width in itertools.product(
        Variant.spec("tuning")["schedule"]["legal"], REDUCE_WARPS, HEAD_SLICES
    ):
        tuning = {"schedule": schedule, "reduce_warps": warps, "head_slice": width}
        try:
            variant = Variant(op=op, backend=backend, **problem, **tuning)
            variant.check_shared(arch)
        except TableError:  # what cannot run is no candidate
            continue
        if backend == "triton" and _tile(variant) > TRITON_TILE:
            continue
        found += [replace(variant, min_ctas=ctas) for ctas in _min_ctas(variant, arch)]
    if not found:
        what = f"no {backend} variant with head_slice {HEAD_SLICES[0]} or more can run on {arch}"
        words = ", ".join(f"{name} {str(value).lower()}" for name, value in problem.items())
        raise TableError(f"{what} ({words})")
    return found


def _tile(variant: Variant) -> float:
    """Values of state that fall to one thread."""
    window_rows = variant.compress_ratio * (2 if variant.overlap else 1)
    return window_rows * variant.head_slice / variant.threads


def _min_ctas(variant: Variant, arch: str) -> list[int]:
    """Values of min_ctas to try: from a budget of registers, as far as shared memory allows."""
    shared_kib = 1 + SHARED_KIB.get(arch, SHARED_KIB_ELSEWHERE)  # an SM has one more than a CTA
    most = 1024 * shared_kib // (variant.shared_bytes + CTA_RESERVED)
    fitting = {
        min(most, SM_REGISTERS // (variant.threads * registers)) for registers in REGISTER_BUDGETS
    }
    several = sorted(ctas for ctas in fitting if ctas >= 2)
    # A persistent kernel launches that many, so one alone would leave most of the SM idle.
    alone = variant.schedule == "direct" or not several
    return [1, *several] if alone else several


def distinct(compiled: Iterable[tuple[Variant, Compiled]]) -> list[Variant]:
    """The candidates that do not spill, each kernel once, in order of their min_ctas.

    For a direct variant min_ctas is only a limit of registers: where it changes none, the kernel is
    that of the smaller min_ctas. A persistent one launches as many.
    """
    found = {}
    for variant, code in sorted(compiled, key=lambda pair: pair[0].min_ctas):
        if not code.spill_bytes:
            direct = variant.schedule == "direct"
            same = code.registers if direct else variant.min_ctas
            found.setdefault((variant.schedule, variant.reduce_warps, variant.head_slice, same),
                             variant)  # fmt: skip
    if not found:
        raise TableError("every variant that could be timed spills registers")
    return list(found.values())


# ---- timing --------------------------------------------------------------------------------------


def first_points(batches: Sequence[int], scenarios: Sequence[str]) -> list[Point]:
    """Where all candidates are timed: the ends and the middle of the batch axis, all-hit.

    And from the middle on spread, where the schedules differ most.
    """
    main = "all-hit" if "all-hit" in scenarios else scenarios[0]
    middle = batches[len(batches) // 2]
    points = [(main, batch) for batch in (batches[0], middle, batches[-1])]
    points += [("spread", batch) for batch in (middle, batches[-1]) if "spread" in scenarios]
    return list(dict.fromkeys(points))


def most_times(count: int, batches: Sequence[int], scenarios: Sequence[str]) -> int:
    """The most times that `measure` takes of so many candidates."""
    first = len(first_points(batches, scenarios))
    return count * first + min(count, KEPT) * (len(batches) * len(scenarios) - first)


def measure(
    found: Sequence[Variant], time: Timer, batches: Sequence[int], scenarios: Sequence[str]
) -> Times:
    """Times all candidates at the first points and the good ones of them everywhere.

    All candidates are timed at a point before the next one's turn comes.
    """
    times = {variant: {} for variant in found}
    first = first_points(batches, scenarios)
    for point in first:
        for variant in found:
            times[variant][point] = time(variant, *point)
    kept = survivors(times, first)
    for point in itertools.product(scenarios, batches):
        if point not in first:
            for variant in kept:
                times[variant][point] = time(variant, *point)
    return times


def survivors(times: Times, points: Sequence[Point]) -> list[Variant]:
    """At most KEPT variants, each close to the best at one of the points or more.

    Points and schedules take turns, so that many like variants that are good in one place do not
    crowd out the one that is good elsewhere.
    """
    queues = []
    for point in points:
        ranking = sorted(times, key=lambda variant, at=point: times[variant][at])
        bound = KEPT_WITHIN * times[ranking[0]][point]
        close = [variant for variant in ranking if times[variant][point] <= bound]
        for schedule in dict.fromkeys(variant.schedule for variant in close):
            queues.append([variant for variant in close if variant.schedule == schedule])
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(dict.fromkeys(variant for variant in in_turn if variant is not None))[:KEPT]


# ---- choosing ------------------------------------------------------------------------------------


def choose(
    times: Times, batches: Sequence[int], weights: Mapping[str, float], arch: str
) -> tuple[Range, ...]:
    """The ranges that make the weighted geometric mean of the times least, over all batches.

    Args:
        times: a variant that was not timed everywhere is left out.
        batches: the batch axis, ascending.
        weights: scenario -> weight; they add up to 1.
        arch: 'any' or 'sm_90': what the rows are for; a variant that cannot run there is left out.
    """
    points = list(itertools.product(weights, batches))
    found = [
        variant
        for variant in times
        if all(point in times[variant] for point in points) and _runs(variant, arch)
    ]
    if not found:
        raise TableError(f"none of the variants that were timed can run on arch {arch}")
    costs = [
        [sum(weights[s] * math.log(times[variant][s, b]) for s in weights) for b in batches]
        for variant in found
    ]
    cuts = cut(costs, math.log(RANGE_GAIN))
    ranges, first = [], 1
    for index, last in cuts:
        # Between two batches that were measured, the geometric middle parts the ranges.
        bound = math.isqrt(batches[last] * batches[last + 1]) if last + 1 < len(batches) else None
        ranges.append(Range(found[index], first, bound))
        first = bound and bound + 1
    return tuple(ranges)


def _runs(variant: Variant, arch: str) -> bool:
    try:
        variant.check_shared(arch)
    except TableError:
        return False
    return True


def untimed(plan: Plan, arch: str) -> list[Tuned]:
    """Each family's first candidate for all batches: rows to try whether a table takes them."""
    found = zip(plan.families, plan.candidates(arch), strict=True)
    return [Tuned(family, {}, (Range(candidates[0], 1, None),)) for family, candidates in found]


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
    best = [(0.0, [])]  # of the places before each: the least cost and its ranges
    for end in range(1, places + 1):
        best.append(
            min(
                (
                    (
                        best[start][0] + penalty + row[end] - row[start],
                        [*best[start][1], (index, end - 1)],
                    )
                    for start in range(end)
                    for index, row in enumerate(sums)
                ),
                key=lambda way: (way[0], len(way[1])),
            )
        )
    return best[places][1]


# ---- rows ----------------------------------------------------------------------------------------


def table_rows(tuned: Iterable[Tuned], arch: str) -> list[dict[str, Any]]:
    """The ranges as rows of the table; families with the same ranges share rows if lists say it.

    Args:
        arch: for which GPU the rows shall count, 'sm_90', or 'any'.

    Returns:
        field -> value or list of values, in the order in which a row names them; a field that has
        its default is left out.
    """
    blocks = [(_lists(one.family), tuple(map(_applied, one.ranges))) for one in tuned]
    while pair := next(filter(_mergeable, itertools.combinations(blocks, 2)), None):
        (lists, ranges), (other, _) = pair
        blocks.remove(pair[1])
        together = {name: list(dict.fromkeys(lists[name] + other[name])) for name in lists}
        blocks[blocks.index(pair[0])] = (together, ranges)
    rows = []
    for lists, ranges in blocks:
        problem = {name: v if len(v) > 1 else v[0] for name, v in lists.items() if v != [None]}
        for tuning, batches in ranges:
            fields = dict(tuning)
            row = problem | {"backend": fields.pop("backend")}
            rows.append(row | ({"arch": arch} if arch != "any" else {}) | dict(batches) | fields)
    return rows


def _lists(family: Family) -> dict[str, list]:
    """The family's fields as lists; a field that depends on the others as it does by default
    is None, so that families may share rows over it."""
    spec = Variant.spec("problem")
    lists = {}
    for name, value in family.problem.items():
        default = spec[name]["default"]
        lists[name] = [None if default and default(family.problem) == value else value]
    return lists | {"next_n": list(family.next_n)}


def _applied(one: Range) -> tuple:
    """(tuning fields, batch fields) of a range without the defaults, hashable."""
    spec = Variant.spec("tuning")
    tuning = [
        (name, value)
        for name, value in one.variant.tuning.items()
        if not spec[name]["default"] or spec[name]["default"]({}) != value
    ]
    batches = [("min_batch", one.min_batch)] if one.min_batch > 1 else []
    batches += [("max_batch", one.max_batch)] if one.max_batch is not None else []
    return tuple(tuning), tuple(batches)


def _mergeable(pair: tuple) -> bool:
    """Whether two blocks have the same ranges and differ in one list only: then the lists joined
    stand for exactly their problems."""
    (lists, ranges), (other, other_ranges) = pair
    return ranges == other_ranges and sum(lists[name] != other[name] for name in lists) == 1
