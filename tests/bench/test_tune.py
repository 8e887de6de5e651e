"""kvfold tune: candidates, choice and rows, and the whole command with the GPU stood in for."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvfold import dispatch
from kvfold.bench import cases, cli, report, timing, tune, tune_gpu, tune_report, verify
from kvfold.bench.verify import WrongResult
from kvfold.codegen import TableError, Variant, load_table
from kvfold.nvrtc import Compiled, CompileError
from kvfold.ops.paged_kv_compress import cuda_kernel, reference

OP = "paged_kv_compress"
PRODUCTION = {
    "head_dim": 512, "compress_ratio": 128, "overlap": False, "kv_dtype": "bf16",
    "state_dtype": "fp32", "next_n": 4,
}  # fmt: skip
BOTH = {"kv_dtype": ("bf16", "fp32")}
CPU = torch.device("cpu")


def variant(**changes) -> Variant:
    tuning = {"backend": "cuda", "reduce_warps": 4, "head_slice": 32}
    return Variant(op=OP, **PRODUCTION | tuning | changes)


def code(one: Variant, registers: int = 96, spill_bytes: int = 0) -> Compiled:
    return Compiled(one.symbol, "sm_90", b"", registers, spill_bytes, 0.0)


def plan(**changes) -> tune.Plan:
    problems = {name: (value,) for name, value in PRODUCTION.items() if name != "overlap"}
    return tune.Plan(OP, problems | changes)


# ---- plans and families --------------------------------------------------------------------------


def test_families_hold_next_n_together_and_fill_in_the_defaults():
    found = plan(compress_ratio=(128, 4), next_n=(4, 1), **BOTH).families
    assert [(f.problem["compress_ratio"], f.problem["overlap"], f.problem["kv_dtype"])
            for f in found] == [(128, False, "bf16"), (128, False, "fp32"), (4, True, "bf16"),
                                (4, True, "fp32")]  # fmt: skip
    assert all(f.problem["next_n"] == 4 and f.next_n == (1, 4) for f in found)
    assert found[0].keys == [variant(next_n=n).key for n in (1, 4)]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"head_dim": (100,)}, "head_dim = 100"),
        ({"next_n": (4, 17)}, "next_n = 17"),
        ({"kv_dtype": ("fp16",)}, 'kv_dtype = "fp16" .*bf16, fp32'),
    ],
)
def test_a_plan_refuses_what_it_cannot_tune(changes, names):
    with pytest.raises(TableError, match=names):
        plan(**changes)
    for other, what in (({"batches": (0,)}, "batch = 0"), ({"backend": "cpu"}, 'backend = "cpu"')):
        with pytest.raises(TableError, match=what):
            tune.Plan(OP, plan().problems, **other)


def test_a_plan_says_what_to_type_for_it():
    assert plan(next_n=(1, 4)).command == (
        "kvfold tune --head-dim 512 --compress-ratio 128 --kv-dtype bf16 --state-dtype fp32"
        " --next-n 1,4"
    )
    problems = {"compress_ratio": (4,), "overlap": (False,), "next_n": (1,), "head_dim": (64,),
                "kv_dtype": ("bf16",), "state_dtype": ("bf16",)}  # fmt: skip
    text = tune.Plan(OP, problems, batches=(8, 2), prefetch_state=False).command
    assert "--no-overlap" in text and text.endswith("--batch 2,8 --no-prefetch-state")
    assert tune.Plan(OP, problems, "triton").command.endswith("--backend triton")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("all-hit=1,no-hit=3", {"all-hit": 0.25, "no-hit": 0.75}),
        ("spread = 2, no-hit=0", {"spread": 1.0}),
        (cli.MIXTURE, tune.MIXTURE),
    ],
)
def test_a_mixture_adds_up_to_one(text, weights):
    assert tune.mixture(text) == weights


@pytest.mark.parametrize(
    "text",
    ["", "spread", "spread=", "spread=x", "some=1", "spread=1,spread=1", "spread=0", "spread=-1",
     "spread=inf", "spread=nan"],
)  # fmt: skip
def test_a_mixture_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"mixture is .*; accepted: weights of all-hit, spread"):
        tune.mixture(text)


# ---- candidates ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    head_dim=st.sampled_from((64, 96, 128, 512)),
    compress_ratio=st.sampled_from((4, 100, 128)),
    kv_dtype=st.sampled_from(("bf16", "fp32")),
    state_dtype=st.sampled_from(("bf16", "fp32")),
    next_n=st.integers(1, 16),
    arch=st.sampled_from(("sm_80", "sm_90", "sm_120")),
)
def test_candidates_can_run_are_unique_and_have_both_schedules(arch, **problem):
    problem["overlap"] = problem["compress_ratio"] == 4
    found = tune.candidates(OP, problem, "cuda", arch)
    assert len({one.symbol for one in found}) == len(found)
    assert {one.schedule for one in found} == {"direct", "persistent"}
    sm_kib = {"sm_80": 164, "sm_90": 228, "sm_120": 100}[arch]
    for one in found:
        one.check_shared(arch)
        assert one.problem == problem
        # So many CTAs do fit at once, in shared memory and with few enough registers.
        assert one.min_ctas * (one.shared_bytes + 1024) <= sm_kib * 1024
        assert one.min_ctas == 1 or one.min_ctas * one.threads * 80 <= 65536


def test_candidates_hold_what_the_shipped_table_has():
    found = tune.candidates(OP, PRODUCTION, "cuda", "sm_90")
    for batch in (1, 64, 512):
        assert load_table().select(OP, batch=batch, **PRODUCTION) in found


@pytest.mark.parametrize(
    ("schedule", "warps", "width", "ctas"),
    [
        ("direct", 4, 32, [1, 4, 5, 6]),  # 128 threads of 128, 96 and 80 registers
        ("persistent", 4, 32, [4, 5]),  # not one alone
        ("direct", 4, 64, [1, 3]),  # of 67 KiB of shared memory three fit
        ("persistent", 8, 64, [2]),
        ("persistent", 8, 128, [1]),  # more do not fit
    ],
)
def test_min_ctas_goes_by_registers_as_far_as_shared_memory_allows(schedule, warps, width, ctas):
    found = tune.candidates(OP, PRODUCTION, "cuda", "sm_90")
    like = (schedule, warps, width)
    same = [v for v in found if (v.schedule, v.reduce_warps, v.head_slice) == like]
    assert [v.min_ctas for v in same] == ctas


def test_triton_candidates_are_direct_and_no_tile_is_huge():
    found = tune.candidates(OP, PRODUCTION, "triton", "sm_90")
    assert {v.schedule for v in found} == {"direct"}
    assert [v.min_ctas for v in found if (v.reduce_warps, v.head_slice) == (4, 32)] == [1, 4, 5, 6]
    assert variant(backend="triton") in found
    assert variant(backend="triton", reduce_warps=1, head_slice=512) not in found


def test_a_problem_that_no_candidate_solves_is_named():
    with pytest.raises(TableError, match=r"no cuda variant .* sm_90 .*head_dim 24"):
        tune.candidates(OP, PRODUCTION | {"head_dim": 24}, "cuda", "sm_90")


def test_spilling_and_equal_kernels_are_dropped():
    direct = [variant(min_ctas=ctas) for ctas in (6, 1, 5, 4)]
    registers = [(80, 8), (94, 0), (94, 0), (93, 0)]
    persistent = [variant(schedule="persistent", min_ctas=ctas) for ctas in (5, 4)]
    other = variant(head_slice=64)
    compiled = [(v, code(v, *one)) for v, one in zip(direct, registers, strict=True)]
    compiled += [(v, code(v, 94)) for v in (*persistent, other)]
    kept = {variant(), variant(min_ctas=4), *persistent, other}
    assert set(tune.distinct(compiled)) == kept


# ---- timing --------------------------------------------------------------------------------------

AXIS = (1, 16, 64, 512)
SCENARIOS = cases.SCENARIOS


def made_up(slow: dict[Variant, float]):
    """A timer: 10 us, times a variant's factor; and the list of what it was asked."""
    asked = []

    def time(one: Variant, scenario: str, batch: int) -> float:
        asked.append((one, (scenario, batch)))
        return 10 * slow[one]

    return time, asked


def test_all_are_timed_at_first_and_the_good_ones_once_everywhere():
    good, fair, bad = variant(), variant(head_slice=64), variant(reduce_warps=1)
    time, asked = made_up({good: 1, fair: 1.3, bad: 1.4})
    times = tune.measure([bad, good, fair], time, AXIS, SCENARIOS)
    first = [("all-hit", 1), ("all-hit", 64), ("all-hit", 512), ("spread", 64), ("spread", 512)]
    assert set(times[bad]) == set(first)
    assert set(times[good]) == set(times[fair]) == set(itertools.product(SCENARIOS, AXIS))
    assert len(asked) == len(set(asked)) <= tune.most_times(3, AXIS, SCENARIOS)
    # A point's states are made once: everything at a point comes in one go.
    points = [point for point, _ in itertools.groupby(asked, key=lambda one: one[1])]
    assert len(points) == len(set(points))


def test_what_is_good_at_one_point_or_schedule_alone_survives():
    slices, warps = (16, 32, 64, 128, 256), (1, 2, 4, 8)
    many = [variant(head_slice=s, reduce_warps=w) for s in slices for w in warps]
    persistent = variant(schedule="persistent", min_ctas=5)
    large = variant(head_slice=512, reduce_warps=2)
    points = [("all-hit", 1), ("all-hit", 512)]
    times = {v: dict.fromkeys(points, 10 + n / 100) for n, v in enumerate(many)}
    times[persistent] = dict.fromkeys(points, 13.0)
    times[large] = {points[0]: 99.0, points[1]: 9.9}
    kept = tune.survivors(times, points)
    assert len(kept) == tune.KEPT and {persistent, large, many[0]} < set(kept)
    times[persistent] = dict.fromkeys(points, 13.6)  # past 1.35 of the best
    assert persistent not in tune.survivors(times, points)


def test_first_points_do_with_one_batch_and_any_scenarios():
    assert tune.first_points((8,), SCENARIOS) == [("all-hit", 8), ("spread", 8)]
    assert tune.first_points((1, 2), ("no-hit",)) == [("no-hit", 1), ("no-hit", 2)]


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

    cuts = tune.cut(costs, penalty)
    ends = [last for _, last in cuts]
    assert ends == sorted(set(ends)) and ends[-1] == places - 1
    served = [next(v for v, last in cuts if place <= last) for place in range(places)]
    assert len(cuts) == 1 + sum(a != b for a, b in itertools.pairwise(served))
    every = itertools.product(range(len(costs)), repeat=places)
    assert cost(served) == min(map(cost, every))


def test_ranges_tile_the_axis_and_meet_in_the_geometric_middle():
    small, middle, large = variant(), variant(head_slice=64), variant(head_slice=128)
    batches = (1, 2, 16, 32, 512)
    best = {1: small, 2: middle, 16: middle, 32: large, 512: large}
    times = {
        v: {(s, b): 1.0 if best[b] == v else 2.0 for s in SCENARIOS for b in batches}
        for v in (large, middle, small)
    }
    ranges = tune.choose(times, batches, tune.MIXTURE, "sm_90")
    assert ranges == (
        tune.Range(small, 1, 1), tune.Range(middle, 2, 22), tune.Range(large, 23, None)
    )  # fmt: skip


@pytest.mark.parametrize(("gain", "count"), [(1.009, 1), (1.011, 2)])
def test_a_range_more_must_gain_one_per_cent(gain, count):
    one, other = variant(), variant(head_slice=64)
    times = {
        one: {("spread", 1): 1.0, ("spread", 2): gain},
        other: {("spread", 1): 2.0, ("spread", 2): 1.0},
    }
    assert len(tune.choose(times, (1, 2), {"spread": 1.0}, "sm_90")) == count


def test_the_mixture_decides_and_what_was_not_timed_everywhere_does_not_count():
    hit, store, out = variant(), variant(head_slice=64), variant(head_slice=128)
    times = {
        hit: {("all-hit", 1): 1.0, ("no-hit", 1): 3.0},
        store: {("all-hit", 1): 2.0, ("no-hit", 1): 1.0},
        out: {("all-hit", 1): 0.1},
    }

    def chosen(weights) -> Variant:
        return tune.choose(times, (1,), weights, "sm_90")[0].variant

    assert chosen({"all-hit": 0.5, "no-hit": 0.5}) == store
    assert chosen({"all-hit": 0.7, "no-hit": 0.3}) == hit
    # Means: of times 1.76 against 1.62, which would be the other way round, of logarithms these.
    assert chosen({"all-hit": 0.62, "no-hit": 0.38}) == hit
    assert 0.62 * math.log(2) > 0.38 * math.log(3)


# ---- rows ----------------------------------------------------------------------------------------


def tuned(family: tune.Family, *ranges: tuple) -> tune.Tuned:
    """ranges: (tuning, min_batch, max_batch)."""
    found = tuple(
        tune.Range(Variant(op=OP, **family.problem, backend="cuda", **fields), least, most)
        for fields, least, most in ranges
    )
    return tune.Tuned(family, {}, found)


ONE = ({"reduce_warps": 8, "head_slice": 32}, 1, 22)
TWO = ({"reduce_warps": 4, "head_slice": 32, "schedule": "persistent", "min_ctas": 5}, 23, None)
WHOLE = ({"reduce_warps": 1, "head_slice": 128}, 1, None)


def test_rows_say_only_what_is_no_default():
    (family,) = plan(next_n=(1, 4)).families
    first, second = tune.table_rows([tuned(family, ONE, TWO)], "sm_90")
    problem = {name: PRODUCTION[name] for name in PRODUCTION if name != "overlap"}
    common = problem | {"next_n": [1, 4], "backend": "cuda", "arch": "sm_90"}
    assert first == common | {"max_batch": 22, "reduce_warps": 8, "head_slice": 32}
    assert second == common | {
        "min_batch": 23, "schedule": "persistent", "reduce_warps": 4, "head_slice": 32,
        "min_ctas": 5,
    }  # fmt: skip
    (row,) = tune.table_rows([tuned(family, WHOLE)], "any")
    assert not row.keys() & {"arch", "min_batch", "max_batch", "overlap", "min_ctas", "schedule"}


def test_an_overlap_that_is_not_the_ratios_own_is_said():
    (family,) = plan(compress_ratio=(4,), overlap=(False,)).families
    (row,) = tune.table_rows([tuned(family, WHOLE)], "any")
    assert row["overlap"] is False


def test_families_with_the_same_ranges_share_rows_where_lists_say_exactly_them():
    four = plan(head_dim=(128, 512), **BOTH).families
    rows = tune.table_rows([tuned(f, ONE, TWO) for f in four], "any")
    assert len(rows) == 2
    assert all(r["head_dim"] == [128, 512] and r["kv_dtype"] == ["bf16", "fp32"] for r in rows)
    # Three of the four are no product; all of the ranges must be the same.
    rows = tune.table_rows([tuned(f, WHOLE) for f in four[:3]], "any")
    assert [(r["head_dim"], r["kv_dtype"]) for r in rows] == [
        (128, ["bf16", "fp32"]), (512, "bf16")
    ]  # fmt: skip
    rows = tune.table_rows([tuned(four[0], ONE, TWO), tuned(four[1], WHOLE)], "any")
    assert len(rows) == 3
    # Both ratios have the overlap that is theirs.
    ratios = plan(compress_ratio=(4, 128)).families
    (row,) = tune.table_rows([tuned(f, ({"reduce_warps": 8, "head_slice": 32}, 1, None))
                              for f in ratios], "any")  # fmt: skip
    assert row["compress_ratio"] == [4, 128] and "overlap" not in row


# ---- the command ---------------------------------------------------------------------------------

TABLE = """\
version: 1
paged_kv_compress:
  # Mine.
  - {head_dim: 64, compress_ratio: 128, kv_dtype: [bf16, fp32], state_dtype: fp32, next_n: [1, 2],
     backend: cuda, reduce_warps: 1, head_slice: 64}
"""
QUICK = (
    "tune", "--head-dim", "64", "--kv-dtype", "bf16,fp32", "--next-n", "1,2", "--batch", "1,4,8",
)  # fmt: skip


def command(*words, code: int = 0):
    result = CliRunner().invoke(cli.app, list(map(str, words)), env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "table.yaml"
    file.write_text(TABLE)
    return file


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu_on_cpu(monkeypatch):
    """Stands in for the GPU: kernels are the reference, and the time of a call is made up.

    Of 8 warps and 32 columns, direct is best up to batch 4, persistent above; twice as fast as all
    others. 16 columns spill. What is called, compiled and timed is in the namespace returned.
    """
    seen = SimpleNamespace(compiled=[], timed=[], prefetch=set(), wrong=None, asked=[])

    def compile_all(jobs):
        for one, arch in jobs:
            seen.compiled.append(one)
            assert arch == "sm_90"
            yield code(one, registers=200 // one.min_ctas, spill_bytes=int(one.head_slice == 16))

    def launcher(one, code, prefetch_state):
        assert code is None or code.symbol == one.symbol
        seen.prefetch.add(prefetch_state)

        def call(*args):
            seen.asked.append((one, args[7].numel()))
            if one != seen.wrong:
                reference.paged_kv_compress(*args)

        return call

    def replay(calls):
        seen.asked.clear()
        for call in calls:
            call()
        ((one, batch),) = set(seen.asked)
        seen.timed.append((one, batch, len(calls)))
        best = ("persistent" if batch > 4 else "direct", 8, 32)
        good = best == (one.schedule, one.reduce_warps, one.head_slice)
        us = 10.0 if good else 20.0
        return timing.Timing(us, us, us)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")
    monkeypatch.setattr(torch, "device", lambda *_: CPU)
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(cli.nvrtc, "available", lambda: None)
    monkeypatch.setattr(tune_gpu.build, "compile_all", compile_all)
    monkeypatch.setattr(tune_gpu, "launcher", launcher)
    monkeypatch.setattr(timing, "replay", replay)
    monkeypatch.setattr(timing, "states_for", lambda touched, allocated, device: 2)
    monkeypatch.setattr(report, "commit", lambda: None)
    monkeypatch.setattr(tune, "REDUCE_WARPS", (4, 8))  # few, for the CPU is slow
    monkeypatch.setattr(tune, "HEAD_SLICES", (16, 32, 64))
    return seen


def chosen(file, batch: int, **problem) -> Variant:
    fields = {"head_dim": 64, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32"}
    given = fields | {"next_n": 2, "arch": "sm_90"} | problem
    return load_table(file).select(OP, batch=batch, **given)


def test_the_command_measures_chooses_and_writes(gpu_on_cpu, table, tmp_path):
    file = tmp_path / "times.json"
    shown = command(*QUICK, "--table", table, "--json", file).stdout
    assert "all-hit: head_dim 64" in shown and f"wrote {table}: 3 rows" in shown
    # The old row stays as it is, for other GPUs, and the new ones serve both dtypes and next_n.
    text = table.read_text()
    assert text.startswith(TABLE) and "# Tuned on a stand-in, 20" in text
    words = " ".join(text.replace("#", "").split())
    assert "kvfold tune --head-dim 64 --compress-ratio 128 --kv-dtype bf16,fp32" in words
    for kv_dtype, next_n in itertools.product(("bf16", "fp32"), (1, 2)):
        problem = {"kv_dtype": kv_dtype, "next_n": next_n}
        for batch in (1, 4, 5):
            found = chosen(table, batch, **problem)
            assert (found.schedule, found.reduce_warps, found.head_slice) == ("direct", 8, 32)
        for batch in (6, 8, 512):  # 5 is the geometric middle of 4 and 8
            assert chosen(table, batch, **problem).schedule == "persistent"
        assert chosen(table, 1, arch="sm_80", **problem).reduce_warps == 1
    # Spilling candidates were compiled, not timed; timed on two states, with the prefetch.
    assert any(one.head_slice == 16 for one in gpu_on_cpu.compiled)
    assert not any(one.head_slice == 16 for one, _, _ in gpu_on_cpu.timed)
    assert {count for _, _, count in gpu_on_cpu.timed} == {2} and gpu_on_cpu.prefetch == {True}
    assert {one.next_n for one, _, _ in gpu_on_cpu.timed} == {2}
    content = json.loads(file.read_text())
    assert content["device"] == "a stand-in" and content["arch"] == "sm_90"
    assert len(content["times"]) == 2
    assert content["times"][0]["variants"][0]["times"][0].keys() == {
        "scenario", "batch", "median_us"
    }  # fmt: skip


def test_a_dry_run_shows_the_diff_and_writes_nothing(gpu_on_cpu, table):
    shown = command(*QUICK, "--table", table, "--any-arch", "--dry-run").stdout
    assert f"+++ {table} (tuned)" in shown and "\n+  # Tuned on a stand-in" in shown
    assert "-     backend: cuda, reduce_warps: 1, head_slice: 64}" in shown
    assert "arch" not in shown.split("+++")[1].replace("--any-arch", "")
    assert table.read_text() == TABLE


def test_a_file_of_times_gives_the_same_rows_with_no_gpu(gpu_on_cpu, table, tmp_path, monkeypatch):
    file = tmp_path / "times.json"
    monkeypatch.delenv("KVFOLD_CONFIG", raising=False)
    first = command(*QUICK, "--no-prefetch-state", "--json", file).stdout
    assert gpu_on_cpu.prefetch == {False} and table.read_text() == TABLE
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("KVFOLD_CONFIG", str(table))
    second = command("tune", "--from", file).stdout
    assert second.startswith(first) and "wrote" in second.removeprefix(first)
    assert "--no-prefetch-state" in table.read_text()
    command("tune", "--from", file, "--mixture", "no-hit=1")
    assert table.read_text().count("# Tuned on") == 1 and "--mixture no-hit=1" in table.read_text()


def test_triton_is_tuned_without_compiling_ahead_and_without_prefetch(gpu_on_cpu, tmp_path):
    new = tmp_path / "new.yaml"
    command(*QUICK, "--backend", "triton", "--table", new)
    assert not gpu_on_cpu.compiled and gpu_on_cpu.prefetch == {False}
    assert chosen(new, 8, backend="triton").backend == "triton"


def test_a_wrong_candidate_is_named_and_not_timed(gpu_on_cpu, table):
    gpu_on_cpu.wrong = next(
        one
        for one in tune.candidates(OP, PRODUCTION | {"head_dim": 64, "next_n": 2}, "cuda", "sm_90")
        if one.head_slice == 64
    )
    line = command(*QUICK, "--table", table, code=1).stderr
    assert line.startswith(f"kvfold: {gpu_on_cpu.wrong.symbol} is wrong: paged_kv")
    assert gpu_on_cpu.wrong not in [one for one, _, _ in gpu_on_cpu.timed]
    assert table.read_text() == TABLE


def test_a_table_that_cannot_take_the_rows_costs_no_measuring(gpu_on_cpu, table):
    words = ("tune", "--head-dim", "64", "--next-n", "2", "--any-arch", "--table", table)
    assert "row 1 (line 4)" in command(*words, code=2).stderr
    table.write_text(TABLE.replace("head_slice: 64", "head_slice: 48"))
    assert "head_slice = 48" in command(*QUICK, "--table", table, code=2).stderr
    assert not gpu_on_cpu.compiled and not gpu_on_cpu.timed


def test_states_are_made_once_per_point_and_are_never_many(gpu_on_cpu, monkeypatch):
    made, make = [], cases.make
    monkeypatch.setattr(cases, "make", lambda **case: made.append(case) or make(**case))
    monkeypatch.setattr(timing, "states_for", lambda touched, allocated, device: 10_000)
    monkeypatch.setattr(tune_gpu, "MOST_STATES", 3)
    two = [variant(head_dim=64), variant(head_dim=64, reduce_warps=8)]
    timer = tune_gpu.Timer(two[0].problem, CPU, {}, prefetch_state=False)
    for one in two:
        timer(one, "all-hit", 1)
    assert [case.get("seed", 0) for case in made if case["batch"] == 1] == [0, 1, 2]
    timer(two[0], "all-hit", 2)
    assert [count for _, _, count in gpu_on_cpu.timed] == [3, 3, 3]


def test_a_launcher_calls_the_kernel_of_its_backend(monkeypatch):
    case = {"head_dim": 64, "compress_ratio": 4, "next_n": 2, "batch": 2}
    overlapping = variant(head_dim=64, compress_ratio=4, overlap=True, next_n=2)
    if not torch.cuda.is_available():  # under Triton's interpreter
        other = replace(overlapping, backend="triton")
        assert verify.verify(tune_gpu.launcher(other, None, False), **case) < 1

    launched = []

    class Launch:
        def __init__(self, kernel, *args):
            assert len(args) == 12
            self.kernel = kernel

        def __call__(self, prefetch_state, pointers):
            launched.append((self.kernel, prefetch_state, len(pointers)))

    monkeypatch.setattr(cuda_kernel, "Launch", Launch)
    monkeypatch.setattr(tune_gpu.nvrtc, "Kernel", lambda one, cubin: (one, cubin))
    call = tune_gpu.launcher(overlapping, code(overlapping), True)
    call(*cases.make(**case).args())
    assert launched == [((overlapping, b""), True, 10)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no CUDA GPU here"),
        (("--dry-run",), "--dry-run needs --table"),
        (("--mixture", "some=1"), "accepted: weights of all-hit"),
        (("--head-dim", "100"), "head_dim = 100"),
        (("--head-dim", "x"), "accepted: integers"),
        (("--batch", "0"), "batch = 0"),
        (("--backend", "cpu"), "legal: cuda, triton"),
        (("--json", "nowhere/times.json"), "no directory"),
        (("--from", "none.json"), "none.json"),
        (("--from", "none.json", "--json", "times.json"), "measures nothing"),
    ],
)
def test_the_command_refuses_in_one_line(no_gpu, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVFOLD_CONFIG", raising=False)
    line = command("tune", *words, code=2).stderr
    assert line.startswith("kvfold: ") and says in line and not list(tmp_path.iterdir())


def test_a_file_without_times_or_without_a_scenario_is_refused(gpu_on_cpu, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"device": "a GPU"}')
    assert "holds no measurements" in command("tune", "--from", other, code=2).stderr
    words = ("--kv-dtype", "bf16", "--mixture", "no-hit=1", "--json", other)
    command(*QUICK, *words)
    line = command("tune", "--from", other, "--mixture", "spread=1", code=2).stderr
    assert "mixture names spread, which was not timed; accepted: no-hit" in line


def test_help_says_what_is_timed_and_what_is_shared():
    text = command("tune", "--help").stdout
    for words in ("--table", "--dry-run", "--mixture", "--any-arch", "--from", "next_n alone"):
        assert words in text


@pytest.mark.parametrize(("error", "number"), [(WrongResult("x"), 1), (CompileError("x"), 1)])
def test_errors_while_tuning_are_one_line(gpu_on_cpu, monkeypatch, error, number):
    def run(*_):
        raise error

    monkeypatch.setattr(tune_gpu, "run", run)
    assert command(*QUICK, code=number).stderr == "kvfold: x\n"


def test_measurements_come_back_from_their_file(tmp_path):
    times = {variant(): {("spread", 1): 1.25}, variant(head_slice=64): {("spread", 1): 2.5}}
    one = tune.Plan(OP, plan().problems, batches=(1,), scenarios=("spread",))
    measured = tune_report.Measured(
        device="a GPU", driver=None, versions={}, date="2027-01-02T03:04:05", commit=None,
        config_fingerprint="0", arch="sm_90", plan=one, times=[times],
    )  # fmt: skip
    tune_report.save(measured, tmp_path / "times.json")
    assert tune_report.load(tmp_path / "times.json") == measured
    assert measured.origin.startswith("a GPU, 2027-01-02, kvfold tune --head-dim 512")
