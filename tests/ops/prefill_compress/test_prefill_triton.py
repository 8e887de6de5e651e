"""The Triton kernel against the oracle: compiled where there is a GPU, else interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prefill_backends import triton_variant
from prefill_calls import Call, make, random_call
from prefill_contract import CASES, assert_follows_contract

from kvfold.ops.prefill_compress import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def run(call: Call) -> None:
    triton_kernel.launch(triton_variant(call), call)


def run_slices(call: Call) -> None:
    """In several slices, where head_dim is more than the narrowest."""
    triton_kernel.launch(triton_variant(call, head_slice=8), call)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_follows_the_contract(name):
    assert_follows_contract(run, CASES[name]().clone(DEVICE))


@pytest.mark.parametrize("seed", range(5 if DEVICE == "cuda" else 14))  # a GPU compiles each
def test_the_kernel_runs_random_calls(seed):
    assert_follows_contract(run, random_call(seed, device=DEVICE))


@pytest.mark.parametrize("share", [0.03, 0.2, 1])
@pytest.mark.parametrize("seed", range(2 if DEVICE == "cuda" else 6))
def test_the_kernel_is_safe_for_any_metadata(seed, share):
    call = random_call(seed, head_dim=16, device=DEVICE)
    assert_follows_contract(run_slices, call.scrambled(share, seed))


def test_a_program_looks_at_the_requests_in_blocks(monkeypatch):
    monkeypatch.setattr(triton_kernel, "BATCH_BLOCK", 4)
    assert_follows_contract(run, make([(b, b % 4) for b in range(10)], device=DEVICE))


@pytest.mark.parametrize("tile_rows", [1, 4, 64])
def test_windows_begin_and_end_in_any_tile(monkeypatch, tile_rows):
    monkeypatch.setattr(triton_kernel, "TILE_ROWS", tile_rows)
    assert_follows_contract(run_slices, make([(3, 6), (0, 5)], device=DEVICE))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What compile_prefill_triton.py prints."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_prefill_triton.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kind_of_kernel_compiles_loads_16_bytes_and_specializes_on_data_alone(compiled):
    assert len(compiled["wide_loads"]) == 5
    for name, loads in compiled["wide_loads"].items():
        assert loads >= 4, name
    assert compiled["specialized"] == ["kv_score", "ape", "paged_kv", "paged_score", "output"]
