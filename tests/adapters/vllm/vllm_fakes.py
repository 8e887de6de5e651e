"""Modules in the place of vLLM's: what of vLLM 0.33 the patch uses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm_engine import EPS, Batch, Layer


@dataclass
class ForwardContext:
    """Of one forward of the model."""

    attn_metadata: Any
    additional_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class CompressorMetadata:
    block_table: Tensor
    slot_mapping: Tensor
    block_size: int


class CompressorMetadataBuilder:
    def __init__(self, block_size: int, shards: int = 1) -> None:
        self.block_size = block_size
        parallel = SimpleNamespace(prefill_context_parallel_size=shards)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CompressorMetadata:
        common = common_attn_metadata
        return CompressorMetadata(
            common.block_table_tensor.clamp_(min=0), common.slot_mapping, self.block_size
        )


class DeepseekCompressor(nn.Module):
    def __init__(self, layer: Layer, name: str, k_cache: nn.Module) -> None:
        super().__init__()
        self.compress_ratio = layer.kind.compress_ratio
        self.head_dim = layer.kind.head_dim
        self.use_fp4_cache = layer.kind.format == "mxfp4"
        self.rms_norm_eps = EPS
        self.k_cache_prefix = f"{name}.k_cache"
        self.ape = nn.Parameter(layer.ape, requires_grad=False)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(layer.weight)  # it requires a gradient
        self.state_cache = nn.Module()
        self.state_cache.prefix = f"{name}.state_cache"
        self.state_cache.kv_cache = layer.state_cache
        self._static_forward_context = {self.k_cache_prefix: k_cache}

    def forward(self, kv_score: Tensor, positions: Tensor, rotary_emb: Any) -> None:
        raise AssertionError("vLLM's own kernels")

    def _compress_norm_rope_store(self) -> None: ...


def make_compressor(layer: Layer, name: str, cls: type = DeepseekCompressor) -> Any:
    """A compressor on the tensors of a layer."""
    k_cache = nn.Module()
    k_cache.kv_cache = layer.kv_cache
    if layer.fp8_scale is not None:
        k_cache.register_buffer("_flashinfer_fp8_kv_scale", layer.fp8_scale, persistent=False)
    return cls(layer, name, k_cache)


def make_rotary_emb(layer: Layer) -> nn.Module:
    rotary_emb = nn.Module()
    rotary_emb.register_buffer("cos_sin_cache", layer.cos_sin_cache, persistent=False)
    return rotary_emb


def common_metadata(batch: Batch) -> SimpleNamespace:
    """What vLLM's runner hands to a builder, with -1 where a table has no page."""
    table = batch.block_table
    return SimpleNamespace(
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        max_query_len=batch.max_query_len,
        block_table_tensor=torch.where(table == 0, -1, table),
        slot_mapping=batch.slot_mapping,
    )


@dataclass
class FakeVllm:
    """The installed modules.

    Attributes:
        context: what vllm.forward_context.get_forward_context returns.
        mx_scales: what vllm.utils.deep_gemm.mqa_logits_use_mx_scales returns.
    """

    compressor: ModuleType
    context: ForwardContext | None = None
    mx_scales: bool = False


@contextlib.contextmanager
def installed() -> Iterator[FakeVllm]:
    """Lets `import vllm...` find the modules of this file."""
    modules = {}
    for name in ("vllm", "vllm.models", "vllm.models.deepseek_v4", "vllm.utils",
                 "vllm.forward_context", "vllm.utils.deep_gemm",
                 "vllm.models.deepseek_v4.compressor"):  # fmt: skip
        modules[name] = ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    compressor = modules["vllm.models.deepseek_v4.compressor"]
    fake = FakeVllm(compressor)
    classes = (DeepseekCompressor, CompressorMetadataBuilder)
    originals = [(one, dict(vars(one))) for one in classes]
    for one in classes:
        setattr(compressor, one.__name__, one)
    modules["vllm.forward_context"].get_forward_context = lambda: fake.context
    modules["vllm.utils.deep_gemm"].mqa_logits_use_mx_scales = lambda: fake.mx_scales
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield fake
    finally:
        # A patch that a failed test leaves in force must not spoil another one.
        for one, attributes in originals:
            for name in ("forward", "build"):
                if name in attributes:
                    setattr(one, name, attributes[name])
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
