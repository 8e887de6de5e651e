"""Looks for metadata that paged_kv_compress would pass over in silence."""

from __future__ import annotations

from torch import Tensor

from kvfold.ops.paged_kv_compress.op import OP, check_arguments


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
) -> None:
    """Checks the arguments of `paged_kv_compress` and what the metadata in them says.

    The op itself never reads or writes outside its tensors, whatever the metadata: it skips what
    it cannot place. This finds what it would skip. Synchronises; changes nothing.

    Raises:
        ValueError: an argument as the op raises it, or metadata: request, field, value.
    """
    check_arguments(
        kv_score, ape, paged_kv, paged_score, block_table_kv, block_table_score, output,
        kv_lens, cu_seq_lens, cu_outputs, compress_ratio, next_n,
    )  # fmt: skip
    num_tokens, num_outputs = kv_score.shape[0], output.shape[0]
    num_pages, page_size, state_dim = paged_kv.shape
    max_pages = block_table_kv.shape[1]
    overlap = state_dim != output.shape[1]
    tokens, outputs = cu_seq_lens.tolist(), cu_outputs.tolist()
    tables = {"block_table_kv": block_table_kv.cpu(), "block_table_score": block_table_score.cpu()}

    for request, length in enumerate(kv_lens.tolist()):
        begin, end = tokens[request : request + 2]
        new = end - begin
        start = length - new
        if begin < 0 or end > num_tokens:
            _refuse(request, "cu_seq_lens", [begin, end], f"within 0 .. num_tokens = {num_tokens}")
        if not 0 <= new <= next_n:
            _refuse(request, "cu_seq_lens", [begin, end], f"0 .. next_n = {next_n} new tokens")
        if start < 0:
            _refuse(request, "kv_lens", length, f">= its {new} new tokens")
        if not new:
            continue

        closed = length // compress_ratio - start // compress_ratio
        first, limit = outputs[request : request + 2]
        if closed and (first < 0 or first + closed > min(limit, num_outputs)):
            rows = f"{closed} rows within 0 .. num_outputs = {num_outputs}"
            _refuse(request, "cu_outputs", [first, limit], rows)

        if length > max_pages * page_size:
            most = f"<= max_pages * page_size = {max_pages * page_size}"
            _refuse(request, "kv_lens", length, most)
        # The oldest row that is read or written: a window's first, where one closes.
        window = start // compress_ratio - int(overlap)
        oldest = max(0, window * compress_ratio) if closed else start
        pages = slice(oldest // page_size, (length - 1) // page_size + 1)
        for field, table in tables.items():
            used = table[request, pages]
            wrong = ((used < 0) | (used >= num_pages)).nonzero()
            if len(wrong):
                page = pages.start + int(wrong[0])
                value = int(table[request, page])
                legal = f"0 .. num_pages - 1 = {num_pages - 1}"
                _refuse(request, f"{field}[{request}, {page}]", value, legal)


def _refuse(request: int, field: str, value: object, accepted: str):
    raise ValueError(f"kvfold.{OP}: request {request}: {field} is {value}; accepted: {accepted}")
