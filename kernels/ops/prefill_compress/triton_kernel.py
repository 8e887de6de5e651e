"""prefill_compress in Triton: one program per tile of new rows and head_slice of their columns.

A program stores the rows of its tile that are to be stored, and reduces the windows that end in it.
So the work is balanced by rows and windows, whatever their share of a request.
"""
# Triton's language is not Python's: annotations say how the compiler takes an argument.
# pyright: reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportRedeclaration=false

import triton
import triton.language as tl

from kvfold.codegen import Variant
from kvfold.device.state_triton import (
    OPTIONS,
    load_new,
    locate,
    round_to,
    scalar_mask,
    softmax_sum,
)
from kvfold.ops.prefill_compress.spec import Arguments
from kvfold.ops.prefill_spec import ANY_NUMBER

TILE_ROWS = 16  # new rows of a tile; at most as many windows end in it
BATCH_BLOCK = 256  # requests that a program reads together


def launch(variant: Variant, arguments: Arguments) -> None:
    """Launches a variant on arguments that the op has checked.

    Runs on the current CUDA device and stream; under TRITON_INTERPRET=1 on CPU tensors.
    """
    a, problem, tuning = arguments, variant.problem, variant.tuning
    num_tokens = a.kv_score.size(0)
    num_pages, page_size, _ = a.paged_kv.shape
    slices = problem.head_dim // tuning.head_slice
    tensors = a.tensors()
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    _kernel[(triton.cdiv(num_tokens, TILE_ROWS) * slices,)](
        *tensors,
        *strides,
        a.kv_lens.numel(),
        num_tokens,
        num_pages,
        a.block_table_kv.size(1),
        a.output.size(0),
        page_size,
        page_size.bit_length() - 1,
        # A decode that may reject every token can need every row.
        ANY_NUMBER if a.write_state == "all" else a.max_rollback,
        a.state_period,
        page_size & (page_size - 1) == 0,
        problem.head_dim,
        problem.compress_ratio,
        problem.overlap,
        problem.ape_in_state,
        a.work != "reduce",
        a.work != "store",
        tuning.head_slice,
        TILE_ROWS,
        BATCH_BLOCK,
        num_warps=tuning.reduce_warps,
        **OPTIONS,
    )


@triton.jit
def _next_owner(row, after, kv_lens, cu_seq_lens, batch, num_tokens, batch_block: tl.constexpr):
    """For each row of kv_score, the first request past `after` that has it; `batch` if none does.

    A request with invalid metadata has no rows, and takes none from another. The rows of two valid
    requests may overlap.
    """
    owner = tl.full(row.shape, 0, tl.int32) + batch
    first = 0
    while first < batch:
        request = first + tl.arange(0, batch_block)
        exists = request < batch
        begin = tl.load(cu_seq_lens + request, mask=exists, other=-1)
        end = tl.load(cu_seq_lens + request + 1, mask=exists, other=-1)
        length = tl.load(kv_lens + request, mask=exists, other=-1)
        # The difference does not overflow where the other conditions hold.
        valid = (begin >= 0) & (end >= begin) & (end <= num_tokens) & (end - begin <= length)
        has_row = (begin[None, :] <= row[:, None]) & (row[:, None] < end[None, :])
        chosen = valid[None, :] & has_row & (request[None, :] > after[:, None])
        owner = tl.minimum(owner, tl.min(tl.where(chosen, request[None, :], batch), axis=1))
        first += batch_block
    return owner


@triton.jit
def _read_request(request, kv_lens, cu_seq_lens):
    """Of valid requests: the first row of kv_score, that row's position, tokens after the call."""
    begin = tl.load(cu_seq_lens + request)
    length = tl.load(kv_lens + request)
    return begin, length - (tl.load(cu_seq_lens + request + 1) - begin), length


@triton.jit
def _first_needed(tokens, compress_ratio: tl.constexpr, parts: tl.constexpr):
    """The first position that a decode from this many tokens on may read. Negative: every one."""
    return (tokens // compress_ratio - (parts - 1)) * compress_ratio


@triton.jit
def _is_stored(
    position, length, max_rollback, state_period, compress_ratio: tl.constexpr, parts: tl.constexpr
):
    """Which rows are stored, if they are new."""
    kept = length - tl.minimum(length, max_rollback)
    chosen = position >= _first_needed(kept, compress_ratio, parts)
    # The next restart after the position. The needs of later ones begin later.
    period = tl.maximum(state_period, 1)
    restart = (position.to(tl.int64) // period + 1) * period
    needed = (restart <= length) & (position >= _first_needed(restart, compress_ratio, parts))
    return chosen | (scalar_mask(state_period > 0) & needed)


@triton.jit
def _store_rows(
    token, embedding, columns, wanted, kv, score, parts: tl.constexpr, head_dim: tl.constexpr,
    ape_in_state: tl.constexpr,
):  # fmt: skip
    """Stores the wanted rows. All pointers are to the first of a row's columns."""
    wanted = wanted[:, None]
    for half in tl.static_range(parts):
        at = (columns + half * head_dim)[None, :]
        new_kv, new_score, _ = load_new(
            token[:, None] + at,
            embedding[:, None] + at,
            wanted,
            parts * head_dim,
            kv.dtype.element_ty,
            ape_in_state,
        )
        tl.store(kv[:, None] + at, new_kv, mask=wanted)
        tl.store(score[:, None] + at, new_score, mask=wanted)


@triton.jit
def _reduce_rows(
    token, embedding, new, kv, score, old, state_dim: tl.constexpr, ape_in_state: tl.constexpr
):
    """The row that a window's rows give: new ones at `token`, old ones at `kv` and `score`.

    Both are in one tile, so that the order of the sums depends on the window alone.
    """
    dtype: tl.constexpr = kv.dtype.element_ty
    new_kv, _, new_score = load_new(token, embedding, new, state_dim, dtype, ape_in_state)
    old_kv = tl.load(kv, mask=old, other=0.0)
    old_score = tl.load(score, mask=old, other=0.0).to(tl.float32)
    if not ape_in_state:
        old_score += tl.load(embedding, mask=old, other=0.0)
    return softmax_sum(
        tl.where(new, new_kv, old_kv), tl.where(new, new_score, old_score), new | old
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
        "kv_score_stride",
        "ape_stride",
        "kv_page_stride",
        "kv_slot_stride",
        "score_page_stride",
        "score_slot_stride",
        "table_kv_stride",
        "table_score_stride",
        "output_stride",
        "batch",
        "num_tokens",
        "num_pages",
        "max_pages",
        "num_outputs",
        "page_size",
        "page_shift",
        "max_rollback",
        "state_period",
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
    batch: tl.int64,
    num_tokens: tl.int64,
    num_pages: tl.int64,
    max_pages: tl.int64,
    num_outputs: tl.int64,
    page_size: tl.int64,
    page_shift: tl.int64,
    max_rollback: tl.int64,
    state_period: tl.int64,
    page_is_power_of_two: tl.constexpr,
    head_dim: tl.constexpr,
    compress_ratio: tl.constexpr,
    overlap: tl.constexpr,
    ape_in_state: tl.constexpr,
    stores: tl.constexpr,
    reduces: tl.constexpr,
    head_slice: tl.constexpr,
    tile_rows: tl.constexpr,
    batch_block: tl.constexpr,
):
    parts: tl.constexpr = 2 if overlap else 1  # of head_dim columns, in a row of state
    state_dim: tl.constexpr = parts * head_dim
    window_rows: tl.constexpr = parts * compress_ratio
    slices: tl.constexpr = head_dim // head_slice
    first_row = tl.program_id(0) // slices * tile_rows
    columns = tl.program_id(0) % slices * head_slice + tl.arange(0, head_slice)

    # Rows are 16-byte aligned, which the op has checked: let the compiler see it. In the input it
    # is to see no more than in the state, or its layout would be for the input's wider vectors.
    vector: tl.constexpr = 128 // paged_kv.dtype.element_ty.primitive_bitwidth
    kv_page_stride = kv_page_stride // vector * vector
    kv_slot_stride = kv_slot_stride // vector * vector
    score_page_stride = score_page_stride // vector * vector
    score_slot_stride = score_slot_stride // vector * vector
    in_vector: tl.constexpr = 4 if kv_score.dtype.element_ty == tl.float32 else vector
    kv_score_stride = kv_score_stride // in_vector * in_vector
    ape_stride = ape_stride // 4 * 4

    # No dimension exceeds int32, which the op has checked, nor does max_rollback.
    batch = batch.to(tl.int32)
    num_tokens = num_tokens.to(tl.int32)
    max_rollback = max_rollback.to(tl.int32)
    pools = (
        max_pages.to(tl.int32),
        num_pages.to(tl.uint32),
        page_size.to(tl.int32),
        page_shift.to(tl.int32),
        kv_page_stride,
        kv_slot_stride,
        score_page_stride,
        score_slot_stride,
    )

    # A window's rows lie at offset from its first position. An overlapping window takes part 0 of
    # the state's columns from the window before it, part 1 from its own positions.
    in_window = tl.arange(0, triton.next_power_of_2(window_rows))
    offset = in_window - (parts - 1) * compress_ratio
    window_column = (in_window // compress_ratio * head_dim)[:, None] + columns[None, :]
    window_ape = ape + (in_window % compress_ratio * ape_stride)[:, None] + window_column

    t = tl.arange(0, tile_rows)
    nobody = tl.full((tile_rows,), -1, tl.int32)
    owner = _next_owner(first_row + t, nobody, kv_lens, cu_seq_lens, batch, num_tokens, batch_block)
    while tl.min(owner) < batch:
        has_owner = owner < batch
        owners = tl.where(has_owner, owner, 0).to(tl.int64)
        begins, starts, lengths = _read_request(owners, kv_lens, cu_seq_lens)
        positions = tl.where(has_owner, starts + (first_row + t - begins), 0)

        if stores:
            wanted = has_owner & _is_stored(
                positions, lengths, max_rollback, state_period, compress_ratio, parts
            )
            tables = (
                block_table_kv + owners * table_kv_stride,
                block_table_score + owners * table_score_stride,
            )
            wanted, kv_ats, score_ats = locate(
                positions, wanted, tables + pools, page_is_power_of_two
            )
            _store_rows(
                kv_score + (first_row + t).to(tl.int64) * kv_score_stride,
                ape + positions % compress_ratio * ape_stride,
                columns,
                wanted,
                paged_kv + kv_ats,
                paged_score + score_ats,
                parts,
                head_dim,
                ape_in_state,
            )

        if reduces:
            ends = has_owner & (positions % compress_ratio == compress_ratio - 1)
            end = tl.min(tl.where(ends, t, tile_rows))
            while end < tile_rows:
                # The window that ends in this row of the tile.
                request = tl.sum(tl.where(t == end, owner, 0)).to(tl.int64)
                begin, start, length = _read_request(request, kv_lens, cu_seq_lens)
                window = (start + (first_row + end - begin)) // compress_ratio
                position = window * compress_ratio + offset
                exists = (in_window < window_rows) & (position >= 0)
                table = (
                    block_table_kv + request * table_kv_stride,
                    block_table_score + request * table_score_stride,
                )
                found, kv_at, score_at = locate(
                    position, exists, table + pools, page_is_power_of_two
                )
                is_new = exists & (position >= start)
                # A new row that is not to be stored needs no page.
                needs_page = _is_stored(
                    position, length, max_rollback, state_period, compress_ratio, parts
                )
                token = (begin.to(tl.int64) + (position - start)) * kv_score_stride
                compressed = _reduce_rows(
                    kv_score + token[:, None] + window_column,
                    window_ape,
                    (is_new & (found | ~needs_page))[:, None],
                    paged_kv + kv_at[:, None] + window_column,
                    paged_score + score_at[:, None] + window_column,
                    (found & ~is_new)[:, None],
                    state_dim,
                    ape_in_state,
                )
                target = tl.load(cu_outputs + request).to(tl.int64)
                target += window - start // compress_ratio
                limit = tl.minimum(tl.load(cu_outputs + request + 1).to(tl.int64), num_outputs)
                tl.store(
                    output + target * output_stride + columns,
                    round_to(compressed, output.dtype.element_ty),
                    mask=scalar_mask((target >= 0) & (target < limit)),
                )
                end = tl.min(tl.where(ends & (t > end), t, tile_rows))

        owner = _next_owner(
            first_row + t, owner, kv_lens, cu_seq_lens, batch, num_tokens, batch_block
        )
