"""kvfold table: what the table in force holds."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as View
from rich.text import Text

from kvfold.bench.cli import common, output
from kvfold.bench.cli.common import app, option
from kvfold.bench.cli.output import bold, count
from kvfold.bench.cli.words import one_value, parse_words
from kvfold.codegen import Bucket, Table, load_table, op_spec, op_specs
from kvfold.codegen.documentation import field_rows, format_field_rows
from kvfold.codegen.fields import check_names
from kvfold.codegen.reading import FORMATS
from kvfold.workload import workload

WORDS_HELP = (
    "Problem fields, such as head_dim=128; those left out have the defaults of `kvfold bench`."
)
SIZE_HELP = f"Required: {common.SIZE_AXES}."
table_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    table_app,
    name="table",
    help="Inspect the table of kernels: configs.yaml, or the file that KVFOLD_CONFIG names.",
)


@table_app.command("list")
def table_list(
    every: Annotated[
        bool, typer.Option("--all", help="One line per variant, not per row.")
    ] = False,
) -> None:
    """Show the table in force: its rows and how many variants each stands for."""
    table = load_table()
    out = output.console()
    out.print(f"{table.path}: {counts(table)}", soft_wrap=True)
    for view in _variants(table) if every else _rows(table):
        out.print(view)
    if table.formats:
        out.print(output.heading(FORMATS))
        out.print(_formats(table))


@table_app.command("check")
def table_check(file: Annotated[Path, typer.Argument(help="A table, as YAML.")]) -> None:
    """Say whether a table is valid: OK, or what is wrong where, and exit code 2."""
    print(f"{file}: OK: {counts(load_table(file))}")


@table_app.command("fields")
def table_fields(
    section: Annotated[
        str, typer.Argument(help=f"{', '.join(op_specs())} or {FORMATS}.", metavar="OP")
    ],
) -> None:
    """Explain the fields of a row of the table, or of a cache format."""
    check_names([section], [*op_specs(), FORMATS], "op")
    rows = format_field_rows() if section == FORMATS else field_rows(op_spec(section))
    view = View.grid(padding=(0, 2))
    view.add_column(no_wrap=True)
    for name, kind, legal, default, meaning in rows:
        about = f"{kind}; legal: {legal}" + (f"; default: {default}" if default else "")
        view.add_row(bold(name), Text.assemble(meaning, "\n", (about, "dim")))
    output.console().print(view)


@table_app.command("explain")
def table_explain(
    op: common.Op,
    words: Annotated[list[str] | None, common.words_argument(WORDS_HELP)] = None,
    size: Annotated[int | None, option(SIZE_HELP, *common.SIZE_NAMES)] = None,
    backend: Annotated[str, typer.Option(help="cuda or triton.")] = "cuda",
    arch: Annotated[
        str, typer.Option(help="The GPU's architecture, such as sm_90; any: the rows for any GPU.")
    ] = "any",
) -> None:
    """Say which variant a problem gets, and why."""
    table, spec = load_table(), op_spec(op)
    (problem,) = parse_words(words, spec.problem, what=f"problem field of {op}")
    if size is None:
        raise ValueError(f"--{spec.axis} is missing; accepted: the number of {spec.axis_help}")
    fields = {**workload(op).defaults, **one_value(problem), spec.axis: size}
    variant = table.select(op, backend=backend, arch=arch, **fields)
    buckets = table.buckets_for(variant.problem, backend, arch)
    chosen = next(bucket for bucket in buckets if bucket.serves(size))
    launch = variant.launch
    why = {
        "problem": f"{variant.problem}; {spec.axis} {size}",
        "variant": bold(variant.symbol),
        "because": f"{chosen.where} of {table.path} serves {spec.axis} {chosen.range} of this"
        f" problem with {backend}, arch {chosen.arch}",
        "launch": spec.explain(variant.problem, backend, variant.tuning, size),
        "per CTA": f"{launch.threads} threads, {launch.shared_bytes} bytes of shared memory",
    }
    output.console().print(output.facts(why))
    output.console().print(_ranges(buckets, chosen))


def counts(table: Table) -> str:
    """'8 rows, 192 variants (128 cuda, 64 triton), 15 cache formats, fingerprint ...'."""
    rows = len({bucket.where for bucket in table.buckets})
    backends = [variant.backend for variant in table.variants]
    each = ", ".join(f"{backends.count(name)} {name}" for name in dict.fromkeys(backends))
    parts = [count(rows, "row"), count(len(backends), "variant") + (f" ({each})" if each else "")]
    if table.formats:
        parts.append(count(len(table.formats), "cache format"))
    return ", ".join([*parts, f"fingerprint {table.fingerprint}"])


def _formats(table: Table) -> View:
    """One line per cache format."""
    view = output.grid(["format", "fields"], [])
    for name, format in table.formats.items():
        view.add_row(name, _merged([format.given()]))
    return view


def _rows(table: Table) -> Iterator[Text | View]:
    """A heading for the rows of the same problems, then one line per row."""
    rows = [list(found) for _, found in groupby(table.buckets, key=lambda bucket: bucket.where)]
    for title, found in groupby(rows, key=_title):
        alike = list(found)
        view = output.grid(["line", alike[0][0].variant.spec.axis, "tuning"], ["variants"])
        for row in alike:
            tuning = _merged([bucket.variant.tuning.given() for bucket in row])
            view.add_row(str(row[0].line), row[0].range, tuning, str(len(row)))
        yield output.heading(title)
        yield view


def _title(row: list[Bucket]) -> str:
    """The op, backends, architectures and problems of a row."""
    backends = _distinct(bucket.variant.backend for bucket in row)
    problems = _merged([bucket.variant.problem.values() for bucket in row])
    arch = _distinct(bucket.arch for bucket in row)
    return f"{row[0].variant.op}, {backends}, arch {arch}: {problems}"


def _variants(table: Table) -> Iterator[Text | View]:
    """One grid per op, one line per variant and range."""
    for op, buckets in groupby(table.buckets, key=lambda bucket: bucket.variant.op):
        yield output.heading(op)
        yield _ranges(list(buckets))


def _ranges(buckets: Sequence[Bucket], chosen: Bucket | None = None) -> View:
    """One line per bucket."""
    axis = buckets[0].variant.spec.axis
    view = output.grid(["", axis, "variant", "arch"], ["line"], padding=0)
    for one in buckets:
        mark = "->" if one == chosen else ""
        view.add_row(mark, one.range, one.variant.symbol, one.arch, str(one.line))
    return view


def _merged(values: list[dict]) -> str:
    """'head_dim 128, 512; overlap no': each field with every value that it has."""
    names = dict.fromkeys(name for one in values for name in one)
    return "; ".join(f"{name} {_distinct(one.get(name) for one in values)}" for name in names)


def _distinct(values: Iterable) -> str:
    return ", ".join(dict.fromkeys(str(value).lower() for value in values if value is not None))
