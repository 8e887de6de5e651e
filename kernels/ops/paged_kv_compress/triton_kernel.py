"""paged_kv_compress in Triton: one program per request and head_slice of its columns."""

import triton
import triton.language as tl
from torch import Tensor

from kvfold.codegen import Variant


def launch(
    variant: Variant,
    kv_score: Tensor,
    ape: Tensor,
    paged_kv: Tensor,
    paged_score: Tensor,
    block_table_kv: Tensor,
    block_table_score: Tensor,
    output: Tensor,
    kv_lens: Tensor,
    cu_seq_lens: Tensor,
    cu_outputs: Tensor,
    compress_ratio: int,
    next_n: int,
) -> None:
    """Launches variant on the op's arguments, which the op has checked.

    Runs on the current CUDA device and stream; under TRITON_INTERPRET=1 on CPU tensors.
    """
    num_pages, page_size, _ = paged_kv.shape
    _kernel[(kv_lens.numel() * variant.slices,)](
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
        kv_score.stride(0),
        ape.stride(0),
        paged_kv.stride(0),
        paged_kv.stride(1),
        paged_score.stride(0),
        paged_score.stride(1),
        block_table_kv.stride(0),
        block_table_score.stride(0),
        output.stride(0),
        kv_score.size(0),
        num_pages,
        block_table_kv.size(1),
        output.size(0),
        page_size,
        page_size.bit_length() - 1,
        page_size & (page_size - 1) == 0,
        variant.head_dim,
        compress_ratio,
        variant.overlap,
        next_n,
        variant.head_slice,
        num_warps=variant.reduce_warps,
        num_stages=1,
    )


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """fp32 to dtype, to nearest even: by bits, for Triton's interpreter truncates to bf16."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _aligned(stride, x):
    """A row stride of x that the compiler can tell is whole 16 bytes, as the op has checked."""
    vector: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    return stride // vector * vector


@triton.jit
def _locate(position, wanted, state, page_is_power_of_two: tl.constexpr):
    """Which wanted rows are present, and their offsets in paged_kv and in paged_score."""
    table_kv, table_score, max_pages, num_pages, page_size, page_shift = state[:6]
    kv_page_stride, kv_slot_stride, score_page_stride, score_slot_stride = state[6:]
    if page_is_power_of_two:
        logical = position >> page_shift
        slot = position & (page_size - 1)
    else:
        logical = position // page_size
        slot = position % page_size
    wanted = wanted & (logical < max_pages)
    kv_page = tl.load(table_kv + logical, mask=wanted, other=-1)
    score_page = tl.load(table_score + logical, mask=wanted, other=-1)
    present = (kv_page >= 0) & (kv_page < num_pages) & (score_page >= 0) & (score_page < num_pages)
    at_kv = kv_page * kv_page_stride + slot * kv_slot_stride
    at_score = score_page * score_page_stride + slot * score_slot_stride
    return present, at_kv, at_score


@triton.jit
def _new_rows(
    tokens,
    state,
    state_dtype: tl.constexpr,
    page_is_power_of_two: tl.constexpr,
    compress_ratio: tl.constexpr,
    next_n: tl.constexpr,
    parts: tl.constexpr,
    head_dim: tl.constexpr,
):
    """The new rows as the state holds them, KV and score by part, and where: their _locate.

    All loads are issued before one is waited for.
    """
    token, token_stride, ape, ape_stride, start, new = tokens
    kv_in = ()
    score_in = ()
    ape_in = ()
    places = ()
    for t in tl.static_range(next_n):
        at = token + t * token_stride
        at_ape = ape + (start + t) % compress_ratio * ape_stride
        for part in tl.static_range(parts):
            kv_in += (tl.load(at + part * head_dim, mask=t < new, other=0.0),)
            score_in += (tl.load(at + (parts + part) * head_dim, mask=t < new, other=0.0),)
            ape_in += (tl.load(at_ape + part * head_dim, mask=t < new, other=0.0),)
        places += (_locate(start + t, t < new, state, page_is_power_of_two),)
    kv = ()
    score = ()
    for i in tl.static_range(next_n * parts):
        kv += (_round(kv_in[i].to(tl.float32), state_dtype),)
        score += (_round(score_in[i].to(tl.float32) + ape_in[i], state_dtype),)
    return kv, score, places


# No value of these makes a kernel of its own, neither the integers nor where in an engine's buffer
# the metadata lies: a call must not meet a compilation just because its batch differs.
@triton.jit(
    do_not_specialize=[
        "block_table_kv",
        "block_table_score",
        "kv_lens",
        "cu_seq_lens",
        "cu_outputs",
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
    head_slice: tl.constexpr,
):
    parts: tl.constexpr = 2 if overlap else 1  # of the state's columns, head_dim each
    slices: tl.constexpr = head_dim // head_slice
    request = tl.program_id(0) // slices
    columns = tl.program_id(0) % slices * head_slice + tl.arange(0, head_slice)

    # A request that is not valid has no new tokens: it stores nothing and closes nothing.
    begin = tl.load(cu_seq_lens + request).to(tl.int64)
    new = tl.load(cu_seq_lens + request + 1).to(tl.int64) - begin
    length = tl.load(kv_lens + request)
    target = tl.load(cu_outputs + request).to(tl.int64)
    limit = tl.minimum(tl.load(cu_outputs + request + 1).to(tl.int64), num_outputs)
    valid = (begin >= 0) & (begin + new <= num_tokens) & (new >= 0) & (new <= next_n)
    new = tl.where(valid & (new <= length), new, 0).to(tl.int32)
    start = length - new
    window = start // compress_ratio
    end_window = length // compress_ratio
    state = (
        block_table_kv + request * table_kv_stride,
        block_table_score + request * table_score_stride,
        max_pages,
        num_pages,
        page_size.to(tl.int32),
        page_shift.to(tl.int32),
        _aligned(kv_page_stride, paged_kv),
        _aligned(kv_slot_stride, paged_kv),
        _aligned(score_page_stride, paged_score),
        _aligned(score_slot_stride, paged_score),
    )
    kv_score_stride = _aligned(kv_score_stride, kv_score)
    tokens = (
        kv_score + begin * kv_score_stride + columns,
        kv_score_stride,
        ape + columns,
        _aligned(ape_stride, ape),
        start,
        new,
    )

    # A window's rows are this far from its first position; an overlapping window takes part 0 of
    # the state's columns from the window before it, part 1 from its own positions.
    rows: tl.constexpr = parts * compress_ratio
    row = tl.arange(0, triton.next_power_of_2(rows))
    offset = row - (parts - 1) * compress_ratio
    row_columns = (row // compress_ratio * head_dim)[:, None] + columns[None, :]

    # Reduce: the rows held in memory, then the new ones, straight from kv_score; two passes over
    # registers. 
    while window < end_window:
        position = window * compress_ratio + offset
        wanted = (row < rows) & (position >= 0) & (position < start)
        held, at_kv, at_score = _locate(position, wanted, state, page_is_power_of_two)
        at_kv = at_kv[:, None] + row_columns
        at_score = at_score[:, None] + row_columns
        kv = tl.load(paged_kv + at_kv, mask=held[:, None], other=0.0).to(tl.float32)
        score = tl.load(paged_score + at_score, mask=held[:, None], other=-float("inf"))
        score = score.to(tl.float32)
        kv_new, score_new, places = _new_rows(
            tokens,
            state,
            paged_kv.dtype.element_ty,
            page_is_power_of_two,
            compress_ratio,
            next_n,
            parts,
            head_dim,
        )

        top = tl.max(score, axis=0)
        for i in tl.static_range(next_n * parts):
            own = (start + i // parts) // compress_ratio + (parts - 1 - i % parts)
            taken = places[i // parts][0] & (own == window)
            top = tl.maximum(top, tl.where(taken, score_new[i].to(tl.float32), -float("inf")))

        # Subtracting before scaling to base 2: no finite score overflows.
        weight = tl.where(held[:, None], tl.exp2((score - top[None, :]) * LOG2_E), 0.0)
        total = tl.sum(weight, axis=0)
        compressed = tl.sum(weight * kv, axis=0)
        for i in tl.static_range(next_n * parts):
            own = (start + i // parts) // compress_ratio + (parts - 1 - i % parts)
            taken = places[i // parts][0] & (own == window)
            weight_i = tl.exp2((score_new[i].to(tl.float32) - top) * LOG2_E)
            total += tl.where(taken, weight_i, 0.0)
            compressed += tl.where(taken, weight_i * kv_new[i].to(tl.float32), 0.0)

        # The row at the top weighs 1: only a window with no row present has a total of 0.
        compressed = compressed / tl.where(total == 0.0, 1.0, total)
        tl.store(
            output + target * _aligned(output_stride, output) + columns,
            _round(compressed, output.dtype.element_ty),
            mask=(target >= 0) & (target < limit),
        )
        target += 1
        window += 1

    # Store.
    kv_new, score_new, places = _new_rows(
        tokens,
        state,
        paged_kv.dtype.element_ty,
        page_is_power_of_two,
        compress_ratio,
        next_n,
        parts,
        head_dim,
    )
    for i in tl.static_range(next_n * parts):
        present, at_kv, at_score = places[i // parts]
        column = columns + i % parts * head_dim
        tl.store(paged_kv + at_kv + column, kv_new[i], mask=present)
        tl.store(paged_score + at_score + column, score_new[i], mask=present)
