"""Cache formats of a table: legal fields, where a row's bytes lie, the section of a table file."""

import itertools
from dataclasses import replace

import pytest
from strategies import text
from table_files import ROW, load, refused

from kvfold.codegen import CacheFormat, TableError, load_table
from kvfold.codegen.documentation import page_picture
from kvfold.codegen.formats import CODES

FORMATS = load_table().formats
MIXED = {
    "code": "fp8_e4m3", "block": 64, "scale": "e8m0", "rule": "pow2", "floor": 1e-4, "rope": "bf16",
    "scale_bytes": 8,
}  # fmt: skip
PLAIN = {"code": "fp8_e4m3", "block": 128, "scale": "fp32"}


def error_of(call, *args, **kwargs) -> TableError:
    with pytest.raises(TableError) as caught:
        call(*args, **kwargs)
    return caught.value


# ---- fields --------------------------------------------------------------------------------------


def test_defaults_are_those_of_a_format_without_scales():
    assert CacheFormat(code="bf16").values() == {
        "code": "bf16", "block": 0, "scale": "none", "rule": "amax", "floor": 0.0,
        "floor_on": "amax", "ties": "even", "rope": "quantised", "scale_bytes": 0,
        "placement": "after_page",
    }  # fmt: skip
    assert CacheFormat(**MIXED).given() == MIXED


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"code": "fp16"}, "code", 'code = "fp16" is not accepted; legal: bf16, fp32, fp8_e4m3'),
        (PLAIN | {"block": 48}, "block", "block = 48 is not accepted; legal: 0, 16, 32"),
        (PLAIN | {"floor": 1}, "floor", "floor = 1 is not accepted; legal: 0.0 to 1e+30 (number"),
        (PLAIN | {"floor": -1e-4}, "floor", "floor = -0.0001 is not accepted"),
        (PLAIN | {"floor": float("nan")}, "floor", "floor = NaN is not accepted"),
        (PLAIN | {"floor": "1e-4"}, "floor", 'floor = "1e-4" is not accepted'),
        # Codes that are the values themselves.
        ({"code": "bf16", "scale": "fp32"}, "scale", "does not go with code bf16; legal: none"),
        ({"code": "fp32", "scale": "tensor"}, "scale", "does not go with code fp32; legal: none"),
        ({"code": "bf16", "ties": "down"}, "ties", "does not go with code bf16; legal: even"),
        ({"code": "fp32", "rope": "bf16"}, "rope", "does not go with code fp32; legal: quantised"),
        ({"code": "bf16", "block": 64}, "block", "needs a scale per block, and scale is none"),
        # Codes that need a scale.
        ({"code": "fp8_e4m3"}, "scale", "does not go with code fp8_e4m3; legal: tensor, fp32, e8m"),
        (PLAIN | {"block": 0}, "block", "does not go with scale fp32; legal: 16, 32, 64"),
        (PLAIN | {"scale": "tensor"}, "block", "needs a scale per block, and scale is tensor; l"),
        (
            {"code": "fp8_e4m3", "scale": "tensor", "rule": "pow2"},
            "rule", "needs a scale per block, and scale is tensor; legal: amax",
        ),
        (
            {"code": "fp8_e4m3", "scale": "tensor", "floor": 1e-4},
            "floor", "needs a scale per block, and scale is tensor; legal: 0.0",
        ),
        (
            {"code": "fp8_e4m3", "scale": "tensor", "scale_bytes": 4},
            "scale_bytes", "needs a scale per block",
        ),
        (
            {"code": "fp8_e4m3", "scale": "tensor", "placement": "after_row"},
            "placement", "needs a scale per block, and scale is tensor; legal: after_page",
        ),
        # Rules.
        (MIXED | {"rule": "amax"}, "rule", "does not go with scale e8m0; legal: pow2"),
        (MIXED | {"scale": "e4m3"}, "rule", "does not go with scale e4m3; legal: amax"),
        (PLAIN | {"scale_bytes": 6}, "scale_bytes", "scales of 4 bytes; legal: a multiple of 4"),
        # Floors.
        (
            PLAIN | {"rule": "pow2"},
            "floor", "floor = 0.0 is too small for rule pow2 and floor_on amax; legal: 5.26621",
        ),
        (MIXED | {"floor": 5.2e-36}, "floor", "is too small for rule pow2 and floor_on amax"),
        (
            MIXED | {"floor": 1.1e-38, "floor_on": "scale"},
            "floor", "is too small for rule pow2 and floor_on scale; legal: 1.1754943508222875e-38",
        ),
        (PLAIN | {"floor": 1e-39}, "floor", "is too small for rule amax and floor_on amax; le"),
        (PLAIN | {"floor_on": "scale"}, "floor_on", "needs a floor; legal: amax"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together(fields, field, words):
    error = error_of(CacheFormat, **fields)
    assert error.field == field and error.legal
    assert str(error.value) == str(fields.get(field, CacheFormat.field(field).default))
    assert words in str(error)


def test_the_smallest_floors_that_a_power_of_two_takes_are_accepted():
    for floor in (448 * 2.0**-126, 1e30):
        assert CacheFormat(**MIXED | {"floor": floor}).floor == floor
    assert CacheFormat(**MIXED | {"floor": 2.0**-126, "floor_on": "scale"}).floor_bits == 1 << 23
    assert CacheFormat(**PLAIN | {"floor": 1e-4}).floor_bits == 0x38D1B717
    assert CacheFormat(**PLAIN | {"floor": -0.0}).floor_bits == 0


def test_codes_have_the_values_of_their_definitions():
    fp4, fp8, bf16 = (CODES[name] for name in ("fp4_e2m1", "fp8_e4m3", "bf16"))
    assert [fp4.value(code) for code in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    some = {0: 0, 1: 2**-9, 7: 7 * 2**-9, 8: 2**-6, 0x38: 1, 0x39: 1.125, 0x7E: 448}
    assert {code: fp8.value(code) for code in some} == some
    assert {code: bf16.value(code) for code in (1, 0x80, 0x3FC0)} == {
        1: 2**-133, 0x80: 2**-126, 0x3FC0: 1.5,
    }  # fmt: skip
    for code in (fp4, fp8):
        sign = 1 << code.bits - 1
        assert code.value(code.largest) == code.value(code.largest + sign)


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head_dim", "rows", "data", "scales", "count", "page", "last"),
    [  # last: where data and scales of the last row begin
        ("bf16", 512, 64, 1024, 0, 0, 65536, (64512, 65536)),
        ("fp32", 128, 64, 512, 0, 0, 32768, (32256, 32768)),
        ("fp8_tensor", 512, 64, 512, 0, 0, 32768, (32256, 32768)),
        ("fp8_block128", 128, 64, 128, 4, 1, 64 * 132, (8064, 8192 + 252)),
        ("fp8_block128", 512, 32, 512, 16, 4, 32 * 528, (15872, 16384 + 31 * 16)),
        ("mixed_584", 512, 64, 576, 8, 7, 64 * 584, (63 * 576, 64 * 576 + 63 * 8)),
        ("mixed_584", 512, 2, 576, 8, 7, 2 * 584, (576, 1152 + 8)),
        ("mixed_584", 128, 64, 192, 8, 1, 64 * 200, (63 * 192, 64 * 192 + 63 * 8)),
        ("mxfp4", 128, 64, 64, 4, 4, 64 * 68, (63 * 64, 4096 + 63 * 4)),
        ("fp8_528", 512, 64, 512, 16, 16, 64 * 528, (63 * 512, 32768 + 63 * 16)),
        ("fp8_528_interleaved", 512, 64, 512, 16, 16, 64 * 528, (63 * 528, 63 * 528 + 512)),
        ("fp4_288", 512, 64, 256, 32, 32, 64 * 288, (63 * 256, 16384 + 63 * 32)),
        ("fp4_288_interleaved", 512, 64, 256, 32, 32, 64 * 288, (63 * 288, 63 * 288 + 256)),
        ("fp4_288_interleaved", 128, 1, 64, 8, 8, 72, (0, 64)),
    ],
)
def test_bytes_of_a_page(name, head_dim, rows, data, scales, count, page, last):
    layout = FORMATS[name].layout(head_dim, 64, rows)
    assert (layout.data_bytes, layout.scale_bytes, layout.scale_count) == (data, scales, count)
    assert layout.page_bytes == page
    assert (layout.data_offset(rows - 1), layout.scale_offset(rows - 1)) == last


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("head_dim", "rope_dim", "rows"), [(512, 64, 64), (128, 64, 3)])
def test_the_rows_of_a_page_fill_it_without_an_overlap(name, head_dim, rope_dim, rows):
    layout = FORMATS[name].layout(head_dim, rope_dim, rows)
    taken = []
    for row in range(rows):
        assert layout.data_offset(row) % 4 == 0
        taken += range(layout.data_offset(row), layout.data_offset(row) + layout.data_bytes)
        taken += range(layout.scale_offset(row), layout.scale_offset(row) + layout.scale_bytes)
    assert sorted(taken) == list(range(layout.page_bytes))


def test_rope_columns_count_as_codes_unless_they_are_bf16():
    quantised, bf16 = CacheFormat(**PLAIN), CacheFormat(**PLAIN | {"rope": "bf16"})
    assert (quantised.layout(512, 128).columns, quantised.layout(512, 128).bf16_columns) == (512, 0)
    assert (bf16.layout(512, 128).columns, bf16.layout(512, 128).bf16_columns) == (384, 128)
    assert bf16.layout(512, 128).data_bytes == 384 + 256
    assert bf16.layout(512).data_bytes == 512


@pytest.mark.parametrize(
    ("fields", "sizes", "words"),
    [
        (MIXED, (0, 0, 1), "head_dim = 0 is not accepted; legal: 1 or more"),
        (MIXED, (512, 63, 1), "rope_dim = 63 is not accepted; legal: 0 to 512 in steps of 2"),
        (MIXED, (128, 130, 1), "rope_dim = 130 is not accepted; legal: 0 to 128"),
        (MIXED, (512, 64, 0), "rows_per_page = 0 is not accepted"),
        (MIXED, (512, 32, 1), "head_dim = 512 leaves 480 columns for fp8_e4m3; legal: 32 plus "),
        (MIXED, (64, 64, 1), "head_dim = 64 leaves 0 columns for fp8_e4m3; legal: 64 plus a "),
        (PLAIN, (192, 64, 1), "head_dim = 192 leaves 192 columns for fp8_e4m3; legal: a mult"),
        ({"code": "bf16"}, (33, 0, 1), "head_dim = 33 leaves 33 columns for bf16; legal: a multip"),
        (MIXED, (1024, 64, 1), "scale_bytes = 8 is too small for 15 scales; legal: 15 or more"),
        (
            MIXED | {"scale_bytes": 0, "placement": "after_row"},
            (512, 64, 1),
            "scale_bytes = 0 lets rows start every 583 bytes; legal: 8",
        ),
        ({"code": "fp8_e4m3", "scale": "tensor"}, (30, 0, 1), "head_dim = 30 leaves 30 columns"),
    ],
)  # fmt: skip
def test_rows_that_a_format_does_not_have(fields, sizes, words):
    error = error_of(CacheFormat(**fields).layout, *sizes)
    assert words in str(error)
    assert error.field and error.value is not None and error.legal


def test_a_picture_has_every_part_of_a_page():
    layouts = [CacheFormat(**MIXED).layout(head_dim, 64, 64) for head_dim in (512, 128)]
    assert page_picture(layouts).splitlines() == [
        "      head_dim 512      head_dim 128",
        "    start    bytes    start    bytes",
        "        0      448        0       64   row 0: codes, fp8_e4m3",
        "      448      128       64      128   row 0: last 64 columns, bf16",
        "      576      576      192      192   row 1, and so on",
        "    36288      576    12096      192   row 63",
        "    36864        7    12288        1   row 0: scales, e8m0",
        "    36871        1    12289        7   row 0: zeros",
        "    36872        8    12296        8   row 1, and so on",
        "    37368        8    12792        8   row 63",
        "    37376             12800            end of the page",
    ]
    (layout,) = [FORMATS["fp8_528_interleaved"].layout(512, 64, 64)]
    assert [line.split() for line in page_picture([layout]).splitlines()[2:]] == [
        ["0", "512", "row", "0:", "codes,", "fp8_e4m3"],
        ["512", "16", "row", "0:", "scales,", "e8m0"],
        ["528", "528", "row", "1,", "and", "so", "on"],
        ["33264", "528", "row", "63"],
        ["33792", "end", "of", "the", "page"],
    ]


# ---- tables --------------------------------------------------------------------------------------

ENTRY = "mine: {code: fp8_e4m3, block: 64, scale: fp32}"


def section(*entries: str) -> str:
    return "\n".join(["version: 1", "cache_formats:", *(f"  {entry}" for entry in entries), ""])


def test_a_table_may_have_formats_alone_or_none(file):
    table = load(file, section(ENTRY, "other: {code: bf16}"))
    assert table.formats == {
        "mine": CacheFormat(**PLAIN | {"block": 64}), "other": CacheFormat(code="bf16"),
    }  # fmt: skip
    assert list(table.formats) == ["mine", "other"] and not table.buckets
    assert load(file, [ROW]).formats == {}


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("0.001", 1e-3), ("1.E-3", 1e-3), ("2.5e+2", 250.0)],
)
def test_a_number_is_written_with_a_point_or_an_exponent(file, written, value):
    table = load(file, section(ENTRY.replace("}", f", floor: {written}}}")))
    assert table.formats["mine"].floor == value


@pytest.mark.parametrize(
    ("entry", "row", "field", "words"),
    [
        ("mine: {code: fp9}", "cache_formats mine (line 3)", "code", 'code = "fp9" is not'),
        ("mine: {block: 64}", "cache_formats mine (line 3)", "code", "code is missing; legal"),
        ("mine: {}", "cache_formats mine (line 3)", "code", "code is missing"),
        (
            "mine: {code: bf16, blok: 64}", "cache_formats mine (line 3)", "blok",
            "blok is no field of a cache format, did you mean block?; legal: code, block",
        ),
        ("mine: bf16", "cache_formats mine (line 3)", None, "a cache format is not a mapping"),
        ("mine: {code: [bf16, fp32]}", "cache_formats mine (line 3)", "code", "is not accepted"),
        (
            "mine: {code: bf16, code: fp32}", "cache_formats mine (line 3)", "code",
            "is given twice (again in line 3)",
        ),
        (f"{ENTRY}\n  {ENTRY}", "section cache_formats", "mine", "is given twice (again in"),
        ("- {code: bf16}", "section cache_formats", None, "the section is not a mapping"),
        ("Mine: {code: bf16}", "section cache_formats", "Mine", "is no name of a cache format"),
        ("a-b: {code: bf16}", "section cache_formats", "a-b", "is no name of a cache format"),
        *(
            (f"{ENTRY[:-1]}, floor: {floor}}}", "cache_formats mine (line 3)", "floor", "is not")
            for floor in ("1", "-1e-3", ".nan", ".inf", "'1e-3'", "1_0.5", "1:30.5", "e-3", "true")
        ),
    ],
)  # fmt: skip
def test_an_entry_that_is_not_valid(file, entry, row, field, words):
    error = refused(file, section(entry))
    assert (error.row, error.field) == (row, field)
    assert words in str(error)


def test_the_fingerprint_is_of_the_formats_too(file):
    def fingerprint(*entries: str) -> str:
        return load(file, section(*entries)).fingerprint

    other = "other: {code: bf16}"
    same = [fingerprint(ENTRY, other), fingerprint(other, ENTRY)]
    same.append(fingerprint("mine: {scale: fp32, code: fp8_e4m3, block: 64, ties: even}", other))
    assert len(set(same)) == 1
    different = [
        fingerprint(ENTRY),
        fingerprint(other),
        fingerprint(ENTRY.replace("mine", "my"), other),
        fingerprint(ENTRY.replace("64", "128"), other),
    ]
    for one, two in itertools.combinations([same[0], *different], 2):
        assert one != two
    with_rows = load(file, text([ROW]) + section(ENTRY).removeprefix("version: 1\n"))
    assert with_rows.fingerprint != load(file, [ROW]).fingerprint


def test_a_format_is_found_by_its_name(file):
    table = load(file, section(ENTRY))
    assert table.format("mine") is table.formats["mine"]
    error = error_of(table.format, "nine")
    assert str(error) == f"{file}: nine is no cache format, did you mean mine?; legal: mine"


# ---- the shipped formats -------------------------------------------------------------------------


def test_the_shipped_formats_are_there():
    assert list(FORMATS) == [
        "bf16", "fp32", "fp8_tensor", "fp8_block128", "fp8_block128_floor", "fp8_block128_pow2",
        "mixed_584", "mixed_584_scale_floor", "mixed_584_low_floor", "mxfp4", "mxfp4_ties_down",
        "fp8_528", "fp8_528_interleaved", "fp4_288", "fp4_288_interleaved",
    ]  # fmt: skip
    assert FORMATS["mixed_584"] == CacheFormat(**MIXED)
    assert FORMATS["mxfp4"].floor == 6 * 2.0**-126
    assert FORMATS["fp4_288"].floor == 2.0**-9


def test_an_interleaved_format_differs_in_its_placement_alone():
    for name in ("fp8_528", "fp4_288"):
        interleaved = FORMATS[f"{name}_interleaved"]
        assert replace(interleaved, placement="after_page") == FORMATS[name]
