"""What one kernel is (Variant), and where the table applies it (Bucket)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from . import gpu
from .errors import TableError, in_words
from .fields import POSITIVE, FieldSet, Value, check_value
from .spec import BACKENDS, Launch, OpSpec, Problem, Tuning, op_spec


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel: a problem, a backend and a tuning; specialised, also constants of a call.

    Raises:
        TableError: the combination cannot run.
    """

    problem: Any  # a Problem of the op
    backend: str
    tuning: Any  # a Tuning of the op
    constants: tuple[tuple[str, Value], ...] = ()  # of a call; see OpSpec.specialise

    def __post_init__(self):
        assert isinstance(self.problem, Problem) and isinstance(self.tuning, Tuning)
        check_value("backend", self.backend, BACKENDS)
        _ = self.launch

    @property
    def op(self) -> str:
        """Name of the op."""
        return self.problem.op

    @property
    def spec(self) -> OpSpec:
        """The op's declaration."""
        return op_spec(self.op)

    @cached_property
    def launch(self) -> Launch:
        """What the kernel needs on the GPU."""
        return self.spec.launch(self.problem, self.backend, self.tuning)

    def specialised(self, constants: Mapping[str, Value]) -> "Variant":
        """The same kernel with constants of a call."""
        return replace(self, constants=tuple(sorted(constants.items())))

    @cached_property
    def symbol(self) -> str:
        """The kernel's name, a C identifier: paged_kv_compress_hd512_r128_bf16_fp32_n4_w8_s64."""
        parts = [self.op, *self.problem.symbol_parts(), *self.tuning.symbol_parts()]
        return "_".join(parts if self.backend == "cuda" else [*parts, self.backend])

    def check_arch(self, arch: str) -> None:
        """Raises TableError unless arch ('any', 'sm_90') has the clusters and the shared memory."""
        if self.launch.cluster > 1 and not gpu.has_clusters(arch):
            what = f"is too low: the kernel needs clusters of {self.launch.cluster} CTAs"
            raise TableError(what, field="arch", value=arch, legal="sm_90 or higher")
        needed, available = self.launch.shared_bytes, gpu.shared_bytes(arch)
        if needed > available:
            name = self.launch.shared_field or "backend"
            raise TableError(
                f"takes {needed} bytes of shared memory per CTA, and arch {arch} has {available}",
                field=name,
                value=(self.tuning.values() | {"backend": self.backend})[name],
                legal="a value that takes less",
            )


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Where a variant applies, as one row of the table says.

    Attributes:
        variant: the kernel.
        min_size: smallest size on the op's axis that it serves.
        max_size: largest, None for no bound.
        arch: 'any', or the only GPU architecture it serves, as 'sm_90'.
        row: number of the row in its section, from 1.
        line: of the file, from 1.
        section: where the row is: the op's name, or 'tuned <op>'.

    Raises:
        TableError: a value that is not legal, or a row that is never reached.
    """

    variant: Variant
    min_size: int = 1
    max_size: int | None = None
    arch: str = "any"
    row: int
    line: int
    section: str

    def __post_init__(self):
        gpu.check_arch(self.arch)
        low, high = self.variant.spec.bounds
        check_value(low, self.min_size, POSITIVE)
        if self.max_size is not None:
            check_value(high, self.max_size, POSITIVE)
            if self.max_size < self.min_size:
                what = f"is below {low} {self.min_size}: the row is never reached"
                legal = f"{self.min_size} or more"
                raise TableError(what, field=high, value=self.max_size, legal=legal)
        self.variant.check_arch(self.arch)

    @property
    def group(self) -> "Group":
        """What shares one size axis with this bucket."""
        return Group(problem=self.variant.problem, backend=self.variant.backend, arch=self.arch)

    @property
    def where(self) -> str:
        """The row in words."""
        return f"{self.section} row {self.row} (line {self.line})"

    def serves(self, size: int) -> bool:
        """Whether the bucket's range holds the size."""
        return self.min_size <= size and (self.max_size is None or size <= self.max_size)

    @property
    def range(self) -> str:
        """The sizes in words: '1-48', or '49+' for 49 and up."""
        return f"{self.min_size}+" if self.max_size is None else f"{self.min_size}-{self.max_size}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """A problem, a backend and an architecture: the buckets of a group tile one size axis."""

    problem: Problem
    backend: str
    arch: str

    def __str__(self) -> str:
        return f"{self.problem}, {self.backend}, arch {self.arch}"


def check_min_ctas(tuning: Any, threads: int) -> None:
    """Raises TableError unless every SM takes min_ctas CTAs of so many threads."""
    most = gpu.SM_THREADS // threads
    if tuning.min_ctas > most:
        what = f"is more CTAs of {threads} threads than an SM takes"
        raise refuse(tuning, "min_ctas", what, range(1, most + 1))


def refuse(fields: FieldSet, name: str, what: str, legal: Any) -> TableError:
    """The TableError for a field whose value is legal alone and not with the others."""
    words = legal if isinstance(legal, str) else in_words(legal)
    return TableError(what, field=name, value=getattr(fields, name), legal=words)
