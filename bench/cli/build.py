"""kvfold build: compiles a table's CUDA variants."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

from rich.text import Text

from kvfold.bench import build as building
from kvfold.bench.cli import common, output
from kvfold.bench.cli.common import app, option
from kvfold.codegen import Table, load_table, render
from kvfold.runtime import compiler, cubin_cache, dispatch

ARCH_HELP = (
    "Architecture to compile for, such as sm_90; may be repeated. By default this machine's GPU's;"
    " without a GPU, sm_90."
)
OUT_HELP = "Folder that the generated CUDA sources and the cubins are also written to."


@app.command()
def build(
    arch: Annotated[list[str] | None, option(ARCH_HELP)] = None,
    out: Annotated[Path | None, option(OUT_HELP, metavar="DIR")] = None,
) -> None:
    """Compile every CUDA variant of the table into the cache, in parallel. Needs no GPU.

    Variants that are in the cache are not compiled again.
    """
    table = load_table()
    if (why := compiler.unavailable()) is not None:
        common.fail(f"no NVRTC here ({why}); pip install 'kvfold[cuda]'", 1)
    gpu = common.current_gpu()
    archs = list(dict.fromkeys(arch or ["sm_90" if gpu is None else dispatch.arch_of(gpu)]))
    for name in archs:
        _check_arch(name)
    if out is not None:
        _write_sources(table, out)
    jobs = [(variant, name) for name in archs for variant in building.variants_for(table, name)]
    view = output.grid(["variant", "arch"], ["registers", "spilled\nbytes", "shared\nbytes"], 0)
    compiled = spilling = 0
    # Closed here, so that an interruption cancels what has not begun wherever it strikes.
    with output.progress() as bar, closing(building.compile_all(jobs)) as compilations:
        done = bar.track(compilations, total=len(jobs), description="compiling")
        for (variant, name), (code, fresh) in zip(jobs, done, strict=True):
            compiled += fresh
            spilling += code.spill_bytes > 0
            spilled = Text(str(code.spill_bytes), style="bold red" if code.spill_bytes else "")
            shared = str(variant.launch.shared_bytes)
            view.add_row(code.symbol, name, str(code.registers), spilled, shared)
            if out is not None:
                (out / f"{code.symbol}.{name}.cubin").write_bytes(code.cubin)
    output.console().print(view)
    print(
        f"{output.count(len(jobs), 'variant')} for {', '.join(archs)}: {compiled} compiled now,"
        f" {len(jobs) - compiled} from the cache; {spilling} spill registers"
    )
    print(f"cache: {cubin_cache.directory()}")
    if out is not None:
        print(f"sources and cubins: {out}")


def _check_arch(arch: str) -> None:
    """Raises ValueError unless NVRTC compiles for the architecture."""
    from cupy_backends.cuda.libs import nvrtc

    known = [f"sm_{number}" for number in sorted(nvrtc.getSupportedArchs())]
    if arch not in known and not (arch[-1:] in ("a", "f") and arch[:-1] in known):
        raise ValueError(f"--arch is {arch!r}; accepted: {', '.join(known)}")


def _write_sources(table: Table, folder: Path) -> None:
    """Writes the CUDA sources that are generated from a table."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out is {folder}, which is no directory")
    rendered = render(table)
    for name, text in {"instantiations.cu": rendered.instantiations, **rendered.headers}.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
