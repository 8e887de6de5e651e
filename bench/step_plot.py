"""What a decode step costs on each way, as a picture: host time, step time, the kernels' time."""

from pathlib import Path

from kvfold.bench.plot import require
from kvfold.bench.step import WAYS, StepReport


def plot(report: StepReport, file: Path) -> None:
    """Draws a report into a file; its suffix says the format.

    Raises:
        ValueError: it cannot be drawn into `file`.
    """
    require(file)
    from matplotlib.figure import Figure

    batches = sorted({row.batch for row in report.rows})
    figure = Figure(figsize=(5 * len(batches), 4), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        rows = {row.scenario: row for row in report.rows if row.batch == batch}
        names = [name for name in WAYS if name in rows]
        for offset, field, label in (
            (-0.27, "host_us", "host time"),
            (0.0, "median_us", "step time"),
            (0.27, "device_us", "kernels' time"),
        ):
            places = [number + offset for number in range(len(names))]
            values = [getattr(rows[name], field) for name in names]
            bars = panel.bar(places, values, width=0.25, label=label)
            panel.bar_label(bars, fmt="{:.0f}", fontsize=7)
        panel.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
        panel.set_yscale("log")
        panel.set_title(f"batch {batch}")
    panels[0].set_ylabel("microseconds per step")
    panels[-1].legend(fontsize=8)
    problem = ", ".join(f"{name} {value}" for name, value in report.rows[0].problem.items())
    figure.suptitle(
        f"One decode step on {report.device}, {report.date[:10]}\n{problem}", fontsize=10
    )
    figure.savefig(file, dpi=120)
