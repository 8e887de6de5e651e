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
from rich.text import Text

from kvfold.bench import plot as plotting
from kvfold.bench import records
from kvfold.bench.cli import common
from kvfold.bench.cli.common import app, clear_errors, count, names, option
from kvfold.bench.measure import runner
from kvfold.bench.measure.runner import Checked, Plan
from kvfold.bench.records import KernelReport, KernelRow
from kvfold.codegen import FieldSet, choice, op_spec
from kvfold.codegen.spec import BACKENDS
from kvfold.workload import Measurement, Workload, workload

SCENARIO_HELP = "Scenarios; by default all of the op's."
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
@clear_errors
def bench(
    op: common.Op,
    words: common.Words = None,
    sizes: common.Sizes = None,
    scenario: Annotated[str | None, option(SCENARIO_HELP, "--scenario", metavar="LIST")] = None,
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

    FIELD=VALUE also takes the fields of a case, as page_size=32,128.
    Without a GPU nothing is timed: the op is checked on the CPU, at small sizes.
    """
    work = workload(op)
    selected = {"FIELD=VALUE": words, f"--{work.spec.axis}": sizes, "--scenario": scenario,
                "--override": override, "--baseline": baseline}  # fmt: skip
    common.check_plot(plot)
    if source is not None:
        others = {"--prefetch": prefetch, "--suite": suite, "--json": json_file}
        common.refuse(selected | others, "--from measures nothing")
        _show(_loaded(source, op), plot)
        return
    common.check_writable(json_file, "--json")
    if suite:
        common.refuse(selected, "--suite measures what the op declares")
    modes = None if prefetch is None else names(prefetch)
    measurements = [_measurement(work, words, sizes, scenario, override, baseline)]
    plans = [runner.plan(work, one, modes) for one in (work.suite if suite else measurements)]
    device = common.current_gpu()
    if device is None:
        common.refuse({"--json": json_file, "--plot": plot}, common.NO_GPU)
        _check_on_cpu(work, plans)
        return
    with common.progress() as bar:
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
    spec, what = work.spec, f"problem field or case field of {work.spec.name}"
    problem, options = common.parse_words(words or [], spec.problem, work.options, what=what)
    return Measurement(
        problem=problem,
        options=options,
        sizes=None if sizes is None else common.integers(f"--{spec.axis}", sizes),
        scenarios=None if scenario is None else names(scenario),
        override=_override(work, override or []),
        baseline=baseline,
    )


@dataclass(frozen=True, kw_only=True)
class Backend(FieldSet):
    """What --override takes beside the tuning fields."""

    backend: str = choice(*BACKENDS, help="what compiles and launches the kernel")


def _override(work: Workload, words: Sequence[str]) -> dict[str, Any]:
    """['backend=triton', 'reduce_warps=4'] -> {'backend': 'triton', 'reduce_warps': 4}."""
    what = f"tuning field of {work.spec.name}"
    backend, tuning = common.parse_words(words, Backend, work.spec.tuning, what=what)
    return {**common.one_value(backend), **common.one_value(tuning)}


def _check_on_cpu(work: Workload, plans: Sequence[Plan]) -> None:
    """Checks the op at the plans' points, with sizes that a CPU checks in reasonable time."""
    axis, most = work.spec.axis, work.check_size
    print(
        f"{common.NO_GPU}. The op is checked on the CPU instead. Where {axis} is above {most},"
        f" {most} is checked."
    )
    points = [replace(one, size=min(one.size, most)) for plan in plans for one in plan.points]
    plan = replace(plans[0], points=tuple(dict.fromkeys(points)))
    with common.progress() as bar:
        points = runner.check(plan, torch.device("cpu"))
        checked = list(bar.track(points, total=len(plan.points), description="checking"))
    out = common.console()
    for problem, found in groupby(checked, key=lambda one: str(one.point.problem)):
        out.print(common.heading(f"{work.spec.name}: {problem}"))
        out.print(_checked(axis, found))
    print(f"Right at {count(len(checked), 'point')}: each value is exact or within its tolerance.")


# ---- what is shown -------------------------------------------------------------------------------


def _show(report: KernelReport, plot: Path | None) -> None:
    out = common.console(least=110)
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


def _times(rows: Sequence[KernelRow]) -> Iterator[Text | RichTable]:
    """One grid per problem, options and scenario."""
    plain = {(row.panel, row.size): row for row in rows if row.is_plain}
    for _, panel in groupby(rows, key=lambda row: row.panel):
        found = list(panel)
        first = found[0]
        yield common.heading(f"{first.op}, {first.scenario}: {first.described}")
        left = [op_spec(first.op).axis, "kernel", "chosen\nby", "prefetch"]
        right = ["us", "min", "max", "limit", "effi-\nciency", "MB", "GB/s", "ratio", "host\nus"]
        view = common.grid(left, right, padding=0)
        for row in found:
            base = None if row.is_plain else plain.get((row.panel, row.size))
            view.add_row(
                str(row.size),
                row.tuning,
                row.chosen_by,
                row.prefetch,
                common.bold(f"{row.median_us:.2f}"),
                *(f"{us:.2f}" for us in (row.min_us, row.max_us, row.limit_us)),
                f"{row.efficiency:.0%}",
                f"{row.moved_bytes / 1e6:.2f}",
                f"{row.moved_bytes / (1000 * row.median_us):.0f}",
                "" if base is None else f"{row.median_us / base.median_us:.2f}x",
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
    return f"host us per eager call, median over {count(len(measured), 'point')}: {text}"


def _checked(axis: str, points: Iterable[Checked]) -> RichTable:
    """What a machine without a GPU finds for one problem."""
    view = common.grid(["scenario", "case"], [axis, "rows\nwritten", "largest\nerror"])
    for one in points:
        given = one.point.options.given()
        case = ", ".join(f"{name} {value}" for name, value in given.items()) or "default"
        numbers = str(one.point.size), str(one.rows), f"{one.largest_error:.1e}"
        view.add_row(one.point.scenario, case, *numbers)
    return view
