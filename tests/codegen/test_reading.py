"""The structure of a table file: YAML, sections, rows, and the section that the tuner writes."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import FIRST_LINE, OP, property_test, text, written
from table_files import PROBLEM, ROW, load, refused

from kvfold.codegen import TableError, op_spec, op_specs, reading

LOADERS = [name for name in ("CSafeLoader", "SafeLoader") if hasattr(yaml, name)]
VERSION = "version: 1\n"
OPS = ", ".join(op_specs())


@pytest.fixture(params=LOADERS)
def loader(request, monkeypatch):
    """Reads tables with libyaml, and with Python's own parser."""
    monkeypatch.setattr(reading, "Loader", getattr(yaml, request.param))


def test_any_damage_to_the_file_is_a_table_error(file, loader):
    whole = text(
        [ROW | {"next_n": [1, 2], "max_batch": 48}, ROW | {"next_n": [1, 2], "min_batch": 49}]
    )
    whole += f"tuned:\n  - {{origin: x, {OP}: [{written(ROW | {'arch': 'sm_90'})}]}}\n"
    whole = whole.encode()
    pieces = st.binary(max_size=2) | st.sampled_from(
        [c.encode() for c in "{}[],:-?&*!|>'\"%@`#\n\t"]
    )
    assert len(load(file, whole).buckets) == 5

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


@pytest.mark.parametrize(
    ("content", "row", "field", "words"),
    [
        ("", None, None, "the table is not a mapping; legal: version: 1, then a section per op"),
        ("- 1", None, None, "the table is not a mapping"),
        ("version: 1", None, None, f"has no rows; legal: a section per op, of {OPS}"),
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
        ("version: 1\nversion: 1", None, "version", "is given twice (again in line 2)"),
        (
            VERSION + "paged_kv_compres: []",
            None,
            "paged_kv_compres",
            f"is no section, did you mean paged_kv_compress?; legal: {OPS}, cache_formats, tuned",
        ),
        (VERSION + "1: []", None, "1", f"1 is no section; legal: {OPS}"),
        (VERSION + "[a]: []", None, "(seq)", "is no section"),
        (VERSION + f"{OP}: []", f"section {OP}", None, "is not a list of rows; legal: one row or"),
        (VERSION + f"{OP}:", f"section {OP}", None, "is not a list of rows"),
        (VERSION + f"{OP}: {{a: 1}}", f"section {OP}", None, "is not a list of rows"),
        (VERSION + f"{OP}: [[1]]", f"{OP} row 1 (line 2)", None, "a row is not a mapping"),
        (VERSION + f"{OP}: &a [*a]", "line 2", None, "has an alias; legal: values written out"),
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


# ---- limits --------------------------------------------------------------------------------------

DEEP = {
    "closed lists": "version: " + "[" * 25_000 + "]" * 25_000,
    "open lists": "[" * 25_000,
    "mappings in a row": VERSION + f"{OP}:\n  - {{kv_dtype: " + "{a: " * 2_000,
    "lists in block style": "- " * 25_000,
    "mappings in block style": "\n".join(" " * level + "a:" for level in range(1_000)),
    "keys": "? " * 25_000,
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_deep_nesting_is_refused(file, loader, content):
    error = refused(file, content)
    assert error.row.startswith("line ")
    assert "nests too deep; legal: 8 levels" in str(error) or "maximum nesting" in str(error)


def test_nesting_is_allowed_as_deep_as_a_table_needs_it(file, loader):
    tuned = f"tuned:\n  - origin: x\n    {OP}:\n      - {written(ROW | {'next_n': [1, 2]})}\n"
    assert len(load(file, VERSION + tuned).buckets) == 2
    for value, words in (("[[[a]]]", "plain values"), ("[[[[a]]]]", "nests too deep")):
        nested = tuned.replace("kv_dtype: bf16", f"kv_dtype: {value}")
        assert words in str(refused(file, VERSION + nested))


def test_a_large_file_is_refused_unread(file, monkeypatch):
    comment = "#" * (reading.MAX_BYTES - len(text([ROW])))
    assert len(load(file, text([ROW]) + comment).buckets) == 1
    monkeypatch.setattr(reading, "Loader", None)
    error = refused(file, text([ROW]) + comment + "#")
    assert f"has {reading.MAX_BYTES + 1} bytes; legal: at most {reading.MAX_BYTES}" in str(error)


def test_an_alias_is_refused_as_few_bytes_could_stand_for_any_number_of_rows(file, loader):
    rows = f"{OP}:\n  - &row {written(ROW)}\n" + "  - *row\n" * 100_000
    error = refused(file, VERSION + rows)
    assert error.row == "line 4"
    assert "has an alias" in str(error)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[[1,2],[3]]", 'kv_dtype = ["(seq)", "(seq)"] holds a list or a mapping; legal: plain'),
        ("[bf16, {a: 1}]", 'kv_dtype = ["(map)"] holds a list or a mapping; legal: plain values'),
        ("{a: 1}", 'kv_dtype = "(map)" is not accepted; legal: bf16, fp32'),
        ("[bf16, bf16]", 'kv_dtype = ["bf16", "bf16"] repeats a value; legal: each value once'),
    ],
)
def test_values_that_are_not_plain_read_well(file, value, words):
    assert words in str(refused(file, [ROW | {"kv_dtype": value}]))


@pytest.mark.parametrize(
    "change",
    [
        {"kv_dtype": "x" * 500_000},
        {"kv_dtype": [[1]] * 20_000},
        {"next_n": [1] * 50_000},
        {"next_n": "9" * 100_000},
        {"arch": "s" * 100_000},
        {f"? {'k' * 100_000}\n   ": 1},  # an unknown field
    ],
    ids=lambda change: next(iter(change))[:9],
)
def test_the_message_for_a_huge_value_is_short(file, change):
    error = refused_briefly(file, [ROW | change])
    assert error.row == f"{OP} row 1 (line {FIRST_LINE})"
    assert len(str(error)) < 600
    assert " characters)" in str(error)


def refused_briefly(file, content) -> TableError:
    """The error of a table whose message need not hold all that the error knows."""
    with pytest.raises(TableError) as caught:
        load(file, content)
    return caught.value


# ---- the section that the tuner writes -----------------------------------------------------------


def with_tuned(rows: list, *entries: str) -> str:
    """Hand-written rows, then the entries of the tuned section."""
    return text(rows) + "tuned:\n" + "".join(f"  - {entry}\n" for entry in entries)


def entry(*rows: dict, origin: str = "origin: x") -> str:
    return f"{{{origin}, {OP}: [{', '.join(map(written, rows))}]}}"


def test_tuned_rows_are_rows_of_the_table(file):
    own = ROW | {"arch": "sm_90", "head_slice": 32}
    small, large = own | {"max_batch": 8}, own | {"min_batch": 9, "reduce_warps": 4}
    content = with_tuned(
        [ROW],
        entry(small, large, origin="origin: first run"),
        entry(ROW | {"head_dim": 128, "next_n": [1, 2]}, origin='origin: "second: run"'),
    )
    table = load(file, content)
    assert len(table.buckets) == 5
    assert [b.where for b in table.buckets] == [
        f"{OP} row 1 (line 3)",
        f"tuned {OP} row 1 (line 5)",
        f"tuned {OP} row 2 (line 5)",
        f"tuned {OP} row 1 (line 6)",
        f"tuned {OP} row 1 (line 6)",
    ]
    for batch, warps in ((8, 8), (9, 4)):
        chosen = table.select(OP, batch=batch, arch="sm_90", next_n=4, **PROBLEM)
        assert chosen.tuning == op_spec(OP).tuning(reduce_warps=warps, head_slice=32)
    assert table.select(OP, batch=8, next_n=4, **PROBLEM).tuning.head_slice == 64
    assert [one.origin for one in table.contents.tuned] == ["first run", "second: run"]
    assert [len(one.rows) for one in table.contents.tuned] == [2, 1]
    assert len(table.contents.rows) == 1
    assert list(table.contents.all_rows()) == [
        *table.contents.rows,
        *table.contents.tuned[0].rows,
        *table.contents.tuned[1].rows,
    ]


def test_a_table_may_have_tuned_rows_alone(file):
    table = load(file, VERSION + "tuned:\n  - " + entry(ROW))
    assert [bucket.section for bucket in table.buckets] == [f"tuned {OP}"]


def test_a_fault_in_a_tuned_row_names_it(file):
    error = refused(file, with_tuned([ROW], entry(ROW | {"arch": "sm_90", "next_n": 17})))
    assert error.row == f"tuned {OP} row 1 (line 5)"
    assert (error.field, error.value) == ("next_n", 17)


def test_a_tuned_row_that_overlaps_a_hand_written_row_of_its_arch_is_refused(file):
    own = ROW | {"arch": "sm_90"}
    error = refused(file, with_tuned([ROW, own], entry(own | {"head_slice": 32})))
    assert error.row == f"tuned {OP} row 1 (line 6)"
    assert f"overlaps {OP} row 2 (line 4) (head_dim 512," in str(error)
    error = refused(file, with_tuned([ROW, own], entry(own)))
    assert f"duplicates {OP} row 2 (line 4) (head_dim 512," in str(error)
    error = refused(file, with_tuned([ROW], entry(own), entry(own | {"head_slice": 32})))
    assert error.row == f"tuned {OP} row 1 (line 6)"
    assert f"overlaps tuned {OP} row 1 (line 5)" in str(error)


@pytest.mark.parametrize(
    ("section", "row", "field", "words"),
    [
        ("", "section tuned", None, "is not a list of rows; legal: one row or more, each '- {or"),
        ("{a: 1}", "section tuned", None, "is not a list of rows"),
        ("[]", "section tuned", None, "is not a list of rows"),
        ("[5]", "tuned, line 4", None, "an entry is not a mapping; legal: origin: text, then a"),
        (f"[{{{OP}: []}}]", "tuned, line 4", "origin", "origin is missing; legal: origin: text"),
        ("[{origin: }]", "tuned, line 4", "origin", 'origin = " (null)" is not text'),
        ("[{origin: [a]}]", "tuned, line 4", "origin", 'origin = ["a"] is not text'),
        ("[{origin: a}]", "tuned, line 4", None, "has no rows; legal: origin: text, then a"),
        ("[{origin: a, norm: []}]", None, "norm", f"norm is no op; legal: {OPS}"),
        (f"[{{origin: a, {OP}: []}}]", f"section tuned {OP}", None, "is not a list of rows"),
        (f"[{{origin: a, {OP}: [1]}}]", f"tuned {OP} row 1 (line 4)", None, "a row is not a map"),
    ],
)
def test_faults_in_the_tuned_section_outside_rows(file, section, row, field, words):
    error = refused(file, text([ROW]) + f"tuned: {section}\n")
    assert (error.row, error.field) == (row, field)
    assert words in str(error)
