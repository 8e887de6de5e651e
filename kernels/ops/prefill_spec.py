"""What the declarations of the prefill ops share: problem fields, tuning, launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvfold import codegen
from kvfold.codegen import Launch, integer, scalar
from kvfold.codegen.fields import POSITIVE
from kvfold.codegen.gpu import MAX_THREADS
from kvfold.codegen.variant import check_min_ctas, refuse
from kvfold.device.window_shape import ITEM_BYTES, QUAD_ROWS, WindowShape, slices, vector
from kvfold.ops.state_spec import (
    PARAMS,
    WARPS,
    StateProblem,
    ape_in_state_field,
    state_fields,
    window_shape,
)

MAX_ROWS = 32  # of a window that a thread takes; a bit of a word stands for each
ANY_NUMBER = 2**31 - 1  # of new tokens per request

# The members of the CUDA parameter struct that every prefill op has.
PREFILL_PARAMS = (*PARAMS, "write_state", "max_rollback", "state_period", "range_rows", "ranges")


@dataclass(frozen=True, kw_only=True)
class PrefillProblem(StateProblem):
    """The problem fields of a prefill op."""

    ape_in_state: bool = ape_in_state_field()


@dataclass(frozen=True, kw_only=True)
class Tuning(codegen.Tuning):
    """How a kernel of a prefill op solves it."""

    reduce_warps: int = integer(WARPS, symbol="w{}", help="warps that share the rows of one window")
    head_slice: int = integer(
        POSITIVE,
        symbol="s{}",
        help="columns per CTA. It divides head_dim. cuda: with c = head_slice / (columns in 16"
        " bytes of state), c is 1, 2, 4, 8, 16 or a multiple of 32; for an overlapping window, a"
        " multiple of 32. triton: a power of two",
    )
    stages: int = integer(
        range(2, 9),
        symbol="p{}",
        default=3,
        help="cuda: windows that a CTA has in shared memory: the one that is reduced, with an"
        " overlap the one before it, and those in flight",
    )
    min_ctas: int = integer(
        range(1, 33),
        symbol="c{}",
        default=1,
        help="cuda: CTAs per SM that share all rows of a call; the registers of an SM must suffice"
        " for them, and its shared memory should",
    )


@dataclass(frozen=True)
class WriteStateKeywords(codegen.Arguments):
    """Which new rows are stored."""

    write_state: str = scalar(
        str,
        default="all",
        choices=("all", "tail"),
        keyword=True,
        help="which new rows go to the state: all, or those that a decode or a restart may need",
    )
    max_rollback: int = scalar(
        int, default=0, keyword=True, help="tail: the most tokens that a decode may reject"
    )
    state_period: int = scalar(
        int,
        default=0,
        keyword=True,
        help="tail: a request may restart at every multiple of this many tokens; 0: nowhere",
    )


def prefill_fields(
    dimensions: Mapping[str, int], arguments: Any, dtypes: Mapping[str, str]
) -> dict[str, Any]:
    """The problem fields of a call of a prefill op.

    Raises:
        ValueError: an argument that is not accepted.
    """
    for name in ("max_rollback", "state_period"):
        if not 0 <= getattr(arguments, name) <= ANY_NUMBER:
            raise ValueError(f"{name} is {getattr(arguments, name)}; accepted: 0 to {ANY_NUMBER}")
    return state_fields(dimensions, arguments, dtypes)


def launch(problem: PrefillProblem, backend: str, tuning: Tuning) -> Launch:
    """What a variant needs. Raises TableError if it cannot run."""
    legal_slices = slices(problem.head_dim, problem.state_dtype)
    if backend == "triton":  # a tile is a power of two wide
        legal_slices = [width for width in legal_slices if width & (width - 1) == 0]
    if tuning.head_slice not in legal_slices:
        what = f"is not the width of a {backend} CTA over {problem.state_dtype} state"
        raise refuse(tuning, "head_slice", what, legal_slices)
    if backend == "triton":
        return Launch(threads=32 * tuning.reduce_warps, min_ctas=tuning.min_ctas)
    shape = window_shape(problem, tuning)
    if shape.threads > MAX_THREADS:
        most = MAX_THREADS * tuning.reduce_warps // shape.threads
        what = f"makes a CTA of {shape.threads} threads, more than {MAX_THREADS}"
        raise refuse(tuning, "reduce_warps", what, [warps for warps in WARPS if warps <= most])
    if problem.overlap and tuning.reduce_warps > 1:
        what = "splits an overlapping window; a thread must have all rows of its columns"
        raise refuse(tuning, "reduce_warps", what, (1,))
    if problem.overlap and shape.threads != shape.lanes:
        what = "is too narrow for an overlapping window; every thread of a warp must have columns"
        wide = [width for width in legal_slices if width // vector(problem.state_dtype) >= 32]
        raise refuse(tuning, "head_slice", what, wide)
    if problem.overlap and shape.quads > 4:
        raise codegen.TableError(
            "is too long for an overlapping window", field="compress_ratio",
            value=problem.compress_ratio, legal="8 or less",
        )  # fmt: skip
    if shape.group_quads * QUAD_ROWS > MAX_ROWS:
        few = shape.group_quads * QUAD_ROWS * tuning.reduce_warps // MAX_ROWS
        what = f"gives a thread {shape.group_quads * QUAD_ROWS} rows, more than {MAX_ROWS}"
        raise refuse(tuning, "reduce_warps", what, [warps for warps in WARPS if warps >= few])
    check_min_ctas(tuning, shape.threads)
    return Launch(
        threads=shape.threads,
        shared_bytes=shared_bytes(problem, tuning, shape),
        shared_field="stages",
        min_ctas=tuning.min_ctas,
        constants={"next_n": ANY_NUMBER, "fused": False, "has_write_state": True},
    )


def shared_bytes(problem: PrefillProblem, tuning: Tuning, shape: WindowShape) -> int:
    """Shared memory of a CTA; kernel.cuh has the same sum."""
    parts = 2 if problem.overlap else 1
    rows = problem.compress_ratio if problem.overlap else shape.group_quads * QUAD_ROWS
    rows = min(rows, problem.compress_ratio)
    row_bytes = parts * 2 * vector(problem.state_dtype) * ITEM_BYTES[problem.kv_dtype]
    page_bytes = shape.threads // min(shape.lanes, 32) * 2 * 4
    window_bytes = shape.threads // 32 * 32
    ring = tuning.stages * (shape.threads * rows * row_bytes + page_bytes + window_bytes)
    partials = 2 * 3 * 4 * tuning.reduce_warps * (tuning.head_slice + 4)
    partials = partials if tuning.reduce_warps > 1 else 0
    warps = shape.threads // 32
    requests = 4 if shape.threads < 256 else 2  # per thread: requests_per_thread of new_windows.cuh
    rest = shape.threads * (requests * (16 + 4) + 4) + warps * 4
    request_bits = 2 * 2 * requests * warps * 4
    work = max(ring + partials + 8, shape.shared_bytes)
    return -(-work // 16) * 16 + -(-rest // 16) * 16 + -(-request_bits // 16) * 16


def propose(problem: PrefillProblem, backend: str) -> Iterator[Tuning]:
    """Tuning to start from, for a problem without a row."""
    for reduce_warps, head_slice in itertools.product((8, 4, 2, 1), (64, 128, 256, 32, 16, 8)):
        yield Tuning(reduce_warps=reduce_warps, head_slice=head_slice)


def explain(problem: PrefillProblem, backend: str, tuning: Tuning, tokens: int) -> str:
    """How a variant runs at a number of tokens."""
    columns = f"a slice of {tuning.head_slice} columns"
    if backend == "triton":
        return f"each CTA has {columns} of a tile of new rows, and the windows that end in it"
    in_flight = tuning.stages - (2 if problem.overlap else 1)
    return (
        f"all CTAs share the windows of {tokens} tokens, each has {columns}; CTAs per SM:"
        f" {tuning.min_ctas}, windows in flight per CTA: {in_flight}"
    )
