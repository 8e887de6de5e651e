"""A results file as a picture: time over batch size and the limit, per problem and scenario."""

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
    """Draws a report into a file; its suffix says the format: .png, .svg, .pdf.

    Each problem, page size, pool layout and L2 state is a line of panels, one per scenario.

    Raises:
        ValueError: the report has no rows, or the plot cannot be drawn into `file`.
    """
    require(file)
    from matplotlib.figure import Figure

    if not report.rows:
        raise ValueError("the report has no rows to plot")
    groups: dict[str, list[Row]] = {}
    for row in report.rows:
        problem = ", ".join(f"{name} {value}" for name, value in row.problem.items())
        place = f"page_size {row.page_size}, {row.layout} pool, {row.l2} L2"
        groups.setdefault(f"{problem}; {place}", []).append(row)
    columns = max(2, *(len({row.scenario for row in rows}) for rows in groups.values()))
    figure = Figure(figsize=(4 * columns, 4.8 * len(groups)), layout="constrained")
    figure.suptitle(f"{report.rows[0].op} on {report.device}, {report.date[:10]}")
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for part, (title, rows) in zip(parts, groups.items(), strict=True):
        part.suptitle(title, fontsize=10)
        _draw_problem(part, rows, columns)
    figure.savefig(file, dpi=120)


def _draw_problem(part, rows: list[Row], columns: int) -> None:
    from matplotlib.ticker import LogLocator

    scenarios = list(dict.fromkeys(row.scenario for row in rows))
    panels = part.subplots(1, columns, sharey=True)
    for panel in panels[len(scenarios) :]:
        panel.remove()
    for panel, scenario in zip(panels, scenarios, strict=False):
        _draw(panel, [row for row in rows if row.scenario == scenario])
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.set_title(scenario)
        panel.set_xlabel("batch")
    panels[0].set_ylabel("microseconds per call")
    part.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


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


def _labels(rows: list[Row]) -> Callable[[Row], str]:
    """Names a row's line: what chose it, and the tunings it has over the batch axis."""

    def chosen(row: Row) -> str:
        by = row.chosen_by.replace("table", "dispatched")
        return f"{by}, triton" if row.backend == "triton" else by

    tunings: dict[str, list[str]] = {}
    for row in rows:
        tunings.setdefault(chosen(row), []).append(row.tuning)
    return lambda row: f"{chosen(row)} ({', '.join(dict.fromkeys(tunings[chosen(row)]))})"
