"""What the state ops must do, in float64 and in loops: the contract to read and to test by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Stored = Callable[[int, int, int], bool]  # (start, length, position) -> whether a new row is stored


def expected(
    arguments: Any, most_new: int | None, stored: Stored | None = None
) -> dict[str, Tensor]:
    """paged_kv, paged_score and output as a state op must leave them; changes no argument.

    The results are on the CPU, the state in its own dtype and output in float64. What the op does
    not write is as it was.

    Args:
        arguments: of paged_kv_compress or prefill_compress.
        most_new: new tokens of a request that the op accepts; None for any number.
        stored: which new rows are stored; None for all.
    """
    a = arguments
    kv_score, ape = a.kv_score.cpu(), a.ape.cpu()
    paged_kv, paged_score = (x.to("cpu", copy=True) for x in (a.paged_kv, a.paged_score))
    output = a.output.to("cpu", torch.float64, copy=True)
    tables = a.block_table_kv.tolist(), a.block_table_score.tolist()
    cu_seq_lens, cu_outputs = a.cu_seq_lens.tolist(), a.cu_outputs.tolist()
    num_tokens, max_pages = kv_score.shape[0], a.block_table_kv.shape[1]
    num_pages, page_size, state_dim = paged_kv.shape
    num_outputs, head_dim = output.shape
    overlap = state_dim == 2 * head_dim
    ratio = a.compress_ratio

    def locate(request: int, position: int) -> tuple[int, int, int] | None:
        """Page of the KV, page of the score and slot of a position; None if the row is absent."""
        logical = position // page_size
        if not 0 <= logical < max_pages:
            return None
        page_kv, page_score = (table[request][logical] for table in tables)
        if not (0 <= page_kv < num_pages and 0 <= page_score < num_pages):
            return None
        return page_kv, page_score, position % page_size

    def new_row(token: int, position: int) -> tuple[Tensor, Tensor]:
        """KV and score of a new row as the state holds them."""
        kv, score = kv_score[token].split(state_dim)
        if a.ape_in_state:
            score = score.float() + ape[position % ratio]
        return kv.to(paged_kv.dtype), score.to(paged_score.dtype)

    before_kv, before_score = paged_kv.clone(), paged_score.clone()
    for b, length in enumerate(a.kv_lens.tolist()):
        begin, end = cu_seq_lens[b], cu_seq_lens[b + 1]
        if getattr(a, "new_tokens", None) is not None:
            end = begin + int(a.new_tokens[b])
        new = end - begin
        most = length if most_new is None else min(most_new, length)
        if begin < 0 or end > num_tokens or not 0 <= new <= most:
            continue
        start = length - new

        for t in range(new if a.work != "reduce" else 0):
            row = locate(b, start + t)
            if row is not None and (stored is None or stored(start, length, start + t)):
                page_kv, page_score, slot = row
                kv, score = new_row(begin + t, start + t)
                paged_kv[page_kv, slot], paged_score[page_score, slot] = kv, score

        windows = length // ratio - start // ratio if new and a.work != "store" else 0
        for c in range(windows):
            target = cu_outputs[b] + c
            if not 0 <= target < min(cu_outputs[b + 1], num_outputs):
                continue
            window = start // ratio + c
            own = slice(state_dim - head_dim, state_dim)
            rows = [(window * ratio + i, own) for i in range(ratio)]
            if overlap:
                before = slice(0, head_dim)
                rows = [(position - ratio, before) for position, _ in rows] + rows
            kvs, scores = [], []
            for position, columns in rows:
                row = locate(b, position)
                needs_page = position < start or stored is None or stored(start, length, position)
                if position < 0 or (row is None and needs_page):
                    continue
                if position >= start:
                    kv, score = new_row(begin + position - start, position)
                else:
                    assert row is not None
                    page_kv, page_score, slot = row
                    kv, score = before_kv[page_kv, slot], before_score[page_score, slot]
                if not a.ape_in_state:
                    score = score.float() + ape[position % ratio]
                kvs.append(kv[columns].double())
                scores.append(score[columns].double())
            output[target] = 0
            if kvs:
                score = torch.stack(scores)
                weight = torch.exp(score - score.amax(0))
                output[target] = (torch.stack(kvs) * weight).sum(0) / weight.sum(0)

    return {"paged_kv": paged_kv, "paged_score": paged_score, "output": output}
