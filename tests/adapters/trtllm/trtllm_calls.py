"""Random calls of the ops, laid out as the engine has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from state_calls import GUARD, guarded
from torch import Tensor
from trtllm_memory import Call

FLOATS = (torch.bfloat16, torch.float32)
POISON = 1234567


def ints(x: Sequence[int] | np.ndarray, before: int = 0, after: int = 0) -> Tensor:
    """int32 values, as a part of a longer vector between guards."""
    whole = [POISON] * before + list(map(int, np.asarray(x))) + [POISON] * after
    tensor = guarded(torch.tensor(whole, dtype=torch.int32), odd=True)
    return tensor[before : before + len(x)]


def table(rng: np.random.Generator, pages: list[list[int]], more_rows: int, more: int) -> Tensor:
    """A block table whose unused columns are -1, and whose last rows belong to no request."""
    width = max(map(len, pages), default=0) + more
    rows = [row + [-1] * (width - len(row)) for row in pages]
    rows += [[POISON] * width] * more_rows
    return guarded(torch.tensor(rows, dtype=torch.int32).view(len(rows), width))


def state_call(
    spans: Sequence[tuple[int, int]],
    *,
    ratio: int = 4,
    head_dim: int = 128,
    page_size: int = 8,
    kv_dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype = torch.bfloat16,
    reserve: int | None = None,
    two_dimensional: bool = False,
    contexts: tuple[int, int] = (0, 0),
    longer: int = 0,
    seed: int = 0,
) -> Call:
    """The arguments that decode and prefill share, up to compress_ratio.

    The state of the tokens before the call is random, and the rest of the pools is NaN. Pages are
    shuffled, those of the scores otherwise than those of the KV.

    Args:
        spans: each request's (tokens before the call, new tokens).
        reserve: output rows per request; None: those that it fills.
        two_dimensional: the pools are [num_pages, page_size * state_dim].
        contexts: rows of kv_score, and of output, that are before those of the requests.
        longer: elements and rows of tables, lengths and prefix sums behind those of the batch.
    """
    rng = np.random.default_rng(seed)
    batch, state_dim = len(spans), head_dim * (2 if ratio == 4 else 1)
    lengths = [start + new for start, new in spans]
    filled = [(start + new) // ratio - start // ratio for start, new in spans]
    reserved = filled if reserve is None else [reserve] * batch
    per_request = [-(-length // page_size) for length in lengths]
    num_pages = sum(per_request) + 2

    def randn(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    pools, tables = [], []
    for _ in range(2):
        pages = rng.permutation(num_pages)[: sum(per_request)].tolist()
        rows = [[pages.pop() for _ in range(count)] for count in per_request]
        pool = torch.full((num_pages, page_size, state_dim), torch.nan)
        for row, (start, _) in zip(rows, spans, strict=True):
            position = np.arange(start)
            if start:
                at = np.array(row)[position // page_size], position % page_size
                pool[at] = randn(start, state_dim)
        pool = pool.view(num_pages, -1) if two_dimensional else pool
        pools.append(guarded(pool.to(state_dtype)))
        tables.append(table(rng, rows, longer, 1 + longer))
    num_tokens = contexts[0] + sum(new for _, new in spans) + longer
    num_outputs = contexts[1] + sum(reserved) + longer
    return {
        "kv_score": guarded(randn(num_tokens, 2 * state_dim).to(kv_dtype)),
        "ape": guarded(randn(ratio, state_dim)),
        "paged_kv": pools[0],
        "paged_score": pools[1],
        "block_table_kv": tables[0],
        "block_table_score": tables[1],
        "output": guarded(randn(num_outputs, head_dim).to(output_dtype)),
        "kv_lens": ints(lengths + [POISON] * longer),
        "cu_seq_lens": ints(
            np.cumsum([contexts[0]] + [new for _, new in spans] + [1] * longer), before=1
        ),
        "cu_kv_comp": ints(np.cumsum([contexts[1], *reserved] + [1] * longer), before=1),
        "batch_size": batch,
        "page_size": page_size,
        "head_dim": head_dim,
        "compress_ratio": ratio,
    }


def decode_call(
    starts: Sequence[int],
    next_n: int,
    counts: Sequence[int] | None = None,
    **layout,
) -> Call:
    """A call of compressor_paged_kv_compress; counts are new_tokens_per_seq."""
    news = [next_n] * len(starts) if counts is None else counts
    call = state_call(list(zip(starts, news, strict=True)), **layout)
    call["next_n"] = next_n
    call["new_tokens_per_seq"] = None
    if counts is not None:
        call["new_tokens_per_seq"] = ints(list(counts) + [POISON] * layout.get("longer", 0))
    return call


def prefill_call(spans: Sequence[tuple[int, int]], **layout) -> Call:
    """A call of compressor_prefill_reduction."""
    call = state_call(spans, **layout)
    starts = ints([start for start, _ in spans])
    names = list(call)
    at = names.index("kv_lens") + 1
    ratio = call["compress_ratio"]
    most = max([(start + new) // ratio - start // ratio for start, new in spans], default=0)
    return (
        {name: call[name] for name in names[:at]}
        | {"start_pos": starts}
        | {name: call[name] for name in names[at:]}
        | {"max_outputs": most}
    )


def scatter_call(
    requests: Sequence[tuple[int, int, int]],
    *,
    kind: int = 0,
    head_dim: int = 128,
    rope_dim: int = 64,
    per_page: int = 4,
    rows_dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    rotate: bool = False,
    outputs: bool = False,
    masked: float = 0.0,
    first_row: int = 0,
    longer: int = 0,
    cache_dtype: torch.dtype = torch.uint8,
    flat_table: bool = False,
    max_pos: int = 64,
    seed: int = 0,
) -> Call:
    """A call of compressor_postprocess_scatter. The cache holds random bytes between guards.

    Args:
        requests: each one's (rows in the cache, rows that are stored, rows that are reserved).
        outputs: the optional outputs are there.
        masked: about this share of the rows is masked.
        first_row: rows before those of the first request.
        longer: elements and rows of vectors and tables behind those that are needed.
        flat_table: cos_sin_table is [max_pos, rope_dim].
    """
    rng = np.random.default_rng(seed)
    num_rows = first_row + sum(reserved for _, _, reserved in requests)
    data_bytes = [rows_dtype.itemsize * head_dim, head_dim, head_dim, head_dim // 2][kind]
    scale_bytes = [0, 0, head_dim // 128 * 4, head_dim // 32][kind]
    page_bytes = per_page * (data_bytes + scale_bytes)
    per_request = [-(-(start + new) // per_page) for start, new, _ in requests]
    num_pages = sum(per_request) + 2
    pages = rng.permutation(num_pages)[: sum(per_request)].tolist()
    rows = [[pages.pop() for _ in range(count)] for count in per_request]

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return guarded(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype))

    def noise(*shape: int) -> Tensor:
        whole = torch.from_numpy(
            rng.integers(0, 256, int(np.prod(shape)) + 2 * GUARD, dtype=np.uint8)
        )
        return whole[GUARD:-GUARD].view(shape)

    cache = noise(num_pages, page_bytes).view(cache_dtype)
    table_shape = (max_pos, rope_dim) if flat_table else (max_pos, 2, rope_dim // 2)
    position_ids = rng.integers(0, max_pos, num_rows + longer)
    mask = torch.from_numpy(rng.random(num_rows + longer) >= masked)
    quantised = outputs and kind >= 2
    scales = noise(num_rows, scale_bytes)
    reserved = [one for _, _, one in requests]
    return {
        "kv_comp": floats(num_rows, head_dim, dtype=rows_dtype),
        "kv_out": floats(num_rows, head_dim, dtype=rows_dtype) if outputs else None,
        "rms_weight": floats(head_dim, dtype=weight_dtype or rows_dtype),
        "rms_eps": 1e-6,
        "cos_sin_table": floats(*table_shape),
        "position_ids": ints(position_ids),
        "nope_dim": head_dim - rope_dim,
        "rope_dim": rope_dim,
        "kv_cache": cache,
        "num_outputs": ints([new for _, new, _ in requests]),
        "cu_kv_comp": ints(np.cumsum([first_row, *reserved] + [1] * longer), before=1),
        "start_pos": ints([start for start, _, _ in requests]),
        "block_offsets": table(rng, rows, longer, longer),
        "compressed_mask": mask,
        "tokens_per_block": per_page,
        "cache_scale_type": kind,
        "rotate_activation": rotate,
        "quant_output": noise(num_rows, data_bytes) if quantised else None,
        "scale_output": (scales.view(torch.float32) if kind == 2 else scales)
        if quantised
        else None,
    }
