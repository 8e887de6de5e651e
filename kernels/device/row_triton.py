"""Triton functions from a compressed row to the cache: norm, RoPE, rotation, quantisation, store.

A program has one row: a tensor [head_dim] in fp32, head_dim a power of two. The functions give the
bits of ops/row_reference.py and the bytes of formats.py, if a kernel is launched with OPTIONS.
"""
# Triton's language is not Python's: annotations say how the compiler takes an argument.
# pyright: reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportRedeclaration=false

from typing import Any

import triton
import triton.language as tl

from kvfold import formats
from kvfold.codegen import PageLayout
from kvfold.codegen.formats import CODES

# Without fusion, as a product that is added is rounded like any other.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}

MAGNITUDE = tl.constexpr(formats.MAGNITUDE)
MANTISSA = tl.constexpr(formats.MANTISSA)
HIDDEN_BIT = tl.constexpr(formats.MANTISSA + 1)
INFINITY = tl.constexpr(formats.INFINITY)
LARGEST = tl.constexpr(formats.LARGEST)
NAN = tl.constexpr(formats.NAN)
BF16_NAN = tl.constexpr(CODES["bf16"].nan)
E8M0_NAN = tl.constexpr(formats.E8M0_NAN)

# Of the parameters of row_to_cache, those whose values make no kernel of their own.
NOT_SPECIALIZED = (
    "rope_table",
    "positions",
    "slots",
    "scale",
    "scales_out",
    "rope_position_stride",
    "rope_part_stride",
    "rope_pair_stride",
    "page_stride",
    "latent_out_stride",
    "rows_out_stride",
    "codes_out_stride",
    "scales_out_stride",
    "max_pos",
    "num_slots",
    "rows_per_page",
    "scale_start",
    "eps",
)


def row_arguments(arguments: Any, head_dim: int) -> tuple:
    """What row_to_cache takes after the row, in its order, from the arguments of an op."""
    a = arguments
    max_pos, _, rope_pairs = a.rope_table.shape
    layout = formats.cache_format(a.format).layout(head_dim, 2 * rope_pairs, a.rows_per_page)
    outputs = (a.latent_out, a.rows_out, a.codes_out, a.scales_out)
    tensors = (a.weight, a.rope_table, a.positions, a.slots, a.cache, a.scale, *outputs)
    strides = (*a.rope_table.stride(), a.cache.stride(0))
    output_strides = (0 if output is None else output.stride(0) for output in outputs)
    num_slots = a.cache.size(0) * a.rows_per_page
    return (
        *tensors,
        *strides,
        *output_strides,
        max_pos,
        num_slots,
        a.rows_per_page,
        layout.scale_start,
        a.eps,
        rope_pairs,
        a.rounding,
        a.rotate,
        *format_constants(layout).values(),
    )


def format_constants(layout: PageLayout) -> dict[str, int | str]:
    """The last parameters of row_to_cache: what the compiler must know of a format."""
    format = layout.format
    return {
        "code": format.code,
        "ties": format.ties,
        "block": format.block,
        "scale_kind": format.scale,
        "rule": format.rule,
        "floor_on": format.floor_on,
        "floor_bits": format.floor_bits,
        "columns": layout.columns,
        "row_stride": layout.row_stride,
        "scale_stride": layout.scale_stride,
        "scale_bytes": layout.scale_bytes,
    }


@triton.jit
def row_to_cache(
    x, row, weight, rope_table, positions, slots, cache, scale, latent_out, rows_out, codes_out,
    scales_out, rope_position_stride, rope_part_stride, rope_pair_stride, page_stride,
    latent_out_stride, rows_out_stride, codes_out_stride, scales_out_stride, max_pos, num_slots,
    rows_per_page, scale_start, eps, rope_pairs: tl.constexpr, rounding: tl.constexpr,
    rotate: tl.constexpr, code: tl.constexpr, ties: tl.constexpr, block: tl.constexpr,
    scale_kind: tl.constexpr, rule: tl.constexpr, floor_on: tl.constexpr, floor_bits: tl.constexpr,
    columns: tl.constexpr, row_stride: tl.constexpr, scale_stride: tl.constexpr,
    scale_bytes: tl.constexpr,
):  # fmt: skip
    """Takes a row to the cache and to the optional outputs, unless its place is outside.

    The parameters after `row` are those of row_arguments. The strides of what the op checks for
    alignment are rounded to it, which lets the compiler see it.

    Args:
        x: the row, fp32 [head_dim].
        row: its number, int64.
    """
    head_dim: tl.constexpr = x.shape[0]
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    if (position >= 0) & (position < max_pos) & (slot >= 0) & (slot < num_slots):
        latent = round_step(x, rounding == "each_step")
        latent = norm(latent, load_row(weight, head_dim), eps)
        latent = round_step(latent, rounding == "each_step")
        if latent_out is not None:
            store_values(latent_out + row * (latent_out_stride // 4 * 4), latent)

        angles = rope_table + position * rope_position_stride
        rotated = rope(latent, angles, rope_part_stride, rope_pair_stride, rope_pairs)
        # With codes_from_bf16 the columns before RoPE's are those of the latent row.
        rotated = round_step(rotated, rounding == "each_step" or rounding == "codes_from_bf16")
        if rotate:
            rotated = round_step(hadamard(rotated), rounding == "each_step")
        if rows_out is not None:
            store_values(rows_out + row * (rows_out_stride // 4 * 4), rotated)

        values = round_step(rotated, rounding == "before_codes")
        page = cache + slot // rows_per_page * (page_stride // 4 * 4)
        store_quantised(
            values, row, page, slot % rows_per_page, scale, codes_out, scales_out,
            codes_out_stride, scales_out_stride, scale_start, code, ties, block, scale_kind, rule,
            floor_on, floor_bits, columns, row_stride, scale_stride, scale_bytes,
        )  # fmt: skip


@triton.jit
def store_quantised(
    values, row, page, row_of_page, scale, codes_out, scales_out, codes_out_stride,
    scales_out_stride, scale_start, code: tl.constexpr, ties: tl.constexpr, block: tl.constexpr,
    scale_kind: tl.constexpr, rule: tl.constexpr, floor_on: tl.constexpr, floor_bits: tl.constexpr,
    columns: tl.constexpr, row_stride: tl.constexpr, scale_stride: tl.constexpr,
    scale_bytes: tl.constexpr,
):  # fmt: skip
    """Quantises a row's values, and stores codes and scales in a page and the optional outputs."""
    head_dim: tl.constexpr = values.shape[0]
    divided = values
    if block:
        blocks = tl.reshape(values, [head_dim // block, block])
        scale_codes, scales = block_scales(blocks, code, scale_kind, rule, floor_on, floor_bits)
        divided = tl.reshape(divide(blocks, scales[:, None]), [head_dim])
        count: tl.constexpr = columns // block
        target = page + scale_start + row_of_page * scale_stride
        store_scales(target, scale_codes, scale_kind, count, scale_bytes)
        if scales_out is not None:
            target = scales_out + row * scales_out_stride
            store_scales(target, scale_codes, scale_kind, count, scale_bytes)
    elif scale is not None:
        divided = divide(values, tl.load(scale))
    codes = encode(divided, code, ties)
    store_data(page + row_of_page * row_stride, codes, values, columns)
    if codes_out is not None:
        store_data(codes_out + row * (codes_out_stride // 4 * 4), codes, values, columns)


# ---- norm, RoPE, rotation ------------------------------------------------------------------------


@triton.constexpr_function
def log2(power_of_two):
    """The exponent of a power of two."""
    return power_of_two.bit_length() - 1


@triton.constexpr_function
def inverse(number):
    """1 / number; exact if it is a power of two."""
    return 1.0 / number


@triton.constexpr_function
def inverse_root(number):
    """1 / sqrt(number), as ops/row_reference.py has it before it is rounded to fp32."""
    return number**-0.5


@triton.jit
def sum_of_columns(x):
    """The sum of a row, [1], by a balanced tree: neighbours first."""
    for _ in tl.static_range(log2(x.shape[0])):
        even, odd = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
        x = even + odd
    return x


@triton.jit
def norm(x, weight, eps):
    """RMSNorm: x * rstd * weight with rstd = 1 / sqrt(mean(x**2) + eps)."""
    mean = sum_of_columns(x * x) * inverse(x.shape[0])
    root = tl.sqrt_rn(mean + eps)
    return x * tl.div_rn(tl.full([1], 1.0, tl.float32), root) * weight


@triton.jit
def rope(x, angles, part_stride, pair_stride, rope_pairs: tl.constexpr):
    """Rotates adjacent pairs of the last columns; `angles` is a position's first cosine."""
    if rope_pairs == 0:
        return x
    pairs: tl.constexpr = x.shape[0] // 2
    pair = tl.arange(0, pairs) - (pairs - rope_pairs)
    rotated = pair >= 0
    cosine = tl.load(angles + pair * pair_stride, mask=rotated, other=1.0)
    sine = tl.load(angles + part_stride + pair * pair_stride, mask=rotated, other=0.0)
    a, b = tl.split(tl.reshape(x, [pairs, 2]))
    first = tl.where(rotated, a * cosine - b * sine, a)  # inf * 0 is NaN
    second = tl.where(rotated, a * sine + b * cosine, b)
    return tl.reshape(tl.join(first, second), [2 * pairs])


@triton.jit
def hadamard(x):
    """x times the Sylvester Hadamard matrix in natural order, times head_dim**-0.5.

    A stage adds and subtracts neighbours, and puts the sums before the differences. That rotates
    the bits of a column's number by one, so the stages have distances 1, 2, 4, ... of the row, and
    after the last one the columns are in order.
    """
    head_dim: tl.constexpr = x.shape[0]
    for _ in tl.static_range(log2(head_dim)):
        a, b = tl.split(tl.reshape(x, [head_dim // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [1, 0]), [head_dim])
    return x * tl.full([1], inverse_root(head_dim), tl.float32)


# ---- rounding and codes --------------------------------------------------------------------------


@triton.constexpr_function
def float_code(code):
    """The FloatCode of a name."""
    return CODES[code]


@triton.constexpr_function
def largest_value(code):
    """The value of the largest code."""
    return CODES[code].value(CODES[code].largest)


@triton.jit
def fp32_bits(x):
    """The bits of fp32 values, int32; of every NaN the same."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & MAGNITUDE) > INFINITY, NAN, bits)


@triton.jit
def bf16_bits(x):
    """The bits of fp32 values in bf16, uint16, rounded to nearest even; of every NaN the same."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & MAGNITUDE) > INFINITY, BF16_NAN, rounded).to(tl.uint16)


@triton.jit
def load_row(source, head_dim: tl.constexpr):
    """A row of bf16 or fp32 in fp32. The interpreter's own cast loses denormals of bf16."""
    x = tl.load(source + tl.arange(0, head_dim))
    if source.dtype.element_ty == tl.bfloat16:
        x = from_bf16(x.to(tl.uint16, bitcast=True))
    return x


@triton.jit
def from_bf16(bits):
    """The values of the bits of bf16, uint16, in fp32."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def round_step(x, rounds: tl.constexpr):
    """fp32 values, rounded to bf16 where that is wanted."""
    if rounds:
        x = from_bf16(bf16_bits(x))
    return x


@triton.jit
def encode(x, code: tl.constexpr, ties: tl.constexpr):
    """The codes of fp32 values as the cache has them: int32, uint16, or uint8 [code bytes]."""
    if code == "fp32":
        codes = fp32_bits(x)
    elif code == "bf16":
        codes = bf16_bits(x)
    elif code == "fp8_e4m3":
        codes = small_codes(x, code, ties).to(tl.uint8)
    else:
        even, odd = tl.split(tl.reshape(small_codes(x, code, ties), [x.shape[0] // 2, 2]))
        codes = (even | (odd << 4)).to(tl.uint8)
    return codes


@triton.jit
def small_codes(x, code: tl.constexpr, ties: tl.constexpr):
    """fp32 values as codes of 8 or 4 bits, int32."""
    to: tl.constexpr = float_code(code)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & MAGNITUDE
    exponent, mantissa = magnitude >> 23, magnitude & MANTISSA
    mantissa = tl.where(exponent > 0, mantissa | HIDDEN_BIT, mantissa)
    # Counted from the code's smallest normal. Below it, one more mantissa bit is lost per step.
    exponent = tl.maximum(exponent, 1) - (128 - to.bias)
    lost = 23 - to.mantissa_bits - tl.minimum(exponent, 0)
    codes = round_off(mantissa, tl.minimum(lost, 25), ties)
    codes += tl.maximum(exponent, 0) << to.mantissa_bits
    codes = tl.minimum(codes, to.largest)
    negative = bits < 0
    if ties == "down":
        negative = negative & (codes > 0)
    codes = tl.where(negative, codes | (1 << (to.bits - 1)), codes)
    return tl.where(magnitude > INFINITY, to.nan, codes)


@triton.jit
def round_off(integers, lost, ties: tl.constexpr):
    """Integers without their last bits, rounded to nearest."""
    kept = integers >> lost
    twice = 2 * (integers - (kept << lost))
    unit = tl.full(lost.shape, 1, tl.int32) << lost
    up = twice > unit
    if ties == "even":
        up = up | ((twice == unit) & ((kept & 1) == 1))
    return kept + up.to(tl.int32)


# ---- scales --------------------------------------------------------------------------------------


@triton.jit
def block_scales(
    blocks, code: tl.constexpr, scale_kind: tl.constexpr, rule: tl.constexpr,
    floor_on: tl.constexpr, floor_bits: tl.constexpr,
):  # fmt: skip
    """The scales of blocks [count, block]: their codes, int32 [count], and their values, fp32."""
    # The bits of values that are not negative have the order of the values. NaN is above infinity.
    amax = tl.max(blocks.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
    amax = tl.where(amax == INFINITY, LARGEST, amax)
    if floor_on == "amax":
        amax = tl.maximum(amax, floor_bits)
    amax = amax.to(tl.float32, bitcast=True)
    bits = fp32_bits(tl.div_rn(amax, tl.full(amax.shape, largest_value(code), tl.float32)))
    if floor_on == "scale":
        bits = tl.maximum(bits, floor_bits)
    if rule == "pow2":
        exponent = (bits >> 23) + ((bits & MANTISSA) != 0).to(tl.int32)
        exponent = tl.minimum(exponent, E8M0_NAN)
        bits = tl.where(exponent == E8M0_NAN, NAN, exponent << 23)
        if scale_kind == "e8m0":
            return exponent, bits.to(tl.float32, bitcast=True)
    if scale_kind == "e4m3":
        codes = small_codes(bits.to(tl.float32, bitcast=True), "fp8_e4m3", "even")
        return codes, e4m3_values(codes)
    return bits, bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3_values(codes):
    """The values of fp8_e4m3 codes that are not negative, in fp32."""
    exponent, mantissa = codes >> 3, codes & 7
    normal = ((exponent + 120) << 23 | mantissa << 20).to(tl.float32, bitcast=True)
    values = tl.where(exponent > 0, normal, mantissa.to(tl.float32) * 0.001953125)
    return tl.where(codes == 0x7F, float("nan"), values)


@triton.jit
def divide(x, scale):
    """x / scale; 0 where the scale is 0."""
    return tl.where(scale == 0, 0.0, tl.div_rn(x, scale))


# ---- stores --------------------------------------------------------------------------------------


@triton.jit
def store_values(target, x):
    """Stores a row of values as the bf16 or fp32 that `target` points to."""
    at = target + tl.arange(0, x.shape[0])
    if target.dtype.element_ty == tl.bfloat16:
        tl.store(at, bf16_bits(x).to(tl.bfloat16, bitcast=True))
    else:
        tl.store(at, x)


@triton.jit
def store_data(target, codes, values, columns: tl.constexpr):
    """Stores the codes of the first columns of a row as bytes, and the others as bf16 behind them.

    Args:
        target: pointer to uint8, a multiple of 4.
        codes: of all columns, as `encode` gives them.
        values: of all columns.
        columns: that are stored as codes.
    """
    head_dim: tl.constexpr = values.shape[0]
    words: tl.constexpr = codes.shape[0] * columns // head_dim
    word = tl.arange(0, codes.shape[0])
    tl.store(target.to(tl.pointer_type(codes.dtype)) + word, codes, mask=word < words)
    if columns < head_dim:
        code_bytes: tl.constexpr = words * codes.dtype.primitive_bitwidth // 8
        behind = (target + code_bytes).to(tl.pointer_type(tl.uint16))
        column = tl.arange(0, head_dim)
        tl.store(behind + (column - columns), bf16_bits(values), mask=column >= columns)


@triton.jit
def store_scales(
    target, codes, scale_kind: tl.constexpr, count: tl.constexpr, scale_bytes: tl.constexpr
):
    """Stores the first `count` codes of scales as bytes, and zeros behind them."""
    width: tl.constexpr = 4 if scale_kind == "fp32" else 1
    block = tl.arange(0, codes.shape[0])[:, None]
    byte = tl.arange(0, width)[None, :]
    values = (codes[:, None] >> (8 * byte)).to(tl.uint8)
    tl.store(target + width * block + byte, values, mask=(block < count) & (byte < width))
    if width * count < scale_bytes:
        pad = tl.arange(0, triton.next_power_of_2(scale_bytes))
        zeros = tl.zeros(pad.shape, tl.uint8)
        tl.store(target + pad, zeros, mask=(pad >= width * count) & (pad < scale_bytes))
