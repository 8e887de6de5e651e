"""The Triton kernel against the oracle: compiled where there is a GPU, else interpreted."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from locate_calls import (
    CASES,
    assert_follows_contract,
    assert_safe,
    make,
    random_call,
    run_variant,
    variant_of,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

run = partial(run_variant, variant_of("triton"))


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_follows_the_contract(name):
    assert_follows_contract(run, CASES[name]().clone(DEVICE))


@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_runs_random_calls(seed):
    assert_follows_contract(run, random_call(seed, DEVICE))


@pytest.mark.parametrize("share", [0.05, 0.3, 1])
@pytest.mark.parametrize("seed", range(20))
def test_the_kernel_is_safe_for_any_metadata(seed, share):
    call = random_call(seed, DEVICE)
    assert_follows_contract(run, call.with_nonsense(share, seed))
    assert_safe(run, call.with_nonsense(share, seed, monotone=False))


@pytest.mark.parametrize("warps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("rows", [31, 32, 33, 513])
def test_the_rows_are_shared_by_programs(rows, warps):
    call = make([(3, 9)] * 5, reserve=6, first_row=1, spare_rows=rows - 31, device=DEVICE)
    assert call.positions.numel() == rows
    assert_follows_contract(partial(run_variant, variant_of("triton", warps)), call)


@pytest.mark.parametrize("batch", [*range(1, 10), 63, 64])
def test_the_search_ends_for_any_number_of_requests(batch):
    call = make([(b % 4, b % 7) for b in range(batch)], reserve=1, spare_rows=1, device=DEVICE)
    assert_follows_contract(run, call)


def test_the_kernel_compiles_and_specializes_on_nothing(tmp_path):
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_locate_triton.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["specialized"] == []
    assert printed["stores"] == {"block_table": 2, "token_slots": 2}
