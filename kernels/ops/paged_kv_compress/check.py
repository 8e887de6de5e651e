"""Finds metadata that paged_kv_compress would pass over in silence."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from kvfold.ops.paged_kv_compress.spec import SPEC, Arguments
from kvfold.runtime.arguments import check as check_arguments


def check(
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
    *,
    ape_in_state: bool = True,
    work: str = "all",
    new_tokens: Tensor | None = None,
) -> None:
    """Checks the arguments of `paged_kv_compress` and the metadata in them.

    The op never reads or writes outside its tensors, whatever the metadata: it skips what it cannot
    place. This function finds what the op would skip, pages that two requests both write, and rows
    of the state that a call must not write: one for two new tokens, or with work "all" one that a
    window of the call reads. It synchronises and changes nothing.

    Args:
        as those of `paged_kv_compress`. Only what the steps of `work` need is checked.

    Raises:
        ValueError: an argument as the op raises it; or metadata: request, field, value.
    """
    arguments = Arguments(
        kv_score, ape, paged_kv, paged_score, block_table_kv, block_table_score, output, kv_lens,
        cu_seq_lens, cu_outputs, compress_ratio, next_n, ape_in_state=ape_in_state, work=work,
        new_tokens=new_tokens,
    )  # fmt: skip
    call = check_arguments(SPEC, arguments)
    num_pages, page_size = call.dimensions["num_pages"], call.dimensions["page_size"]
    max_pages = call.dimensions["max_pages"]
    overlap = call.dimensions["state_dim"] != call.dimensions["head_dim"]
    stores, reduces = work != "reduce", work != "store"
    tokens, outputs = cu_seq_lens.tolist(), cu_outputs.tolist()
    counts = None if new_tokens is None else new_tokens.tolist()
    tables = {"block_table_kv": block_table_kv.cpu(), "block_table_score": block_table_score.cpu()}
    one_pool = paged_kv.data_ptr() == paged_score.data_ptr()
    # (table, or none if both name pages of one pool; physical page) -> table and request
    writers: dict[tuple[str, int], tuple[str, int]] = {}

    for request, length in enumerate(kv_lens.tolist()):
        begin, end = tokens[request : request + 2]
        if counts is not None:
            end = begin + counts[request]
        new, start = end - begin, length - (end - begin)
        if begin < 0 or end > kv_score.shape[0]:
            accepted = f"within 0 .. num_tokens = {kv_score.shape[0]}"
            _refuse(request, "cu_seq_lens", [begin, end], accepted)
        if not 0 <= new <= next_n:
            field, value = ("cu_seq_lens", [begin, end]) if counts is None else ("new_tokens", new)
            _refuse(request, field, value, f"0 .. next_n = {next_n} new tokens")
        if not new:
            continue
        if start < 0:
            _refuse(request, "kv_lens", length, f">= its {new} new tokens")
        if length > max_pages * page_size:
            accepted = f"<= max_pages * page_size = {max_pages * page_size}"
            _refuse(request, "kv_lens", length, accepted)

        closed = length // compress_ratio - start // compress_ratio if reduces else 0
        first, limit = outputs[request : request + 2]
        if closed and (first < 0 or first + closed > min(limit, output.shape[0])):
            accepted = f"{closed} or more rows within 0 .. num_outputs = {output.shape[0]}"
            _refuse(request, "cu_outputs", [first, limit], accepted)

        # The rows that are read or written. If a window closes, its first is the oldest.
        window = start // compress_ratio - int(overlap)
        oldest = max(0, window * compress_ratio) if closed else start
        newest = (length if stores else length // compress_ratio * compress_ratio) - 1
        if newest < oldest:
            continue
        pages = range(oldest // page_size, newest // page_size + 1)
        for name, table in tables.items():
            found = table[request, pages.start : pages.stop].tolist()
            physicals = dict(zip(pages, found, strict=True))
            for page, physical in physicals.items():
                field = f"{name}[{request}, {page}]"
                if not 0 <= physical < num_pages:
                    _refuse(request, field, physical, f"0 .. num_pages - 1 = {num_pages - 1}")
                if stores and page >= start // page_size:  # the request writes to it
                    writer, pool = (name, request), "" if one_pool else name
                    other = writers.setdefault((pool, physical), writer)
                    if other != writer:
                        accepted = f"a page of its own: request {other[1]} writes this one too"
                        _refuse(request, field, physical, accepted)
            if stores:
                _check_rows(request, name, physicals, page_size, range(oldest, start), newest)


def _check_rows(
    request: int, table: str, physicals: dict[int, int], page_size: int, read: range, newest: int
) -> None:
    """Refuses a new row in the place of one that is read or of another new row.

    Args:
        physicals: logical page -> physical page.
        read: positions of old rows that are read. The new ones follow, up to `newest`.
    """
    places: dict[tuple[int, int], int] = {}  # physical page and slot -> position
    for position in range(read.start, newest + 1):
        page, slot = divmod(position, page_size)
        other = places.setdefault((physicals[page], slot), position)
        if read.stop <= position != other:
            accepted = f"a page without the row of position {other}, which this call stores too"
            if other in read:
                accepted = (
                    f"a page without the row of position {other}, which a window reads; or a call"
                    ' with work "reduce", then one with "store"'
                )
            field = f"{table}[{request}, {page}], with the row of position {position},"
            _refuse(request, field, physicals[page], accepted)


def _refuse(request: int, field: str, value: object, accepted: str) -> NoReturn:
    raise ValueError(
        f"kvfold.{SPEC.name}: request {request}: {field} is {value}; accepted: {accepted}"
    )
