"""The tuner's search: candidates, which points are timed, and the choice of ranges."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.bench.tuning import search
from kvfold.bench.tuning.plan import Plan, TimePoint, search_of
from kvfold.bench.tuning.plan import plan as make_plan
from kvfold.codegen import TableError, Variant
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime.compiler import Compiled

OP = "paged_kv_compress"
DEFAULTS = dict(WORKLOAD.defaults)
PRODUCTION = Problem.of(DEFAULTS)
MIXTURE = {"all-hit": 0.45, "spread": 0.45, "no-hit": 0.1}
PREFETCH = tuple(search_of(OP).prefetch)


def variant(backend="cuda", **tuning) -> Variant:
    fields = {"reduce_warps": 4, "head_slice": 32, **tuning}
    return Variant(problem=PRODUCTION, backend=backend, tuning=Tuning(**fields))


def plan(problem=None, **fields) -> Plan:
    return make_plan(OP, DEFAULTS | (problem or {}), **fields)


# ---- candidates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_candidates_are_the_workloads_that_can_run(backend, monkeypatch):
    one = plan(backend=backend)
    found = search.candidates(one, PRODUCTION, "sm_90")
    tunings = list(search_of(OP).candidates(PRODUCTION, backend, "sm_90"))
    assert [candidate.tuning for candidate in found] == tunings
    assert {(c.problem, c.backend) for c in found} == {(PRODUCTION, backend)}
    # What cannot run is no candidate, whatever the workload proposes.
    proposed = [Tuning(reduce_warps=4, head_slice=48), *tunings[:2]]
    declared = replace(search_of(OP), candidates=lambda *_: proposed)
    monkeypatch.setattr(search, "search_of", lambda op: declared)
    kept = search.candidates(one, PRODUCTION, "any")
    assert [candidate.tuning for candidate in kept] == tunings[:2]


def test_a_problem_that_no_candidate_solves_is_named():
    with pytest.raises(TableError, match=r"no cuda variant can run on sm_90 \(head_dim 24"):
        search.candidates(plan(), replace(PRODUCTION, head_dim=24), "sm_90")


def code(one: Variant, registers: int = 96, spill_bytes: int = 0) -> Compiled:
    return Compiled(one.symbol, "sm_90", b"", registers, spill_bytes, 0.0)


def test_spilling_and_equal_kernels_are_dropped():
    alike = [variant(min_ctas=ctas) for ctas in (6, 1, 5, 4)]
    registers = [(80, 8), (94, 0), (94, 0), (93, 0)]
    other = variant(head_slice=64)
    compiled = [(v, code(v, *one)) for v, one in zip(alike, registers, strict=True)]
    compiled.append((other, code(other, 94)))
    assert set(search.distinct(compiled)) == {variant(), variant(min_ctas=4), other}
    with pytest.raises(TableError, match=r"every variant .* spills registers"):
        search.distinct(compiled[:1])


# ---- timing --------------------------------------------------------------------------------------

SIZES = (1, 16, 64, 512)


def made_up(slow: dict[Variant, float]):
    """A timer: 10 us times a variant's factor; and the list of what it was asked."""
    asked = []

    def time(one: Variant, point: TimePoint) -> float:
        asked.append((one, point))
        return 10 * slow[one]

    return time, asked


def test_all_are_timed_at_first_and_the_good_ones_once_everywhere():
    good, fair, bad = variant(), variant(head_slice=64), variant(reduce_warps=1)
    time, asked = made_up({good: 1, fair: 1.3, bad: 1.4})
    one = plan(sizes=SIZES)
    times = search.measure([bad, good, fair], time, one)
    first = [("all-hit", 1), ("all-hit", 64), ("all-hit", 512), ("spread", 64), ("spread", 512)]
    assert set(times[bad]) == {TimePoint("state", *at) for at in first}
    everywhere = {TimePoint(*at) for at in itertools.product(PREFETCH, MIXTURE, SIZES)}
    assert set(times[good]) == set(times[fair]) == everywhere
    assert len(asked) == len(set(asked))
    assert search.timed_everywhere(one, times) == [good, fair]


def test_cases_are_made_for_as_few_points_in_turn_as_can_be():
    """The timer keeps the cases of one scenario and size, whatever the prefetch and variant."""
    time, asked = made_up({variant(): 1, variant(head_slice=64): 1.3})
    one = plan(sizes=SIZES)
    search.measure([variant(), variant(head_slice=64)], time, one)
    cases = [key for key, _ in itertools.groupby(asked, key=lambda at: at[1][1:])]
    assert len(cases) <= len(search.first_points(one)) + len(MIXTURE) * len(SIZES)


def test_what_is_good_at_one_point_alone_survives():
    slices, warps = (16, 32, 64, 128, 256), (1, 2, 4, 8)
    many = [variant(head_slice=s, reduce_warps=w) for s in slices for w in warps]
    large = variant(head_slice=512, reduce_warps=2)
    points = [TimePoint("state", "all-hit", 1), TimePoint("state", "all-hit", 512)]
    times = {v: dict.fromkeys(points, 10 + n / 100) for n, v in enumerate(many)}
    times[large] = {points[0]: 99.0, points[1]: 9.9}
    kept = search.survivors(times, points)
    assert len(kept) == search.KEPT and {large, many[0]} < set(kept)
    times[large][points[1]] = 13.6  # past 1.35 of the best
    assert large not in search.survivors(times, points)


def test_first_points_do_with_one_size_and_any_scenarios():
    assert search.first_points(plan(sizes=(8,))) == [
        TimePoint("state", "all-hit", 8), TimePoint("state", "spread", 8)
    ]  # fmt: skip
    assert search.first_points(plan(sizes=(1, 2), mixture={"no-hit": 1.0}, prefetch=("none",))) == [
        TimePoint("none", "no-hit", 1), TimePoint("none", "no-hit", 2)
    ]  # fmt: skip


# ---- choosing ------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    costs=st.integers(1, 5).flatmap(
        lambda places: st.lists(
            st.lists(st.integers(0, 20), min_size=places, max_size=places), min_size=1, max_size=4
        )
    ),
    penalty=st.integers(1, 6),
)
def test_the_cut_is_the_cheapest_there_is(costs, penalty):
    places = len(costs[0])

    def cost(served) -> int:
        changes = sum(a != b for a, b in itertools.pairwise(served))
        return sum(costs[v][place] for place, v in enumerate(served)) + penalty * changes

    cuts = search.cut(costs, penalty)
    ends = [last for _, last in cuts]
    assert ends == sorted(set(ends)) and ends[-1] == places - 1
    served = [next(v for v, last in cuts if place <= last) for place in range(places)]
    assert len(cuts) == 1 + sum(a != b for a, b in itertools.pairwise(served))
    every = itertools.product(range(len(costs)), repeat=places)
    assert cost(served) == min(map(cost, every))


def timed(us, sizes, mixture=MIXTURE, prefetch=PREFETCH) -> dict[TimePoint, float]:
    """A variant's times: us(prefetch, scenario, size) at every point."""
    points = itertools.product(prefetch, mixture, sizes)
    return {TimePoint(*at): us(*at) for at in points}


def test_ranges_tile_the_axis_and_meet_in_the_geometric_middle():
    small, middle, large = variant(), variant(head_slice=64), variant(head_slice=128)
    sizes = (1, 2, 16, 32, 512)
    best = {1: small, 2: middle, 16: middle, 32: large, 512: large}
    times = {
        v: timed(lambda _, __, size, v=v: 1.0 if best[size] == v else 2.0, sizes)
        for v in (large, middle, small)
    }
    found = search.choose(plan(sizes=sizes), times, "sm_90")
    assert [(one.variant, one.min_size, one.max_size) for one in found] == [
        (small, 1, 1), (middle, 2, 22), (large, 23, None)
    ]  # fmt: skip
    assert {one.arch for one in found} == {"sm_90"}


@pytest.mark.parametrize(("gain", "count"), [(1.009, 1), (1.011, 2)])
def test_a_further_range_must_gain_one_per_cent(gain, count):
    one, other = variant(), variant(head_slice=64)
    times = {
        one: timed(lambda _, __, size: {1: 1.0, 2: gain}[size], (1, 2)),
        other: timed(lambda _, __, size: {1: 2.0, 2: 1.0}[size], (1, 2)),
    }
    assert len(search.choose(plan(sizes=(1, 2)), times, "any")) == count


def test_the_mixture_decides_and_what_was_not_timed_everywhere_does_not_count():
    hit, store, out = variant(), variant(head_slice=64), variant(head_slice=128)

    def chosen(weights) -> Variant:
        one = plan(sizes=(1,), mixture=weights)
        times = {
            hit: timed(lambda _, name, __: {"all-hit": 1.0, "no-hit": 3.0}[name], (1,), weights),
            store: timed(lambda _, name, __: {"all-hit": 2.0, "no-hit": 1.0}[name], (1,), weights),
            out: {TimePoint("state", "all-hit", 1): 0.1},
        }
        return search.choose(one, times, "any")[0].variant

    assert chosen({"all-hit": 0.5, "no-hit": 0.5}) == store
    assert chosen({"all-hit": 0.7, "no-hit": 0.3}) == hit
    # Means: of times 1.76 against 1.62, which would be the other way round, of logarithms these.
    assert chosen({"all-hit": 0.62, "no-hit": 0.38}) == hit
    assert 0.62 * math.log(2) > 0.38 * math.log(3)


def test_the_prefetches_count_what_the_op_says():
    """What is quicker with prefetch alone is not chosen if it is that much slower without."""
    says = search_of("paged_kv_compress").prefetch
    # The loss without prefetch of the state that balances a gain of 1.2 with it.
    even = 1.2 ** (says["state"] / (sum(says.values()) - says["state"]))
    plain, early = variant(), variant(head_slice=64)

    def chosen(gain: float, loss: float, **fields) -> Variant:
        one = plan(sizes=(1,), **fields)
        times = {
            plain: timed(lambda *_: 10.0, (1,)),
            early: timed(lambda mode, *_: 10 / gain if mode == "state" else 10 * loss, (1,)),
        }
        return search.choose(one, times, "any")[0].variant

    assert chosen(gain=1.2, loss=1.02 * even) == plain
    assert chosen(gain=1.2, loss=even / 1.02) == early
    assert chosen(gain=1.2, loss=1.02 * even, prefetch=("state",)) == early
    assert chosen(gain=1.2, loss=even / 1.02, prefetch=("none",)) == plain


def test_no_variant_timed_everywhere_is_an_error():
    with pytest.raises(TableError, match="none of the variants was timed at every point"):
        times = {variant(): {TimePoint("state", "all-hit", 1): 1.0}}
        search.choose(plan(sizes=(1,)), times, "any")


def test_a_shared_field_shares_its_rows():
    """Every value of the shared field gets the ranges of the one that was timed."""
    (family,) = plan({"next_n": [1, 2, 4]}).families
    few, many = variant(reduce_warps=1), variant(head_slice=64)
    ranges = [search.bucket(few, "sm_90", 1, 8), search.bucket(many, "sm_90", 9)]
    found = search.shared(ranges, family)
    assert [(b.variant.problem.next_n, b.min_size, b.max_size) for b in found] == [
        (next_n, low, high) for next_n in (1, 2, 4) for low, high in ((1, 8), (9, None))
    ]
    assert {b.variant.tuning for b in found[::2]} == {few.tuning}
    assert {b.variant.tuning for b in found[1::2]} == {many.tuning}
    assert {(b.arch, b.variant.backend) for b in found} == {("sm_90", "cuda")}


def test_rows_to_try_serve_every_problem_at_every_size():
    one = plan({"next_n": [1, 4], "head_dim": [128, 512]})
    tried = search.untimed(one, "sm_90")
    problems = [problem for family in one.families for problem in family]
    assert len(problems) == 4 and [entry.variant.problem for entry in tried] == problems
    assert {(entry.min_size, entry.max_size) for entry in tried} == {(1, None)}
