"""Writes tuned rows into a table file.

The rows are in the file's `tuned` section, which begins at a marker line and ends the file. Only
that section is written. The text above the marker stays as it is.
"""

import difflib
import itertools
import tempfile
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.codegen import Bucket, Group, Table, TableError, load_table, op_spec
from kvfold.codegen.reading import Tuned
from kvfold.codegen.table import expand, value_text
from kvfold.runtime.files import replace_file

MARKER = "# ---- Everything below is written by `kvfold tune`. Edit the rows above instead. ----"
WIDTH = 100


@dataclass(frozen=True)
class Edit:
    """A table file and its new text, which was checked as a table."""

    file: Path
    before: str
    after: str

    def diff(self) -> str:
        """The change as a unified diff; empty if nothing changes."""
        texts = (self.before.splitlines(keepends=True), self.after.splitlines(keepends=True))
        lines = difflib.unified_diff(*texts, f"{self.file} (now)", f"{self.file} (tuned)")
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)

    def write(self) -> None:
        """Replaces the file in one step.

        Raises:
            OSError: the folder or the file cannot be written.
        """
        replace_file(self.file, self.after.encode())


def replaced(file: Path, new: Sequence[Bucket], origin: str) -> Edit:
    """The file with other tuned rows for the groups of some buckets.

    Args:
        file: a table. One that is not there yet is made.
        new: the buckets to write; all of one op.
        origin: where they come from.

    Raises:
        TableError: the file is no table, or it would not be valid with the new rows.
    """
    old = load_table(file) if file.exists() else None
    before = "" if old is None else file.read_bytes().decode()
    head = "version: 1\n" if old is None else _hand_written(old, before)
    groups = {bucket.group for bucket in new}
    entries = old.contents.tuned if old is not None else ()
    kept = [(entry.origin, _buckets_but(entry, groups)) for entry in entries]
    blocks = [*((text, buckets) for text, buckets in kept if buckets), (origin, new)]
    body = "".join(_entry(text, buckets) for text, buckets in blocks)
    after = f"{head}{MARKER}\n\ntuned:\n{body}"
    _check(after, file, old, groups)
    return Edit(file, before, after)


def _hand_written(table: Table, text: str) -> str:
    """The text above the marker; with an empty line at its end if there is no marker yet.

    Raises:
        TableError: the marker is not between hand-written and tuned rows, so a row would be lost.
    """
    above, marker, _ = text.partition(MARKER)
    last = above.count("\n") + 1  # line of the marker, or of the text's end
    tuned = [row for entry in table.contents.tuned for row in entry.rows]
    misplaced = [row for row in table.contents.rows if row.line > last]
    misplaced += [row for row in tuned if row.line < last]
    if misplaced:
        what = "is on the wrong side of the line that separates hand-written rows from tuned ones"
        raise TableError(what, file=table.path, row=misplaced[0].where, legal=MARKER)
    if marker:
        return above
    return above + ("\n" if above.endswith("\n") else "\n\n")


def _buckets_but(entry: Tuned, groups: Collection[Group]) -> list[Bucket]:
    """What the rows of an entry stand for, without some groups."""
    buckets = itertools.chain.from_iterable(map(expand, entry.rows))
    return [bucket for bucket in buckets if bucket.group not in groups]


def _check(after: str, file: Path, old: Table | None, groups: Collection[Group]) -> None:
    """Raises TableError unless the text is a table that serves all other groups as before."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "table.yaml"
        trial.write_bytes(after.encode())
        try:
            new = load_table(trial).groups
        except TableError as error:
            error.file = file
            raise
    before = {} if old is None else old.groups
    for group in before.keys() - groups:
        assert _ranges(before[group]) == _ranges(new[group]), f"the tuner changed {group}"


def _ranges(buckets: Iterable[Bucket]) -> list[tuple]:
    return [(bucket.variant, bucket.min_size, bucket.max_size) for bucket in buckets]


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
    blocks = [
        (_lists(group), tuple(_applied(bucket) for bucket in found))
        for group, found in by_group.items()
    ]
    while pair := next(filter(_mergeable, itertools.combinations(blocks, 2)), None):
        (lists, ranges), (other, _) = pair
        blocks.remove(pair[1])
        together = {name: list(dict.fromkeys(lists[name] + other[name])) for name in lists}
        blocks[blocks.index(pair[0])] = (together, ranges)
    rows = []
    for lists, ranges in blocks:
        fields = {name: v if len(v) > 1 else v[0] for name, v in lists.items() if v != [None]}
        rows += [fields | dict(applied) for applied in ranges]
    return rows


def row_lines(row: dict[str, Any], indent: str = "  ") -> str:
    """A row as the table has it, broken between fields, without a newline at the end."""
    fields = [f"{name}: {value_text(value)}" for name, value in row.items()]
    ends = [*(f"{field}," for field in fields[:-1]), f"{fields[-1]}}}"]
    lines = [f"{indent}- {{{ends[0]}"]
    for field in ends[1:]:
        if len(lines[-1]) + 1 + len(field) <= WIDTH:
            lines[-1] += f" {field}"
        else:
            lines.append(f"{indent}   {field}")
    return "\n".join(lines)


def _entry(origin: str, buckets: Sequence[Bucket]) -> str:
    """An entry of the tuned section."""
    start = '  - origin: "'
    quoted = origin.replace("\\", "\\\\").replace('"', '\\"')
    width = WIDTH - len(start)
    lines = textwrap.wrap(f'{quoted}"', width, break_on_hyphens=False, break_long_words=False)
    text = start + ("\n" + " " * len(start)).join(lines) + "\n"
    for op, found in itertools.groupby(buckets, key=lambda bucket: bucket.variant.op):
        rows = "\n".join(row_lines(row, "      ") for row in table_rows(found))
        text += f"    {op}:\n{rows}\n"
    return text


def _lists(group: Group) -> dict[str, list]:
    """A group's fields as lists.

    A problem field that has its default for the other fields is None, so that problems in which it
    differs may share rows.
    """
    given = group.problem.given()
    lists = {name: [given.get(name)] for name in group.problem.values()}
    arch = None if group.arch == "any" else group.arch
    return lists | {"backend": [group.backend], "arch": [arch]}


def _applied(bucket: Bucket) -> tuple:
    """A bucket's bounds and tuning without the defaults, hashable."""
    low, high = op_spec(bucket.variant.op).bounds
    fields = {}
    if bucket.min_size > 1:
        fields[low] = bucket.min_size
    if bucket.max_size is not None:
        fields[high] = bucket.max_size
    return tuple((fields | bucket.variant.tuning.given()).items())


def _mergeable(pair: tuple) -> bool:
    """Whether two blocks have the same ranges and differ in one list only.

    The joined lists then stand for exactly the problems of both.
    """
    (lists, ranges), (other, other_ranges) = pair
    return ranges == other_ranges and sum(lists[name] != other[name] for name in lists) == 1
