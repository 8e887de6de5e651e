"""Cache formats: bytes against an oracle, round trips, pages, a format of a user's own."""

import itertools
import os
import subprocess
import sys
import zlib

import format_oracle
import numpy as np
import pytest
import torch

from kvfold.codegen import CacheFormat, TableError, load_table
from kvfold.formats import cache_format, dequantise, load_rows, quantise, store_rows

FORMATS = load_table().formats
QUANTISED = [name for name, format in FORMATS.items() if format.code not in ("bf16", "fp32")]
SHAPES = [(512, 64), (128, 64), (128, 0)]
each_format = pytest.mark.parametrize("name", FORMATS)


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


# ---- values --------------------------------------------------------------------------------------


def bf16(patterns: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as float32."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def magnitudes(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Values of many magnitudes; each row has one of its own."""
    row = np.exp2(random.uniform(-140, 126, (shape[0], 1)))
    column = np.exp2(random.uniform(-14, 0, shape))
    return (random.choice([-1, 1], shape) * row * column).astype(np.float32)


def every_bf16(random: np.random.Generator, head_dim: int) -> np.ndarray:
    """All 65,536 bf16 patterns in order, shuffled, and shuffled without NaN and infinities."""
    patterns = np.arange(1 << 16)
    finite = np.resize(random.permutation(patterns[patterns & 0x7F80 != 0x7F80]), 1 << 16)
    shuffled = [random.permutation(patterns), finite]
    return bf16(np.concatenate([patterns, *shuffled])).reshape(-1, head_dim)


def ties_and_edges(random: np.random.Generator, format: CacheFormat, head_dim: int) -> np.ndarray:
    """Rows in whose blocks codes and scales lie at a tie, or next to one.

    A block's amax is largest * scale or a neighbour of that, the scale a power of two or halfway
    between two e4m3 codes. All other values are halfway between two codes, or next to it.
    """
    grid = format_oracle.GRIDS.get(format.code, np.arange(9.0))
    middles = (grid[1:] + grid[:-1]) / 2
    number, width = 256, format.block or 32
    factor = random.choice([1, 1, 17 / 16, 19 / 16], (number, 1, 1))
    scale = factor * np.exp2(random.integers(-16, 9, (number, head_dim // width, 1)))
    values = random.choice(middles, (number, head_dim // width, width)) * scale
    values[..., :1] = grid[-1] * scale
    with np.errstate(over="ignore"):
        values = nudged(random, values.astype(np.float32)).reshape(number, head_dim)
    return values * random.choice([-1, 1], values.shape).astype(np.float32)


def nudged(random: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Every value, the next lower one or the next higher one."""
    towards = random.choice([-np.inf, 0, np.inf], values.shape).astype(np.float32)
    return np.where(towards == 0, values, np.nextafter(values, towards))


def special(random: np.random.Generator, head_dim: int) -> np.ndarray:
    """Zeros of both signs, denormals, infinities, NaN, the largest values, arbitrary bits."""
    some = np.array([0, 1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001], np.uint32)
    some = np.concatenate([some, some | 0x80000000, [0x7FFFFFFF, 0xFFC00000]])
    few = np.where(random.random((64, head_dim)) < 0.01, random.choice(some, (64, head_dim)), 0)
    zeros = random.choice([0, 0x80000000], (8, head_dim))
    denormals = random.integers(0, 0x800000, (32, head_dim)) + zeros[:1]
    alone = np.tile(some[:, None], head_dim)
    mixed = random.integers(0, 1 << 32, (64, head_dim))
    bits = np.concatenate([few, zeros, denormals, alone, mixed]).astype(np.uint32)
    normal = random.normal(size=(32, head_dim)).astype(np.float32)
    normal[random.random(normal.shape) < 0.01] = np.inf
    normal[16:][random.random((16, head_dim)) < 0.01] = np.nan
    return np.concatenate([bits.view(np.float32), normal])


def inputs(name: str, head_dim: int, format: CacheFormat | None = None) -> np.ndarray:
    """Rows for a test of a format."""
    random, format = rng(f"{name} {head_dim}"), format or FORMATS[name]
    return np.concatenate(
        [
            magnitudes(random, 128, head_dim),
            every_bf16(random, head_dim),
            ties_and_edges(random, format, head_dim),
            special(random, head_dim),
        ]
    )


def assert_same_bytes(actual: torch.Tensor, expected: np.ndarray, rows: np.ndarray, what: str):
    """Equal shapes and bytes; else says which row has which bytes."""
    actual = actual.cpu().numpy()
    assert (actual.shape, actual.dtype) == (expected.shape, np.uint8), what
    differing = np.argwhere(actual != expected)
    if len(differing):
        row, byte = differing[0]
        raise AssertionError(
            f"{what}: {len(differing)} bytes differ; row {row} has {actual[row, byte]:#04x} at"
            f" {byte}, not {expected[row, byte]:#04x}; the row is {rows[row]}"
        )


# ---- bytes ---------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize(("head_dim", "rope_dim"), SHAPES)
def test_bytes_are_those_of_the_oracle(name, head_dim, rope_dim):
    rows = inputs(name, head_dim)
    codes, scales = quantise(torch.from_numpy(rows), name, rope_dim=rope_dim)
    expected_codes, expected_scales = format_oracle.expected(rows, FORMATS[name], rope_dim)
    assert_same_bytes(scales, expected_scales, rows, "scales")
    assert_same_bytes(codes, expected_codes, rows, "codes")


@each_format
def test_rows_in_bf16_give_the_bytes_of_the_same_values_in_fp32(name):
    rows = torch.from_numpy(every_bf16(rng(name), 512))
    for one, other in zip(
        quantise(rows.bfloat16(), name, rope_dim=64), quantise(rows, name, rope_dim=64), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30, 1e30, 0.0, -2.0, np.inf, np.nan, None])
@pytest.mark.parametrize("code", ["fp8_e4m3", "fp4_e2m1"])
@pytest.mark.parametrize("ties", ["even", "down"])
def test_a_scale_of_the_caller_divides_every_value(scale, code, ties):
    format = CacheFormat(code=code, scale="tensor", ties=ties, rope="bf16")
    rows = inputs("tensor", 128, format)
    tensor = None if scale is None else torch.tensor([scale], dtype=torch.float32)
    codes, scales = quantise(torch.from_numpy(rows), format, rope_dim=64, scale=tensor)
    fp32 = None if scale is None else float(np.float32(scale))
    expected, none = format_oracle.expected(rows, format, 64, fp32)
    assert scales.shape == none.shape == (len(rows), 0)
    assert_same_bytes(codes, expected, rows, "codes")


def legal_formats() -> list[CacheFormat]:
    """Every combination of the fields' values that is legal, with two blocks and two floors."""
    values = {
        "code": ["fp8_e4m3", "fp4_e2m1"],
        "block": [16, 64],
        "scale": ["fp32", "e8m0", "e4m3"],
        "rule": ["amax", "pow2"],
        "floor": [0.0, 0.01],
        "floor_on": ["amax", "scale"],
        "ties": ["even", "down"],
        "rope": ["quantised", "bf16"],
        "scale_bytes": [0, 32],
    }
    found = []
    for combination in itertools.product(*values.values()):
        try:
            found.append(CacheFormat(**dict(zip(values, combination, strict=True))))
        except TableError:
            continue
    return found


def test_every_combination_of_legal_fields_gives_the_bytes_of_the_oracle():
    formats = legal_formats()
    assert len(formats) == 320
    random = rng("combinations")
    rows = np.concatenate([magnitudes(random, 48, 128), special(random, 128)])
    for format in formats:
        codes, scales = quantise(torch.from_numpy(rows), format, rope_dim=64)
        expected_codes, expected_scales = format_oracle.expected(rows, format, 64)
        assert_same_bytes(scales, expected_scales, rows, f"scales, {format}")
        assert_same_bytes(codes, expected_codes, rows, f"codes, {format}")


@pytest.mark.parametrize(
    ("name", "codes", "scales"),
    [
        ("fp8_block128", "00", "00000000"),
        ("fp8_block128_floor", "00", "adac6f34"),  # the bits of 1e-4 / 448
        ("fp8_block128_pow2", "00", "00008034"),  # 2^-22
        ("mixed_584", "00", "69" + "00" * 7),  # -22
        ("mixed_584_scale_floor", "00", "72" + "00" * 7),  # -13
        ("mixed_584_low_floor", "00", "5c" + "00" * 7),  # -35
        ("mxfp4", "00", "01"),
        ("mxfp4_ties_down", "00", "70"),  # -15
        ("fp8_528", "00", "72"),
        ("fp4_288", "00", "01"),  # the code of 2^-9
    ],
)
def test_a_block_of_zeros_has_the_scale_of_the_engines(name, codes, scales):
    """The scale of a block of zeros, as the engines have it, whatever the oracle says."""
    found = quantise(torch.zeros(1, 128), name, rope_dim=64)
    assert found[0].unique().tolist() == [int(codes, 16)]
    assert bytes(found[1][0].tolist()).hex() in (scales, scales * 4, scales * 8)


def codes_of(name: str, *values: float) -> tuple[list[int], list[int]]:
    """The first codes, unpacked, and the first scale's bytes of a row with these values first."""
    rows = torch.zeros(1, 512)
    rows[0, : len(values)] = torch.tensor(values)
    codes, scales = (x[0].tolist() for x in quantise(rows, name))
    if FORMATS[name].code == "fp4_e2m1":
        codes = [nibble for byte in codes for nibble in (byte & 15, byte >> 4)]
    return codes[: len(values)], scales[: FORMATS[name].scale_width]


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("name", ["mixed_584", "fp8_528", "mxfp4", "fp4_288", "fp8_block128"])
def test_an_infinity_counts_as_the_largest_value_and_has_the_largest_code(name):
    largest = 0x7E if FORMATS[name].code == "fp8_e4m3" else 7
    negative = 0x80 if largest == 0x7E else 8
    codes, scale = codes_of(name, INF, 1.0, -INF)
    assert codes == [largest, 0, largest + negative]
    assert scale == codes_of(name, torch.finfo(torch.float32).max)[1]


@pytest.mark.parametrize("name", QUANTISED)
def test_a_nan_makes_its_block_nan_and_leaves_the_next_one(name):
    format = FORMATS[name]
    if not format.per_block:
        assert codes_of(name, -NAN, 1.0)[0] == [0x7F, 0x38]
        return
    rows = torch.ones(1, 512)
    clean = dequantise(*quantise(rows, name), name, head_dim=512)
    rows[0, 3] = -NAN
    codes, scales = quantise(rows, name)
    assert codes_of(name, -NAN, INF)[1] == {
        "fp32": [0xFF, 0xFF, 0xFF, 0x7F], "e8m0": [0xFF], "e4m3": [0x7F],
    }[format.scale]  # fmt: skip
    packed = 0x7F if format.code == "fp8_e4m3" else 0x77
    assert codes[0, : format.block * format.float_code.bits // 8].unique().tolist() == [packed]
    values = dequantise(codes, scales, name, head_dim=512)
    assert values[0, : format.block].isnan().all()
    assert torch.equal(values[0, format.block :], clean[0, format.block :])


@pytest.mark.gpu
@each_format
@pytest.mark.parametrize(("head_dim", "rope_dim"), SHAPES)
def test_bytes_and_values_on_a_gpu_are_those_on_a_cpu(name, head_dim, rope_dim):
    rows = inputs(name, head_dim)
    scale = torch.tensor([0.37]) if FORMATS[name].scale == "tensor" else None
    found = []
    for device in ("cpu", "cuda"):
        on_device = None if scale is None else scale.to(device)
        options = {"rope_dim": rope_dim, "scale": on_device}
        codes, scales = quantise(torch.from_numpy(rows).to(device), name, **options)
        values = dequantise(codes, scales, name, head_dim=head_dim, **options).cpu()
        found.append((codes.cpu().numpy(), scales.cpu().numpy(), values))
    assert_same_bytes(torch.from_numpy(found[1][1]), found[0][1], rows, "scales")
    assert_same_bytes(torch.from_numpy(found[1][0]), found[0][0], rows, "codes")
    assert torch.equal(found[1][2].nan_to_num(nan=7.0), found[0][2].nan_to_num(nan=7.0))


# ---- round trips ---------------------------------------------------------------------------------


def bounded(random: np.random.Generator, format: CacheFormat, *shape: int) -> np.ndarray:
    """Values of many magnitudes that no code of the format saturates at."""
    # The scale of e4m3 is to be a normal, for the others are too far apart.
    low, high = {"tensor": (-20, 6), "e4m3": (0, 6)}.get(format.scale, (-60, 60))
    row = np.exp2(random.uniform(low, high, (shape[0], 1)))
    return (random.normal(size=shape) * row).astype(np.float32)


@each_format
def test_a_round_trip_is_within_half_a_step(name):
    format, random = FORMATS[name], rng(name)
    rows = bounded(random, format, 256, 512)
    codes, scales = quantise(torch.from_numpy(rows), name, rope_dim=64)
    values = dequantise(codes, scales, name, head_dim=512, rope_dim=64)
    assert values.dtype == torch.float32
    split = 448 if format.rope == "bf16" else 512
    error = np.abs(values.numpy().astype(np.float64) - rows)
    assert (error[:, split:] <= np.abs(rows[:, split:]) * 2.0**-8).all()
    if format.code == "fp32":
        assert not error.any()
        return
    if format.code == "bf16":
        assert (error <= np.abs(rows) * 2.0**-8).all()
        return
    scale = np.ones((256, 1))
    if format.per_block:
        blocks = rows[:, :split].reshape(256, -1, format.block)
        scale = np.repeat(format_oracle.block_scales(blocks, format)[1], format.block, axis=1)
    grid = format_oracle.GRIDS[format.code]
    at = np.searchsorted(grid, np.abs(rows[:, :split]) / scale).clip(1, len(grid) - 1)
    half = (grid[at] - grid[at - 1]) / 2 * scale
    assert (error[:, :split] <= half * (1 + 1e-6)).all()


def random_codes(random: np.random.Generator, name: str, number: int) -> np.ndarray:
    """Codes [number, blocks, columns]; one in each block is the largest, at random with a sign."""
    format = FORMATS[name]
    largest = 0x7E if format.code == "fp8_e4m3" else 7
    layout = format.layout(512, 64)
    shape = number, layout.scale_count or 1, format.block or layout.columns
    codes = random.integers(0, largest + 1, shape)
    codes[..., 5] = largest
    return codes + random.integers(0, 2, shape) * (largest + (2 if largest == 0x7E else 1)) * (
        (codes > 0) | (format.ties == "even")
    )


def random_scales(random: np.random.Generator, format: CacheFormat, *shape: int) -> np.ndarray:
    """Bytes [..., scale_width] of scales that the format's floor lets be."""
    if format.scale == "e8m0":
        return random.integers(115 if format.floor > 1e-30 else 1, 200, (*shape, 1))
    if format.scale == "e4m3":
        return random.integers(1, 0x7F, (*shape, 1))
    scale = np.exp2(random.uniform(-21, 60, (*shape, 1))).astype(np.float32)
    if format.rule == "pow2":
        scale = np.exp2(np.ceil(np.log2(scale)))
    return scale.view(np.uint8)


@pytest.mark.parametrize("name", QUANTISED)
def test_bytes_survive_a_round_trip_where_a_block_has_the_largest_code(name):
    format, random = FORMATS[name], rng(name)
    layout = format.layout(512, 64)
    codes = random_codes(random, name, 256).reshape(256, -1)
    if format.code == "fp4_e2m1":
        codes = codes[:, 0::2] + 16 * codes[:, 1::2]
    last = random.integers(0, 0x7F80, (256, layout.bf16_columns)).astype(np.uint16).view(np.uint8)
    codes = torch.from_numpy(np.concatenate([codes.astype(np.uint8), last], axis=1))
    scales = torch.zeros(256, layout.scale_bytes, dtype=torch.uint8)
    found = random_scales(random, format, 256, layout.scale_count).reshape(256, -1)
    if format.per_block:
        scales[:, : found.shape[1]] = torch.from_numpy(found.astype(np.uint8))
    rows = dequantise(codes, scales, name, head_dim=512, rope_dim=64)
    again = quantise(rows, name, rope_dim=64)
    assert torch.equal(again[0], codes)
    if (format.scale, format.rule) == ("fp32", "amax"):  # 448 * scale is rounded, so is its 448th
        ulps = again[1].view(torch.int32) - scales.view(torch.int32)
        assert ulps.abs().max() <= 1
    else:
        assert torch.equal(again[1], scales)


# Any other scale follows amax, which the first round trip may change.
STABLE = [name for name, one in FORMATS.items() if not one.per_block or one.rule == "pow2"]


@pytest.mark.parametrize("name", STABLE)
def test_a_second_round_trip_changes_no_value_where_scales_are_powers_of_two(name):
    rows = torch.from_numpy(inputs(name, 512))
    once = dequantise(*quantise(rows, name), name, head_dim=512)
    twice = dequantise(*quantise(once, name), name, head_dim=512)
    assert torch.equal(once.nan_to_num(nan=7.0), twice.nan_to_num(nan=7.0))


@pytest.mark.parametrize("code", ["fp8_e4m3", "fp4_e2m1"])
def test_a_scale_of_the_caller_multiplies_every_code(code):
    grid = format_oracle.GRIDS[code]
    every = np.concatenate([grid, [np.nan] * (code == "fp8_e4m3")])
    codes = np.arange(2 * len(every), dtype=np.uint8)
    if code == "fp4_e2m1":
        codes = codes[0::2] + 16 * codes[1::2]
    found = dequantise(
        torch.from_numpy(codes)[None],
        torch.empty(1, 0, dtype=torch.uint8),
        CacheFormat(code=code, scale="tensor"),
        head_dim=2 * len(every),
        scale=torch.tensor([0.37]),
    )
    expected = np.concatenate([every, -every]).astype(np.float32) * np.float32(0.37)
    np.testing.assert_array_equal(found[0].numpy(), expected)
    assert np.signbit(found[0].numpy())[len(every)]


OWN = """
import torch
from kvfold import formats
from kvfold.codegen import load_table
assert list(load_table().formats) == ["mine"]
layout = formats.cache_format("mine").layout(256, 64, rows_per_page=4)
rows = torch.randn(8, 256)
codes, scales = formats.quantise(rows, "mine", rope_dim=64)
assert scales.shape == (8, 32) and (scales[:, 24:] == 0).all()
cache = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
formats.store_rows(cache, torch.arange(8).flip(0), codes, scales, layout)
loaded = formats.load_rows(cache, torch.arange(8).flip(0), layout)
assert torch.equal(loaded[0], codes) and torch.equal(loaded[1], scales)
values = formats.dequantise(*loaded, "mine", head_dim=256, rope_dim=64)
torch.testing.assert_close(values, rows, atol=0.15, rtol=0.08)
print(layout.page_bytes)
"""


def test_a_format_of_ones_own_is_one_row_of_a_table(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "version: 1\ncache_formats:\n  mine: {code: fp8_e4m3, block: 32, scale: fp32, floor: 1e-3,"
        " ties: down, rope: bf16, scale_bytes: 32, placement: after_row}\n"
    )
    environment = os.environ | {"KVFOLD_CONFIG": str(file)}
    done = subprocess.run(
        [sys.executable, "-c", OWN], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4 * (192 + 2 * 64 + 32)


# ---- pages ---------------------------------------------------------------------------------------

# The bytes of row s of a page of T rows of D columns, of which 64 are rotated: (start, length) of
# data and of scales, from the engines' layouts.
PLACES = {
    "bf16": lambda s, T, D: ((s * D * 2, D * 2), (0, 0)),
    "fp32": lambda s, T, D: ((s * D * 4, D * 4), (0, 0)),
    "fp8_tensor": lambda s, T, D: ((s * D, D), (0, 0)),
    "fp8_block128": lambda s, T, D: ((s * D, D), (T * D + s * (D // 128) * 4, D // 128 * 4)),
    "mixed_584": lambda s, T, D: ((s * (D + 64), D + 64), (T * (D + 64) + s * 8, 8)),
    "mxfp4": lambda s, T, D: ((s * D // 2, D // 2), (T * D // 2 + s * D // 32, D // 32)),
    "fp8_528": lambda s, T, D: ((s * D, D), (T * D + s * D // 32, D // 32)),
    "fp8_528_interleaved": lambda s, T, D: (
        (s * (D + D // 32), D), (s * (D + D // 32) + D, D // 32),
    ),
    "fp4_288": lambda s, T, D: ((s * D // 2, D // 2), (T * D // 2 + s * D // 16, D // 16)),
    "fp4_288_interleaved": lambda s, T, D: (
        (s * (D // 2 + D // 16), D // 2), (s * (D // 2 + D // 16) + D // 2, D // 16),
    ),
}  # fmt: skip


def place_of(name: str):
    """The places of a format, which rules and floors do not change."""
    for suffix in ("", "_floor", "_pow2", "_scale_floor", "_low_floor", "_ties_down"):
        if name.removesuffix(suffix) in PLACES:
            return PLACES[name.removesuffix(suffix)]
    raise KeyError(name)


@each_format
@pytest.mark.parametrize("head_dim", [512, 128])
@pytest.mark.parametrize(("rows_per_page", "padding"), [(64, 0), (2, 64), (5, 20)])
def test_rows_are_stored_at_their_bytes_and_nowhere_else(name, head_dim, rows_per_page, padding):
    random = rng(f"{name} {rows_per_page}")
    layout = FORMATS[name].layout(head_dim, 64, rows_per_page)
    pages, before, after = 4, 16, 48
    stride = layout.page_bytes + padding
    storage = random.integers(0, 256, before + pages * stride + after).astype(np.uint8)
    memory = torch.from_numpy(storage.copy())
    cache = memory.as_strided((pages, layout.page_bytes), (stride, 1), before)
    slots = random.permutation(pages * rows_per_page)[: pages * rows_per_page // 2 + 1]
    skipped = [-1, -rows_per_page, pages * rows_per_page, 2**62, -(2**63)]
    slots = random.permutation(np.concatenate([slots, skipped])).astype(np.int64)
    codes = random.integers(0, 256, (len(slots), layout.data_bytes)).astype(np.uint8)
    scales = random.integers(0, 256, (len(slots), layout.scale_bytes)).astype(np.uint8)
    stored = np.isin(slots, skipped, invert=True)
    for slot, code, scale in zip(slots[stored], codes[stored], scales[stored], strict=True):
        page, row = divmod(int(slot), rows_per_page)
        for (start, length), data in zip(
            place_of(name)(row, rows_per_page, head_dim), (code, scale), strict=True
        ):
            assert length == len(data)
            start += before + page * stride
            storage[start : start + length] = data
    arguments = cache, torch.from_numpy(slots)
    store_rows(*arguments, torch.from_numpy(codes), torch.from_numpy(scales), layout)
    assert np.array_equal(memory.numpy(), storage)
    loaded = load_rows(*arguments, layout)
    assert np.array_equal(loaded[0].numpy(), np.where(stored[:, None], codes, 0))
    assert np.array_equal(loaded[1].numpy(), np.where(stored[:, None], scales, 0))
    assert np.array_equal(memory.numpy(), storage)


@pytest.mark.parametrize("name", ["mixed_584", "fp4_288_interleaved", "bf16"])
def test_no_rows_are_no_error(name):
    codes, scales = quantise(torch.empty(0, 512), name, rope_dim=64)
    assert dequantise(codes, scales, name, head_dim=512, rope_dim=64).shape == (0, 512)
    layout = FORMATS[name].layout(512, 64, 4)
    cache = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    store_rows(cache, torch.empty(0, dtype=torch.int64), codes, scales, layout)
    assert load_rows(cache, torch.empty(0, dtype=torch.int64), layout)[0].shape == codes.shape


# ---- arguments -----------------------------------------------------------------------------------


def quantised(rows=None, name="mixed_584", **options):
    return quantise(torch.zeros(2, 512) if rows is None else rows, name, rope_dim=64, **options)


def stored(cache=None, slots=None, codes=None, scales=None):
    layout = FORMATS["mixed_584"].layout(512, 64, 4)
    given = quantised()
    store_rows(
        torch.zeros(2, layout.page_bytes, dtype=torch.uint8) if cache is None else cache,
        torch.arange(2) if slots is None else slots,
        given[0] if codes is None else codes,
        given[1] if scales is None else scales,
        layout,
    )


@pytest.mark.parametrize(
    ("call", "options", "words"),
    [
        (quantised, {"rows": torch.zeros(2, 512).half()}, "rows is of torch.float16; accepted: "),
        (
            quantised,
            {"rows": torch.zeros(512)},
            r"rows is of shape \[512\]; accepted: \[any, any\]",
        ),
        (quantised, {"scale": torch.ones(1)}, "scale is a tensor; accepted: None, as the format"),
        (
            quantised,
            {"name": "fp8_tensor", "scale": torch.tensor(1.0)},
            r"scale is of shape \[\]; accepted: \[1\]",
        ),
        (
            quantised,
            {"name": "fp8_tensor", "scale": torch.ones(1).double()},
            "scale is of torch.float64; accepted: torch.float32",
        ),
        (quantised, {"rows": torch.zeros(2, 100)}, "head_dim = 100 leaves 36 columns for fp8_e4m3"),
        (quantised, {"name": "mixed"}, "mixed is no cache format, did you mean mixed_584"),
        (
            stored,
            {"cache": torch.zeros(2, 2335, dtype=torch.uint8)},
            "kvfold.formats.store_rows: cache is of 2335 bytes per page; accepted: >= 2336",
        ),
        (stored, {"cache": torch.zeros(2, 9999)}, "cache is of torch.float32; accepted: torch.ui"),
        (stored, {"slots": torch.arange(3)}, r"slots is of shape \[3\]; accepted: \[2\]"),
        (
            stored,
            {"slots": torch.arange(2).int()},
            "slots is of torch.int32; accepted: torch.int64",
        ),
        (
            stored,
            {"codes": torch.zeros(2, 512, dtype=torch.uint8)},
            r"codes is of shape \[2, 512\]; accepted: \[any, 576\]",
        ),
        (
            stored,
            {"scales": torch.zeros(2, 7, dtype=torch.uint8)},
            r"scales is of shape \[2, 7\]; accepted: \[2, 8\]",
        ),
    ],
)
def test_arguments_that_are_not_accepted(call, options, words):
    with pytest.raises(ValueError, match=words):
        call(**options)


def test_a_format_is_found_by_its_name():
    assert cache_format("mixed_584") is cache_format(cache_format("mixed_584"))
    assert cache_format("mixed_584") == FORMATS["mixed_584"]


@each_format
def test_no_rows_have_no_bytes(name):
    layout = FORMATS[name].layout(512, 64)
    codes, scales = quantise(torch.zeros(0, 512), name, rope_dim=64)
    assert codes.shape == (0, layout.data_bytes) and scales.shape == (0, layout.scale_bytes)
