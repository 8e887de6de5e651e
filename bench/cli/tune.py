"""kvfold tune: times the variants that can run on this GPU and writes the best into a table."""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as RichTable
from rich.text import Text

from kvfold.bench import records
from kvfold.bench.cli import common
from kvfold.bench.cli.common import app, clear_errors, option
from kvfold.bench.cli.table import counts
from kvfold.bench.records import TuneReport
from kvfold.bench.tuning import gpu, report, search, table_file
from kvfold.bench.tuning.search import Plan, TimePoint, Times, Tuned
from kvfold.codegen import load_table, op_spec
from kvfold.runtime import compiler, dispatch
from kvfold.workload import workload

MIXTURE_HELP = (
    "Weights of the scenarios, as all-hit=0.5,spread=0.5. By default the op's or, with --from, the"
    " file's."
)
TABLE_HELP = (
    "Table to write the rows into; by default the one that KVFOLD_CONFIG names. With neither they"
    " are only shown."
)
DRY_RUN_HELP = "Show the table's change as a diff; do not write it."


@app.command()
@clear_errors
def tune(
    op: common.Op,
    words: common.Words = None,
    sizes: common.Sizes = None,
    prefetch: common.Prefetch = None,
    backend: Annotated[str | None, option("cuda or triton; by default cuda.")] = None,
    mixture: Annotated[str | None, option(MIXTURE_HELP)] = None,
    table: Annotated[Path | None, option(TABLE_HELP, metavar="FILE")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    json_file: common.JsonFile = None,
    source: common.FromFile = None,
) -> None:
    """Time every variant that can run on this GPU and write the best as rows of a table.

    Problems that differ in the op's shared field alone, as next_n, are timed once, at the largest
    value, and share their rows.

    All variants of a problem are checked and timed at a few points. At most 20 of them are timed at
    every size, in every scenario and with every prefetch. The ranges chosen minimise the geometric
    mean of the times, weighted by --mixture; each prefetch counts the same. A further range must
    gain 1 %.

    The rows are written into the `tuned` section of the table, for this GPU's architecture.
    """
    work = workload(op)
    weights = None if mixture is None else search.parse_mixture(mixture, work.scenarios)
    given_by = "--table"
    if table is None and os.environ.get("KVFOLD_CONFIG"):
        given_by, table = "KVFOLD_CONFIG", Path(os.environ["KVFOLD_CONFIG"])
    if dry_run and table is None:
        raise ValueError("--dry-run needs --table FILE, or KVFOLD_CONFIG to name it")
    if not dry_run:
        common.check_writable(table, given_by)
    if source is not None:
        given = {"FIELD=VALUE": words, f"--{work.spec.axis}": sizes, "--prefetch": prefetch}
        given |= {"--backend": backend, "--json": json_file}
        common.refuse(given, "--from measures nothing")
        measured, plan, times = report.read(source)
        if measured.op != op:
            raise ValueError(f"{source} holds times of {measured.op}; accepted: of {op}")
        plan = _weighted(plan, weights)
    else:
        common.check_writable(json_file, "--json")
        (problem,) = common.parse_words(
            words or [], work.spec.problem, what=f"problem field of {op}"
        )
        plan = search.plan(
            op,
            {**work.defaults, **problem},
            backend=backend or "cuda",
            sizes=None if sizes is None else common.integers(f"--{work.spec.axis}", sizes),
            mixture=weights,
            prefetch=None if prefetch is None else common.names(prefetch),
        )
        measured, times = _measure(plan, table)
        if json_file is not None:
            records.save(measured, json_file)
    _choose(plan, measured, times, table, dry_run)


def _weighted(plan: Plan, weights: Mapping[str, float] | None) -> Plan:
    """The plan with another mixture. Raises ValueError for a scenario that was not timed."""
    for name in weights or ():
        if name not in plan.mixture:
            timed = ", ".join(plan.scenarios)
            raise ValueError(f"--mixture names {name}, which was not timed; accepted: {timed}")
    return plan if weights is None else replace(plan, mixture=weights)


def _measure(plan: Plan, table: Path | None) -> tuple[TuneReport, list[Times]]:
    """Times what is planned on this machine's GPU, if the table can take its rows."""
    device = common.current_gpu()
    if device is None:
        raise ValueError(f"{common.NO_GPU}; accepted: --from FILE")
    if plan.backend == "cuda" and (why := compiler.unavailable()):
        raise ValueError(f"backend is 'cuda', but there is no NVRTC here ({why})")
    if table is not None:  # now, with any rows, because measuring takes minutes
        arch = dispatch.arch_of(device)
        table_file.replaced(table, report.buckets(search.untimed(plan, arch), arch), plan.command)
    with common.progress() as bar:
        task = bar.add_task("compiling")
        times = gpu.run(
            plan,
            device,
            lambda text, done, total: bar.update(
                task, description=text, completed=done, total=total
            ),
        )
    return report.report(plan, times, device), times


def _choose(
    plan: Plan, measured: TuneReport, times: list[Times], table: Path | None, dry_run: bool
) -> None:
    """Shows the times and the chosen rows, and writes these into the table."""
    tuned = report.choose(plan, times)
    out = common.console()
    for one in tuned:
        for view in _times(one, plan):
            out.print(view)
    buckets = report.buckets(tuned, measured.arch)
    for row in table_file.table_rows(buckets):
        print(table_file.row_lines(row))
    if table is None:
        return
    origin = f"{measured.device}, {measured.date[:10]}: {plan.full_command}"
    edit = table_file.replaced(table, buckets, origin)
    if dry_run:
        print(edit.diff(), end="")
        return
    edit.write()
    print(f"wrote {table}: {counts(load_table(table))}")


def _times(tuned: Tuned, plan: Plan) -> Iterator[Text | RichTable]:
    """A family's times, one grid per scenario and prefetch: the variants timed everywhere.

    Those chosen are bold where they serve.
    """
    sizes, chosen = plan.sizes, {}
    for one in tuned.ranges:
        last = one.max_size or sizes[-1]
        chosen |= {size: one.variant for size in sizes if one.min_size <= size <= last}
    axis = op_spec(plan.op).axis
    for prefetch, scenario in itertools.product(plan.prefetch, plan.scenarios):
        yield common.heading(f"{scenario}, prefetch {prefetch}: {tuned.family}; us by {axis}")
        view = common.grid(["tuning"], list(map(str, sizes)), padding=0)
        for variant in search.timed_everywhere(tuned.times, plan):
            found = tuned.times[variant]
            texts = [f"{found[TimePoint(prefetch, scenario, size)]:.2f}" for size in sizes]
            cells = [
                common.bold(text) if chosen[size] == variant else text
                for size, text in zip(sizes, texts, strict=True)
            ]
            view.add_row("_".join(variant.tuning.symbol_parts()), *cells)
        yield view
