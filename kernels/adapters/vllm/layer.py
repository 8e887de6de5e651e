"""A compressor layer: views of vLLM's tensors, and one launch per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.vllm.step_metadata import StepMetadata
from kvfold.ops.paged_kv_compress_store.op import paged_kv_compress_store
from kvfold.ops.prefill_compress_store.op import prefill_compress_store
from kvfold.runtime.arguments import refuse

# (head_dim, dtype of the cache, columns of a row in the cache) -> cache format, rounding
_FORMATS = {
    (512, torch.uint8, 584): ("mixed_584_scale_floor", "codes_from_bf16"),
    (512, torch.bfloat16, 512): ("bf16", "once"),
    (512, torch.float8_e4m3fn, 512): ("fp8_tensor", "before_codes"),
    (128, torch.uint8, 132): ("fp8_block128_pow2", "before_codes"),
    (128, torch.uint8, 68): ("mxfp4", "before_codes"),
}
_MAKE = "adapters.vllm.CompressorLayer"


class CompressorLayer:
    """A layer's compressor on the tensors that vLLM gives it.

    It keeps views of the tensors, so a tensor that is replaced needs a new CompressorLayer. One
    that is written in place does not.

    Attributes:
        state_cache, kv_cache: as they were given.
    """

    def __init__(
        self,
        ape: Tensor,
        state_cache: Tensor,
        rms_norm_weight: Tensor,
        rms_norm_eps: float,
        cos_sin_cache: Tensor,
        kv_cache: Tensor,
        compress_ratio: int,
        *,
        fp8_scale: Tensor | None = None,
    ) -> None:
        """
        With C = 2 for compress_ratio 4, whose windows overlap, and C = 1 for others:

        Args:
            ape: [compress_ratio, C * head_dim], fp32.
            state_cache: [blocks, block_size, 2 * C * head_dim], fp32, any block stride: KV, then
                score + ape.
            rms_norm_weight: [head_dim], bf16 or fp32; head_dim is 128 or 512.
            rms_norm_eps: of the norm.
            cos_sin_cache: [max_pos, 64], fp32: cosines, then sines.
            kv_cache: [blocks, rows_per_page, columns], any block stride. With head_dim 512: uint8
                rows of 584 bytes, bf16 rows, or fp8_e4m3 rows. With head_dim 128: uint8 rows of 132
                bytes (fp8 and an fp32 scale) or of 68 bytes (fp4 and e8m0 scales).
            compress_ratio: tokens per window.
            fp8_scale: [1], fp32, on the device: of a cache of fp8_e4m3 rows. None is 1.

        Raises:
            ValueError: a shape, dtype or stride is not accepted.
        """
        head_dim = rms_norm_weight.numel()
        if head_dim not in (128, 512):
            refuse(_MAKE, "rms_norm_weight", f"of {head_dim} elements", "128 or 512 (head_dim)")
        width = (2 if compress_ratio == 4 else 1) * head_dim
        if state_cache.dim() != 3 or state_cache.size(2) != 2 * width:
            accepted = f"[blocks, block_size, {2 * width}]"
            refuse(_MAKE, "state_cache", f"of shape {list(state_cache.shape)}", accepted)
        if kv_cache.dim() != 3 or (head_dim, kv_cache.dtype, kv_cache.size(2)) not in _FORMATS:
            value = f"{kv_cache.dtype} of shape {list(kv_cache.shape)}"
            accepted = "; ".join(
                f"{dtype} [blocks, rows_per_page, {columns}]"
                for known, dtype, columns in _FORMATS
                if known == head_dim
            )
            refuse(_MAKE, "kv_cache", value, accepted)
        if fp8_scale is not None and kv_cache.dtype != torch.float8_e4m3fn:
            refuse(_MAKE, "fp8_scale", "a tensor", f"None for a kv_cache of {kv_cache.dtype}")
        rows_per_page = kv_cache.size(1)
        if kv_cache.stride()[1:] != (kv_cache.size(2), 1):
            refuse(_MAKE, "kv_cache", f"of strides {kv_cache.stride()}", "contiguous pages")
        if cos_sin_cache.dim() != 2 or cos_sin_cache.size(1) != 64:
            refuse(_MAKE, "cos_sin_cache", f"of shape {list(cos_sin_cache.shape)}", "[max_pos, 64]")
        format, rounding = _FORMATS[head_dim, kv_cache.dtype, kv_cache.size(2)]
        self.state_cache = state_cache
        self.kv_cache = kv_cache
        self._kind = (compress_ratio, state_cache.size(1))
        # A parameter may require a gradient, and kvfold recognises repeated calls only without.
        self._ape = ape.detach()
        self._weight = rms_norm_weight.detach()
        self._kv, self._score = state_cache[..., :width], state_cache[..., width:]
        self._rope_table = cos_sin_cache.unflatten(1, (2, -1))
        self._pages = kv_cache.view(torch.uint8).flatten(1)
        self._way = (rms_norm_eps, rows_per_page, format, torch.float32)
        self._options: dict[str, Any] = {"rounding": rounding, "scale": fp8_scale}

    def compress_and_store(self, kv_score: Tensor, step: StepMetadata) -> None:
        """Stores new tokens in the state, and the rows of the windows that they close in the cache.

        It is one launch of kvfold.paged_kv_compress_store or kvfold.prefill_compress_store.

        Args:
            kv_score: [num_tokens or more, 2 * C * head_dim], fp32 or bf16: new tokens, KV, then
                score.
            step: of the layer's group.

        Raises:
            ValueError: an argument is not accepted. Nothing is launched.
            TableError: no row of kvfold's table serves the problem. Nothing is launched.
        """
        if (step.compress_ratio, step.block_size) != self._kind:
            value = f"of (compress_ratio, block_size) {(step.compress_ratio, step.block_size)}"
            refuse(f"{_MAKE}.compress_and_store", "step", value, str(self._kind))
        if kv_score.size(0) > step.num_tokens:
            kv_score = kv_score[: step.num_tokens]
        tensors = (
            kv_score, self._ape, self._kv, self._score, step.block_table, step.block_table,
            step.kv_lens, step.cu_seq_lens, step.cu_outputs, self._weight, self._rope_table,
            step.positions, step.slots, self._pages, step.compress_ratio,
        )  # fmt: skip
        if step.next_n is None:
            prefill_compress_store(*tensors, *self._way, **self._options)
        else:
            paged_kv_compress_store(*tensors, step.next_n, *self._way, **self._options)
