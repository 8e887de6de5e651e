import itertools
import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FAULTS,
    FIRST_LINE,
    ILLEGAL,
    OP,
    PROBLEM_FIELDS,
    as_list,
    batches,
    broken_yaml,
    duplicate_row,
    one_fault,
    places,
    property_test,
    text,
    valid_rows,
)
from table_files import PROBLEM, ROW, load, problem, refused

from kvfold.codegen import Bucket, Group, TableError, Variant, load_table, op_spec
from kvfold.codegen import table as table_module
from kvfold.codegen.fields import Field

SPEC = op_spec(OP)


def group_of(backend, arch, values):
    """The group of one place of a row."""
    found = SPEC.problem.of(dict(zip(PROBLEM_FIELDS, values, strict=True)))
    return Group(problem=found, backend=backend, arch=arch)


# ---- valid tables --------------------------------------------------------------------------------


@property_test
@given(rows=valid_rows(), data=st.data())
def test_every_problem_and_batch_finds_the_one_row_that_covers_it(file, rows, data):
    table = load(file, rows)
    cells = {place for row in rows for place in places(row)}
    assert set(table.groups) == {group_of(*cell) for cell in cells}
    for backend, arch, values in cells:
        group = group_of(backend, arch, values)
        covering = [row for row in rows if (backend, arch, values) in places(row)]
        edges = {edge for row in covering for edge in batches(row)} - {float("inf")}
        sizes = {1, 2000, *edges, *(edge + 1 for edge in edges), data.draw(st.integers(1, 2100))}
        for batch in sizes:
            (row,) = [r for r in covering if batches(r)[0] <= batch <= batches(r)[1]]
            fields = group.problem.values()
            variant = table.select(OP, batch=batch, backend=backend, arch=arch, **fields)
            assert (variant.problem, variant.backend) == (group.problem, backend)
            given = {name: row[name] for name in ("reduce_warps", "head_slice")}
            assert variant.tuning == SPEC.tuning(**given)


@property_test
@given(rows=valid_rows(), data=st.data())
def test_find_and_buckets_for_agree_with_a_scan_of_the_rows(file, rows, data):
    table = load(file, rows)
    archs = ("any", "sm_80", "sm_90", "sm_90a", "sm_120")
    problems = sorted({group.problem for group in table.groups}, key=str)
    absent = problems[0].values() | {"head_dim": 8 * 1001}
    for found in (*problems, SPEC.problem.of(absent)):
        for backend, arch in itertools.product(("cuda", "triton"), archs):
            of_arch = {
                where: [
                    bucket
                    for bucket in table.buckets
                    if bucket.group == Group(problem=found, backend=backend, arch=where)
                ]
                for where in (arch, "any")
            }
            serving = of_arch[arch] or of_arch["any"]
            buckets = table.buckets_for(found, backend, arch)
            assert sorted(buckets, key=str) == sorted(serving, key=str)
            assert [b.min_size for b in buckets] == sorted(b.min_size for b in serving)
            edges = {bucket.min_size for bucket in serving}
            for size in {1, *edges, *data.draw(st.lists(st.integers(1, 2100), max_size=3))}:
                scanned = [b.variant for b in serving if b.serves(size)]
                assert [table.find(found, backend, arch, size)] == (scanned or [None])


@property_test
@given(rows=valid_rows())
def test_buckets_are_the_rows_expanded(file, rows):
    table = load(file, rows)
    found = {i: set() for i in range(len(rows))}
    for bucket in table.buckets:
        at = bucket.row - 1
        assert bucket.line == FIRST_LINE + at
        assert bucket.where == f"{OP} row {bucket.row} (line {bucket.line})"
        assert (bucket.min_size, bucket.max_size or float("inf")) == batches(rows[at])
        found[at].add(bucket.group)
    for i, row in enumerate(rows):
        assert found[i] == {group_of(*place) for place in places(row)}
    assert len(table.buckets) == sum(map(len, found.values()))
    assert set(table.variants) == {bucket.variant for bucket in table.buckets}
    assert len(set(table.variants)) == len(table.variants)


@property_test
@given(rows=valid_rows(), data=st.data())
def test_fingerprint_is_of_the_expansion(file, rows, data):
    fingerprint = load(file, rows).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    # Layout, comments, the order of rows and of lists, and one row written as several: the same.
    single = [row | {"next_n": n} for row in rows for n in as_list(row["next_n"])]
    plain = yaml.safe_load(text(data.draw(st.permutations(single))))
    assert load(file, "# comment\n" + yaml.safe_dump(plain)).fingerprint == fingerprint
    # Another cut of a batch axis: another table.
    at = data.draw(st.integers(0, len(rows) - 1))
    first, last = batches(rows[at])
    if first == last:
        return
    cut = data.draw(st.integers(first, min(last - 1, 3000)))
    rows = [*rows, rows[at] | {"min_batch": cut + 1}]
    rows[at] = rows[at] | {"max_batch": cut}
    assert load(file, rows).fingerprint != fingerprint


def test_rows_of_the_own_arch_go_before_rows_for_any(file):
    rows = [
        ROW | {"head_slice": 32},
        ROW | {"arch": ["sm_90", "sm_100"], "max_batch": 8},
        ROW | {"arch": ["sm_90", "sm_100"], "min_batch": 9, "head_slice": 128},
    ]
    table = load(file, rows)

    def width(arch, batch):
        selected = table.select(OP, batch=batch, arch=arch, next_n=4, **PROBLEM)
        assert selected == table.find(problem(), "cuda", arch, batch)
        return selected.tuning.head_slice

    assert [width(arch, 8) for arch in ("any", "sm_80", "sm_90", "sm_100")] == [32, 32, 64, 64]
    assert [width(arch, 9) for arch in ("any", "sm_80", "sm_90", "sm_100")] == [32, 32, 128, 128]
    assert len(table.variants) == 3


def test_find_knows_the_problems_of_the_table_and_no_more(file):
    own = ROW | {"arch": "sm_90", "head_slice": 32}
    table = load(file, [ROW, own, own | {"head_dim": 128}])
    symbol = "paged_kv_compress_hd512_r128_bf16_fp32_n4_w8_s"
    assert table.find(problem(), "cuda", "sm_90", 5).symbol == f"{symbol}32"
    assert table.find(problem(), "cuda", "sm_80", 5).symbol == f"{symbol}64"
    assert table.find(problem(), "cuda", "any", 5).symbol == f"{symbol}64"
    assert table.find(problem(head_dim=128), "cuda", "sm_90", 5) is not None
    assert table.find(problem(head_dim=128), "cuda", "sm_80", 5) is None
    assert table.find(problem(), "triton", "sm_90", 5) is None
    assert table.find(problem(overlap=True), "cuda", "sm_90", 5) is None


def test_swapped_dtypes_are_another_problem(file):
    kv_wide = ROW | {"kv_dtype": "fp32", "state_dtype": "bf16", "reduce_warps": 4}
    table = load(file, [ROW, kv_wide])
    state_wide = problem(kv_dtype="bf16", state_dtype="fp32")
    assert table.find(state_wide, "cuda", "any", 1).tuning.reduce_warps == 8
    swapped = problem(kv_dtype="fp32", state_dtype="bf16")
    assert table.find(swapped, "cuda", "any", 1).tuning.reduce_warps == 4
    assert load(file, [ROW]).find(swapped, "cuda", "any", 1) is None


# ---- the shipped table ---------------------------------------------------------------------------


def test_shipped_table_covers_what_it_promises():
    table = load_table()
    choices = {
        "head_dim": (128, 512),
        "compress_ratio": (2, 4, 128),
        "kv_dtype": ("bf16", "fp32"),
        "state_dtype": ("bf16", "fp32"),
        "next_n": range(1, 9),
        "ape_in_state": (True, False),
    }
    for backend in ("cuda", "triton"):
        for values in itertools.product(*choices.values()):
            fields = dict(zip(choices, values, strict=True))
            for batch in (1, 48, 49, 2000):
                variant = table.select(OP, batch=batch, backend=backend, **fields)
                assert variant.problem.overlap == (fields["compress_ratio"] == 4)
                assert variant.backend == backend
                assert fields.items() <= variant.problem.values().items()


def test_every_size_of_the_shipped_table_is_served_by_one_row_or_by_none():
    table = load_table()
    some = {
        (b.variant.problem, b.variant.backend)
        for b in table.buckets
        if getattr(b.variant.problem, "next_n", 4) == 4
    }
    for found, backend in some:
        for arch in ("sm_90", "sm_120"):  # one that has rows of its own, one that has none
            of_problem = [
                b for b in table.buckets
                if (b.variant.problem, b.variant.backend) == (found, backend)
            ]  # fmt: skip
            own = [b for b in of_problem if b.arch == arch]
            serving = own or [b for b in of_problem if b.arch == "any"]
            for size in (*range(1, 130), *range(130, 2001, 17)):
                chosen = [b.variant for b in serving if b.serves(size)] or [None]
                assert chosen == [table.find(found, backend, arch, size)]
                assert (chosen == [None]) == (not serving)  # no row for this GPU


def test_header_of_the_shipped_table_says_where_its_fields_are_explained():
    header = load_table().path.read_text().partition("version: 1")[0]
    assert "kvfold table fields OP" in header
    for name in (*SPEC.bounds, "arch", "problem ", "tuning ", "applicability "):
        assert re.search(rf"^# .*\b{name}", header, re.MULTILINE), name


def test_which_table_is_in_force(file, monkeypatch):
    monkeypatch.delenv("KVFOLD_CONFIG", raising=False)
    shipped = load_table()
    assert shipped.path.name == "configs.yaml"
    own = load(file, [ROW])
    monkeypatch.setenv("KVFOLD_CONFIG", str(file))
    assert load_table().path == file
    assert load_table().fingerprint == own.fingerprint
    assert load_table(shipped.path).fingerprint == shipped.fingerprint
    monkeypatch.setenv("KVFOLD_CONFIG", "")
    assert load_table().path == shipped.path


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_one_fault_is_named(file, kind):
    @property_test
    @given(fault=one_fault(kind))
    def check(fault):
        error = refused(file, fault.rows)
        assert error.field == fault.field
        if fault.row is None:
            assert re.fullmatch(r"line \d+", error.row)
        else:
            assert error.row == f"{OP} row {fault.row + 1} (line {FIRST_LINE + fault.row})"
            assert error.legal
        if fault.field:
            assert f": {fault.field} " in str(error)

    check()


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in ILLEGAL for value in ILLEGAL[field]]
)
def test_each_illegal_value_is_named(file, field, value):
    error = refused(file, [ROW | {field: value}])
    assert error.field == field
    assert error.row == f"{OP} row 1 (line {FIRST_LINE})"
    assert f": {field} = " in str(error)


LOCAL = [kind for kind in FAULTS if kind not in (broken_yaml, duplicate_row)]


@property_test
@given(fault=one_fault(*LOCAL), data=st.data())
def test_the_order_of_rows_changes_no_error(file, fault, data):
    order = data.draw(st.permutations(range(len(fault.rows))))
    error = refused(file, fault.rows)
    other = refused(file, [fault.rows[i] for i in order])
    assert error.row.startswith(f"{OP} row {fault.row + 1} ")
    assert other.row.startswith(f"{OP} row {order.index(fault.row) + 1} ")
    for name in ("field", "value", "legal"):
        assert getattr(other, name) == getattr(error, name)


@pytest.mark.parametrize(
    ("rows", "row", "words"),
    [
        ([ROW | {"schedule": "direct"}], 1, "schedule is no field of paged_kv_compress"),
        ([ROW | {"head_slce": 1}], 1, "head_slce is no field of paged_kv_compress, did you mean"),
        ([ROW | {"head_slce": 1}], 1, "did you mean head_slice?; legal: head_dim, compress_ratio,"),
        ([ROW | {"next_n": "4.0"}], 1, "next_n = 4.0 is not accepted; legal: 1, 2,"),
        ([ROW | {"next_n": "010"}], 1, 'next_n = "010 (int)" is not accepted'),
        ([ROW | {"next_n": []}], 1, "next_n is an empty list; legal: one value or more"),
        ([ROW | {"next_n": [1, 1]}], 1, "next_n = [1, 1] repeats a value; legal: each value once"),
        ([ROW | {"max_batch": [48]}], 1, "max_batch = [48] is not accepted; legal: 1 or more"),
        ([ROW | {"head_slice": 48}], 1, "head_slice = 48 does not divide head_dim 512; legal: 4,"),
        ([ROW | {"reduce_warps": 32, "head_slice": 256}], 1, "makes a CTA of 2048 threads"),
        ([ROW | {"head_slice": 128}], 1, "takes 131072 bytes of shared memory"),
        ([{k: v for k, v in ROW.items() if k != "next_n"}], 1, "next_n is missing; legal: 1, 2,"),
        ([ROW, ROW], 2, "min_batch = 1 duplicates paged_kv_compress row 1 (line 3) (head_dim 512"),
        ([ROW, ROW | {"head_slice": 32}], 2, "min_batch = 1 overlaps paged_kv_compress row 1"),
        (
            [ROW | {"min_batch": 48}, ROW | {"max_batch": 48}],
            1,
            "min_batch = 48 overlaps paged_kv_compress row 2 (line 4) (head_dim 512, compress_ratio"
            " 128, overlap false, kv_dtype bf16, state_dtype fp32, next_n 4, ape_in_state true,"
            " cuda, arch any); legal: 49 or more",
        ),
        (
            [ROW | {"head_slice": [64, 32]}],
            1,
            "head_slice = 32 is the second of two for one problem (head_dim 512, compress_ratio",
        ),
        (
            [ROW | {"max_batch": 48}, ROW | {"min_batch": 50}],
            2,
            "min_batch = 50 leaves batch 49 without a row (head_dim 512,",
        ),
        ([ROW | {"min_batch": 2}], 1, "min_batch = 2 leaves batch 1 without a row"),
        ([ROW | {"min_batch": 9}], 1, "min_batch = 9 leaves batch 1 to 8 without a row"),
        (
            [ROW | {"max_batch": 48}],
            1,
            "max_batch = 48 leaves batch 49 and up without a row (head_dim 512, compress_ratio",
        ),
        (
            [ROW | {"max_batch": 48}],
            1,
            "legal: none in the last row, or a row with min_batch 49",
        ),
        ([ROW | {"min_batch": 3, "max_batch": 2}], 1, "is never reached; legal: 3 or more"),
        ([ROW, ROW | {"arch": "sm_90", "max_batch": 4}], 2, "ape_in_state true, cuda, arch sm_90)"),
    ],
)
def test_faults_in_rows_read_well(file, rows, row, words):
    error = refused(file, rows)
    assert error.row == f"{OP} row {row} (line {FIRST_LINE + row - 1})"
    assert str(error).startswith(f"{file}: {error.row}: ")
    assert words in str(error)


def test_of_several_faulty_problems_the_same_is_named_in_any_order(file):
    rows = [ROW | {"head_dim": n, "max_batch": n} for n in (512, 64, 128)]
    named = {refused(file, list(order)).value for order in itertools.permutations(rows)}
    assert len(named) == 1
    assert named < {64, 128, 512}


@pytest.mark.parametrize("path", ["missing.yaml", "."])
def test_file_that_cannot_be_read(tmp_path, path, monkeypatch):
    monkeypatch.setenv("KVFOLD_CONFIG", str(tmp_path / path))
    with pytest.raises(TableError, match="cannot be read") as caught:
        load_table()
    assert caught.value.file == tmp_path / path
    assert str(tmp_path / path) in str(caught.value)


# ---- select --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        ({"op": "paged_compress"}, "paged_compress", "is no op, did you mean paged_kv_compress?"),
        ({"head_dims": 512}, "head_dims", "is no problem field of paged_kv_compress, did you mean"),
        ({"reduce_warps": 8}, "reduce_warps", "is no problem field of paged_kv_compress"),
        ({"next_n": None}, "next_n", "next_n is missing; legal: 1, 2,"),
        ({"next_n": 17}, "next_n", "next_n = 17 is not accepted"),
        ({"kv_dtype": "fp16"}, "kv_dtype", "legal: bf16, fp32"),
        ({"overlap": 0}, "overlap", "overlap = 0 is not accepted; legal: false, true"),
        ({"batch": None}, "batch", "batch is missing; legal: requests in the step"),
        ({"batch": 0}, "batch", "batch = 0 is not accepted; legal: 1 or more"),
        ({"batch": 2.0}, "batch", "batch = 2.0 is not accepted"),
        ({"backend": "hip"}, "backend", 'backend = "hip" is not accepted; legal: cuda, triton'),
        ({"arch": "hopper"}, "arch", "legal: any, or sm_<number> as in sm_90"),
    ],
)
def test_select_names_what_is_wrong(file, request_, field, words):
    asked = {"op": OP, "batch": 1, "next_n": 4, **PROBLEM} | request_
    asked = {name: value for name, value in asked.items() if value is not None}
    with pytest.raises(TableError) as caught:
        load(file, [ROW]).select(**asked)
    assert caught.value.file == file
    assert caught.value.field == field
    assert words in str(caught.value)


@property_test
@given(
    head_dim=st.integers(1, 600).map(lambda n: 8 * n),
    ratio=st.integers(1, 300),
    overlap=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from(["bf16", "fp32"])] * 2),
    next_n=st.integers(1, 16),
    ape=st.booleans(),
    backend=st.sampled_from(["cuda", "triton"]),
)
def test_missing_row_is_told_and_fits(file, head_dim, ratio, overlap, dtypes, next_n, ape, backend):
    kv, state = dtypes
    fields = {"head_dim": head_dim, "compress_ratio": ratio, "overlap": overlap, "kv_dtype": kv}
    fields |= {"state_dtype": state, "next_n": next_n, "ape_in_state": ape}
    base = ROW | {"head_dim": 8 * 601, "head_slice": 8}  # a problem that is never asked for
    table = load(file, [base])
    with pytest.raises(TableError) as caught:
        table.select(OP, batch=7, backend=backend, arch="sm_90", **fields)
    assert f"{OP} has no {backend} row for arch sm_90" in str(caught.value)
    assert str(file) in str(caught.value)
    (row,) = re.findall(r"^  - (\{.*\})$", str(caught.value), re.MULTILINE)
    variant = load(file, [base, row]).select(OP, batch=7, backend=backend, arch="sm_90", **fields)
    assert variant.problem.values() == fields
    assert variant.backend == backend


def test_row_of_another_arch_or_backend_is_no_row(file):
    table = load(file, [ROW | {"arch": "sm_90"}])
    assert table.select(OP, batch=1, arch="sm_90", next_n=4, **PROBLEM).tuning.head_slice == 64
    for other in ({"arch": "sm_80"}, {"arch": "any"}, {"arch": "sm_90", "backend": "triton"}):
        with pytest.raises(TableError, match=r"has no (cuda|triton) row"):
            table.select(OP, batch=1, next_n=4, **PROBLEM, **other)


def test_buckets_are_buckets(file):
    (bucket,) = load(file, [ROW]).buckets
    tuning = SPEC.tuning(reduce_warps=8, head_slice=64)
    variant = Variant(problem=problem(overlap=False), backend="cuda", tuning=tuning)
    assert bucket == Bucket(variant=variant, row=1, line=FIRST_LINE, section=OP)


def test_select_takes_problem_fields_with_a_default_from_it(file):
    own = ROW | {"compress_ratio": 4, "reduce_warps": 1}
    table = load(file, [own])
    fields = {**PROBLEM, "compress_ratio": 4, "next_n": 4}
    variant = table.select(OP, batch=1, **fields)
    assert variant.problem.overlap is True
    assert variant == table.select(OP, batch=1, overlap=True, **fields)
    with pytest.raises(TableError, match="has no cuda row"):
        table.select(OP, batch=1, overlap=False, **fields)


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(100, 100, 100), (1000, 1000, 30)])
def test_a_row_that_stands_for_too_many_variants_is_refused_unexpanded(file, monkeypatch, sizes):
    monkeypatch.setattr(table_module, "_variant", None)  # a single expansion would call it
    head_dims, ratios, widths = (list(range(8, 8 * count + 1, 8)) for count in sizes)
    row = ROW | {"head_dim": head_dims, "compress_ratio": ratios, "head_slice": widths}
    error = refused(file, [row])
    assert error.row == f"{OP} row 1 (line {FIRST_LINE})"
    assert f"stands for {math.prod(sizes)} variants; legal: at most 50000" in str(error)
    assert len(str(error)) < 300


def test_the_limit_holds_for_all_rows_together(file, monkeypatch):
    monkeypatch.setattr(table_module, "MAX_BUCKETS", 8)
    rows = [ROW | {"head_dim": n, "next_n": [1, 2, 3, 4]} for n in (64, 128, 256)]
    assert len(load(file, rows[:2]).buckets) == 8
    error = refused(file, rows)
    assert error.row == f"{OP} row 3 (line {FIRST_LINE + 2})"
    assert "stands for 4 variants; legal: at most 8 in a table" in str(error)


# ---- symbols -------------------------------------------------------------------------------------


def test_two_variants_with_one_symbol_are_refused(file, monkeypatch):
    rows = [ROW | {"max_batch": 8}, ROW | {"min_batch": 9, "reduce_warps": 4, "head_slice": 64}]
    assert len({variant.symbol for variant in load(file, rows).variants}) == 2
    monkeypatch.setattr(Field, "symbol_part", without_part_of("reduce_warps"))
    error = refused(file, rows)
    assert error.row == f"{OP} row 2 (line {FIRST_LINE + 1})"
    assert "has the symbol paged_kv_compress_hd512_r128_bf16_fp32_n4_s64, which an" in str(error)
    # One variant in several rows is one kernel.
    same = [ROW | {"max_batch": 8}, ROW | {"min_batch": 9}]
    assert len(load(file, same).variants) == 1


def without_part_of(name):
    """Field.symbol_part, with no part for one field."""
    symbol_part = Field.symbol_part
    return lambda field, value: None if field.name == name else symbol_part(field, value)
