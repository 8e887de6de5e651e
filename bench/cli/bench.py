"""kvfold bench: times an op's kernels against the memory's limit."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text

from kvfold.bench import plot as plotting
from kvfold.bench import records
from kvfold.bench.cli import common, output, steps
from kvfold.bench.cli.common import app, option
from kvfold.bench.cli.words import integers, names, one_value, parse_words
from kvfold.bench.measure import runner
from kvfold.bench.records import KernelReport, KernelRow
from kvfold.codegen import FieldSet, choice, op_spec, op_specs
from kvfold.codegen.fields import check_names
from kvfold.codegen.spec import BACKENDS
from kvfold.workload import Measurement, Workload, workload

OVERRIDE_HELP = (
    "The backend or a tuning field to change: the changed variant is timed in place of the"
    " dispatched one. The table need not hold it. May be repeated. `kvfold table fields OP`"
    " explains the fields."
)
BASELINE_HELP = (
    "Also time the dispatched variant beside an override, the op's yardsticks, and the host's part"
    " of a call."
)


@app.command()
def bench(
    op: common.Op,
    words: common.Words = None,
    sizes: common.Sizes = None,
    scenario: Annotated[
        str | None, option("Scenarios; by default all of the op's.", metavar="LIST")
    ] = None,
    prefetch: common.Prefetch = None,
    override: Annotated[list[str] | None, option(OVERRIDE_HELP, metavar="FIELD=VALUE")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help=BASELINE_HELP)] = False,
    suite: Annotated[
        bool, typer.Option("--suite", help="Measure the op's standard suite.")
    ] = False,
    json_file: common.JsonFile = None,
    plot: common.PlotFile = None,
    source: common.FromFile = None,
) -> None:
    """Time an op's kernels against the memory's limit. Each is checked before it is timed.

    FIELD=VALUE also takes the fields of a case, such as page_size=32,128. OP model-step times the
    three compressors of a pair of layers, one after the other, for 1 and 4 new tokens per request.
    OP transformers times a decode step of a DeepSeek-V4 model of transformers, with and without
    kvfold. OP adapters times the host's part of engines' calls.
    Without a GPU nothing is timed: the op is checked on the CPU, at small sizes.
    """
    if op in steps.STEPS:
        given = {"FIELD=VALUE": words, "--size": sizes, "--scenario": scenario,
                 "--prefetch": prefetch, "--override": override, "--baseline": baseline,
                 "--suite": suite, "--plot": plot}  # fmt: skip
        steps.run(steps.STEPS[op], given, json_file, source)
        return
    check_names([op], [*op_specs(), *steps.STEPS], "op")
    work = workload(op)
    selected = {"FIELD=VALUE": words, f"--{work.spec.axis}": sizes, "--scenario": scenario,
                "--override": override, "--baseline": baseline}  # fmt: skip
    common.check_plot(plot)
    if source is not None:
        others = {"--prefetch": prefetch, "--suite": suite, "--json": json_file}
        common.refuse(selected | others, "--from measures nothing")
        _show(records.load(KernelReport, source), plot)
        return
    common.check_writable(json_file)
    measurements = work.suite
    if suite:
        common.refuse(selected, "--suite measures what the op declares")
    else:
        measurements = [_measurement(work, words, sizes, scenario, override, baseline)]
    plans = [runner.plan(work, one, names(prefetch)) for one in measurements]
    device = common.current_gpu()
    if device is None:
        common.refuse({"--json": json_file, "--plot": plot}, common.NO_GPU)
        _check_on_cpu(work, plans)
        return
    with output.progress() as bar:
        task = bar.add_task("measuring the limit", total=sum(len(one.points) for one in plans))
        report = runner.measure(
            plans, device, lambda point: bar.update(task, description=str(point), advance=1)
        )
    if json_file is not None:
        records.save(report, json_file)
    _show(report, plot)


@dataclass(frozen=True, kw_only=True)
class Backend(FieldSet):
    """What --override takes beside the tuning fields."""

    backend: str = choice(*BACKENDS, help="what compiles and launches the kernel")


def _measurement(
    work: Workload,
    words: Sequence[str] | None,
    sizes: str | None,
    scenario: str | None,
    override: Sequence[str] | None,
    baseline: bool,
) -> Measurement:
    spec, what = work.spec, f"field of {work.spec.name}"
    problem, options = parse_words(
        words, spec.problem, work.options, what=f"problem field or case {what}"
    )
    backend, tuning = parse_words(override, Backend, spec.tuning, what=f"tuning {what}")
    return Measurement(
        problem=problem,
        options=options,
        sizes=integers(f"--{spec.axis}", sizes),
        scenarios=names(scenario),
        override={**one_value(backend), **one_value(tuning)},
        baseline=baseline,
    )


def _check_on_cpu(work: Workload, plans: Sequence[runner.Plan]) -> None:
    """Checks the op at the plans' points, with sizes that a CPU checks in reasonable time."""
    axis, most = work.spec.axis, work.check_size
    print(
        f"{common.NO_GPU}. The op is checked on the CPU instead. Where {axis} is above {most},"
        f" {most} is checked."
    )
    points = dict.fromkeys(
        replace(one, size=min(one.size, most)) for plan in plans for one in plan.points
    )
    checked = runner.check(points, torch.device("cpu"))
    for about, found in groupby(checked, key=lambda one: (one.point.problem, one.point.options)):
        print(f"\n{work.spec.name}: {', '.join(map(str, about))}")
        for one in found:
            rows = output.count(one.rows, "row")
            print(
                f"  {one.point.scenario}, {axis} {one.point.size}: {rows} written, largest error"
                f" {one.largest_error:.1e}"
            )
    counted = output.count(len(points), "point")
    print(f"\nRight at {counted}: each value is exact or within its tolerance.")


# ---- what is shown -------------------------------------------------------------------------------


def _show(report: KernelReport, plot: Path | None) -> None:
    out = output.console(least=110)
    out.print(
        f"{report.device}, {report.date}: reads {report.read_bandwidth_gbs:.0f} GB/s, copies"
        f" {report.copy_bandwidth_gbs:.0f} GB/s, empty graph node {report.empty_node_us:.2f} us",
        soft_wrap=True,
    )
    for view in _times(report.rows):
        out.print(view)
    if line := _host_times(report.rows):
        out.print(line, soft_wrap=True)
    if plot is not None:
        plotting.plot_kernels(report, plot)


def _times(rows: Sequence[KernelRow]) -> Iterator[Text | Table]:
    """One grid per problem, options and scenario. Ratios are to the dispatched variant."""
    plain = {
        (row.panel, row.size): row.median_us
        for row in rows
        if (row.chosen_by, row.prefetch) == ("table", "none")
    }
    for _, panel in groupby(rows, key=lambda row: row.panel):
        found = list(panel)
        first = found[0]
        yield output.heading(f"{first.op}, {first.scenario}: {first.described}")
        left = [op_spec(first.op).axis, "kernel", "chosen\nby", "prefetch"]
        right = ["us", "min", "max", "limit", "effi-\nciency", "MB", "GB/s", "ratio", "host\nus"]
        view = output.grid(left, right, padding=0)
        for row in found:
            base = plain.get((row.panel, row.size))
            view.add_row(
                str(row.size),
                row.tuning,
                row.chosen_by,
                row.prefetch,
                output.bold(f"{row.median_us:.2f}"),
                *(f"{us:.2f}" for us in (row.min_us, row.max_us, row.limit_us)),
                f"{row.efficiency:.0%}",
                f"{row.moved_bytes / 1e6:.2f}",
                f"{row.moved_bytes / (1000 * row.median_us):.0f}",
                "" if base is None else f"{row.median_us / base:.2f}x",
                f"{row.host_us['call']:.1f}" if "call" in row.host_us else "",
            )
        yield view


def _host_times(rows: Iterable[KernelRow]) -> str | None:
    """What an eager call costs the host, by how it is made; None if that was not measured."""
    measured = [row.host_us for row in rows if row.host_us]
    if not measured:
        return None
    kinds = dict.fromkeys(kind for one in measured for kind in one)
    medians = {k: statistics.median(one[k] for one in measured if k in one) for k in kinds}
    text = ", ".join(f"{kind} {us:.1f}" for kind, us in medians.items())
    return f"host us per eager call, median over {output.count(len(measured), 'point')}: {text}"
