"""Prompts whole, in chunks and token by token, and what decode makes of the state they leave."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_same_bits
from prefill_backends import BACKENDS, Backend, every_backend
from prefill_calls import MUTATED, Run, make
from prefill_contract import assert_follows_contract
from torch import Tensor

# Lengths of requests that close windows at several phases, and none: ratio -> lengths.
LENGTHS = {4: [23, 0, 9, 1, 16, 3], 128: [300, 127, 256]}
FEW_LENGTHS = {4: [9, 0, 4, 1], 128: [130]}  # for the interpreter
PROBLEMS = [
    {
        "compress_ratio": ratio,
        "kv_dtype": kv_dtype,
        "state_dtype": state_dtype,
        "ape_in_state": ape_in_state,
    }
    for ratio in (4, 128)
    for kv_dtype, state_dtype in (("bf16", "fp32"), ("fp32", "bf16"))  # the latter rounds
    for ape_in_state in (True, False)
]


def problems(backend: Backend) -> list[dict]:
    """Every problem; for the interpreter, some in which every field has both values."""
    return [PROBLEMS[i] for i in (0, 3, 5, 6)] if backend.is_interpreted else PROBLEMS


def lengths_for(backend: Backend, fields: dict) -> list[int]:
    lengths = FEW_LENGTHS if backend.is_interpreted else LENGTHS
    return lengths[fields["compress_ratio"]]


def random_chunks(run: Run, rng: np.random.Generator, most: int) -> np.ndarray:
    """How many tokens each request gets next; some get none."""
    return np.minimum(run.left, rng.integers(0, most + 1, run.left.shape))


def skip_the_beginning(backend: Backend, run: Run) -> None:
    """Leaves the interpreter few tokens to take one by one."""
    if backend.is_interpreted:
        run.prefill(backend.prefill, np.minimum(run.left, run.whole.compress_ratio - 2))


def assert_same_state(run: Run, other: Run) -> None:
    for name in ("paged_kv", "paged_score"):
        assert_same_bits(getattr(run.whole, name), getattr(other.whole, name), name)


def assert_same_output(output: Tensor, expected: Tensor, same_bits: bool = True) -> None:
    assert expected.numel() and not expected.isnan().any()
    if same_bits:
        assert_same_bits(output, expected)
    else:
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


# ---- The same bits however tokens are fed --------------------------------------------------------


@every_backend(fields=problems)
def test_random_chunks_give_the_bits_of_the_whole(backend, fields):
    lengths = lengths_for(backend, fields)
    whole = backend.whole_run(lengths, **fields)
    sizes = (5,) if backend.is_interpreted else (7, 3 * fields["compress_ratio"])
    for seed, most in enumerate(sizes):
        rng = np.random.default_rng(seed)
        run = backend.run(lengths, **fields)
        skip_the_beginning(backend, run)
        while run.left.any():
            run.prefill(backend.prefill, random_chunks(run, rng, most))
        assert_same_state(run, whole)
        assert_same_output(run.whole.output, whole.whole.output)


@every_backend(fields=problems)
def test_prefill_token_by_token_gives_the_bits_of_the_whole(backend, fields):
    lengths = lengths_for(backend, fields)
    whole = backend.whole_run(lengths, **fields)
    run = backend.run(lengths, **fields)
    skip_the_beginning(backend, run)
    run.prefill_all(backend.prefill, most=1)
    assert_same_state(run, whole)
    assert_same_output(run.whole.output, whole.whole.output)


@every_backend(fields=problems, most=lambda backend: (3,) if backend.is_interpreted else (1, 3))
def test_decode_gives_what_prefill_gives(backend, fields, most):
    lengths = lengths_for(backend, fields)
    whole = backend.whole_run(lengths, **fields)
    run = backend.run(lengths, **fields)
    skip_the_beginning(backend, run)
    run.decode_all(backend.decode, most)
    assert_same_state(run, whole)
    assert_same_output(run.whole.output, whole.whole.output, backend.same_bits)


@every_backend()
def test_bits_do_not_depend_on_neighbours_pages_or_page_size(backend):
    lengths = [13, 5, 20]
    together = backend.whole_run(lengths, page_size=5).whole
    tokens, rows = together.cu_seq_lens.tolist(), together.cu_outputs.tolist()
    for b, length in enumerate(lengths):
        alone = backend.run([length], page_size=7, seed=b)
        alone.whole.kv_score.copy_(together.kv_score[tokens[b] : tokens[b + 1]])
        alone.whole.ape.copy_(together.ape)
        alone.prefill(backend.prefill, alone.left)
        assert_same_output(alone.whole.output, together.output[rows[b] : rows[b + 1]])


@every_backend(write_state=lambda backend: ("all", "tail"))
def test_reduce_then_store_is_all(backend, write_state):
    call = make(
        [(6, 11), (0, 8), (3, 2)],
        head_dim=backend.head_dim,
        write_state=write_state,
        state_period=6,
        page_size=3,
        device=backend.device,
    )
    call.block_table_kv[0, 3:5] = -1
    at_once, in_steps = call.clone(), call.clone()
    backend.prefill(at_once)
    for work in ("reduce", "store"):
        backend.prefill(replace(in_steps, work=work))
    for name in MUTATED:
        assert_same_bits(getattr(in_steps, name), getattr(at_once, name), name)


# ---- The tail is what decode needs ---------------------------------------------------------------
# The state is full of NaN before, so that a row which decode misses makes its window NaN.


def prompts_for(backend: Backend, ratio: int) -> list[int]:
    """Lengths of prompts that end at every phase of a window, or at some."""
    if backend.is_interpreted:
        return {4: [9, 11], 128: [130]}[ratio]
    return {4: list(range(6, 22)), 128: [131, 255, 256, 257, 300]}[ratio]


@every_backend(
    ratio=lambda backend: (4, 128),
    max_rollback=lambda backend: (0, 5) if backend.is_interpreted else (0, 1, 5),
    ape_in_state=lambda backend: (True,) if backend.is_interpreted else (True, False),
)
def test_decode_continues_after_any_rejection(backend, ratio, max_rollback, ape_in_state):
    prompts = np.array(prompts_for(backend, ratio))
    lengths = prompts + (3 if ratio == 4 else 128 - prompts % 128)
    if backend.is_interpreted:
        lengths = prompts + 3
    fields = {"compress_ratio": ratio, "ape_in_state": ape_in_state, "page_size": 3}
    whole = backend.whole_run(lengths, **fields)
    for rejected in {0, max_rollback} if backend.is_interpreted else range(max_rollback + 1):
        run = backend.run(lengths, **fields)
        run.prefill(
            backend.prefill, prompts, rejected, write_state="tail", max_rollback=max_rollback
        )
        run.decode_all(backend.decode, most=2)
        assert_same_output(run.whole.output, whole.whole.output, backend.same_bits)


@every_backend(
    ratio_and_period=lambda backend: (
        [(4, 6), (128, 100)]
        if backend.is_interpreted
        else [(4, 4), (4, 6), (4, 1), (4, 16), (128, 32), (128, 100), (128, 128), (128, 300)]
    )
)
def test_a_restart_at_any_multiple_of_the_period_continues(backend, ratio_and_period):
    """After a whole prompt, and after one in chunks, each of which has some of the multiples."""
    ratio, period = ratio_and_period
    prompt = ratio + 5 if backend.is_interpreted else 4 * ratio + 13
    lengths = [prompt + ratio + 1, prompt]
    fields = {"compress_ratio": ratio, "page_size": 8}
    whole = backend.whole_run(lengths, **fields)
    for most in (prompt, prompt // 2 + 1):
        run = backend.run(lengths, **fields)
        while run.length[0] < prompt:
            new = np.minimum(prompt - run.length, most)
            run.prefill(backend.prefill, new, write_state="tail", state_period=period)
        for restart in range(period, prompt + 1, period):
            end = restart + ratio + 1 - restart % ratio
            again = run.copy_at([restart, prompt])
            again.prefill(backend.prefill, [end - restart - 1, 0])
            again.decode(backend.decode, [1, 0])
            rows = slice(restart // ratio, end // ratio)
            expected = whole.whole.output[rows]
            assert_same_output(again.whole.output[rows], expected, backend.same_bits)


# ---- Any lengths, pages and chunks ---------------------------------------------------------------


@st.composite
def runs(draw, most: int):
    """The fields of a run, and the most tokens of its chunks."""
    fields = {
        "lengths": draw(st.lists(st.integers(0, most), min_size=1, max_size=4)),
        "compress_ratio": draw(st.sampled_from([1, 2, 4, 5, 8, 16])),
        "head_dim": 8,
        "kv_dtype": draw(st.sampled_from(["bf16", "fp32"])),
        "state_dtype": draw(st.sampled_from(["bf16", "fp32"])),
        "page_size": draw(st.integers(1, 40)),
        "ape_in_state": draw(st.booleans()),
        "missing_pages": draw(st.sampled_from([0.0, 0.3])),
        "seed": draw(st.integers(0, 1000)),
    }
    return fields, draw(st.integers(1, most))


def check_chunks(backend: Backend, fields: dict, most: int) -> None:
    """A whole run against the oracle, and a run in chunks against the whole."""
    run, whole = backend.run(**fields), backend.run(**fields)
    assert_follows_contract(backend.prefill, whole.next_call(whole.left))
    whole.prefill(backend.prefill, whole.left)
    rng = np.random.default_rng(fields["seed"])
    while run.left.any():
        run.prefill(backend.prefill, random_chunks(run, rng, most))
    assert_same_state(run, whole)
    assert_same_bits(run.whole.output, whole.whole.output)


@given(runs(most=60))
@settings(max_examples=30, deadline=None)
def test_any_chunks_of_the_reference_give_the_bits_of_the_whole(drawn):
    check_chunks(BACKENDS["reference"], *drawn)


@pytest.mark.skipif(not BACKENDS["triton"].is_interpreted, reason="a GPU compiles every example")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(runs(most=12))
@settings(max_examples=4, deadline=None)
def test_any_chunks_of_triton_give_the_bits_of_the_whole(drawn):
    check_chunks(BACKENDS["triton"], *drawn)


# ---- Requests of all sizes -----------------------------------------------------------------------


@every_backend(ratio=lambda backend: (4, 128))
def test_a_long_request_beside_short_ones(backend, ratio):
    long = ratio + 40 if backend.is_interpreted else 3000
    spans = [(ratio - 1, 1), (0, 0), (3 * ratio + 2, long), (2, 1), (0, 7)]
    call = make(
        spans,
        compress_ratio=ratio,
        head_dim=backend.head_dim,
        page_size=16,
        write_state="tail",
        max_rollback=2,
        device=backend.device,
    )
    for write_state in ("tail",) if backend.is_interpreted else ("tail", "all"):
        assert_follows_contract(backend.prefill, replace(call, write_state=write_state))


@every_backend(ratio=lambda backend: (4, 128))
def test_many_requests_of_few_tokens(backend, ratio):
    count = 12 if backend.is_interpreted else 200
    spans = [(7 * b % (3 * ratio), 1 + b % 8) for b in range(count)]
    call = make(
        spans,
        compress_ratio=ratio,
        head_dim=backend.head_dim,
        page_size=16,
        device=backend.device,
    )
    assert_follows_contract(backend.prefill, call)


@every_backend()
def test_a_window_of_rows_from_many_calls(backend):
    """Every call brings some of a window's rows, the last one more than the window needs."""
    chunks = [9, 5, 3, 27]
    fields = {"compress_ratio": 16, "page_size": 4}
    whole = backend.whole_run([sum(chunks)], **fields)
    run = backend.run([sum(chunks)], **fields)
    for new in chunks:
        run.prefill(backend.prefill, [new])
    assert_same_output(run.whole.output, whole.whole.output)
