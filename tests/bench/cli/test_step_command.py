"""kvfold step: what it checks, shows and refuses."""

import pytest
import torch
from command_line import kvfold_command, refused
from reports import STEP

from kvfold.bench import records
from kvfold.bench.cli import common
from kvfold.bench.cli import step as command
from kvfold.bench.measure.verify import WrongResult
from kvfold.bench.step.measure import BATCHES
from kvfold.bench.step.modes import MODES


def test_without_a_gpu_the_modes_are_checked(no_gpu, monkeypatch):
    checked = []
    monkeypatch.setattr(command, "check", lambda *args: checked.append(args))
    text = kvfold_command("step").stdout
    assert "No CUDA GPU is here" in text
    assert f"100 steps of 4 layers: the same bits in {', '.join(MODES)}" in text
    ((shape, device, _, count),) = checked
    assert (shape.compress_ratios, device.type, count) == ((128, 4, 128, 4), "cpu", 100)


def test_modes_that_differ_fail_the_command(no_gpu, monkeypatch):
    def check(*args):
        raise WrongResult("staging_eager: tensor 3 differs")

    monkeypatch.setattr(command, "check", check)
    assert refused("step", code=1) == "kvfold: staging_eager: tensor 3 differs"


def test_a_results_file_is_shown(tmp_path):
    file = tmp_path / "step.json"
    records.save(STEP, file)
    text = kvfold_command("step", "--from", file).stdout
    assert "a GPU, 2026-11-21T09:00:00+00:00" in text
    assert "One decode step: layers 61, hidden 7168, head_dim 512, next_n 4" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "16 staging_batch_prefetch 250 225 1100 112 400 5000 3" in rows
    assert "256 staging_batch 334 300 1100 200 400 2" in rows  # which copies no state


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--batch", "0"), "--batch = 0 is not accepted"),
        (("--batch", "x"), '--batch is "x"; accepted: integers'),
        (("--batch", "99999999999"), "--batch = 99999999999 is not accepted; legal: 1 to 1048576"),
        (
            ("--json", "/nowhere/step.json"),
            "/nowhere/step.json cannot be written: /nowhere is no dir",
        ),
        (("--json", "step.json"), "No CUDA GPU is here, so nothing is timed: --json"),
        (("--from", "missing.json"), "missing.json"),
        (("--from", "missing.json", "--batch", "4"), "--batch is not accepted"),
        (("--from", "missing.json", "--json", "step.json"), "--json is not accepted"),
    ],
)
def test_step_refuses_in_one_line(words, says, no_gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused("step", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "batches"), [((), BATCHES), (("--batch", "2,7"), (2, 7))])
def test_with_a_gpu_the_batches_are_measured_and_written(words, batches, monkeypatch, tmp_path):
    asked, file = [], tmp_path / "step.json"

    def measure(given, device, started):
        asked.append(given)
        started("batch 2: check")
        return STEP

    monkeypatch.setattr(common, "current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(command, "measure", measure)
    assert "staging_batch_prefetch" in kvfold_command("step", *words, "--json", file).stdout
    assert asked == [batches]
    assert records.load(records.StepReport, file) == STEP


@pytest.mark.gpu
def test_a_short_measurement(tmp_path, monkeypatch):
    from kvfold.bench.step import measure

    monkeypatch.setattr(measure, "COMPRESS_RATIOS", (128, 4, 128, 4, 128))
    file = tmp_path / "step.json"
    kvfold_command("step", "--batch", "2", "--json", file)
    rows = records.load(records.StepReport, file).rows
    assert [row.mode for row in rows] == list(MODES)
    for row in rows:
        assert 0 < row.min_us <= row.median_us <= row.max_us
        assert row.device_us > 0 and row.host_us > 0
        assert (row.copy_us is None) == (row.mode != MODES[-1])
    waits = {row.mode: row.synchronisations for row in rows}
    assert waits["to_device_eager"] > 0  # or the count does not see them
    assert {waits[name] for name in MODES[1:]} == {0}
