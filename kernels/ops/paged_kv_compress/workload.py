"""How paged_kv_compress is benchmarked, tuned and tested: one step of decoding, made to order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvfold.codegen import FieldSet, Variant, choice, integer
from kvfold.codegen.gpu import SM_REGISTERS, shared_bytes
from kvfold.ops import state_oracle
from kvfold.ops.paged_kv_compress import reference, row_by_row
from kvfold.ops.paged_kv_compress.spec import SPEC, Arguments, Problem, Tuning, items_at_once
from kvfold.ops.state_workload import (
    METADATA,
    PREFETCH,
    RESERVED_BYTES,
    TOLERANCES,
    TRITON_TILE,
    CaseMaker,
    by_reference,
    runnable,
    window_rows,
)
from kvfold.runtime.arguments import DTYPES
from kvfold.workload import Case, Measurement, Search, Workload

SCENARIOS = {
    "all-hit": "every request closes a window",
    "spread": "one request in compress_ratio / next_n closes a window, as in steady decoding",
    "no-hit": "no request closes a window",
    "ragged": "requests of 1 to next_n new tokens, with histories of all phases",
}
ORACLE_BATCH = 16  # the largest batch that plain Python loops check in reasonable time


@dataclass(frozen=True, kw_only=True)
class Options(FieldSet):
    """A case beside its problem."""

    page_size: int = integer(range(1, 4097), default=32, help="tokens per page")
    layout: str = choice(
        "split",
        "packed",
        default="split",
        help="split: KV and score in two pools. packed: side by side in the rows of one pool",
    )
    output_dtype: str = choice("bf16", "fp32", default="bf16", help="of the output")
    max_pages: int = integer(
        range(2**20 + 1),
        default=0,
        help="columns of the block tables; as many as the requests need, if that is more",
    )


def lengths(scenario: str, batch: int, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
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


def must_move(start: np.ndarray, new: np.ndarray, problem: Problem, output_bytes: int) -> int:
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


def make(
    problem: Problem,
    batch: int,
    scenario: str,
    options: Options,
    device: torch.device | str,
    seed: int = 0,
) -> Case:
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
    arguments = Arguments(
        **maker.state(in_use, problem, options, columns=options.max_pages),
        kv_score=maker.random(int(new.sum()), 2 * state_dim, dtype=DTYPES[problem.kv_dtype]),
        ape=maker.random(ratio, state_dim, dtype=torch.float32),
        output=maker.output(int(reserved.sum()), problem, options),
        kv_lens=maker.int32(end),
        cu_seq_lens=maker.prefix_sums(new),
        cu_outputs=maker.prefix_sums(reserved),
        compress_ratio=ratio,
        next_n=problem.next_n,
        ape_in_state=problem.ape_in_state,
    )
    return Case(
        arguments=arguments,
        moved_bytes=must_move(start, new, problem, arguments.output.element_size()),
        rows=int((end // ratio - start // ratio).sum()),
    )


def expected(arguments: Arguments) -> Mapping[str, Tensor]:
    """What a call must leave: by the oracle or, for a large batch, by the reference."""
    if arguments.kv_lens.numel() <= ORACLE_BATCH:
        return state_oracle.expected(arguments, arguments.next_n)
    return by_reference(reference, arguments)


# ---- tuning --------------------------------------------------------------------------------------

REDUCE_WARPS = (1, 2, 4, 8, 16)
HEAD_SLICES = (16, 32, 64, 128, 256, 512)
REGISTER_BUDGETS = (128, 96, 80)  # registers per thread to try to make do with
SMALL_WINDOW = 16  # rows of a leaf: one thread can have all of them
REQUESTS_PER_CTA = (4, 8, 16)


def candidates(problem: Problem, backend: str, arch: str) -> Iterator[Tuning]:
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


def _for_large_batches(problem: Problem, tuning: Tuning, threads: int) -> Iterator[Tuning]:
    """The tuning with more requests per CTA and more bytes in flight per storing thread.

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


def _tile(problem: Problem, variant: Variant) -> float:
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


# ---- the workload --------------------------------------------------------------------------------

_STEADY = ("all-hit", "spread", "no-hit")
_ALL_HIT = ("all-hit",)
_RATIO_4 = {"sizes": (16, 64, 128, 256, 512), "scenarios": _ALL_HIT}

WORKLOAD = Workload(
    spec=SPEC,
    options=Options,
    scenarios=SCENARIOS,
    defaults={
        "head_dim": 512,
        "compress_ratio": 128,
        "kv_dtype": "bf16",
        "state_dtype": "fp32",
        "next_n": 4,
    },
    sizes=(1, 16, 32, 64, 128, 256, 512),
    check_size=16,
    make=make,
    expected=expected,
    tolerances=TOLERANCES,
    metadata=METADATA,
    prefetch=PREFETCH,
    yardsticks={"row_by_row": row_by_row.bind},
    search=Search(
        candidates=candidates,
        shared_field="next_n",
        # no-hit counts least: of the many requests of a large batch one nearly always closes one.
        mixture={"all-hit": 0.45, "spread": 0.45, "no-hit": 0.1},
        # An engine that cares for the time prefetches.
        prefetch={"none": 0.2, "metadata": 0.2, "state": 0.6},
        sizes=(1, 16, 32, 64, 128, 256, 512, 1024, 4096),
    ),
    suite=(
        Measurement(baseline=True, scenarios=_STEADY),
        Measurement(options={"page_size": 128}, scenarios=_ALL_HIT),
        Measurement(options={"layout": "packed"}, scenarios=_ALL_HIT),
        Measurement(
            problem={"state_dtype": "bf16"}, sizes=(16, 64, 128, 256, 512), scenarios=_STEADY
        ),
        Measurement(problem={"compress_ratio": 4, "next_n": 1}, **_RATIO_4),
        Measurement(problem={"compress_ratio": 4}, **_RATIO_4),
        Measurement(problem={"compress_ratio": 4, "next_n": 1, "head_dim": 128}, **_RATIO_4),
        Measurement(problem={"compress_ratio": 4, "head_dim": 128}, **_RATIO_4),
        Measurement(sizes=(16, 128, 256, 512), scenarios=_STEADY, override={"backend": "triton"}),
        Measurement(problem={"next_n": 1}, sizes=(16, 128, 512), scenarios=_ALL_HIT),
        Measurement(problem={"compress_ratio": 4}, sizes=(2048,), scenarios=_ALL_HIT),
        Measurement(sizes=(1024, 4096), scenarios=("spread",)),
        Measurement(
            problem={"compress_ratio": [128, 4]},
            options={"page_size": [1, 2, 4, 8]},
            sizes=(16, 256),
            scenarios=_ALL_HIT,
        ),
        Measurement(
            problem={"compress_ratio": [128, 4]},
            options={"max_pages": 262_144},
            sizes=(16, 256),
            scenarios=_ALL_HIT,
        ),
        Measurement(
            problem={"next_n": 8, "compress_ratio": [128, 4]}, sizes=(16, 256), scenarios=_ALL_HIT
        ),
        Measurement(
            problem={"ape_in_state": False, "compress_ratio": [128, 4]},
            sizes=(16, 256),
            scenarios=_ALL_HIT,
        ),
        # Beside prefill_compress, whose suite has the same requests.
        Measurement(problem={"compress_ratio": [128, 4]}, sizes=(256,), scenarios=("ragged",)),
    ),
)
