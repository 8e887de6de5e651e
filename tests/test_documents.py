"""Documents: examples run, tables are those of the code and the results, links exist."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from kvfold.bench.cli.table import counts
from kvfold.codegen import load_table, op_specs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import tables  # noqa: E402  docs/tables.py

README = (ROOT / "README.md").read_text()
OPS = list(op_specs())
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", blocks("python"), ids=["a call", "a step"])
def test_an_example_of_the_readme_runs(example):
    torch.manual_seed(0)
    namespace = {}
    exec(example, namespace)
    assert namespace["output"].isfinite().all()
    assert namespace["output"].norm() > 0


def test_the_row_to_add_is_the_one_whose_check_is_shown(tmp_path):
    added = "\n".join(line[1:] for line in blocks("diff")[0].splitlines() if line.startswith("+"))
    file = tmp_path / "mine.yaml"
    file.write_text(f"version: 1\npaged_kv_compress:\n{added}\n")
    assert f"mine.yaml: OK: {counts(load_table(file))}\n" in README


# ---- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_the_tables_of_a_document_are_what_they_are_made_from(name):
    text = (ROOT / name).read_text()
    assert tables.rewritten(text) == text, "run `make docs`"
    assert text.count("<!-- end -->") == len(re.findall(r"<!-- (?!end)[\w.: -]+ -->", text))


def test_every_document_with_such_tables_is_rewritten():
    with_tables = {
        str(page.relative_to(ROOT)) for page in PAGES if "<!-- end -->" in page.read_text()
    }
    assert with_tables == set(tables.DOCUMENTS)


def test_every_table_that_can_be_made_is_in_a_document():
    texts = [(ROOT / name).read_text() for name in tables.DOCUMENTS]
    used = {name for text in texts for name in re.findall(r"<!-- (?!end)([\w.:-]+)", text)}
    assert used == set(tables.BLOCKS)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A function that puts changed results of paged_kv_compress in the place of the committed."""
    committed = json.loads((tables.RESULTS / f"{tables.DECODE}.json").read_text())

    def put(change) -> tables.Results:
        rows = [change(row) for row in committed["rows"]]
        file = tmp_path / f"{tables.DECODE}.json"
        file.write_text(json.dumps(committed | {"rows": [row for row in rows if row]}))
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        return tables.Results.of(tables.DECODE)

    return put


def test_a_table_finds_rows_from_before_a_field_had_its_default(results):
    def older(row):
        problem = {k: v for k, v in row["problem"].items() if k != "ape_in_state"}
        options = {k: v for k, v in row["options"].items() if k != "max_pages"}
        return row | {"problem": problem, "options": options}

    found = results(older).chosen("all-hit")
    assert set(tables.SIZES) <= set(found)
    assert all(
        row.problem["ape_in_state"] and not row.options["max_pages"] for row in found.values()
    )


def test_a_table_shows_the_rows_of_its_own_problem_only(results):
    def other(row):
        return row | {"problem": row["problem"] | {"ape_in_state": False}}

    changed = results(other)
    assert not changed.chosen("all-hit")
    assert changed.chosen("all-hit", {"ape_in_state": False})


def test_a_point_without_a_result_is_an_empty_cell(results):
    results(lambda row: row if row["size"] != 64 else None)
    (line,) = [one for one in tables.speed().splitlines() if one.startswith("| all-hit: kvfold |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert [bool(cell) for cell in cells] == [size != 64 for size in tables.SIZES]


def test_the_arguments_that_another_op_has_too_are_left_out():
    text = tables.arguments(tables.PREFILL, tables.DECODE)
    names = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert names == ["write_state", "max_rollback", "state_period"]
    assert '`write_state` = "all" |  | "all", "tail" |' in text


# ---- ops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_in_the_readme_the_fields_and_the_makefile(op):
    assert re.search(rf"^\| `kvfold\.{op}` \|", README, re.MULTILINE)
    assert f"<!-- arguments {op}" in README
    assert f"## {op}\n\n<!-- fields {op} -->" in (ROOT / "docs" / "fields.md").read_text()
    (listed,) = re.findall(r"^OPS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert op in listed.split()


@pytest.mark.parametrize("op", OPS)
def test_every_argument_of_an_op_is_in_the_readme(op):
    for one in op_specs()[op].arguments.declared():
        assert re.search(rf"^\| `{one.name}`", README, re.MULTILINE), one.name


def test_the_pages_about_the_kernels_name_every_header_and_no_other():
    pages = [(ROOT / "docs" / name).read_text() for name in ("kernel.md", "prefill.md", "cache.md")]
    named = {name for page in pages for name in re.findall(r"`([\w/]*\w+\.cuh)`", page)}
    headers = {
        str(file.relative_to(ROOT / "kernels")) for file in (ROOT / "kernels").rglob("*.cuh")
    }
    for name in named:
        assert any(header.endswith(name) for header in headers), name
    for header in headers:
        assert {header, header.rpartition("/")[2]} & named, header


def test_every_cache_format_has_a_section_with_its_page():
    text = (ROOT / "docs" / "formats.md").read_text()
    names = list(load_table().formats)
    assert re.findall("^### (.*)$", text, re.MULTILINE) == names
    assert re.findall("<!-- format (.*) -->", text) == names


# ---- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_document_exist(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    for target in targets:
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
