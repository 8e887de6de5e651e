"""kvfold table: list, check, fields and explain."""

import re

import pytest
from command_line import kvfold_command, refused

from kvfold.codegen import CacheFormat, load_table, op_spec, op_specs

OP = "paged_kv_compress"


def test_list_shows_every_row_and_how_many_variants_it_stands_for():
    text = kvfold_command("table", "list").stdout
    table = load_table()
    assert f"{len(table.variants)} variants" in text and table.fingerprint in text
    rows = re.findall(r"^ +(\d+) +\d+[-+]\S* +.* (\d+) *$", text, re.MULTILINE)
    assert [int(line) for line, _ in rows] == sorted({b.line for b in table.buckets})
    assert sum(int(count) for _, count in rows) == len(table.buckets)


def test_list_shows_what_each_row_says(small):
    text = kvfold_command("table", "list").stdout
    assert re.search(
        r"^paged_kv_compress, cuda, arch any: head_dim 64; compress_ratio 4, 128; overlap true,"
        r" false; kv_dtype bf16; state_dtype fp32; next_n 4; ape_in_state true$",
        text,
        re.MULTILINE,
    )
    assert re.search(r"^ +3 +1\+ +reduce_warps 1; head_slice 64 +2 *$", text, re.MULTILINE)
    # The two rows of one problem share a heading.
    own = text.split("arch sm_80: ")
    assert len(own) == 2 and "next_n 2" in own[1]
    assert re.search(r"^ +5 +1-8 +reduce_warps 1; head_slice 64 +1 *$", own[1], re.MULTILINE)
    assert re.search(r"^ +7 +9\+ +reduce_warps 4; head_slice 64 +1 *$", own[1], re.MULTILINE)


def test_list_is_readable_at_80_columns():
    """A row of the table begins a line, and no word is broken."""
    wide, narrow = (kvfold_command("table", "list", columns=width).stdout for width in (200, 80))
    lines = narrow.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first line holds the table's path
    words = [sorted(word for word in text.split() if "─" not in word) for text in (wide, narrow)]
    assert words[0] == words[1]
    rows = [line for line in lines if re.match(r" +\d+ +\d+[-+]", line)]
    assert len(rows) == len({bucket.where for bucket in load_table().buckets})


def test_list_all_shows_where_every_variant_serves():
    text = kvfold_command("table", "list", "--all").stdout
    shown = [tuple(line.split()) for line in text.splitlines()]
    buckets = [(b.range, b.variant.symbol, b.arch, str(b.line)) for b in load_table().buckets]
    assert set(buckets) <= set(shown)


def test_list_shows_every_cache_format():
    text = kvfold_command("table", "list").stdout
    table = load_table()
    assert f"{len(table.formats)} cache formats, fingerprint" in text
    shown = re.findall(r"^ +(\w+) +(code .*?) *$", text, re.MULTILINE)
    assert shown == [
        (name, "; ".join(f"{field} {value}" for field, value in format.given().items()))
        for name, format in table.formats.items()
    ]


def test_a_table_without_cache_formats_does_not_speak_of_them(small):
    assert "cache" not in kvfold_command("table", "list").stdout.removeprefix(str(small))
    small.write_text("version: 1\ncache_formats:\n  mine: {code: bf16}\n")
    assert "0 rows, 0 variants, 1 cache format, " in kvfold_command("table", "list").stdout


def test_check_passes_a_valid_table_and_names_what_is_wrong(small):
    assert "OK: 3 rows, 4 variants (4 cuda)" in kvfold_command("table", "check", small).stdout
    valid = small.read_text()
    small.write_text(valid.replace("head_slice: 64", "head_slice: 48"))
    line = refused("table", "check", small)
    assert str(small) in line and "row 1 (line 3)" in line and "head_slice = 48" in line
    small.write_text("version: [")
    assert "line" in refused("table", "check", small)
    assert "cannot be read" in refused("table", "check", small.with_name("none.yaml"))


def test_a_single_row_and_variant_are_not_plural(small):
    text = small.read_text().split("  - ")
    small.write_text((text[0] + "  - " + text[1]).replace("[4, 128]", "128"))
    assert "OK: 1 row, 1 variant (1 cuda)" in kvfold_command("table", "check", small).stdout


@pytest.mark.parametrize(
    "command",
    [("table", "list"), ("table", "explain", OP, "--batch", "1"), ("build",)],
)
def test_a_broken_table_in_force_is_one_line_for_every_command(small, command):
    small.write_text(small.read_text().replace("next_n: 4", "next_m: 4"))
    line = refused(*command)
    assert "did you mean next_n?" in line and str(small) in line


def test_fields_explains_every_field_of_a_row():
    text = kvfold_command("table", "fields", OP, columns=80).stdout
    spec = op_spec(OP)
    names = [field.name for field in (*spec.problem.fields(), *spec.tuning.fields())]
    names += ["backend", "min_batch", "max_batch", "arch"]
    found = re.findall(r"^(\w+) ", text, re.MULTILINE)
    assert [name for name in found if name in names] == names
    assert max(map(len, text.splitlines())) <= 80
    assert "tuning; legal: 1, 2, 4, 8, 16, 32 (integer)" in text
    assert "applicability; legal: 1 or more; default: 1" in text
    assert f"cuda is no op; legal: {min(op_specs())}" in refused("table", "fields", "cuda")


def test_fields_explains_every_field_of_a_cache_format():
    text = kvfold_command("table", "fields", "cache_formats", columns=80).stdout
    names = [field.name for field in CacheFormat.fields()]
    assert re.findall(r"^(\w+) ", text, re.MULTILINE) == names
    assert max(map(len, text.splitlines())) <= 80
    assert "format; legal: 0.0 to 1e+30 (number, as 1.0e-4); default: 0.0" in text


def test_explain_says_which_row_serves_and_what_other_sizes_get(small):
    words = ("head_dim=64", "next_n=2", "--arch", "sm_80", "--batch", 8)
    text = kvfold_command("table", "explain", OP, *words).stdout
    assert re.search(r"variant +paged_kv_compress_hd64_r128_bf16_fp32_n2_w1_s64", text)
    assert f"paged_kv_compress row 2 (line 5) of {small} serves batch 1-8" in text
    assert "8 CTAs that reduce = 8 requests x 1 slices of 64 columns; 1 warp reads" in text
    assert re.search(r"per CTA +32 threads, \d+ bytes", text)
    assert re.search(r"-> +1-8 .*_w1_s64 +sm_80 .*\n +9\+ .*_w4_s64", text)
    larger = kvfold_command("table", "explain", OP, *words[:-1], 9).stdout
    assert re.search(r"\n +1-8 .*_w1_s64 .*\n +-> 9\+ .*_w4_s64", larger)


def test_explain_uses_rows_for_any_gpu_and_shows_the_row_to_add_where_there_is_none(small):
    text = kvfold_command("table", "explain", OP, "head_dim=64", "--arch", "sm_90", "--batch", 1)
    assert "arch any" in text.stdout
    words = ("table", "explain", OP, "head_dim=64", "next_n=3", "--batch", 1)
    lines = kvfold_command(*words, code=2).stderr.splitlines()
    assert len(lines) == 2 and lines[1].startswith("  - {head_dim: 64, compress_ratio: 128")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("kv_dtype=fp16", "--batch", 1), "legal: bf16, fp32"),
        (("--batch", 0), "batch = 0"),
        ((), "--batch is missing; accepted: the number of requests in the step"),
        (("next_n=1,2", "--batch", 1), "next_n has 2 values; accepted: one"),
        (("next_n=4", "next_n=4", "--batch", 1), "next_n is given twice"),
        (("next_n", "--batch", 1), '"next_n" is not of the form FIELD=VALUE'),
        (("reduce_warps=4", "--batch", 1), "reduce_warps is no problem field"),
        (("--backend", "cpu", "--batch", 1), "legal: cuda, triton"),
        (("--arch", "hopper", "--batch", 1), 'arch = "hopper"'),
    ],
)
def test_explain_refuses_in_one_line(small, words, says):
    assert says in refused("table", "explain", OP, *words)
