"""The table: checked rows, expanded to variants. Whatever is wrong with it raises TableError."""

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from .errors import TableError
from .fields import POSITIVE, check_names, check_value
from .formats import CacheFormat
from .gpu import FIRST_WITH_CLUSTERS, check_arch
from .reading import Contents, FormatEntry, Row, place, read
from .spec import BACKENDS, OpSpec, Problem, op_spec
from .variant import Bucket, Group, Variant

SHIPPED = Path(__file__).parent / "configs.yaml"  # a link in the checkout
MAX_BUCKETS = 50_000  # that a table's rows may stand for


@dataclass(frozen=True)
class Table:
    """A checked table. The buckets of each group tile the size axis [1, inf).

    Attributes:
        path: file it was read from.
        buckets: every row's expansion, in the table's order.
        contents: the rows as the file has them.
        formats: name -> cache format.

    Raises:
        TableError: a gap, an overlap or an unreachable row; or two variants with one symbol.
    """

    path: Path
    buckets: tuple[Bucket, ...]
    contents: Contents
    formats: Mapping[str, CacheFormat]

    def __post_init__(self):
        # Sorted, so that the same fault is named whatever the order of the rows.
        for group, buckets in sorted(self.groups.items(), key=lambda item: str(item[0])):
            _check_tiling(group, buckets)
        _check_symbols(self.buckets)

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Each variant once, in the table's order."""
        return tuple(dict.fromkeys(bucket.variant for bucket in self.buckets))

    @cached_property
    def groups(self) -> Mapping[Group, tuple[Bucket, ...]]:
        """Group -> its buckets by ascending size."""
        groups: dict[Group, list[Bucket]] = {}
        for bucket in self.buckets:
            groups.setdefault(bucket.group, []).append(bucket)
        return {group: tuple(sorted(found, key=_by_size)) for group, found in groups.items()}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over expansion and formats, whatever the file's layout and order."""
        lines = sorted(
            f"{bucket.variant.symbol} {bucket.arch} {bucket.min_size} {bucket.max_size}"
            for bucket in self.buckets
        )
        lines += sorted(f"cache format {name}: {format}" for name, format in self.formats.items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def format(self, name: str) -> CacheFormat:
        """The cache format of a name. Raises TableError if there is none."""
        with place(file=self.path):
            check_names([name], self.formats, "cache format")
        return self.formats[name]

    def buckets_for(self, problem: Problem, backend: str, arch: str) -> tuple[Bucket, ...]:
        """The buckets that serve a problem on a GPU, by ascending size; none if it has no row.

        If the problem has rows of the architecture's own, they alone count.
        """
        for where in dict.fromkeys((arch, "any")):
            group = Group(problem=problem, backend=backend, arch=where)
            if group in self.groups:
                return self.groups[group]
        return ()

    def find(self, problem: Problem, backend: str, arch: str, size: int) -> Variant | None:
        """The variant that serves a problem at a size; None if there is no row."""
        for bucket in self.buckets_for(problem, backend, arch):
            if bucket.serves(size):
                return bucket.variant
        return None

    def select(
        self, op: str, *, backend: str = "cuda", arch: str = "any", **fields: Any
    ) -> Variant:
        """The variant that serves a problem.

        Args:
            op: name of the op.
            backend: 'cuda' or 'triton'.
            arch: of the GPU, as 'sm_90'; 'any' selects among the rows for any GPU.
            **fields: the op's problem fields, and the size by the name of its axis, as batch=16.
                Problem fields with a default may be left out.

        Raises:
            TableError: a field is unknown, missing or not legal, or the table has no row for the
                problem. In the latter case the message holds a row to add.
        """
        with place(file=self.path):
            spec = op_spec(op)
            if spec.axis not in fields:
                raise TableError("is missing", field=spec.axis, legal=spec.axis_help)
            size = fields.pop(spec.axis)
            problem = spec.problem.of(fields, f"problem field of {op}")
            check_value("backend", backend, BACKENDS)
            check_value(spec.axis, size, POSITIVE)
            check_arch(arch)
            return self.find(problem, backend, arch, size) or self.refuse(problem, backend, arch)

    def refuse(self, problem: Problem, backend: str, arch: str) -> NoReturn:
        """Raises the TableError for a problem without a row; it holds a row to add."""
        raise TableError(
            f"{problem.op} has no {backend} row for arch {arch} and this problem; add to"
            f" {problem.op} in the table, or in a copy of it that KVFOLD_CONFIG names:\n"
            f"  - {_row_to_add(problem, backend, arch)}"
        )


def load_table(path: str | os.PathLike | None = None) -> Table:
    """Reads and checks a table.

    Args:
        path: the file; by default the one that KVFOLD_CONFIG names, else the table shipped with
            kvfold.

    Raises:
        TableError: the file cannot be read, or anything in it is wrong.
    """
    file = Path(path or os.environ.get("KVFOLD_CONFIG") or SHIPPED)
    with place(file=file):
        contents = read(file)
        formats = dict(map(_format, contents.formats))
        return Table(file, tuple(_expand_all(contents)), contents, formats)


def _format(entry: FormatEntry) -> tuple[str, CacheFormat]:
    """Name and format of an entry."""
    with place(row=entry.where):
        return entry.name, CacheFormat.of(entry.values, "field of a cache format")


# ---- expansion -----------------------------------------------------------------------------------


def _expand_all(contents: Contents) -> Iterator[Bucket]:
    left = MAX_BUCKETS
    for row in contents.all_rows():
        with place(row=row.where):
            for bucket in expand(row, left):
                left -= 1
                yield bucket


def expand(row: Row, limit: int = MAX_BUCKETS) -> Iterator[Bucket]:
    """The buckets of one row: one for each combination of its lists' values.

    Raises:
        TableError: a value that is not legal, or more than `limit` combinations.
    """
    spec = op_spec(row.op)
    own = [field.name for field in (*spec.problem.fields(), *spec.tuning.fields())]
    check_names(row.values, [*own, "backend", *spec.bounds, "arch"], f"field of {row.op}")
    values = dict(row.values)
    bounds = [
        values.pop(name, default) for name, default in zip(spec.bounds, (1, None), strict=True)
    ]
    lists = {name: _as_list(name, value) for name, value in values.items()}
    if (count := math.prod(map(len, lists.values()))) > limit:
        raise TableError(f"stands for {count} variants", legal=f"at most {MAX_BUCKETS} in a table")
    for combination in itertools.product(*lists.values()):
        one = dict(zip(lists, combination, strict=True))
        arch = one.pop("arch", "any")
        yield Bucket(
            variant=_variant(spec, one),
            min_size=bounds[0],
            max_size=bounds[1],
            arch=arch,
            row=row.number,
            line=row.line,
            section=row.section,
        )


def _as_list(name: str, value: Any) -> list:
    if not isinstance(value, list):
        return [value]
    if not value:
        raise TableError("is an empty list", field=name, legal="one value or more")
    if nested := [item for item in value if item in ("(seq)", "(map)")]:
        raise TableError(
            "holds a list or a mapping", field=name, value=nested, legal="plain values"
        )
    if len({(type(item), item) for item in value}) < len(value):
        raise TableError("repeats a value", field=name, value=value, legal="each value once")
    return value


def _variant(spec: OpSpec, values: dict[str, Any]) -> Variant:
    problem_fields = {field.name for field in spec.problem.fields()}
    if "backend" not in values:
        raise TableError("is missing", field="backend", legal=", ".join(BACKENDS))
    backend = values.pop("backend")
    check_value("backend", backend, BACKENDS)
    problem = {name: value for name, value in values.items() if name in problem_fields}
    tuning = {name: value for name, value in values.items() if name not in problem_fields}
    return Variant(problem=spec.problem.of(problem), backend=backend, tuning=spec.tuning.of(tuning))


# ---- checks of the whole table -------------------------------------------------------------------


def _by_size(bucket: Bucket) -> tuple:
    return bucket.min_size, bucket.max_size or POSITIVE.stop, bucket.section, bucket.row


def _check_tiling(group: Group, buckets: tuple[Bucket, ...]) -> None:
    """Raises TableError unless the buckets of a group, ascending, cover [1, inf) exactly once."""
    spec = op_spec(group.problem.op)
    axis, (low, high) = spec.axis, spec.bounds
    covered: int | None = 0
    before = None
    for bucket in buckets:
        if before is not None and (covered is None or bucket.min_size <= covered):
            raise _overlap(before, bucket, group)
        assert covered is not None
        if bucket.min_size > covered + 1:
            raise TableError(
                f"leaves {_sizes(axis, covered + 1, bucket.min_size - 1)} without a row ({group})",
                row=bucket.where,
                field=low,
                value=bucket.min_size,
                legal=str(covered + 1),
            )
        before, covered = bucket, bucket.max_size
    if covered is not None:
        assert before is not None
        raise TableError(
            f"leaves {axis} {covered + 1} and up without a row ({group})",
            row=before.where,
            field=high,
            value=covered,
            legal=f"none in the last row, or a row with {low} {covered + 1}",
        )


def _sizes(axis: str, first: int, last: int) -> str:
    return f"{axis} {first}" if first == last else f"{axis} {first} to {last}"


def _overlap(first: Bucket, second: Bucket, group: Group) -> TableError:
    """The error for two buckets of a group that share a size."""
    if first.where == second.where:
        tuning, others = second.variant.tuning.values(), first.variant.tuning.values()
        name = next(name for name in tuning if tuning[name] != others[name])
        what = f"is the second of two for one problem ({group})"
        return TableError(
            what, row=second.where, field=name, value=tuning[name], legal="one value per row"
        )
    same = replace(second, row=first.row, line=first.line, section=first.section) == first
    low, high = first.variant.spec.bounds
    return TableError(
        f"{'duplicates' if same else 'overlaps'} {first.where} ({group})",
        row=second.where,
        field=low,
        value=second.min_size,
        legal=f"{first.max_size + 1} or more" if first.max_size else f"one row without {high}",
    )


def _check_symbols(buckets: tuple[Bucket, ...]) -> None:
    """Raises TableError if two different variants have one symbol."""
    known: dict[str, Variant] = {}
    for bucket in buckets:
        symbol = bucket.variant.symbol
        if known.setdefault(symbol, bucket.variant) != bucket.variant:
            raise TableError(
                f"has the symbol {symbol}, which another variant of the table has too; a field of"
                f" {bucket.variant.op} that tells them apart has no part in the symbol",
                row=bucket.where,
            )


def _row_to_add(problem: Problem, backend: str, arch: str) -> str:
    """A row for the problem, to start tuning from: legal on every arch or, if none is, on this."""
    only = arch if arch != "any" else FIRST_WITH_CLUSTERS
    for where, fields in (("any", {}), (only, {"arch": only})):
        for tuning in op_spec(problem.op).propose(problem, backend):
            with suppress(TableError):
                Variant(problem=problem, backend=backend, tuning=tuning).check_arch(where)
                values = problem.values() | {"backend": backend} | fields | tuning.given()
                return row_text(values)
    return "(no variant of this problem can run)"


def row_text(fields: Mapping[str, Any]) -> str:
    """A row as the table has it: '{head_dim: 512, next_n: [1, 2]}'."""
    return "{" + ", ".join(f"{name}: {value_text(v)}" for name, v in fields.items()) + "}"


def value_text(value: Any) -> str:
    """A value as the table has it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
