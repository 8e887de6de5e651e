"""kvfold bench: times an op's kernels against the memory's limit."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table as RichTable

from kvfold.bench import plot as plotting
from kvfold.bench import records
from kvfold.bench.cli.common import (
    FromFile,
    JsonFile,
    Op,
    PlotFile,
    PrefetchModes,
    Scenarios,
    Sizes,
    Words,
    app,
    bold,
    check_writable,
    clear_errors,
    console,
    count,
    current_gpu,
    grid,
    integers,
    names,
    one_value,
    parse_words,
    progress,
    refuse_with_from,
    refuse_without_gpu,
)
from kvfold.bench.measure import runner
from kvfold.bench.measure.runner import Checked, Plan
from kvfold.bench.records import KernelReport, KernelRow
from kvfold.codegen import FieldSet, choice, op_spec
from kvfold.codegen.spec import BACKENDS
from kvfold.workload import Measurement, Workload, workload


@app.command()
@clear_errors
def bench(
    op: Op,
    words: Words = None,
    sizes: Sizes = None,
    scenario: Scenarios = None,
    prefetch: PrefetchModes = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="The backend or a tuning field to change: the changed variant is timed in place of"
            " the dispatched one. The table need not hold it. May be repeated. `kvfold table fields"
            " OP` explains the fields.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline",
            help="Also time the dispatched variant beside an override, the op's yardsticks, and the"
            " host's part of a call.",
        ),
    ] = False,
    suite: Annotated[
        bool, typer.Option("--suite", help="Measure the op's standard suite, in one run.")
    ] = False,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    source: FromFile = None,
) -> None:
    """Time an op's kernels against the memory's limit. Each is checked before it is timed.

    FIELD=VALUE also takes the fields of a case, as page_size=32,128.
    Without a GPU nothing is timed: the op is checked on the CPU, at small sizes.
    """
    work = workload(op)
    selected = {
        "FIELD=VALUE": words,
        f"--{work.spec.axis}": sizes,
        "--scenario": scenario,
        "--override": override,
        "--baseline": baseline,
    }
    if plot is not None:
        plotting.require(plot)
        check_writable(plot, "--plot")
    if source is not None:
        refuse_with_from(
            {**selected, "--prefetch": prefetch, "--suite": suite, "--json": json_file}
        )
        _show(_loaded(source, op), plot)
        return
    check_writable(json_file, "--json")
    if suite:
        for name, value in selected.items():
            if value:
                raise ValueError(f"--suite measures what the op declares; {name} is not accepted")
        measurements = work.suite
    else:
        measurements = [_measurement(work, words, sizes, scenario, override, baseline)]
    modes = None if prefetch is None else names(prefetch)
    plans = [runner.plan(work, one, modes) for one in measurements]
    device = current_gpu()
    if device is None:
        refuse_without_gpu({"--json": json_file, "--plot": plot})
        _check_on_cpu(work, plans)
        return
    with progress() as bar:
        task = bar.add_task("measuring the limit", total=sum(len(one.points) for one in plans))
        report = runner.measure(
            plans, device, lambda point: bar.update(task, description=str(point), advance=1)
        )
    if json_file is not None:
        records.save(report, json_file)
    _show(report, plot)


def _loaded(file: Path, op: str) -> KernelReport:
    """The report of a file. Raises ValueError if it is of another op."""
    report = records.load(KernelReport, file)
    for row in report.rows:
        if row.op != op:
            raise ValueError(f"{file} holds times of {row.op}; accepted: of {op}")
    return report


def _measurement(
    work: Workload,
    words: Sequence[str] | None,
    sizes: str | None,
    scenario: str | None,
    override: Sequence[str] | None,
    baseline: bool,
) -> Measurement:
    spec = work.spec
    problem, options = parse_words(
        words or [], spec.problem, work.options, what=f"problem field or case field of {spec.name}"
    )
    if scenario is not None:
        runner.check_names(names(scenario), work.scenarios, "scenario")
    return Measurement(
        problem=problem,
        options=options,
        sizes=None if sizes is None else integers(f"--{spec.axis}", sizes),
        scenarios=None if scenario is None else names(scenario),
        override=parse_override(work, override or []),
        baseline=baseline,
    )


@dataclass(frozen=True, kw_only=True)
class Backend(FieldSet):
    """What --override takes beside the tuning fields."""

    backend: str = choice(*BACKENDS, help="what compiles and launches the kernel")


def parse_override(work: Workload, words: Sequence[str]) -> dict[str, Any]:
    """['backend=triton', 'reduce_warps=4'] -> {'backend': 'triton', 'reduce_warps': 4}."""
    what = f"tuning field of {work.spec.name}"
    backend, tuning = parse_words(words, Backend, work.spec.tuning, what=what)
    return {**one_value(backend), **one_value(tuning)}


def _check_on_cpu(work: Workload, plans: Sequence[Plan]) -> None:
    most = work.check_size
    print(
        "No CUDA GPU is here, so nothing is timed. The op is checked on the CPU instead."
        f" Where {work.spec.axis} is above {most}, {most} is checked."
    )
    small = [_small(plan, most) for plan in plans]
    checked = []
    with progress() as bar:
        task = bar.add_task("checking", total=sum(len(plan.points) for plan in small))
        for plan in small:
            for one in runner.check(plan, torch.device("cpu")):
                checked.append(one)
                bar.advance(task)
    out = console()
    for problem, found in groupby(checked, key=lambda one: str(one.point.problem)):
        out.print(bold(f"\n{work.spec.name}: {problem}"))
        out.print(_checked(work.spec.axis, found))
    print(f"Right at {count(len(checked), 'point')}: each value is exact or within its tolerance.")


def _small(plan: Plan, most: int) -> Plan:
    """The plan with every size cut to what a CPU checks in reasonable time."""
    points = [replace(point, size=min(point.size, most)) for point in plan.points]
    return replace(plan, points=tuple(dict.fromkeys(points)))


# ---- what is shown -------------------------------------------------------------------------------


def _show(report: KernelReport, plot) -> None:
    out = console()
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


def _times(rows: Sequence[KernelRow]) -> Iterator[RichTable]:
    """One grid per problem, options and scenario."""
    dispatched = {
        (row.panel, row.size): row.median_us
        for row in rows
        if (row.chosen_by, row.prefetch) == ("table", "none")
    }
    for _, panel in groupby(rows, key=lambda row: row.panel):
        found = list(panel)
        first = found[0]
        fields = first.problem | first.options
        described = ", ".join(f"{name} {str(value).lower()}" for name, value in fields.items())
        title = f"{first.op}, {first.scenario}: {described}, {first.l2} L2"
        left = [op_spec(first.op).axis, "kernel", "chosen\nby", "prefetch"]
        right = ["us", "min", "max", "limit", "effi-\nciency", "MB", "GB/s", "ratio", "host\nus"]
        view = grid(title, left, right)
        for row in found:
            base = dispatched.get((row.panel, row.size))
            ratio = "" if base is None else f"{row.median_us / base:.2f}x"
            host = row.host_us.get("call")
            view.add_row(
                str(row.size),
                row.tuning,
                row.chosen_by,
                row.prefetch,
                bold(f"{row.median_us:.2f}"),
                f"{row.min_us:.2f}",
                f"{row.max_us:.2f}",
                f"{row.limit_us:.2f}",
                f"{row.efficiency:.0%}",
                f"{row.moved_bytes / 1e6:.2f}",
                f"{row.moved_bytes / (1000 * row.median_us):.0f}",
                "" if (row.chosen_by, row.prefetch) == ("table", "none") else ratio,
                "" if host is None else f"{host:.1f}",
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
    points = count(len(measured), "point")
    return f"host us per eager call, median over {points}: {text}"


def _checked(axis: str, points: Iterable[Checked]) -> RichTable:
    """What a machine without a GPU finds for one problem."""
    view = grid(None, ["scenario", "case"], [axis, "rows\nwritten", "largest\nerror"])
    view.padding = (0, 1)
    for one in points:
        size, rows, error = one.point.size, one.rows, one.largest_error
        case = _shown(one.point.options)
        view.add_row(one.point.scenario, case, str(size), str(rows), f"{error:.1e}")
    return view


def _shown(options: FieldSet) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.given().items()) or "default"
