"""What the declarations of the decode ops share: problem fields, tuning, launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kvfold import codegen
from kvfold.codegen import Launch, flag, integer, scalar
from kvfold.codegen.fields import POSITIVE
from kvfold.codegen.gpu import MAX_THREADS, SM_REGISTERS
from kvfold.codegen.variant import check_min_ctas, refuse
from kvfold.device.window_shape import ITEM_BYTES, slices, vector
from kvfold.ops.state_spec import PARAMS, WARPS, StateProblem, ape_in_state_field, window_shape

STORING_REGISTERS = 112  # per thread, with which a storing thread may have several items

# The members of the CUDA parameter struct that every decode op has.
LIST_BYTES = 128  # of shared memory, for requests that close a window; device/closing_requests.cuh
DECODE_PARAMS = (*PARAMS, "store_by_token", "uint32 storing_share", "reducing")


@dataclass(frozen=True, kw_only=True)
class DecodeProblem(StateProblem):
    """The problem fields of a decode op."""

    next_n: int = integer(
        range(1, 17), symbol="n{}", help="the most new tokens of a request in one step"
    )
    ape_in_state: bool = ape_in_state_field()


@dataclass(frozen=True)
class NextNScalar(codegen.Arguments):
    """The second scalar of a decode op."""

    next_n: int = scalar(int, help="the most new tokens of a request in this step")


@dataclass(frozen=True, kw_only=True)
class Tuning(codegen.Tuning):
    """How a kernel of a decode op solves it."""

    reduce_warps: int = integer(WARPS, symbol="w{}", help="warps that share the rows of one window")
    head_slice: int = integer(
        POSITIVE,
        symbol="s{}",
        help="columns per CTA; head_dim / head_slice CTAs work on one request. It divides head_dim."
        " cuda: with c = head_slice / (columns in 16 bytes of state), c is 1, 2, 4, 8, 16 or a"
        " multiple of 32. triton: a power of two",
    )
    fused: bool = flag(
        symbol="fused",
        default=False,
        help="cuda: a CTA stores and reduces a slice of one request. Otherwise some CTAs store and"
        " others reduce. It suits small windows; a thread must hold all rows of a window at once",
    )
    requests_per_cta: int = integer(
        (1, 2, 4, 8, 16, 32),
        symbol="g{}",
        default=1,
        help="cuda, not fused: requests that a reducing CTA checks. More than 1 suits large"
        " batches in which few requests close a window",
    )
    deal: bool = flag(
        symbol="deal",
        default=False,
        help="cuda, not fused: the grid has no more reducing CTAs than run at once. Each checks all"
        " requests, and those that close a window are dealt out. It suits batches that are larger",
    )
    store_bytes: int = integer(
        (128, 256),
        symbol="b{}",
        default=128,
        help="cuda, not fused: bytes of new rows, with ape, that a storing thread has in flight",
    )
    min_ctas: int = integer(
        range(1, 33),
        symbol="c{}",
        default=1,
        help="CTAs that the registers of an SM must suffice for. More CTAs hide latency; too many"
        " make the compiler spill, which `kvfold build` reports",
    )


def launch(problem: DecodeProblem, backend: str, tuning: Tuning) -> Launch:
    """What a variant needs. Raises TableError if it cannot run."""
    legal_slices = slices(problem.head_dim, problem.state_dtype)
    if backend == "triton":  # a tile is a power of two wide
        legal_slices = [width for width in legal_slices if width & (width - 1) == 0]
    if tuning.head_slice not in legal_slices:
        if problem.head_dim % tuning.head_slice:
            what = f"does not divide head_dim {problem.head_dim}"
        else:
            what = f"is not the width of a {backend} CTA over {problem.state_dtype} state"
        raise refuse(tuning, "head_slice", what, legal_slices)
    shape = window_shape(problem, tuning)
    threads = shape.threads if backend == "cuda" else 32 * tuning.reduce_warps
    if threads > MAX_THREADS:
        most = MAX_THREADS * tuning.reduce_warps // threads
        what = f"makes a CTA of {threads} threads, more than {MAX_THREADS}"
        raise refuse(tuning, "reduce_warps", what, [warps for warps in WARPS if warps <= most])
    check_min_ctas(tuning, threads)
    if tuning.fused and (backend != "cuda" or shape.group_leaves > 1 or threads != shape.lanes):
        what = "needs cuda, and one thread that holds all rows of a window"
        raise refuse(tuning, "fused", what, (False,))
    if tuning.deal and (backend != "cuda" or tuning.fused or tuning.requests_per_cta > 1):
        what = "is for cuda kernels that are not fused, with requests_per_cta 1"
        raise refuse(tuning, "deal", what, (False,))
    if tuning.requests_per_cta > 1 and (backend != "cuda" or tuning.fused):
        what = "is for cuda kernels that are not fused"
        raise refuse(tuning, "requests_per_cta", what, (1,))
    if backend == "triton":
        return Launch(threads=threads, min_ctas=tuning.min_ctas)
    rows_bytes = shape.rows_bytes if tuning.fused else shape.shared_bytes
    return Launch(
        threads=threads,
        shared_bytes=rows_bytes + (LIST_BYTES if tuning.deal else 0),
        shared_field="head_slice",
        min_ctas=tuning.min_ctas,
        constants={
            "items_at_once": items_at_once(problem, tuning, threads),
            "has_write_state": False,
        },
    )


def items_at_once(problem: DecodeProblem, tuning: Tuning, threads: int) -> int:
    """Requests of which a storing thread has a vector of columns at once.

    As many as make store_bytes of new rows, if registers suffice for them and for reducing.
    """
    if STORING_REGISTERS * threads * tuning.min_ctas > SM_REGISTERS:
        return 1
    row_bytes = vector(problem.state_dtype) * (2 * ITEM_BYTES[problem.kv_dtype] + 4)  # and ape
    return max(1, tuning.store_bytes // row_bytes // problem.next_n)


def propose(problem: DecodeProblem, backend: str) -> Iterator[Tuning]:
    """Tuning to start from, for a problem without a row."""
    warps = (8, 4, 2, 1) if problem.compress_ratio > 16 else (1,)
    for reduce_warps, head_slice in itertools.product(warps, (64, 32, 16, 8)):
        yield Tuning(reduce_warps=reduce_warps, head_slice=head_slice)


def explain(problem: DecodeProblem, backend: str, tuning: Tuning, batch: int) -> str:
    """How a variant runs at a batch size."""
    per_request = problem.head_dim // tuning.head_slice
    groups = -(-batch // tuning.requests_per_cta)
    warps = tuning.reduce_warps
    share = "1 warp reads" if warps == 1 else f"{warps} warps share"
    each = f"groups of {tuning.requests_per_cta} requests" if groups < batch else "requests"
    most = ", or as many as run at once," if tuning.deal else ""
    return (
        f"{groups * per_request} CTAs{most} that {'store and ' if tuning.fused else ''}reduce ="
        f" {groups} {each} x {per_request} slices of {tuning.head_slice} columns; {share} the rows"
        " of a window"
    )
