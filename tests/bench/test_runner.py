"""The runner: plans, overrides, the check without a GPU, and every line of a run but the GPU's."""

from types import SimpleNamespace

import pytest
import torch

import kvfold
from kvfold.bench import limit, report, row_by_row, runner, timing
from kvfold.bench.verify import WrongResult
from kvfold.codegen import TableError, load_table
from kvfold.ops.paged_kv_compress import reference

CPU = torch.device("cpu")
PROBLEM = {"head_dim": 128, "compress_ratio": 4}


def test_a_plan_fills_in_the_problem_and_goes_through_every_point():
    problem = PROBLEM | {"kv_dtype": "bf16", "state_dtype": "fp32", "next_n": 4}
    plan = runner.Plan(problem, batches=(1, 2), scenarios=("all-hit",), page_sizes=(8, 16))
    assert plan.key == (128, 4, True, "bf16", "fp32", 4)
    assert list(map(str, plan.points())) == [
        f"all-hit, batch {batch}, page_size {page_size}"
        for page_size in (8, 16)
        for batch in (1, 2)
    ]


PRODUCTION = {
    "head_dim": 512,
    "compress_ratio": 128,
    "kv_dtype": "bf16",
    "state_dtype": "fp32",
    "next_n": 4,
}


@pytest.mark.parametrize(
    ("problem", "other", "names"),
    [
        ({"head_dim": 100}, {}, "head_dim = 100 .*8, 16"),
        ({"kv_dtype": "fp16"}, {}, 'kv_dtype = "fp16" .*bf16, fp32'),
        ({}, {"batches": (0,)}, "batch = 0"),
        ({}, {"page_sizes": (-1,)}, "page_size = -1"),
        ({}, {"scenarios": ("some",)}, 'scenario = "some" .*all-hit, spread, no-hit'),
        ({}, {"layout": "woven"}, 'layout = "woven" .*split, packed'),
        ({}, {"override": {"warps": 1}}, 'override = "warps" .*reduce_warps'),
        ({}, {"override": {"reduce_warps": 3}}, "reduce_warps = 3 .*1, 2, 4, 8"),
    ],
)
def test_a_plan_refuses_what_it_cannot_measure(problem, other, names):
    with pytest.raises(TableError, match=names):
        runner.Plan(PRODUCTION | problem, **other)


def test_an_override_may_be_any_variant_that_can_run():
    variant = load_table().select("paged_kv_compress", batch=16, **PRODUCTION)
    assert runner.overridden(variant, {"reduce_warps": 1}, "sm_90").reduce_warps == 1
    for override in ({"reduce_warps": 3}, {"head_slice": 7}, {"backend": "cpu"}):
        with pytest.raises(TableError, match=f"override of {variant.symbol}"):
            runner.overridden(variant, override, "sm_90")
    assert runner.overridden(variant, {"backend": "triton"}, "any").shared_bytes == 0


def test_an_override_leaves_out_what_a_row_may_leave_out():
    variant = load_table().select("paged_kv_compress", batch=512, **PRODUCTION)
    assert variant.schedule == "persistent" and variant.min_ctas > 1
    other = runner.overridden(variant, {"reduce_warps": 1}, "sm_90")
    assert (other.schedule, other.min_ctas, other.reduce_warps) == ("direct", 1, 1)
    assert other.head_slice == variant.head_slice


def test_an_override_must_fit_the_shared_memory_of_the_gpu_at_hand(monkeypatch):
    variant = load_table().select("paged_kv_compress", batch=16, **PRODUCTION)
    asked = []

    def check_shared(self, arch):
        asked.append((self.reduce_warps, arch))
        raise TableError("takes too much")

    monkeypatch.setattr(runner.Variant, "check_shared", check_shared)
    with pytest.raises(TableError, match=f"override of {variant.symbol}: takes too much"):
        runner.overridden(variant, {"reduce_warps": 1}, "sm_90")
    assert asked == [(1, "sm_90")]


def test_the_check_on_a_cpu_passes_the_op_and_names_where_it_is_wrong(monkeypatch):
    plan = runner.Plan(PRODUCTION | PROBLEM, batches=(1, 3), page_sizes=(8,), layout="packed")
    found = list(runner.check(plan, CPU))
    assert [one.point for one in found] == plan.points()
    assert [one.emitted for one in found] == [1, 3, 1, 3, 0, 0]

    def wrong(*args):
        reference.paged_kv_compress(*args)
        args[6].zero_()

    monkeypatch.setattr(kvfold, "paged_kv_compress", wrong)
    with pytest.raises(WrongResult, match="the op is wrong at all-hit, batch 1, page_size 8"):
        list(runner.check(plan, CPU))


@pytest.fixture
def gpu_on_cpu(monkeypatch):
    """Stands in for the GPU: calls run on the CPU, every call takes 10 us, with one warp 40 us."""
    slow = []

    def run_variant(variant, *args):
        slow.append(variant)
        reference.paged_kv_compress(*args)

    def replay(calls):
        slow.clear()
        for call in calls:
            call()
        scale = 4.0 if slow else 1.0
        return timing.Timing(10 * scale, 9 * scale, 12 * scale)

    dispatch = SimpleNamespace(
        backend_for=lambda device_type: "cuda",
        arch_of=lambda device: "sm_90",
        table=load_table,
        bind=lambda variant, device: reference.paged_kv_compress,
        select=lambda op, key, batch, device: load_table().select(
            op, batch=batch, **dict(zip(runner.Variant.spec("problem"), key, strict=True))
        ),
    )
    monkeypatch.setattr(runner, "dispatch", dispatch)
    monkeypatch.setattr(runner, "run_variant", run_variant)
    monkeypatch.setattr(row_by_row, "bind", lambda *_: reference.paged_kv_compress)
    monkeypatch.setattr(limit, "measure", lambda device: limit.Limit(4000.0, 3500.0, 0.5))
    monkeypatch.setattr(timing, "replay", replay)
    monkeypatch.setattr(timing, "states_for", lambda touched, allocated, device: 3)
    monkeypatch.setattr(timing, "l2_size", lambda device: 1)
    monkeypatch.setattr(timing, "host", lambda call: 5.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")


def measured(**options) -> report.Report:
    plan = runner.Plan(PRODUCTION | {"head_dim": 128}, batches=(1, 64), **options)
    return runner.measure(plan, CPU, lambda point: None)


def test_a_run_times_the_override_and_the_yardstick_beside_the_dispatched_variant(gpu_on_cpu):
    done = measured(scenarios=("all-hit",), override={"reduce_warps": 1}, baseline=True)
    assert [(row.batch, row.chosen_by) for row in done.rows] == [
        (batch, chosen) for batch in (1, 64) for chosen in ("table", "override", "yardstick")
    ]
    assert all(("w1_" in row.tuning) == (row.chosen_by == "override") for row in done.rows)
    assert {row.variant for row in done.rows if row.chosen_by == "yardstick"} == {"row_by_row"}
    first, beside, *_ = done.rows
    assert (first.median_us, first.min_us, first.max_us, first.host_us) == (10.0, 9.0, 12.0, 5.0)
    assert (beside.median_us, beside.host_us) == (40.0, None)
    assert (first.host_torch_ops_us, first.host_triton_us) == (5.0, 5.0)
    assert (beside.host_torch_ops_us, beside.host_triton_us) == (None, None)
    assert first.limit_us == first.bytes / 4e6 + 0.5
    assert first.efficiency == first.limit_us / 10
    assert first.bytes == beside.bytes > 128 * 128 * 2 * 4 * 31 / 32
    assert first.l2 == "cold"


def test_a_run_without_baseline_times_one_kernel(gpu_on_cpu, monkeypatch):
    monkeypatch.setattr(runner, "WARM_CALLS", 2)
    rows = measured(warm_l2=True).rows
    assert len(rows) == 6 and all(row.dispatched and row.l2 == "warm" for row in rows)
    assert not any(row.dispatched for row in measured(override={"reduce_warps": 1}).rows)


def test_a_run_may_time_the_dispatched_variant_prefetching_too(gpu_on_cpu, monkeypatch):
    told = []

    def op(*args):
        told.append(args[12:])
        reference.paged_kv_compress(*args)

    monkeypatch.setattr(runner.kvfold, "paged_kv_compress", op)
    rows = measured(scenarios=("all-hit",), prefetch_state=True, baseline=True).rows
    assert [(row.chosen_by, row.prefetch_state) for row in rows[:3]] == [
        ("table", False),
        ("table, prefetching", True),
        ("yardstick", False),
    ]
    assert set(told) == {(), (True,)}


def test_a_wrong_kernel_is_not_timed(gpu_on_cpu, monkeypatch):
    monkeypatch.setattr(runner, "run_variant", lambda variant, *args: None)
    with pytest.raises(WrongResult, match=r"paged_kv_compress_hd128_r128_.*_w1_.* is wrong at"):
        measured(override={"reduce_warps": 1})


def test_states_that_cannot_leave_the_l2_are_not_called_cold(gpu_on_cpu, monkeypatch):
    monkeypatch.setattr(timing, "l2_size", lambda device: 1 << 40)
    assert {row.l2 for row in measured(scenarios=("no-hit",)).rows} == {"warm"}


@pytest.mark.parametrize(("free", "count"), [(1 << 40, 240), (1000 << 10, 8), (0, 1)])
def test_states_fill_the_l2_four_times_or_the_memory(monkeypatch, free, count):
    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert timing.states_for(1 << 20, 100 << 10, CPU) == count


def test_host_time_never_lets_the_queue_grow(monkeypatch):
    waits, calls = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(calls)))
    assert timing.host(lambda: calls.append(1), calls=20, queue=8) < 1000
    assert len(calls) == 20 and waits == [0, 8, 16]
