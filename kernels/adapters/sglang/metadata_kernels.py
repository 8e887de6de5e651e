"""The metadata of a plan by one launch, in Triton.

These kernels prepare a step, as the engine's own planner does; they are not ops. A plan may hold
anything, for example while a graph is warmed up. Every index is checked, so that no kernel reads or
writes outside its tensors.
"""
# Triton's language is not Python's: annotations say how the compiler takes an argument.
# pyright: reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportRedeclaration=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.adapters.sglang.metadata import DecodeMetadata, PrefillMetadata, RowMetadata

BLOCK = 128  # entries of a program
PREFILL_BLOCK = 1024  # entries, or tokens, that the one program of a prefill plan takes at a time
PREFILL_WARPS = 8


def fill_decode(entries: Tensor, ratio: int, metadata: DecodeMetadata) -> None:
    """Fills the metadata of a decode plan, [batch, 4] int32."""
    requests, batch = metadata.requests, entries.size(0)
    _decode[(triton.cdiv(batch + 1, BLOCK),)](
        entries,
        requests.kv_lens,
        requests.cu_seq_lens,
        requests.cu_outputs,
        requests.block_table,
        metadata.positions,
        batch,
        ratio,
        ratio == 4,
        BLOCK,
        num_warps=4,
    )


def fill_prefill(
    windows: Tensor,
    rows: Tensor,
    num_tokens: int,
    ratio: int,
    metadata: PrefillMetadata,
    pages: Tensor,
) -> None:
    """Fills the metadata of a prefill plan, and sorts its windows. Arguments as the reference's."""
    reduce, store = metadata.reduce, metadata.store
    # The entry of each token's window plus 1, and the sorted entries.
    scratch = torch.empty(num_tokens + windows.numel(), dtype=torch.int32, device=windows.device)
    _prefill[(1,)](
        windows,
        rows,
        reduce.kv_lens,
        reduce.cu_seq_lens,
        reduce.cu_outputs,
        pages,
        store.kv_lens,
        store.cu_seq_lens,
        store.cu_outputs,
        store.block_table,
        scratch,
        windows.size(0),
        rows.size(0),
        num_tokens,
        reduce.kv_lens.numel() // 2,
        pages.numel(),
        ratio,
        ratio == 4,
        PREFILL_BLOCK,
        num_warps=PREFILL_WARPS,
    )


def fill_rows(windows: Tensor, out_loc: Tensor, ratio: int, metadata: RowMetadata) -> None:
    """Fills positions and slots of the rows of plan_c, [num_windows, 4] int32."""
    num_windows = windows.size(0)
    _rows[(triton.cdiv(num_windows, BLOCK),)](
        windows,
        out_loc,
        metadata.positions,
        metadata.slots,
        num_windows,
        out_loc.numel(),
        ratio,
        BLOCK,
        num_warps=4,
    )


# No value of these makes a kernel of its own, neither the integers nor where a tensor begins: a
# call must not meet a compilation just because its batch differs.
@triton.jit(
    do_not_specialize=[
        "entries",
        "kv_lens",
        "cu_seq_lens",
        "cu_outputs",
        "block_table",
        "positions",
        "batch",
    ]
)
def _decode(
    entries,
    kv_lens,
    cu_seq_lens,
    cu_outputs,
    block_table,
    positions,
    batch,
    ratio: tl.constexpr,
    overlaps: tl.constexpr,
    block: tl.constexpr,
):
    request = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(cu_seq_lens + request, request, mask=request <= batch)
    tl.store(cu_outputs + request, request, mask=request <= batch)
    exists = request < batch
    length = tl.load(entries + 4 * request, mask=exists, other=0)
    page = tl.load(entries + 4 * request + 3, mask=exists, other=-1)
    used = exists & (length > 0)
    length = tl.where(used, length, 0)
    window = tl.where(used, (length - 1) // ratio, 0)
    if overlaps:
        # Of window 0 it is the window's own page.
        page_before = tl.load(entries + 4 * request + 2, mask=exists, other=-1)
        tl.store(block_table + 2 * request, page_before, mask=exists)
        tl.store(block_table + 2 * request + 1, page, mask=exists)
        first = tl.maximum(window - 1, 0)
    else:
        tl.store(block_table + request, page, mask=exists)
        first = window
    tl.store(kv_lens + request, length - first * ratio, mask=exists)
    closes = used & (length % ratio == 0)
    tl.store(positions + request, tl.where(closes, length - ratio, -1), mask=exists)


@triton.jit(
    do_not_specialize=[
        "windows",
        "out_loc",
        "positions",
        "slots",
        "num_windows",
        "num_tokens",
    ]
)
def _rows(
    windows,
    out_loc,
    positions,
    slots,
    num_windows,
    num_tokens,
    ratio: tl.constexpr,
    block: tl.constexpr,
):
    entry = tl.program_id(0) * block + tl.arange(0, block)
    exists = entry < num_windows
    length = tl.load(windows + 4 * entry, mask=exists, other=-1)
    token = tl.load(windows + 4 * entry + 1, mask=exists, other=0) & 0xFFFF
    used = exists & _stands_for_a_window(length, token, num_tokens, ratio)
    tl.store(positions + entry, tl.where(used, length - ratio, -1), mask=exists)
    tl.store(slots + entry, tl.load(out_loc + token, mask=used, other=-1), mask=exists)


@triton.jit
def _stands_for_a_window(length, token, num_tokens, ratio: tl.constexpr):
    return (length > 0) & (length % ratio == 0) & (token < num_tokens)


@triton.jit
def _fill(tensor, value, count, block: tl.constexpr):
    first = 0
    while first < count:
        at = first + tl.arange(0, block)
        tl.store(tensor + at, tl.zeros_like(at) + value, mask=at < count)
        first += block


@triton.jit
def _new_rows(windows, entry, exists, window_rows: tl.constexpr):
    """Of some entries: how many rows of the window are new."""
    word = tl.load(windows + 4 * entry + 1, mask=exists, other=0)
    return window_rows - ((word >> 16) & 0xFFFF)


@triton.jit
def _entry_of(entry_of_token, token, num_tokens):
    """The entry of the window that a token closes; -1 if there is none."""
    exists = (token >= 0) & (token < num_tokens)
    return tl.load(entry_of_token + token, mask=exists, other=0) - 1


@triton.jit(
    do_not_specialize=[
        "windows",
        "rows",
        "kv_lens",
        "cu_seq_lens",
        "cu_outputs",
        "pages",
        "store_kv_lens",
        "store_cu_seq_lens",
        "store_cu_outputs",
        "store_table",
        "scratch",
        "num_windows",
        "num_rows",
        "num_tokens",
        "most_runs",
        "num_pages",
    ]
)
def _prefill(
    windows,
    rows,
    kv_lens,
    cu_seq_lens,
    cu_outputs,
    pages,
    store_kv_lens,
    store_cu_seq_lens,
    store_cu_outputs,
    store_table,
    scratch,
    num_windows,
    num_rows,
    num_tokens,
    most_runs,
    num_pages,
    ratio: tl.constexpr,
    overlaps: tl.constexpr,
    block: tl.constexpr,
):
    # One program does it all: its phases exchange data through memory, with a barrier between them.
    window_rows: tl.constexpr = 2 * ratio if overlaps else ratio
    entry_of_token, ordered = scratch, scratch + num_tokens
    step = tl.arange(0, block)
    _fill(entry_of_token, 0, num_tokens, block)
    _fill(kv_lens, 0, 2 * most_runs, block)
    _fill(cu_seq_lens, 0, 2 * most_runs + 1, block)
    _fill(cu_outputs, 0, 2 * most_runs + 1, block)
    _fill(pages, 0, num_pages, block)
    _fill(store_cu_outputs, 0, 2 * num_rows + 1, block)
    tl.debug_barrier()

    first = 0
    while first < num_windows:
        entry = first + step
        exists = entry < num_windows
        length = tl.load(windows + 4 * entry, mask=exists, other=-1)
        token = tl.load(windows + 4 * entry + 1, mask=exists, other=0) & 0xFFFF
        used = exists & _stands_for_a_window(length, token, num_tokens, ratio)
        tl.store(entry_of_token + token, entry + 1, mask=used)
        first += block
    tl.debug_barrier()

    # In the order of the tokens: number the windows, and the runs of windows that overlap.
    row_count = 0
    run_count = 0
    first = 0
    while first < num_tokens:
        token = first + step
        entry = _entry_of(entry_of_token, token, num_tokens)
        closes = entry >= 0
        length = tl.load(windows + 4 * entry, mask=closes, other=0)
        word = tl.load(windows + 4 * entry + 1, mask=closes, other=0)
        page_before = tl.load(windows + 4 * entry + 2, mask=closes, other=0)
        page = tl.load(windows + 4 * entry + 3, mask=closes, other=0)
        row = row_count + tl.cumsum(closes.to(tl.int32)) - 1
        tl.store(ordered + 4 * row, length, mask=closes)
        tl.store(ordered + 4 * row + 1, word, mask=closes)
        tl.store(ordered + 4 * row + 2, page_before, mask=closes)
        tl.store(ordered + 4 * row + 3, page, mask=closes)

        held = (word >> 16) & 0xFFFF
        new = window_rows - held
        begins = closes
        ends = closes
        if overlaps:
            # More new rows than a window has: the window before closes in this call, too.
            before = _entry_of(entry_of_token, token - ratio, num_tokens)
            begins = closes & ~((new > ratio) & (before >= 0))
            after = _entry_of(entry_of_token, token + ratio, num_tokens)
            more = _new_rows(windows, after, after >= 0, window_rows) > ratio
            ends = closes & ~((after >= 0) & more)
        run = run_count + tl.cumsum(begins.to(tl.int32)) - 1
        row_count += tl.sum(closes.to(tl.int32))
        run_count += tl.sum(begins.to(tl.int32))

        window = length // ratio - 1
        # Without old rows SGLang leaves the pages unset.
        page = tl.where(held > 0, page, 0)
        if overlaps:
            page_before = tl.where(held > 0, page_before, 0)
            base = tl.maximum(window - 1, 0)
        else:
            page_before = page
            base = window
        start = length - new - base * ratio
        valid = (new > 0) & (start >= 0) & (page >= 0) & (page_before >= 0)
        known = begins & (run < most_runs)
        tl.store(kv_lens + 2 * run, tl.where(valid, start, -1), mask=known)
        tl.store(cu_seq_lens + 2 * run, token - new + 1, mask=known)
        tl.store(cu_seq_lens + 2 * run + 1, token + 1, mask=ends & (run >= 0) & (run < most_runs))
        tl.store(cu_outputs + 2 * run, row, mask=known)
        tl.store(cu_outputs + 2 * run + 1, tl.zeros_like(row) + num_windows, mask=known)
        tl.store(pages + 2 * run, tl.maximum(page_before, 0), mask=known)
        tl.store(pages + 2 * run + 1, tl.maximum(page, 0), mask=known)
        first += block
    tl.debug_barrier()

    # A run's length, from its start and its number of tokens.
    first = 0
    while first < most_runs:
        run = first + step
        exists = (run < most_runs) & (run < run_count)
        start = tl.load(kv_lens + 2 * run, mask=exists, other=-1)
        begin = tl.load(cu_seq_lens + 2 * run, mask=exists, other=0)
        end = tl.load(cu_seq_lens + 2 * run + 1, mask=exists, other=0)
        tl.store(kv_lens + 2 * run, tl.where(start < 0, 0, start + end - begin), mask=exists)
        first += block

    first = 0
    while first < 4 * num_windows:
        word = first + step
        exists = word < 4 * num_windows
        invalid = tl.where(word % 4 == 1, 0, -1)
        value = tl.load(ordered + word, mask=exists & (word < 4 * row_count), other=0)
        value = tl.where(word < 4 * row_count, value, invalid)
        tl.store(windows + word, value, mask=exists)
        first += block

    # The rows that are stored: a request of one token each, and one to skip behind it.
    first = 0
    while first < num_rows:
        entry = first + step
        exists = entry < num_rows
        token = tl.load(rows + 2 * entry, mask=exists, other=-1)
        row = tl.load(rows + 2 * entry + 1, mask=exists, other=-1)
        used = (token >= 0) & (token < num_tokens) & (row >= 0)
        tl.store(store_kv_lens + 2 * entry, tl.where(used, row % ratio + 1, 0), mask=exists)
        tl.store(store_kv_lens + 2 * entry + 1, tl.zeros_like(row), mask=exists)
        tl.store(store_cu_seq_lens + 2 * entry, tl.where(used, token, 0), mask=exists)
        tl.store(store_cu_seq_lens + 2 * entry + 1, tl.where(used, token + 1, 0), mask=exists)
        tl.store(store_table + 2 * entry, tl.where(used, row // ratio, -1), mask=exists)
        tl.store(store_table + 2 * entry + 1, tl.zeros_like(row) - 1, mask=exists)
        first += block
    _fill(store_cu_seq_lens + 2 * num_rows, 0, 1, block)
