"""The table: YAML -> checked rows -> buckets. Whatever is wrong with it raises TableError."""

import difflib
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from .variant import (
    OPS,
    POSITIVE,
    Bucket,
    TableError,
    Variant,
    check_arch,
    check_value,
    with_defaults,
)

SHIPPED = (Path(__file__).parent / "configs.yaml").resolve()  # a link in the checkout
VERSIONS = (1,)
BATCH_FIELDS = ("min_batch", "max_batch")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is faster


@dataclass(frozen=True)
class Table:
    """A checked table. For each group the buckets tile the batch axis [1, inf).

    Attributes:
        path: file it was read from.
        buckets: every row's expansion, in the table's order.
    """

    path: Path
    buckets: tuple[Bucket, ...]

    def __post_init__(self):
        # In the keys' order, so that of several faults the same one is named however rows stand.
        for _, buckets in sorted(self.groups.items()):
            _check_tiling(buckets)

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Each variant once, in the table's order."""
        return tuple(dict.fromkeys(bucket.variant for bucket in self.buckets))

    @cached_property
    def groups(self) -> dict[tuple, tuple[Bucket, ...]]:
        """(op, backend, arch, *key) -> its buckets by ascending batch: what dispatch looks up."""
        groups = {}
        for bucket in self.buckets:
            groups.setdefault(bucket.group, []).append(bucket)
        return {group: tuple(sorted(found, key=_batch_order)) for group, found in groups.items()}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the expansion, whatever the file's layout and order of rows."""
        lines = sorted(
            f"{bucket.variant.symbol} {bucket.arch} {bucket.min_batch} {bucket.max_batch}"
            for bucket in self.buckets
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def select(
        self, op: str, *, batch: int, backend: str = "cuda", arch: str = "any", **problem: Any
    ) -> Variant:
        """The variant that serves a problem.

        Args:
            op: name of the op.
            batch: requests in the step, at least 1.
            backend: 'cuda' or 'triton'.
            arch: of the GPU, as 'sm_90'; its own rows, if the problem has any, go before 'any'.
            **problem: the op's problem fields; those with a default may be left out.

        Raises:
            TableError: a field is unknown, missing or not legal, or the table has no row for the
                problem; the message then holds the row to add.
        """
        with _naming(file=self.path):
            spec = _op(op).spec("problem")
            _check_names(problem, spec, f"problem field of {op}")
            problem = with_defaults(problem, spec)
            for name, value in problem.items():
                check_value(name, value, spec[name]["legal"])
            check_value("backend", backend, OPS[op].spec()["backend"]["legal"])
            check_value("batch", batch, POSITIVE)
            check_arch(arch)
            key = tuple(problem.values())
            for where in (arch, "any"):
                for bucket in self.groups.get((op, backend, where, *key), ()):
                    if bucket.max_batch is None or batch <= bucket.max_batch:
                        return bucket.variant
            raise TableError(
                f"{op} has no {backend} row for arch {arch} and this problem; add to {op} in the"
                f" table, or in a copy of it that KVFOLD_CONFIG names:\n"
                f"  - {_row_to_add(op, problem, backend)}"
            )


def load_table(path: str | os.PathLike | None = None) -> Table:
    """Reads and checks a table.

    Args:
        path: the file; by default what KVFOLD_CONFIG names, else the table shipped with kvfold.

    Raises:
        TableError: the file cannot be read, or anything in it is wrong.
    """
    file = Path(path or os.environ.get("KVFOLD_CONFIG") or SHIPPED)
    with _naming(file=file):
        return Table(file, tuple(_read(file)))


# ---- reading: nodes, not plain data, because a node knows its line -------------------------------


def _read(file: Path) -> Iterator[Bucket]:
    """The buckets of a file, in its order."""
    try:
        root = yaml.compose(file.read_bytes(), Loader=Loader)
    except OSError as error:
        raise TableError(f"cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if not mark:  # no text at all, such as a binary file
            raise TableError(f"is not YAML: {' '.join(str(error).split())}") from None
        what = f"is not YAML: {error.problem}"
        if error.context_mark:  # where the broken list or mapping begins
            what += f" ({error.context} from line {error.context_mark.line + 1})"
        raise TableError(what, row=f"line {mark.line + 1}") from None
    sections = _mapping(root, "the table", "version: 1, then a section per op")
    if "version" not in sections:
        raise TableError("is missing", field="version", legal="1")
    check_value("version", _value(sections.pop("version")), VERSIONS)
    if not sections:
        raise TableError("has no rows", legal=f"a section per op, of {', '.join(OPS)}")
    for op, section in sections.items():
        _op(op)
        if not isinstance(section, yaml.SequenceNode) or not section.value:
            legal = "one row or more, each '- {field: value, ...}'"
            raise TableError("is not a list of rows", row=f"section {op}", legal=legal)
        for number, node in enumerate(section.value, 1):
            line = node.start_mark.line + 1
            with _naming(row=f"{op} row {number} (line {line})"):
                yield from _expand(op, node, number, line)


def _expand(op: str, node: yaml.Node, number: int, line: int) -> Iterator[Bucket]:
    """The buckets of one row: one for each combination of its lists' values."""
    spec = OPS[op].spec()
    row = {name: _value(v) for name, v in _mapping(node, "a row", "field: value").items()}
    _check_names(row, [*spec, *BATCH_FIELDS, "arch"], f"field of {op}")
    batches = {name: row.pop(name) for name in BATCH_FIELDS if name in row}
    for name, value in row.items():
        if not isinstance(value, list):
            row[name] = [value]
        elif not value:
            raise TableError("is an empty list", field=name, value=value, legal="one value or more")
        elif len({(type(v), v) for v in value}) < len(value):
            raise TableError("repeats a value", field=name, value=value, legal="each value once")
    for values in itertools.product(*row.values()):
        one = dict(zip(row, values, strict=True))
        arch = {"arch": one.pop("arch")} if "arch" in one else {}
        variant = OPS[op](op=op, **with_defaults(one, spec))
        yield Bucket(variant=variant, **batches, **arch, row=number, line=line)


def _mapping(node: yaml.Node | None, what: str, legal: str) -> dict[str, yaml.Node]:
    """A mapping node as a dict; a name that stands twice is an error, not the last one's win."""
    if not isinstance(node, yaml.MappingNode):
        raise TableError(f"{what} is not a mapping", legal=legal)
    found = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else _scalar(key)
        if name in found:
            what = f"stands twice (again in line {key.start_mark.line + 1})"
            raise TableError(what, field=name, value=_value(value), legal="each name once")
        found[name] = value
    return found


def _value(node: yaml.Node) -> Any:
    """What stands in a field: a scalar or a list of them."""
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(item) for item in node.value]
    return _scalar(node)


def _scalar(node: yaml.Node) -> int | bool | str:
    """An integer, a bool or a string; whatever else stands there as '1.5 (float)', legal nowhere.

    Integers are plain decimal, bools true and false: YAML 1.1 would read 010 as 8 and no as false.
    """
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if not isinstance(node, yaml.ScalarNode):
        return f"({kind})"
    if kind == "int" and re.fullmatch("-?(0|[1-9][0-9]{0,17})", node.value):
        return int(node.value)
    if kind == "bool" and node.value.lower() in ("true", "false"):
        return node.value.lower() == "true"
    return node.value if kind == "str" else f"{node.value} ({kind})"


# ---- checks -------------------------------------------------------------------------------------


def _op(op: str) -> type[Variant]:
    _check_names([op], OPS, "op")
    return OPS[op]


def _check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises TableError for the first name that is not known, with the nearest that is."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else ""
            raise TableError(f"is no {what}{hint}", field=name, legal=", ".join(known))


def _batch_order(bucket: Bucket) -> tuple:
    return bucket.min_batch, bucket.max_batch or POSITIVE.stop, bucket.row


def _check_tiling(buckets: tuple[Bucket, ...]) -> None:
    """Raises TableError unless the buckets of a group, ascending, cover [1, inf) exactly once."""
    op, backend, arch, *key = buckets[0].group
    words = [f"{n} {str(v).lower()}" for n, v in zip(OPS[op].spec("problem"), key, strict=True)]
    problem = ", ".join([*words, backend, f"arch {arch}"])
    covered = 0
    for before, bucket in itertools.pairwise((None, *buckets)):
        if covered is None or bucket.min_batch <= covered:
            raise _overlap(before, bucket, problem)
        if bucket.min_batch > covered + 1:
            gap = f"leaves batch {covered + 1} to {bucket.min_batch - 1} without a row ({problem})"
            raise TableError(
                gap,
                row=bucket.where,
                field="min_batch",
                value=bucket.min_batch,
                legal=str(covered + 1),
            )
        covered = bucket.max_batch
    if covered is not None:
        raise TableError(
            f"leaves batch {covered + 1} and up without a row ({problem})",
            row=bucket.where,
            field="max_batch",
            value=covered,
            legal=f"none in the last row, or a row with min_batch {covered + 1}",
        )


def _overlap(first: Bucket, second: Bucket, problem: str) -> TableError:
    """The error for two buckets of a group that share a batch size."""
    if first.row == second.row:
        tuning = second.variant.tuning
        name = next(name for name in tuning if tuning[name] != first.variant.tuning[name])
        what, legal = f"is the second of two for one problem ({problem})", "one value per row"
        return TableError(what, row=second.where, field=name, value=tuning[name], legal=legal)
    what = "duplicates" if replace(second, row=first.row, line=first.line) == first else "overlaps"
    return TableError(
        f"{what} {first.where} ({problem})",
        row=second.where,
        field="min_batch",
        value=second.min_batch,
        legal=f"{first.max_batch + 1} or more" if first.max_batch else "one row without max_batch",
    )


@contextmanager
def _naming(**place: Any) -> Iterator[None]:
    """Adds the file or the row to a TableError on its way out."""
    try:
        yield
    except TableError as error:
        vars(error).update(place)
        raise


def _row_to_add(op: str, problem: dict[str, Any], backend: str) -> str:
    """A row for the problem that is legal on every arch, to start tuning from."""
    many = (8, 4, 2, 1) if problem["compress_ratio"] > 16 else (1,)
    for warps, width in itertools.product(many, (64, 32, 16, 8)):
        row = {**problem, "backend": backend, "reduce_warps": warps, "head_slice": width}
        with suppress(TableError):
            OPS[op](op=op, **row).check_shared("any")
            break
    return "{" + ", ".join(f"{name}: {str(value).lower()}" for name, value in row.items()) + "}"
