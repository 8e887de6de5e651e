"""The results of `kvfold bench` as a picture."""

import textwrap
from pathlib import Path

from kvfold.bench.records import KernelReport, KernelRow, ModelStepReport, TransformersReport
from kvfold.codegen import op_spec

PANEL_INCHES = (4, 4.8)
TITLE_CHARACTERS = 48  # per panel
GROUPS_PER_LINE = 3  # where a group is one panel


def require(file: Path) -> None:
    """Raises ValueError unless a plot can be drawn into `file`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install 'kvfold[plot]'") from None
    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:] not in formats:
        raise ValueError(f"plot {file} has no known suffix; accepted: {', '.join(formats)}")


def plot_kernels(report: KernelReport, file: Path) -> None:
    """Draws times over sizes, and the limit, into a file whose suffix says the format: .png, .svg.

    Each problem and set of options is a group of panels, one panel per scenario.

    Raises:
        ValueError: it cannot be drawn into `file`.
    """
    require(file)
    from matplotlib.figure import Figure

    groups: dict[str, list[KernelRow]] = {}
    for row in report.rows:
        groups.setdefault(f"{row.op}: {row.described}", []).append(row)
    columns = max(len({row.scenario for row in rows}) for rows in groups.values())
    per_line = min(len(groups), GROUPS_PER_LINE) if columns == 1 else 1
    lines = -(-len(groups) // per_line)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns * per_line, height * lines), layout="constrained")
    figure.suptitle(f"{report.device}, {report.date[:10]}")
    parts = figure.subfigures(lines, per_line, squeeze=False).flat
    for part, (title, rows) in zip(parts, groups.items(), strict=False):
        part.suptitle(textwrap.fill(title, TITLE_CHARACTERS * columns), fontsize=10)
        _draw_problem(part, rows, columns)
    figure.savefig(file, dpi=120)


def plot_model_step(report: ModelStepReport, file: Path) -> None:
    """Draws the time of a pair of layers' compressors: a bar per step, parted by their shares.

    Raises:
        ValueError: it cannot be drawn into `file`.
    """
    require(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    figure.suptitle(f"Compressors of a pair of layers: {report.device}, {report.date[:10]}")
    places = range(len(report.rows))
    bottom = [0.0] * len(report.rows)
    for name in report.rows[0].alone_us:
        # The calls overlap, so their times alone add up to more than the whole.
        part = [
            row.median_us * row.alone_us[name] / sum(row.alone_us.values()) for row in report.rows
        ]
        panel.bar(places, part, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, part, strict=True)]
    for place, row in zip(places, report.rows, strict=True):
        panel.text(place, row.median_us, f"{row.median_us:.1f}", ha="center", va="bottom")
    limits = [row.limit_us for row in report.rows]
    panel.plot(places, limits, "k_", markersize=24, label="limit")
    panel.set_xticks(places, [f"next_n {row.next_n}\nbatch {row.batch}" for row in report.rows])
    panel.set_ylabel("microseconds per pair")
    panel.legend()
    figure.savefig(file, dpi=120)


def plot_transformers(report: TransformersReport, file: Path) -> None:
    """Draws the time of a decode step of a model: a group of bars per batch and context.

    Raises:
        ValueError: it cannot be drawn into `file`.
    """
    require(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    panel = figure.subplots()
    figure.suptitle(
        f"A decode step of 4 layers of DeepSeek-V4: {report.device}, {report.date[:10]}"
    )
    names = list(report.rows[0].step_ms)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [
            place + (number - (len(names) - 1) / 2) * width for place in range(len(report.rows))
        ]
        times = [row.step_ms[name] for row in report.rows]
        bars = panel.bar(places, times, width, label=name)
        panel.bar_label(bars, [f"{ms:.1f}" for ms in times], fontsize=7)
    labels = [f"batch {row.batch}\ncontext {row.context // 1024}k" for row in report.rows]
    panel.set_xticks(range(len(labels)), labels)
    panel.set_yscale("log")
    panel.set_ylabel("milliseconds per step")
    panel.legend()
    figure.savefig(file, dpi=120)


def _draw_problem(part, rows: list[KernelRow], columns: int) -> None:
    from matplotlib.ticker import LogLocator

    scenarios = list(dict.fromkeys(row.scenario for row in rows))
    panels = part.subplots(1, columns, sharey=True, squeeze=False)[0]
    for panel in panels[len(scenarios) :]:
        panel.remove()
    for panel, scenario in zip(panels, scenarios, strict=False):
        _draw(panel, [row for row in rows if row.scenario == scenario])
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.set_title(scenario)
        panel.set_xlabel(op_spec(rows[0].op).axis)
    panels[0].set_ylabel("microseconds per call")
    part.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _draw(panel, rows: list[KernelRow]) -> None:
    lines: dict[str, list[KernelRow]] = {}
    for row in rows:
        lines.setdefault(_label(row), []).append(row)
    for name, line in lines.items():
        line.sort(key=lambda row: row.size)
        sizes = [row.size for row in line]
        median = [row.median_us for row in line]
        spread = [
            [row.median_us - row.min_us for row in line],
            [row.max_us - row.median_us for row in line],
        ]
        style = "o-" if line[0].chosen_by == "table" else "s--"
        panel.errorbar(sizes, median, yerr=spread, fmt=style, markersize=4, capsize=2, label=name)
    limit = sorted({row.size: row.limit_us for row in rows}.items())
    panel.plot(*zip(*limit, strict=True), color="black", linewidth=1, label="limit")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks([size for size, _ in limit], [str(size) for size, _ in limit])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.grid(True, which="both", alpha=0.3)


def _label(row: KernelRow) -> str:
    """Names a row's line."""
    words = [row.chosen_by if row.chosen_by != "yardstick" else row.variant]
    words += [row.backend] if row.backend != "cuda" else []
    words += [f"prefetch {row.prefetch}"] if row.prefetch != "none" else []
    return ", ".join(words)
