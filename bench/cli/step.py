"""kvfold step: times a whole decode step."""

from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.table import Table as RichTable

from kvfold.bench import plot as plotting
from kvfold.bench import records
from kvfold.bench.cli.common import (
    FromFile,
    JsonFile,
    PlotFile,
    app,
    bold,
    check_writable,
    clear_errors,
    console,
    current_gpu,
    grid,
    integers,
    progress,
    refuse_with_from,
    refuse_without_gpu,
)
from kvfold.bench.records import StepReport, StepRow
from kvfold.bench.step.measure import BATCHES, measure
from kvfold.bench.step.model import Shape, trace
from kvfold.bench.step.modes import MODES, check


@app.command("step")
@clear_errors
def step_command(
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Batch sizes; by default {','.join(map(str, BATCHES))}.",
            show_default=False,
        ),
    ] = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    source: FromFile = None,
) -> None:
    """Time a whole decode step, uploads of metadata included, in four modes.

    The step has 61 layers, each a projection and its compressor. The modes: a pageable copy per
    array, a staging pool, one CUDA graph, and one graph with the layers' states in host memory.

    First all modes are checked to give the same bits. Without a GPU only a small model is checked.
    """
    if plot is not None:
        plotting.require(plot)
        check_writable(plot, "--plot")
    if source is not None:
        refuse_with_from({"--batch": batch, "--json": json_file})
        _show(records.load(StepReport, source), plot)
        return
    batches = BATCHES if batch is None else integers("--batch", batch)
    check_writable(json_file, "--json")
    device = current_gpu()
    if device is None:
        refuse_without_gpu({"--json": json_file, "--plot": plot})
        print("No CUDA GPU is here, so nothing is timed. The modes are checked on the CPU instead.")
        shape = Shape((128, 4, 128, 4), batch=4, hidden=64, head_dim=128)
        check(shape, torch.device("cpu"), trace(shape, 100), 100)
        print(f"100 steps of 4 layers: the same bits in {', '.join(MODES)}")
        return
    with progress() as bar:
        each = 1 + len(MODES)  # a check, then the modes; their profiles come last
        task = bar.add_task("", total=len(batches) * each + 1)
        report = measure(
            batches, device, lambda what: bar.update(task, description=what, advance=1)
        )
    if json_file is not None:
        records.save(report, json_file)
    _show(report, plot)


def _show(report: StepReport, plot) -> None:
    out = console()
    out.print(f"{report.device}, {report.date}", soft_wrap=True)
    out.print(_times(report.rows))
    if plot is not None:
        plotting.plot_steps(report, plot)


def _times(rows: Sequence[StepRow]) -> RichTable:
    """What a decode step costs in each mode."""
    numbers = ["us", "min", "max", "host us", "kernels us", "copies us", "synchro-\nnisations"]
    problem = ", ".join(f"{name} {value}" for name, value in rows[0].problem.items())
    view = grid(f"One decode step: {problem}", ["batch", "mode"], numbers)
    view.padding = (0, 1)
    for row in rows:
        view.add_row(
            str(row.batch),
            row.mode,
            bold(f"{row.median_us:.0f}"),
            f"{row.min_us:.0f}",
            f"{row.max_us:.0f}",
            f"{row.host_us:.0f}",
            f"{row.device_us:.0f}",
            "" if row.copy_us is None else f"{row.copy_us:.0f}",
            str(row.synchronisations),
        )
    return view
