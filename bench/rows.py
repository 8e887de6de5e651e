"""Replaces rows of a table file; all else in it, comments too, stays as it is to the byte."""

import difflib
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kvfold.bench.files import write_text
from kvfold.codegen import Bucket, TableError, load_table

WIDTH = 100
INDENT = "  "  # of the first row of a section
TUNED = re.compile(r"\s*# Tuned on ")  # what `comment_lines` writes, from an earlier run
CONTINUED = re.compile(r"\s*#   \S")


@dataclass(frozen=True)
class Edit:
    """A table file and what it shall become; `after` was checked as a table."""

    file: Path
    before: str
    after: str

    def diff(self) -> str:
        """The change as a unified diff; empty where nothing changes."""
        texts = (self.before.splitlines(keepends=True), self.after.splitlines(keepends=True))
        lines = difflib.unified_diff(*texts, f"{self.file} (now)", f"{self.file} (tuned)")
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)

    def write(self) -> None:
        """Replaces the file in one step: it is the old one or the new one, never half.

        Raises:
            OSError: the directory or the file cannot be written.
        """
        write_text(self.after, self.file)


def replaced(
    file: Path, op: str, groups: Collection[tuple], rows: Sequence[dict], comment: str
) -> Edit:
    """The file with other rows for some problems.

    Rows that serve these problems alone go; one that also serves others loses these from a list.
    The new ones take the place of the first that goes, else they end the section.

    Args:
        file: a table; one that is not there yet is made.
        op: the section.
        groups: the problems, as Bucket.group.
        rows: field -> value or list, in the order to write them in.
        comment: put above them, in place of the comment of an earlier run.

    Raises:
        TableError: the file is no table, a row of it cannot be parted from these problems, or the
            table would not be valid; the message names the row.
    """
    if file.exists():
        buckets = load_table(file).buckets
        before = file.read_bytes().decode()
    else:
        before, buckets = "", ()
    try:
        after = _spliced(before or "version: 1\n", op, buckets, set(groups), rows, comment)
        _check(after, buckets, set(groups))
    except TableError as error:
        error.file = file
        raise
    return Edit(file, before, after)


def written(row: dict[str, Any], indent: str = INDENT) -> str:
    """A row as the table writes it: a flow mapping, broken between fields, without a newline."""
    fields = [f"{name}: {_text(value)}" for name, value in row.items()]
    ends = [*(f"{field}," for field in fields[:-1]), f"{fields[-1]}}}"]
    lines = [f"{indent}- {{{ends[0]}"]
    for field in ends[1:]:
        if len(lines[-1]) + 1 + len(field) <= WIDTH:
            lines[-1] += f" {field}"
        else:
            lines.append(f"{indent}   {field}")
    return "\n".join(lines)


def comment_lines(comment: str, indent: str = INDENT) -> list[str]:
    """The comment over the rows, in lines; `replaced` finds it again by its words."""
    lines, line = [], f"{indent}# Tuned on"
    for word in comment.split():
        if len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = f"{indent}#  "
        line += f" {word}"
    return [*lines, line]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- splicing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a row stands: its node and its lines, from 0."""

    node: yaml.MappingNode
    lines: range


def _spliced(
    text: str,
    op: str,
    buckets: Sequence[Bucket],
    groups: set[tuple],
    rows: Sequence[dict],
    comment: str,
) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    text += "" if text.endswith("\n") else newline
    lines = text.splitlines(keepends=True)
    offsets = list(itertools.accumulate(map(len, lines), initial=0))
    places = _places(text, lines, op)
    going, edits = set(), []  # an edit: (start, end, what to put there), in characters
    for number, place in enumerate(places):
        own = [b for b in buckets if (b.variant.op, b.row) == (op, number + 1)]
        staying = [bucket for bucket in own if bucket.group not in groups]
        if not staying:
            going.add(number)
        elif len(staying) < len(own):
            edits.append(_shortened(place, own, staying))
    gone = {line for number in going for line in places[number].lines}
    gone |= _stale_comments(lines, places, going)
    edits += [(offsets[line], offsets[line + 1], "") for line in gone]

    indent = _indent(lines, places)
    block = comment_lines(comment, indent)
    block += [line for row in rows for line in written(row, indent).split("\n")]
    if going:
        at = places[min(going)].lines.start
    elif places:
        at = places[-1].lines.stop
    else:
        block = ["", f"{op}:", *block]
        at = len(lines)
    # A blank line parts the rows from others, which are not of this run.
    above = next((line for line in reversed(range(at)) if line not in gone), None)
    below = next((line for line in range(at, len(lines)) if line not in gone), None)
    if any(above in place.lines for place in places):
        block = ["", *block]
    if below is not None and lines[below].strip():
        block = [*block, ""]
    edits.append((offsets[at], offsets[at], "".join(line + newline for line in block)))
    for start, end, value in sorted(edits, reverse=True):  # what is before keeps its place
        text = text[:start] + value + text[end:]
    return text


def _places(text: str, lines: Sequence[str], op: str) -> list[_Place]:
    """The rows of a section; none where the table has no such section."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    section = next((value for name, value in root.value if name.value == op), None)
    if section is None:
        return []
    places = []
    for number, node in enumerate(section.value, 1):
        first = node.start_mark.line
        before = lines[first][: node.start_mark.column]
        if before.strip() != "-" or (places and first < places[-1].lines.stop):
            raise TableError(
                "does not begin a line of its own with '- ', so it cannot be replaced",
                row=f"{op} row {number} (line {first + 1})",
            )
        places.append(_Place(node, range(first, _last_line(node) + 1)))
    return places


def _last_line(node: yaml.Node) -> int:
    """The line a node ends in. The end of a block is where the next token is, not its own."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        return node.end_mark.line
    last = node.value[-1]
    return _last_line(last[1] if isinstance(last, tuple) else last)


def _shortened(
    place: _Place, own: Sequence[Bucket], staying: Sequence[Bucket]
) -> tuple[int, int, str]:
    """What to replace by what (offsets, text), so that a row serves only the buckets that stay.

    They stay alone if one list can lose values that no bucket that stays has.
    """
    going = [bucket for bucket in own if bucket not in staying]
    for name, node in place.node.value:
        if not isinstance(node, yaml.SequenceNode) or not node.flow_style:
            continue
        kept = {_field(bucket, name.value) for bucket in staying}
        if kept.isdisjoint(_field(bucket, name.value) for bucket in going):
            values = [item.value.lower() for item in node.value]
            texts = [value for value in values if value in set(map(_text, kept))]
            value = f"[{', '.join(texts)}]" if len(texts) > 1 else texts[0]
            return node.start_mark.index, node.end_mark.index, value
    raise TableError(
        "also serves problems that are not tuned, and no one of its lists parts them; split the"
        " row, or tune them too",
        row=own[0].where,
    )


def _field(bucket: Bucket, name: str) -> Any:
    return bucket.arch if name == "arch" else getattr(bucket.variant, name)


def _stale_comments(
    lines: Sequence[str], places: Sequence[_Place], going: Collection[int]
) -> set[int]:
    """Lines of comments of earlier runs, where all rows right below them go."""
    by_line = {place.lines.start: number for number, place in enumerate(places)}
    stale = set()
    for start, line in enumerate(lines):
        if TUNED.match(line):
            end = start + 1
            while end < len(lines) and CONTINUED.match(lines[end]):
                end += 1
            below = list(_rows_from(end, by_line, places))
            if below and set(below) <= set(going):
                stale |= set(range(start, end))
    return stale


def _rows_from(line: int, by_line: dict[int, int], places: Sequence[_Place]) -> Iterator[int]:
    """The rows from a line on, as long as nothing stands between them."""
    while (number := by_line.get(line)) is not None:
        yield number
        line = places[number].lines.stop


def _indent(lines: Sequence[str], places: Sequence[_Place]) -> str:
    if not places:
        return INDENT
    line = lines[places[0].lines.start]
    return line[: len(line) - len(line.lstrip())]


def _check(text: str, buckets: Sequence[Bucket], groups: set[tuple]) -> None:
    """Raises TableError unless the text is a valid table that serves all others as before."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "table.yaml"
        file.write_bytes(text.encode())
        table = load_table(file)
    others = Counter(_apart(bucket) for bucket in table.buckets if bucket.group not in groups)
    if others != Counter(_apart(bucket) for bucket in buckets if bucket.group not in groups):
        raise TableError("cannot be edited without a change to rows of other problems")
    if missing := groups - table.groups.keys():
        raise TableError(f"would have no row for {sorted(missing)[0]}")


def _apart(bucket: Bucket) -> Bucket:
    """The bucket, wherever in the file it stands."""
    return replace(bucket, row=0, line=0)
