"""Cache formats: what bytes a compressed row has in the cache.

An entry of the table's `cache_formats` section declares a format. docs/formats.md has the shipped
ones to the byte.
"""

import struct
from dataclasses import dataclass

from .errors import TableError
from .fields import POSITIVE, FieldSet, Interval, check_value, choice, integer, number
from .variant import refuse

SMALLEST_NORMAL = 2.0**-126  # of fp32
LARGEST_FLOOR = 1e30


@dataclass(frozen=True)
class FloatCode:
    """A floating-point code: a sign bit, exponent bits, mantissa bits.

    Attributes:
        bits: of a code.
        mantissa_bits: of these.
        bias: of the exponent.
        largest: the code at which a value saturates; bf16 and fp32: infinity.
        nan: the code that every NaN becomes. fp4 has none: there it is the largest.
    """

    bits: int
    mantissa_bits: int
    bias: int
    largest: int
    nan: int

    def value(self, code: int) -> float:
        """The value of a finite code, without its sign."""
        exponent, mantissa = divmod(code % (1 << self.bits - 1), 1 << self.mantissa_bits)
        mantissa += (1 << self.mantissa_bits) if exponent else 0
        return mantissa * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits)


CODES = {
    "bf16": FloatCode(bits=16, mantissa_bits=7, bias=127, largest=0x7F80, nan=0x7FFF),
    "fp32": FloatCode(bits=32, mantissa_bits=23, bias=127, largest=0x7F800000, nan=0x7FFFFFFF),
    "fp8_e4m3": FloatCode(bits=8, mantissa_bits=3, bias=7, largest=0x7E, nan=0x7F),
    "fp4_e2m1": FloatCode(bits=4, mantissa_bits=1, bias=1, largest=0x7, nan=0x7),
}
BLOCKS = (16, 32, 64, 128, 256, 512)
QUANTISED = ("fp8_e4m3", "fp4_e2m1")
SCALE_WIDTH = {"fp32": 4, "e8m0": 1, "e4m3": 1}  # bytes of a block's scale


@dataclass(frozen=True, kw_only=True)
class CacheFormat(FieldSet):
    """How a compressed row is quantised, and where its bytes lie in a page of the cache.

    Raises:
        TableError: a value that is not legal, alone or with the others.
    """

    code: str = choice(*CODES, help="of a column; fp4: the even column is in the low nibble")
    block: int = integer((0, *BLOCKS), default=0, help="columns per scale; 0: no scale per block")
    scale: str = choice(
        "none", "tensor", *SCALE_WIDTH, default="none",
        help="tensor: one fp32 value on the device, which the caller passes; fp32, e8m0, e4m3: one"
        " per block, in the page",
    )  # fmt: skip
    rule: str = choice(
        "amax", "pow2", default="amax",
        help="how a scale is made. amax: amax / largest code; pow2: that, rounded up to a power of"
        " two",
    )  # fmt: skip
    floor: float = number(
        Interval(0.0, LARGEST_FLOOR),
        default=0.0,
        help="the least value of what floor_on names; 0: no floor",
    )
    floor_on: str = choice(
        "amax", "scale", default="amax",
        help="what floor bounds. amax: amax, before the division; scale: the scale, before it is"
        " rounded",
    )  # fmt: skip
    ties: str = choice(
        "even", "down", default="even",
        help="how a value halfway between two codes is rounded. even: to the even code, and a zero"
        " keeps its sign; down: toward zero, and zeros are positive",
    )  # fmt: skip
    rope: str = choice(
        "quantised", "bf16", default="quantised",
        help="how the last rope_dim columns are stored. quantised: as the others; bf16: behind the"
        " codes, in no block",
    )  # fmt: skip
    scale_bytes: int = integer(
        range(1025), default=0,
        help="bytes of a row's scales and of the zeros behind them; 0: no zeros",
    )  # fmt: skip
    placement: str = choice(
        "after_page", "after_row", default="after_page",
        help="where a row's scales are: behind the data of all rows of the page, or of the row",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.code not in QUANTISED:
            why = f"does not go with code {self.code}"
            self._require(why, scale="none", ties="even", rope="quantised")
        elif self.scale == "none":
            raise refuse(
                self, "scale", f"does not go with code {self.code}", ("tensor", *SCALE_WIDTH)
            )
        if not self.per_block:
            why = f"needs a scale per block, and scale is {self.scale}"
            self._require(
                why, block=0, rule="amax", floor=0.0, scale_bytes=0, placement="after_page"
            )
        elif not self.block:
            raise refuse(self, "block", f"does not go with scale {self.scale}", BLOCKS)
        if self.scale in ("e8m0", "e4m3"):
            rule = "pow2" if self.scale == "e8m0" else "amax"
            self._require(f"does not go with scale {self.scale}", rule=rule)
        if self.scale_bytes % self.scale_width:
            what = f"does not go with scales of {self.scale_width} bytes"
            raise refuse(self, "scale_bytes", what, f"a multiple of {self.scale_width}")
        self._check_floor()

    def _require(self, why: str, **only) -> None:
        """Raises TableError unless the fields have these values, the only ones that are legal."""
        for name, value in only.items():
            if getattr(self, name) != value:
                raise refuse(self, name, why, (value,))

    def _check_floor(self) -> None:
        """Raises TableError for a floor that is missing, or at which a scale would be no normal."""
        least = SMALLEST_NORMAL
        if self.rule == "pow2" and self.floor_on == "amax":
            least *= self.largest
        needed = self.rule == "pow2"
        if (self.floor or needed) and self.floor < least:
            what = f"is too small for rule {self.rule} and floor_on {self.floor_on}"
            legal = f"{'' if needed else '0, or '}{least} to {LARGEST_FLOOR}"
            raise refuse(self, "floor", what, legal)
        if not self.floor:
            self._require("needs a floor", floor_on="amax")

    # ---- derived ---------------------------------------------------------------------------------

    @property
    def per_block(self) -> bool:
        """Whether the page holds a scale for each block."""
        return self.scale in SCALE_WIDTH

    @property
    def float_code(self) -> FloatCode:
        """The code of a column."""
        return CODES[self.code]

    @property
    def largest(self) -> float:
        """The largest value that has a code: 448 or 6; of bf16 and fp32, infinity stands for it."""
        return self.float_code.value(self.float_code.largest)

    @property
    def floor_bits(self) -> int:
        """The bits of the floor, rounded to fp32; 0 without a floor."""
        return struct.unpack("<i", struct.pack("<f", self.floor))[0] if self.floor else 0

    @property
    def scale_width(self) -> int:
        """Bytes of one scale; 1 if the page holds none."""
        return SCALE_WIDTH.get(self.scale, 1)

    def layout(self, head_dim: int, rope_dim: int = 0, rows_per_page: int = 1) -> "PageLayout":
        """Where a row's bytes lie.

        Args:
            head_dim: columns of a row.
            rope_dim: the last columns, which RoPE rotates.
            rows_per_page: rows of a page.

        Raises:
            TableError: the format has no such rows.
        """
        return PageLayout(
            format=self, head_dim=head_dim, rope_dim=rope_dim, rows_per_page=rows_per_page
        )


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """Where the bytes of a row lie in a page of the cache. All offsets are in bytes.

    Data and rows start at multiples of 4 bytes, from a page's first byte on.

    Attributes:
        format: the cache format.
        head_dim: columns of a row.
        rope_dim: the last columns, which RoPE rotates.
        rows_per_page: rows of a page.

    Raises:
        TableError: the format has no such rows.
    """

    format: CacheFormat
    head_dim: int
    rope_dim: int
    rows_per_page: int

    def __post_init__(self):
        check_value("head_dim", self.head_dim, POSITIVE)
        check_value("rope_dim", self.rope_dim, range(0, self.head_dim + 1, 2))
        check_value("rows_per_page", self.rows_per_page, POSITIVE)
        step = self.format.block or 32 // self.format.float_code.bits
        if self.columns % step or not self.columns:
            others = f"{self.bf16_columns} plus " if self.bf16_columns else ""
            raise TableError(
                f"leaves {self.columns} columns for {self.format.code}",
                field="head_dim",
                value=self.head_dim,
                legal=f"{others}a multiple of {step}",
            )
        needed = self.scale_count * self.format.scale_width
        if self.format.scale_bytes and self.format.scale_bytes < needed:
            what = f"is too small for {self.scale_count} scales"
            raise refuse(self.format, "scale_bytes", what, f"{needed} or more")
        if self.row_stride % 4:
            what = f"lets rows start every {self.row_stride} bytes"
            raise refuse(self.format, "scale_bytes", what, f"{-(-self.scale_bytes // 4) * 4}")

    @property
    def bf16_columns(self) -> int:
        """The last columns, which are stored as bf16 behind the codes."""
        return self.rope_dim if self.format.rope == "bf16" else 0

    @property
    def columns(self) -> int:
        """The first columns, which are stored as codes."""
        return self.head_dim - self.bf16_columns

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes."""
        return self.columns * self.format.float_code.bits // 8

    @property
    def data_bytes(self) -> int:
        """Bytes of a row's data: codes, then bf16 columns."""
        return self.code_bytes + 2 * self.bf16_columns

    @property
    def scale_count(self) -> int:
        """Scales of a row that are in the page."""
        return self.columns // self.format.block if self.format.per_block else 0

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales, those that no scale takes included."""
        return self.format.scale_bytes or self.scale_count * self.format.scale_width

    @property
    def interleaved(self) -> bool:
        """Whether a row's scales stand behind its data, before the next row's."""
        return self.format.placement == "after_row"

    @property
    def row_stride(self) -> int:
        """From a row's data to the next row's."""
        return self.data_bytes + (self.scale_bytes if self.interleaved else 0)

    @property
    def scale_stride(self) -> int:
        """From a row's scales to the next row's."""
        return self.row_stride if self.interleaved else self.scale_bytes

    @property
    def scale_start(self) -> int:
        """The offset of row 0's scales in the page."""
        return self.data_bytes * (1 if self.interleaved else self.rows_per_page)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page; the caller's page stride may be larger."""
        return self.rows_per_page * (self.data_bytes + self.scale_bytes)

    def data_offset(self, row: int) -> int:
        """The offset of a row's data in the page."""
        return row * self.row_stride

    def scale_offset(self, row: int) -> int:
        """The offset of a row's scales in the page."""
        return self.scale_start + row * self.scale_stride
