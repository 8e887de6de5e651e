"""kvfold bench adapters: what adapters cost on the host."""

from collections.abc import Callable
from pathlib import Path

import torch

from kvfold.bench.adapters import host_cost
from kvfold.bench.cli import common, output
from kvfold.bench.records import AdapterReport

NAME = "adapters"
REPORT = AdapterReport
TAKES: frozenset[str] = frozenset()


def without_gpu() -> None:
    """Says that nothing is done."""
    print(f"{common.NO_GPU}.")


def measure(
    sizes: tuple[int, ...] | None,
    prefetch: str | None,
    device: torch.device,
    started: Callable[[str], None],
) -> AdapterReport:
    """Measures the calls of all adapters."""
    return host_cost.measure(device, started)


def show(report: AdapterReport, plot: Path | None) -> None:
    """Prints the host time of every call."""
    out = output.console()
    out.print(f"{report.device}, {report.date}", soft_wrap=True)
    out.print(output.heading("Host time of a call, us"))
    view = output.grid(["engine", "call"], ["adapter", "bare ops", "difference"], padding=1)
    for row in report.rows:
        difference = row.adapter_us - row.ops_us
        view.add_row(
            row.engine,
            row.call,
            f"{row.adapter_us:.1f}",
            f"{row.ops_us:.1f}",
            output.bold(f"{difference:.1f}"),
        )
    out.print(view)
