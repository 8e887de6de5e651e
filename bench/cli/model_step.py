"""kvfold bench model-step: times the compressors of a pair of layers in one decode step."""

from collections.abc import Callable
from pathlib import Path

import torch

from kvfold.bench import model_step as steps
from kvfold.bench import plot as plotting
from kvfold.bench.cli import common, output
from kvfold.bench.records import ModelStepReport

NAME = "model-step"
REPORT = ModelStepReport
TAKES = frozenset({"--size", "--prefetch", "--plot"})


def without_gpu() -> None:
    """Checks the compressors on the CPU."""
    print(f"{common.NO_GPU}. The compressors are checked on the CPU instead, at batch 4.")
    for next_n in steps.NEXT_N:
        steps.check(next_n, 4, torch.device("cpu"))
    print(f"right: {', '.join(steps.COMPRESSORS)}")


def measure(
    sizes: tuple[int, ...] | None,
    prefetch: str | None,
    device: torch.device,
    started: Callable[[str], None],
) -> ModelStepReport:
    """Measures at batches of these sizes."""
    batches = sizes or steps.BATCHES
    return steps.measure(steps.NEXT_N, batches, prefetch or steps.PREFETCH, device, started)


def show(report: ModelStepReport, plot: Path | None) -> None:
    """Prints what the compressors of a pair of layers cost, and draws it."""
    out = output.console()
    out.print(f"{report.device}, {report.date}", soft_wrap=True)
    out.print(output.heading("The compressors of a pair of layers, us per pair"))
    names = list(report.rows[0].alone_us)
    heads = ["us", "min", "max", "limit", *(f"{name}\nalone" for name in names)]
    view = output.grid(["next_n", "batch", "prefetch"], heads, padding=0)
    for row in report.rows:
        times = [row.min_us, row.max_us, row.limit_us, *row.alone_us.values()]
        view.add_row(
            str(row.next_n),
            str(row.batch),
            row.prefetch,
            output.bold(f"{row.median_us:.2f}"),
            *(f"{us:.2f}" for us in times),
        )
    out.print(view)
    if plot is not None:
        plotting.plot_model_step(report, plot)
