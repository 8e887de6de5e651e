"""What the commands share: the app, its options, errors, words of the form field=value, output."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

import kvfold
from kvfold.bench import plot
from kvfold.bench.measure.runner import SIZES
from kvfold.bench.measure.verify import WrongResult
from kvfold.codegen import FieldSet, op_specs
from kvfold.codegen.errors import shortened
from kvfold.codegen.fields import Field, check_names, check_value
from kvfold.runtime.compiler import CompileError

app = typer.Typer(
    name="kvfold",
    help="GPU kernels for the KV compressor of models with compressed attention: which kernels the"
    " table holds, whether they compile, whether they are right, how fast they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


NO_GPU = "No CUDA GPU is here, so nothing is timed"


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
        "Problem fields, as head_dim=128. A list, as next_n=1,2,4, stands for each of its values."
    ),
]
# The size option has the names of all ops' axes: --batch, --tokens.
SIZE_NAMES = ("--size", *dict.fromkeys(f"--{spec.axis}" for spec in op_specs().values()))
Sizes = Annotated[
    str | None, option("Sizes on the op's axis, as 1,16,64.", *SIZE_NAMES, metavar="LIST")
]
Prefetch = Annotated[
    str | None,
    option("Prefetch modes of the op, as none; by default all.", "--prefetch", metavar="LIST"),
]
JsonFile = Annotated[Path | None, option("Write the results.", "--json", metavar="FILE")]
PlotFile = Annotated[Path | None, option("Draw the results.", "--plot", metavar="FILE.png")]
FromFile = Annotated[
    Path | None,
    option("Use what --json wrote before; measures nothing.", "--from", metavar="FILE"),
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


# ---- errors --------------------------------------------------------------------------------------


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what a user can cause into one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs) -> None:
        try:
            command(*args, **kwargs)
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

    return wrapped


def fail(error: object, code: int) -> NoReturn:
    """Prints an error and exits."""
    typer.echo(f"kvfold: {error}", err=True)
    raise typer.Exit(code)


def check_writable(file: Path | None, name: str) -> None:
    """Raises ValueError if a file could not be written; for root by mode bits too.

    Args:
        name: of the option that gave the file.
    """
    if file is None:
        return
    folder = file.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{name} is {file}, but {folder} is no directory")
    if file.exists() and not file.is_file():
        raise ValueError(f"{name} is {file}, which is no regular file")
    writable = not file.exists() or file.stat().st_mode & 0o222
    if not (writable and os.access(folder, os.W_OK)):
        raise ValueError(f"{name} is {file}, which is read-only")


def check_plot(file: Path | None) -> None:
    """Raises ValueError if a plot could not be drawn into a file."""
    if file is not None:
        plot.require(file)
        check_writable(file, "--plot")


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


# ---- words ---------------------------------------------------------------------------------------


def parse_words(
    words: Iterable[str], *declared: type[FieldSet], what: str = "field"
) -> list[dict[str, Any]]:
    """['head_dim=128,512'] -> per declaration {'head_dim': [128, 512]}; one value is no list.

    Raises:
        ValueError: a word of another form, or a name that is not declared.
        TableError: a value that is not accepted.
    """
    fields = {field.name: field for one in declared for field in one.fields()}
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise ValueError(f"{shortened(word)} is not of the form FIELD=VALUE")
        check_names([name], fields, what)
        if name in values:
            raise ValueError(f"{name} is given twice; accepted: once")
        values[name] = _values(fields[name], text)
    names = [{field.name for field in one.fields()} for one in declared]
    return [{name: v for name, v in values.items() if name in own} for own in names]


def _values(field: Field, text: str) -> Any:
    values = list(dict.fromkeys(_value(field, item.strip()) for item in text.split(",")))
    for value in values:
        field.check(value)
    return values[0] if len(values) == 1 else values


def _value(field: Field, text: str) -> Any:
    if field.kind == "int" and re.fullmatch("-?[0-9]{1,18}", text):
        return int(text)
    if field.kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def one_value(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values. Raises ValueError if one is a list."""
    for name, value in values.items():
        if isinstance(value, list):
            raise ValueError(f"{name} has {len(value)} values; accepted: one")
    return values


def integers(option: str, text: str) -> tuple[int, ...]:
    """'1,16,64' -> (1, 16, 64), each once. Raises ValueError."""
    try:
        found = tuple(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        what = f"{option} is {shortened(text)}"
        raise ValueError(f"{what}; accepted: integers, as in 1,16,64") from None
    for number in found:
        check_value(option, number, SIZES)
    return found


def names(text: str) -> tuple[str, ...]:
    """'all-hit,spread' -> ('all-hit', 'spread'), each once."""
    return tuple(dict.fromkeys(item.strip() for item in text.split(",")))


# ---- output --------------------------------------------------------------------------------------


def console(least: int = 0) -> Console:
    """Standard output. Text is never read as markup: paths and values may hold brackets.

    Args:
        least: columns that the output has, even if the terminal is narrower.
    """
    found = Console(highlight=False, markup=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = 160
    found.width = max(found.width, least)
    return found


def progress() -> Progress:
    """A progress bar on stderr, if that is a terminal, that leaves nothing behind."""
    stderr = Console(stderr=True, markup=False)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )


def grid(left: Sequence[str], right: Sequence[str], padding: int = 1) -> RichTable:
    """An empty table; columns in `right` hold numbers.

    Args:
        padding: spaces beside a column.
    """
    table = RichTable(box=box.SIMPLE_HEAD)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    table.padding = (0, padding)
    return table


def heading(text: str) -> Text:
    """The line above a table."""
    return Text(f"\n{text}", style="bold")


def facts(rows: Iterable[tuple[str, object]]) -> RichTable:
    """Names and values, one pair per line."""
    table = RichTable.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value if isinstance(value, Text) else str(value))
    return table


def bold(text: object) -> Text:
    """The text, to stand out."""
    return Text(str(text), style="bold")


def count(number: int, noun: str) -> str:
    """'1 row', '2 rows'."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
