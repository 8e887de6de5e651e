"""kvfold build: compiles a table's CUDA variants."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as RichTable
from rich.text import Text

from kvfold.bench import build as building
from kvfold.bench.cli import common
from kvfold.bench.cli.common import app, clear_errors, count, option
from kvfold.codegen import Variant, load_table
from kvfold.runtime import compiler, cubin_cache, dispatch
from kvfold.runtime.compiler import Compiled

ARCH_HELP = (
    "Architecture to compile for, as sm_90; may be repeated. By default this machine's GPU's;"
    " without a GPU, sm_90."
)
OUT_HELP = "Folder to write the cubins to, as well."
EMIT_HELP = "Write the generated CUDA sources to --out, as well."


@app.command()
@clear_errors
def build(
    arch: Annotated[list[str] | None, option(ARCH_HELP)] = None,
    out: Annotated[Path | None, option(OUT_HELP, metavar="DIR")] = None,
    emit: Annotated[bool, typer.Option("--emit", help=EMIT_HELP)] = False,
) -> None:
    """Compile every CUDA variant of the table into the cache, in parallel. Needs no GPU.

    Variants that are in the cache are not compiled again.
    """
    table = load_table()
    if emit and out is None:
        raise ValueError("--emit needs --out DIR, where to write the sources")
    if (why := compiler.unavailable()) is not None:
        common.fail(f"no NVRTC here ({why}); pip install 'kvfold[cuda]'", 1)
    archs = list(dict.fromkeys(arch or [_own_arch()]))
    for name in archs:
        _check_arch(name)
    if out is not None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out is {out}, which is no directory")
        out.mkdir(parents=True, exist_ok=True)
        if emit:
            for file in building.emit(table, out):
                print(f"wrote {file}")
    jobs = [(variant, name) for name in archs for variant in building.variants_for(table, name)]
    codes, compiled = [], 0
    with common.progress() as bar:
        task = bar.add_task("compiling", total=len(jobs))
        for code, fresh in building.compile_all(jobs):
            if out is not None:
                building.write_cubin(code, out)
            codes.append(code)
            compiled += fresh
            bar.advance(task)
    common.console().print(_codes(jobs, codes))
    spilling = sum(code.spill_bytes > 0 for code in codes)
    print(
        f"{count(len(codes), 'variant')} for {', '.join(archs)}: {compiled} compiled now,"
        f" {len(codes) - compiled} from the cache; {spilling} spill registers"
    )
    print(f"cache: {cubin_cache.directory()}")
    if out is not None:
        print(f"cubins: {out}")


def _own_arch() -> str:
    gpu = common.current_gpu()
    return "sm_90" if gpu is None else dispatch.arch_of(gpu)


def _check_arch(arch: str) -> None:
    """Raises ValueError unless NVRTC compiles for the architecture."""
    from cupy_backends.cuda.libs import nvrtc

    known = [f"sm_{number}" for number in sorted(nvrtc.getSupportedArchs())]
    if arch not in known and not (arch[-1:] in ("a", "f") and arch[:-1] in known):
        raise ValueError(f"--arch is {arch!r}; accepted: {', '.join(known)}")


def _codes(jobs: list[tuple[Variant, str]], codes: Iterable[Compiled]) -> RichTable:
    """One line per variant and architecture, in the jobs' order."""
    numbers = ["registers", "spilled\nbytes", "shared\nbytes"]
    view = common.grid(["variant", "arch"], numbers, padding=0)
    found = {(code.symbol, code.arch): code for code in codes}
    for variant, arch in jobs:
        code = found[variant.symbol, arch]
        spilled = Text(str(code.spill_bytes), style="bold red" if code.spill_bytes else "")
        shared = str(variant.launch.shared_bytes)
        view.add_row(code.symbol, arch, str(code.registers), spilled, shared)
    return view
