"""kvfold demo: its summary, its exit code, and what it refuses."""

import re

import pytest
from command_line import kvfold_command, refused

import kvfold
from kvfold.bench import demo as simulation


def test_demo_prints_a_summary(no_gpu):
    text = kvfold_command("demo", "--steps", 3).stdout
    for name in ["device", "backend", "variants", "steps", "rows", "largest"]:
        assert re.search(rf"^{name}", text, re.MULTILINE)
    assert re.search(r"recomputed after a rollback: all right *$", text, re.MULTILINE)
    assert re.search(r"[1-9]\d* prompt tokens prefilled, [1-9]\d* tokens drafted", text)


@pytest.mark.parametrize("op", ["paged_kv_compress", "prefill_compress"])
def test_demo_fails_when_a_row_is_wrong(no_gpu, monkeypatch, op):
    monkeypatch.setattr(kvfold, op, lambda *args, **kwargs: None, raising=False)
    line = refused("demo", "--steps", 3, code=1)
    assert re.search(r"\d+ wrong rows, the first at step 0, ratio 4, request", line)


def test_demo_hands_its_options_to_the_simulation(no_gpu, monkeypatch):
    asked = []

    def run(steps, device, seed, on_step):
        asked.append((steps, device, seed))
        on_step()
        return simulation.Summary(device="x", backend="y")

    monkeypatch.setattr(simulation, "run", run)
    kvfold_command("demo")
    kvfold_command("demo", "--steps", 5, "--seed", 2**63 - 1, "--device", "cpu")
    assert asked == [(300, "cpu", 0), (5, "cpu", 2**63 - 1)]


def test_the_largest_seed_works(no_gpu):
    assert "all right" in kvfold_command("demo", "--steps", 1, "--seed", 2**63 - 1).stdout


@pytest.mark.parametrize(("seed", "says"), [(10**20, str(2**63 - 1)), (-1, "0"), ("x", "integer")])
def test_a_seed_that_is_none_is_refused_with_what_is_accepted(seed, says, no_gpu):
    text = " ".join(kvfold_command("demo", "--seed", seed, code=2).stderr.split())
    assert "'--seed'" in text and says in text.partition("'--seed'")[2]


def test_demo_refuses_a_device_that_is_not_there(no_gpu):
    assert "--device is 'cuda', but torch finds no CUDA GPU; accepted: cpu" in refused(
        "demo", "--device", "cuda"
    )
    assert "--device is 'tpu'; accepted: cpu, cuda" in refused("demo", "--device", "tpu")
