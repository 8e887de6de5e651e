"""The command line itself: its errors, the options that commands share, and their checks."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from typer.core import TyperGroup

import kvfold
from kvfold.bench import plot
from kvfold.bench.measure.verify import WrongResult
from kvfold.codegen import op_specs
from kvfold.runtime.compiler import CompileError

NO_GPU = "No CUDA GPU is here, so nothing is timed"


# ---- errors --------------------------------------------------------------------------------------


class Commands(TyperGroup):
    """The commands. What a user can cause is one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `kvfold table list | head`: typer ends it in silence
            raise
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}" if error.filename else error, 2)
        except ValueError as error:  # TableError is one
            fail(error, 2)
        except (WrongResult, CompileError) as error:
            fail(error, 1)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            found = re.search("tried to allocate.*", str(error), re.IGNORECASE)
            fail(f"not enough memory: {found[0] if found else error}", 1)


def fail(error: object, code: int) -> NoReturn:
    """Prints an error and exits."""
    typer.echo(f"kvfold: {error}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    name="kvfold",
    help="GPU kernels for the KV compressor of models with compressed attention: which kernels the"
    " table holds, whether they compile, whether they are right, and how fast they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


# ---- options -------------------------------------------------------------------------------------


def option(help: str, *names: str, metavar: str | None = None) -> Any:
    """An option; its help says what happens without it."""
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


def words_argument(help: str) -> Any:
    """The argument FIELD=VALUE of a command."""
    help += " `kvfold table fields OP` explains the fields."
    return typer.Argument(metavar="FIELD=VALUE...", help=help, show_default=False)


Op = Annotated[str, typer.Argument(help=f"The op: {', '.join(op_specs())}.", metavar="OP")]
Words = Annotated[
    list[str] | None,
    words_argument(
        "Problem fields, such as head_dim=128. A list, such as next_n=1,2,4, stands for each of its"
        " values."
    ),
]
# The size option has the names of all ops' axes: --batch, --tokens.
SIZE_NAMES = ("--size", *dict.fromkeys(f"--{spec.axis}" for spec in op_specs().values()))
SIZE_AXES = ", ".join(f"{spec.axis} of {name}" for name, spec in op_specs().items())
Sizes = Annotated[
    str | None,
    option(f"Sizes, such as 1,16,64: {SIZE_AXES}.", *SIZE_NAMES, metavar="LIST"),
]
Prefetch = Annotated[
    str | None,
    option("Prefetch modes of the op, such as none; by default all.", "--prefetch", metavar="LIST"),
]
JsonFile = Annotated[Path | None, option("Write the results.", "--json", metavar="FILE")]
PlotFile = Annotated[Path | None, option("Draw the results.", "--plot", metavar="FILE.png")]
FromFile = Annotated[
    Path | None,
    option("Use a file that --json wrote, and measure nothing.", "--from", metavar="FILE"),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvfold {kvfold.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the command line itself."""


def check_writable(file: Path | None) -> None:
    """Raises ValueError if a file could not be written; for root by mode bits too."""
    if file is None:
        return
    folder = file.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{file} cannot be written: {folder} is no directory")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is no regular file")
    if (file.exists() and not file.stat().st_mode & 0o222) or not os.access(folder, os.W_OK):
        raise ValueError(f"{file} is read-only")


def check_plot(file: Path | None) -> None:
    """Raises ValueError if a plot could not be drawn into a file."""
    if file is not None:
        plot.require(file)
        check_writable(file)


def refuse(given: Mapping[str, object], why: str) -> None:
    """Raises ValueError for the first option or argument, by name, that was given."""
    for name, value in given.items():
        if value:
            raise ValueError(f"{why}: {name} is not accepted")


def current_gpu() -> torch.device | None:
    """torch's current GPU; None on a machine without one."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())
