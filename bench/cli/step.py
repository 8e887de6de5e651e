"""kvfold step: times a whole decode step."""

from typing import Annotated

import torch

from kvfold.bench import records
from kvfold.bench.cli import common, output
from kvfold.bench.cli.common import app, option
from kvfold.bench.cli.words import integers
from kvfold.bench.records import StepReport
from kvfold.bench.step.measure import BATCHES, measure
from kvfold.bench.step.model import Shape, trace
from kvfold.bench.step.modes import MODES, check

BATCHES_HELP = f"Batch sizes; by default {','.join(map(str, BATCHES))}."


@app.command("step")
def step_command(
    batch: Annotated[str | None, option(BATCHES_HELP, metavar="LIST")] = None,
    json_file: common.JsonFile = None,
    source: common.FromFile = None,
) -> None:
    """Time a whole decode step, uploads of metadata included, in four modes.

    The step has 61 layers, each a projection and its compressor. The modes: a pageable copy per
    array, a staging pool, one CUDA graph, and one graph with the layers' states in host memory.

    First all modes are checked to give the same bits. Without a GPU only a small model is checked.
    """
    if source is not None:
        common.refuse({"--batch": batch, "--json": json_file}, "--from measures nothing")
        _show(records.load(StepReport, source))
        return
    batches = integers("--batch", batch) or BATCHES
    common.check_writable(json_file)
    device = common.current_gpu()
    if device is None:
        common.refuse({"--json": json_file}, common.NO_GPU)
        print(f"{common.NO_GPU}. The modes are checked on the CPU instead.")
        shape = Shape((128, 4, 128, 4), batch=4, hidden=64, head_dim=128)
        check(shape, torch.device("cpu"), trace(shape, 100), 100)
        print(f"100 steps of 4 layers: the same bits in {', '.join(MODES)}")
        return
    with output.progress() as bar:
        each = 1 + len(MODES)  # a check, then the modes; their profiles come last
        task = bar.add_task("", total=len(batches) * each + 1)
        report = measure(
            batches, device, lambda what: bar.update(task, description=what, advance=1)
        )
    if json_file is not None:
        records.save(report, json_file)
    _show(report)


def _show(report: StepReport) -> None:
    """Prints what a decode step costs in each mode."""
    out = output.console()
    out.print(f"{report.device}, {report.date}", soft_wrap=True)
    problem = ", ".join(f"{name} {value}" for name, value in report.rows[0].problem.items())
    out.print(output.heading(f"One decode step: {problem}"))
    numbers = ["us", "min", "max", "host\nus", "kernels\nus", "copies\nus", "synchro-\nnisations"]
    view = output.grid(["batch", "mode"], numbers, padding=0)
    for row in report.rows:
        times = [row.min_us, row.max_us, row.host_us, row.device_us, row.copy_us]
        view.add_row(
            str(row.batch),
            row.mode,
            output.bold(f"{row.median_us:.0f}"),
            *("" if us is None else f"{us:.0f}" for us in times),
            str(row.synchronisations),
        )
    out.print(view)
