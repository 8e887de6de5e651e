"""What the workloads of the decode ops share: a step of decoding, made to order, and tuning."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvfold.codegen import FieldSet, Variant, choice, integer
from kvfold.codegen.gpu import SM_REGISTERS, shared_bytes
from kvfold.ops.decode_spec import DecodeProblem, Tuning, items_at_once
from kvfold.ops.state_workload import (
    RESERVED_BYTES,
    TRITON_TILE,
    CaseMaker,
    runnable,
    window_rows,
)
from kvfold.runtime.arguments import DTYPES

SCENARIOS = {
    "all-hit": "every request closes a window",
    "spread": "one request in compress_ratio / next_n closes a window, as in steady decoding",
    "no-hit": "no request closes a window",
    "ragged": "requests of 1 to next_n new tokens, with histories of all phases",
}


@dataclass(frozen=True, kw_only=True)
class StateOptions(FieldSet):
    """The state of a case."""

    page_size: int = integer(range(1, 4097), default=32, help="tokens per page")
    layout: str = choice(
        "split",
        "packed",
        default="split",
        help="split: KV and score in two pools. packed: side by side in the rows of one pool",
    )
    max_pages: int = integer(
        range(2**20 + 1),
        default=0,
        help="columns of the block tables; as many as the requests need, if that is more",
    )


def lengths(scenario: str, batch: int, problem: DecodeProblem) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that each request has before the step and new in it: two int64 arrays of [batch].

    all-hit: every request's window closes, on the last of its next_n new tokens.
    spread: request i ends at phase next_n*i mod compress_ratio. Request 0 closes a window and, of
        many, next_n in compress_ratio do.
    no-hit: no window closes; where next_n tokens always close one, requests have fewer.
    ragged: request i has 1 + i mod next_n new tokens, as in prefill_compress's scenario decode.
    """
    ratio, next_n = problem.compress_ratio, problem.next_n
    request = np.arange(batch)
    if scenario == "ragged":
        return ratio + 3 * request % ratio, 1 + request % next_n
    new = next_n if scenario != "no-hit" else min(next_n, ratio - 1)
    # A few windows in, so that there is history; more where a step is longer than a window.
    window_end = (-(-next_n // ratio) + request % 3 + 1) * ratio
    end = {
        "all-hit": window_end,
        "spread": window_end + new * request % ratio,
        "no-hit": window_end + new + new * request % max(1, ratio - new),
    }[scenario]
    return end - new, np.full(batch, new)


def must_move(start: np.ndarray, new: np.ndarray, problem: DecodeProblem, output_bytes: int) -> int:
    """Bytes that a step must move, each read or written once.

    new tokens x 2 state_dim x (kv_score read + state stored)
    + distinct positions mod compress_ratio among the new tokens x state_dim x 4 (ape; if the state
      holds raw scores: all of ape if a window closes)
    + for each window that closes: its rows older than this step x 2 head_dim x state
      (new rows come from kv_score) + head_dim x output_bytes.

    Lengths and block tables are not counted.
    """
    ratio, head_dim, overlap = problem.compress_ratio, problem.head_dim, problem.overlap
    state_dim = head_dim * (2 if overlap else 1)
    kv_bytes, state_bytes = DTYPES[problem.kv_dtype].itemsize, DTYPES[problem.state_dtype].itemsize
    end = start + new
    if problem.ape_in_state:
        phases = len({p % ratio for s, e in zip(start, end, strict=True) for p in range(s, e)})
    else:
        phases = ratio if (end // ratio > start // ratio).any() else 0
    total = int(new.sum()) * 2 * state_dim * (kv_bytes + state_bytes) + phases * state_dim * 4
    for s, e in zip(start, end, strict=True):
        for window in range(s // ratio, e // ratio):
            first = max(0, (window - int(overlap)) * ratio)
            old_rows = max(0, min(s, (window + 1) * ratio) - first)
            total += int(old_rows) * 2 * head_dim * state_bytes + head_dim * output_bytes
    return total


@dataclass(frozen=True)
class Step:
    """A decode step.

    Attributes:
        arguments: tensors of the state and of the metadata, and scalars, by the names of the ops'
            arguments.
        maker: makes further tensors.
        reserved: output rows of each request, int64 [batch].
        closing: windows that each request closes, int64 [batch].
        moved_bytes: that the step must move, if output rows have no bytes.
    """

    arguments: dict[str, Any]
    maker: CaseMaker
    reserved: np.ndarray
    closing: np.ndarray
    moved_bytes: int


def make_step(
    problem: DecodeProblem,
    batch: int,
    scenario: str,
    options: StateOptions,
    device: torch.device | str,
    seed: int,
) -> Step:
    """Makes one step.

    Data are random, physical pages are shuffled, unused entries of the block tables are -1. Every
    request reserves as many output rows as its new tokens could close.
    """
    ratio = problem.compress_ratio
    state_dim = problem.head_dim * (2 if problem.overlap else 1)
    start, new = lengths(scenario, batch, problem)
    end = start + new
    reserved = -(-new // ratio)

    maker = CaseMaker(device, seed)
    pages = -(-end // options.page_size)
    in_use = np.arange(pages.max(initial=1)) < pages[:, None]
    arguments = {
        **maker.state(in_use, problem, options, columns=options.max_pages),
        "kv_score": maker.random(int(new.sum()), 2 * state_dim, dtype=DTYPES[problem.kv_dtype]),
        "ape": maker.random(ratio, state_dim, dtype=torch.float32),
        "kv_lens": maker.int32(end),
        "cu_seq_lens": maker.prefix_sums(new),
        "cu_outputs": maker.prefix_sums(reserved),
        "compress_ratio": ratio,
        "next_n": problem.next_n,
        "ape_in_state": problem.ape_in_state,
    }
    return Step(
        arguments=arguments,
        maker=maker,
        reserved=reserved,
        closing=end // ratio - start // ratio,
        moved_bytes=must_move(start, new, problem, output_bytes=0),
    )


# ---- tuning --------------------------------------------------------------------------------------

REDUCE_WARPS = (1, 2, 4, 8, 16)
HEAD_SLICES = (16, 32, 64, 128, 256, 512)
REGISTER_BUDGETS = (128, 96, 80)  # registers per thread to try to make do with
SMALL_WINDOW = 16  # rows of a leaf: one thread can have all of them
REQUESTS_PER_CTA = (4, 8, 16)


def candidates(problem: DecodeProblem, backend: str, arch: str) -> Iterator[Tuning]:
    """Tuning worth a trial."""
    small = backend == "cuda" and window_rows(problem) <= SMALL_WINDOW
    for reduce_warps, head_slice in itertools.product(REDUCE_WARPS, HEAD_SLICES):
        if small and (reduce_warps > 4 or head_slice < 32):
            continue
        plain = Tuning(reduce_warps=reduce_warps, head_slice=head_slice)
        for tuning in (plain, replace(plain, fused=True)):
            variant = runnable(problem, backend, tuning, arch)
            if variant is None or (tuning.fused and not small):
                continue
            if backend == "triton" and _tile(problem, variant) > TRITON_TILE:
                continue
            for min_ctas in [1] if small and reduce_warps > 1 else _min_ctas(variant, arch):
                one = replace(tuning, min_ctas=min_ctas)
                yield one
                if backend == "cuda" and not tuning.fused:
                    yield from _for_large_batches(problem, one, variant.launch.threads)


def _for_large_batches(problem: DecodeProblem, tuning: Tuning, threads: int) -> Iterator[Tuning]:
    """The tuning with dealt requests, more of them per CTA, or more bytes in flight per thread.

    Only of shapes that suit a large batch.
    """
    shape = tuning.reduce_warps, tuning.head_slice
    if window_rows(problem) <= SMALL_WINDOW:
        suitable = shape in ((1, 128), (1, 256), (1, 512))
    else:
        suitable = shape in ((4, 64), (4, 128), (8, 64))
    if not suitable:
        return
    for requests, store_bytes in itertools.product((1, *REQUESTS_PER_CTA), (128, 256)):
        other = replace(tuning, requests_per_cta=requests, store_bytes=store_bytes)
        more = items_at_once(problem, other, threads) > items_at_once(problem, tuning, threads)
        if more if store_bytes > 128 else requests > 1:
            yield other
    if window_rows(problem) > SMALL_WINDOW:
        yield replace(tuning, deal=True)


def _tile(problem: DecodeProblem, variant: Variant) -> float:
    """Values of state per thread."""
    return window_rows(problem) * variant.tuning.head_slice / variant.launch.threads


def _min_ctas(variant: Variant, arch: str) -> list[int]:
    """Values of min_ctas to try: by budgets of registers, as far as shared memory allows."""
    needed = variant.launch.shared_bytes + RESERVED_BYTES
    most = (shared_bytes(arch) + RESERVED_BYTES) // needed  # an SM has one KiB more than a CTA
    fitting = {
        min(most, SM_REGISTERS // (variant.launch.threads * budget)) for budget in REGISTER_BUDGETS
    }
    return [1, *sorted(ctas for ctas in fitting if ctas >= 2)]
