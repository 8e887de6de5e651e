"""Editing a table file: what is tuned is replaced, all else stays to the byte."""

import re

import pytest

from kvfold.bench import rows
from kvfold.codegen import TableError, load_table
from kvfold.codegen.table import SHIPPED

OP = "paged_kv_compress"
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


def problem(**changes) -> dict:
    defaults = {"head_dim": 64, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32"}
    return defaults | {"next_n": 4} | changes


def new_row(**changes) -> dict:
    return problem() | {"backend": "cuda", "reduce_warps": 2, "head_slice": 32} | changes


def groups(row: dict) -> set[tuple]:
    """Bucket.group of a row's problems, by the table's own reading."""
    found = [{"arch": "any"}]
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        found = [fields | {name: one} for fields in found for one in values]
    return {
        (
            OP, f["backend"], f["arch"], f["head_dim"], f["compress_ratio"],
            f.get("overlap", f["compress_ratio"] == 4), f["kv_dtype"], f["state_dtype"],
            f["next_n"],
        )
        for f in found
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "table.yaml"
    file.write_text(TABLE)
    return file


def edited(file, *new: dict, comment: str = "a GPU, 2027-01-02, kvfold tune") -> rows.Edit:
    return rows.replaced(file, OP, set().union(*map(groups, new)), new, comment)


def test_new_rows_end_the_section_where_none_goes(file):
    edit = edited(file, new_row(arch="sm_90"))
    assert edit.after == TABLE + (
        "\n  # Tuned on a GPU, 2027-01-02, kvfold tune\n"
        "  - {head_dim: 64, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 4,"
        " backend: cuda,\n     reduce_warps: 2, head_slice: 32, arch: sm_90}\n"
    )
    assert file.read_text() == TABLE  # until write()
    edit.write()
    table = load_table(file)
    own = table.select(OP, batch=9, arch="sm_90", **problem())
    assert (own.reduce_warps, own.head_slice) == (2, 32)
    assert table.select(OP, batch=9, arch="sm_80", **problem()).reduce_warps == 4


def test_rows_that_serve_the_problems_alone_go_and_the_new_ones_take_their_place(file):
    row = new_row(kv_dtype=["bf16", "fp32"], next_n=[2, 4])
    after = edited(file, row).after
    new = "\n".join([*rows.comment_lines("a GPU, 2027-01-02, kvfold tune"), rows.written(row)])
    first = TABLE.index("  - {head_dim: 64, compress_ratio: 128")
    end = TABLE.index("\n  # About the second.")
    assert after == TABLE[:first] + new + "\n" + TABLE[end:]


def test_a_row_that_serves_other_problems_loses_only_these(file):
    edit = edited(file, new_row(kv_dtype=["bf16", "fp32"], next_n=4))
    assert edit.after.startswith(TABLE.replace("next_n: [2, 4]", "next_n: 2"))
    edit.write()
    table = load_table(file)
    for kv_dtype in ("bf16", "fp32"):
        assert table.select(OP, batch=1, **problem(next_n=2, kv_dtype=kv_dtype)).reduce_warps == 1
        assert table.select(OP, batch=9, **problem(next_n=2, kv_dtype=kv_dtype)).reduce_warps == 4
        for batch in (1, 9):
            chosen = table.select(OP, batch=batch, **problem(kv_dtype=kv_dtype))
            assert (chosen.reduce_warps, chosen.head_slice) == (2, 32)


def test_a_backend_can_be_what_a_row_loses(file):
    edit = edited(file, new_row(compress_ratio=4))
    assert "backend: triton, reduce_warps: 1" in edit.after and "[cuda, triton]" not in edit.after


def test_a_list_keeps_its_other_values(file):
    file.write_text(TABLE.replace("next_n: [2, 4]", "next_n: [1, 2, 4]"))
    row = new_row(kv_dtype=["bf16", "fp32"], next_n=2)
    assert edited(file, row).after.count("next_n: [1, 4]") == 2


def test_a_list_over_several_lines_can_lose_values(file):
    file.write_text(TABLE.replace("next_n: [2, 4]", "next_n: [2,\n       4]"))
    row = new_row(kv_dtype=["bf16", "fp32"])
    assert edited(file, row).after.startswith(TABLE.replace("next_n: [2, 4]", "next_n: 2"))


def test_a_row_that_no_list_parts_is_named(file):
    with pytest.raises(TableError, match=r"row 1 \(line 6\).* also serves problems") as caught:
        edited(file, new_row())  # of two dtypes and two next_n, one pair
    assert str(file) in str(caught.value) and file.read_text() == TABLE


def test_a_table_that_would_be_invalid_is_not_written(file):
    with pytest.raises(TableError, match=f"{file}.*leaves batch 9"):
        edited(file, new_row(arch="sm_90", max_batch=8))
    with pytest.raises(TableError, match="would have no row"):
        rows.replaced(file, OP, groups(new_row(arch="sm_90")), [], "nothing")
    with pytest.raises(TableError, match="rows of other problems"):
        rows.replaced(
            file, OP, groups(new_row(arch="sm_90")), [new_row(arch=["sm_90", "sm_80"])], "more"
        )
    assert file.read_text() == TABLE


@pytest.mark.parametrize("many", [False, True])
def test_a_second_run_replaces_the_first_ones_rows_and_comment(file, many):
    """Its rows, whatever they are now, and its comment of one line or several; nothing else."""
    first = edited(file, new_row(arch="sm_90"), comment=" ".join(["word"] * 40 * many + ["old"]))
    first.write()
    again = edited(file, new_row(arch="sm_90", reduce_warps=4), comment="new")
    fresh = TABLE + "\n  # Tuned on new\n" + rows.written(new_row(arch="sm_90", reduce_warps=4))
    assert again.after == fresh + "\n"


def test_an_earlier_comment_stays_with_the_rows_that_stay(file):
    two = [new_row(arch="sm_90", next_n=next_n) for next_n in (2, 4)]
    edited(file, *two, comment="first").write()
    after = edited(file, two[0], comment="second").after
    assert after.count("# Tuned on first") == after.count("# Tuned on second") == 1
    # The kept row is apart from the new one, whose comment does not speak of it.
    assert re.search(r"# Tuned on second\n.*\n.*}\n\n  - {.*next_n: 4", after)


def test_a_table_is_made_where_there_is_none(tmp_path):
    file = tmp_path / "new.yaml"
    edit = edited(file, new_row(arch="sm_90"))
    assert not file.exists()
    edit.write()
    assert file.read_text().startswith("version: 1\n\npaged_kv_compress:\n  # Tuned on a GPU")
    assert len(load_table(file).variants) == 1


def test_the_file_keeps_its_link_mode_line_ends_and_the_last_one_missing(file, tmp_path):
    windows = TABLE.rstrip("\n").replace("\n", "\r\n").encode()
    file.write_bytes(windows)
    file.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    edited(link, new_row(arch="sm_90")).write()
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o640
    content = file.read_bytes()
    assert content.startswith(windows + b"\r\n\r\n  # Tuned on")
    assert content.count(b"\n") == content.count(b"\r\n")
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file is left


def test_block_rows_can_go_too(file):
    block = "\n".join(f"    {name}: {value}" for name, value in new_row(next_n=1).items())
    file.write_text(f"{TABLE}  -{block[3:]}\n\n  # The end.\n")
    after = edited(file, new_row(next_n=1, reduce_warps=4)).after
    new = rows.written(new_row(next_n=1, reduce_warps=4))
    tail = "\n  # Tuned on a GPU, 2027-01-02, kvfold tune\n" + new + "\n\n  # The end.\n"
    assert after == TABLE + tail


def test_rows_that_share_a_line_are_refused(file):
    first, second = (rows.written(new_row(next_n=n))[4:].replace("\n", "") for n in (1, 2))
    file.write_text(f"version: 1\n{OP}: [{first},\n  {second}]\n")
    with pytest.raises(TableError, match=r"row 1 \(line 2\).*line of its own"):
        edited(file, new_row(next_n=1, reduce_warps=4))


def test_the_diff_shows_the_change_and_nothing_for_none(file):
    edit = edited(file, new_row(arch="sm_90"))
    lines = edit.diff().splitlines()
    assert lines[0] == f"--- {file} (now)" and lines[1] == f"+++ {file} (tuned)"
    assert "+  # Tuned on a GPU, 2027-01-02, kvfold tune" in lines
    assert not [line for line in lines[2:] if line.startswith("-")]
    assert rows.Edit(file, TABLE, TABLE).diff() == ""


def test_rows_are_written_as_the_shipped_table_writes_them():
    row = {
        "head_dim": [128, 512], "compress_ratio": 128, "kv_dtype": ["bf16", "fp32"],
        "state_dtype": "fp32", "next_n": [1, 2, 3, 4], "backend": "cuda", "min_batch": 9,
        "max_batch": 128, "reduce_warps": 4, "head_slice": 32, "min_ctas": 5,
    }  # fmt: skip
    assert rows.written(row) == (
        "  - {head_dim: [128, 512], compress_ratio: 128, kv_dtype: [bf16, fp32],"
        " state_dtype: fp32,\n     next_n: [1, 2, 3, 4], backend: cuda, min_batch: 9,"
        " max_batch: 128, reduce_warps: 4,\n     head_slice: 32, min_ctas: 5}"
    )
    assert "overlap: false" in rows.written({"head_dim": 8, "overlap": False})
    long = rows.comment_lines(" ".join(["word"] * 60))
    assert all(len(line) <= rows.WIDTH for line in long) and len(long) > 2


def test_the_shipped_table_takes_rows_for_one_gpu(tmp_path):
    copy = tmp_path / "configs.yaml"
    copy.write_bytes(SHIPPED.read_bytes())
    before = load_table(copy)
    row = new_row(head_dim=512, arch="sm_103")  # none of the shipped rows is for this one
    edited(copy, row).write()
    assert copy.read_text().startswith(SHIPPED.read_text())
    assert set(before.variants) < set(load_table(copy).variants)
