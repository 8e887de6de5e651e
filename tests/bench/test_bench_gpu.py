"""The parts of the bench that only a GPU can run. Other tests may use the GPU at the same time, so
no test says how long anything takes."""

import json

import pytest
import torch
from command_line import kvfold_command

from kvfold.bench import demo, records
from kvfold.bench.measure import limit, runner, timing
from kvfold.bench.records import KernelReport
from kvfold.bench.tuning.report import TuneReport
from kvfold.codegen import load_table
from kvfold.ops import decode_workload
from kvfold.ops.paged_kv_compress.spec import Problem
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime import dispatch
from kvfold.workload import Measurement

pytestmark = pytest.mark.gpu
OP = "paged_kv_compress"
PROBLEM = Problem.of(WORKLOAD.defaults)


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def test_the_limit_is_measured(device):
    best = limit.measure(device)
    assert best.read_bandwidth_gbs > 0 and best.copy_bandwidth_gbs > 0 and best.empty_node_us > 0


def test_the_reader_reads_every_word(device):
    """It stores what it has read if that is one magic number, and nothing else."""
    kernels, magic = limit.Kernels(device), 0x9E3779B9 - 2**32
    share = 4 * 4 * limit.THREADS  # int32 that a CTA reads in one round
    words = torch.zeros(3 * share, dtype=torch.int32, device=device)
    kernels.empty()
    kernels.read(words)
    assert kernels._sink.item() == 0
    for place in (0, 1, 17, share - 1, share, 2 * share + 5, 3 * share - 1):
        words.zero_()
        kernels._sink.zero_()
        words[place] = magic
        kernels.read(words)
        assert kernels._sink.item() == magic, place


def test_a_replay_runs_every_call(device):
    counts = torch.zeros(5, dtype=torch.int64, device=device)
    calls = [lambda count=count: count.add_(1) for count in counts.unbind()]
    time = timing.replay(calls, replays=4, warm_up=0.0)
    assert 0 < time.min_us <= time.median_us <= time.max_us
    # The first two calls run once more, before the capture.
    replays = counts - torch.tensor([1, 1, 0, 0, 0], device=device)
    assert len(set(replays.tolist())) == 1 and replays[0] >= 4 + 1


def test_cases_are_more_than_the_l2_holds(device):
    def make(seed: int):
        return WORKLOAD.make(PROBLEM, 16, "all-hit", WORKLOAD.options(), device=device, seed=seed)

    cases = timing.cold_cases(make, WORKLOAD.metadata, device, timing.MAX_CALLS)
    assert len(cases) >= timing.MIN_CALLS
    assert sum(case.moved_bytes for case in cases) > 2 * timing.l2_bytes(device)
    assert len({case.arguments.paged_kv.data_ptr() for case in cases}) == len(cases)


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_case_on_the_gpu_is_right(layout, device):
    options = {"page_size": [16, 24], "layout": layout}
    plan = runner.plan(WORKLOAD, Measurement(sizes=(3, 70), options=options))
    found = list(runner.check(plan.points, device))
    assert len(found) == len(plan.points) == len(WORKLOAD.scenarios) * 2 * 2
    assert max(one.largest_error for one in found) > 0


def test_a_short_run_of_the_command(tmp_path):
    file, picture = tmp_path / "times.json", tmp_path / "times.png"
    words = ["bench", OP, "--baseline", "--batch", "2,64", "--json", file, "--plot", picture]
    kvfold_command(*words)
    done = records.load(KernelReport, file)
    kinds = [*(("table", prefetch) for prefetch in WORKLOAD.prefetch), ("yardstick", "none")]
    assert [(row.size, row.chosen_by, row.prefetch) for row in done.rows] == [
        (size, *kind) for _ in WORKLOAD.scenarios for size in (2, 64) for kind in kinds
    ]
    assert {row.l2 for row in done.rows} == {"cold"}
    assert done.device == torch.cuda.get_device_name()
    assert done.driver and done.versions["cuda"] == torch.version.cuda
    assert done.table_fingerprint == load_table().fingerprint
    for row in done.rows:
        assert 0 < row.min_us <= row.median_us <= row.max_us
        assert row.efficiency == pytest.approx(row.limit_us / row.median_us, rel=0.01)
        if (row.chosen_by, row.prefetch) == ("table", "none"):
            assert row.host_us.keys() == {"call", "torch_ops", "unrepeated", "triton"}
        else:
            assert row.host_us == {}
    assert json.loads(file.read_text())["rows"][0]["problem"] == PROBLEM.values()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_override_without_a_baseline():
    words = ["bench", OP, "--override", "reduce_warps=1", "--batch", "16", "--scenario", "all-hit"]
    text = kvfold_command(*words).stdout
    assert "cold L2" in text and "override" in text and " w1_" in text and " table " not in text


def test_a_triton_override():
    words = ["bench", OP, "head_dim=128", "--override", "backend=triton", "--batch", "4"]
    text = kvfold_command(*words, "--scenario", "spread").stdout
    assert "_triton" in text and " state " not in text


def test_the_tuner_times_candidates_and_writes_rows(tmp_path, monkeypatch, device):
    monkeypatch.setattr(decode_workload, "REDUCE_WARPS", (4, 8))
    monkeypatch.setattr(decode_workload, "HEAD_SLICES", (32, 64))
    file, table = tmp_path / "times.json", tmp_path / "table.yaml"
    words = ["tune", OP, "head_dim=64", "next_n=1,2", "--batch", "1,32", "--mixture", "all-hit=1"]
    kvfold_command(*words, "--json", file, "--table", table)
    report = records.load(TuneReport, file)
    assert report.arch == dispatch.arch_of(device)
    assert report.plan.prefetch == list(WORKLOAD.search.prefetch)
    (family,) = report.plan.families
    assert [problem.next_n for problem in family] == [1, 2]
    assert {row.problem["next_n"] for row in report.rows} == {2}
    everywhere = len(report.plan.prefetch) * 2  # and sizes
    assert any(len(one.times) == everywhere for one in report.rows)
    for problem in family:
        for size in (1, 10_000):
            assert load_table(table).find(problem, "cuda", report.arch, size) is not None
    once = table.read_text()
    kvfold_command("tune", OP, "--from", file, "--table", table)
    assert table.read_text() == once


def test_the_demo_on_the_gpu():
    done = demo.run(60, "cuda")
    assert done.wrong == 0, done.first_wrong
    assert done.rows > 500 and done.variants
    assert 0 < done.largest_error < 1e-5
