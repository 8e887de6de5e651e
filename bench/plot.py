"""A results file as a picture: time over batch size, one panel per scenario, against the limit."""

from collections.abc import Callable
from pathlib import Path

from kvfold.bench.report import Report, Row


def require(file: Path) -> None:
    """Raises ValueError unless a plot can be drawn into `file`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install 'kvfold[plot]'") from None
    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:] not in formats:
        raise ValueError(f"plot {file} has no known suffix; accepted: {', '.join(formats)}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"plot {file}: {file.parent} is no directory")


def plot(report: Report, file: Path) -> None:
    """Draws a report's first problem into a file; its suffix says the format: .png, .svg, .pdf.

    Raises:
        ValueError: the report has no rows, or the plot cannot be drawn into `file`.
    """
    require(file)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    if not report.rows:
        raise ValueError("the report has no rows to plot")
    first = report.rows[0]
    rows = [row for row in report.rows if row.problem == first.problem and row.l2 == first.l2]
    scenarios = list(dict.fromkeys(row.scenario for row in rows))
    figure = Figure(figsize=(4.6 * len(scenarios), 4.4), layout="constrained")
    panels = figure.subplots(1, len(scenarios), sharey=True, squeeze=False)[0]
    for panel, scenario in zip(panels, scenarios, strict=True):
        _draw(panel, [row for row in rows if row.scenario == scenario])
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.set_title(scenario)
        panel.set_xlabel("batch")
    panels[0].set_ylabel("microseconds per call")
    problem = ", ".join(f"{name} {value}" for name, value in first.problem.items())
    title = f"{first.op} on {report.device}, {report.date[:10]}"
    figure.suptitle(f"{title}\n{problem}; {first.l2} L2", fontsize=10)
    figure.savefig(file, dpi=150)


def _draw(panel, rows: list[Row]) -> None:
    lines: dict[str, list[Row]] = {}
    label = _labels(rows)
    for row in rows:
        lines.setdefault(label(row), []).append(row)
    for name, line in lines.items():
        line.sort(key=lambda row: row.batch)
        batches = [row.batch for row in line]
        median = [row.median_us for row in line]
        spread = [
            [row.median_us - row.min_us for row in line],
            [row.max_us - row.median_us for row in line],
        ]
        style = "o-" if line[0].dispatched else "s--"
        panel.errorbar(batches, median, yerr=spread, fmt=style, markersize=4, capsize=2, label=name)
    limit = sorted({row.batch: row.limit_us for row in rows}.items())
    panel.plot(*zip(*limit, strict=True), color="black", linewidth=1, label="limit")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks([batch for batch, _ in limit], [str(batch) for batch, _ in limit])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.grid(True, which="both", alpha=0.3)
    panel.legend(fontsize=8)


def _labels(rows: list[Row]) -> Callable[[Row], str]:
    """Names a row's line: what chose it, its tuning, and its page size and layout if they vary."""
    places = {(row.page_size, row.layout) for row in rows}
    tunings: dict[str, list[str]] = {}
    for row in rows:
        tunings.setdefault(row.chosen_by, []).append(row.tuning)

    def label(row: Row) -> str:
        chosen = row.chosen_by.replace("table", "dispatched")
        tuning = ", ".join(dict.fromkeys(tunings[row.chosen_by]))
        place = f", page {row.page_size} {row.layout}" if len(places) > 1 else ""
        return f"{chosen} ({tuning}){place}"

    return label
