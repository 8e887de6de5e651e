"""Calls of TensorRT-LLM's ops, as a layer makes them in a decode step of 64 requests.

An engine calls torch.ops.trtllm, and torch's dispatcher takes the same time for an op of any
library. So these calls are compared with torch.ops.kvfold, and the adapter's functions with
kvfold's.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import kvfold
import kvfold.adapters.trtllm as trtllm
import kvfold.torch_ops  # registers torch.ops.kvfold
from kvfold.bench.adapters.case import HostCase

BATCH = 64
MORE = 64  # requests that the engine's tables have room for, beyond the batch
NEXT_N = 4
STATE_PAGE = 128  # tokens
TOKENS = 2048  # per request
CACHES = {0: "bf16", 1: "fp8_tensor", 2: "fp8_block128", 3: "mxfp4"}  # cache_scale_type: format


def cases(device: torch.device) -> list[HostCase]:
    """Decode and the way to the cache: at ratios 128 and 4, and for every cache type."""
    found = [case for ratio in (128, 4) for case in _decode(ratio, device)]
    return found + [case for kind in CACHES for case in _scatter(kind, device)]


def _in_a_step(op: Callable[..., None], arguments: tuple[Any, ...]) -> Callable[[], None]:
    """A call that is always in one step, as one of its layers. Its caller is not in the step."""
    context = contextvars.copy_context()
    context.run(trtllm.step().__enter__)
    return lambda: context.run(op, *arguments)


def _decode(ratio: int, device: torch.device) -> Iterator[HostCase]:
    head_dim = 512
    state_dim = head_dim * (2 if ratio == 4 else 1)
    pages = TOKENS // STATE_PAGE

    def ints(x: Tensor) -> Tensor:
        return x.to(device, torch.int32)

    kv_score = torch.randn(BATCH * NEXT_N, 2 * state_dim, device=device, dtype=torch.bfloat16)
    ape = torch.randn(ratio, state_dim, device=device)
    pools = [torch.zeros(BATCH * pages, STATE_PAGE, state_dim, device=device) for _ in range(2)]
    table = torch.full((BATCH + MORE, pages), -1)
    table[:BATCH] = torch.arange(BATCH * pages).view(BATCH, pages)
    tables = [ints(table), ints(table)]
    output = torch.empty(BATCH, head_dim, device=device, dtype=torch.bfloat16)
    kv_lens = ints(torch.full((BATCH,), TOKENS))
    cu_seq_lens = ints(torch.arange(BATCH + MORE + 1) * NEXT_N)
    cu_kv_comp = ints(torch.arange(BATCH + MORE + 1))
    theirs: tuple[Any, ...] = (
        kv_score, ape, *pools, *tables, output, kv_lens, cu_seq_lens, cu_kv_comp, BATCH,
        STATE_PAGE, head_dim, ratio, NEXT_N,
    )  # fmt: skip
    ours: tuple[Any, ...] = (
        kv_score, ape, *pools, tables[0][:BATCH], tables[1][:BATCH], output, kv_lens,
        cu_seq_lens[: BATCH + 1], cu_kv_comp[: BATCH + 1], ratio, NEXT_N,
    )  # fmt: skip
    new_tokens = ints(torch.full((BATCH,), NEXT_N))
    yield HostCase(
        f"decode, ratio {ratio}, torch.ops",
        _in_a_step(torch.ops.trtllm.compressor_paged_kv_compress, theirs),
        lambda: torch.ops.kvfold.paged_kv_compress(*ours, new_tokens=new_tokens),
    )
    yield HostCase(
        f"decode, ratio {ratio}, function",
        _in_a_step(trtllm.compressor_paged_kv_compress, theirs),
        lambda: kvfold.paged_kv_compress(*ours, new_tokens=new_tokens),
    )


def _scatter(kind: int, device: torch.device) -> Iterator[HostCase]:
    is_indexer = kind >= 2
    head_dim, rope_dim, per_page = 128 if is_indexer else 512, 64, 32
    data_bytes = [2 * head_dim, head_dim, head_dim, head_dim // 2][kind]
    scale_bytes = [0, 0, head_dim // 128 * 4, head_dim // 32][kind]
    pages = TOKENS // 4 // per_page

    def ints(x: Tensor) -> Tensor:
        return x.to(device, torch.int32)

    rows = torch.randn(BATCH, head_dim, device=device, dtype=torch.bfloat16)
    weight = torch.ones(head_dim, device=device, dtype=torch.bfloat16)
    rope_table = torch.randn(TOKENS, 2, rope_dim // 2, device=device)
    positions = ints(torch.full((BATCH,), TOKENS - 4))
    cache = torch.zeros(
        BATCH * pages, per_page, data_bytes + scale_bytes, device=device, dtype=torch.uint8
    )
    codes = scales = None
    if is_indexer:
        codes = torch.empty(BATCH, data_bytes, device=device, dtype=torch.uint8)
        scales = torch.empty(BATCH, scale_bytes, device=device, dtype=torch.uint8)
    table = torch.full((BATCH + MORE, pages), -1)
    table[:BATCH] = torch.arange(BATCH * pages).view(BATCH, pages)
    theirs: tuple[Any, ...] = (
        rows, None, weight, 1e-6, rope_table, positions, head_dim - rope_dim, rope_dim, cache,
        ints(torch.ones(BATCH)), ints(torch.arange(BATCH + MORE + 1)),
        ints(torch.full((BATCH,), TOKENS // 4 - 1)), ints(table),
        torch.ones(BATCH, device=device, dtype=torch.bool), per_page, kind, False, codes,
        scales if kind != 2 or scales is None else scales.view(torch.float32),
    )  # fmt: skip
    slots = torch.arange(1, BATCH + 1, device=device) * pages * per_page - 1
    ours: tuple[Any, ...] = (
        rows, weight, rope_table, positions, slots, cache.view(BATCH * pages, -1), 1e-6, per_page,
        CACHES[kind],
    )  # fmt: skip
    yield HostCase(
        f"postprocess, type {kind}, torch.ops",
        _in_a_step(torch.ops.trtllm.compressor_postprocess_scatter, theirs),
        lambda: torch.ops.kvfold.norm_rope_store(*ours, codes_out=codes, scales_out=scales),
    )
    yield HostCase(
        f"postprocess, type {kind}, function",
        _in_a_step(trtllm.compressor_postprocess_scatter, theirs),
        lambda: kvfold.norm_rope_store(*ours, codes_out=codes, scales_out=scales),
    )
