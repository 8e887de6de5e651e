"""kvfold step: times a whole decode step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from rich.table import Table as RichTable

from kvfold.bench import plot as plotting
from kvfold.bench import records
from kvfold.bench.cli import common
from kvfold.bench.cli.common import app, clear_errors, option
from kvfold.bench.records import StepReport, StepRow
from kvfold.bench.step.measure import BATCHES, measure
from kvfold.bench.step.model import Shape, trace
from kvfold.bench.step.modes import MODES, check

BATCHES_HELP = f"Batch sizes; by default {','.join(map(str, BATCHES))}."


@app.command("step")
@clear_errors
def step_command(
    batch: Annotated[str | None, option(BATCHES_HELP, "--batch", metavar="LIST")] = None,
    json_file: common.JsonFile = None,
    plot: common.PlotFile = None,
    source: common.FromFile = None,
) -> None:
    """Time a whole decode step, uploads of metadata included, in four modes.

    The step has 61 layers, each a projection and its compressor. The modes: a pageable copy per
    array, a staging pool, one CUDA graph, and one graph with the layers' states in host memory.

    First all modes are checked to give the same bits. Without a GPU only a small model is checked.
    """
    common.check_plot(plot)
    if source is not None:
        common.refuse({"--batch": batch, "--json": json_file}, "--from measures nothing")
        _show(records.load(StepReport, source), plot)
        return
    batches = BATCHES if batch is None else common.integers("--batch", batch)
    common.check_writable(json_file, "--json")
    device = common.current_gpu()
    if device is None:
        common.refuse({"--json": json_file, "--plot": plot}, common.NO_GPU)
        print(f"{common.NO_GPU}. The modes are checked on the CPU instead.")
        shape = Shape((128, 4, 128, 4), batch=4, hidden=64, head_dim=128)
        check(shape, torch.device("cpu"), trace(shape, 100), 100)
        print(f"100 steps of 4 layers: the same bits in {', '.join(MODES)}")
        return
    with common.progress() as bar:
        each = 1 + len(MODES)  # a check, then the modes; their profiles come last
        task = bar.add_task("", total=len(batches) * each + 1)
        report = measure(
            batches, device, lambda what: bar.update(task, description=what, advance=1)
        )
    if json_file is not None:
        records.save(report, json_file)
    _show(report, plot)


def _show(report: StepReport, plot: Path | None) -> None:
    out = common.console()
    out.print(f"{report.device}, {report.date}", soft_wrap=True)
    problem = ", ".join(f"{name} {value}" for name, value in report.rows[0].problem.items())
    out.print(common.heading(f"One decode step: {problem}"))
    out.print(_times(report.rows))
    if plot is not None:
        plotting.plot_steps(report, plot)


def _times(rows: Sequence[StepRow]) -> RichTable:
    """What a decode step costs in each mode."""
    numbers = ["us", "min", "max", "host\nus", "kernels\nus", "copies\nus", "synchro-\nnisations"]
    view = common.grid(["batch", "mode"], numbers, padding=0)
    for row in rows:
        times = [row.min_us, row.max_us, row.host_us, row.device_us, row.copy_us]
        view.add_row(
            str(row.batch),
            row.mode,
            common.bold(f"{row.median_us:.0f}"),
            *("" if us is None else f"{us:.0f}" for us in times),
            str(row.synchronisations),
        )
    return view
