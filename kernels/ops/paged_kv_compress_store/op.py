"""paged_kv_compress_store: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.runtime.arguments import DTYPE_NAMES
from kvfold.runtime.torch_op import torch_op

_op = torch_op("paged_kv_compress_store")


def paged_kv_compress_store(
    kv_score: Tensor,
    ape: Tensor,
    paged_kv: Tensor,
    paged_score: Tensor,
    block_table_kv: Tensor,
    block_table_score: Tensor,
    kv_lens: Tensor,
    cu_seq_lens: Tensor,
    cu_outputs: Tensor,
    weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    compress_ratio: int,
    next_n: int,
    eps: float,
    rows_per_page: int,
    format: str,
    row_dtype: torch.dtype,
    *,
    rounding: str = "once",
    rotate: bool = False,
    scale: Tensor | None = None,
    latent_out: Tensor | None = None,
    rows_out: Tensor | None = None,
    codes_out: Tensor | None = None,
    scales_out: Tensor | None = None,
    prefetch: str = "none",
    ape_in_state: bool = True,
    work: str = "all",
    new_tokens: Tensor | None = None,
) -> None:
    """paged_kv_compress and norm_rope_store in one launch.

    The result is that of `paged_kv_compress` with an output of row_dtype and of `norm_rope_store`
    on that output, to the bit. A row that no window fills is not stored, whatever its slot and
    position. No compressed row goes through memory.

    head_dim is 128, 256 or 512. Where a row is shared by several CTAs, the CUDA kernels need
    clusters: sm_90 or later. Triton launches one kernel for each of the two steps.

    Args:
        kv_score, ape, paged_kv, paged_score, block_table_kv, block_table_score, kv_lens,
            cu_seq_lens, cu_outputs, compress_ratio, next_n, ape_in_state, work, new_tokens: as
            those of paged_kv_compress. cu_outputs counts rows of positions and slots.
        weight, rope_table, positions, slots, cache, eps, rows_per_page, format, rounding, rotate,
            scale, latent_out, rows_out, codes_out, scales_out: as those of norm_rope_store.
        row_dtype: torch.bfloat16 or torch.float32: what a row is rounded to before the norm.
            torch.ops takes "bf16" or "fp32".
        prefetch: as that of paged_kv_compress. "metadata" and "state" cover positions, slots,
            weight and rope_table too.

    Raises:
        ValueError: an argument's type, shape, dtype, device, strides, memory or value is not
            accepted. Nothing is launched or written.
        TableError: no row of the table serves the problem. Nothing is launched or written.
    """
    _op(
        kv_score, ape, paged_kv, paged_score, block_table_kv, block_table_score, kv_lens,
        cu_seq_lens, cu_outputs, weight, rope_table, positions, slots, cache, compress_ratio,
        next_n, eps, rows_per_page, format, DTYPE_NAMES.get(row_dtype, str(row_dtype)),
        rounding=rounding, rotate=rotate, scale=scale, latent_out=latent_out,
        rows_out=rows_out, codes_out=codes_out, scales_out=scales_out, prefetch=prefetch,
        ape_in_state=ape_in_state, work=work, new_tokens=new_tokens,
    )  # fmt: skip
