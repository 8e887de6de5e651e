"""kvfold bench transformers: times a decode step of a DeepSeek-V4 model of transformers."""

from collections.abc import Callable
from pathlib import Path

import torch

from kvfold.bench import plot as plotting
from kvfold.bench import transformers_step as steps
from kvfold.bench.cli import common, output
from kvfold.bench.records import TransformersReport

NAME = "transformers"
REPORT = TransformersReport
TAKES = frozenset({"--size", "--plot"})


def without_gpu() -> None:
    """Says where the models are compared on the CPU."""
    print(f"{common.NO_GPU}. examples/generate.py compares the models on the CPU.")


def measure(
    sizes: tuple[int, ...] | None,
    prefetch: str | None,
    device: torch.device,
    started: Callable[[str], None],
) -> TransformersReport:
    """Measures at batches of these sizes."""
    steps.require()
    return steps.measure(sizes or steps.BATCHES, steps.CONTEXTS, device, started)


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
