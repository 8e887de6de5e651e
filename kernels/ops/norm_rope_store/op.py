"""norm_rope_store: the public function."""

from __future__ import annotations

from torch import Tensor

from kvfold.runtime.torch_op import torch_op

_op = torch_op("norm_rope_store")


def norm_rope_store(
    rows: Tensor,
    weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    eps: float,
    rows_per_page: int,
    format: str,
    *,
    rounding: str = "once",
    rotate: bool = False,
    scale: Tensor | None = None,
    latent_out: Tensor | None = None,
    rows_out: Tensor | None = None,
    codes_out: Tensor | None = None,
    scales_out: Tensor | None = None,
    prefetch: str = "none",
) -> None:
    """Takes compressed rows to the cache: RMSNorm, RoPE, rotation, quantisation, store.

    x is a row, in fp32. RMSNorm is x * rstd * weight with rstd = 1 / sqrt(mean(x**2) + eps). RoPE
    rotates the adjacent pairs (a, b) of the last rope_dim columns to
    (a * cos - b * sin, a * sin + b * cos). The rotation multiplies by the Sylvester Hadamard matrix
    in natural order and by head_dim**-0.5. docs/formats.md says what a format does then.

    A row whose slot or position is outside is skipped: neither the cache nor an optional output
    gets it. All other bytes of the cache stay as they are. The bytes of a row depend on nothing but
    the row and the arguments, and every backend makes the same bytes.

    The op never synchronises. It launches on torch's current stream. Rows of floating-point tensors
    are 16-byte aligned; pages of the cache start at multiples of 4 bytes, and multiples of 16 are
    faster.

    Args:
        rows: [num_rows, head_dim], bf16 or fp32. head_dim is 128, 256 or 512.
        weight: [head_dim], bf16 or fp32: of RMSNorm.
        rope_table: [max_pos, 2, rope_dim / 2], fp32, any strides: cosines, then sines. A view of a
            table with another order serves as well. With rope_dim 0 there is no RoPE.
        positions: [num_rows], int32: a row's position in rope_table.
        slots: [num_rows], int64: page * rows_per_page + row of the page. No two rows have one slot.
        cache: [num_pages, page_bytes], uint8, any page stride, mutated. page_bytes is what the
            format needs for a page, or more.
        eps: of RMSNorm.
        rows_per_page: rows of a page of the cache.
        format: name of a cache format of the table.
        rounding: where values are rounded to bf16.
            "once": nowhere; all is fp32 from load to store.
            "before_codes": before quantisation.
            "codes_from_bf16": for a format that stores the RoPE columns as bf16, without rotate.
            The quantised columns come from the normed row, rounded to bf16. The RoPE columns come
            from the normed row in fp32 and are rounded once.
            "each_step": the row itself, then after the norm, RoPE and rotation.
        rotate: whether a row is rotated by the Hadamard matrix.
        scale: [1], fp32: of a format with scale: tensor. None is 1.
        latent_out: [num_rows, head_dim], bf16 or fp32, mutated: rows after the norm, before RoPE.
        rows_out: [num_rows, head_dim], bf16 or fp32, mutated: rows after RoPE and rotation, before
            quantisation.
        codes_out: [num_rows, bytes], uint8, mutated: the data bytes of rows, RoPE columns included.
        scales_out: [num_rows, bytes], uint8, mutated: the scale bytes of rows, pad bytes included.
        prefetch: what may be read while the kernel before this one on the stream still runs.
            "none": nothing. "metadata" and "state": positions, slots, weight and rope_table.

    Raises:
        ValueError: an argument's type, shape, dtype, device, strides, memory or value is not
            accepted. Nothing is launched or written.
        TableError: the table has no such format, or no row for the problem. Nothing is launched or
            written.
    """
    _op(
        rows, weight, rope_table, positions, slots, cache, eps, rows_per_page, format,
        rounding=rounding, rotate=rotate, scale=scale, latent_out=latent_out, rows_out=rows_out,
        codes_out=codes_out, scales_out=scales_out, prefetch=prefetch,
    )  # fmt: skip
