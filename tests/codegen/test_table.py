import itertools
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FAULTS,
    FIRST_LINE,
    ILLEGAL,
    OP,
    batches,
    broken_yaml,
    duplicate_row,
    listed,
    one_fault,
    places,
    property_test,
    text,
    valid_rows,
)

import kvfold.codegen.table as table_module
from kvfold.codegen import Bucket, TableError, Variant, load_table

PROBLEM = {"head_dim": 512, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32"}
ROW = PROBLEM | {"next_n": 4, "backend": "cuda", "reduce_warps": 8, "head_slice": 64}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("table") / "own.yaml"


def load(file: Path, content: str | bytes | list):
    """load_table of a file with this content: text, bytes or rows."""
    content = text(content) if isinstance(content, list) else content
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_table(file)


def refused(file: Path, content: str | bytes | list) -> TableError:
    """The error that this content raises, after a look at what every error must have."""
    with pytest.raises(TableError) as caught:
        load(file, content)
    error = caught.value
    assert error.file == file
    for known in (error.file, error.row, error.field, error.legal):
        assert known is None or str(known) in str(error)
    return error


# ---- valid tables --------------------------------------------------------------------------------


@property_test
@given(rows=valid_rows(), data=st.data())
def test_every_key_and_batch_finds_the_one_row_that_covers_it(file, rows, data):
    table = load(file, rows)
    cells = {place for row in rows for place in places(row)}
    assert set(table.groups) == {(OP, backend, arch, *key) for backend, arch, key in cells}
    for backend, arch, key in cells:
        covering = [row for row in rows if (backend, arch, key) in places(row)]
        edges = {edge for row in covering for edge in batches(row)} - {float("inf")}
        sizes = {1, 2000, *edges, *(edge + 1 for edge in edges), data.draw(st.integers(1, 2100))}
        for batch in sizes:
            (row,) = [r for r in covering if batches(r)[0] <= batch <= batches(r)[1]]
            names = Variant.spec("problem")
            problem = dict(zip(names, key, strict=True))
            variant = table.select(OP, batch=batch, backend=backend, arch=arch, **problem)
            assert variant.key == key
            given = {name: row[name] for name in ("reduce_warps", "head_slice")}
            left_out = {"schedule": "direct", "min_ctas": 1}
            assert variant.tuning == {"backend": backend, **given, **left_out}


@property_test
@given(rows=valid_rows())
def test_buckets_are_the_rows_expanded(file, rows):
    table = load(file, rows)
    found = {i: set() for i in range(len(rows))}
    for bucket in table.buckets:
        at = bucket.row - 1
        assert bucket.line == FIRST_LINE + at
        assert bucket.where == f"{OP} row {bucket.row} (line {bucket.line})"
        assert (bucket.min_batch, bucket.max_batch or float("inf")) == batches(rows[at])
        found[at].add((bucket.variant.backend, bucket.arch, bucket.variant.key))
    assert found == {i: places(row) for i, row in enumerate(rows)}
    assert len(table.buckets) == sum(map(len, found.values()))
    assert set(table.variants) == {bucket.variant for bucket in table.buckets}
    assert len(set(table.variants)) == len(table.variants)


@property_test
@given(rows=valid_rows(), data=st.data())
def test_fingerprint_is_of_the_expansion(file, rows, data):
    fingerprint = load(file, rows).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    # Layout, comments, the order of rows and of lists, and one row written as several: the same.
    single = [row | {"next_n": n} for row in rows for n in listed(row["next_n"])]
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


def test_own_arch_goes_before_any(file):
    rows = [
        ROW | {"head_slice": 32},
        ROW | {"arch": ["sm_90", "sm_100"], "max_batch": 8},
        ROW | {"arch": ["sm_90", "sm_100"], "min_batch": 9, "head_slice": 128},
    ]
    table = load(file, rows)

    def width(arch, batch):
        return table.select(OP, batch=batch, arch=arch, next_n=4, **PROBLEM).head_slice

    assert [width(arch, 8) for arch in ("any", "sm_80", "sm_90", "sm_100")] == [32, 32, 64, 64]
    assert [width(arch, 9) for arch in ("any", "sm_80", "sm_90", "sm_100")] == [32, 32, 128, 128]
    assert len(table.variants) == 3


# ---- the shipped table ---------------------------------------------------------------------------


def test_shipped_table_covers_what_it_promises():
    table = load_table()
    choices = {
        "head_dim": (128, 512),
        "compress_ratio": (4, 128),
        "kv_dtype": ("bf16", "fp32"),
        "state_dtype": ("bf16", "fp32"),
        "next_n": (1, 2, 3, 4),
    }
    for backend in ("cuda", "triton"):
        for values in itertools.product(*choices.values()):
            problem = dict(zip(choices, values, strict=True))
            for batch in (1, 48, 49, 2000):
                variant = table.select(OP, batch=batch, backend=backend, **problem)
                assert variant.overlap == (problem["compress_ratio"] == 4)
                assert variant.backend == backend
                assert problem.items() <= variant.problem.items()


def test_shipped_table_explains_every_field():
    header = table_module.SHIPPED.read_text().partition("version: 1")[0]
    for name in (*Variant.spec(), "min_batch", "max_batch", "arch"):
        assert re.search(rf"^#   {name}  ", header, re.MULTILINE), name


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


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
def test_any_damage_to_the_file_is_a_table_error(file, loader, monkeypatch):
    if not hasattr(yaml, loader):
        pytest.skip(f"this PyYAML has no {loader}")
    monkeypatch.setattr(table_module, "Loader", getattr(yaml, loader))
    whole = text(
        [ROW | {"next_n": [1, 2], "max_batch": 48}, ROW | {"next_n": [1, 2], "min_batch": 49}]
    )
    whole = whole.encode()
    pieces = st.binary(max_size=2) | st.sampled_from(
        [c.encode() for c in "{}[],:-?&*!|>'\"%@`#\n\t"]
    )

    @property_test
    @given(
        start=st.integers(0, len(whole)),
        length=st.integers(0, 3),
        piece=pieces,
    )
    def check(start, length, piece):
        damaged = whole[:start] + piece + whole[start + length :]
        try:
            load(file, damaged)
        except TableError as error:
            assert error.file == file and str(file) in str(error)

    check()


VERSION = "version: 1\n"


@pytest.mark.parametrize(
    ("content", "row", "field", "words"),
    [
        ("", None, None, "the table is not a mapping; legal: version: 1, then a section per op"),
        ("- 1", None, None, "the table is not a mapping"),
        ("version: 1", None, None, "has no rows; legal: a section per op, of paged_kv_compress"),
        (f"{OP}: []", None, "version", "version is missing; legal: 1"),
        (
            f"version: 2\n{OP}: []",
            None,
            "version",
            "version = 2 is not accepted; legal: 1 (integer)",
        ),
        ("version: '1'", None, "version", 'version = "1" is not accepted'),
        ("version: true", None, "version", "version = true is not accepted"),
        ("version: [1]", None, "version", "version = [1] is not accepted"),
        ("version: 1\nversion: 1", None, "version", "stands twice (again in line 2)"),
        (
            VERSION + "paged_kv_compres: []",
            None,
            "paged_kv_compres",
            "is no op, did you mean paged_kv_compress?; legal: paged_kv_compress",
        ),
        (VERSION + "1: []", None, "1", "1 is no op; legal: paged_kv_compress"),
        (VERSION + "[a]: []", None, "(seq)", "is no op"),
        (VERSION + f"{OP}: []", f"section {OP}", None, "is not a list of rows; legal: one row or"),
        (VERSION + f"{OP}:", f"section {OP}", None, "is not a list of rows"),
        (VERSION + f"{OP}: {{a: 1}}", f"section {OP}", None, "is not a list of rows"),
        (VERSION + f"{OP}: &a [*a]", f"{OP} row 1 (line 2)", None, "a row is not a mapping"),
        (VERSION + "--- 1", "line 2", None, "is not YAML"),
        (VERSION + "a: b: c", "line 2", None, "is not YAML: mapping values are not allowed"),
        (VERSION + "a: [1\nb: 2", "line 3", None, "while parsing a flow sequence from line 2"),
        (b"\x00\xff\xfe", None, None, "is not YAML"),
    ],
)
def test_faults_outside_rows(file, content, row, field, words):
    error = refused(file, content)
    assert (error.row, error.field) == (row, field)
    assert words in str(error)


@pytest.mark.parametrize(
    ("rows", "row", "words"),
    [
        ([ROW | {"head_slce": 1}], 1, "head_slce is no field of paged_kv_compress, did you mean"),
        ([ROW | {"head_slce": 1}], 1, "did you mean head_slice?; legal: head_dim, compress_ratio,"),
        ([ROW | {"next_n": "4.0"}], 1, 'next_n = "4.0 (float)" is not accepted; legal: 1, 2,'),
        ([ROW | {"next_n": "010"}], 1, 'next_n = "010 (int)" is not accepted'),
        ([ROW | {"next_n": []}], 1, "next_n = [] is an empty list; legal: one value or more"),
        ([ROW | {"next_n": [1, 1]}], 1, "next_n = [1, 1] repeats a value; legal: each value once"),
        ([ROW | {"max_batch": [48]}], 1, "max_batch = [48] is not accepted; legal: 1, 2, ..."),
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
            " 128, overlap false, kv_dtype bf16, state_dtype fp32, next_n 4, cuda, arch any);"
            " legal: 49 or more",
        ),
        (
            [ROW | {"head_slice": [64, 32]}],
            1,
            "head_slice = 32 is the second of two for one problem (head_dim 512, compress_ratio",
        ),
        (
            [ROW | {"max_batch": 48}, ROW | {"min_batch": 50}],
            2,
            "min_batch = 50 leaves batch 49 to 49 without a row (head_dim 512,",
        ),
        ([ROW | {"min_batch": 2}], 1, "min_batch = 2 leaves batch 1 to 1 without a row"),
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
        ([ROW, ROW | {"arch": "sm_90", "max_batch": 4}], 2, "next_n 4, cuda, arch sm_90)"),
    ],
)
def test_faults_in_rows_read_well(file, rows, row, words):
    error = refused(file, rows)
    assert error.row == f"{OP} row {row} (line {FIRST_LINE + row - 1})"
    assert str(error).startswith(f"{file}: {error.row}: ")
    assert words in str(error)


def test_of_several_faulty_problems_the_same_is_named_in_any_order(file):
    rows = [ROW | {"head_dim": n, "max_batch": n} for n in (512, 64, 128)]
    for order in itertools.permutations(rows):
        assert refused(file, list(order)).value == 64


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
        ({"batch": 0}, "batch", "batch = 0 is not accepted; legal: 1, 2,"),
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
    backend=st.sampled_from(["cuda", "triton"]),
)
def test_missing_row_is_told_and_fits(file, head_dim, ratio, overlap, dtypes, next_n, backend):
    kv, state = dtypes
    problem = {"head_dim": head_dim, "compress_ratio": ratio, "overlap": overlap, "kv_dtype": kv}
    problem |= {"state_dtype": state, "next_n": next_n}
    base = ROW | {"head_dim": 8 * 601, "head_slice": 8}  # a problem that is never asked for
    table = load(file, [base])
    with pytest.raises(TableError) as caught:
        table.select(OP, batch=7, backend=backend, arch="sm_90", **problem)
    assert f"{OP} has no {backend} row for arch sm_90" in str(caught.value)
    assert str(file) in str(caught.value)
    (row,) = re.findall(r"^  - (\{.*\})$", str(caught.value), re.MULTILINE)
    variant = load(file, [base, row]).select(OP, batch=7, backend=backend, arch="sm_90", **problem)
    assert variant.problem == problem
    assert variant.backend == backend


def test_row_of_another_arch_or_backend_is_no_row(file):
    table = load(file, [ROW | {"arch": "sm_90"}])
    assert table.select(OP, batch=1, arch="sm_90", next_n=4, **PROBLEM).head_slice == 64
    for other in ({"arch": "sm_80"}, {"arch": "any"}, {"arch": "sm_90", "backend": "triton"}):
        with pytest.raises(TableError, match=r"has no (cuda|triton) row"):
            table.select(OP, batch=1, next_n=4, **PROBLEM, **other)


def test_buckets_are_buckets(file):
    (bucket,) = load(file, [ROW]).buckets
    assert bucket == Bucket(variant=Variant(op=OP, overlap=False, **ROW), row=1, line=FIRST_LINE)
