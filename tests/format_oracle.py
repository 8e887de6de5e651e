"""What cache formats must do, in numpy: a search in the list of all codes, in exact float64.

It shares no code with kvfold. A format is anything with the fields of a table's entry.
"""

import numpy as np

E4M3 = np.array(
    [m / 512 for m in range(8)] + [(8 + m) * 2.0**e for e in range(-9, 6) for m in range(8)]
)
GRIDS = {
    "fp8_e4m3": E4M3[:-1],  # the last would be 480; it is NaN
    "fp4_e2m1": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    # The bits of bf16 are the upper half of fp32's. Infinity is where 2^128 would be.
    "bf16": np.append(
        (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64), 2.0**128
    ),
}
NAN = {"fp8_e4m3": 0x7F, "fp4_e2m1": 0x7, "bf16": 0x7FFF}
SIGN = {"fp8_e4m3": 0x80, "fp4_e2m1": 0x8, "bf16": 0x8000}


def nearest(magnitude: np.ndarray, grid: np.ndarray, ties: str) -> np.ndarray:
    """The index of the nearest value of an ascending grid; the last one above it; 0 for NaN."""
    magnitude = np.where(np.isnan(magnitude), 0, magnitude).astype(np.float64)
    above = np.searchsorted(grid, magnitude).clip(0, len(grid) - 1)
    below = np.maximum(above - 1, 0)
    middle = (grid[below] + grid[above]) / 2
    at_tie = np.where((ties == "even") & (above % 2 == 0), above, below)
    return np.where(magnitude > middle, above, np.where(magnitude == middle, at_tie, below))


def encode(values: np.ndarray, code: str, ties: str = "even") -> np.ndarray:
    """The codes of float32 values, as unsigned integers."""
    codes = nearest(np.abs(values), GRIDS[code], ties)
    signed = np.signbit(values) & ~((ties == "down") & (codes == 0))
    return np.where(np.isnan(values), NAN[code], codes + SIGN[code] * signed)


def float32_bits(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values; all NaNs have one pattern."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), bits)


def divide(values: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """The float32 quotient: float64 is exact enough that its rounding cannot change the result."""
    with np.errstate(all="ignore"):
        return (values.astype(np.float64) / divisor).astype(np.float32)


def block_scales(blocks: np.ndarray, format) -> tuple[np.ndarray, np.ndarray]:
    """The scales of blocks [..., block]: as unsigned integers, and their values in float64."""
    with np.errstate(invalid="ignore"):  # NaN of some bits
        amax = np.abs(blocks.astype(np.float64)).max(-1)
    amax = np.where(np.isinf(amax), np.finfo(np.float32).max, amax)
    floor = float(np.float32(format.floor))
    if format.floor_on == "amax":
        amax = np.maximum(amax, floor)
    scale = divide(amax, GRIDS[format.code][-1]).astype(np.float64)
    if format.floor_on == "scale":
        scale = np.maximum(scale, floor)
    missing = np.isnan(scale)
    if format.rule == "pow2":
        fraction, exponent = np.frexp(np.where(missing, 1, scale))
        exponent -= fraction == 0.5
        scale = np.where(missing, np.nan, np.ldexp(1.0, exponent))
        if format.scale == "e8m0":
            return np.where(missing, 255, exponent + 127), scale
    if format.scale == "e4m3":
        codes = encode(scale, "fp8_e4m3")
        return codes, np.where(missing, np.nan, GRIDS["fp8_e4m3"][codes % 127])
    return float32_bits(scale), scale


def expected(
    rows: np.ndarray, format, rope_dim: int = 0, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of codes and of scales of float32 rows [num_rows, head_dim]."""
    number = len(rows)
    split = rows.shape[1] - (rope_dim if format.rope == "bf16" else 0)
    values, last = rows[:, :split], rows[:, split:]
    scales = np.zeros((number, format.scale_bytes), np.uint8)
    if format.scale in ("fp32", "e8m0", "e4m3"):
        blocks = values.reshape(number, -1, format.block)
        found, divisor = block_scales(blocks, format)
        found = found.astype("<u4" if format.scale == "fp32" else "u1").view("u1")
        if not format.scale_bytes:
            scales = np.zeros_like(found)
        scales[:, : found.shape[1]] = found
        divisor = divisor[..., None]
        values = np.where(divisor == 0, np.float32(0), divide(blocks, divisor))
        values = values.reshape(number, -1)
    elif scale is not None:
        values = np.zeros_like(values) if scale == 0 else divide(values, np.float64(scale))
    if format.code == "fp32":
        data = float32_bits(values).astype("<u4").view("u1")
    elif format.code == "bf16":
        data = encode(values, "bf16").astype("<u2").view("u1")
    else:
        data = encode(values, format.code, format.ties).astype("u1")
    if format.code == "fp4_e2m1":
        data = data[:, 0::2] + 16 * data[:, 1::2]
    tail = encode(last, "bf16").astype("<u2").view("u1").reshape(number, -1)
    return np.concatenate([data, tail], axis=1), scales
