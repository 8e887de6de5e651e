"""Tables in the documentation that are made from declarations and results files.

A document holds blocks between `<!-- NAME -->` and `<!-- end -->`. `make docs` makes them anew.
A test compares them with what they are made from, so no figure is typed in by hand.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvfold.bench.plot import plot_kernels, plot_model_step, plot_transformers
from kvfold.bench.records import (
    AdapterReport,
    KernelReport,
    KernelRow,
    ModelStepReport,
    StepReport,
    TransformersReport,
    load,
)
from kvfold.codegen import Variant, load_table, op_spec, op_specs
from kvfold.codegen.documentation import (
    argument_rows,
    field_rows,
    format_field_rows,
    markdown,
    page_picture,
)
from kvfold.codegen.spec import BACKENDS
from kvfold.codegen.table import row_text
from kvfold.workload import workload

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md", "docs/performance.md", "docs/step.md", "docs/fields.md", "docs/formats.md",
    "docs/engines.md",
)  # fmt: skip
RESULTS = ROOT / "bench" / "results" / "h200"
_BLOCK = re.compile(r"(<!-- ([\w.: -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)

DECODE, PREFILL = "paged_kv_compress", "prefill_compress"
DECODE_STORE, PREFILL_STORE = "paged_kv_compress_store", "prefill_compress_store"
SIZES = (1, 16, 64, 128, 256, 512)
TOKENS = (1024, 8192, 65536)
WAYS = ("none", "metadata", "state")  # of prefetch
STEADY = ("all-hit", "spread", "no-hit")
SHAPES = {  # of prompts
    "ratio 128": {"compress_ratio": 128},
    "ratio 4": {"compress_ratio": 4},
    "ratio 4, head_dim 128": {"compress_ratio": 4, "head_dim": 128},
}
HEAD_DIMS, ROPE_DIM, ROWS_PER_PAGE = (512, 128), 64, 64  # of the pages of docs/formats.md


def rewritten(text: str) -> str:
    """A document's text with every block made anew. Raises KeyError for an unknown block."""

    def block(found: re.Match) -> str:
        name, *words = found[2].split(" ")
        try:
            made = BLOCKS[name](*words)
        except FileNotFoundError:
            made = "Not measured yet."
        return f"{found[1]}{made}\n{found[3]}"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Rewrites every document in place."""
    for name in DOCUMENTS:
        file = ROOT / name
        file.write_text(rewritten(file.read_text()))
        print(f"wrote {name}")
    for op, name, wanted in (
        (DECODE, "speed.png", _in_speed),
        (PREFILL, "prefill.png", _in_prefill),
        (DECODE_STORE, "store.png", _in_store),
    ):
        if not (RESULTS / f"{op}.json").exists():
            continue
        results = Results.of(op)
        rows = [row for row in results.report.rows if wanted(results, row)]
        plot_kernels(replace(results.report, rows=rows), RESULTS / name)
        print(f"drew {name}")
    if (RESULTS / "model_step.json").exists():
        plot_model_step(_model_step(), RESULTS / "model_step.png")
        print("drew model_step.png")
    if (RESULTS / "transformers.json").exists():
        plot_transformers(_transformers(), RESULTS / "transformers.png")
        print("drew transformers.png")


def _in_speed(results: "Results", row: KernelRow) -> bool:
    """Whether the plot of the production problem has a row."""
    plain = row.prefetch in ("none", "state") and row.scenario in STEADY and row.size in SIZES
    return plain and results.is_of(row)


def _in_prefill(results: "Results", row: KernelRow) -> bool:
    """Whether the plot of whole prompts has a row."""
    plain = row.prefetch in ("none", "state") and row.scenario == "whole" and row.size in TOKENS
    return plain and any(results.is_of(row, problem) for problem in SHAPES.values())


def _in_store(results: "Results", row: KernelRow) -> bool:
    """Whether the plot of decode steps that store rows in the cache has a row."""
    if row.prefetch == "metadata" or row.backend != "cuda":
        return False
    of_a_layer = [{}, {"next_n": 1}, {"compress_ratio": 4}, {"compress_ratio": 4, "next_n": 1}]
    return any(results.is_of(row, one | {"kv_dtype": "fp32"}) for one in of_a_layer)


# ---- declarations --------------------------------------------------------------------------------


def arguments(op: str, *without: str) -> str:
    """The argument table of an op, without the arguments that other ops have too."""
    known = {row[0] for other in without for row in argument_rows(op_spec(other))}
    rows = (row for row in argument_rows(op_spec(op)) if row[0] not in known)
    return markdown(("argument", "shape", "dtype or values", "meaning"), rows)


def fields(op: str) -> str:
    """The table of the fields of a row."""
    rows = ([f"`{name}`", *rest] for name, *rest in field_rows(op_spec(op)))
    return markdown(("field", "kind", "legal", "default", "meaning"), rows)


def format_fields() -> str:
    """The table of the fields of a cache format."""
    rows = ([f"`{name}`", *rest] for name, _, *rest in format_field_rows())
    return markdown(("field", "legal", "default", "meaning"), rows)


def supported() -> str:
    """What the shipped table serves, by op and backend."""
    table, lines = load_table(), []
    for name, spec in op_specs().items():
        stores_rows = any(one.name == "format" for one in spec.arguments.declared_scalars())
        formats = f"all {len(table.formats)}" if stores_rows else ""
        cells = [_served([v for v in table.variants if v.op == name], b) for b in BACKENDS]
        lines.append([f"`{name}`", *cells, "any ratio", formats])
    heads = ("op", "CUDA", "Triton", "reference", "cache formats")
    return markdown(heads, lines)


def _served(variants: Sequence[Variant], backend: str) -> str:
    """The ratios and the head_dims that variants of a backend serve."""
    head_dims: dict[int, set[int]] = {}  # by ratio; 0: any
    for one in variants:
        if one.backend == backend:
            fields = one.problem.values()
            dims = head_dims.setdefault(fields.get("compress_ratio", 0), set())
            dims |= {fields["head_dim"]} if "head_dim" in fields else set()
    ratios: dict[tuple[int, ...], list[str]] = {}
    for ratio, dims in sorted(head_dims.items()):
        ratios.setdefault(tuple(sorted(dims)), []).append(str(ratio or "any"))
    return "; ".join(
        f"ratio {', '.join(found)}" + (f", head_dim {', '.join(map(str, dims))}" if dims else "")
        for dims, found in ratios.items()
    )


def cache_formats() -> str:
    """The shipped cache formats: bytes of a row."""
    lines = []
    for name, format in load_table().formats.items():
        layouts = [format.layout(head_dim, ROPE_DIM) for head_dim in HEAD_DIMS]
        sizes = [f"{one.data_bytes} + {one.scale_bytes}" for one in layouts]
        lines.append([f"[`{name}`](#{name})", *sizes])
    return markdown(("format", *(f"head_dim {head_dim}" for head_dim in HEAD_DIMS)), lines)


def cache_format(name: str) -> str:
    """A cache format's entry in the table, and a page of it to the byte."""
    format = load_table().formats[name]
    layouts = [format.layout(head_dim, ROPE_DIM, ROWS_PER_PAGE) for head_dim in HEAD_DIMS]
    entry = f"  {name}: {row_text(format.given())}"
    return f"```yaml\n{entry}\n```\n```\n{page_picture(layouts)}\n```"


# ---- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """The committed results of an op's suite. A row has all fields of its problem and options."""

    op: str
    report: KernelReport

    @classmethod
    def of(cls, op: str) -> "Results":
        """Reads the results of an op."""
        report = load(KernelReport, RESULTS / f"{op}.json")
        rows = [replace(row, **_complete(op, row.problem, row.options)) for row in report.rows]
        return cls(op, replace(report, rows=rows))

    def is_of(
        self, row: KernelRow, problem: Mapping | None = None, options: Mapping | None = None
    ) -> bool:
        """Whether a row is of this problem and case; what is left out is the workload's default."""
        fields = {**workload(self.op).defaults, **(problem or {})}
        wanted = _complete(self.op, fields, options or {})
        return {"problem": row.problem, "options": row.options} == wanted

    def chosen(
        self,
        scenario: str,
        problem: Mapping | None = None,
        options: Mapping | None = None,
        by: str = "table",
        prefetch: str = "none",
        backend: str = "cuda",
    ) -> dict[int, KernelRow]:
        """Size -> row, of one line of a table. `by` may name a yardstick."""
        return {
            row.size: row
            for row in self.report.rows
            if (row.scenario, row.prefetch, row.backend) == (scenario, prefetch, backend)
            and by in (row.chosen_by, row.variant)
            and self.is_of(row, problem, options)
        }


def _complete(op: str, problem: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, dict]:
    return {
        "problem": op_spec(op).problem.of(problem).values(),
        "options": workload(op).options.of(options).values(),
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


def _us_percent(row: KernelRow) -> str:
    return f"{_us(row)} us ({_percent(row)})"


def origin(op: str = DECODE) -> str:
    """Where the figures come from, in one sentence."""
    report = Results.of(op).report
    commit = (report.commit or "")[:7]
    return (
        f"{report.device}, {report.date[:10]}, commit {commit}. It reads"
        f" {report.read_bandwidth_gbs:.0f} GB/s; an empty graph node takes"
        f" {report.empty_node_us:.2f} us."
    )


# ---- decode --------------------------------------------------------------------------------------


def speed() -> str:
    """The README's table: the production problem over batch sizes."""
    results = Results.of(DECODE)
    lines = []
    for scenario in STEADY:
        plain, early = (results.chosen(scenario, prefetch=way) for way in ("none", "state"))
        lines.append(_line(f"{scenario}: the limit", plain, SIZES, _limit))
        lines.append(_line(f"{scenario}: kvfold", plain, SIZES, _us))
        lines.append(_line(f"{scenario}: kvfold, prefetch", early, SIZES, _us))
        lines.append(_line("the same, efficiency", early, SIZES, _percent))
    yardstick = results.chosen("all-hit", by="row_by_row")
    lines.append(_line("all-hit: one warp, row by row", yardstick, SIZES, _us))
    return markdown(("microseconds at batch", *map(str, SIZES)), iter(lines))


def next_n_1() -> str:
    """One new token per request, all windows closing, by prefetch."""
    results, sizes = Results.of(DECODE), (16, 128, 512)
    lines = []
    for ratio in (128, 4):
        problem = {"compress_ratio": ratio, "next_n": 1}
        found = {way: results.chosen("all-hit", problem, prefetch=way) for way in WAYS}
        lines.append(_line(f"ratio {ratio}: the limit", found["none"], sizes, _limit))
        lines += [_line(f'ratio {ratio}: "{way}"', found[way], sizes, _us2) for way in WAYS]
    return markdown(("next_n 1, all-hit, us at batch", *map(str, sizes)), iter(lines))


def large_batches() -> str:
    """Batches above 512, with prefetch."""
    results, sizes = Results.of(DECODE), (256, 512, 1024, 2048, 4096)
    lines = []
    for name, scenario, problem in (
        ("ratio 4, all-hit", "all-hit", {"compress_ratio": 4}),
        ("ratio 128, spread", "spread", {}),
    ):
        found = results.chosen(scenario, problem, prefetch="state")
        lines.append(_line(name, found, sizes, _us))
        lines.append(_line("the limit", found, sizes, _limit))
        lines.append(_line("efficiency", found, sizes, _percent))
    return markdown(("next_n 4, us at batch", *map(str, sizes)), iter(lines))


def ratio_4() -> str:
    """Ratio 4, all windows closing, with prefetch."""
    results, sizes = Results.of(DECODE), (16, 64, 128, 256, 512)
    lines = []
    for head_dim in (512, 128):
        for next_n in (1, 4):
            problem = {"head_dim": head_dim, "compress_ratio": 4, "next_n": next_n}
            found = results.chosen("all-hit", problem, prefetch="state")
            name = f"head_dim {head_dim}, next_n {next_n}"
            lines.append(_line(name, found, sizes, _us2))
            lines.append(_line("the limit", found, sizes, lambda row: f"{row.limit_us:.2f}"))
    return markdown(("ratio 4, all-hit, us at batch", *map(str, sizes)), iter(lines))


def bf16_state() -> str:
    """State in bf16 against fp32, with prefetch."""
    results, sizes = Results.of(DECODE), (16, 64, 128, 256, 512)
    lines = []
    for scenario in STEADY:
        for dtype in ("bf16", "fp32"):
            found = results.chosen(scenario, {"state_dtype": dtype}, prefetch="state")
            lines.append(_line(f"{scenario}: {dtype}, us", found, sizes, _us2))
            lines.append(_line("the same, efficiency", found, sizes, _percent))
    return markdown(("state at batch", *map(str, sizes)), iter(lines))


def layouts() -> str:
    """Page sizes and pool layouts, with prefetch."""
    results = Results.of(DECODE)
    lines = [
        _line(name, results.chosen("all-hit", options=options, prefetch="state"), SIZES, _us2)
        for name, options in (
            ("pages of 32 rows, two pools", {}),
            ("pages of 128 rows", {"page_size": 128}),
            ("one packed pool", {"layout": "packed"}),
        )
    ]
    return markdown(("all-hit, us at batch", *map(str, SIZES)), iter(lines))


def pages() -> str:
    """Small pages and wide block tables, with prefetch."""
    results, sizes = Results.of(DECODE), (16, 256)
    cases: dict[str, dict] = {"pages of 1 row": {"page_size": 1}}
    cases |= {f"pages of {rows} rows": {"page_size": rows} for rows in (2, 4, 8, 32)}
    cases["pages of 32 rows, block tables of 262,144 columns"] = {"max_pages": 262_144}
    lines = []
    for name, options in cases.items():
        times = []
        for ratio in (128, 4):
            problem = {"compress_ratio": ratio}
            found = results.chosen("all-hit", problem, options, prefetch="state")
            times += _line("", found, sizes, _us2)[1:]
        lines.append([name, *times])
    heads = (f"ratio {ratio}, batch {size}" for ratio in (128, 4) for size in sizes)
    return markdown(("all-hit, us", *heads), iter(lines))


def variations() -> str:
    """next_n 8 and raw scores against the production problems, with prefetch."""
    results, sizes = Results.of(DECODE), (16, 256)
    lines = []
    for ratio in (128, 4):
        for name, fields in (
            ("next_n 4", {}),
            ("next_n 8", {"next_n": 8}),
            ("next_n 4, ape_in_state=False", {"ape_in_state": False}),
        ):
            problem = {"compress_ratio": ratio, **fields}
            found = results.chosen("all-hit", problem, prefetch="state")
            lines.append(_line(f"ratio {ratio}, {name}", found, sizes, _us2))
            lines.append(_line("the same, efficiency", found, sizes, _percent))
    return markdown(("all-hit, us at batch", *map(str, sizes)), iter(lines))


def triton() -> str:
    """Triton against CUDA, both without prefetch."""
    results, sizes = Results.of(DECODE), (16, 128, 256, 512)
    lines = []
    for scenario in STEADY:
        other = results.chosen(scenario, by="override", backend="triton")
        lines.append(_line(f"{scenario}: Triton", other, sizes, _us2))
        lines.append(_line(f"{scenario}: CUDA", results.chosen(scenario), sizes, _us2))
    return markdown(("us at batch", *map(str, sizes)), iter(lines))


def host(op: str = DECODE) -> str:
    """Host time of an eager call, median over the measured points."""
    measured = [row.host_us for row in Results.of(op).report.rows if row.host_us]
    names = {
        "call": f"`kvfold.{op}`, repeated call",
        "torch_ops": f"`torch.ops.kvfold.{op}`, repeated call",
        "unrepeated": f"`kvfold.{op}`, not a repeated call",
        "triton": "Triton's launcher, the same arguments",
    }
    lines = []
    for way, name in names.items():
        times = sorted(one[way] for one in measured if way in one)
        lines.append([name, f"{times[len(times) // 2]:.1f}"])
    return markdown(("host time of an eager call", "us"), iter(lines))


# ---- prefill -------------------------------------------------------------------------------------


def prefill() -> str:
    """The README's table: whole prompts over tokens, of whose state the tail is written."""
    results = Results.of(PREFILL)
    lines = []
    for name, problem in SHAPES.items():
        plain, early = (results.chosen("whole", problem, prefetch=w) for w in ("none", "state"))
        lines.append(_line(f"{name}: the limit", plain, TOKENS, _limit))
        lines.append(_line(f"{name}: kvfold", plain, TOKENS, _us))
        lines.append(_line(f"{name}: kvfold, prefetch", early, TOKENS, _us))
        lines.append(_line("the same, efficiency", early, TOKENS, _percent))
    return markdown(("one prompt, microseconds at tokens", *map(str, TOKENS)), iter(lines))


def prefill_state() -> str:
    """Whole prompts by input dtype and by what is stored, with prefetch."""
    results = Results.of(PREFILL)
    lines = []
    for name, problem in SHAPES.items():
        for dtype in ("bf16", "fp32"):
            for stored in ("tail", "all"):
                found = results.chosen(
                    "whole",
                    problem | {"kv_dtype": dtype},
                    {"write_state": stored},
                    prefetch="state",
                )
                lines.append([name, dtype, stored, *_line("", found, TOKENS, _us_percent)[1:]])
    heads = ("problem", "input", "write_state", *(f"{tokens} tokens" for tokens in TOKENS))
    return markdown(heads, iter(lines))


def prefill_copy() -> str:
    """Writing the whole state, against the bandwidth of a copy measured in the same run."""
    results = Results.of(PREFILL)
    copy = results.report.copy_bandwidth_gbs
    lines = []
    for requests, tokens in ((1, 65536), (8, 524288)):
        options = {"write_state": "all", "requests": requests}
        row = results.chosen("whole", options=options, prefetch="state").get(tokens)
        if row is not None:
            bandwidth = row.moved_bytes / (1000 * row.median_us)
            share = f"{100 * bandwidth / copy:.0f} %"
            lines.append([f"{requests} x 65536", _us(row), f"{bandwidth:.0f}", share])
    heads = ("requests x tokens", "us", "GB/s", f"of a copy's {copy:.0f} GB/s")
    return markdown(heads, iter(lines))


def prefill_cases() -> str:
    """Other requests, other states and other ratios."""
    results = Results.of(PREFILL)
    cases: list[tuple[str, str, dict, dict, int]] = []
    for ratio in (128, 4):
        problem = {"compress_ratio": ratio}
        restarts = {"max_rollback": 8, "state_period": 256}
        cases += [
            (f"ratio {ratio}: 8 prompts", "whole", problem, {"requests": 8}, 65536),
            (f"ratio {ratio}: a prompt alone", "whole", problem, {}, 65536),
            (f"ratio {ratio}: beside 255 requests of one token", "mixed", problem, {}, 65791),
            (f"ratio {ratio}: a chunk", "chunk", problem, {}, 8192),
            (f"ratio {ratio}: max_rollback 8, state_period 256", "whole", problem, restarts, 8192),
            (f"ratio {ratio}: bf16 state", "whole", problem | {"state_dtype": "bf16"}, {}, 65536),
        ]
    cases.append(("ratio 2", "whole", {"compress_ratio": 2}, {}, 65536))
    lines = []
    for name, scenario, problem, options, tokens in cases:
        found = [
            results.chosen(scenario, problem, options, prefetch=way).get(tokens) for way in WAYS
        ]
        plain, *_, early = found
        if plain is not None and early is not None:
            times = [_us(row) if row is not None else "" for row in found]
            lines.append([name, str(tokens), _limit(plain), *times, _percent(early)])
    heads = ("write_state tail", "tokens", "limit", *(f'"{way}"' for way in WAYS), "efficiency")
    return markdown(heads, iter(lines))


def prefill_decode() -> str:
    """256 requests of 1 to 4 tokens through either op."""
    lines = []
    for ratio in (128, 4):
        for op, scenario, size, options in (
            (PREFILL, "decode", 640, {"write_state": "all"}),
            (DECODE, "ragged", 256, {}),
        ):
            results = Results.of(op)
            found = [
                results.chosen(scenario, {"compress_ratio": ratio}, options, prefetch=way).get(size)
                for way in WAYS
            ]
            times = [_us2(row) if row is not None else "" for row in found]
            lines.append([f"ratio {ratio}: `{op}`", *times])
    heads = ("256 requests of 1 to 4 tokens, us", *(f'"{way}"' for way in WAYS))
    return markdown(heads, iter(lines))


def prefill_triton() -> str:
    """Triton against CUDA, both without prefetch."""
    results = Results.of(PREFILL)
    lines = []
    for ratio in (128, 4):
        problem = {"compress_ratio": ratio}
        other = results.chosen("whole", problem, by="override", backend="triton")
        lines.append(_line(f"ratio {ratio}: Triton", other, (8192,), _us))
        found = results.chosen("whole", problem)
        lines.append(_line(f"ratio {ratio}: CUDA", found, (8192,), _us))
    return markdown(("one prompt, us at tokens", "8192"), iter(lines))


# ---- to the cache --------------------------------------------------------------------------------

INDEXER = {"format": "fp8_block128", "rotate": True}


def model_step() -> str:
    """The three store ops of a pair of layers, by next_n and batch."""
    rows = _model_step().rows
    lines = [
        ["kvfold", *(f"{row.median_us:.1f}" for row in rows)],
        ["the limit", *(f"{row.limit_us:.1f}" for row in rows)],
    ]
    for name in rows[0].alone_us:
        lines.append([f"{name} alone", *(f"{row.alone_us[name]:.1f}" for row in rows)])
    heads = (f"next_n {row.next_n}, batch {row.batch}" for row in rows)
    return markdown(("microseconds", *heads), iter(lines))


def _model_step() -> ModelStepReport:
    return load(ModelStepReport, RESULTS / "model_step.json")


def decode_store() -> str:
    """Decode steps that store rows in the cache, with fp32 input, by prefetch."""
    results, sizes, ways = Results.of(DECODE_STORE), (16, 128, 256), ("none", "state")
    lines = []
    for name, scenario, problem, options in (
        ("ratio 128, next_n 1, spread", "spread", {"next_n": 1}, {}),
        ("ratio 128, next_n 1, all-hit", "all-hit", {"next_n": 1}, {}),
        ("ratio 128, next_n 4, spread", "spread", {}, {}),
        ("ratio 128, next_n 4, all-hit", "all-hit", {}, {}),
        ("ratio 4, next_n 1, spread", "spread", {"compress_ratio": 4, "next_n": 1}, {}),
        ("ratio 4, next_n 4, all-hit", "all-hit", {"compress_ratio": 4}, {}),
        ("indexer, next_n 1, spread", "spread",
         {"compress_ratio": 4, "next_n": 1, "head_dim": 128}, INDEXER),
        ("indexer, next_n 4, all-hit", "all-hit",
         {"compress_ratio": 4, "head_dim": 128}, INDEXER),
    ):  # fmt: skip
        problem = problem | {"kv_dtype": "fp32"}
        found = [results.chosen(scenario, problem, options, prefetch=way) for way in ways]
        times = [_line("", one, sizes, _us2)[1:] for one in found]
        limits = _line("", found[0], sizes, _limit)[1:]
        lines.append([name, " / ".join(limits), *(" / ".join(one) for one in times)])
    batches = " / ".join(map(str, sizes))
    heads = (f"us at batch {batches}", "limit", *(f'"{way}"' for way in ways))
    return markdown(heads, iter(lines))


def prefill_store() -> str:
    """Whole prompts whose rows are stored in the cache, against those whose rows are not."""
    results, plain = Results.of(PREFILL_STORE), Results.of(PREFILL)
    sizes = (8192, 65536)
    lines = []
    for name, problem in SHAPES.items():
        options = INDEXER if "head_dim" in problem else {}
        found = results.chosen("whole", problem, options, prefetch="state")
        lines.append(_line(f"{name}: the limit", found, sizes, _limit))
        lines.append(_line(f"{name}: `{PREFILL_STORE}`", found, sizes, _us))
        found = plain.chosen("whole", problem, prefetch="state")
        lines.append(_line(f"{name}: `{PREFILL}`", found, sizes, _us))
    return markdown(("one prompt, us at tokens", *map(str, sizes)), iter(lines))


def rows() -> str:
    """norm_rope_store over rows, by format."""
    results, sizes = Results.of("norm_rope_store"), (16, 512, 16384)
    lines = []
    for head_dim, name, options in (
        (512, "mixed_584", {}),
        (512, "bf16", {"format": "bf16"}),
        (512, "fp8_528", {"format": "fp8_528"}),
        (512, "fp4_288", {"format": "fp4_288"}),
        (128, "fp8_block128, rotate", INDEXER),
        (128, "mxfp4, rotate", {"format": "mxfp4", "rotate": True}),
    ):
        problem = {"head_dim": head_dim}
        early = results.chosen("store", problem, options, prefetch="metadata")
        lines.append(_line(f"head_dim {head_dim}, {name}", early, sizes, _us2))
    triton = results.chosen("store", by="override", backend="triton")
    lines.append(_line("head_dim 512, mixed_584, Triton", triton, sizes, _us2))
    return markdown(("us at rows", *map(str, sizes)), iter(lines))


def located() -> str:
    """locate_rows over output rows."""
    results, sizes = Results.of("locate_rows"), (64, 512, 4096, 32768)
    lines = [
        _line(scenario, results.chosen(scenario), sizes, _us2) for scenario in ("decode", "prompts")
    ]
    return markdown(("us at rows", *map(str, sizes)), iter(lines))


# ---- a step --------------------------------------------------------------------------------------


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


# ---- engines -------------------------------------------------------------------------------------


def transformers() -> str:
    """A decode step of a model of transformers, by batch and context."""
    report = _transformers()
    names = list(report.rows[0].step_ms)
    lines = [
        [
            f"{row.batch}, {row.context // 1024}k",
            *(f"{row.step_ms[name]:.1f} ({row.compressors_ms[name]:.2f})" for name in names),
        ]
        for row in report.rows
    ]
    table = markdown(("batch, context", *names), iter(lines))
    return f"{table}\n\n{report.device}, {report.date[:10]}, commit {(report.commit or '')[:7]}."


def one_graph() -> str:
    """What a graph gives at batch 1, in one sentence."""
    report = _transformers()
    rows = [row for row in report.rows if row.batch == 1]

    def times(name: str) -> str:
        return " and ".join(f"{row.step_ms[name]:.1f}" for row in rows)

    contexts = " and ".join(f"{row.context // 1024}k" for row in rows)
    return (
        f"A decode step of four layers of the real sizes, batch 1, at contexts of {contexts}:"
        f" {times('kvfold, one graph')} ms, without kvfold {times('transformers')} ms"
        f" ({report.device})."
    )


def _transformers() -> TransformersReport:
    return load(TransformersReport, RESULTS / "transformers.json")


def adapters() -> str:
    """The host's part of engines' calls."""
    report = load(AdapterReport, RESULTS / "adapters.json")
    lines = [
        [row.engine, row.call]
        + [f"{us:.1f}" for us in (row.adapter_us, row.ops_us, row.adapter_us - row.ops_us)]
        for row in report.rows
    ]
    table = markdown(("engine", "call", "adapter", "bare ops", "difference"), iter(lines))
    return f"{table}\n\n{report.device}, {report.date[:10]}, commit {(report.commit or '')[:7]}."


BLOCKS: dict[str, Callable[..., str]] = {
    "arguments": arguments,
    "supported": supported,
    "fields": fields,
    "format-fields": format_fields,
    "formats": cache_formats,
    "format": cache_format,
    "origin": origin,
    "speed": speed,
    "next-n-1": next_n_1,
    "large-batches": large_batches,
    "ratio-4": ratio_4,
    "bf16-state": bf16_state,
    "layouts": layouts,
    "pages": pages,
    "variations": variations,
    "triton": triton,
    "host": host,
    "prefill": prefill,
    "prefill-state": prefill_state,
    "prefill-copy": prefill_copy,
    "prefill-cases": prefill_cases,
    "prefill-decode": prefill_decode,
    "prefill-triton": prefill_triton,
    "model-step": model_step,
    "decode-store": decode_store,
    "prefill-store": prefill_store,
    "rows": rows,
    "located": located,
    "step": step,
    "transformers": transformers,
    "one-graph": one_graph,
    "adapters": adapters,
}


if __name__ == "__main__":
    main()
