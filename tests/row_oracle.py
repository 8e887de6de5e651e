"""What norm_rope_store must do, in numpy: in float32, rounding by rounding, and in exact float64.

It shares no code with kvfold. A format is anything with the fields of a table's entry.
"""

from dataclasses import dataclass

import format_oracle
import numpy as np

ROUNDINGS = ("once", "before_codes", "codes_from_bf16", "each_step")
CODE_BITS = {"bf16": 16, "fp32": 32, "fp8_e4m3": 8, "fp4_e2m1": 4}
SCALE_BYTES = {"fp32": 4, "e8m0": 1, "e4m3": 1}


@dataclass(frozen=True)
class Stages:
    """Rows [num_rows, head_dim] on their way to the cache.

    Attributes:
        latent: after the norm.
        rows: after RoPE and rotation.
        values: what is quantised, or stored as it is.
    """

    latent: np.ndarray
    rows: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Stored:
    """What a call stores.

    Attributes:
        which: indices of the rows that are stored.
        stages: of these rows.
        codes: their data bytes.
        scales: their scale bytes.
    """

    which: np.ndarray
    stages: Stages
    codes: np.ndarray
    scales: np.ndarray


# ---- float32 -------------------------------------------------------------------------------------


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 values, rounded to bf16."""
    codes = format_oracle.encode(values, "bf16").astype(np.uint32)
    return (codes << 16).view(np.float32)


def stages(
    rows: np.ndarray,
    weight: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    eps: float,
    rounding: str,
    rotate: bool,
) -> Stages:
    """The stages as they must be, to the bit.

    Args:
        rows: [num_rows, head_dim], float32.
        weight: [head_dim], float32.
        cos, sin: [num_rows, pairs], float32: of each row's position.
    """
    assert rounding in ROUNDINGS
    with np.errstate(all="ignore"):
        if rounding == "each_step":
            latent = bf16(norm(bf16(rows), weight, eps))
            roped = bf16(rope(latent, cos, sin))
            rotated = bf16(hadamard(roped)) if rotate else roped
            return Stages(latent, rotated, rotated)
        latent = norm(rows, weight, eps)
        roped = rope(latent, cos, sin)
        if rounding == "codes_from_bf16":
            assert not rotate
            split = rows.shape[1] - 2 * cos.shape[1]
            values = np.concatenate([bf16(latent[:, :split]), bf16(roped[:, split:])], axis=1)
            return Stages(latent, values, values)
        rotated = hadamard(roped) if rotate else roped
        return Stages(latent, rotated, bf16(rotated) if rounding == "before_codes" else rotated)


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x * rstd * weight, from left to right; rstd = 1 / sqrt(mean(x**2) + eps)."""
    mean = tree_sum(x * x) / np.float32(x.shape[1])
    rstd = np.float32(1) / np.sqrt(mean + np.float32(eps))
    assert rstd.dtype == np.float32
    return x * rstd[:, None] * weight


def tree_sum(x: np.ndarray) -> np.ndarray:
    """The sum of each row: that of its first half plus that of its second half."""
    half = x.shape[1] // 2
    return tree_sum(x[:, :half]) + tree_sum(x[:, half:]) if half else x[:, 0]


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x with the adjacent pairs of its last columns rotated; each product and sum is rounded."""
    start = x.shape[1] - 2 * cos.shape[1]
    a, b = x[:, start::2], x[:, start + 1 :: 2]
    found = x.copy()
    found[:, start::2] = a * cos - b * sin
    found[:, start + 1 :: 2] = a * sin + b * cos
    return found


def hadamard(x: np.ndarray) -> np.ndarray:
    """x times the Sylvester matrix, times width**-0.5 in float32."""
    return butterfly(x) * np.float32(x.shape[1] ** -0.5)


def butterfly(x: np.ndarray) -> np.ndarray:
    """The halves are transformed first, so columns at distance 1 meet before those at 2, 4, ..."""
    half = x.shape[1] // 2
    if not half:
        return x
    first, second = butterfly(x[:, :half]), butterfly(x[:, half:])
    return np.concatenate([first + second, first - second], axis=1)


# ---- float64 -------------------------------------------------------------------------------------


def exact_stages(
    rows: np.ndarray,
    weight: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    eps: float,
    rotate: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows after the norm, and after RoPE and rotation, in float64 without a rounding to float32.

    A pair of columns is a complex number, which RoPE multiplies by cos + i*sin. The rotation is a
    product with the whole matrix.
    """
    x = rows.astype(np.float64)
    latent = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps) * weight
    start = rows.shape[1] - 2 * cos.shape[1]
    turned = latent[:, start::2] + 1j * latent[:, start + 1 :: 2]
    turned = turned * (cos.astype(np.float64) + 1j * sin.astype(np.float64))
    pairs = np.stack([turned.real, turned.imag], axis=2).reshape(len(rows), -1)
    found = np.concatenate([latent[:, :start], pairs], axis=1)
    if rotate:
        found = found @ sylvester(rows.shape[1]) / np.sqrt(rows.shape[1])
    return latent, found


def sylvester(width: int) -> np.ndarray:
    """The Hadamard matrix of a power of two in natural order."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    assert len(matrix) == width
    return matrix


# ---- bytes and pages -----------------------------------------------------------------------------


def row_bytes(format, head_dim: int, rope_dim: int) -> tuple[int, int]:
    """Bytes of a row's data and of its scales."""
    plain = rope_dim if format.rope == "bf16" else 0
    data = (head_dim - plain) * CODE_BITS[format.code] // 8 + 2 * plain
    if format.scale not in SCALE_BYTES:
        return data, 0
    needed = (head_dim - plain) // format.block * SCALE_BYTES[format.scale]
    return data, format.scale_bytes or needed


def page_bytes(format, head_dim: int, rope_dim: int, rows_per_page: int) -> int:
    """Bytes that a page needs."""
    return rows_per_page * sum(row_bytes(format, head_dim, rope_dim))


def places(
    format, head_dim: int, rope_dim: int, rows_per_page: int, row: int
) -> tuple[slice, slice]:
    """Where the data and the scales of a row lie in its page."""
    data, scales = row_bytes(format, head_dim, rope_dim)
    if format.placement == "after_row":
        start = row * (data + scales)
        behind = start + data
    else:
        start = row * data
        behind = rows_per_page * data + row * scales
    return slice(start, start + data), slice(behind, behind + scales)


def store(
    rows: np.ndarray,
    weight: np.ndarray,
    rope_table: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    cache: np.ndarray,
    eps: float,
    rows_per_page: int,
    format,
    *,
    rounding: str,
    rotate: bool,
    scale: float | None,
) -> Stored:
    """Writes to the cache what a call must write, and says what that is.

    Args:
        rows: [num_rows, head_dim], float32; weight [head_dim] and rope_table [max_pos, 2, pairs]
            too.
        positions, slots: [num_rows], integers.
        cache: [num_pages, page_bytes], uint8, mutated.
    """
    head_dim, rope_dim = rows.shape[1], 2 * rope_table.shape[2]
    inside = (positions >= 0) & (positions < len(rope_table))
    inside &= (slots >= 0) & (slots < len(cache) * rows_per_page)
    which = np.flatnonzero(inside)
    at = rope_table[positions[which]]
    done = stages(rows[which], weight, at[:, 0], at[:, 1], eps, rounding, rotate)
    codes, scales = (np.zeros((0, n), np.uint8) for n in row_bytes(format, head_dim, rope_dim))
    if len(which):
        codes, scales = format_oracle.expected(done.values, format, rope_dim, scale)
    for slot, data, row_scales in zip(slots[which].tolist(), codes, scales, strict=True):
        page, row = divmod(slot, rows_per_page)
        data_place, scale_place = places(format, head_dim, rope_dim, rows_per_page, row)
        cache[page, data_place] = data
        cache[page, scale_place] = row_scales
    return Stored(which, done, codes, scales)
