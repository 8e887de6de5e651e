"""From a compressed row to the cache, in torch: RMSNorm, RoPE, rotation, quantisation, store.

Every step rounds to fp32 once, in an order that the kernels share, so that all backends give the
same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold import formats


@dataclass(frozen=True)
class Transformed:
    """Rows on their way to the cache, fp32 [num_rows, head_dim] each.

    Attributes:
        latent: after the norm, before RoPE.
        rows: after RoPE and rotation.
        values: what the quantiser gets.
    """

    latent: Tensor
    rows: Tensor
    values: Tensor


def transform(
    rows: Tensor,
    weight: Tensor,
    cos_sin: Tensor,
    eps: float,
    *,
    rounding: str,
    rotate: bool,
) -> Transformed:
    """Takes rows to the quantiser.

    Args:
        rows: [num_rows, head_dim], bf16 or fp32.
        weight: [head_dim], bf16 or fp32.
        cos_sin: [num_rows, 2, rope_dim / 2], fp32: each row's cosines and sines.
        eps: of the norm.
        rounding: where values are rounded to bf16; kvfold.norm_rope_store documents it.
        rotate: whether the row is rotated by a Hadamard matrix after RoPE.
    """
    step = _to_bf16 if rounding == "each_step" else _as_it_is
    latent = step(norm(step(rows.float()), weight.float(), eps))
    roped = step(rope(latent, cos_sin))
    if rounding == "codes_from_bf16":
        columns = latent.size(1) - 2 * cos_sin.size(2)
        roped = _to_bf16(torch.cat([latent[:, :columns], roped[:, columns:]], dim=1))
    result = step(hadamard(roped)) if rotate else roped
    values = _to_bf16(result) if rounding == "before_codes" else result
    return Transformed(latent, result, values)


def store(arguments: Any, rows: Tensor, present: Tensor) -> None:
    """Takes rows to the cache and to the optional outputs.

    Args:
        arguments: of an op that stores rows.
        rows: [num_rows, head_dim], bf16 or fp32.
        present: [num_rows], bool: the rows that are there. Of these, one whose slot or position is
            outside is skipped.
    """
    a = arguments
    max_pos, _, pairs = a.rope_table.shape
    places = a.cache.size(0) * a.rows_per_page
    present = present & (a.slots >= 0) & (a.slots < places)
    present &= (a.positions >= 0) & (a.positions < max_pos)
    which = present.nonzero()[:, 0]
    if not len(which):
        return
    done = transform(
        rows[which],
        a.weight,
        a.rope_table[a.positions[which].long()],
        a.eps,
        rounding=a.rounding,
        rotate=a.rotate,
    )
    rope_dim = 2 * pairs
    codes, scales = formats.quantise(done.values, a.format, rope_dim=rope_dim, scale=a.scale)
    layout = formats.cache_format(a.format).layout(rows.size(1), rope_dim, a.rows_per_page)
    formats.store_rows(a.cache, a.slots[which], codes, scales, layout)
    for output, values in (
        (a.latent_out, done.latent),
        (a.rows_out, done.rows),
        (a.codes_out, codes),
        (a.scales_out, scales),
    ):
        if output is not None:
            output[which] = values.to(output.dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: x * rstd * weight, rstd = 1 / sqrt(mean(x**2) + eps)."""
    width = torch.full((), float(x.size(-1)), dtype=x.dtype, device=x.device)
    mean = (sum_of_columns(x * x) / width).unsqueeze(-1)
    # On a CPU, torch's sqrt of fp32 may be 1 ulp off. That of float64, rounded to fp32, never is.
    rstd = torch.ones_like(mean) / torch.sqrt((mean + eps).double()).to(mean.dtype)
    return x * rstd * weight


def sum_of_columns(x: Tensor) -> Tensor:
    """Sums the last dimension, a power of two, by a balanced tree that begins with neighbours."""
    while x.size(-1) > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates adjacent pairs of the last columns.

    Args:
        x: [num_rows, head_dim], fp32.
        cos_sin: [num_rows, 2, pairs], fp32.
    """
    pairs = cos_sin.size(2)
    head, tail = x.split([x.size(1) - 2 * pairs, 2 * pairs], dim=1)
    a, b = tail[:, 0::2], tail[:, 1::2]
    cos, sin = cos_sin[:, 0], cos_sin[:, 1]
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=2)
    return torch.cat([head, rotated.flatten(1)], dim=1)


def hadamard(x: Tensor) -> Tensor:
    """x times the Sylvester Hadamard matrix in natural order, times head_dim**-0.5.

    The stages add and subtract columns at distance 1, 2, 4, ... The constant is rounded to fp32.
    """
    width, distance = x.size(1), 1
    while distance < width:
        pairs = x.unflatten(1, (-1, 2, distance))
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack([a + b, a - b], dim=2).flatten(1)
        distance *= 2
    return x * torch.full((), width**-0.5, dtype=x.dtype, device=x.device)


def _to_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _as_it_is(x: Tensor) -> Tensor:
    return x
