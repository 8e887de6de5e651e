"""Cache formats in torch: rows to bytes and back, and pages. docs/formats.md has more.

The functions run on any device and give the same bytes on each: they round by integer arithmetic on
the bits of fp32, and divide by tensors (torch multiplies by the reciprocal of a number).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.codegen import CacheFormat, PageLayout
from kvfold.codegen.formats import CODES, FloatCode
from kvfold.runtime.arguments import refuse
from kvfold.runtime.dispatch import table

MAGNITUDE = 0x7FFFFFFF  # all bits of an fp32 value but its sign
MANTISSA = 0x007FFFFF
INFINITY = 0x7F800000
LARGEST = 0x7F7FFFFF
NAN = CODES["fp32"].nan
E8M0_NAN = 255


def cache_format(format: CacheFormat | str) -> CacheFormat:
    """The format, or that of this name in the table in force. Raises TableError without one."""
    return format if isinstance(format, CacheFormat) else table().format(format)


@torch.no_grad()
def quantise(
    rows: Tensor,
    format: CacheFormat | str,
    *,
    rope_dim: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The bytes of rows in a cache format.

    Args:
        rows: [num_rows, head_dim], fp32 or bf16.
        format: a cache format, or its name in the table in force.
        rope_dim: the last columns, which a format may store as bf16.
        scale: [1], fp32, on the device of rows, for formats with `scale: tensor`; None is 1.

    Returns:
        codes: [num_rows, data_bytes], uint8: the codes, then the bf16 columns.
        scales: [num_rows, scale_bytes], uint8; bytes that no scale takes are 0.

    Raises:
        ValueError: an argument that is not accepted. TableError, which is one: the format has no
            rows of these columns, or the table has no such format.
    """
    function, format = "formats.quantise", cache_format(format)
    _check(function, "rows", rows, [None, None], torch.float32, torch.bfloat16)
    _check_scale(function, scale, format)
    layout = format.layout(rows.size(1), rope_dim)
    values, bf16_values = rows.float().split([layout.columns, layout.bf16_columns], dim=1)
    scales = torch.zeros(len(rows), layout.scale_bytes, dtype=torch.uint8, device=rows.device)
    if format.per_block:
        blocks = values.unflatten(1, (layout.scale_count, format.block))
        found = _bytes(_block_scales(blocks, format), 8 * format.scale_width)
        scales[:, : found.size(1)] = found
        values = _divided(blocks, _scale_values(scales, layout)[..., None]).flatten(1)
    elif scale is not None:
        values = _divided(values, scale)
    codes = _encoded(values, format.float_code, format.ties)
    bf16_codes = _encoded(bf16_values, CODES["bf16"], "even")
    data = _bytes(codes, format.float_code.bits), _bytes(bf16_codes, 16)
    return torch.cat(data, dim=1), scales


@torch.no_grad()
def dequantise(
    codes: Tensor,
    scales: Tensor,
    format: CacheFormat | str,
    *,
    head_dim: int,
    rope_dim: int = 0,
    scale: Tensor | None = None,
) -> Tensor:
    """The rows that bytes in a cache format stand for: code * scale, rounded to fp32.

    Args:
        codes: [num_rows, data_bytes], uint8, as `quantise` returns them.
        scales: [num_rows, scale_bytes], uint8, as `quantise` returns them.
        format: a cache format, or its name in the table in force.
        head_dim: columns of a row.
        rope_dim: as in `quantise`.
        scale: as in `quantise`.

    Returns:
        [num_rows, head_dim], fp32.

    Raises:
        ValueError: as `quantise`.
    """
    function, format = "formats.dequantise", cache_format(format)
    layout = format.layout(head_dim, rope_dim)
    _check_bytes(function, codes, scales, layout)
    _check_scale(function, scale, format)
    packed, bf16_bytes = codes.split([layout.code_bytes, 2 * layout.bf16_columns], dim=1)
    values = _decoded(packed, format)
    if format.per_block:
        blocks = values.unflatten(1, (layout.scale_count, format.block))
        values = (blocks * _scale_values(scales, layout)[..., None]).flatten(1)
    elif scale is not None:
        values = values * scale
    return torch.cat([values, bf16_bytes.contiguous().view(torch.bfloat16).float()], dim=1)


@torch.no_grad()
def store_rows(
    cache: Tensor, slots: Tensor, codes: Tensor, scales: Tensor, layout: PageLayout
) -> None:
    """Writes rows to a cache. All other bytes of the cache stay as they are.

    Args:
        cache: [num_pages, page_bytes or more], uint8, any page stride.
        slots: [num_rows], int64: page * rows_per_page + row. A row whose slot is negative or in no
            page is skipped. No two rows have one slot.
        codes: [num_rows, data_bytes], uint8.
        scales: [num_rows, scale_bytes], uint8.
        layout: of a page, `cache_format(name).layout(head_dim, rope_dim, rows_per_page)`.

    Raises:
        ValueError: an argument that is not accepted.
    """
    function = "formats.store_rows"
    _check_bytes(function, codes, scales, layout)
    _check(function, "slots", slots, [codes.size(0)], torch.int64)
    present, page, data, row_scales = _locate(function, cache, slots, layout)
    cache[page, data] = codes[present]
    cache[page, row_scales] = scales[present]


@torch.no_grad()
def load_rows(cache: Tensor, slots: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Reads rows from a cache.

    Args:
        cache: as in `store_rows`.
        slots: [num_rows], int64, as in `store_rows`; the bytes of a row that is skipped are 0.
        layout: as in `store_rows`.

    Returns:
        codes: [num_rows, data_bytes], uint8.
        scales: [num_rows, scale_bytes], uint8.

    Raises:
        ValueError: an argument that is not accepted.
    """
    function = "formats.load_rows"
    _check(function, "slots", slots, [None], torch.int64)
    present, page, data, row_scales = _locate(function, cache, slots, layout)
    codes = cache.new_zeros(len(slots), layout.data_bytes)
    scales = cache.new_zeros(len(slots), layout.scale_bytes)
    codes[present] = cache[page, data]
    scales[present] = cache[page, row_scales]
    return codes, scales


# ---- fp32 to codes -------------------------------------------------------------------------------


def _block_scales(blocks: Tensor, format: CacheFormat) -> Tensor:
    """The scales of blocks [num_rows, scale_count, block] as integers of their codes' bits."""
    # The bits of values that are not negative have the order of the values. NaN is above infinity.
    amax = (blocks.view(torch.int32) & MAGNITUDE).amax(-1)
    amax = torch.where(amax == INFINITY, LARGEST, amax)
    if format.floor_on == "amax":
        amax = amax.clamp(min=format.floor_bits)
    amax = amax.view(torch.float32)
    scale = _encoded(amax / torch.full_like(amax, format.largest), CODES["fp32"], "even")
    if format.floor_on == "scale":
        scale = scale.clamp(min=format.floor_bits)
    if format.rule == "pow2":
        exponent = ((scale >> 23) + (scale & MANTISSA != 0)).clamp(max=E8M0_NAN)
        if format.scale == "e8m0":
            return exponent
        return torch.where(exponent == E8M0_NAN, NAN, exponent << 23)
    if format.scale == "e4m3":
        return _encoded(scale.view(torch.float32), CODES["fp8_e4m3"], "even")
    return scale


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale in fp32; 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, values / scale)


def _encoded(values: Tensor, code: FloatCode, ties: str) -> Tensor:
    """fp32 values as codes: int32, each the sign-extended integer of the code's bits."""
    bits = values.view(torch.int32)
    magnitude = bits & MAGNITUDE
    exponent, mantissa = magnitude >> 23, magnitude & MANTISSA
    mantissa = torch.where(exponent > 0, mantissa | (MANTISSA + 1), mantissa)
    # Counted from the code's smallest normal. Below it, one more mantissa bit is lost per step.
    exponent = exponent.clamp(min=1) - (128 - code.bias)
    lost = 23 - code.mantissa_bits - exponent.clamp(max=0)
    codes = _rounded(mantissa, lost.clamp(max=25), ties)
    codes += exponent.clamp(min=0) << code.mantissa_bits
    codes.clamp_(max=code.largest)
    negative = (bits < 0) & (codes > 0) if ties == "down" else bits < 0
    codes = torch.where(negative, codes + (-1 << code.bits - 1), codes)
    return torch.where(magnitude > INFINITY, code.nan, codes)


def _rounded(integers: Tensor, lost: Tensor, ties: str) -> Tensor:
    """Integers without their last bits, rounded to nearest."""
    kept = integers >> lost
    twice, unit = 2 * (integers - (kept << lost)), torch.ones_like(lost) << lost
    up = twice > unit
    if ties == "even":
        up |= (twice == unit) & (kept & 1 == 1)
    return kept + up


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """The bytes of codes [num_rows, columns]; the even one of two 4-bit codes is the low nibble."""
    if bits == 4:
        codes, bits = codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4, 8
    if bits == 8:
        return (codes & 255).to(torch.uint8)
    if not codes.numel():  # torch views no such tensor as one of another dtype
        return codes.new_zeros(codes.size(0), codes.size(1) * bits // 8, dtype=torch.uint8)
    return codes.to(torch.int16 if bits == 16 else torch.int32).contiguous().view(torch.uint8)


# ---- codes to fp32 -------------------------------------------------------------------------------


def _decoded(packed: Tensor, format: CacheFormat) -> Tensor:
    """The values of a format's codes [num_rows, code_bytes] in fp32 [num_rows, columns]."""
    code = format.float_code
    if code.bits > 8:
        dtype = torch.float32 if code.bits == 32 else torch.bfloat16
        return packed.contiguous().view(dtype).float()
    if code.bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
    return _values_of(packed, code)


def _values_of(codes: Tensor, code: FloatCode) -> Tensor:
    """The values of codes of at most 8 bits, uint8, in fp32."""
    half = [code.value(one) for one in range(1 << code.bits - 1)]
    if code.nan > code.largest:
        half[code.nan] = float("nan")
    return _looked_up([*half, *(-value for value in half)], codes)


def _scale_values(scales: Tensor, layout: PageLayout) -> Tensor:
    """The scales [num_rows, scale_bytes] of rows in fp32 [num_rows, scale_count]."""
    taken = scales[:, : layout.scale_count * layout.format.scale_width]
    if layout.format.scale == "fp32":
        return taken.contiguous().view(torch.float32)
    if layout.format.scale == "e4m3":
        return _values_of(taken, CODES["fp8_e4m3"])
    return _looked_up([*(2.0 ** (byte - 127) for byte in range(E8M0_NAN)), float("nan")], taken)


def _looked_up(values: Sequence[float], at: Tensor) -> Tensor:
    """The values at uint8 indices, in fp32."""
    return torch.tensor(values, dtype=torch.float32, device=at.device)[at.long()]


# ---- pages and checks ----------------------------------------------------------------------------


def _locate(
    function: str, cache: Tensor, slots: Tensor, layout: PageLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows have a place; of those the page [n, 1] and the bytes of data and scales [n, ...].

    Raises:
        ValueError: a cache that is not accepted.
    """
    _check(function, "cache", cache, [None, None], torch.uint8)
    if cache.size(1) < layout.page_bytes:
        refuse(function, "cache", f"of {cache.size(1)} bytes per page", f">= {layout.page_bytes}")
    present = (slots >= 0) & (slots < cache.size(0) * layout.rows_per_page)
    page, row = (slots[present] // layout.rows_per_page, slots[present] % layout.rows_per_page)
    data = torch.arange(layout.data_bytes, device=cache.device)
    scales = torch.arange(layout.scale_bytes, device=cache.device) + layout.scale_start
    row = row[:, None]
    return (
        present,
        page[:, None],
        data + row * layout.row_stride,
        scales + row * layout.scale_stride,
    )


def _check(
    function: str, name: str, tensor: Tensor, shape: Sequence[int | None], *dtypes: torch.dtype
) -> None:
    """Raises ValueError unless a tensor has one of the dtypes and the shape; None: any length."""
    if not isinstance(tensor, Tensor):
        refuse(function, name, f"a {type(tensor).__name__}", "a tensor")
    if tensor.dtype not in dtypes:
        refuse(function, name, f"of {tensor.dtype}", " or ".join(map(str, dtypes)))
    fits = tensor.dim() == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        refuse(function, name, f"of shape {list(tensor.shape)}", f"[{wanted}]")


def _check_bytes(function: str, codes: Tensor, scales: Tensor, layout: PageLayout) -> None:
    """Raises ValueError unless codes and scales are those of rows of this layout."""
    _check(function, "codes", codes, [None, layout.data_bytes], torch.uint8)
    _check(function, "scales", scales, [codes.size(0), layout.scale_bytes], torch.uint8)


def _check_scale(function: str, scale: Tensor | None, format: CacheFormat) -> None:
    """Raises ValueError for a scale that is not accepted."""
    if scale is None:
        return
    if format.scale != "tensor":
        refuse(function, "scale", "a tensor", f"None, as the format has scale {format.scale}")
    _check(function, "scale", scale, [1], torch.float32)
