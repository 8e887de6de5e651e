"""The declaration of prefill_compress; docs/ops.md explains the parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvfold import codegen
from kvfold.codegen import Launch, OpSpec, dtype, flag, integer, scalar, tensor
from kvfold.codegen.fields import POSITIVE
from kvfold.codegen.gpu import MAX_THREADS, SM_THREADS
from kvfold.codegen.variant import refuse
from kvfold.device.window_shape import ITEM_BYTES, QUAD_ROWS, WindowShape, slices, vector

if TYPE_CHECKING:
    from torch import Tensor

WARPS = (1, 2, 4, 8, 16, 32)
MAX_ROWS = 32  # of a window that a thread takes; a bit of a word stands for each
ANY_NUMBER = 2**31 - 1  # of new tokens per request


@dataclass(frozen=True, kw_only=True)
class Problem(codegen.Problem):
    """What a kernel of prefill_compress solves."""

    op: ClassVar[str] = "prefill_compress"

    head_dim: int = integer(
        range(8, 2**30, 8), symbol="hd{}", help="columns of a compressed row, a multiple of 8"
    )
    compress_ratio: int = integer(POSITIVE, symbol="r{}", help="tokens per window")
    overlap: bool = flag(
        symbol="overlap",
        default=lambda problem: problem["compress_ratio"] == 4,
        help="whether a window also has the rows of the window before it; state_dim is then"
        " 2*head_dim; default: true for compress_ratio 4, false for every other",
    )
    kv_dtype: str = dtype("bf16", "fp32", help="of kv_score; output may have either dtype")
    state_dtype: str = dtype("bf16", "fp32", help="of paged_kv and paged_score")
    ape_in_state: bool = flag(
        default=True,
        symbol="raw_score",
        symbol_for=False,
        help="whether the score state holds score + ape, or the raw score",
    )


@dataclass(frozen=True, kw_only=True)
class Tuning(codegen.Tuning):
    """How a kernel of prefill_compress solves it."""

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
        help="cuda: windows that a CTA has in shared memory, of which one is reduced and the others"
        " are on their way",
    )
    min_ctas: int = integer(
        range(1, 33),
        symbol="c{}",
        default=1,
        help="cuda: CTAs per SM that share all rows of a call; the registers of an SM must suffice"
        " for them, and its shared memory should",
    )


@dataclass(frozen=True)
class Arguments(codegen.Arguments):
    """The arguments of prefill_compress."""

    kv_score: Tensor = tensor(
        "num_tokens, 2*state_dim", "bf16, fp32", help="new tokens: KV, then score"
    )
    ape: Tensor = tensor(
        "compress_ratio, state_dim",
        "fp32",
        help="absolute position embedding, added to the score; row = position % compress_ratio",
    )
    paged_kv: Tensor = tensor(
        "num_pages, page_size, state_dim",
        "bf16, fp32",
        mutated=True,
        strides="paged_kv_page_stride, paged_kv_slot_stride",
        help="KV state",
    )
    paged_score: Tensor = tensor(
        "num_pages, page_size, state_dim",
        "bf16, fp32",
        like="paged_kv",
        mutated=True,
        strides="paged_score_page_stride, paged_score_slot_stride",
        help="score state",
    )
    block_table_kv: Tensor = tensor(
        "batch, max_pages", "int32", help="logical page -> physical page of paged_kv"
    )
    block_table_score: Tensor = tensor(
        "batch, max_pages", "int32", help="logical page -> physical page of paged_score"
    )
    output: Tensor = tensor(
        "num_outputs, head_dim", "bf16, fp32", mutated=True, help="compressed rows"
    )
    kv_lens: Tensor = tensor("batch", "int32", help="tokens per request after this call")
    cu_seq_lens: Tensor = tensor(
        "batch+1", "int32", help="prefix sums of the new tokens per request"
    )
    cu_outputs: Tensor = tensor(
        "batch+1", "int32", help="prefix sums of the output rows reserved per request"
    )
    compress_ratio: int = scalar(int, help="tokens per window")
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
        help="tail: a request may restart at every multiple of so many tokens; 0: nowhere",
    )
    prefetch: str = scalar(
        str,
        default="none",
        choices=("none", "metadata", "state"),
        keyword=True,
        help="what may be read while the kernel before this one still runs: nothing; the int32"
        " metadata; metadata and old rows of the state",
    )
    ape_in_state: bool = scalar(
        bool,
        default=True,
        keyword=True,
        help="true: the state holds score + ape. false: it holds the raw score, and ape is added,"
        " in fp32, as rows are read",
    )
    work: str = scalar(
        str,
        default="all",
        choices=("all", "store", "reduce"),
        keyword=True,
        help="both steps, or one of them",
    )


def problem_of(
    dimensions: Mapping[str, int], arguments: Arguments, dtypes: Mapping[str, str]
) -> Problem:
    """The problem of a call."""
    head_dim, state_dim = dimensions["head_dim"], dimensions["state_dim"]
    if dimensions["page_size"] < 1:
        raise ValueError("paged_kv is of page_size 0; accepted: 1 or more")
    for name in ("max_rollback", "state_period"):
        if not 0 <= getattr(arguments, name) <= ANY_NUMBER:
            raise ValueError(f"{name} is {getattr(arguments, name)}; accepted: 0 to {ANY_NUMBER}")
    problem = Problem(
        head_dim=head_dim,
        compress_ratio=arguments.compress_ratio,
        overlap=state_dim != head_dim,
        kv_dtype=dtypes["kv_score"],
        state_dtype=dtypes["paged_kv"],
        ape_in_state=arguments.ape_in_state,
    )
    if state_dim not in (head_dim, 2 * head_dim):
        raise ValueError(
            f"paged_kv is of state_dim {state_dim}; accepted: {head_dim} (= head_dim), or"
            f" {2 * head_dim} for an overlapping window"
        )
    return problem


def launch(problem: Problem, backend: str, tuning: Tuning) -> Launch:
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
    if tuning.min_ctas > SM_THREADS // shape.threads:
        what = f"is more CTAs of {shape.threads} threads than an SM takes"
        raise refuse(tuning, "min_ctas", what, range(1, SM_THREADS // shape.threads + 1))
    return Launch(
        threads=shape.threads,
        shared_bytes=shared_bytes(problem, tuning, shape),
        shared_field="stages",
        min_ctas=tuning.min_ctas,
        constants={"next_n": ANY_NUMBER, "fused": False},
    )


def window_shape(problem: Problem, tuning: Tuning) -> WindowShape:
    """How the threads of a CTA share a window."""
    return WindowShape(
        compress_ratio=problem.compress_ratio,
        overlap=problem.overlap,
        state_dtype=problem.state_dtype,
        reduce_warps=tuning.reduce_warps,
        head_slice=tuning.head_slice,
    )


def shared_bytes(problem: Problem, tuning: Tuning, shape: WindowShape) -> int:
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
    return -(-work // 16) * 16 + -(-rest // 16) * 16 + request_bits


def propose(problem: Problem, backend: str) -> Iterator[Tuning]:
    """Tuning to start from, for a problem without a row."""
    for reduce_warps, head_slice in itertools.product((8, 4, 2, 1), (64, 128, 256, 32, 16, 8)):
        yield Tuning(reduce_warps=reduce_warps, head_slice=head_slice)


def explain(problem: Problem, backend: str, tuning: Tuning, tokens: int) -> str:
    """How a variant runs at a number of tokens."""
    return (
        f"{tuning.min_ctas} CTAs per SM share the windows of {tokens} tokens, each a slice of"
        f" {tuning.head_slice} columns, with {tuning.stages - 1} windows on their way"
    )


SPEC = OpSpec(
    problem=Problem,
    tuning=Tuning,
    arguments=Arguments,
    axis="tokens",
    axis_help="new tokens in the call",
    size_dimension="num_tokens",
    defined_by={"state_dim": "paged_kv", "batch": "kv_lens"},
    problem_of=problem_of,
    launch=launch,
    propose=propose,
    explain=explain,
    may_be_same=(("block_table_kv", "block_table_score"),),
    params=(
        "batch",
        "num_tokens",
        "num_outputs",
        "num_pages",
        "max_pages",
        "page_size",
        "uint32 page_multiplier",
        "page_shift",
        "output_is_bf16",
        "write_state",
        "max_rollback",
        "state_period",
        "prefetch",
        "stores",
        "reduces",
        "range_rows",
        "ranges",
    ),
)
