"""kvfold bench model-step, transformers and adapters: what the command line takes and shows."""

from pathlib import Path

import pytest
from command_line import kvfold_command, refused

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "h200"
FILES = {"model-step": "model_step", "transformers": "transformers", "adapters": "adapters"}
SHOWN = {
    "model-step": "The compressors of a pair of layers, us per pair",
    "transformers": "A decode step of 4 layers, ms",
    "adapters": "Host time of a call, us",
}


def no_gpu(monkeypatch):
    monkeypatch.setattr("kvfold.bench.cli.common.current_gpu", lambda: None)


@pytest.mark.parametrize("step", FILES)
def test_a_results_file_is_shown(step):
    shown = kvfold_command("bench", step, "--from", RESULTS / f"{FILES[step]}.json").stdout
    assert SHOWN[step] in shown and "NVIDIA H200" in shown


@pytest.mark.parametrize("step", ["model-step", "transformers"])
def test_a_results_file_is_drawn(step, tmp_path):
    file = tmp_path / "plot.png"
    kvfold_command("bench", step, "--from", RESULTS / f"{FILES[step]}.json", "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("step", FILES)
def test_another_command_s_results_file_is_refused(step):
    other = RESULTS / f"{FILES['adapters' if step == 'model-step' else 'model-step']}.json"
    assert f"is no {step} results file" in refused("bench", step, "--from", other)


@pytest.mark.parametrize(
    ("step", "option"),
    [
        *((step, words) for step in FILES for words in (["--suite"], ["--override", "a=1"])),
        ("transformers", ["--prefetch", "none"]),
        ("adapters", ["--size", "4"]),
        ("adapters", ["--plot", "a.png"]),
    ],
    ids=str,
)
def test_an_option_that_a_step_does_not_take_is_refused(step, option):
    message = f"kvfold: {step} has none: {option[0]} is not accepted"
    assert refused("bench", step, *option) == message


@pytest.mark.parametrize("step", FILES)
def test_without_a_gpu_nothing_is_timed(step, monkeypatch, tmp_path):
    no_gpu(monkeypatch)
    assert "nothing is timed" in kvfold_command("bench", step).stdout
    file = tmp_path / "results.json"
    assert "--json is not accepted" in refused("bench", step, "--json", file)
    assert not file.exists()
