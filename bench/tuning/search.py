"""The tuner's search: which variants to time, at which points, and which sizes each shall serve.

Nothing here touches a GPU or a file. Times come from a function that is passed in.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from kvfold.bench.tuning.plan import Plan, TimePoint, search_of
from kvfold.codegen import Bucket, Problem, TableError, Variant
from kvfold.runtime.compiler import Compiled

RANGE_GAIN = 1.01  # that a further range must gain, over all points, to be worth its row
KEPT = 20  # variants that are timed everywhere, at most
KEPT_WITHIN = 1.35  # of the best at any of the first points

Times = dict[Variant, dict[TimePoint, float]]  # microseconds
Timer = Callable[[Variant, TimePoint], float]


# ---- candidates ----------------------------------------------------------------------------------


def candidates(plan: Plan, problem: Problem, arch: str) -> list[Variant]:
    """Every variant of a problem that is worth a trial and can run on a GPU of this arch.

    Raises:
        TableError: no variant can run.
    """
    found = []
    for tuning in search_of(plan.op).candidates(problem, plan.backend, arch):
        with contextlib.suppress(TableError):  # what cannot run is no candidate
            variant = Variant(problem=problem, backend=plan.backend, tuning=tuning)
            variant.check_arch(arch)
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


def first_points(plan: Plan) -> list[TimePoint]:
    """Where all candidates are timed.

    With the plan's last prefetch and in its first two scenarios, at the ends and the middle of the
    size axis; the smallest size in the first scenario only.
    """
    sizes = (plan.sizes[0], plan.sizes[len(plan.sizes) // 2], plan.sizes[-1])
    points = [
        TimePoint(plan.prefetch[-1], scenario, size)
        for number, scenario in enumerate(list(plan.mixture)[:2])
        for size in sizes[min(number, 1) :]
    ]
    return list(dict.fromkeys(points))


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
    for point in sorted(plan.points, key=lambda one: (one.scenario, one.size)):
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


def choose(plan: Plan, times: Times, arch: str) -> list[Bucket]:
    """The ranges that make the weighted geometric mean of the times least, over all sizes.

    Args:
        times: of one problem's variants. One that was not timed at every point is left out.

    Raises:
        TableError: no variant was timed at every point.
    """
    found, sizes = timed_everywhere(plan, times), plan.sizes
    if not found:
        raise TableError("none of the variants was timed at every point")
    costs = [
        [
            sum(w * math.log(times[one][at]) for at, w in plan.points.items() if at.size == size)
            for size in sizes
        ]
        for one in found
    ]
    ranges, first = [], 1
    for index, last in cut(costs, math.log(RANGE_GAIN)):
        # Between two sizes that were measured, the geometric middle separates the ranges.
        bound = math.isqrt(sizes[last] * sizes[last + 1]) if last + 1 < len(sizes) else None
        ranges.append(bucket(found[index], arch, first, bound))
        first = bound + 1 if bound is not None else first
    return ranges


def timed_everywhere(plan: Plan, times: Times) -> list[Variant]:
    """The variants that were timed at every point."""
    return [variant for variant, found in times.items() if plan.points.keys() <= found.keys()]


def bucket(variant: Variant, arch: str, first: int = 1, last: int | None = None) -> Bucket:
    """A range of sizes as a row that no table has yet."""
    return Bucket(
        variant=variant, min_size=first, max_size=last, arch=arch, row=0, line=0, section="tuned"
    )


def shared(ranges: Iterable[Bucket], family: Iterable[Problem]) -> list[Bucket]:
    """The ranges of one problem for every problem of its family."""
    return [
        replace(one, variant=replace(one.variant, problem=problem))
        for problem in family
        for one in ranges
    ]


def untimed(plan: Plan, arch: str) -> list[Bucket]:
    """Each problem's first candidate for all sizes: rows to try whether a table accepts them."""
    first = [(family, candidates(plan, family[-1], arch)[0]) for family in plan.families]
    return [one for family, variant in first for one in shared([bucket(variant, arch)], family)]


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
