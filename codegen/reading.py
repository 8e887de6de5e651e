"""Reading a table file: YAML -> rows of plain values, each with its place in the file.

The file is read as YAML nodes and not as plain data, because a node knows its line.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import TableError
from .fields import check_names, check_value
from .spec import op_specs

VERSIONS = (1,)
TUNED = "tuned"
FORMATS = "cache_formats"
NAME = "[a-z][a-z0-9_]{0,63}"  # of a cache format: a part of symbols
MAX_BYTES = 1 << 20
MAX_DEPTH = 8  # nested lists and mappings; a table needs 6
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is faster


@dataclass(frozen=True)
class Row:
    """One row of a table, not yet checked against its op.

    Attributes:
        op: name of the op.
        section: where it is: the op's name, or 'tuned <op>'.
        number: its number in the section, from 1.
        line: of the file, from 1.
        values: field -> value or list of values.
    """

    op: str
    section: str
    number: int
    line: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The row in words, for messages."""
        return f"{self.section} row {self.number} (line {self.line})"


@dataclass(frozen=True)
class Tuned:
    """One entry of the `tuned` section: rows that the tuner wrote in one run, and their origin."""

    origin: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class FormatEntry:
    """One entry of the `cache_formats` section, not yet checked.

    Attributes:
        name: of the format.
        where: the entry in words, for messages.
        values: field -> value.
    """

    name: str
    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Contents:
    """What a table file holds: hand-written rows, those of the `tuned` section, cache formats."""

    rows: tuple[Row, ...]
    tuned: tuple[Tuned, ...]
    formats: tuple[FormatEntry, ...]

    def all_rows(self) -> Iterator[Row]:
        """Hand-written rows, then tuned ones."""
        yield from self.rows
        for entry in self.tuned:
            yield from entry.rows


def read(file: Path) -> Contents:
    """Reads a table file.

    Raises:
        TableError: the file cannot be read, is not YAML, or has not the structure of a table.
    """
    try:
        text = file.read_bytes()
    except OSError as error:
        raise TableError(f"cannot be read: {error.strerror}") from None
    if len(text) > MAX_BYTES:
        raise TableError(f"has {len(text)} bytes", legal=f"at most {MAX_BYTES}")
    sections = _mapping(_compose(text), "the table", "version: 1, then a section per op")
    if "version" not in sections:
        raise TableError("is missing", field="version", legal="1")
    check_value("version", _value(sections.pop("version")), VERSIONS)
    tuned = sections.pop(TUNED, None)
    formats = sections.pop(FORMATS, None)
    check_names(sections, [*op_specs(), FORMATS, TUNED], "section")
    if not sections and tuned is None and formats is None:
        raise TableError("has no rows", legal=f"a section per op, of {', '.join(op_specs())}")
    rows = [row for op, node in sections.items() for row in _section(op, op, node)]
    return Contents(
        rows=tuple(rows),
        tuned=tuple(_tuned(tuned)) if tuned is not None else (),
        formats=tuple(_formats(formats)) if formats is not None else (),
    )


@contextmanager
def place(**known: Any) -> Iterator[None]:
    """Adds the file or the row to a TableError that passes through."""
    try:
        yield
    except TableError as error:
        vars(error).update(known)
        raise


def _compose(text: bytes) -> yaml.Node | None:
    """The file's root node."""
    try:
        _check_events(text)
        return yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if not mark:  # not text at all, such as a binary file
            raise TableError(f"is not YAML: {' '.join(str(error).split())}") from None
        what = f"is not YAML: {getattr(error, 'problem', '')}"
        start = getattr(error, "context_mark", None)
        if start:  # of the broken list or mapping
            what += f" ({getattr(error, 'context', '')} from line {start.line + 1})"
        raise TableError(what, row=f"line {mark.line + 1}") from None


def _check_events(text: bytes) -> None:
    """Raises TableError for what would exhaust the stack or the memory: deep nesting, aliases."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise TableError("has an alias", row=f"line {line}", legal="values written out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1
                raise TableError("nests too deep", row=f"line {line}", legal=f"{MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _section(op: str, name: str, node: yaml.Node) -> Iterator[Row]:
    """The rows of one op's section."""
    check_names([op], op_specs(), "op")
    for number, item in enumerate(_list(node, name, "'- {field: value, ...}'"), 1):
        line = item.start_mark.line + 1
        with place(row=f"{name} row {number} (line {line})"):
            values = _fields(item, "a row")
        yield Row(op, name, number, line, values)


def _formats(node: yaml.Node) -> Iterator[FormatEntry]:
    """The entries of the section of cache formats."""
    with place(row=f"section {FORMATS}"):
        entries = _mapping(node, "the section", "name: {field: value, ...}")
        for name in entries:
            if not re.fullmatch(NAME, name):
                what, legal = "is no name of a cache format", "a-z, then up to 63 of a-z, 0-9 and _"
                raise TableError(what, field=name, legal=legal)
    for name, item in entries.items():
        where = f"{FORMATS} {name} (line {item.start_mark.line + 1})"
        with place(row=where):
            yield FormatEntry(name, where, _fields(item, "a cache format"))


def _fields(node: yaml.Node, what: str) -> dict[str, Any]:
    """Field -> value, of a mapping."""
    return {name: _value(value) for name, value in _mapping(node, what, "field: value").items()}


def _tuned(node: yaml.Node) -> Iterator[Tuned]:
    """The entries of the tuned section."""
    legal = "origin: text, then a section per op"
    for item in _list(node, TUNED, "'- {origin: ..., <op>: [...]}'"):
        with place(row=f"{TUNED}, line {item.start_mark.line + 1}"):
            sections = _mapping(item, "an entry", legal)
            if "origin" not in sections:
                raise TableError("is missing", field="origin", legal=legal)
            origin = sections.pop("origin")
            if origin.tag != "tag:yaml.org,2002:str":
                raise TableError("is not text", field="origin", value=_value(origin), legal=legal)
            if not sections:
                raise TableError("has no rows", legal=legal)
        rows = [
            row
            for op, section in sections.items()
            for row in _section(op, f"{TUNED} {op}", section)
        ]
        yield Tuned(str(_value(origin)), tuple(rows))


def _list(node: yaml.Node, name: str, item: str) -> Sequence[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        legal = f"one row or more, each {item}"
        raise TableError("is not a list of rows", row=f"section {name}", legal=legal)
    return node.value


def _mapping(node: yaml.Node | None, what: str, legal: str) -> dict[str, yaml.Node]:
    """A mapping node as a dict. A name that is given twice is an error."""
    if not isinstance(node, yaml.MappingNode):
        raise TableError(f"{what} is not a mapping", legal=legal)
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else str(_scalar(key))
        if name in found:
            what = f"is given twice (again in line {key.start_mark.line + 1})"
            raise TableError(what, field=name, value=_value(value), legal="each name once")
        found[name] = value
    return found


def _value(node: yaml.Node) -> Any:
    """A field's value: a scalar or a list of scalars."""
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(item) for item in node.value]
    return _scalar(node)


def _scalar(node: yaml.Node) -> int | float | bool | str:
    """An integer, a number, a bool or a string. Anything else becomes a text that is legal nowhere.

    Integers are plain decimal, bools are true and false: YAML 1.1 would read 010 as 8, no as false.
    A number has a point or an exponent: YAML 1.1 would read 1e-4 as a string.
    """
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if not isinstance(node, yaml.ScalarNode):
        return f"({kind})"
    if kind == "int" and re.fullmatch("-?(0|[1-9][0-9]{0,17})", node.value):
        return int(node.value)
    if kind == "bool" and node.value.lower() in ("true", "false"):
        return node.value.lower() == "true"
    plain = kind == "float" or (kind == "str" and not node.style)  # no quotes
    if plain and re.fullmatch("-?[0-9]+([.][0-9]*)?([eE][-+]?[0-9]+)?", node.value):
        return float(node.value)
    return node.value if kind == "str" else f"{node.value} ({kind})"
