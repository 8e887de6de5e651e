"""Results files: the schema, a safe write, the plot."""

import json
import subprocess
from dataclasses import replace

import pytest

from kvfold.bench import plot, report
from kvfold.bench.report import Report, Row

PROBLEM = {
    "head_dim": 512,
    "compress_ratio": 128,
    "overlap": False,
    "kv_dtype": "bf16",
    "state_dtype": "fp32",
    "next_n": 4,
}


def row(scenario: str, batch: int, median: float, tuning: str, host: float | None) -> Row:
    return Row(
        op="paged_kv_compress",
        scenario=scenario,
        problem=PROBLEM,
        batch=batch,
        page_size=32,
        layout="split",
        l2="cold",
        backend="cuda",
        variant=f"paged_kv_compress_hd512_r128_bf16_fp32_n4_{tuning}",
        prefetch_state=False,
        median_us=median,
        min_us=0.9 * median,
        max_us=1.2 * median,
        bytes=1 << 20,
        limit_us=0.5 * median,
        efficiency=0.5,
        host_us=host,
    )


@pytest.fixture
def synthetic() -> Report:
    rows = []
    for scenario in ("all-hit", "no-hit"):
        for batch in (1, 16, 128):
            rows.append(row(scenario, batch, 2 + batch / 7, "w8_s64", 17.123456789))
            rows.append(row(scenario, batch, 20 + batch / 3, "w1_s64", None))
            early = row(scenario, batch, 1 + batch / 7, "w8_s64", 16.0)
            rows.append(replace(early, prefetch_state=True))
            other = row(scenario, batch, 60 + batch / 3, "", None)
            rows.append(replace(other, variant="row_by_row"))
    return Report(
        device="NVIDIA H200",
        driver="580.1",
        versions={"kvfold": "0.1.0", "cupy": None},
        date="2026-11-21T09:00:00+00:00",
        commit="0123abc-dirty",
        config_fingerprint="0123456789abcdef",
        read_bandwidth_gbs=4700.0,
        copy_bandwidth_gbs=4260.0,
        empty_node_us=0.52,
        rows=rows,
    )


def test_a_results_file_has_the_documented_fields_and_comes_back(tmp_path, synthetic):
    file = tmp_path / "h200.json"
    report.save(synthetic, file)
    content = json.loads(file.read_text())
    assert list(content) == [
        "device",
        "driver",
        "versions",
        "date",
        "commit",
        "config_fingerprint",
        "read_bandwidth_gbs",
        "copy_bandwidth_gbs",
        "empty_node_us",
        "rows",
    ]
    assert list(content["rows"][0]) == [
        "op",
        "scenario",
        "problem",
        "batch",
        "page_size",
        "layout",
        "l2",
        "backend",
        "variant",
        "prefetch_state",
        "median_us",
        "min_us",
        "max_us",
        "bytes",
        "limit_us",
        "efficiency",
        "host_us",
        "host_torch_ops_us",
        "host_triton_us",
    ]
    assert content["rows"][0]["problem"] == PROBLEM
    assert content["rows"][0]["host_us"] == 17.1235
    assert content["rows"][1]["host_us"] is None
    again = report.load(file)
    assert [r.variant for r in again.rows] == [r.variant for r in synthetic.rows]
    report.save(again, tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == file.read_bytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, synthetic, monkeypatch):
    file = tmp_path / "h200.json"
    file.write_text("old")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        report.save(synthetic, file)
    assert file.read_text() == "old"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"op": 1}]}', '{"rows": []}'])
def test_what_is_no_results_file_is_refused_by_name(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is no results file"):
        report.load(file)


def test_commit_is_the_environments_or_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFOLD_COMMIT", "abc")
    assert report.commit() == "abc"
    monkeypatch.delenv("KVFOLD_COMMIT")
    monkeypatch.setattr(report, "ROOT", tmp_path / "inside")
    report.ROOT.mkdir()
    assert report.commit() is None  # no checkout

    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.com"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    git("init", "-q")
    git("commit", "--allow-empty", "-qm", "first")
    assert report.commit() is None  # another project's
    monkeypatch.setattr(report, "ROOT", tmp_path)
    clean = report.commit()
    assert len(clean) == 40
    (tmp_path / "new").write_text("")
    assert report.commit() == f"{clean}-dirty"


def test_a_plot_has_a_panel_per_scenario_and_a_line_per_kernel(tmp_path, synthetic, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    file = tmp_path / "h200.png"
    plot.plot(synthetic, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert [panel.get_title() for panel in figure.axes] == ["all-hit", "no-hit"]
    for panel in figure.axes:
        lines = {
            "dispatched (w8_s64)",
            "dispatched, prefetching (w8_s64)",
            "limit",
            "override (w1_s64)",
            "yardstick (row_by_row)",
        }
        assert set(panel.get_legend_handles_labels()[1]) == lines
        assert panel.get_xscale() == panel.get_yscale() == "log"
    (problem,) = figure.subfigs
    (legend,) = problem.legends
    assert {text.get_text() for text in legend.get_texts()} == lines
    assert "NVIDIA H200, 2026-11-21" in figure.get_suptitle()

    packed = [replace(row, layout="packed") for row in synthetic.rows if row.scenario == "all-hit"]
    plot.plot(replace(synthetic, rows=synthetic.rows + packed), file)
    titles = [part.get_suptitle() for part in drawn[1].subfigs]
    assert ["split" in title for title in titles] == [True, False]
    assert [len(part.axes) for part in drawn[1].subfigs] == [2, 1]


@pytest.mark.parametrize("name", ["plot", "plot.xyz", "missing/plot.png"])
def test_a_plot_that_cannot_be_drawn_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="plot"):
        plot.require(tmp_path / name)
