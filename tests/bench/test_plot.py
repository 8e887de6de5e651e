"""Results files as pictures."""

from dataclasses import replace

import pytest
from reports import KERNELS

from kvfold.bench import plot

pytest.importorskip("matplotlib", reason="no matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures


def test_a_plot_has_a_panel_per_scenario_and_a_line_per_kernel(tmp_path, drawn):
    file = tmp_path / "times.png"
    plot.plot_kernels(KERNELS, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert [panel.get_title() for panel in figure.axes] == ["all-hit", "no-hit"]
    lines = {"table", "table, prefetch state", "limit", "override", "row_by_row"}
    for panel in figure.axes:
        assert set(panel.get_legend_handles_labels()[1]) == lines
        assert panel.get_xscale() == panel.get_yscale() == "log"
    (problem,) = figure.subfigs
    assert "head_dim 512, compress_ratio 128, overlap false" in problem.get_suptitle()
    (legend,) = problem.legends
    assert {text.get_text() for text in legend.get_texts()} == lines
    assert "a GPU, 2026-11-21" in figure.get_suptitle()


def test_each_problem_and_case_has_a_line_of_panels(tmp_path, drawn):
    rows = [row for row in KERNELS.rows if row.scenario == "all-hit"]
    packed = [replace(row, options=row.options | {"layout": "packed"}) for row in rows]
    report = replace(KERNELS, rows=KERNELS.rows + packed)
    plot.plot_kernels(report, tmp_path / "times.svg")
    titles = [part.get_suptitle() for part in drawn[0].subfigs]
    assert ["layout split" in title for title in titles] == [True, False]
    assert [len(part.axes) for part in drawn[0].subfigs] == [2, 1]


@pytest.mark.parametrize("name", ["plot", "plot.xyz"])
def test_a_plot_needs_a_suffix_that_says_the_format(tmp_path, name):
    with pytest.raises(ValueError, match=r"plot .* has no known suffix; accepted: .*png"):
        plot.require(tmp_path / name)
    with pytest.raises(ValueError, match="suffix"):
        plot.plot_kernels(KERNELS, tmp_path / name)


def test_without_matplotlib_a_plot_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'kvfold\[plot\]'"):
        plot.require(tmp_path / "plot.png")
