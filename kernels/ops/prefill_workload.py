"""What the workloads of the prefill ops share: prompts, whole and in chunks, and tuning."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvfold.codegen import FieldSet, Variant, choice, integer
from kvfold.codegen.gpu import SM_REGISTERS, SM_THREADS, shared_bytes
from kvfold.ops.prefill_spec import PrefillProblem, Tuning
from kvfold.ops.state_workload import (
    RESERVED_BYTES,
    TRITON_TILE,
    CaseMaker,
    runnable,
    window_rows,
)
from kvfold.runtime.arguments import DTYPES

SCENARIOS = {
    "whole": "prompts from an empty state",
    "chunk": "the same number of tokens, but every request has a history that ends within a window",
    "mixed": "a prompt beside 255 requests of one new token",
    "decode": "requests of 1 to 4 new tokens, with histories of all phases",
}


@dataclass(frozen=True, kw_only=True)
class StateOptions(FieldSet):
    """The state of a case."""

    requests: int = integer(
        range(1, 4097), default=1, help="requests that share the tokens; whole and chunk"
    )
    write_state: str = choice("all", "tail", default="tail", help="which new rows are stored")
    max_rollback: int = integer(range(65), default=0, help="tokens that a decode may reject")
    state_period: int = integer(range(1 << 20), default=0, help="tokens between restarts; 0: none")
    page_size: int = integer(range(1, 4097), default=32, help="tokens per page")
    layout: str = choice(
        "split",
        "packed",
        default="split",
        help="split: KV and score in two pools. packed: side by side in the rows of one pool",
    )


def lengths(
    scenario: str, tokens: int, problem: PrefillProblem, options: StateOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that each request has before the call and new in it: two int64 arrays of [batch]."""
    ratio = problem.compress_ratio
    if scenario == "mixed":
        few = min(255, tokens - 1)
        start = np.concatenate(([0], ratio + np.arange(few) % ratio))
        return start, np.concatenate(([tokens - few], np.ones(few, np.int64)))
    if scenario == "decode":
        new = np.resize([1, 2, 3, 4], tokens)
        new = new[: int(np.searchsorted(new.cumsum(), tokens)) + 1]
        new[-1] -= new.sum() - tokens
        return ratio + 3 * np.arange(len(new)) % ratio, new
    requests = min(options.requests, tokens)
    new = np.full(requests, tokens // requests)
    new[: tokens - new.sum()] += 1
    if scenario == "whole":
        return np.zeros(requests, np.int64), new
    return ratio + 1 + (2 + 7 * np.arange(requests)) % max(1, ratio - 1), new


def is_stored(
    start: int, length: int, position: int, problem: PrefillProblem, options: StateOptions
) -> bool:
    """Whether a new row is stored, by the words of the contract."""
    ratio, overlap = problem.compress_ratio, int(problem.overlap)
    if options.write_state == "all":
        return True
    if position >= ((length - options.max_rollback) // ratio - overlap) * ratio:
        return True
    period = options.state_period
    multiples = range(-(-start // period) * period, length + 1, period) if period else ()
    return any((m // ratio - overlap) * ratio <= position < m for m in multiples)


def stored_mask(start: int, new: int, problem: PrefillProblem, options: StateOptions) -> np.ndarray:
    """The same for all new rows of a request: bool [new]."""
    length, ratio, overlap = start + new, problem.compress_ratio, int(problem.overlap)
    position = np.arange(start, length)
    if options.write_state == "all":
        return np.ones(new, bool)
    mask = position >= ((length - options.max_rollback) // ratio - overlap) * ratio
    if options.state_period:
        restart = (position // options.state_period + 1) * options.state_period
        mask |= (restart <= length) & (position >= (restart // ratio - overlap) * ratio)
    return mask


def ape_bytes(start: np.ndarray, new: np.ndarray, problem: PrefillProblem) -> int:
    """Bytes of ape that a call reads: with the new rows or, for raw scores, as windows close."""
    ratio, part = problem.compress_ratio, problem.head_dim * 4
    if problem.ape_in_state:
        phases = {
            p % ratio for s, n in zip(start, new, strict=True) for p in range(s, s + min(n, ratio))
        }
        return len(phases) * part * (2 if problem.overlap else 1)
    first, end = start // ratio, (start + new) // ratio
    overlapping = problem.overlap and bool((end > np.maximum(first, 1)).any())
    return ratio * part * (int((end > first).any()) + int(overlapping))


@dataclass(frozen=True)
class Prompts:
    """A call of a prefill op.

    Attributes:
        arguments: tensors of the state and of the metadata, and scalars, by the names of the ops'
            arguments.
        maker: makes further tensors.
        closed: windows that close, which is also the number of reserved output rows.
        moved_bytes: that the call must move, if output rows have no bytes.
    """

    arguments: dict[str, Any]
    maker: CaseMaker
    closed: int
    moved_bytes: int


def make_prompts(
    problem: PrefillProblem,
    tokens: int,
    scenario: str,
    options: StateOptions,
    device: torch.device | str,
    seed: int,
) -> Prompts:
    """Makes one call.

    Data are random and physical pages are shuffled. A page is there if it holds a row that is read
    or stored; all other entries of the block tables are -1. Every request reserves as many output
    rows as its windows need.

    A call must move, each read or written once: its tokens' rows of kv_score, the rows that are
    stored, ape, and for each window that closes its old rows and its output row. Lengths and block
    tables are not counted.
    """
    ratio, overlap = problem.compress_ratio, int(problem.overlap)
    state_dim = problem.head_dim * (1 + overlap)
    state_dtype, kv_dtype = DTYPES[problem.state_dtype], DTYPES[problem.kv_dtype]
    start, new = lengths(scenario, tokens, problem, options)
    end = start + new
    closed = end // ratio - start // ratio

    maker = CaseMaker(device, seed)
    in_use = np.zeros((len(start), -(-int(end.max()) // options.page_size)), bool)
    stored_rows = old_rows = 0
    for b, (s, n) in enumerate(zip(start.tolist(), new.tolist(), strict=True)):
        stored = stored_mask(s, n, problem, options)
        stored_rows += int(stored.sum())
        in_use[b, np.unique((s + np.flatnonzero(stored)) // options.page_size)] = True
        first = max(0, (s // ratio - overlap) * ratio)  # the oldest row that is read
        if first < s:
            in_use[b, first // options.page_size : (s - 1) // options.page_size + 1] = True
        for window in range(s // ratio, min((s + n) // ratio, s // ratio + 1 + overlap)):
            first = max(0, (window - overlap) * ratio)
            old_rows += max(0, min(s, (window + 1) * ratio) - first)

    arguments = {
        **maker.state(in_use, problem, options),
        "kv_score": maker.random(tokens, 2 * state_dim, dtype=kv_dtype),
        "ape": maker.random(ratio, state_dim, dtype=torch.float32),
        "kv_lens": maker.int32(end),
        "cu_seq_lens": maker.prefix_sums(new),
        "cu_outputs": maker.prefix_sums(closed),
        "compress_ratio": ratio,
        "write_state": options.write_state,
        "max_rollback": options.max_rollback,
        "state_period": options.state_period,
        "ape_in_state": problem.ape_in_state,
    }
    moved = (
        tokens * 2 * state_dim * kv_dtype.itemsize
        + stored_rows * 2 * state_dim * state_dtype.itemsize
        + ape_bytes(start, new, problem)
        + old_rows * 2 * problem.head_dim * state_dtype.itemsize
    )
    return Prompts(arguments, maker, int(closed.sum()), moved)


# ---- tuning --------------------------------------------------------------------------------------

REDUCE_WARPS = (1, 2, 4, 8, 16)
HEAD_SLICES = (32, 64, 128, 256, 512)
STAGES = (2, 3, 4, 6, 8)
REGISTER_BUDGETS = (168, 128, 80)  # registers per thread to try to make do with
LEAST_BYTES = 24 << 10  # in flight to an SM; bandwidth times latency, over the SMs, is more
MOST_BYTES = 200 << 10  # more do not make it faster


def candidates(problem: PrefillProblem, backend: str, arch: str) -> Iterator[Tuning]:
    """Tuning worth a trial."""
    rows = window_rows(problem)
    for reduce_warps, head_slice in itertools.product(REDUCE_WARPS, HEAD_SLICES):
        plain = Tuning(reduce_warps=reduce_warps, head_slice=head_slice)
        if backend == "triton":
            if runnable(problem, "triton", plain, arch) and (
                rows * head_slice <= 32 * reduce_warps * TRITON_TILE
            ):
                yield plain
            continue
        # A warp has 8 rows of a window or more, and not so many that its registers spill.
        if not rows // 64 <= reduce_warps <= max(1, rows // 8):
            continue
        for stages in STAGES:
            tuning = replace(plain, stages=stages)
            variant = runnable(problem, "cuda", tuning, arch)
            if variant is None:
                continue
            for min_ctas in _min_ctas(variant, arch):
                if LEAST_BYTES <= min_ctas * _bytes_ahead(problem, tuning) <= MOST_BYTES:
                    yield replace(tuning, min_ctas=min_ctas)


def _min_ctas(variant: Variant, arch: str) -> list[int]:
    """Values of min_ctas to try: by budgets of registers, as far as shared memory allows."""
    needed = variant.launch.shared_bytes + RESERVED_BYTES
    most = (shared_bytes(arch) + RESERVED_BYTES) // needed  # an SM has one KiB more than a CTA
    threads = variant.launch.threads
    most = min(most, SM_THREADS // threads, 32)
    return sorted({max(1, min(most, SM_REGISTERS // (threads * b))) for b in REGISTER_BUDGETS})


def _bytes_ahead(problem: PrefillProblem, tuning: Tuning) -> int:
    """Bytes of kv_score that a CTA has in flight while it reduces a window."""
    parts = 2 if problem.overlap else 1
    windows = tuning.stages - parts  # an overlapping window also keeps the one before it
    row_bytes = parts * 2 * tuning.head_slice * DTYPES[problem.kv_dtype].itemsize
    return windows * problem.compress_ratio * row_bytes
