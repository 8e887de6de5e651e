"""What is printed: tables, headings, a progress bar. Text is never read as markup."""

import os
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text


def console(least: int = 0) -> Console:
    """Standard output.

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
    stderr = Console(stderr=True)
    return Progress(console=stderr, transient=True, disable=not stderr.is_terminal)


def grid(left: Sequence[str], right: Sequence[str], padding: int = 1) -> Table:
    """An empty table; columns in `right` hold numbers.

    Args:
        padding: spaces beside a column.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, padding))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def heading(text: str) -> Text:
    """The line above a table."""
    return Text(f"\n{text}", style="bold")


def bold(text: object) -> Text:
    """The text, to stand out."""
    return Text(str(text), style="bold")


def facts(values: Mapping[str, object]) -> Table:
    """Names and values, one pair per line."""
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        table.add_row(Text(name, style="dim"), value if isinstance(value, Text) else str(value))
    return table


def count(number: int, noun: str) -> str:
    """'1 row', '2 rows'."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
