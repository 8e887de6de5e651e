"""The tuner's search: problems, candidates, which points are timed, and the choice of ranges."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.bench.tuning import search
from kvfold.bench.tuning.search import Range, TimePoint
from kvfold.codegen import TableError, Variant
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime.compiler import Compiled

OP = "paged_kv_compress"
DEFAULTS = dict(WORKLOAD.defaults)
PRODUCTION = Problem.of(DEFAULTS)
MIXTURE = {"all-hit": 0.45, "spread": 0.45, "no-hit": 0.1}


def variant(backend="cuda", **tuning) -> Variant:
    fields = {"reduce_warps": 4, "head_slice": 32, **tuning}
    return Variant(problem=PRODUCTION, backend=backend, tuning=Tuning(**fields))


def plan(problems=None, **fields) -> search.Plan:
    return search.plan(OP, DEFAULTS | (problems or {}), **fields)


def test_the_default_mixture_is_the_one_of_these_tests():
    assert search.search_of(WORKLOAD).mixture == MIXTURE


# ---- plans and families --------------------------------------------------------------------------


def test_families_hold_next_n_together_and_fill_in_the_defaults():
    problems = {"compress_ratio": [128, 4], "next_n": [4, 1], "kv_dtype": ["bf16", "fp32"]}
    found = plan(problems).families
    assert [(f.problem.compress_ratio, f.problem.overlap, f.problem.kv_dtype) for f in found] == [
        (128, False, "bf16"), (128, False, "fp32"), (4, True, "bf16"), (4, True, "fp32")
    ]  # fmt: skip
    # The largest next_n is timed, and the rows are for all.
    assert all(f.problem.next_n == 4 and f.shared == (1, 4) for f in found)
    assert found[0].problems() == [replace(PRODUCTION, next_n=n) for n in (1, 4)]


def test_a_family_of_one_value_is_one_problem():
    (family,) = plan().families
    assert family.problems() == [PRODUCTION] and family.shared == (4,)


def test_without_a_shared_field_every_problem_is_timed():
    families = list(search._families(OP, DEFAULTS | {"next_n": [1, 4]}, None))
    assert [family.problems() for family in families] == [
        [replace(PRODUCTION, next_n=n)] for n in (1, 4)
    ]


def test_a_shared_field_that_is_left_out_has_its_default():
    (family,) = search._families(OP, DEFAULTS, "overlap")
    assert family.problems() == [PRODUCTION]


def test_a_plan_is_the_workloads_where_nothing_else_is_said():
    found = plan()
    assert found.sizes == search.search_of(WORKLOAD).sizes
    assert found.mixture == MIXTURE and found.scenarios == ("all-hit", "spread", "no-hit")
    assert found.prefetch == ("none", "state") and found.backend == "cuda"
    assert plan(backend="triton").prefetch == ("none",)
    assert plan(sizes=(8, 2, 8)).sizes == (2, 8)


@pytest.mark.parametrize(
    ("problems", "fields", "names"),
    [
        ({"head_dim": 100}, {}, "head_dim = 100"),
        ({"next_n": [4, 17]}, {}, "next_n = 17"),
        ({"kv_dtype": "fp16"}, {}, 'kv_dtype = "fp16" .*bf16, fp32'),
        ({"heads": 8}, {}, "heads is no problem field of paged_kv_compress"),
        ({}, {"sizes": (0,)}, "batch = 0"),
        ({}, {"sizes": (1 << 30,)}, "batch = 1073741824"),
        ({}, {"backend": "cpu"}, 'backend = "cpu"'),
        ({}, {"prefetch": ("early",)}, "early is no prefetch of cuda; legal: none, state"),
        ({}, {"backend": "triton", "prefetch": ("state",)}, "no prefetch of triton; legal: none"),
    ],
)
def test_a_plan_refuses_what_it_cannot_tune(problems, fields, names):
    with pytest.raises(TableError, match=names):
        plan(problems, **fields)


def test_a_plan_says_what_to_type_for_it():
    assert plan({"next_n": [1, 4]}).command == (
        "kvfold tune paged_kv_compress head_dim=512 compress_ratio=128 kv_dtype=bf16"
        " state_dtype=fp32 next_n=1,4"
    )
    problems = {"compress_ratio": 4, "overlap": False}
    text = plan(problems, sizes=(8, 2), prefetch=("state",)).command
    assert "overlap=false" in text and text.endswith("--batch 2,8 --prefetch state")
    assert plan(backend="triton").command.endswith("next_n=4 --backend triton")
    assert plan().full_command == plan().command
    weighed = plan(mixture={"spread": 0.75, "no-hit": 0.25})
    assert weighed.full_command == weighed.command + " --mixture spread=0.75,no-hit=0.25"


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("all-hit=1,no-hit=3", {"all-hit": 0.25, "no-hit": 0.75}),
        ("spread = 2, no-hit=0", {"spread": 1.0}),
        ("all-hit=0.45,spread=0.45,no-hit=0.1", MIXTURE),
    ],
)
def test_a_mixture_adds_up_to_one(text, weights):
    assert search.parse_mixture(text, WORKLOAD.scenarios) == pytest.approx(weights)


@pytest.mark.parametrize(
    "text",
    ["", "spread", "spread=", "spread=x", "some=1", "spread=1,spread=1", "spread=0", "spread=-1",
     "spread=inf", "spread=nan", "spread=1e308,no-hit=1e308"],
)  # fmt: skip
def test_a_mixture_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"mixture is .*; accepted: weights of all-hit, spread"):
        search.parse_mixture(text, WORKLOAD.scenarios)


@pytest.mark.parametrize("prefetch", [("none",), ("none", "state")])
def test_calls_with_and_without_prefetch_weigh_the_same(prefetch):
    found = search.weights(MIXTURE, prefetch)
    assert sum(found.values()) == pytest.approx(1)
    assert found.keys() == set(itertools.product(prefetch, MIXTURE))
    for (_, scenario), weight in found.items():
        assert weight == MIXTURE[scenario] / len(prefetch)


# ---- candidates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_candidates_are_the_workloads_that_can_run(backend, monkeypatch):
    one = plan(backend=backend)
    found = search.candidates(one, PRODUCTION, "sm_90")
    tunings = list(search.search_of(WORKLOAD).candidates(PRODUCTION, backend, "sm_90"))
    assert [candidate.tuning for candidate in found] == tunings
    assert {(c.problem, c.backend) for c in found} == {(PRODUCTION, backend)}
    # What cannot run is no candidate, whatever the workload proposes.
    proposed = [Tuning(reduce_warps=4, head_slice=48), *tunings[:2]]
    declared = replace(search.search_of(WORKLOAD), candidates=lambda *_: proposed)
    monkeypatch.setattr(search, "search_of", lambda work: declared)
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
    everywhere = {TimePoint(*at) for at in itertools.product(("none", "state"), MIXTURE, SIZES)}
    assert set(times[good]) == set(times[fair]) == everywhere
    assert len(asked) == len(set(asked)) <= search.most_times(one, 3)
    assert search.timed_everywhere(times, one) == [good, fair]


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


def timed(us, sizes, mixture=MIXTURE, prefetch=("none", "state")) -> dict[TimePoint, float]:
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
    assert search.choose(times, plan(sizes=sizes)) == (
        Range(small, 1, 1), Range(middle, 2, 22), Range(large, 23, None)
    )  # fmt: skip


@pytest.mark.parametrize(("gain", "count"), [(1.009, 1), (1.011, 2)])
def test_a_further_range_must_gain_one_per_cent(gain, count):
    one, other = variant(), variant(head_slice=64)
    times = {
        one: timed(lambda _, __, size: {1: 1.0, 2: gain}[size], (1, 2)),
        other: timed(lambda _, __, size: {1: 2.0, 2: 1.0}[size], (1, 2)),
    }
    assert len(search.choose(times, plan(sizes=(1, 2)))) == count


def test_the_mixture_decides_and_what_was_not_timed_everywhere_does_not_count():
    hit, store, out = variant(), variant(head_slice=64), variant(head_slice=128)

    def chosen(weights) -> Variant:
        one = plan(sizes=(1,), mixture=weights)
        times = {
            hit: timed(lambda _, name, __: {"all-hit": 1.0, "no-hit": 3.0}[name], (1,), weights),
            store: timed(lambda _, name, __: {"all-hit": 2.0, "no-hit": 1.0}[name], (1,), weights),
            out: {TimePoint("state", "all-hit", 1): 0.1},
        }
        return search.choose(times, one)[0].variant

    assert chosen({"all-hit": 0.5, "no-hit": 0.5}) == store
    assert chosen({"all-hit": 0.7, "no-hit": 0.3}) == hit
    # Means: of times 1.76 against 1.62, which would be the other way round, of logarithms these.
    assert chosen({"all-hit": 0.62, "no-hit": 0.38}) == hit
    assert 0.62 * math.log(2) > 0.38 * math.log(3)


def test_the_prefetches_count_the_same():
    """What is quicker with prefetch alone is not chosen if it is as much slower without."""
    plain, early = variant(), variant(head_slice=64)

    def chosen(gain: float, loss: float, **fields) -> Variant:
        one = plan(sizes=(1,), **fields)
        times = {
            plain: timed(lambda *_: 10.0, (1,)),
            early: timed(lambda mode, *_: 10 / gain if mode == "state" else 10 * loss, (1,)),
        }
        return search.choose(times, one)[0].variant

    assert chosen(gain=1.2, loss=1.25) == plain
    assert chosen(gain=1.25, loss=1.2) == early
    assert chosen(gain=1.2, loss=1.25, prefetch=("state",)) == early
    assert chosen(gain=1.25, loss=1.2, prefetch=("none",)) == plain


def test_no_variant_timed_everywhere_is_an_error():
    with pytest.raises(TableError, match="none of the variants was timed at every point"):
        search.choose({variant(): {TimePoint("state", "all-hit", 1): 1.0}}, plan(sizes=(1,)))


def test_rows_to_try_serve_every_problem_at_every_size():
    one = plan({"next_n": [1, 4], "head_dim": [128, 512]})
    tried = search.untimed(one, "sm_90")
    assert [entry.family for entry in tried] == list(one.families)
    for entry in tried:
        (only,) = entry.ranges
        assert (only.min_size, only.max_size) == (1, None)
        assert only.variant.problem == entry.family.problem
