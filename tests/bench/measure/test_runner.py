"""The runner: plans, overrides, the check without a GPU, and every line of a run but the GPU's."""

import itertools
from dataclasses import replace

import pytest
import torch

from kvfold.bench import records
from kvfold.bench.measure import runner, timing
from kvfold.bench.measure.point import Point
from kvfold.bench.measure.verify import WrongResult
from kvfold.bench.records import KernelReport, KernelRow
from kvfold.codegen import TableError, Variant, load_table
from kvfold.ops.paged_kv_compress import reference
from kvfold.ops.paged_kv_compress.spec import Problem
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.workload import Measurement

CPU = torch.device("cpu")
SMALL = {"head_dim": 128, "compress_ratio": 4}
PREFETCH = ("none", "metadata", "state")


def plan(prefetch=None, **fields) -> runner.Plan:
    return runner.plan(WORKLOAD, Measurement(**fields), prefetch)


# ---- plans ---------------------------------------------------------------------------------------


def test_a_plan_fills_in_defaults_and_goes_through_every_point():
    found = plan(
        problem=SMALL, options={"page_size": [8, 16]}, sizes=(1, 2), scenarios=("all-hit",)
    )
    problem = Problem(head_dim=128, compress_ratio=4, kv_dtype="bf16", state_dtype="fp32", next_n=4)
    assert problem.overlap
    options = [WORKLOAD.options(page_size=size) for size in (8, 16)]
    assert list(found.points) == [
        Point(problem, option, "all-hit", size) for option in options for size in (1, 2)
    ]
    assert str(found.points[0]) == (
        "all-hit, size 1, head_dim 128, compress_ratio 4, overlap true, kv_dtype bf16,"
        f" state_dtype fp32, next_n 4, ape_in_state true, {options[0]}"
    )
    assert str(options[0]).startswith("page_size 8, layout split, max_pages 0, output_dtype bf16")
    assert found.prefetch == PREFETCH and not found.baseline and found.override == {}


def test_a_list_of_a_problem_field_stands_for_each_of_its_values():
    found = plan(problem={"next_n": [1, 2], "kv_dtype": ["bf16", "fp32"]}, sizes=(1,))
    problems = {(point.problem.next_n, point.problem.kv_dtype) for point in found.points}
    assert problems == set(itertools.product((1, 2), ("bf16", "fp32")))
    assert len(found.points) == 4 * len(WORKLOAD.scenarios)
    assert {point.scenario for point in found.points} == set(WORKLOAD.scenarios)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"problem": {"head_dim": 100}}, "head_dim = 100 .*8 or more"),
        ({"problem": {"kv_dtype": "fp16"}}, 'kv_dtype = "fp16" .*bf16, fp32'),
        ({"sizes": (0,)}, "batch = 0"),
        ({"sizes": (2**20 + 1,)}, "batch = 1048577 .*legal: 1 to 1048576"),
        ({"options": {"page_size": -1}}, "page_size = -1"),
        ({"options": {"page_size": 10**9}}, "page_size = 1000000000 .*legal: 1 to 4096"),
        ({"options": {"layout": "woven"}}, 'layout = "woven" .*split, packed'),
        ({"scenarios": ("some",)}, "some is no scenario; legal: all-hit, spread, no-hit"),
        ({"override": {"warps": 1}}, "warps is no tuning field"),
        ({"prefetch": ("early",)}, "early is no prefetch; legal: none, metadata, state"),
    ],
)
def test_a_plan_refuses_what_cannot_be_measured(fields, names):
    with pytest.raises(TableError, match=names):
        plan(**fields)


def test_the_ops_suite_is_planned_without_an_error():
    plans = [runner.plan(WORKLOAD, one) for one in WORKLOAD.suite]
    assert [one.baseline for one in plans] == [True] + [False] * (len(plans) - 1)
    assert all(one.points for one in plans)


# ---- overrides -----------------------------------------------------------------------------------


def production(size: int = 16, **changes) -> tuple[Variant, Point]:
    """The shipped table's variant for the default problem, and the point that it serves."""
    problem = Problem(**{**WORKLOAD.defaults, **changes})
    variant = load_table().find(problem, "cuda", "any", size)
    assert variant is not None
    return variant, Point(problem, WORKLOAD.options(), "all-hit", size)


def test_an_override_changes_the_tuning_it_names(fake_gpu):
    variant, point = production()
    other = runner.overridden(variant, {"reduce_warps": 1}, point, CPU)
    assert other == replace(variant, tuning=replace(variant.tuning, reduce_warps=1))
    for override in ({"reduce_warps": 3}, {"head_slice": 7}, {"backend": "cpu"}):
        with pytest.raises(TableError, match=f"override of {variant.symbol}"):
            runner.overridden(variant, override, point, CPU)


def test_an_override_of_the_backend_starts_from_that_backends_own_row(fake_gpu):
    variant, point = production(size=1)
    triton = load_table().find(point.problem, "triton", "any", point.size)
    assert triton is not None and triton.tuning != variant.tuning
    assert runner.overridden(variant, {"backend": "triton"}, point, CPU) == triton
    changed = runner.overridden(variant, {"backend": "triton", "min_ctas": 1}, point, CPU)
    assert changed == replace(triton, tuning=replace(triton.tuning, min_ctas=1))
    # The shipped table has no row for the problem: the dispatched variant says the rest.
    point = replace(point, problem=replace(point.problem, next_n=16))
    variant = replace(variant, problem=point.problem)
    other = runner.overridden(variant, {"backend": "triton"}, point, CPU)
    assert other == replace(variant, backend="triton")


def test_an_override_must_fit_the_shared_memory_of_the_gpu_at_hand(fake_gpu, monkeypatch):
    variant, point = production()
    asked = []

    def check_arch(self, arch):
        asked.append((self.tuning.reduce_warps, arch))
        raise TableError("takes too much")

    monkeypatch.setattr(Variant, "check_arch", check_arch)
    with pytest.raises(TableError, match=f"override of {variant.symbol}: takes too much"):
        runner.overridden(variant, {"reduce_warps": 1}, point, CPU)
    assert asked == [(1, "sm_90")]


# ---- the check without a GPU ---------------------------------------------------------------------


def test_the_check_on_a_cpu_passes_the_op_and_names_where_it_is_wrong(monkeypatch):
    small = plan(
        problem=SMALL, sizes=(1, 3), scenarios=("all-hit", "spread", "no-hit"),
        options={"page_size": 8, "layout": "packed"},
    )  # fmt: skip
    found = list(runner.check(small.points, CPU))
    assert tuple(one.point for one in found) == small.points
    assert [one.rows for one in found] == [1, 3, 1, 3, 0, 0]
    assert all((one.largest_error > 0) == (one.rows > 0) for one in found)

    def wrong(*args, **kwargs):
        arguments = WORKLOAD.spec.arguments(*args, **kwargs)
        reference.run(arguments)
        arguments.output.zero_()

    monkeypatch.setattr(runner, "torch_op", lambda name: wrong)
    with pytest.raises(WrongResult, match=r"the op is wrong at all-hit, size 1, .*page_size 8"):
        list(runner.check(small.points, CPU))


# ---- a run ---------------------------------------------------------------------------------------


def measured(prefetch=None, problem=None, sizes=(1, 64), scenarios=("all-hit",), **fields):
    one = plan(prefetch, problem=problem or {"head_dim": 128}, sizes=sizes, scenarios=scenarios,
               **fields)  # fmt: skip
    return runner.measure([one], CPU, lambda point: None)


def lines(report: KernelReport) -> list[tuple]:
    return [(row.size, row.chosen_by, row.prefetch) for row in report.rows]


def test_a_run_times_the_dispatched_variant_with_each_prefetch(fake_gpu):
    report = measured()
    assert lines(report) == [(size, "table", prefetch) for size in (1, 64) for prefetch in PREFETCH]
    # Each is timed on all of the cases, and with its own prefetch alone.
    assert fake_gpu.replays == [[("op", prefetch)] * 3 for prefetch in PREFETCH] * 2
    row, between, early = report.rows[:3]
    variant = load_table().find(Problem.of(row.problem), "cuda", "sm_90", 1)
    assert variant and row.variant == early.variant == variant.symbol and row.backend == "cuda"
    assert (row.median_us, row.min_us, row.max_us) == (10.0, 9.0, 12.0)
    assert (between.median_us, early.median_us) == (7.5, 5.0)
    assert row.limit_us == row.moved_bytes / 4e6 + 0.5
    assert row.efficiency == row.limit_us / 10 and early.efficiency == row.limit_us / 5
    assert row.moved_bytes == early.moved_bytes > 124 * 128 * 2 * 4  # the window's old rows
    assert row.l2 == "cold" and row.host_us == {}
    assert report.read_bandwidth_gbs == 4000.0 and report.empty_node_us == 0.5
    assert (report.device, report.KIND) == ("a stand-in", "kernels")
    assert report.table_fingerprint == load_table().fingerprint


def test_a_run_may_be_of_one_prefetch(fake_gpu):
    assert lines(measured(("state",), sizes=(1,))) == [(1, "table", "state")]


def test_a_baseline_times_override_yardstick_and_host_beside_the_dispatched_variant(fake_gpu):
    report = measured(override={"reduce_warps": 1}, baseline=True)
    kinds = [
        *(("table", prefetch) for prefetch in PREFETCH),
        *(("override", prefetch) for prefetch in PREFETCH),
        ("yardstick", "none"),
    ]
    assert lines(report) == [(size, *kind) for size in (1, 64) for kind in kinds]
    for row in report.rows:
        assert ("w1_" in row.tuning) == (row.chosen_by == "override")
        assert (row.variant == "row_by_row") == (row.chosen_by == "yardstick")
        # Host times are of the dispatched variant's plain call.
        timed = (row.chosen_by, row.prefetch) == ("table", "none")
        assert row.host_us == (
            {"call": 5.0, "torch_ops": 5.0, "unrepeated": 5.0, "triton": 5.0} if timed else {}
        )
    override = report.rows[3].variant
    assert fake_gpu.replays[3:7] == [
        *([(override, prefetch)] * 3 for prefetch in PREFETCH),
        [("row_by_row", "none")] * 3,
    ]


def test_an_override_without_a_baseline_takes_the_dispatched_variants_place(fake_gpu):
    rows = measured(override={"reduce_warps": 1}).rows
    assert {row.chosen_by for row in rows} == {"override"}
    assert all(row.host_us == {} for row in rows)


def test_triton_is_timed_without_prefetch(fake_gpu):
    rows = measured(override={"backend": "triton"}, sizes=(1,)).rows
    assert [(row.backend, row.prefetch) for row in rows] == [("triton", "none")]
    with pytest.raises(ValueError, match="prefetch state; accepted: none"):
        measured(("state",), override={"backend": "triton"}, sizes=(1,))


def test_host_times_leave_out_triton_where_the_table_has_no_row(fake_gpu, monkeypatch):
    monkeypatch.setattr(runner.dispatch, "bind", None)  # it is not called
    find = type(load_table()).find

    def cuda_only(self, problem, backend, arch, size):
        return find(self, problem, backend, arch, size) if backend == "cuda" else None

    monkeypatch.setattr(type(load_table()), "find", cuda_only)
    assert measured(baseline=True, sizes=(1,)).rows[0].host_us.keys() == {
        "call", "torch_ops", "unrepeated"
    }  # fmt: skip


def test_all_plans_of_a_suite_are_in_one_report(fake_gpu, monkeypatch, tmp_path):
    small = tuple(
        Measurement(
            problem={"head_dim": 128, **one.problem}, options=one.options, sizes=(2,),
            scenarios=one.scenarios, override=one.override, baseline=one.baseline,
        )
        for one in WORKLOAD.suite
    )  # fmt: skip
    plans = [runner.plan(WORKLOAD, one) for one in small]
    started: list[Point] = []
    report = runner.measure(plans, CPU, started.append)
    assert started == [point for one in plans for point in one.points]
    assert {row.panel for row in report.rows} == {
        (p.problem.op, f"{p.problem}, {p.options}; cold L2", p.scenario) for p in started
    }
    assert {row.chosen_by for row in report.rows} == {"table", "override", "yardstick"}
    # What was measured is a results file that can be read again.
    records.save(report, tmp_path / "suite.json")
    again = records.load(KernelReport, tmp_path / "suite.json")
    assert [row.variant for row in again.rows] == [row.variant for row in report.rows]


@pytest.mark.parametrize("wrong", ["op", "override", "row_by_row"])
def test_a_wrong_kernel_is_named_and_not_timed(wrong, fake_gpu):
    variant, point = production(1, head_dim=128)
    other = runner.overridden(variant, {"reduce_warps": 1}, point, CPU).symbol
    fake_gpu.wrong.add(other if wrong == "override" else wrong)
    name = {"op": variant.symbol, "override": other, "row_by_row": "row_by_row"}[wrong]
    with pytest.raises(WrongResult, match=rf"^{name} is wrong at all-hit, size 1, .*: paged_kv\["):
        measured(override={"reduce_warps": 1}, baseline=True)
    assert fake_gpu.replays == []


def test_cases_that_stay_in_the_l2_are_not_called_cold(fake_gpu, monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1 << 40)
    assert {row.l2 for row in measured().rows} == {"warm"}


def test_the_reference_is_not_timed(fake_gpu, monkeypatch):
    monkeypatch.setattr(runner.dispatch, "backend_for", lambda device_type: "reference")
    with pytest.raises(ValueError, match="the reference serves this GPU"):
        measured()


def test_a_row_names_its_tuning():
    problem = Problem.of(WORKLOAD.defaults)
    row = KernelRow(
        op="paged_kv_compress", scenario="spread", size=1, problem=problem.values(),
        options=WORKLOAD.options().values(), l2="cold", backend="cuda",
        variant="paged_kv_compress_hd512_r128_bf16_fp32_n4_w8_s64", chosen_by="table",
        prefetch="none", median_us=1.0, min_us=1.0, max_us=1.0, moved_bytes=1, limit_us=1.0,
        efficiency=1.0, host_us={},
    )  # fmt: skip
    assert row.tuning == "w8_s64"
    assert replace(row, variant="row_by_row", chosen_by="yardstick").tuning == "row_by_row"
