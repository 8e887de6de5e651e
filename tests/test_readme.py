"""The README says what is so: its example runs, its row is a row, its figures are the results'."""

import re
from pathlib import Path

import pytest
import torch

from kvfold.bench import report, step
from kvfold.codegen import load_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", blocks("python"), ids=["a call", "a step"])
def test_the_example_runs(example):
    torch.manual_seed(0)
    namespace = {}
    exec(example, namespace)
    assert namespace["output"].isfinite().all()
    assert namespace["output"].norm() > 0


def test_the_row_to_add_is_what_the_listing_shows(tmp_path):
    added = "\n".join(line[1:] for line in blocks("diff")[0].splitlines() if line.startswith("+"))
    file = tmp_path / "mine.yaml"
    file.write_text(f"version: 1\npaged_kv_compress:\n{added}\n")
    table = load_table(file)
    listing = re.search(r"```\nmine.yaml: 1 rows, (\d+) variants .*fingerprint (\w+)\n", README)
    assert len(table.variants) == int(listing[1])
    assert table.fingerprint == listing[2]


@pytest.mark.parametrize(
    ("line", "scenario", "chosen", "value"),
    [
        ("all-hit: the limit", "all-hit", "table", lambda row: f"{row.limit_us:.1f}"),
        ("all-hit: kvfold", "all-hit", "table", None),
        ("all-hit: kvfold, `prefetch_state`", "all-hit", "table, prefetching", None),
        (
            "the same, efficiency",
            "all-hit",
            "table, prefetching",
            lambda row: f"{100 * row.efficiency:.0f} %",
        ),
        ("all-hit: `reduce_warps=1`", "all-hit", "_w1_", None),
        ("all-hit: one warp, row by row", "all-hit", "row_by_row", None),
        ("spread: kvfold", "spread", "table", None),
        ("spread: kvfold, `prefetch_state`", "spread", "table, prefetching", None),
        ("no-hit: kvfold", "no-hit", "table", None),
        ("no-hit: kvfold, `prefetch_state`", "no-hit", "table, prefetching", None),
    ],
)
def test_the_figures_are_the_results(line, scenario, chosen, value):
    results = report.load(ROOT / "bench/results/h200.json")
    first = results.rows[0]
    wanted = [
        value(row) if value else f"{row.median_us:.1f}"
        for row in results.rows
        if row.scenario == scenario
        and (row.chosen_by == chosen or chosen in row.variant)
        and (row.problem, row.page_size, row.layout) == (first.problem, 32, "split")
        and row.batch in (1, 16, 64, 128, 256, 512)
    ]
    assert len(wanted) == 6
    assert f"| {line} | {' | '.join(wanted)} |" in README


@pytest.mark.parametrize("batch", [16, 256])
def test_the_steps_figures_are_the_results(batch):
    rows = [r for r in step.load(ROOT / "bench/results/h200_step.json").rows if r.batch == batch]
    assert [row.scenario for row in rows] == list(step.WAYS)
    for label, field in (("host", "host_us"), ("step", "median_us"), ("its kernels", "device_us")):
        values = " | ".join(f"{getattr(row, field):.0f}" for row in rows)
        assert f"| batch {batch}: {label} | {values} |" in README
    assert f"{rows[-1].copy_us:.0f}" in README
