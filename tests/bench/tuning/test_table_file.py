"""Tuned rows in a table file: they are replaced, and all that is written by hand stays."""

import itertools
from pathlib import Path

import pytest

from kvfold.bench.tuning import table_file
from kvfold.bench.tuning.table_file import MARKER
from kvfold.codegen import Bucket, TableError, Variant, load_table
from kvfold.codegen.table import SHIPPED, row_text
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning
from kvfold.runtime.files import replace_file

OP = "paged_kv_compress"
ORIGIN = "a GPU, 2027-01-02: kvfold tune"
TABLE = """\
# About the table.
version: 1

paged_kv_compress:
  # About the first.
  - {head_dim: 64, compress_ratio: 128, kv_dtype: [bf16, fp32], state_dtype: fp32,
     next_n: [2, 4], backend: cuda, max_batch: 8, reduce_warps: 1, head_slice: 64}  # few
  - {head_dim: 64, compress_ratio: 128, kv_dtype: [bf16, fp32], state_dtype: fp32,
     next_n: [2, 4], backend: cuda, min_batch: 9, reduce_warps: 4, head_slice: 64}

  # About the second.
  - {head_dim: 64, compress_ratio: 4, kv_dtype: bf16, state_dtype: fp32, next_n: 4,
     backend: [cuda, triton], reduce_warps: 1, head_slice: 64}
"""


def problem(**fields) -> Problem:
    defaults = {"head_dim": 64, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32"}
    return Problem(**{**defaults, "next_n": 4, **fields})


def bucket(
    arch="sm_90", backend="cuda", low=1, high=None, warps=2, width=32, min_ctas=1, **fields
) -> Bucket:
    tuning = Tuning(reduce_warps=warps, head_slice=width, min_ctas=min_ctas)
    variant = Variant(problem=problem(**fields), backend=backend, tuning=tuning)
    return Bucket(
        variant=variant, min_size=low, max_size=high, arch=arch, row=0, line=0, section="tuned"
    )


@pytest.fixture
def file(tmp_path) -> Path:
    file = tmp_path / "table.yaml"
    file.write_text(TABLE)
    return file


def edited(file: Path, *new: Bucket, origin: str = ORIGIN) -> str:
    return table_file.replaced(file, new, origin)


def write(file: Path, *new: Bucket, origin: str = ORIGIN) -> str:
    """Writes the file as `kvfold tune` does."""
    replace_file(file, edited(file, *new, origin=origin).encode())
    return file.read_text()


def tuned_part(text: str) -> str:
    assert text.count(MARKER) == 1
    return text.partition(MARKER)[2]


# ---- where the rows go ---------------------------------------------------------------------------


def test_rows_go_into_a_section_below_a_marker(file):
    assert edited(file, bucket()) == (
        f"{TABLE}\n{MARKER}\n\ntuned:\n"
        '  - origin: "a GPU, 2027-01-02: kvfold tune"\n'
        "    paged_kv_compress:\n"
        "      - {head_dim: 64, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 4,"
        "\n         backend: cuda, arch: sm_90, reduce_warps: 2, head_slice: 32}\n"
    )
    assert file.read_text() == TABLE
    write(file, bucket())
    table = load_table(file)
    own = table.find(problem(), "cuda", "sm_90", 9)
    assert own and (own.tuning.reduce_warps, own.tuning.head_slice) == (2, 32)
    other = table.find(problem(), "cuda", "sm_80", 9)
    assert other and other.tuning.reduce_warps == 4
    assert table.contents.tuned[0].origin == ORIGIN


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        TABLE.rstrip("\n"),
        TABLE + "\n\n  # The end.\n\n\n",
        TABLE.replace("\n", "\r\n"),
        "\ufeff" + TABLE,
        TABLE.replace("# About the table.", "# Über die Tabelle: 表"),
    ],
)
def test_text_above_the_marker_stays_byte_for_byte_however_often_rows_are_written(text, file):
    """With or without a newline at its end, with CRLF, with a byte order mark, in any script."""
    file.write_bytes(text.encode())
    write(file, bucket())
    once = file.read_bytes()
    assert once.startswith(text.encode())
    head = once[: once.index(MARKER.encode())]
    for number in range(3):
        write(file, bucket(warps=2 ** (number + 1)), origin=f"run {number}")
        assert file.read_bytes().startswith(head + MARKER.encode())
    write(file, bucket())
    assert file.read_bytes() == once


def test_a_table_is_made_where_there_is_none(tmp_path):
    file = tmp_path / "new.yaml"
    assert edited(file, bucket()) and not file.exists()
    assert write(file, bucket()).startswith(f"version: 1\n{MARKER}\n\ntuned:\n  - origin: ")
    assert len(load_table(file).variants) == 1


def test_the_file_keeps_its_link_and_mode_and_leaves_nothing_behind(file, tmp_path):
    file.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    write(link, bucket())
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o640
    assert MARKER in file.read_text()
    assert sorted(tmp_path.iterdir()) == [link, file]


def test_a_read_only_table_is_not_overwritten(file):
    file.chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        write(file, bucket())
    assert file.read_text() == TABLE


# ---- what is replaced ----------------------------------------------------------------------------


def test_a_second_run_replaces_the_first_ones_rows_and_origin(file):
    write(file, bucket(), origin="old")
    write(file, bucket(warps=4), origin="new")
    fresh = file.with_name("fresh.yaml")
    fresh.write_text(TABLE)
    write(fresh, bucket(warps=4), origin="new")
    assert file.read_text() == fresh.read_text()


def test_other_problems_backends_and_archs_keep_their_rows_and_origins(file):
    first = [
        bucket(next_n=2), bucket(arch="sm_100"), bucket(backend="triton", compress_ratio=4),
        bucket(kv_dtype="fp32", high=8), bucket(kv_dtype="fp32", low=9, warps=8), bucket(),
    ]  # fmt: skip
    write(file, *first, origin="first")
    before = load_table(file)
    write(file, bucket(warps=4, width=64), origin="second")
    after = load_table(file)
    assert [entry.origin for entry in after.contents.tuned] == ["first", "second"]
    changed = bucket().group
    assert after.groups.keys() == before.groups.keys()
    for group, buckets in before.groups.items():
        found = [(b.variant, b.min_size, b.max_size) for b in after.groups[group]]
        same = found == [(b.variant, b.min_size, b.max_size) for b in buckets]
        assert same == (group != changed)
    (only,) = after.groups[changed]
    assert only.variant == bucket(warps=4, width=64).variant


def test_rows_of_a_merged_problem_lose_only_what_is_tuned_anew(file):
    write(file, *(bucket(next_n=n) for n in (1, 2, 3, 4)), origin="first")
    text = write(file, bucket(next_n=2, warps=4), bucket(next_n=3, warps=4), origin="second")
    assert tuned_part(text).count("next_n: [1, 4]") == 1
    assert tuned_part(text).count("next_n: [2, 3]") == 1


def test_an_entry_without_rows_goes(file):
    write(file, bucket(), origin="first run")
    text = write(file, bucket(warps=4), bucket(next_n=2), origin="second run")
    assert "first run" not in text and len(load_table(file).contents.tuned) == 1


def test_many_origins_survive_in_their_order(file):
    origins = [f"GPU {n}, 2027-01-0{n}: kvfold tune next_n={n}" for n in (1, 2, 3)]
    for n, origin in enumerate(origins, 1):
        write(file, bucket(next_n=n), origin=origin)
    assert [entry.origin for entry in load_table(file).contents.tuned] == origins
    write(file, bucket(next_n=2, warps=4), origin="again")
    found = [entry.origin for entry in load_table(file).contents.tuned]
    assert found == [origins[0], origins[2], "again"]


@pytest.mark.parametrize(
    "origin",
    [
        "word " * 60 + "end",
        'a "quoted" GPU \\ with: {odd} [text], # and -- dashes',
        "x" * 300,
        f"a GPU: kvfold tune --from {'/long' * 40}/times.json --mixture all-hit=1",
        "gpü 表",
    ],
)
def test_an_origin_survives_whatever_it_holds(file, origin):
    text = write(file, bucket(), origin=origin)
    write(file, bucket(next_n=2), origin="other")
    assert load_table(file).contents.tuned[0].origin == origin
    if max(map(len, origin.split())) < 50:
        assert max(map(len, text.splitlines())) <= table_file.WIDTH


# ---- what is refused -----------------------------------------------------------------------------


def test_a_result_that_would_be_no_table_is_refused_with_the_files_name(file):
    with pytest.raises(TableError, match=rf"^{file}: tuned {OP} row 1 .*leaves batch 9") as caught:
        edited(file, bucket(high=8))
    assert caught.value.file == file
    with pytest.raises(TableError, match=rf"^{file}: tuned {OP} row 1 .*overlaps {OP} row 1"):
        edited(file, bucket(arch="any"))  # which hand-written rows already serve
    assert file.read_text() == TABLE


@pytest.mark.parametrize("text", ["version: 2\n", "- 1\n", "version: [", "\x00", "\xff\xfe"])
def test_a_file_that_is_no_table_is_refused_with_its_name(text, file):
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(TableError, match=str(file)):
        edited(file, bucket())
    assert file.read_bytes() == text.encode("latin-1")


def test_rows_on_the_wrong_side_of_the_marker_are_not_lost(file):
    row = "  - " + row_text(problem(next_n=1).values() | {"backend": "cuda", "reduce_warps": 1,
                                                          "head_slice": 64})  # fmt: skip
    says = r"is written by hand, and stands where tuned rows are.*Everything below"
    # Hand-written rows below it.
    text = f"version: 1\n{MARKER}\n{OP}:\n{row}\n"
    file.write_text(text)
    with pytest.raises(TableError, match=rf"{file}: {OP} row 1 \(line 4\): {says}"):
        edited(file, bucket())
    # A cache format below it.
    file.write_text(f"{TABLE}{MARKER}\ncache_formats:\n  mine: {{code: bf16}}\n")
    with pytest.raises(TableError, match=rf"{file}: cache_formats mine \(line 16\): {says}"):
        edited(file, bucket())
    # Tuned rows without it, or above it.
    write_tuned = f"version: 1\ntuned:\n  - origin: x\n    {OP}:\n    {row}\n"
    for text in (write_tuned, write_tuned + MARKER + "\n"):
        file.write_text(text)
        with pytest.raises(TableError, match=rf"^{file}: tuned .* is given twice"):
            edited(file, bucket())


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_say_only_what_is_no_default():
    ranges = [
        bucket(high=22, next_n=next_n, warps=8) for next_n in (1, 4)
    ] + [bucket(low=23, next_n=next_n, warps=4, min_ctas=5) for next_n in (1, 4)]  # fmt: skip
    first, second = table_file.table_rows(ranges)
    common = {
        "head_dim": 64, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32",
        "next_n": [1, 4], "backend": "cuda", "arch": "sm_90",
    }  # fmt: skip
    assert first == common | {"max_batch": 22, "reduce_warps": 8, "head_slice": 32}
    assert second == common | {
        "min_batch": 23, "reduce_warps": 4, "head_slice": 32, "min_ctas": 5
    }  # fmt: skip
    (row,) = table_file.table_rows([bucket(arch="any")])
    assert not row.keys() & {"arch", "min_batch", "max_batch", "overlap", "min_ctas"}


def test_an_overlap_that_is_not_the_ratios_own_is_said(file):
    (row,) = table_file.table_rows([bucket(compress_ratio=4, overlap=False)])
    assert row["overlap"] is False
    # It shares no row with the ratio's own, which has no value to write.
    both = [bucket(compress_ratio=4, next_n=3, overlap=overlap) for overlap in (True, False)]
    assert ["overlap" in row for row in table_file.table_rows(both)] == [False, True]
    write(file, *both)
    for one in both:
        assert load_table(file).find(one.variant.problem, "cuda", "sm_90", 1) == one.variant


def test_problems_with_the_same_ranges_share_rows_where_lists_say_exactly_them():
    four = [
        {"head_dim": head_dim, "kv_dtype": kv_dtype}
        for head_dim, kv_dtype in itertools.product((64, 128), ("bf16", "fp32"))
    ]
    rows = table_file.table_rows(
        one for fields in four for one in (bucket(high=8, **fields), bucket(low=9, **fields))
    )
    assert len(rows) == 2
    assert all(r["head_dim"] == [64, 128] and r["kv_dtype"] == ["bf16", "fp32"] for r in rows)
    # Three of the four are no product.
    rows = table_file.table_rows(bucket(**fields) for fields in four[:3])
    assert [(r["head_dim"], r["kv_dtype"]) for r in rows] == [
        (64, ["bf16", "fp32"]), (128, "bf16")
    ]  # fmt: skip
    # All of the ranges must be the same.
    rows = table_file.table_rows([bucket(high=8), bucket(low=9, warps=4), bucket(kv_dtype="fp32")])
    assert len(rows) == 3
    # Each ratio has the overlap that is its own.
    (row,) = table_file.table_rows([bucket(compress_ratio=4), bucket(compress_ratio=128)])
    assert row["compress_ratio"] == [4, 128] and "overlap" not in row


def test_rows_stand_for_exactly_their_buckets(file):
    """Whatever is merged, the table serves each problem with the variant that it was given."""
    choices = itertools.product((1, 2), ("bf16", "fp32"), (64, 128), (4, 128))
    new = [
        one
        for number, (next_n, kv_dtype, head_dim, ratio) in enumerate(choices)
        for one in (
            bucket(next_n=next_n, kv_dtype=kv_dtype, head_dim=head_dim, compress_ratio=ratio,
                   high=8, warps=(1, 2)[number % 3 == 0]),
            bucket(next_n=next_n, kv_dtype=kv_dtype, head_dim=head_dim, compress_ratio=ratio,
                   low=9, width=64),
        )
    ]  # fmt: skip
    write(file, *new)
    table = load_table(file)
    for one in new:
        for size in (one.min_size, one.max_size or 10**6):
            assert table.find(one.variant.problem, "cuda", "sm_90", size) == one.variant


def test_rows_are_written_as_the_shipped_table_writes_them():
    row = {
        "head_dim": [128, 512], "compress_ratio": 128, "kv_dtype": ["bf16", "fp32"],
        "state_dtype": "fp32", "next_n": [1, 2, 3, 4], "backend": "cuda", "min_batch": 9,
        "max_batch": 128, "reduce_warps": 4, "head_slice": 32, "min_ctas": 5,
    }  # fmt: skip
    assert table_file.row_lines(row) == (
        "  - {head_dim: [128, 512], compress_ratio: 128, kv_dtype: [bf16, fp32],"
        " state_dtype: fp32,\n     next_n: [1, 2, 3, 4], backend: cuda, min_batch: 9,"
        " max_batch: 128, reduce_warps: 4,\n     head_slice: 32, min_ctas: 5}"
    )
    assert "overlap: false" in table_file.row_lines({"head_dim": 8, "overlap": False})


def test_the_shipped_table_takes_rows_for_one_gpu(tmp_path):
    copy = tmp_path / "configs.yaml"
    copy.write_bytes(SHIPPED.read_bytes())
    before = load_table(copy)
    head = SHIPPED.read_text().partition(MARKER)[0]
    write(copy, bucket(head_dim=512, arch="sm_103"))  # none of the shipped rows is for this one
    assert copy.read_text().startswith(head)
    assert set(before.variants) < set(load_table(copy).variants)
    assert [e.origin for e in load_table(copy).contents.tuned][:-1] == [
        e.origin for e in before.contents.tuned
    ]
