"""What TensorRT-LLM's three ops do, in loops: the engine's addresses, counts and formats.

It shares no code with kvfold or its adapter. Rows are computed in float64. Where the engine reads
outside its tensors or is not specified, the oracle does what kvfold promises: a request that makes
no sense is skipped, and a row without a page is absent.
"""

from __future__ import annotations

from types import SimpleNamespace

import format_oracle
import numpy as np
import row_oracle
import torch
from torch import Tensor
from trtllm_memory import Call, copied

PLAIN = {"block": 0, "scale": "none", "floor": 0.0, "floor_on": "amax", "rule": "amax"}
PLAIN |= {"ties": "even", "rope": "quantised", "scale_bytes": 0}


def decode(call: Call) -> tuple[Call, Tensor]:
    """What compressor_paged_kv_compress leaves: the call after it, rows not written; and the rows.

    Returns:
        The rows are [num_outputs, head_dim] float64; NaN for one that no window fills.
    """
    counts = call["new_tokens_per_seq"]
    batch, next_n = call["batch_size"], call["next_n"]
    news = [next_n] * batch if counts is None else counts[:batch].tolist()
    lengths = call["kv_lens"][:batch].tolist()
    spans = []
    for length, new in zip(lengths, news, strict=True):
        spans.append((length - new, new) if 0 <= new <= min(length, next_n) else (0, 0))
    return _reduced(call, spans)


def prefill(call: Call) -> tuple[Call, Tensor]:
    """What compressor_prefill_reduction leaves, as `decode` has it."""
    batch = call["batch_size"]
    starts, lengths = call["start_pos"][:batch].tolist(), call["kv_lens"][:batch].tolist()
    return _reduced(call, [(s, length - s) for s, length in zip(starts, lengths, strict=True)])


def _reduced(call: Call, spans: list[tuple[int, int]]) -> tuple[Call, Tensor]:
    """Stores the new rows of requests of (tokens before the call, new tokens), then reduces.

    A new row counts as the state holds it, which is kvfold's rule for prompts, too.
    """
    done = copied(call, "cpu")
    ratio, head_dim, page_size = call["compress_ratio"], call["head_dim"], call["page_size"]
    overlap = ratio == 4
    state_dim = head_dim * (2 if overlap else 1)
    pools = [done[name].view(-1, page_size, state_dim) for name in ("paged_kv", "paged_score")]
    tables = [done[name].tolist() for name in ("block_table_kv", "block_table_score")]
    kv_score, ape = done["kv_score"], done["ape"]
    begins, targets = done["cu_seq_lens"].tolist(), done["cu_kv_comp"].tolist()
    rows = torch.full((len(done["output"]), head_dim), torch.nan, dtype=torch.float64)

    def place(request: int, position: int) -> tuple[int, int, int] | None:
        column = position // page_size
        if position < 0 or column >= len(tables[0][request]):
            return None
        pages = [table[request][column] for table in tables]
        known = all(0 <= page < len(pool) for page, pool in zip(pages, pools, strict=True))
        return (*pages, position % page_size) if known else None

    for b, (start, new) in enumerate(spans):
        if begins[b] < 0 or begins[b] + new > len(kv_score):
            continue
        for t in range(new):
            if (at := place(b, start + t)) is None:
                continue
            kv, score = kv_score[begins[b] + t].float().split(state_dim)
            pools[0][at[0], at[2]] = kv.to(pools[0].dtype)
            pools[1][at[1], at[2]] = (score + ape[(start + t) % ratio]).to(pools[1].dtype)
        for c in range((start + new) // ratio - start // ratio):
            target = targets[b] + c
            if not 0 <= target < min(targets[b + 1], len(rows)):
                continue
            window = (start // ratio + c) * ratio
            chosen = [(window + r, slice(state_dim - head_dim, None)) for r in range(ratio)]
            if overlap:
                chosen += [(window - ratio + r, slice(0, head_dim)) for r in range(ratio)]
            found = [(at, part) for p, part in chosen if (at := place(b, p)) is not None]
            rows[target] = 0
            if found:
                kv = torch.stack([pools[0][at[0], at[2], part].double() for at, part in found])
                score = torch.stack([pools[1][at[1], at[2], part].double() for at, part in found])
                rows[target] = (kv * score.softmax(0)).sum(0)
    return done, rows


def scatter(call: Call) -> Call:
    """What compressor_postprocess_scatter leaves: the call after it."""
    done = copied(call, "cpu")
    kind, head_dim = call["cache_scale_type"], call["kv_comp"].shape[1]
    per_page, rope_dim = call["tokens_per_block"], call["rope_dim"]
    is_fp32 = call["kv_comp"].dtype == torch.float32
    # The bytes of a row's data and of its scales, and the format of both.
    data_bytes, scale_bytes, fields = [
        (head_dim * (4 if is_fp32 else 2), 0, {"code": "fp32" if is_fp32 else "bf16"}),
        (head_dim, 0, {"code": "fp8_e4m3"}),
        (head_dim, head_dim // 128 * 4, {"code": "fp8_e4m3", "block": 128, "scale": "fp32"}),
        (
            head_dim // 2,
            head_dim // 32,
            {"code": "fp4_e2m1", "block": 32, "scale": "e8m0", "rule": "pow2",
             "floor": 6 * 2.0**-126},
        ),
    ][kind]  # fmt: skip
    page_bytes = per_page * (data_bytes + scale_bytes)

    slots = _slots(call)
    table = done["cos_sin_table"].reshape(-1, 2, rope_dim // 2).numpy()
    positions = done["position_ids"].numpy()
    pages = done["kv_cache"].nbytes // page_bytes
    which = [
        row for row, slot in slots.items()
        if 0 <= slot < pages * per_page and 0 <= positions[row] < len(table)
    ]  # fmt: skip
    if not which:
        return done
    cos, sin = (table[positions[which], part] for part in range(2))
    values = row_oracle.stages(
        done["kv_comp"][which].float().numpy(), done["rms_weight"].float().numpy(), cos, sin,
        call["rms_eps"], "once", call["rotate_activation"],
    ).rows  # fmt: skip
    codes, scales = format_oracle.expected(values, SimpleNamespace(**PLAIN | fields), rope_dim)

    cache = done["kv_cache"].view(torch.uint8).view(-1)
    for row, data, row_scales in zip(which, codes, scales, strict=True):
        page, slot = divmod(slots[row], per_page)
        at = page * page_bytes + slot * data_bytes
        cache[at : at + data_bytes] = torch.from_numpy(data)
        at = page * page_bytes + per_page * data_bytes + slot * scale_bytes
        cache[at : at + scale_bytes] = torch.from_numpy(row_scales)
    if done["kv_out"] is not None:
        rounded = values if done["kv_out"].dtype == torch.float32 else row_oracle.bf16(values)
        done["kv_out"][which] = torch.from_numpy(rounded).to(done["kv_out"].dtype)
    if kind >= 2:
        for name, found in (("quant_output", codes), ("scale_output", scales)):
            if done[name] is not None:
                done[name].view(torch.uint8)[which] = torch.from_numpy(np.ascontiguousarray(found))
    return done


def _slots(call: Call) -> dict[int, int]:
    """Row -> page * tokens_per_block + row of the page, of the rows that are stored."""
    per_page = call["tokens_per_block"]
    outputs, starts = call["num_outputs"].tolist(), call["start_pos"].tolist()
    begins, tables = call["cu_kv_comp"].tolist(), call["block_offsets"].tolist()
    mask = call["compressed_mask"].tolist()
    found = {}
    for row in range(len(call["kv_comp"])):
        for b in range(len(outputs)):
            first, last = (begins[b], begins[b + 1]) if len(outputs) > 1 else (0, row + 1)
            index = starts[b] + row - first
            column = index // per_page
            inside = first <= row < min(last, first + outputs[b])
            if mask[row] and inside and 0 <= column < len(tables[b]) and tables[b][column] >= 0:
                found[row] = tables[b][column] * per_page + index % per_page
    return found
