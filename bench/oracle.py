"""What paged_kv_compress must do, in float64 and in loops: the contract to read and to test by."""

import torch
from torch import Tensor


def expected(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns paged_kv, paged_score and output as the op must leave them; writes no argument.

    Takes the op's arguments, on any device. The results are on the CPU, the state in its own dtype
    and output in float64; what the op does not write is as it was.
    """
    kv_score, ape = kv_score.cpu(), ape.cpu()
    paged_kv, paged_score = (x.to("cpu", copy=True) for x in (paged_kv, paged_score))
    output = output.to("cpu", torch.float64, copy=True)
    tables = block_table_kv.tolist(), block_table_score.tolist()
    kv_lens, cu_seq_lens, cu_outputs = kv_lens.tolist(), cu_seq_lens.tolist(), cu_outputs.tolist()
    num_tokens, max_pages = kv_score.shape[0], block_table_kv.shape[1]
    num_pages, page_size, state_dim = paged_kv.shape
    num_outputs, head_dim = output.shape
    overlap = state_dim == 2 * head_dim

    def locate(request: int, position: int) -> tuple[int, int, int] | None:
        """Page of the KV, page of the score and slot of a position, None if the row is absent."""
        logical = position // page_size
        if not 0 <= logical < max_pages:
            return None
        page_kv, page_score = (table[request][logical] for table in tables)
        if not (0 <= page_kv < num_pages and 0 <= page_score < num_pages):
            return None
        return page_kv, page_score, position % page_size

    for b, length in enumerate(kv_lens):
        begin, end = cu_seq_lens[b], cu_seq_lens[b + 1]
        new = end - begin
        if begin < 0 or end > num_tokens or not 0 <= new <= min(next_n, length):
            continue
        start = length - new

        for t in range(new):
            row = locate(b, start + t)
            if row is None:
                continue
            page_kv, page_score, slot = row
            kv, score = kv_score[begin + t].split(state_dim)
            paged_kv[page_kv, slot] = kv.to(paged_kv.dtype)
            score = score.float() + ape[(start + t) % compress_ratio]
            paged_score[page_score, slot] = score.to(paged_score.dtype)

        for c in range(length // compress_ratio - start // compress_ratio):
            target = cu_outputs[b] + c
            if not 0 <= target < min(cu_outputs[b + 1], num_outputs):
                continue
            window = start // compress_ratio + c
            own = slice(state_dim - head_dim, state_dim)
            rows = [(window * compress_ratio + i, own) for i in range(compress_ratio)]
            if overlap:
                before = slice(0, head_dim)
                rows = [(position - compress_ratio, before) for position, _ in rows] + rows
            kvs, scores = [], []
            for position, columns in rows:
                row = locate(b, position)
                if row is not None:
                    page_kv, page_score, slot = row
                    kvs.append(paged_kv[page_kv, slot, columns].double())
                    scores.append(paged_score[page_score, slot, columns].double())
            output[target] = 0
            if kvs:
                score = torch.stack(scores)
                weight = torch.exp(score - score.amax(0))
                output[target] = (torch.stack(kvs) * weight).sum(0) / weight.sum(0)

    return paged_kv, paged_score, output
