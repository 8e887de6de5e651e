"""How many cases make the L2 cold, and how host time is taken."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from kvfold.bench.measure import timing
from kvfold.ops.paged_kv_compress.spec import Problem
from kvfold.ops.paged_kv_compress.workload import WORKLOAD

CPU = torch.device("cpu")
MIB = 1 << 20


@dataclass(frozen=True)
class NoArguments:
    pass


@dataclass(frozen=True)
class FakeCase:
    moved_bytes: int
    allocated_bytes: int
    arguments: NoArguments = NoArguments()


def cases_for(monkeypatch, moved: int, allocated: int, free: int, most=timing.MAX_CALLS) -> int:
    """How many cases are made, on a GPU with an L2 of 60 MiB."""
    properties = SimpleNamespace(L2_cache_size=60 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return len(timing.cold_cases(lambda seed: FakeCase(moved, allocated), (), CPU, most))


def test_cases_touch_four_times_the_l2(monkeypatch):
    assert cases_for(monkeypatch, moved=MIB, allocated=100 << 10, free=1 << 40) == 240


def test_cases_are_as_many_as_fit_in_most_of_the_free_memory(monkeypatch):
    assert cases_for(monkeypatch, moved=MIB, allocated=100 << 10, free=1000 << 10) == 8
    assert cases_for(monkeypatch, moved=MIB, allocated=100 << 10, free=0) == 1


def test_cases_are_never_few_or_very_many(monkeypatch):
    large = {"moved": 1 << 30, "allocated": 1 << 20}
    assert cases_for(monkeypatch, **large, free=1 << 40) == timing.MIN_CALLS
    assert cases_for(monkeypatch, moved=1, allocated=1, free=1 << 40) == timing.MAX_CALLS
    assert cases_for(monkeypatch, moved=MIB, allocated=1, free=1 << 40, most=3) == 3


def test_cases_differ_but_share_the_metadata_of_a_step(monkeypatch):
    monkeypatch.setattr(timing, "MIN_CALLS", 3)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    problem = Problem(head_dim=8, compress_ratio=4, kv_dtype="bf16", state_dtype="fp32", next_n=1)

    def make(seed: int):
        return WORKLOAD.make(problem, 5, "spread", WORKLOAD.options(), device=CPU, seed=seed)

    first, *others = timing.cold_cases(make, WORKLOAD.metadata, CPU, 9)
    assert len(others) == 2
    for number, other in enumerate(others, 1):
        for name in ("kv_score", "paged_kv", "paged_score", "output"):
            assert getattr(other.arguments, name) is not getattr(first.arguments, name)
        assert torch.equal(other.arguments.paged_kv, make(number).arguments.paged_kv)
        for name in WORKLOAD.metadata:
            assert getattr(other.arguments, name) is getattr(first.arguments, name)


def test_several_times_come_to_their_median_least_and_most():
    assert timing.Timing.of([3.0, 1.0, 9.0]) == timing.Timing(3.0, 1.0, 9.0)


def test_host_time_never_lets_the_queue_grow(monkeypatch):
    waits, calls = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(calls)))
    assert timing.host(lambda: calls.append(1), calls=20, queue=8) > 0
    assert len(calls) == 20 and waits == [0, 8, 16]


@pytest.mark.parametrize(("passed", "us"), [([1, 2, 3], 2.0), ([1, 9, 1, 9, 1], 1.0)])
def test_host_time_is_the_median(passed, us, monkeypatch):
    clock = [0.0]
    durations = iter(passed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += next(durations) * 1e-6

    assert timing.host(call, calls=len(passed)) == pytest.approx(us)
