"""What the tuner does on a GPU: compile, check and time each variant. The GPU is stood in for."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from kvfold.bench.measure import point, timing
from kvfold.bench.measure.verify import WrongResult
from kvfold.bench.tuning import gpu, search
from kvfold.bench.tuning.plan import TimePoint
from kvfold.bench.tuning.plan import plan as make_plan
from kvfold.codegen import Variant
from kvfold.ops import decode_workload
from kvfold.ops.paged_kv_compress import reference, workload
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime import dispatch
from kvfold.runtime.compiler import Compiled

CPU = torch.device("cpu")
OP = "paged_kv_compress"
FIELDS = dict(WORKLOAD.defaults) | {"head_dim": 64, "next_n": 2}
SMALL = Problem.of(FIELDS)


def variant(reduce_warps: int = 4, head_slice: int = 32) -> Variant:
    tuning = Tuning(reduce_warps=reduce_warps, head_slice=head_slice)
    return Variant(problem=SMALL, backend="cuda", tuning=tuning)


US = {"none": 10.0, "metadata": 9.0, "state": 8.0}


class StandIn:
    """The reference in place of kernels; times are made up.

    Attributes:
        bound: variants that were bound by dispatch.
        timed: (variant, prefetch, number of calls) of every replay.
        wrong: a variant that writes nothing.
    """

    def __init__(self):
        self.bound, self.timed, self.calls = [], [], []
        self.wrong: Variant | None = None

    def launcher(self, one: Variant):
        def launch(arguments) -> None:
            self.calls.append((one, arguments.prefetch))
            if one != self.wrong:
                reference.run(arguments)

        return launch

    def replay(self, calls, replays, warm_up) -> timing.Timing:
        self.calls.clear()
        for call in calls:
            call()
        ((one, prefetch),) = set(self.calls)
        self.timed.append((one, prefetch, len(calls)))
        us = US[prefetch]
        return timing.Timing(us, us - 1, us + 1)


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    found = StandIn()

    def bind(one, device):
        found.bound.append(one)
        return found.launcher(one)

    def cold_cases(make, metadata, device, most):
        assert metadata == WORKLOAD.metadata and most == gpu.MOST_CASES
        return [make(seed) for seed in range(2)]

    monkeypatch.setattr(gpu.dispatch, "bind", bind)
    monkeypatch.setattr(timing, "replay", found.replay)
    monkeypatch.setattr(timing, "cold_cases", cold_cases)
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    return found


def timer(started=lambda what: None, **fields) -> gpu.GpuTimer:
    return gpu.GpuTimer(make_plan(OP, FIELDS, **fields), CPU, started)


def test_a_call_is_timed_with_each_prefetch(stand_in):
    time = timer()
    for prefetch, us in US.items():
        assert time(variant(), TimePoint(prefetch, "all-hit", 1)) == us
    assert stand_in.timed == [(variant(), prefetch, 2) for prefetch in US]
    assert stand_in.bound == [variant()]  # once


def test_a_wrong_variant_is_named_and_not_timed(stand_in):
    stand_in.wrong = variant()
    with pytest.raises(
        WrongResult, match=rf"^{variant().symbol} is wrong at all-hit, .*: paged_kv\["
    ):
        timer()(variant(), TimePoint("none", "all-hit", 1))
    assert not stand_in.timed


def test_a_variant_is_checked_against_the_reference_at_a_middling_size(stand_in, monkeypatch):
    checked = []
    check = point.verify

    def verify(call, work, case):
        checked.append(case.arguments.kv_lens.numel())
        return check(call, work, case)

    monkeypatch.setattr(point, "verify", verify)
    time = timer()
    for prefetch in US:
        time(variant(), TimePoint(prefetch, "all-hit", 1))
    assert checked == [workload.ORACLE_BATCH + 1]


def test_cases_are_made_once_for_a_scenario_and_size(stand_in, monkeypatch):
    made = []
    make = timing.cold_cases

    def cold_cases(*args):
        made.append(args)
        return make(*args)

    monkeypatch.setattr(timing, "cold_cases", cold_cases)
    told = []
    time = timer(told.append)
    points = [TimePoint(prefetch, "spread", 4) for prefetch in ("none", "state")]
    for one in (variant(), variant(8)):
        for at in points:
            time(one, at)
    assert len(made) == 1 and len(stand_in.timed) == 4
    time(variant(), TimePoint("none", "spread", 5))
    time(variant(), TimePoint("none", "all-hit", 5))
    other = replace(variant(), problem=replace(SMALL, next_n=1))
    time(other, TimePoint("none", "all-hit", 5))
    assert len(made) == 4
    assert [text[: text.index(", head_dim")] for text in told] == [
        "spread, size 4", "spread, size 5", "all-hit, size 5", "all-hit, size 5"
    ]  # fmt: skip


@pytest.fixture
def few_candidates(monkeypatch):
    monkeypatch.setattr(decode_workload, "REDUCE_WARPS", (4, 8))
    monkeypatch.setattr(decode_workload, "HEAD_SLICES", (16, 32, 64))
    monkeypatch.setattr(decode_workload, "REQUESTS_PER_CTA", ())
    monkeypatch.setattr(decode_workload, "REGISTER_BUDGETS", (96,))


def test_a_run_compiles_all_and_times_those_that_do_not_spill(
    stand_in, few_candidates, monkeypatch
):
    compiled, told = [], []

    def compile_all(jobs):
        for one, arch in jobs:
            compiled.append(one)
            assert arch == "sm_90"
            registers = 200 // one.tuning.min_ctas
            spilled = int(one.tuning.head_slice == 16)
            yield Compiled(one.symbol, arch, one.symbol.encode(), registers, spilled, 0.0), True

    monkeypatch.setattr(gpu, "compile_all", compile_all)
    plan = make_plan(OP, FIELDS | {"kv_dtype": ["bf16", "fp32"]}, sizes=(1, 4))
    times = gpu.run(plan, CPU, told.append)
    assert len(plan.families) == 2
    candidates = [
        one for family in plan.families for one in search.candidates(plan, family[-1], "sm_90")
    ]
    assert compiled == candidates
    assert set(times) == {one for one in candidates if one.tuning.head_slice != 16}
    assert len(times) <= search.KEPT * len(plan.families)  # so that all are timed everywhere
    for points in times.values():
        assert set(points) == set(plan.points)
        assert all(us == US[at.prefetch] for at, us in points.items())
    # Each was replayed once per point.
    replays = Counter(one for one, *_ in stand_in.timed)
    assert set(replays.values()) == {len(plan.points)}
    assert told[0] == f"compiling {len(compiled)} variants"


def test_triton_is_not_compiled_ahead_and_not_timed_with_prefetch(
    stand_in, few_candidates, monkeypatch
):
    monkeypatch.setattr(gpu, "compile_all", None)
    plan = make_plan(OP, FIELDS, backend="triton", sizes=(1,))
    times = gpu.run(plan, CPU, lambda what: None)
    assert times and {one.backend for one in times} == {"triton"}
    assert {prefetch for _, prefetch, _ in stand_in.timed} == {"none"}
    assert set(stand_in.bound) == set(times)
