"""Writes tuned rows into a table file.

The rows are in the file's `tuned` section, which begins at a marker line and ends the file. Only
that section is written. The text above the marker stays as it is.
"""

import itertools
import json
import tempfile
import textwrap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvfold.codegen import Bucket, Group, Table, TableError, load_table, op_spec
from kvfold.codegen.reading import place
from kvfold.codegen.table import expand, row_text, value_text

MARKER = "# ---- Everything below is written by `kvfold tune`. Edit the rows above instead. ----"
WIDTH = 100


def replaced(file: Path, new: Sequence[Bucket], origin: str) -> str:
    """The text of a table file with other tuned rows for the groups of some buckets.

    Args:
        file: a table. Where there is none, the text is that of a new one.
        new: the buckets to write; all of one op.
        origin: where they come from.

    Raises:
        TableError: the file is no table, or it would not be valid with the new rows.
    """
    old, head = None, "version: 1\n"
    if file.exists():
        old = load_table(file)
        head, marker, _ = file.read_bytes().decode().partition(MARKER)
        if not marker:
            head += "\n" if head.endswith("\n") else "\n\n"
    groups = {bucket.group for bucket in new}
    entries = []
    for entry in old.contents.tuned if old is not None else ():
        buckets = itertools.chain.from_iterable(map(expand, entry.rows))
        if kept := [bucket for bucket in buckets if bucket.group not in groups]:
            entries.append(_entry(entry.origin, kept))
    text = f"{head}{MARKER}\n\ntuned:\n{''.join(entries)}{_entry(origin, new)}"
    _check(text, file, old)
    return text


def _check(text: str, file: Path, old: Table | None) -> None:
    """Raises TableError unless the text is a table with all that is hand-written in the old one."""
    with tempfile.TemporaryDirectory() as folder, place(file=file):
        trial = Path(folder) / "table.yaml"
        trial.write_bytes(text.encode())
        new = load_table(trial).contents
        known = (*new.rows, *new.formats)
        for row in (*old.contents.rows, *old.contents.formats) if old is not None else ():
            if row not in known:
                what = "is written by hand, and stands where tuned rows are"
                raise TableError(what, row=row.where, legal=f"rows above the line {MARKER}")


# ---- rows ----------------------------------------------------------------------------------------


def table_rows(buckets: Iterable[Bucket]) -> list[dict[str, Any]]:
    """The buckets as rows of a table. Problems with the same ranges share rows where lists can.

    Returns:
        field -> value or list of values, in the order in which a row has them. A field that has its
        default is left out.
    """
    by_group: dict[Group, list[Bucket]] = {}
    for bucket in buckets:
        by_group.setdefault(bucket.group, []).append(bucket)
    blocks = [(_lists(group), tuple(map(_applied, found))) for group, found in by_group.items()]
    for name in reversed(blocks[0][0]):  # joins blocks that differ in this list only
        joined: dict[Hashable, tuple[dict[str, tuple], tuple]] = {}
        for lists, ranges in blocks:
            others = tuple(values for key, values in lists.items() if key != name)
            key = others, ranges, lists[name] == (None,)
            joined.setdefault(key, (lists | {name: ()}, ranges))[0][name] += lists[name]
        blocks = list(joined.values())
    rows = []
    for lists, ranges in blocks:
        fields = {name: v[0] if len(v) == 1 else list(v) for name, v in lists.items()}
        given = {name: value for name, value in fields.items() if value is not None}
        rows += [given | dict(applied) for applied in ranges]
    return rows


def row_lines(row: Mapping[str, Any], indent: str = "  ") -> str:
    """A row as the table has it, broken between fields, without a newline at the end."""
    solid = {name: value_text(value).replace(" ", "\xa0") for name, value in row.items()}
    text = row_text(solid).replace(": ", ":\xa0")  # lines break at spaces of another kind only
    return _wrapped(text, f"{indent}- ", f"{indent}   ").replace("\xa0", " ")


def _entry(origin: str, buckets: Sequence[Bucket]) -> str:
    """An entry of the tuned section."""
    start = "  - origin: "
    text = _wrapped(json.dumps(origin, ensure_ascii=False), start, " " * (len(start) + 1)) + "\n"
    for op, found in itertools.groupby(buckets, key=lambda bucket: bucket.variant.op):
        rows = "\n".join(row_lines(row, "      ") for row in table_rows(found))
        text += f"    {op}:\n{rows}\n"
    return text


def _wrapped(text: str, first: str, later: str) -> str:
    """The text in lines of WIDTH, broken at spaces. `first` and `later` begin the lines."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _lists(group: Group) -> dict[str, tuple]:
    """A group's fields, each as the values of a list.

    A problem field that has its default for the other fields is None, so that problems in which it
    differs may share rows.
    """
    given = group.problem.given()
    problem = {name: (given.get(name),) for name in group.problem.values()}
    arch = None if group.arch == "any" else group.arch
    return problem | {"backend": (group.backend,), "arch": (arch,)}


def _applied(bucket: Bucket) -> tuple:
    """A bucket's bounds and tuning without the defaults, hashable."""
    low, high = op_spec(bucket.variant.op).bounds
    bounds = {low: bucket.min_size if bucket.min_size > 1 else None, high: bucket.max_size}
    given = {name: value for name, value in bounds.items() if value is not None}
    return tuple((given | bucket.variant.tuning.given()).items())
