"""kvfold step: what it prints, writes and draws, and that a wrong way is refused."""

import pytest
import torch
from typer.testing import CliRunner

from kvfold.bench import cli, report, step, step_plot

PROBLEM = {"layers": 61, "hidden": 7168, "head_dim": 512, "next_n": 4}


@pytest.fixture
def synthetic() -> step.StepReport:
    rows = [
        step.StepRow(
            op="step", scenario=name, problem=PROBLEM, batch=batch, median_us=1000.5 / (n + 1),
            min_us=900.0 / (n + 1), max_us=1100.0, host_us=1200.0 / (n + 1) ** 2, device_us=400.0,
            copy_us=5000.0 if n == 3 else None, syncs=n,
        )
        for batch in (16, 256) for n, name in enumerate(step.WAYS)
    ]  # fmt: skip
    return step.StepReport(
        device="a GPU", driver="580", versions={}, date="2026-11-21T09:00:00+00:00",
        commit="abc", config_fingerprint="0123", rows=rows,
    )  # fmt: skip


def test_a_report_survives_the_file(synthetic, tmp_path):
    file, copy = tmp_path / "step.json", tmp_path / "copy.json"
    report.save(synthetic, file)
    again = step.load(file)
    assert [row.scenario for row in again.rows] == 2 * list(step.WAYS)
    assert again.rows[3].copy_us == 5000.0 and again.rows[2].copy_us is None
    report.save(again, copy)
    assert copy.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"op": "step"}]}', '{"rows": []}'])
def test_a_file_that_is_no_report_is_refused(text, tmp_path):
    file = tmp_path / "step.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"step.json is no results file of kvfold step"):
        step.load(file)


def test_a_results_file_is_shown_and_drawn(synthetic, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    file, picture = tmp_path / "step.json", tmp_path / "step.png"
    report.save(synthetic, file)
    result = CliRunner().invoke(
        cli.app,
        ["step", "--from", str(file), "--plot", str(picture)],
        env={"COLUMNS": "160"},
    )
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines() if "staging_batch_pre" in line]
    assert " ".join(lines[0]) == "16 staging_batch_prefetch 250 225 1100 75 400 5000 3"
    assert picture.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert [panel.get_title() for panel in figure.axes] == ["batch 16", "batch 256"]
    heights = {round(bar.get_height(), 1) for bar in figure.axes[0].patches}
    assert heights == {1200.0, 300.0, 133.3, 75.0, 1000.5, 500.2, 333.5, 250.1, 400.0}


def test_a_plot_needs_a_known_suffix(synthetic, tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        step_plot.plot(synthetic, tmp_path / "step.xyz")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--batch", "0"], "--batch is '0'"),
        (["--batch", "x"], "--batch is 'x'"),
        (["--json", "/nowhere/step.json"], "/nowhere is no directory"),
        (["--json", "step.json"], "no CUDA GPU"),
        (["--from", "missing.json"], "missing.json"),
    ],
)
def test_wrong_words_are_named(words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["step", *words])
    assert result.exit_code == 2
    assert complaint in result.output


def test_without_a_gpu_the_ways_are_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["step"])
    assert result.exit_code == 0, result.output
    assert "the same bits by to_device_eager, staging_eager" in result.output


@pytest.mark.gpu
def test_a_short_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "COMPRESS_RATIOS", (128, 4, 128, 4, 128))
    words = ["step", "--batch", "2", "--json", str(tmp_path / "step.json")]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    rows = step.load(tmp_path / "step.json").rows
    assert [row.scenario for row in rows] == list(step.WAYS)
    for row in rows:
        assert 0 < row.min_us <= row.median_us <= row.max_us
        assert 0 < row.device_us < row.median_us * 1.5
        assert row.host_us > 0
    waits = {row.scenario: row.syncs for row in rows}
    assert waits["to_device_eager"] > 0  # or the count does not see them
    assert {waits[name] for name in step.WAYS[1:]} == {0}
