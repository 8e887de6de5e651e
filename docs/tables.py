"""Tables in the documentation that are made from declarations and results files.

A document holds blocks between `<!-- NAME -->` and `<!-- end -->`. `make docs` makes them anew.
A test compares them with what they are made from, so no figure is typed in by hand.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from kvfold.bench.plot import plot_kernels
from kvfold.bench.records import KernelReport, KernelRow, StepReport, load
from kvfold.codegen import op_spec
from kvfold.codegen.documentation import argument_rows, field_rows, markdown

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/performance.md", "docs/step.md", "docs/fields.md")
RESULTS = ROOT / "bench" / "results" / "h200"
_BLOCK = re.compile(r"(<!-- ([\w.: -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)

PRODUCTION = {"head_dim": 512, "compress_ratio": 128, "overlap": False, "kv_dtype": "bf16",
              "state_dtype": "fp32", "next_n": 4}  # fmt: skip
CASE = {"page_size": 32, "layout": "split", "output_dtype": "bf16"}
SIZES = (1, 16, 64, 128, 256, 512)


def rewritten(text: str) -> str:
    """A document's text with every block made anew. Raises KeyError for an unknown block."""

    def block(found: re.Match) -> str:
        name, *words = found[2].split(" ")
        return f"{found[1]}{BLOCKS[name](*words)}\n{found[3]}"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Rewrites every document in place."""
    for name in DOCUMENTS:
        file = ROOT / name
        file.write_text(rewritten(file.read_text()))
        print(f"wrote {name}")
    report = kernels()
    rows = [row for row in report.rows if (row.problem, row.options) == (PRODUCTION, CASE)]
    plot_kernels(replace(report, rows=rows), RESULTS / "speed.png")


# ---- declarations --------------------------------------------------------------------------------


def arguments(op: str) -> str:
    """The argument table of an op."""
    return markdown(("argument", "shape", "dtype", "meaning"), argument_rows(op_spec(op)))


def fields(op: str) -> str:
    """The table of the fields of a row."""
    rows = ([f"`{name}`", *rest] for name, *rest in field_rows(op_spec(op)))
    return markdown(("field", "kind", "legal", "default", "meaning"), rows)


# ---- results -------------------------------------------------------------------------------------


def kernels(op: str = "paged_kv_compress") -> KernelReport:
    """The committed results of an op's suite."""
    return load(KernelReport, RESULTS / f"{op}.json")


def chosen(
    rows: Iterable[KernelRow],
    scenario: str,
    problem: dict | None = None,
    options: dict | None = None,
    by: str = "table",
    prefetch: str = "none",
    backend: str = "cuda",
    tuning: str | None = None,
) -> dict[int, KernelRow]:
    """Size -> row, of one line of a table. `by` may name a yardstick."""
    wanted = {**PRODUCTION, **(problem or {})}
    case = {**CASE, **(options or {})}
    return {
        row.size: row
        for row in rows
        if (row.scenario, row.problem, row.options) == (scenario, wanted, case)
        and (row.chosen_by == by or row.variant == by)
        and (row.prefetch, row.backend) == (prefetch, backend)
        and (tuning is None or row.tuning == tuning)
    }


def _line(
    name: str, rows: dict[int, KernelRow], sizes: Sequence[int], value: Callable
) -> list[str]:
    return [name, *(value(rows[size]) if size in rows else "" for size in sizes)]


def _us(row: KernelRow) -> str:
    return f"{row.median_us:.1f}"


def _us2(row: KernelRow) -> str:
    return f"{row.median_us:.2f}"


def _limit(row: KernelRow) -> str:
    return f"{row.limit_us:.1f}"


def _percent(row: KernelRow) -> str:
    return f"{100 * row.efficiency:.0f} %"


def origin() -> str:
    """Where the figures come from, in one sentence."""
    report = kernels()
    commit = (report.commit or "")[:7]
    return (
        f"{report.device}, {report.date[:10]}, commit {commit}. It reads"
        f" {report.read_bandwidth_gbs:.0f} GB/s; an empty graph node takes"
        f" {report.empty_node_us:.2f} us."
    )


def speed() -> str:
    """The README's table: the production problem over batch sizes."""
    rows = kernels().rows
    lines = []
    for scenario in ("all-hit", "spread", "no-hit"):
        plain, early = (chosen(rows, scenario, prefetch=way) for way in ("none", "state"))
        lines.append(_line(f"{scenario}: the limit", plain, SIZES, _limit))
        lines.append(_line(f"{scenario}: kvfold", plain, SIZES, _us))
        lines.append(_line(f"{scenario}: kvfold, prefetch", early, SIZES, _us))
        lines.append(_line("the same, efficiency", early, SIZES, _percent))
    yardstick = chosen(rows, "all-hit", by="row_by_row")
    lines.append(_line("all-hit: one warp, row by row", yardstick, SIZES, _us))
    return markdown(("microseconds at batch", *map(str, SIZES)), iter(lines))


def ratio_4() -> str:
    """Ratio 4, all windows closing, with prefetch."""
    rows, sizes = kernels().rows, (16, 64, 128, 256, 512)
    lines = []
    for head_dim in (512, 128):
        for next_n in (1, 4):
            problem = {"head_dim": head_dim, "compress_ratio": 4, "overlap": True, "next_n": next_n}
            found = chosen(rows, "all-hit", problem, prefetch="state")
            name = f"head_dim {head_dim}, next_n {next_n}"
            lines.append(_line(name, found, sizes, _us2))
            lines.append(_line("the limit", found, sizes, lambda row: f"{row.limit_us:.2f}"))
    return markdown(("ratio 4, all-hit, us at batch", *map(str, sizes)), iter(lines))


def bf16_state() -> str:
    """State in bf16 against fp32, with prefetch."""
    rows, sizes = kernels().rows, (16, 64, 128, 256, 512)
    lines = []
    for scenario in ("all-hit", "spread", "no-hit"):
        for dtype in ("bf16", "fp32"):
            found = chosen(rows, scenario, {"state_dtype": dtype}, prefetch="state")
            lines.append(_line(f"{scenario}: {dtype}, us", found, sizes, _us2))
            lines.append(_line("the same, efficiency", found, sizes, _percent))
    return markdown(("state at batch", *map(str, sizes)), iter(lines))


def layouts() -> str:
    """Page sizes and pool layouts, with prefetch."""
    rows = kernels().rows
    lines = [
        _line(name, chosen(rows, "all-hit", options=options, prefetch="state"), SIZES, _us2)
        for name, options in (
            ("pages of 32 rows, two pools", {}),
            ("pages of 128 rows", {"page_size": 128}),
            ("one packed pool", {"layout": "packed"}),
        )
    ]
    return markdown(("all-hit, us at batch", *map(str, SIZES)), iter(lines))


def triton() -> str:
    """Triton against CUDA, both without prefetch."""
    rows, sizes = kernels().rows, (16, 128, 256, 512)
    lines = []
    for scenario in ("all-hit", "spread", "no-hit"):
        other = chosen(rows, scenario, by="override", backend="triton")
        lines.append(_line(f"{scenario}: Triton", other, sizes, _us2))
        lines.append(_line(f"{scenario}: CUDA", chosen(rows, scenario), sizes, _us2))
    return markdown(("us at batch", *map(str, sizes)), iter(lines))


def host() -> str:
    """Host time of an eager call, median over the measured points."""
    measured = [row.host_us for row in kernels().rows if row.host_us]
    names = {
        "call": "`kvfold.paged_kv_compress`, repeated call",
        "torch_ops": "`torch.ops.kvfold.paged_kv_compress`, repeated call",
        "unrepeated": "`kvfold.paged_kv_compress`, no repeated call",
        "triton": "Triton's launcher, the same arguments",
    }
    lines = []
    for way, name in names.items():
        times = sorted(one[way] for one in measured if way in one)
        lines.append([name, f"{times[len(times) // 2]:.1f}"])
    return markdown(("host time of an eager call", "us"), iter(lines))


def step() -> str:
    """A whole decode step in its modes."""
    report = load(StepReport, RESULTS / "step.json")
    modes = list(dict.fromkeys(row.mode for row in report.rows))
    lines = []
    for batch in dict.fromkeys(row.batch for row in report.rows):
        rows = {row.mode: row for row in report.rows if row.batch == batch}
        for name, field in (("host", "host_us"), ("step", "median_us"), ("kernels", "device_us")):
            values = [f"{getattr(rows[mode], field):.0f}" for mode in modes]
            lines.append([f"batch {batch}: {name}", *values])
        copies = [rows[mode].copy_us for mode in modes]
        values = ["" if us is None else f"{us:.0f}" for us in copies]
        lines.append([f"batch {batch}: bare copies of the states", *values])
    return markdown(("microseconds", *(f"`{mode}`" for mode in modes)), iter(lines))


BLOCKS: dict[str, Callable[..., str]] = {
    "arguments": arguments,
    "fields": fields,
    "origin": origin,
    "speed": speed,
    "ratio-4": ratio_4,
    "bf16-state": bf16_state,
    "layouts": layouts,
    "triton": triton,
    "host": host,
    "step": step,
}


if __name__ == "__main__":
    main()
