"""paged_kv_compress in Triton: one program per request and head_slice of its columns."""
# Triton's language is not Python's: annotations say how the compiler takes an argument.
# pyright: reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportRedeclaration=false

import triton
import triton.language as tl

from kvfold.codegen import Variant
from kvfold.codegen.gpu import SM_REGISTERS
from kvfold.device.state_triton import (
    OPTIONS,
    larger,
    load_new,
    locate,
    round_to,
    scalar_mask,
    weigh,
)
from kvfold.ops.paged_kv_compress.spec import Arguments


def register_cap(variant: Variant) -> int | None:
    """Registers per thread with which min_ctas programs fit in an SM; None for no cap."""
    threads = variant.launch.threads * variant.launch.min_ctas
    cap = SM_REGISTERS // threads // 8 * 8  # registers are allocated in eights
    return cap if cap < 256 else None  # which no thread exceeds anyway


def launch(variant: Variant, arguments: Arguments) -> None:
    """Launches a variant on arguments that the op has checked.

    Runs on the current CUDA device and stream; under TRITON_INTERPRET=1 on CPU tensors.
    """
    a, problem, tuning = arguments, variant.problem, variant.tuning
    num_pages, page_size, _ = a.paged_kv.shape
    slices = problem.head_dim // tuning.head_slice
    tensors = a.tensors()
    strides = [x for tensor in tensors if tensor is not None for x in tensor.stride()[:-1]]
    _kernel[(a.kv_lens.numel() * slices,)](
        *tensors,
        *strides,
        a.kv_score.size(0),
        num_pages,
        a.block_table_kv.size(1),
        a.output.size(0),
        page_size,
        page_size.bit_length() - 1,
        page_size & (page_size - 1) == 0,
        problem.head_dim,
        problem.compress_ratio,
        problem.overlap,
        problem.next_n,
        problem.ape_in_state,
        a.work != "reduce",
        a.work != "store",
        tuning.head_slice,
        num_warps=tuning.reduce_warps,
        maxnreg=register_cap(variant),
        **OPTIONS,
    )


# No value of these makes a kernel of its own, neither the integers nor where in an engine's buffer
# the metadata lies: a call must not meet a compilation just because its batch differs.
@triton.jit(
    do_not_specialize=[
        "block_table_kv",
        "block_table_score",
        "kv_lens",
        "cu_seq_lens",
        "cu_outputs",
        "new_tokens",
        "kv_score_stride",
        "ape_stride",
        "kv_page_stride",
        "kv_slot_stride",
        "score_page_stride",
        "score_slot_stride",
        "table_kv_stride",
        "table_score_stride",
        "output_stride",
        "num_tokens",
        "num_pages",
        "max_pages",
        "num_outputs",
        "page_size",
        "page_shift",
    ]
)
def _kernel(
    kv_score,
    ape,
    paged_kv,
    paged_score,
    block_table_kv,
    block_table_score,
    output,
    kv_lens,
    cu_seq_lens,
    cu_outputs,
    new_tokens,  # or None
    kv_score_stride: tl.int64,
    ape_stride: tl.int64,
    kv_page_stride: tl.int64,
    kv_slot_stride: tl.int64,
    score_page_stride: tl.int64,
    score_slot_stride: tl.int64,
    table_kv_stride: tl.int64,
    table_score_stride: tl.int64,
    output_stride: tl.int64,
    num_tokens: tl.int64,
    num_pages: tl.int64,
    max_pages: tl.int64,
    num_outputs: tl.int64,
    page_size: tl.int64,
    page_shift: tl.int64,
    page_is_power_of_two: tl.constexpr,
    head_dim: tl.constexpr,
    compress_ratio: tl.constexpr,
    overlap: tl.constexpr,
    next_n: tl.constexpr,
    ape_in_state: tl.constexpr,
    stores: tl.constexpr,
    reduces: tl.constexpr,
    head_slice: tl.constexpr,
):
    parts: tl.constexpr = 2 if overlap else 1  # of head_dim columns, in a row of state
    state_dim: tl.constexpr = parts * head_dim
    dtype: tl.constexpr = paged_kv.dtype.element_ty
    slices: tl.constexpr = head_dim // head_slice
    request = tl.program_id(0) // slices
    columns = tl.program_id(0) % slices * head_slice + tl.arange(0, head_slice)

    # Rows are 16-byte aligned, which the op has checked: let the compiler see it. In the input it
    # is to see no more than in the state, or its layout would be for the input's wider vectors.
    vector: tl.constexpr = 128 // dtype.primitive_bitwidth
    kv_page_stride = kv_page_stride // vector * vector
    kv_slot_stride = kv_slot_stride // vector * vector
    score_page_stride = score_page_stride // vector * vector
    score_slot_stride = score_slot_stride // vector * vector
    in_vector: tl.constexpr = 4 if kv_score.dtype.element_ty == tl.float32 else vector
    kv_score_stride = kv_score_stride // in_vector * in_vector
    ape_stride = ape_stride // 4 * 4

    # A request that is not valid has no new tokens: it stores nothing and closes nothing.
    begin = tl.load(cu_seq_lens + request).to(tl.int64)
    if new_tokens is None:
        new = tl.load(cu_seq_lens + request + 1).to(tl.int64) - begin
    else:
        new = tl.load(new_tokens + request).to(tl.int64)
    length = tl.load(kv_lens + request)
    target = tl.load(cu_outputs + request).to(tl.int64)
    limit = tl.minimum(tl.load(cu_outputs + request + 1).to(tl.int64), num_outputs)
    valid = (begin >= 0) & (begin + new <= num_tokens) & (new >= 0) & (new <= next_n)
    new = tl.where(valid & (new <= length), new, 0).to(tl.int32)
    start = length - new
    tokens = kv_score + begin * kv_score_stride
    state = (
        block_table_kv + request * table_kv_stride,
        block_table_score + request * table_score_stride,
        max_pages.to(tl.int32),  # no dimension exceeds int32, which the op has checked
        num_pages.to(tl.uint32),
        page_size.to(tl.int32),
        page_shift.to(tl.int32),
        kv_page_stride,
        kv_slot_stride,
        score_page_stride,
        score_slot_stride,
    )

    # New rows come straight from kv_score, read once: no window waits for the store.
    t = tl.arange(0, triton.next_power_of_2(next_n))
    new_position = start + t
    is_new, kv_at, score_at = locate(new_position, t < new, state, page_is_power_of_two)
    part = new_position // compress_ratio - start // compress_ratio + (parts - 1)
    token = (tokens + t * kv_score_stride)[:, None] + columns[None, :]
    embedding = (ape + new_position % compress_ratio * ape_stride)[:, None] + columns[None, :]
    exists = (t < new)[:, None]
    new_kv, new_score, new_biased = load_new(
        token, embedding, exists, state_dim, dtype, ape_in_state
    )
    if overlap:  # the state's second half of columns
        own_kv, own_score, own_biased = load_new(
            token + head_dim, embedding + head_dim, exists, state_dim, dtype, ape_in_state
        )

    # A window's rows lie at offset from its first position. An overlapping window takes part 0 of
    # the state's columns from the window before it, part 1 from its own positions.
    row = tl.arange(0, triton.next_power_of_2(parts * compress_ratio))
    offset = row - (parts - 1) * compress_ratio
    column = (row // compress_ratio * head_dim)[:, None] + columns[None, :]
    if not ape_in_state:
        in_window = (row < parts * compress_ratio)[:, None]
        row_ape = tl.load(
            ape + (row % compress_ratio * ape_stride)[:, None] + column, mask=in_window, other=0.0
        )
    window = start // compress_ratio
    end_window = length // compress_ratio if reduces else window
    while window < end_window:
        position = window * compress_ratio + offset
        wanted = (row < parts * compress_ratio) & (position >= 0) & (position < start)
        present, old_kv_at, old_score_at = locate(position, wanted, state, page_is_power_of_two)
        present = present[:, None]
        # Every load above is under way before one below waits for its address.
        tl.debug_barrier()
        kv = tl.load(paged_kv + (old_kv_at[:, None] + column), mask=present, other=0.0)
        score = tl.load(
            paged_score + (old_score_at[:, None] + column), mask=present, other=-float("inf")
        )

        here = is_new & (part >= 0) & (part < parts)
        if overlap:
            own = (part == 1)[:, None]
            kv_here = tl.where(own, own_kv, new_kv)
            score_here = tl.where(own, own_biased, new_biased)
        else:
            kv_here, score_here = new_kv, new_biased
        here = here[:, None]
        score_here = tl.where(here, score_here, -float("inf"))
        score = score.to(tl.float32)
        if not ape_in_state:
            score = tl.where(present, score + row_ape, -float("inf"))
        top = larger(tl.max(score, axis=0), tl.max(score_here, axis=0))
        weight, weighted = weigh(score, kv, present, top)
        # Both sums in one exchange between warps.
        total, compressed = tl.split(tl.sum(tl.join(weight, weighted), axis=0))
        weight, weighted = weigh(score_here, kv_here, here, top)
        total += tl.sum(weight, axis=0)
        compressed += tl.sum(weighted, axis=0)
        # The row at the top weighs 1: only a window with no row present has a total of 0.
        compressed = compressed / tl.where(total == 0.0, 1.0, total)
        tl.store(
            output + target * output_stride + columns,
            round_to(compressed, output.dtype.element_ty),
            mask=scalar_mask((target >= 0) & (target < limit)),
        )
        target += 1
        window += 1
        part -= 1

    if stores:
        is_new = is_new[:, None]
        columns = columns[None, :]
        tl.store(paged_kv + (kv_at[:, None] + columns), new_kv, mask=is_new)
        tl.store(paged_score + (score_at[:, None] + columns), new_score, mask=is_new)
        if overlap:
            columns += head_dim
            tl.store(paged_kv + (kv_at[:, None] + columns), own_kv, mask=is_new)
            tl.store(paged_score + (score_at[:, None] + columns), own_score, mask=is_new)
