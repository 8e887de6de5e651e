"""What one kernel is (Variant) and where it applies (Bucket).

The fields of these two classes are the fields of a table row. Each says here which values are
legal, and neither class can hold a value that cannot run.
"""

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

ITEM_BYTES = {"bf16": 2, "fp32": 4}
POWERS_OF_TWO = (1, 2, 4, 8, 16, 32)
POSITIVE = range(1, 2**30)  # the kernels' int holds twice the largest
MAX_THREADS = 1024
SM_THREADS = 1536  # that every arch has
SM_REGISTERS = 65536  # likewise
LEAF_QUADS = 4  # a leaf of the reduction tree: so many times four rows
LISTED = 480
# KiB of shared memory a CTA may ask for. Archs not listed are taken to have as little as the least.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227}
SHARED_KIB_ELSEWHERE = 99  # of sm_86, sm_89, sm_120, sm_121


class TableError(ValueError):
    """A table, a variant or a request to a table that cannot be; what is not known is None.

    Attributes:
        file: path of the table.
        row: where in it, as in 'paged_kv_compress row 3 (line 14)'.
        field: name of the field.
        value: what it was.
        legal: what it may be, in words.
    """

    def __init__(
        self,
        what: str,
        *,
        file: Path | None = None,
        row: str | None = None,
        field: str | None = None,
        value: Any = None,
        legal: str | None = None,
    ):
        super().__init__(what)
        self.file, self.row, self.field, self.value, self.legal = file, row, field, value, legal

    def __str__(self) -> str:
        value = None if self.value is None else "= " + json.dumps(self.value, default=str)
        sentence = " ".join(part for part in (self.field, value, self.args[0]) if part)
        place = [str(part) for part in (self.file, self.row) if part]
        return ": ".join([*place, sentence]) + (f"; legal: {self.legal}" if self.legal else "")


def one_of(values: Sequence) -> str:
    """Legal values in words: 'bf16, fp32' or, where there are many, '8, 16, ..., 512 (integer)'."""
    if not values:
        return "none"
    few = values if len(values) <= 16 else (*values[:2], "...", values[-1])
    words = ", ".join(json.dumps(value).strip('"') for value in few)
    return words + (" (integer)" if type(values[0]) is int else "")


def check_value(name: str, value: Any, legal: Sequence) -> None:
    """Raises TableError unless value is one of legal, type included: true is not 1."""
    if type(value) is not type(legal[0]) or value not in legal:
        raise TableError("is not accepted", field=name, value=value, legal=one_of(legal))


def with_defaults(given: dict[str, Any], spec: dict[str, Mapping]) -> dict[str, Any]:
    """The fields in spec's order, defaults filled in; raises TableError if one is missing."""
    for name, meta in spec.items():
        if name not in given and not meta["default"]:
            raise TableError("is missing", field=name, legal=one_of(meta["legal"]))
    return {
        name: given[name] if name in given else meta["default"](given)
        for name, meta in spec.items()
    }


def check_arch(arch: Any) -> None:
    """Raises TableError unless arch is 'any' or a name such as 'sm_90' or 'sm_90a'."""
    if not (isinstance(arch, str) and re.fullmatch("any|sm_[0-9]+[a-z]?", arch)):
        legal = "any, or sm_<number> as in sm_90"
        raise TableError("is not accepted", field="arch", value=arch, legal=legal)


def _problem(legal: Sequence, default: Callable[[Mapping], Any] | None = None) -> Any:
    """A field that says what is solved. A default is worked out from the problem's other values."""
    return field(metadata={"kind": "problem", "legal": legal, "default": default})


def _tuning(legal: Sequence, default: Any = None) -> Any:
    """A field that says how; without a default a row must give it."""
    if default is None:
        return field(metadata={"kind": "tuning", "legal": legal, "default": None})
    return field(
        default=default, metadata={"kind": "tuning", "legal": legal, "default": lambda _: default}
    )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel: an op, the problem it solves and how. Raises TableError if it cannot run.

    Attributes:
        op: name of the op.
        head_dim: columns of an output row.
        compress_ratio: tokens per window.
        overlap: whether a window also takes in the window before it.
        kv_dtype: of the new tokens, 'bf16' or 'fp32'.
        state_dtype: of the paged state, likewise.
        next_n: most new tokens per request and step.
        backend: 'cuda' or 'triton'.
        schedule: which CTAs do what; cuda only. 'direct': one per request and slice reduces, others
            store. 'persistent': as many as the GPU holds share all work.
        reduce_warps: warps that share one window's rows.
        head_slice: columns per CTA.
        min_ctas: CTAs that an SM's registers must suffice for. Persistent: and as many per SM are
            launched.
    """

    op: str
    head_dim: int = _problem(range(8, 2**30, 8))
    compress_ratio: int = _problem(POSITIVE)
    overlap: bool = _problem((False, True), default=lambda problem: problem["compress_ratio"] == 4)
    kv_dtype: str = _problem(tuple(ITEM_BYTES))
    state_dtype: str = _problem(tuple(ITEM_BYTES))
    next_n: int = _problem(range(1, 17))
    backend: str = _tuning(("cuda", "triton"))
    schedule: str = _tuning(("direct", "persistent"), default="direct")
    reduce_warps: int = _tuning(POWERS_OF_TWO)
    head_slice: int = _tuning(POSITIVE)
    min_ctas: int = _tuning(range(1, 33), default=1)

    @classmethod
    def spec(cls, kind: str | None = None) -> dict[str, Mapping]:
        """Field name -> {'kind', 'legal', 'default'}; kind: only 'problem' or only 'tuning'."""
        found = {f.name: f.metadata for f in fields(cls) if f.metadata}
        return {name: meta for name, meta in found.items() if kind in (None, meta["kind"])}

    def __post_init__(self):
        for name, meta in self.spec().items():
            check_value(name, getattr(self, name), meta["legal"])
        if self.head_slice not in self._slices():
            if self.head_dim % self.head_slice:
                what = f"does not divide head_dim {self.head_dim}"
            else:
                what = f"is no width of a {self.backend} CTA over {self.state_dtype} state"
            self._refuse("head_slice", what, self._slices())
        if self.threads > MAX_THREADS:
            most = MAX_THREADS * self.reduce_warps // self.threads
            fitting = [warps for warps in POWERS_OF_TWO if warps <= most]
            what = f"makes a CTA of {self.threads} threads, more than {MAX_THREADS}"
            self._refuse("reduce_warps", what, fitting)
        if self.schedule != "direct" and self.backend != "cuda":
            self._refuse("schedule", f"is no schedule of {self.backend}", ("direct",))
        if self.schedule == "persistent" and self._group_quads() > LEAF_QUADS:
            what = f"gives a thread more than {4 * LEAF_QUADS} rows, which is what it fetches ahead"
            enough = self.reduce_warps * self._group_quads() // LEAF_QUADS
            self._refuse("reduce_warps", what, [w for w in POWERS_OF_TWO if w >= enough])
        most = SM_THREADS // self.threads
        if self.min_ctas > most:
            what = f"is more than an SM takes of CTAs of {self.threads} threads"
            self._refuse("min_ctas", what, range(1, most + 1))

    def check_shared(self, arch: str) -> None:
        """Raises TableError if a CTA needs more shared memory than arch ('any', 'sm_90') has."""
        limit = 1024 * SHARED_KIB.get(arch.rstrip(string.ascii_lowercase), SHARED_KIB_ELSEWHERE)
        if self.shared_bytes > limit:
            what = f"takes {self.shared_bytes} bytes of shared memory, arch {arch} has {limit}"
            fitting = [width for width in self._slices() if self._shared_bytes(width) <= limit]
            self._refuse("head_slice", what, fitting)

    def _refuse(self, name: str, what: str, legal: Sequence) -> None:
        raise TableError(what, field=name, value=getattr(self, name), legal=one_of(legal))

    def _slices(self) -> list[int]:
        """Legal values of head_slice: lanes part a warp evenly or fill whole warps."""
        widths = (self.vector * lanes for lanes in (1, 2, 4, 8, 16, *range(32, 1025, 32)))
        any_width = self.backend == "cuda"  # a Triton tile is a power of two wide
        return [w for w in widths if self.head_dim % w == 0 and (any_width or w & (w - 1) == 0)]

    @property
    def symbol(self) -> str:
        """Unique name, a C identifier: paged_kv_compress_hd512_r128_bf16_fp32_n4_w8_s64."""
        overlap = "_overlap" if self.overlap else ""
        ctas = f"_c{self.min_ctas}" if self.min_ctas > 1 else ""
        schedule = f"_{self.schedule}" if self.schedule != "direct" else ""
        triton = "_triton" if self.backend == "triton" else ""
        return (
            f"{self.op}_hd{self.head_dim}_r{self.compress_ratio}{overlap}_{self.kv_dtype}"
            f"_{self.state_dtype}_n{self.next_n}_w{self.reduce_warps}_s{self.head_slice}{ctas}"
            f"{schedule}{triton}"
        )

    @property
    def problem(self) -> dict[str, Any]:
        """Problem fields, name -> value."""
        return {name: getattr(self, name) for name in self.spec("problem")}

    @property
    def tuning(self) -> dict[str, Any]:
        """Tuning fields, name -> value."""
        return {name: getattr(self, name) for name in self.spec("tuning")}

    @property
    def key(self) -> tuple:
        """The problem's values in the fields' order: with op, what dispatch looks up."""
        return tuple(self.problem.values())

    @property
    def vector(self) -> int:
        """Columns of state per 16-byte access."""
        return 16 // ITEM_BYTES[self.state_dtype]

    @property
    def slices(self) -> int:
        """CTAs side by side that cover head_dim."""
        return self.head_dim // self.head_slice

    @property
    def threads(self) -> int:
        """Threads per CTA."""
        if self.backend == "triton":
            return 32 * self.reduce_warps
        warps_across = max(1, self.head_slice // self.vector // 32)
        return 32 * self.reduce_warps * warps_across

    @property
    def items_at_once(self) -> int:
        """Requests of which a storing CUDA thread has a vector of columns at once.

        As many as make 128 bytes of new rows, if registers suffice for that and for reducing.
        """
        if 112 * self.threads * self.min_ctas > SM_REGISTERS:
            return 1
        row_bytes = self.vector * (2 * ITEM_BYTES[self.kv_dtype] + 4)  # KV, score and ape
        return max(1, 128 // row_bytes // self.next_n)

    @property
    def listed(self) -> int:
        """Requests that a persistent CTA looks through at once for those that close a window."""
        return min(LISTED, 4 * self.threads)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CUDA CTA: rows, new rows, each warp's partial, the list.

        window.cuh says how a window's rows are dealt out; the kernels assert that this is right.
        """
        return self._shared_bytes(self.head_slice)

    def _shared_bytes(self, head_slice: int) -> int:
        if self.backend == "triton":
            return 0
        persistent = self.schedule == "persistent"
        lanes = head_slice // self.vector
        threads = self.reduce_warps * max(1, 32 // lanes) * lanes
        held_quads = min(self._group_quads(head_slice), LEAF_QUADS)
        partials = 12 * self.reduce_warps * head_slice if self.reduce_warps > 1 else 0
        held = threads * 4 * held_quads * 2 * 16
        if not persistent:
            # One quad stays in registers; where more were, the partials lie.
            return held if held_quads > 1 else partials
        new = self.next_n * head_slice * (2 * ITEM_BYTES[self.kv_dtype] + 4)
        return held + 2 * new + 2 * partials + 2 * self.listed + self.listed // 8

    def _group_quads(self, head_slice: int | None = None) -> int:
        """Quads of a window's rows that fall to one thread."""
        head_slice = head_slice or self.head_slice
        window_rows = self.compress_ratio * (2 if self.overlap else 1)
        quads = 1 << (-(-window_rows // 4) - 1).bit_length()
        warp_quads = max(min(quads, LEAF_QUADS), quads // self.reduce_warps)
        return max(1, warp_quads // max(1, 32 * self.vector // head_slice))


# The sections a table may have. An op with other fields brings a class of its own.
OPS = {"paged_kv_compress": Variant}


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Where a variant applies, as one row of the table says. Raises TableError if nowhere.

    Attributes:
        variant: the kernel.
        min_batch: smallest batch size it serves.
        max_batch: largest, None for no bound.
        arch: 'any', or the only GPU architecture it serves, as 'sm_90'.
        row: number of the row in its section, from 1.
        line: of the file, from 1.
    """

    variant: Variant
    min_batch: int = 1
    max_batch: int | None = None
    arch: str = "any"
    row: int
    line: int

    def __post_init__(self):
        check_arch(self.arch)
        check_value("min_batch", self.min_batch, POSITIVE)
        if self.max_batch is not None:
            check_value("max_batch", self.max_batch, POSITIVE)
            if self.max_batch < self.min_batch:
                what = f"is below min_batch {self.min_batch}: the row is never reached"
                legal = f"{self.min_batch} or more"
                raise TableError(what, field="max_batch", value=self.max_batch, legal=legal)
        self.variant.check_shared(self.arch)

    @property
    def group(self) -> tuple:
        """(op, backend, arch, *key): what shares one batch axis."""
        return (self.variant.op, self.variant.backend, self.arch, *self.variant.key)

    @property
    def where(self) -> str:
        """The row in words."""
        return f"{self.variant.op} row {self.row} (line {self.line})"
