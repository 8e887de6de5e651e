"""kvfold in the place of vLLM's compressor kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.adapters.vllm.layer import CompressorLayer
from kvfold.adapters.vllm.step_metadata import StepMetadata
from kvfold.runtime.arguments import refuse

_FORWARD = ["self", "kv_score", "positions", "rotary_emb"]
_BUILD = ["self", "common_prefix_len", "common_attn_metadata", "fast_build"]

_originals: list[tuple[type, str, Callable[..., Any]]] = []


class _Batch(NamedTuple):
    """What vLLM's CompressorMetadata does not keep of a batch."""

    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int


class _Bound(NamedTuple):
    """vLLM's layers of a compressor's state and of its cache, and kvfold's on their tensors."""

    state: Any
    cache: Any
    layer: CompressorLayer


class _Shared(NamedTuple):
    """A step, and the metadata that it was made of."""

    state_metadata: Any
    cache_metadata: Any
    step: StepMetadata


def patch() -> None:
    """Lets kvfold do the work of vLLM's DeepseekCompressor, in this process.

    Call it before vLLM captures CUDA graphs, in every worker: in a function that a package names
    as an entry point of the group "vllm.general_plugins". A second call does nothing.

    Raises:
        ImportError: vLLM, or its model deepseek_v4, is not installed.
        ValueError: the installed vLLM has other functions than version 0.33.
    """
    from vllm.forward_context import (  # pyright: ignore[reportMissingImports]
        get_forward_context,
    )
    from vllm.models.deepseek_v4 import (  # pyright: ignore[reportMissingImports]
        compressor,
    )

    if _originals:
        return
    targets = [
        (compressor.DeepseekCompressor, "forward", _FORWARD),
        (compressor.CompressorMetadataBuilder, "build", _BUILD),
    ]
    for owner, name, accepted in targets:
        found = list(inspect.signature(getattr(owner, name)).parameters)
        if found != accepted:
            value = f"a function of ({', '.join(found)})"
            refuse("adapters.vllm.patch", f"{owner.__name__}.{name}", value, ", ".join(accepted))
    _originals.extend((owner, name, getattr(owner, name)) for owner, name, _ in targets)
    compressor.DeepseekCompressor.forward = _forward(
        get_forward_context, compressor.DeepseekCompressor._compress_norm_rope_store
    )
    compressor.CompressorMetadataBuilder.build = _build(compressor.CompressorMetadataBuilder.build)


def unpatch() -> None:
    """Takes back `patch`."""
    for owner, name, original in _originals:
        setattr(owner, name, original)
    _originals.clear()


def _build(original: Callable[..., Any]) -> Callable[..., Any]:
    """CompressorMetadataBuilder.build that keeps a _Batch in its result."""

    def build(
        self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        shards = self.vllm_config.parallel_config.prefill_context_parallel_size
        if shards != 1:
            refuse("adapters.vllm", "prefill_context_parallel_size", shards, "1")
        metadata = original(self, common_prefix_len, common_attn_metadata, fast_build)
        metadata.kvfold_batch = _Batch(
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            common_attn_metadata.max_query_len,
        )
        return metadata

    return build


def _forward(get_forward_context: Callable[[], Any], store: Any) -> Callable[..., None]:
    """DeepseekCompressor.forward by kvfold. `store` is the class's own way to the cache."""

    def forward(self: Any, kv_score: Tensor, positions: Tensor, rotary_emb: Any) -> None:
        context = get_forward_context()
        metadata = context.attn_metadata
        if not isinstance(metadata, dict):  # a profiling run
            return
        bound = self.__dict__.get("kvfold_bound")
        # Both caches are bound once memory is known, and again if it is allocated anew.
        if (
            bound is None
            or bound.layer.state_cache is not bound.state.kv_cache
            or bound.layer.kv_cache is not bound.cache.kv_cache
        ):
            bound = self.kvfold_bound = _bind(self, rotary_emb, store)
        step = _step(
            context,
            metadata[bound.state.prefix],
            metadata[self.k_cache_prefix],
            self.compress_ratio,
        )
        bound.layer.compress_and_store(kv_score, step)

    return forward


def _bind(compressor: Any, rotary_emb: Any, store: Any) -> _Bound:
    """The CompressorLayer of a DeepseekCompressor."""
    from vllm.utils.deep_gemm import (  # pyright: ignore[reportMissingImports]
        mqa_logits_use_mx_scales,
    )

    if type(compressor)._compress_norm_rope_store is not store:
        value = f"a {type(compressor).__name__}, which has a cache layout of its own"
        refuse("adapters.vllm", "DeepseekCompressor", value, "DeepseekCompressor itself")
    if compressor.head_dim == 128 and not compressor.use_fp4_cache and mqa_logits_use_mx_scales():
        value = "fp8 with a scale of four equal e8m0 bytes (MX scales, sm_100)"
        refuse("adapters.vllm", "the indexer's cache", value, "fp8 with an fp32 scale, or fp4")
    state = compressor.state_cache
    cache = compressor._static_forward_context[compressor.k_cache_prefix]
    layer = CompressorLayer(
        compressor.ape,
        state.kv_cache,
        compressor.norm.weight,
        compressor.rms_norm_eps,
        rotary_emb.cos_sin_cache,
        cache.kv_cache,
        compressor.compress_ratio,
        fp8_scale=(
            getattr(cache, "_flashinfer_fp8_kv_scale", None)
            if cache.kv_cache.dtype == torch.float8_e4m3fn
            else None
        ),
    )
    return _Bound(state, cache, layer)


def _step(context: Any, state: Any, cache: Any, compress_ratio: int) -> StepMetadata:
    """The metadata of a layer's group. The group's first layer in a forward makes it.

    It belongs to the forward and not to vLLM's metadata, which is updated in place between the
    forwards of drafts. In a CUDA graph it is captured with the first layer, and made anew in each
    replay.
    """
    known = context.__dict__.setdefault("kvfold_steps", [])
    for shared in known:
        if shared.state_metadata is state and shared.cache_metadata is cache:
            return shared.step
    batch = state.kvfold_batch
    step = StepMetadata.build(
        batch.query_start_loc,
        batch.seq_lens,
        state.block_table,
        state.slot_mapping,
        cache.slot_mapping,
        state.block_size,
        compress_ratio,
        batch.max_query_len,
        # vLLM 0.33 replays tokens in DeepSeek-V4.1 only. A dummy request has no slots at all.
        replays=False,
    )
    known.append(_Shared(state, cache, step))
    return step
