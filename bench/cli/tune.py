"""kvfold tune: times the variants that can run on this GPU and writes the best into a table."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from kvfold.bench import records
from kvfold.bench.cli import common, output
from kvfold.bench.cli.common import app, option
from kvfold.bench.cli.table import counts
from kvfold.bench.cli.words import integers, names, parse_words
from kvfold.bench.environment import environment
from kvfold.bench.tuning import gpu, report, search, table_file
from kvfold.bench.tuning.plan import Plan, parse_mixture
from kvfold.bench.tuning.plan import plan as make_plan
from kvfold.bench.tuning.report import TuneReport
from kvfold.bench.tuning.search import Times
from kvfold.codegen import Bucket, load_table
from kvfold.runtime import compiler, dispatch
from kvfold.runtime.files import replace_file
from kvfold.workload import workload

MIXTURE_HELP = (
    "Weights of the scenarios, such as all-hit=0.5,spread=0.5. By default the op's or, with --from,"
    " the file's."
)
TABLE_HELP = "Table to write the rows into. Without one they are only shown."


@app.command()
def tune(
    op: common.Op,
    words: common.Words = None,
    sizes: common.Sizes = None,
    prefetch: common.Prefetch = None,
    backend: Annotated[str | None, option("cuda or triton; by default cuda.")] = None,
    mixture: Annotated[str | None, option(MIXTURE_HELP)] = None,
    table: Annotated[
        Path | None, typer.Option(envvar="KVFOLD_CONFIG", help=TABLE_HELP, metavar="FILE")
    ] = None,
    json_file: common.JsonFile = None,
    source: common.FromFile = None,
) -> None:
    """Time every variant that can run on this GPU and write the best as rows of a table.

    Problems that differ only in the op's shared field, such as next_n, are timed once, at the
    largest value, and share their rows.

    All variants of a problem are checked and timed at a few points. At most 20 of them are timed at
    every size, in every scenario and with every prefetch. The ranges chosen minimise the geometric
    mean of the times, weighted by --mixture; the op says how much each prefetch
    counts. A further range must gain 1 %.

    The rows are written into the `tuned` section of the table, for this GPU's architecture.
    """
    work = workload(op)
    axis = f"--{work.spec.axis}"
    weights = None if mixture is None else parse_mixture(mixture)
    common.check_writable(table)
    if source is not None:
        given = {"FIELD=VALUE": words, axis: sizes, "--prefetch": prefetch}
        given |= {"--backend": backend, "--json": json_file}
        common.refuse(given, "--from measures nothing")
        measured = records.load(TuneReport, source)
        if measured.plan.op != op:
            raise ValueError(f"{source} holds times of {measured.plan.op}; accepted: of {op}")
    else:
        common.check_writable(json_file)
        (problem,) = parse_words(words, work.spec.problem, what=f"problem field of {op}")
        plan = make_plan(
            op,
            {**work.defaults, **problem},
            backend=backend or "cuda",
            sizes=integers(axis, sizes),
            mixture=weights,
            prefetch=names(prefetch),
        )
        measured = _measured(plan, table)
        if json_file is not None:
            records.save(measured, json_file)
    plan = replace(measured.plan, mixture=weights or measured.plan.mixture)
    _choose(measured, plan, table)


def _measured(plan: Plan, table: Path | None) -> TuneReport:
    """Times what is planned on this machine's GPU, if the table can take its rows."""
    device = common.current_gpu()
    if device is None:
        raise ValueError(f"{common.NO_GPU}; accepted: --from FILE")
    if plan.backend == "cuda" and (why := compiler.unavailable()):
        raise ValueError(f"backend is 'cuda', but there is no NVRTC here ({why})")
    arch = dispatch.arch_of(device)
    if table is not None:  # now, with any rows, because measuring takes minutes
        table_file.replaced(table, search.untimed(plan, arch), plan.command)
    with output.progress() as bar:
        task = bar.add_task("", total=None)
        times = gpu.run(plan, device, lambda what: bar.update(task, description=what))
    return TuneReport(**environment(device), arch=arch, plan=plan, rows=report.rows(times))


def _choose(measured: TuneReport, plan: Plan, table: Path | None) -> None:
    """Shows the times and the chosen rows, and writes these into the table."""
    out, buckets = output.console(), []
    for family in plan.families:
        times = measured.times_of(family)
        ranges = search.choose(plan, times, measured.arch)
        buckets += search.shared(ranges, family)
        for view in _times(plan, times, ranges):
            out.print(view)
    for row in table_file.table_rows(buckets):
        print(table_file.row_lines(row))
    if table is None:
        return
    origin = f"{measured.device}, {measured.date[:10]}: {plan.command}"
    text = table_file.replaced(table, buckets, origin)
    replace_file(table, text.encode())
    print(f"wrote {table}: {counts(load_table(table))}")


def _times(plan: Plan, times: Times, ranges: Sequence[Bucket]) -> Iterator[Text | Table]:
    """A problem's times, one grid per scenario and prefetch: the variants timed everywhere.

    Those chosen are bold where they serve.
    """
    problem = ranges[0].variant.problem
    chosen = {(one.variant, size) for one in ranges for size in plan.sizes if one.serves(size)}
    for (prefetch, scenario), points in groupby(plan.points, key=lambda at: at[:2]):
        at = list(points)
        yield output.heading(f"{scenario}, prefetch {prefetch}: {problem}; us by {plan.spec.axis}")
        view = output.grid(["tuning"], list(map(str, plan.sizes)), padding=0)
        for variant in search.timed_everywhere(plan, times):
            cells = (
                Text(f"{times[variant][one]:.2f}", "bold" * ((variant, one.size) in chosen))
                for one in at
            )
            view.add_row("_".join(variant.tuning.symbol_parts()), *cells)
        yield view
