"""The command line: parses, calls the library, prints. `kvfold --help` lists the commands."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvfold import dispatch, nvrtc
from kvfold.bench import build as building
from kvfold.bench import cases, limit, report, rows, runner, show, step_plot, tune_gpu, tune_report
from kvfold.bench import demo as simulation
from kvfold.bench import plot as plotting
from kvfold.bench import step as stepping
from kvfold.bench import tune as search
from kvfold.bench.step_model import Shape, trace
from kvfold.bench.verify import WrongResult
from kvfold.codegen import load_table
from kvfold.codegen.variant import check_arch
from kvfold.ops.paged_kv_compress.op import OP

app = typer.Typer(
    rich_markup_mode="markdown",
    name="kvfold",
    help="GPU kernels for the KV compressor of models with compressed attention: what is in the"
    " table, whether it compiles, whether it is right, how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
table_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    table_app,
    name="table",
    help="Look at the table of kernels (configs.yaml, or the file that KVFOLD_CONFIG names).",
)

HeadDim = Annotated[int, typer.Option(help="Columns of a compressed row.")]
CompressRatio = Annotated[int, typer.Option(help="Tokens per window.")]
Overlap = Annotated[
    bool | None,
    typer.Option(
        "--overlap/--no-overlap",
        help="Whether a window takes in the one before it; by default at ratio 4 only.",
        show_default=False,
    ),
]
KvDtype = Annotated[str, typer.Option(help="Of the new tokens: bf16 or fp32.")]
StateDtype = Annotated[str, typer.Option(help="Of the paged state: bf16 or fp32.")]
NextN = Annotated[int, typer.Option(help="The most new tokens per request and step.")]

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the results.", show_default=False),
]
FromFile = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Show, and with --plot draw, what --json wrote before; measures nothing.",
        show_default=False,
    ),
]

BATCHES = ",".join(map(str, runner.BATCHES))
SCENARIOS = ",".join(cases.SCENARIOS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, 1 for a kernel that is wrong, 2 for a wrong input."""
    app(args=arguments, prog_name="kvfold")


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what a user can cause into one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # `kvfold table list | head`: typer ends it in silence
            raise
        except (ValueError, OSError) as error:  # TableError is a ValueError
            _fail(error, 2)
        except (WrongResult, nvrtc.CompileError, torch.OutOfMemoryError) as error:
            _fail(error, 1)

    return wrapped


def _fail(error: object, code: int) -> None:
    typer.echo(f"kvfold: {error}", err=True)
    raise typer.Exit(code)


def _console() -> Console:
    """Standard output; wide enough for every table where it is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200
    return console


def _progress() -> Progress:
    """A progress bar on stderr, if that is a terminal, that leaves nothing behind."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _list(name: str, text: str, kind: type = str) -> tuple:
    """The items of an option that takes '1,16,64', each once."""
    try:
        return tuple(dict.fromkeys(kind(item.strip()) for item in text.split(",")))
    except ValueError:
        raise ValueError(f"{name} is {text!r}; accepted: integers, as in 1,16,64") from None


def _check_writable(json_file: Path | None) -> None:
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"--json {json_file}: {json_file.parent} is no directory")


def _refuse_with_from(json_file: Path | None) -> None:
    if json_file is not None:
        raise ValueError("--from measures nothing, so there is nothing for --json to write")


def _refuse_without_gpu(*files: Path | None) -> None:
    if any(file is not None for file in files):
        raise ValueError("no CUDA GPU here, so no times for --json or --plot to write")


def _without_none(**values: object) -> dict:
    return {name: value for name, value in values.items() if value is not None}


# ---- kvfold table --------------------------------------------------------------------------------


@table_app.command("list")
@clear_errors
def table_list(
    every: Annotated[
        bool, typer.Option("--all", help="One line per variant, not per row.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All variants, as JSON.")] = False,
) -> None:
    """Show the table in force: its rows and how many variants each stands for."""
    table = load_table()
    if as_json:
        print(json.dumps(show.table_json(table), indent=1))
        return
    console = _console()
    console.print(f"{table.path}: {show.counts(table)}", soft_wrap=True)
    for view in show.table_variants(table) if every else show.table_rows(table):
        console.print(view)


@table_app.command("check")
@clear_errors
def table_check(file: Annotated[Path, typer.Argument(help="A table, as YAML.")]) -> None:
    """Say whether a table is valid: OK, or what is wrong where, and exit code 2."""
    print(f"{file}: OK: {show.counts(load_table(file))}")


@table_app.command("explain")
@clear_errors
def table_explain(
    batch: Annotated[int, typer.Option(help="Requests in the step.")],
    head_dim: HeadDim = 512,
    compress_ratio: CompressRatio = 128,
    overlap: Overlap = None,
    kv_dtype: KvDtype = "bf16",
    state_dtype: StateDtype = "fp32",
    next_n: NextN = 4,
    backend: Annotated[str, typer.Option(help="cuda or triton.")] = "cuda",
    arch: Annotated[
        str, typer.Option(help="Of the GPU, as sm_90; any: no GPU's own rows.")
    ] = "any",
) -> None:
    """Say which variant a problem gets, and why."""
    table = load_table()
    problem = _without_none(
        head_dim=head_dim, compress_ratio=compress_ratio, overlap=overlap, kv_dtype=kv_dtype,
        state_dtype=state_dtype, next_n=next_n,
    )  # fmt: skip
    variant = table.select(OP, batch=batch, backend=backend, arch=arch, **problem)
    console = _console()
    for view in show.explanation(table, variant, batch, arch):
        console.print(view)


# ---- kvfold build --------------------------------------------------------------------------------


@app.command()
@clear_errors
def build(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU to compile for, as sm_90; may be repeated. By default this machine's GPU,"
            " without one sm_90.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write the cubins to.", show_default=False)
    ] = None,
    emit: Annotated[
        bool, typer.Option("--emit", help="Write the generated sources to --out, too.")
    ] = False,
) -> None:
    """Compile every CUDA variant of the table, in parallel. Needs no GPU."""
    table = load_table()
    archs = list(dict.fromkeys(arch or [_own_arch()]))
    for name in archs:
        check_arch(name)
        if name == "any":
            raise ValueError("arch any cannot be compiled for; accepted: a GPU's, as in sm_90")
    if emit and out is None:
        raise ValueError("--emit needs --out DIR, where to write the sources")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if emit:
        for file in building.emit(table, out):
            print(f"wrote {file}")
    if why := nvrtc.available():
        _fail(f"no NVRTC here ({why}); pip install 'kvfold[cuda]'", 1)
    jobs = [(variant, name) for name in archs for variant in building.variants_for(table, name)]
    compiled = []
    with _progress() as progress:
        task = progress.add_task("compiling", total=len(jobs))
        for one in building.compile_all(jobs):
            if out is not None:
                building.write_cubin(one, out)
            compiled.append(one)
            progress.advance(task)
    _console().print(show.built(jobs, compiled))
    spilling = sum(one.spill_bytes > 0 for one in compiled)
    where = f", cubins in {out}" if out is not None else ""
    print(f"{len(compiled)} variants compiled for {', '.join(archs)}; {spilling} spill{where}")


def _own_arch() -> str:
    if not torch.cuda.is_available():
        return "sm_90"
    return dispatch.arch_of(torch.device("cuda", torch.cuda.current_device()))


# ---- kvfold demo ---------------------------------------------------------------------------------


@app.command()
@clear_errors
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to simulate.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda; by default cuda where there is a GPU.", show_default=False),
    ] = None,
) -> None:
    """Simulate decoding with speculative tokens and check every compressed row."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; accepted: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA GPU here; accepted: cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _progress() as progress:
        task = progress.add_task("decoding", total=steps)
        done = simulation.run(steps, device, seed, on_step=lambda: progress.advance(task))
    _console().print(show.summary(done))
    if done.wrong:
        _fail(f"{done.wrong} rows are wrong, the first at {done.first_wrong}", 1)


# ---- kvfold bench --------------------------------------------------------------------------------


@app.command()
@clear_errors
def bench(
    head_dim: HeadDim = 512,
    compress_ratio: CompressRatio = 128,
    overlap: Overlap = None,
    kv_dtype: KvDtype = "bf16",
    state_dtype: StateDtype = "fp32",
    next_n: NextN = 4,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = BATCHES,
    scenario: Annotated[
        str,
        typer.Option(
            help="all-hit: every request closes a window. spread: one in compress_ratio / next_n"
            " does. no-hit: none does. Separated by commas."
        ),
    ] = SCENARIOS,
    page_size: Annotated[
        str, typer.Option(help="Tokens per page, several separated by commas.")
    ] = "32",
    layout: Annotated[
        str, typer.Option(help="split: KV and score in two pools. packed: side by side in one.")
    ] = "split",
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Time the dispatched variant with another reduce_warps, head_slice or backend, in"
            " the table or not; may be repeated.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline",
            help="Time the dispatched variant and, beside it, the override (by default"
            " reduce_warps=1) and the yardstick: one warp per window, online softmax row by row.",
        ),
    ] = False,
    warm_l2: Annotated[
        bool, typer.Option("--warm-l2", help="Replay one state, so that it stays in the L2.")
    ] = False,
    prefetch_state: Annotated[
        bool,
        typer.Option(
            "--prefetch-state",
            help="Time what the table chose a second time, with prefetch_state=True.",
        ),
    ] = False,
    json_file: JsonFile = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="Add to the --json file, with the limit measured there."),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw time over batch size.", show_default=False),
    ] = None,
    source: FromFile = None,
) -> None:
    """Time the kernels against the memory's speed; each is checked before it is timed.

    Without a GPU nothing is timed: the op is checked on the CPU, at small batch sizes.
    """
    if plot is not None:
        plotting.require(plot)
    if source is not None:
        _refuse_with_from(json_file)
        _show(report.load(source), plot)
        return
    changes = _assignments(override or [])
    plan = runner.Plan(
        problem=_without_none(
            head_dim=head_dim, compress_ratio=compress_ratio, overlap=overlap, kv_dtype=kv_dtype,
            state_dtype=state_dtype, next_n=next_n,
        ),
        batches=_list("--batch", batch, int),
        scenarios=_list("--scenario", scenario),
        page_sizes=_list("--page-size", page_size, int),
        layout=layout,
        override=changes or ({"reduce_warps": 1} if baseline else {}),
        baseline=baseline,
        warm_l2=warm_l2,
        prefetch_state=prefetch_state,
    )  # fmt: skip
    if append and json_file is None:
        raise ValueError("--append adds to a file, which --json must name")
    _check_writable(json_file)
    if not torch.cuda.is_available():
        _refuse_without_gpu(json_file, plot)
        _check_on_cpu(plan)
        return
    before = report.extended(report.load(json_file), []) if append else None
    device = torch.device("cuda", torch.cuda.current_device())
    with _progress() as progress:
        task = progress.add_task("measuring the limit", total=len(plan.points()))
        done = runner.measure(
            plan,
            device,
            lambda point: progress.update(task, description=str(point), advance=1),
            before and limit.of(before),
        )
    if json_file is not None:
        report.save(report.extended(before, done.rows) if before else done, json_file)
    _show(done, plot)


def _assignments(texts: list[str]) -> dict[str, int | str]:
    """['reduce_warps=1'] -> {'reduce_warps': 1}."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, _, value) in zip(texts, pairs, strict=True):
        if not (name and value):
            raise ValueError(f"--override is {text!r}; accepted: NAME=VALUE, as in reduce_warps=1")
    return {name: int(value) if value.isdecimal() else value for name, _, value in pairs}


def _check_on_cpu(plan: runner.Plan) -> None:
    print("No CUDA GPU here, so nothing is timed. Checking the op on the CPU instead.")
    small = tuple(size for size in plan.batches if size <= runner.CPU_BATCH)
    plan = dataclasses.replace(plan, batches=small or (runner.CPU_BATCH,))
    points = []
    with _progress() as progress:
        task = progress.add_task("checking", total=len(plan.points()))
        for point in runner.check(plan, torch.device("cpu")):
            points.append(point)
            progress.advance(task)
    _console().print(show.checked(points))
    print(f"Right at {len(points)} points: the state exactly, the output within tolerance.")


def _show(done: report.Report, plot: Path | None) -> None:
    console = _console()
    console.print(show.origin(done), soft_wrap=True)
    for view in show.times(done.rows):
        console.print(view)
    if (line := show.host_times(done.rows)) is not None:
        console.print(line, soft_wrap=True)
    if plot is not None:
        plotting.plot(done, plot)


# ---- kvfold step ---------------------------------------------------------------------------------


@app.command("step")
@clear_errors
def step_command(
    batch: Annotated[str, typer.Option(metavar="LIST", help="Batch sizes.")] = ",".join(
        map(str, stepping.BATCHES)
    ),
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw host and step times.", show_default=False),
    ] = None,
    source: FromFile = None,
) -> None:
    """Time a whole decode step, metadata uploads included, on each of four ways.

    61 layers, each a projection and its compressor: with a pageable copy per array, with a staging
    pool, as one CUDA graph, and so with the layers' states in host memory. The ways are first
    checked to give the same bits. Without a GPU that is all.
    """
    if plot is not None:
        plotting.require(plot)
    if source is not None:
        _refuse_with_from(json_file)
        _show_steps(stepping.load(source), plot)
        return
    batches = _list("--batch", batch, int)
    if min(batches) < 1:
        raise ValueError(f"--batch is {batch!r}; accepted: positive integers, as in 16,256")
    _check_writable(json_file)
    if not torch.cuda.is_available():
        _refuse_without_gpu(json_file, plot)
        print("No CUDA GPU here, so nothing is timed. Checking the four ways on the CPU instead.")
        shape = Shape((128, 4, 128, 4), batch=4, hidden=64, head_dim=128)
        stepping.check(shape, torch.device("cpu"), trace(shape, 100), 100)
        print(f"100 steps of 4 layers: the same bits by {', '.join(stepping.WAYS)}")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    with _progress() as progress:
        each = 1 + len(stepping.WAYS)  # a check, then the ways; their profiles come last
        task = progress.add_task("", total=len(batches) * each + 1)
        done = stepping.measure(
            batches,
            device,
            lambda what: progress.update(task, description=what, advance=1),
        )
    if json_file is not None:
        report.save(done, json_file)
    _show_steps(done, plot)


def _show_steps(done: stepping.StepReport, plot: Path | None) -> None:
    console = _console()
    console.print(f"{done.device}, {done.date}", soft_wrap=True)
    console.print(show.steps(done.rows))
    if plot is not None:
        step_plot.plot(done, plot)


# ---- kvfold tune ---------------------------------------------------------------------------------

MIXTURE = ",".join(f"{name}={weight}" for name, weight in search.MIXTURE.items())


@app.command()
@clear_errors
def tune(
    head_dim: Annotated[str, typer.Option(help="Columns of a compressed row.")] = "512",
    compress_ratio: Annotated[str, typer.Option(help="Tokens per window.")] = "128",
    overlap: Overlap = None,
    kv_dtype: Annotated[str, typer.Option(help="Of the new tokens: bf16, fp32.")] = "bf16",
    state_dtype: Annotated[str, typer.Option(help="Of the paged state: bf16, fp32.")] = "fp32",
    next_n: Annotated[
        str,
        typer.Option(help="The most new tokens per request and step. Timed at the largest only."),
    ] = "1,2,3,4",
    backend: Annotated[str, typer.Option(help="cuda or triton.")] = "cuda",
    batch: Annotated[str, typer.Option(help="Batch sizes to time.")] = ",".join(
        map(str, search.BATCHES)
    ),
    mixture: Annotated[
        str, typer.Option(help="Weights of the scenarios that `kvfold bench --help` explains.")
    ] = MIXTURE,
    prefetch_state: Annotated[
        bool,
        typer.Option(
            "--prefetch-state/--no-prefetch-state",
            help="Call the cuda kernels with the op's prefetch_state, or without.",
        ),
    ] = True,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Table to write the rows into; by default what KVFOLD_CONFIG names. With neither"
            " they are only shown.",
            show_default=False,
        ),
    ] = None,
    any_arch: Annotated[
        bool, typer.Option("--any-arch", help="Rows for any GPU, not only for this one's arch.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the table's change as a diff; do not write it.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all times.", show_default=False),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Choose from what --json wrote before; measures nothing, and the problems, backend"
            " and batch sizes are the file's.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time every variant that can run on this GPU and write the best as rows of a table.

    Options that say what to solve take several values, separated by commas, and fan out like the
    lists of a row. Problems that differ in next_n alone are timed once, at the largest, and share
    their rows.

    Of each problem, all variants are checked and timed at five points; at most 20 go on, to every
    batch size in every scenario. The ranges chosen make the geometric mean of the times, weighted
    by --mixture, least; a range more must gain 1 %, all batch sizes together.
    """
    weights = search.mixture(mixture)
    if table is None and os.environ.get("KVFOLD_CONFIG"):
        table = Path(os.environ["KVFOLD_CONFIG"])
    if dry_run and table is None:
        raise ValueError("--dry-run needs --table FILE, or KVFOLD_CONFIG to name it")
    if source is not None:
        _refuse_with_from(json_file)
        measured = tune_report.load(source)
    else:
        problems = _without_none(
            head_dim=_list("--head-dim", head_dim, int),
            compress_ratio=_list("--compress-ratio", compress_ratio, int),
            overlap=None if overlap is None else (overlap,),
            kv_dtype=_list("--kv-dtype", kv_dtype),
            state_dtype=_list("--state-dtype", state_dtype),
            next_n=_list("--next-n", next_n, int),
        )
        plan = search.Plan(
            OP, problems, backend, _list("--batch", batch, int), tuple(weights), prefetch_state
        )
        _check_writable(json_file)
        measured = _measured(plan, table, any_arch)
        if json_file is not None:
            tune_report.save(measured, json_file)
    arch = "any" if any_arch else measured.arch
    tuned = measured.choose(weights, arch)
    console = _console()
    for one in tuned:
        for view in tune_report.times(one, measured.plan):
            console.print(view)
    found = search.table_rows(tuned, arch)
    print("\n".join(map(rows.written, found)))
    if table is None:
        return
    other = "" if weights == search.MIXTURE else f" --mixture {mixture}"
    comment = measured.origin + other + (" --any-arch" if any_arch else "")
    edit = rows.replaced(table, OP, measured.plan.groups(arch), found, comment)
    if dry_run:
        print(edit.diff(), end="")
        return
    edit.write()
    print(f"wrote {table}: {show.counts(load_table(table))}")


def _measured(plan: search.Plan, table: Path | None, any_arch: bool) -> tune_report.Measured:
    """Times what is planned on this machine's GPU, if the table can take its rows."""
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here, so nothing can be timed; accepted: --from FILE")
    if plan.backend == "cuda" and (why := nvrtc.available()):
        raise ValueError(f"backend is 'cuda', but there is no NVRTC here ({why})")
    device = torch.device("cuda", torch.cuda.current_device())
    if table is not None:  # now, with any rows, for measuring takes minutes
        arch = dispatch.arch_of(device)
        where = "any" if any_arch else arch
        trial = search.table_rows(search.untimed(plan, arch), where)
        rows.replaced(table, OP, plan.groups(where), trial, plan.command)
    with _progress() as progress:
        task = progress.add_task("compiling")
        return tune_gpu.run(
            plan,
            device,
            lambda text, done, total: progress.update(
                task, description=text, completed=done, total=total
            ),
        )


if __name__ == "__main__":
    main()
