"""The op on a CPU: bytes and outputs against the oracle, and what must not change."""

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
import row_oracle
import torch
from norm_calls import (
    FLOATS,
    HEAD_DIMS,
    OUTPUTS,
    ROPE_LAYOUTS,
    SPECIAL,
    Call,
    assert_is,
    assert_stores,
    every_bf16,
    fits,
    make,
    random_call,
    random_rows,
    run_op,
    special_rows,
    ways,
)
from numerics import assert_same_bits

from kvfold.codegen import CacheFormat, TableError, load_table
from kvfold.formats import load_rows
from kvfold.runtime import dispatch

FORMATS = load_table().formats
EVERY_WAY = [(name, *way) for name, format in FORMATS.items() for way in ways(format)]
each_format = pytest.mark.parametrize("name", FORMATS)
each_way = pytest.mark.parametrize(("name", "rounding", "rotate"), EVERY_WAY)
BOTH = {"latent_out": "fp32", "rows_out": "bf16", "codes_out": "", "scales_out": ""}
SWAPPED = BOTH | {"latent_out": "bf16", "rows_out": "fp32"}


def rng(*words) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def shapes(name: str) -> list[tuple[int, int]]:
    """(head_dim, rope_dim) that a format of the table has rows of."""
    return [
        (head_dim, rope_dim)
        for head_dim in HEAD_DIMS
        for rope_dim in sorted({0, 64, 128, head_dim})
        if fits(FORMATS[name], head_dim, rope_dim)
    ]


def run(call: Call) -> Call:
    """The call, run on a copy."""
    done = call.clone()
    run_op(done)
    return done


# ---- every format, rounding, shape and dtype -----------------------------------------------------


@each_way
def test_bytes_are_those_of_the_oracle(name, rounding, rotate):
    dtypes = itertools.cycle(itertools.product(FLOATS, FLOATS, (BOTH, SWAPPED)))
    for (head_dim, rope_dim), _ in itertools.product(shapes(name), range(2)):
        rows_dtype, weight_dtype, outputs = next(dtypes)
        call = make(
            format=name,
            head_dim=head_dim,
            rope_dim=rope_dim,
            rows_dtype=rows_dtype,
            weight_dtype=weight_dtype,
            rounding=rounding,
            rotate=rotate,
            outputs=outputs,
            seed=head_dim + rope_dim,
        )
        assert_stores(run_op, call, what=f"{head_dim} {rope_dim} {rows_dtype} {weight_dtype}")


def test_the_shapes_are_those_that_the_formats_have():
    assert len(shapes("bf16")) == len(shapes("fp8_528")) == 11
    assert shapes("mixed_584") == [
        (128, 0), (128, 64), (256, 0), (256, 64), (256, 128), (512, 0), (512, 64), (512, 128),
    ]  # fmt: skip
    assert len(EVERY_WAY) == 6 * len(FORMATS) + 3  # mixed_584 and its two kin have one more
    for name, format in FORMATS.items():
        for head_dim, rope_dim in itertools.product(HEAD_DIMS, (0, 64, 128, 256, 512)):
            try:
                format.layout(head_dim, rope_dim)
            except TableError:
                assert not fits(format, head_dim, rope_dim), name
            else:
                assert fits(format, head_dim, rope_dim), name


@pytest.mark.parametrize("seed", range(200))
def test_random_calls(seed):
    assert_stores(run_op, random_call(seed))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_values_are_those_of_float64_but_for_rounding(head_dim, rotate):
    outputs = {"latent_out": "fp32", "rows_out": "fp32"}
    call = run(
        make(
            format="fp32", head_dim=head_dim, rope_dim=head_dim // 2, num_rows=64, rotate=rotate,
            outputs=outputs, rows_dtype="fp32", seed=head_dim,
        )
    )  # fmt: skip
    at = call.rope_table.numpy()[call.positions.numpy()]
    exact = row_oracle.exact_stages(
        call.rows.numpy(), call.weight.float().numpy(), at[:, 0], at[:, 1], call.eps, rotate
    )
    for found, wanted in zip((call.latent_out, call.rows_out), exact, strict=True):
        scale = np.abs(wanted).max(axis=1, keepdims=True)
        assert (np.abs(found.double().numpy() - wanted) <= 1e-6 * scale).all()


def values_of(call: Call) -> torch.Tensor:
    """The rows in a cache of format bf16, in the order of the call."""
    layout = FORMATS["bf16"].layout(call.rows.size(1), call.rope_dim, call.rows_per_page)
    return load_rows(call.cache, call.slots, layout)[0].view(torch.bfloat16)


def test_a_row_that_is_worked_out_by_hand():
    """x = 2 gives 1 after the norm; a quarter turn makes -1, 1 of 1, 1."""
    quarter = np.stack([np.zeros((1, 4)), np.ones((1, 4))], axis=1).astype(np.float32)
    weight = np.ones(128, np.float32)
    weight[100] = 3
    call = make(
        format="bf16", head_dim=128, rope_dim=8, eps=0.0, weight=weight, rope_table=quarter,
        values=np.full((1, 128), 2, np.float32),
    )  # fmt: skip
    expected = torch.ones(128)
    expected[100] = 3
    expected[120::2] = -1
    assert values_of(run(call)).tolist() == [expected.tolist()]


@pytest.mark.parametrize("column", [0, 1, 6, 127])
def test_the_rotation_of_a_column_is_a_row_of_the_sylvester_matrix(column):
    weight = np.zeros(128, np.float32)
    weight[column] = 1
    values = np.ones((1, 128), np.float32)
    call = make(
        format="bf16", head_dim=128, rope_dim=0, eps=0.0, weight=weight, values=values, rotate=True
    )
    signs = [(-1) ** (column & other).bit_count() for other in range(128)]
    expected = torch.tensor([signs]) * torch.tensor(128**-0.5, dtype=torch.bfloat16)
    assert torch.equal(values_of(run(call)), expected)


def test_a_rounding_has_an_effect():
    """codes_from_bf16 gives the bytes of before_codes, but rows_out holds the rounded values."""
    outputs = {"codes_out": "", "rows_out": "fp32"}
    call = make(rows_dtype="fp32", num_rows=16, outputs=outputs)
    once, before_codes, codes_from_bf16, each_step = (
        run(replace(call, rounding=rounding)) for rounding in row_oracle.ROUNDINGS
    )
    codes = [one.codes_out.numpy().tobytes() for one in (once, before_codes, each_step)]
    assert len(set(codes)) == 3
    assert torch.equal(codes_from_bf16.codes_out, before_codes.codes_out)
    assert torch.equal(once.rows_out, before_codes.rows_out)
    assert torch.equal(codes_from_bf16.rows_out, before_codes.rows_out.bfloat16().float())
    assert not torch.equal(codes_from_bf16.rows_out, before_codes.rows_out)


# ---- special values ------------------------------------------------------------------------------


@each_way
def test_special_values(name, rounding, rotate):
    random = rng(name, rounding, rotate)
    for head_dim, eps in zip(HEAD_DIMS, random.permutation([0.0, 1e-6, 1e-30]), strict=True):
        call = make(
            format=name,
            head_dim=head_dim,
            rows_dtype="fp32",
            weight_dtype="fp32",
            values=special_rows(random, head_dim),
            eps=float(eps),
            rounding=rounding,
            rotate=rotate,
            outputs=BOTH,
        )
        assert_stores(run_op, call, what=f"{head_dim} {eps}")


@each_way
def test_every_bf16_value(name, rounding, rotate):
    head_dim = 128 if rotate else 512
    call = make(
        format=name,
        head_dim=head_dim,
        values=every_bf16(head_dim),
        eps=0.0,
        rounding=rounding,
        rotate=rotate,
        outputs=BOTH,
    )
    assert_stores(run_op, call)


@each_format
def test_special_weights_and_rope_tables(name):
    random = rng(name)
    some = np.concatenate([SPECIAL, SPECIAL | 0x80000000]).view(np.float32)
    for rounding, rotate in ways(FORMATS[name]):
        weight = random.standard_normal(256).astype(np.float32)
        weight[random.integers(0, 256, 6)] = random.choice(some, 6)
        rope_table = random.standard_normal((9, 2, 32)).astype(np.float32)
        rope_table[random.random(rope_table.shape) < 0.1] = random.choice(some)
        call = make(
            format=name,
            head_dim=256,
            num_rows=16,
            weight=weight,
            weight_dtype="fp32",
            rope_table=rope_table,
            rounding=rounding,
            rotate=rotate,
            outputs=SWAPPED,
        )
        assert_stores(run_op, call, what=f"{rounding} {rotate}")


@pytest.mark.parametrize("eps", [0.0, 1e-45, 1e-12, 1e-5, 1.0, 3.4e38])
def test_eps_is_added_in_fp32(eps):
    values = random_rows(rng(eps), 16, 128) * np.float32(1e-3)
    call = make(head_dim=128, values=values, rows_dtype="fp32", eps=eps, outputs=BOTH)
    assert_stores(run_op, call)


@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30, 1e30, 0.0, -2.0, np.inf, np.nan])
@pytest.mark.parametrize("rotate", [False, True])
def test_the_scale_of_the_caller_divides_every_value(scale, rotate):
    call = make(format="fp8_tensor", num_rows=16, scale=scale, rotate=rotate, outputs=BOTH)
    assert_stores(run_op, call)


def test_without_a_scale_of_the_caller_it_is_1():
    without, one = (make(format="fp8_tensor", scale=scale) for scale in (None, 1.0))
    assert torch.equal(run(without).cache, run(one).cache)


# ---- pages ---------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize(("more_bytes", "padding"), [(0, 0), (0, 64), (16, 0), (5, 100)])
@pytest.mark.parametrize("rows_per_page", [1, 3, 64])
def test_rows_are_stored_at_their_bytes_and_nowhere_else(name, rows_per_page, more_bytes, padding):
    call = make(
        format=name,
        head_dim=128,
        num_rows=9,
        rows_per_page=rows_per_page,
        more_pages=2,
        more_bytes=more_bytes,
        padding=padding,
        strided=bool(padding),
        outputs=BOTH,
    )
    assert_stores(run_op, call)


@pytest.mark.parametrize(
    ("name", "row_stride", "scale_start", "scale_stride", "data_bytes", "scale_bytes"),
    [
        ("mixed_584", 576, 64 * 576, 8, 576, 8),
        ("fp8_528", 512, 64 * 512, 16, 512, 16),
        ("fp8_528_interleaved", 528, 512, 528, 512, 16),
        ("fp4_288", 256, 64 * 256, 32, 256, 32),
        ("fp4_288_interleaved", 288, 256, 288, 256, 32),
    ],
)
def test_the_place_of_a_row_in_a_page_of_64(
    name, row_stride, scale_start, scale_stride, data_bytes, scale_bytes
):
    call = make(format=name, rows_per_page=64, outputs=["codes_out", "scales_out"])
    call.slots.copy_(torch.tensor([0, 63, 64, 100, 1, 127, 62]))
    done = run(call)
    for index, slot in enumerate(call.slots.tolist()):
        page, row = done.cache[slot // 64], slot % 64
        data = page[row * row_stride :][:data_bytes]
        scales = page[scale_start + row * scale_stride :][:scale_bytes]
        assert torch.equal(data, done.codes_out[index])
        assert torch.equal(scales, done.scales_out[index])


@pytest.mark.parametrize("name", ["mixed_584", "mixed_584_scale_floor", "mixed_584_low_floor"])
def test_pad_bytes_are_zero(name):
    call = run(make(format=name, num_rows=40, outputs=["scales_out"]))
    assert (call.scales_out[:, 7:] == 0).all()
    assert (call.scales_out[:, :7] > 0).all()
    layout = FORMATS[name].layout(512, 64, call.rows_per_page)
    _, scales = load_rows(call.cache, call.slots, layout)
    assert torch.equal(scales, call.scales_out)


@each_format
def test_the_outputs_hold_what_the_cache_gets(name):
    call = run(make(format=name, num_rows=12, outputs=["codes_out", "scales_out"]))
    layout = FORMATS[name].layout(512, 64, call.rows_per_page)
    codes, scales = load_rows(call.cache, call.slots, layout)
    assert torch.equal(codes, call.codes_out)
    assert torch.equal(scales, call.scales_out)


@pytest.mark.parametrize("rounding", row_oracle.ROUNDINGS)
def test_an_output_in_bf16_is_the_one_in_fp32_rounded(rounding):
    given = {"rounding": rounding, "rows_dtype": "fp32", "num_rows": 32}
    floats = ("latent_out", "rows_out")
    wide, narrow = (
        run(make(**given, outputs=dict.fromkeys(floats, one))) for one in ("fp32", "bf16")
    )
    for name in floats:
        assert_same_bits(getattr(narrow, name), getattr(wide, name).bfloat16(), name)


def test_outputs_change_no_byte_of_the_cache():
    without = run(make(num_rows=20))
    for count in range(1, 5):
        for outputs in itertools.combinations(OUTPUTS, count):
            call = make(num_rows=20)
            with_outputs = make(num_rows=20, outputs=outputs)
            call = replace(call, **{name: getattr(with_outputs, name) for name in outputs})
            assert torch.equal(run(call).cache, without.cache)


# ---- rows that are skipped -----------------------------------------------------------------------

INT64 = [-1, -12, 12, 13, 2**31, 2**32, 2**62, 2**63 - 1, -(2**31), -(2**32), -(2**63)]
INT32 = [-1, 33, 34, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("name", ["mixed_584", "fp8_block128", "fp4_288_interleaved", "bf16"])
@pytest.mark.parametrize("rope_dim", [0, 64])
def test_a_row_whose_slot_or_position_is_outside_is_skipped(name, rope_dim):
    call = make(format=name, rope_dim=rope_dim, num_rows=8, outputs=BOTH, max_pos=33)
    assert call.cache.size(0) * call.rows_per_page == 12
    third = run(call.taken([3]))
    skipped = [0, 1, 2, 4, 5, 6, 7]
    for field, outside in (("slots", INT64), ("positions", INT32)):
        for value in outside:
            spoiled = call.clone()
            getattr(spoiled, field)[skipped] = value
            done = run(spoiled)
            assert torch.equal(done.cache, third.cache), f"{field} {value}"
            for output in OUTPUTS:
                after, before = getattr(done, output), getattr(call, output)
                assert torch.equal(after[skipped], before[skipped]), f"{field} {value} {output}"
                assert torch.equal(after[3:4], getattr(third, output)), f"{field} {value} {output}"


@each_format
def test_a_call_in_which_every_row_is_skipped_writes_nothing(name):
    call = make(format=name, head_dim=128, outputs=BOTH)
    for field in ("slots", "positions"):
        spoiled = call.clone()
        getattr(spoiled, field).fill_(-1)
        assert_is(run(spoiled), spoiled, field)


def test_without_positions_or_pages_every_row_is_skipped():
    call = make(outputs=BOTH)
    for changed in ({"rope_table": call.rope_table[:0]}, {"cache": call.cache[:0]}):
        assert_is(run(replace(call, **changed)), replace(call, **changed), str([*changed]))


# ---- what a row's bytes depend on ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixed_584", "fp8_block128", "fp4_288", "mxfp4", "fp32"])
@pytest.mark.parametrize(("rounding", "rotate"), [("once", True), ("each_step", False)])
def test_a_rows_bytes_depend_on_neither_its_index_nor_its_neighbours(name, rounding, rotate):
    values = np.concatenate([random_rows(rng(name), 20, 256), special_rows(rng(name), 256)[-12:]])
    call = make(
        format=name,
        head_dim=256,
        values=values,
        rows_dtype="fp32",
        rounding=rounding,
        rotate=rotate,
        outputs=BOTH,
    )
    together = run(call)
    shuffled = rng(name).permutation(len(values)).tolist()
    groups = [shuffled, [0], [31], [5, 30], shuffled[:7], [1] * 4]
    for group in groups:
        part = call.taken(group)
        part.slots.copy_(torch.arange(len(group)))  # other places, too
        done = run(part)
        for output in ("codes_out", "scales_out"):
            assert torch.equal(getattr(done, output), getattr(together, output)[group])
        for output in ("latent_out", "rows_out"):
            assert_same_bits(getattr(done, output), getattr(together, output)[group])


def test_rows_and_weight_in_fp32_give_the_bytes_of_the_same_values_in_bf16():
    call = make(num_rows=20, outputs=BOTH)
    for rounding in row_oracle.ROUNDINGS:
        narrow = replace(call, rounding=rounding)
        wide = replace(narrow.clone(), rows=call.rows.float(), weight=call.weight.float())
        narrow, wide = run(narrow), run(wide)
        for name in ("cache", "codes_out", "scales_out"):
            assert torch.equal(getattr(narrow, name), getattr(wide, name)), rounding


@pytest.mark.parametrize("strided", [False, True])
def test_the_layout_of_the_rope_table_changes_nothing(strided):
    halves, *others = (
        make(rope_layout=layout, strided=strided, num_rows=20) for layout in ROPE_LAYOUTS
    )
    assert len({call.rope_table.stride() for call in (halves, *others)}) == 3
    for other in others:
        assert torch.equal(other.rope_table, halves.rope_table)
        assert torch.equal(run(other).cache, run(halves).cache)


def test_other_views_of_a_rope_table():
    call = make(rope_dim=64)
    wide = torch.randn(70, 160)
    tables = {
        "within a wider row": wide[:, 3:67].unflatten(1, (2, 32)),
        "every second position": wide[::2, :64].unflatten(1, (2, 32)),
        "every third column": wide[:, ::2][:, 1:65].unflatten(1, (2, 32)),
        "the same at every position": wide[0, :64].view(1, 2, 32).expand(40, 2, 32),
        "one cosine for all pairs": wide[:, :2, None].expand(70, 2, 32),
    }
    for what, view in tables.items():
        expected = run(replace(call, rope_table=view.clone(memory_format=torch.contiguous_format)))
        assert torch.equal(run(replace(call, rope_table=view)).cache, expected.cache), what


# ---- formats of one's own ------------------------------------------------------------------------


def legal_formats() -> dict[str, dict]:
    """The fields of every format with these values that is legal, by a name."""
    values = {
        "code": ["fp8_e4m3", "fp4_e2m1"],
        "block": [0, 16, 64],
        "scale": ["tensor", "fp32", "e8m0", "e4m3"],
        "rule": ["amax", "pow2"],
        "floor": [0.0, 0.01],
        "floor_on": ["amax", "scale"],
        "ties": ["even", "down"],
        "rope": ["quantised", "bf16"],
        "scale_bytes": [0, 32],
        "placement": ["after_page", "after_row"],
    }
    found = {}
    for combination in itertools.product(*values.values()):
        fields = dict(zip(values, combination, strict=True))
        try:
            CacheFormat(**fields)
        except TableError:
            continue
        found[f"format_{len(found)}"] = fields
    return found


@pytest.fixture
def own_formats(tmp_path, monkeypatch):
    """A table with every legal format is in force."""
    formats = legal_formats()
    file = tmp_path / "formats.yaml"
    lines = [
        f"  {name}: {{{', '.join(f'{field}: {value}' for field, value in fields.items())}}}"
        for name, fields in formats.items()
    ]
    file.write_text("\n".join(["version: 1", "cache_formats:", *lines, ""]))
    monkeypatch.setenv("KVFOLD_CONFIG", str(file))
    dispatch.reload()
    yield list(formats)
    monkeypatch.undo()
    dispatch.reload()


def test_every_combination_of_legal_fields_gives_the_bytes_of_the_oracle(own_formats):
    assert len(own_formats) == 648
    for seed, name in enumerate(own_formats):
        assert_stores(run_op, random_call(seed, format=name), what=name)
