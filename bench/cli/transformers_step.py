"""kvfold bench transformers: times a decode step of a DeepSeek-V4 model of transformers."""

from pathlib import Path

from kvfold.bench import plot as plotting
from kvfold.bench import records
from kvfold.bench import transformers_step as steps
from kvfold.bench.cli import common, output
from kvfold.bench.records import TransformersReport

NAME = "transformers"
REPORT = TransformersReport


def run(batches: tuple[int, ...] | None, json_file: Path | None, plot: Path | None) -> None:
    """Measures, prints, and writes the files that are asked for."""
    common.check_writable(json_file)
    common.check_plot(plot)
    steps.require()
    device = common.current_gpu()
    if device is None:
        common.refuse({"--json": json_file, "--plot": plot}, common.NO_GPU)
        print(f"{common.NO_GPU}. examples/generate.py compares the models on the CPU.")
        return
    batches = batches or steps.BATCHES
    with output.progress() as bar:
        task = bar.add_task("", total=1 + len(batches) * len(steps.CONTEXTS))
        report = steps.measure(
            batches,
            steps.CONTEXTS,
            device,
            lambda what: bar.update(task, description=what, advance=1),
        )
    if json_file is not None:
        records.save(report, json_file)
    show(report, plot)


def show(report: TransformersReport, plot: Path | None) -> None:
    """Prints the time of a step, and draws it."""
    out = output.console()
    out.print(f"{report.device}, {report.date}", soft_wrap=True)
    out.print(output.heading("A decode step of 4 layers, ms"))
    names = list(report.rows[0].step_ms)
    inside = list(report.rows[0].compressors_ms)
    heads = [*names, *(f"compressors,\n{name}" for name in inside)]
    view = output.grid(["batch", "context"], heads, padding=1)
    for row in report.rows:
        times = [*row.step_ms.values(), *row.compressors_ms.values()]
        view.add_row(str(row.batch), str(row.context), *(f"{ms:.2f}" for ms in times))
    out.print(view)
    if plot is not None:
        plotting.plot_transformers(report, plot)
