"""vLLM's compressor layers in a decode step of 64 requests."""

from __future__ import annotations

import torch

import kvfold
from kvfold.adapters.vllm import CompressorLayer, StepMetadata
from kvfold.bench.adapters.case import HostCase

BATCH = 64
LENGTH = 1024
BLOCK_SIZE = {4: 4, 128: 8}
# name: compress_ratio, head_dim, columns of a row in the cache, format, rounding
LAYERS = {
    "C4": (4, 512, 584, "mixed_584_scale_floor", "codes_from_bf16"),
    "C128": (128, 512, 584, "mixed_584_scale_floor", "codes_from_bf16"),
    "indexer": (4, 128, 132, "fp8_block128_pow2", "before_codes"),
}


def cases(device: torch.device) -> list[HostCase]:
    """A call of each kind of layer. The metadata is made once per step, so it is not timed."""
    return [_case(name, device) for name in LAYERS]


def _case(name: str, device: torch.device) -> HostCase:
    ratio, head_dim, columns, format, rounding = LAYERS[name]
    block_size, rows_per_page = BLOCK_SIZE[ratio], 256 // ratio
    width = head_dim * (2 if ratio == 4 else 1)
    pages = LENGTH // block_size
    kv_score = torch.randn(BATCH, 2 * width, device=device)
    ape = torch.randn(ratio, width, device=device)
    state_cache = torch.zeros(BATCH * pages, block_size, 2 * width, device=device)
    weight = torch.ones(head_dim, device=device, dtype=torch.bfloat16)
    cos_sin_cache = torch.ones(2 * LENGTH, 64, device=device)
    kv_cache = torch.zeros(
        BATCH * LENGTH // 256, rows_per_page, columns, device=device, dtype=torch.uint8
    )
    block_table = torch.arange(BATCH * pages, device=device, dtype=torch.int32).view(BATCH, pages)
    token = torch.arange(BATCH, device=device)
    step = StepMetadata.build(
        torch.arange(BATCH + 1, device=device, dtype=torch.int32),
        torch.full((BATCH,), LENGTH, device=device, dtype=torch.int32),
        block_table,
        (token + 1) * pages * block_size - 1,
        (token + 1) * (LENGTH // ratio) - 1,
        block_size,
        ratio,
        1,
        replays=False,
    )
    layer = CompressorLayer(ape, state_cache, weight, 1e-6, cos_sin_cache, kv_cache, ratio)
    kv, score = state_cache[..., :width], state_cache[..., width:]
    rope_table = cos_sin_cache.unflatten(1, (2, 32))
    cache = kv_cache.flatten(1)
    return HostCase(
        f"decode, {name}",
        lambda: layer.compress_and_store(kv_score, step),
        lambda: kvfold.paged_kv_compress_store(
            kv_score, ape, kv, score, block_table, block_table, step.kv_lens, step.cu_seq_lens,
            step.cu_outputs, weight, rope_table, step.positions, step.slots, cache, ratio, 1, 1e-6,
            rows_per_page, format, torch.float32, rounding=rounding,
        ),
    )  # fmt: skip
