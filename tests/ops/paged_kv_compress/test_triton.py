"""The Triton kernel against the oracle: compiled where there is a GPU, else interpreted."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import CASES
from numerics import assert_does_its_job, assert_same_bits
from problems import Problem, make, random_problem, scramble

from kvfold.codegen import Variant
from kvfold.ops.paged_kv_compress import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def variant(problem: Problem, **tuning) -> Variant:
    """A Triton variant for problem, of two slices where head_dim can be halved."""
    head_dim = problem.output.size(1)
    widest = head_dim & -head_dim
    head_slice = max(8, widest // 2 if widest == head_dim else widest)
    tuning = {"reduce_warps": 4, "head_slice": head_slice} | tuning
    return Variant(op="paged_kv_compress", backend="triton", **problem.key, **tuning)


def run(*args) -> None:
    triton_kernel.launch(variant(Problem(*args)), *args)


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    assert_does_its_job(run, CASES[name]().clone(DEVICE))


@pytest.mark.parametrize(
    ("compress_ratio", "overlap", "kv_dtype", "state_dtype", "next_n"),
    list(itertools.product((4, 8), (False, True), *[("bf16", "fp32")] * 2, (1, 2, 3, 4))),
)
def test_problem_fields(compress_ratio, overlap, kv_dtype, state_dtype, next_n):
    problem = make(
        [(compress_ratio - 1, 1), (2 * compress_ratio - next_n, next_n)],
        compress_ratio=compress_ratio,
        overlap=overlap,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        next_n=next_n,
        device=DEVICE,
    )
    assert_does_its_job(run, problem)


@pytest.mark.parametrize("seed", range(5 if DEVICE == "cuda" else 20))  # a GPU compiles each
def test_random_problem(seed):
    assert_does_its_job(run, random_problem(seed, device=DEVICE))


@pytest.mark.parametrize("share", [0.03, 0.2, 1])
@pytest.mark.parametrize("seed", range(2 if DEVICE == "cuda" else 8))
def test_scrambled_metadata(seed, share):
    assert_does_its_job(run, scramble(random_problem(seed, reserve=8, device=DEVICE), share, seed))


@pytest.mark.parametrize("tuning", [(1, 8), (2, 64), (8, 16), (4, 32)], ids=str)
def test_tuning(tuning):
    def tuned(*args):
        fields = dict(zip(("reduce_warps", "head_slice"), tuning, strict=True))
        triton_kernel.launch(variant(Problem(*args), **fields), *args)

    assert_does_its_job(tuned, make([(14, 3)], head_dim=64, compress_ratio=8, device=DEVICE))


def compress(problem: Problem) -> torch.Tensor:
    result = problem.clone()
    run(*result.args())
    return result.output.cpu()


def test_same_bits_whatever_the_neighbours_and_the_pages():
    spans = [(7, 1), (5, 3), (6, 4)]
    problem = make(spans, output_dtype="fp32", device=DEVICE)
    together = compress(problem)
    assert_same_bits(compress(problem), together)
    for b in range(len(spans)):
        assert_same_bits(compress(problem.alone(b))[b], together[b])
    pages = torch.randperm(problem.paged_kv.size(0), generator=torch.Generator().manual_seed(0))
    pages = pages.to(DEVICE)
    moved = replace(
        problem,
        paged_kv=problem.paged_kv[pages.argsort()],
        block_table_kv=pages[problem.block_table_kv].int(),
    )
    assert_same_bits(compress(moved), together)


def test_new_tokens_and_the_state_give_the_same_but_for_the_order_of_sums():
    problem = make([(4, 4)], output_dtype="fp32", device=DEVICE)
    at_once = compress(problem)
    run(*problem.args())  # leaves the four rows in the state
    last = replace(
        problem,
        kv_score=problem.kv_score[3:],
        cu_seq_lens=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
    )
    torch.testing.assert_close(compress(last), at_once, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What compile_triton.py prints."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compiles_to_16_byte_loads_with_next_to_no_spills(compiled):
    assert len(compiled["compiled"]) == 4
    for symbol, kernel in compiled["compiled"].items():
        # Four registers of a hundred: with them in the stack, five programs fit where four did.
        assert kernel["stack_bytes"] <= 16, symbol
        assert kernel["wide_loads"] >= 8, symbol


def test_only_the_data_pointers_make_a_kernel_of_their_own(compiled):
    assert compiled["specialized"] == ["kv_score", "ape", "paged_kv", "paged_score", "output"]
