"""The parts of the bench that only a GPU can run."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvfold import nvrtc
from kvfold.bench import cases, cli, demo, limit, report, runner, timing

pytestmark = pytest.mark.gpu
PROBLEM = {
    "head_dim": 512,
    "compress_ratio": 128,
    "kv_dtype": "bf16",
    "state_dtype": "fp32",
    "next_n": 4,
}


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def test_the_limit_is_plausible(device):
    best = limit.measure(device)
    assert 100 < best.read_bandwidth_gbs < 50_000
    assert 0.5 < best.copy_bandwidth_gbs / best.read_bandwidth_gbs < 1.5
    assert 0.1 < best.empty_node_us < 5


def test_both_readers_read_every_word(device):
    from kvfold.bench import limit_triton

    readers = [limit_triton.Kernels(device)]
    if nvrtc.available() is None:
        readers.append(limit.Kernels(device))
    for kernels, magic in zip(readers, (0x1E3779B9, 0x9E3779B9 - 2**32), strict=False):
        # The first thread's or program's part of the words, so that one total sees all of them.
        words = torch.zeros(4, dtype=torch.int32, device=device)
        kernels.read(words)
        assert kernels._sink.item() == 0
        words[3] = magic
        kernels.read(words)
        assert kernels._sink.item() == magic


def test_replay_and_events_agree(device):
    x = torch.randn(64 << 20, device=device)
    # The best of some: other tests may be using the GPU.
    times = [timing.replay([lambda: x.mul_(1.0)] * 20) for _ in range(5)]
    assert all(time.min_us <= time.median_us <= time.max_us for time in times)
    eager = []
    for _ in range(20):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        x.mul_(1.0)
        after.record()
        torch.cuda.synchronize()
        eager.append(1000 * before.elapsed_time(after))
    assert 0.5 < min(time.min_us for time in times) / min(eager) < 1.5


def test_states_are_more_than_the_l2_holds(device):
    case = cases.make(batch=16, device=device)
    count = timing.states_for(case.bytes, case.allocated, device)
    assert count >= timing.MIN_CALLS
    assert count * case.bytes > 2 * timing.l2_size(device)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_case_on_the_gpu_is_right(layout, device):
    plan = runner.Plan(PROBLEM, batches=(3, 70), page_sizes=(16, 24), layout=layout)
    found = list(runner.check(plan, device))
    assert len(found) == len(plan.points())
    assert max(one.largest_error for one in found) > 0


def test_a_short_run_of_the_command(tmp_path):
    file, picture = tmp_path / "times.json", tmp_path / "times.png"
    words = ["bench", "--baseline", "--batch", "2,64", "--json", str(file), "--plot", str(picture)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    done = report.load(file)
    assert len(done.rows) == 3 * 2 * 3 and {row.l2 for row in done.rows} == {"cold"}
    assert done.device == torch.cuda.get_device_name()
    assert done.driver and done.versions["cuda"] == torch.version.cuda
    for row in done.rows:
        assert 0 < row.min_us <= row.median_us <= row.max_us < 1e4
        assert 0 < row.efficiency < 1.5
        assert row.dispatched == ("_w1_" not in row.variant and row.variant != "row_by_row")
        for us in (row.host_us, row.host_torch_ops_us, row.host_triton_us):
            assert 1 < us < 1000 if row.dispatched else us is None
    assert json.loads(file.read_text())["rows"][0]["problem"] == done.rows[0].problem
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_warm_l2_and_an_override_without_baseline():
    words = ["bench", "--warm-l2", "--override", "reduce_warps=1", "--batch", "16"]
    result = CliRunner().invoke(cli.app, [*words, "--scenario", "all-hit"])
    assert result.exit_code == 0, result.output
    assert "warm L2" in result.output and "override" in result.output


def test_the_demo_on_the_gpu():
    done = demo.run(60, "cuda")
    assert done.wrong == 0, done.first_wrong
    assert done.rows > 500 and done.variants
    assert 0 < done.largest_error < 1e-5
