"""What the command line prints of the library's results: rich tables and lines of text."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich import box
from rich.table import Table as RichTable

from kvfold.bench.demo import Summary
from kvfold.bench.report import Report, Row
from kvfold.bench.runner import Checked
from kvfold.bench.step import StepRow
from kvfold.codegen import Bucket, Table, Variant
from kvfold.nvrtc import Compiled


def grid(title: str | None, left: Sequence[str], right: Sequence[str]) -> RichTable:
    """An empty table; columns in `right` hold numbers."""
    table = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


# ---- the table ----------------------------------------------------------------------------------


def counts(table: Table) -> str:
    """'8 rows, 192 variants (128 cuda, 64 triton), fingerprint ...'."""
    rows = len({bucket.where for bucket in table.buckets})
    backends = [variant.backend for variant in table.variants]
    each = ", ".join(f"{backends.count(name)} {name}" for name in dict.fromkeys(backends))
    return f"{rows} rows, {len(backends)} variants ({each}), fingerprint {table.fingerprint}"


def table_rows(table: Table) -> Iterator[RichTable]:
    """One grid per op, one line per row of the table."""
    for op, buckets in groupby(table.buckets, key=lambda bucket: bucket.variant.op):
        fields = list(Variant.spec())
        names = ["row", "batch", "arch", *fields, "variants"]
        # In two lines, because the columns are narrower than their names.
        view = grid(op, [name.replace("_", "_\n") for name in names], [])
        view.padding = 0
        for _, found in groupby(buckets, key=lambda bucket: bucket.row):
            row = list(found)
            values = ([getattr(bucket.variant, name) for bucket in row] for name in fields)
            view.add_row(
                str(row[0].row),
                batch_range(row[0]),
                _values(bucket.arch for bucket in row),
                *map(_values, values),
                str(len(row)),
            )
        yield view


def table_variants(table: Table) -> Iterator[RichTable]:
    """One grid per op, one line per variant and batch range."""
    for op, buckets in groupby(table.buckets, key=lambda bucket: bucket.variant.op):
        numbers = ["threads", "shared\nbytes", "CTAs per\nrequest", "row"]
        view = grid(op, ["variant", "batch", "arch"], numbers)
        for bucket in buckets:
            variant = bucket.variant
            view.add_row(
                variant.symbol,
                batch_range(bucket),
                bucket.arch,
                str(variant.threads),
                str(variant.shared_bytes),
                str(variant.slices),
                str(bucket.row),
            )
        yield view


def table_json(table: Table) -> list[dict]:
    """Every variant with where it applies, as plain data."""
    return [
        {
            "symbol": bucket.variant.symbol,
            "op": bucket.variant.op,
            **bucket.variant.problem,
            **bucket.variant.tuning,
            "min_batch": bucket.min_batch,
            "max_batch": bucket.max_batch,
            "arch": bucket.arch,
            "row": bucket.row,
            "line": bucket.line,
            "threads": bucket.variant.threads,
            "shared_bytes": bucket.variant.shared_bytes,
            "ctas_per_request": bucket.variant.slices,
        }
        for bucket in table.buckets
    ]


def explanation(
    table: Table, variant: Variant, batch: int, arch: str
) -> tuple[RichTable, RichTable]:
    """Why a problem of this batch size gets this variant, and what other batch sizes get."""
    group = (variant.op, variant.backend, arch, *variant.key)
    if group not in table.groups:  # no rows of the arch's own
        group = (variant.op, variant.backend, "any", *variant.key)
    buckets = table.groups[group]
    chosen = next(b for b in buckets if b.max_batch is None or batch <= b.max_batch)
    why = RichTable.grid(padding=(0, 2))
    share = "1 warp reads" if variant.reduce_warps == 1 else f"{variant.reduce_warps} warps share"
    requests = f"{batch} requests x {variant.slices} slices of {variant.head_slice} columns"
    if variant.schedule == "persistent":
        ctas = f"at most {variant.min_ctas} CTAs per SM share {requests}"
    else:
        ctas = f"{batch * variant.slices} reducing CTAs = {requests}"
    for name, text in (
        ("problem", f"{_fields(variant.problem)}; batch {batch}"),
        ("variant", f"[bold]{variant.symbol}[/bold]"),
        (
            "because",
            f"{chosen.where} of {table.path} serves batch sizes {batch_range(chosen)} of this"
            f" problem with {variant.backend}, arch {chosen.arch}",
        ),
        ("launch", f"{ctas}; {variant.threads} threads each, {share} a window's rows"),
        ("shared memory", f"{variant.shared_bytes} bytes per CTA"),
    ):
        why.add_row(f"[dim]{name}[/dim]", text)
    rows = grid("by batch size", ["", "batch", "variant"], ["row", "line"])
    for bucket in buckets:
        mark = "->" if bucket == chosen else ""
        rows.add_row(
            mark, batch_range(bucket), bucket.variant.symbol, str(bucket.row), str(bucket.line)
        )
    return why, rows


def batch_range(bucket: Bucket) -> str:
    """'1-48', or '49+' for 49 and up."""
    last = "+" if bucket.max_batch is None else f"-{bucket.max_batch}"
    return f"{bucket.min_batch}{last}"


def _fields(problem: dict) -> str:
    """'head_dim 512, overlap no'."""
    return ", ".join(f"{name} {_value(value)}" for name, value in problem.items())


def _values(values: Iterable) -> str:
    return ", ".join(dict.fromkeys(map(_value, values)))


def _value(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


# ---- build --------------------------------------------------------------------------------------


def built(jobs: list[tuple[Variant, str]], compiled: Iterable[Compiled]) -> RichTable:
    """One line per compiled variant, in the jobs' order."""
    numbers = ["registers", "spilled bytes", "shared bytes", "seconds"]
    view = grid(None, ["variant", "arch"], numbers)
    found = {(one.symbol, one.arch): one for one in compiled}
    for variant, arch in jobs:
        one = found[variant.symbol, arch]
        spilled = f"[bold red]{one.spill_bytes}[/]" if one.spill_bytes else "0"
        view.add_row(
            one.symbol,
            arch,
            str(one.registers),
            spilled,
            str(variant.shared_bytes),
            f"{one.seconds:.2f}",
        )
    return view


# ---- demo ---------------------------------------------------------------------------------------


def summary(done: Summary) -> RichTable:
    """The demo's result."""
    view = RichTable.grid(padding=(0, 2))
    right = "all right" if not done.wrong else f"[bold red]{done.wrong} wrong[/]"
    for name, text in (
        ("device", done.device),
        ("backend", done.backend),
        ("variants", "\n".join(sorted(done.variants))),
        ("steps", f"{done.steps}: {done.requests} requests, {done.tokens} drafted tokens"),
        *([("one launch", f"{done.replayed} of the steps, by CUDA graph")] * bool(done.replayed)),
        ("rows emitted", f"{done.rows}, {done.again} of them again after a rollback: {right}"),
        ("largest error", f"{done.largest_error:.2e} against float64"),
        ("time", f"{done.seconds:.1f} s"),
    ):
        view.add_row(f"[dim]{name}[/dim]", text)
    return view


# ---- bench --------------------------------------------------------------------------------------


def origin(report: Report) -> str:
    """On what a report was measured, in one line."""
    return (
        f"{report.device}, {report.date}: reads {report.read_bandwidth_gbs:.0f} GB/s, copies"
        f" {report.copy_bandwidth_gbs:.0f} GB/s, empty graph node {report.empty_node_us:.2f} us"
    )


def times(rows: Sequence[Row]) -> Iterator[RichTable]:
    """One grid per scenario, page size and layout; overrides beside what was dispatched."""
    dispatched = {(row.panel, row.batch): row.median_us for row in rows if row.chosen_by == "table"}
    for _, panel in groupby(rows, key=lambda row: row.panel):
        found = list(panel)
        first = found[0]
        title = (
            f"{first.scenario}: {_fields(first.problem)}; page_size {first.page_size},"
            f" {first.layout} pool, {first.l2} L2"
        )
        names = ["us", "min", "max", "limit", "effi-\nciency", "MB", "GB/s", "ratio", "host\nus"]
        view = grid(title, ["batch", "kernel", "chosen\nby"], names)
        view.padding = 0
        for row in found:
            base = dispatched.get((row.panel, row.batch))
            plain = row.chosen_by == "table"
            ratio = "" if plain or base is None else f"{row.median_us / base:.2f}x"
            view.add_row(
                str(row.batch),
                row.tuning,
                row.chosen_by,
                f"[bold]{row.median_us:.2f}[/]",
                f"{row.min_us:.2f}",
                f"{row.max_us:.2f}",
                f"{row.limit_us:.2f}",
                f"{row.efficiency:.0%}",
                f"{row.bytes / 1e6:.2f}",
                f"{row.bytes / (1000 * row.median_us):.0f}",
                ratio,
                "" if row.host_us is None else f"{row.host_us:.1f}",
            )
        yield view


def host_times(rows: Sequence[Row]) -> str | None:
    """What a call costs the host on each way, in one line; None if only one was measured."""
    compared = [row for row in rows if row.host_torch_ops_us is not None]
    if not compared:
        return None
    ways = {
        "kvfold": [row.host_us for row in compared],
        "torch.ops.kvfold": [row.host_torch_ops_us for row in compared],
        "Triton's launcher": [row.host_triton_us for row in compared if row.host_triton_us],
    }
    medians = (f"{statistics.median(us):.1f} by {way}" for way, us in ways.items() if us)
    return f"host us per call, median over {len(compared)} points: {', '.join(medians)}"


def steps(rows: Sequence[StepRow]) -> RichTable:
    """What a decode step costs on each way."""
    names = ["us", "min", "max", "host us", "kernels us", "copies us", "waits"]
    view = grid(f"One decode step: {_fields(rows[0].problem)}", ["batch", "way"], names)
    for row in rows:
        view.add_row(
            str(row.batch),
            row.scenario,
            f"[bold]{row.median_us:.0f}[/]",
            f"{row.min_us:.0f}",
            f"{row.max_us:.0f}",
            f"{row.host_us:.0f}",
            f"{row.device_us:.0f}",
            "" if row.copy_us is None else f"{row.copy_us:.0f}",
            str(row.syncs),
        )
    return view


def checked(points: Iterable[Checked]) -> RichTable:
    """What a machine without a GPU finds."""
    view = grid(None, ["scenario"], ["page_size", "batch", "rows emitted", "largest error"])
    for one in points:
        point = one.point
        view.add_row(
            point.scenario,
            str(point.page_size),
            str(point.batch),
            str(one.emitted),
            f"{one.largest_error:.1e}",
        )
    return view
