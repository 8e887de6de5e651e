"""Documents: examples run, tables are those of the code and the results, links exist."""

import re
import sys
from pathlib import Path

import pytest
import torch

from kvfold.bench.cli.table import counts
from kvfold.codegen import load_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import tables  # noqa: E402  docs/tables.py

README = (ROOT / "README.md").read_text()
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_document_exist(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    for target in targets:
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
