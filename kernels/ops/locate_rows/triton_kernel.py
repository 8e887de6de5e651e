"""locate_rows in Triton: one program per block of output rows."""
# Triton's language is not Python's: annotations say how the compiler takes an argument.
# pyright: reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportRedeclaration=false

import triton
import triton.language as tl

from kvfold.codegen import Variant
from kvfold.ops.locate_rows.spec import Arguments, token_bounds


def launch(variant: Variant, arguments: Arguments) -> None:
    """Launches a variant on arguments that the op has checked.

    Runs on the current CUDA device and stream; under TRITON_INTERPRET=1 on CPU tensors.
    """
    a, rows = arguments, 32 * variant.tuning.warps
    batch, num_outputs = a.kv_lens.numel(), a.positions.numel()
    source = a.token_slots if a.block_table_cache is None else a.block_table_cache
    assert source is not None
    most_tokens, most_new = token_bounds(a)
    _kernel[(triton.cdiv(num_outputs, rows),)](
        a.kv_lens,
        a.cu_seq_lens,
        a.cu_outputs,
        a.new_tokens,
        a.positions,
        a.slots,
        source,
        source.stride(0),
        source.size(-1),
        batch,
        num_outputs,
        a.compress_ratio,
        a.rows_per_page,
        most_tokens,
        most_new,
        (batch + 1).bit_length(),
        a.block_table_cache is not None,
        rows,
        num_warps=variant.tuning.warps,
    )


@triton.jit
def _owner_of(row, cu_outputs, batch, search_steps):
    """The requests b with cu_outputs[b] <= row < cu_outputs[b + 1]; -1 or batch if there is none.

    Where the search ends, both relations hold even if cu_outputs is not monotone.
    """
    low = tl.zeros_like(row)
    high = low + (batch + 1)
    step = 0
    while step < search_steps:
        middle = low + (high - low) // 2
        searching = low < high
        begins = tl.load(cu_outputs + middle, mask=searching, other=0) <= row
        low = tl.where(searching & begins, middle + 1, low)
        high = tl.where(searching & ~begins, middle, high)
        step += 1
    return low - 1


# No value of these makes a kernel of its own, neither the integers nor where in an engine's buffer
# the metadata lies: a call must not meet a compilation just because its batch differs.
@triton.jit(
    do_not_specialize=[
        "kv_lens",
        "cu_seq_lens",
        "cu_outputs",
        "new_tokens",
        "positions",
        "slots",
        "source",
        "source_stride",
        "source_length",
        "batch",
        "num_outputs",
        "compress_ratio",
        "rows_per_page",
        "most_tokens",
        "most_new",
        "search_steps",
    ]
)
def _kernel(
    kv_lens,
    cu_seq_lens,
    cu_outputs,
    new_tokens,  # or None
    positions,
    slots,
    source,  # block_table_cache or token_slots
    source_stride: tl.int64,
    source_length: tl.int64,  # of the last dimension
    batch: tl.int64,
    num_outputs: tl.int64,
    compress_ratio: tl.int64,
    rows_per_page: tl.int64,
    most_tokens: tl.int64,
    most_new: tl.int64,
    search_steps: tl.int64,
    by_page: tl.constexpr,
    rows: tl.constexpr,
):
    # In 64 bits, in which no sum of int32 metadata overflows.
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    request = _owner_of(row, cu_outputs, batch, search_steps)
    owned = (request >= 0) & (request < batch)
    request = tl.where(owned, request, 0)

    # Which requests are skipped is as in Requests.read of ops/state_reference.py.
    length = tl.load(kv_lens + request, mask=owned, other=-1).to(tl.int64)
    begin = tl.load(cu_seq_lens + request, mask=owned, other=0).to(tl.int64)
    if new_tokens is None:
        end = tl.load(cu_seq_lens + request + 1, mask=owned, other=0).to(tl.int64)
        new = end - begin
    else:
        new = tl.load(new_tokens + request, mask=owned, other=-1).to(tl.int64)
    valid = (begin >= 0) & (begin + new <= most_tokens) & (new >= 0)
    valid &= (new <= length) & (new <= most_new)
    length = tl.where(valid, length, 0)
    start = length - tl.where(valid, new, 0)

    number = row - tl.load(cu_outputs + request, mask=owned, other=0).to(tl.int64)
    window = start // compress_ratio + number
    filled = owned & (window < length // compress_ratio)
    window = tl.where(filled, window, 0)
    position = window * compress_ratio
    if by_page:
        logical = window // rows_per_page
        known = filled & (logical < source_length)
        page = tl.load(source + request * source_stride + logical, mask=known, other=-1)
        page = page.to(tl.int64)
        slot = tl.where(page >= 0, page * rows_per_page + window % rows_per_page, -1)
    else:
        token = begin + (position + compress_ratio - 1 - start)
        known = filled & (token < source_length)
        slot = tl.load(source + token, mask=known, other=-1)

    written = (row < num_outputs) & (row >= tl.load(cu_outputs))
    tl.store(positions + row, tl.where(filled, position, -1).to(tl.int32), mask=written)
    tl.store(slots + row, slot, mask=written)
