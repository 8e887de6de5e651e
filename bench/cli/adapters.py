"""kvfold bench adapters: what adapters cost on the host."""

from pathlib import Path

from kvfold.bench import records
from kvfold.bench.adapters import host_cost
from kvfold.bench.cli import common, output
from kvfold.bench.records import AdapterReport

NAME = "adapters"
REPORT = AdapterReport


def run(json_file: Path | None, plot: Path | None) -> None:
    """Measures, prints, and writes the file that is asked for."""
    common.refuse({"--plot": plot}, "adapters has none")
    common.check_writable(json_file)
    device = common.current_gpu()
    if device is None:
        common.refuse({"--json": json_file}, common.NO_GPU)
        print(f"{common.NO_GPU}.")
        return
    with output.progress() as bar:
        task = bar.add_task("making the calls", total=None)
        report = host_cost.measure(device, lambda what: bar.update(task, description=what))
    if json_file is not None:
        records.save(report, json_file)
    show(report, None)


def show(report: AdapterReport, plot: Path | None) -> None:
    """Prints the host time of every call."""
    common.refuse({"--plot": plot}, "adapters has none")
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
