"""The declaration of an op, and where declarations are found."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from .arguments import Arguments, ParamStruct
from .fields import FieldSet, Value, check_names

BACKENDS = ("cuda", "triton")
_OPS = "kvfold.ops"


@dataclass(frozen=True, kw_only=True)
class Problem(FieldSet):
    """What a kernel solves. With backend, architecture and size it selects the variant."""

    op: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Tuning(FieldSet):
    """How a kernel solves a problem."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a variant needs on the GPU.

    Attributes:
        threads: per CTA.
        shared_bytes: dynamic shared memory per CTA.
        shared_field: the tuning field that makes shared memory smaller, for error messages.
        min_ctas: CTAs that the registers of an SM must suffice for.
        cluster: CTAs of a cluster; the grid is a multiple of it.
        constants: further members of the CUDA config struct.
    """

    threads: int
    shared_bytes: int = 0
    shared_field: str | None = None
    min_ctas: int = 1
    cluster: int = 1
    constants: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """The declaration of an op. docs/ops.md explains each part.

    Attributes:
        problem: class of the problem fields; its `op` is the op's name.
        tuning: class of the tuning fields.
        arguments: class of the torch op's arguments.
        axis: name of the size axis; a row of the table has min_<axis> and max_<axis>.
        axis_help: what the axis counts.
        problem_of: makes the problem of a call from its dimensions (name -> length), its arguments
            and its tensors' dtypes (argument -> 'bf16'); raises ValueError or TableError. A
            dimension named `size_dimension` is the call's size.
        launch: makes the Launch of (problem, backend, tuning); raises TableError if the combination
            cannot run.
        propose: tuning for a problem and backend without a row, best first.
        explain: how a variant runs at a size, in one sentence.
        size_dimension: name of the dimension that is a call's size on the axis.
        defined_by: dimension -> the tensor that defines it, where that is not the first tensor that
            has the dimension by its plain name.
        may_be_same: pairs of tensors for which a caller may pass one tensor.
        one_pool: two written tensors and their block tables: the two may be one memory if the
            tables are two tensors, which then name different pages.
        params: 4-byte members of the CUDA parameter struct, 'name' (int), 'uint32 name' or
            'float name'.
        constants: constants of the CUDA config struct that depend on a call's arguments, with the
            values that a variant has by itself.
        specialise: makes their values of a call, from its arguments and dimensions. A kernel is
            compiled for each set of values, at first use. None: there are no such constants.
    """

    problem: type[Problem]
    tuning: type[Tuning]
    arguments: type[Arguments]
    axis: str
    axis_help: str
    problem_of: Callable[[Mapping[str, int], Any, Mapping[str, str]], Problem]
    launch: Callable[[Any, str, Any], Launch]
    propose: Callable[[Any, str], Iterable[Tuning]]
    explain: Callable[[Any, str, Any, int], str]
    size_dimension: str
    defined_by: Mapping[str, str] = field(default_factory=dict)
    may_be_same: tuple[tuple[str, str], ...] = ()
    one_pool: tuple[str, str, str, str] | None = None
    params: tuple[str, ...] = ()
    constants: Mapping[str, Value] = field(default_factory=dict)
    specialise: Callable[[Any, Mapping[str, int]], Mapping[str, Value]] | None = None

    @property
    def name(self) -> str:
        """The op's name: of its folder, its section of the table and its torch op."""
        return self.problem.op

    @property
    def bounds(self) -> tuple[str, str]:
        """Names of the two fields that bound a row on the size axis."""
        return f"min_{self.axis}", f"max_{self.axis}"

    @cached_property
    def definitions(self) -> Mapping[str, tuple[str, int]]:
        """Dimension -> the tensor that defines it, and the index in its shape."""
        found: dict[str, tuple[str, int]] = {}
        for one in self.arguments.declared_tensors():
            for index, dimension in enumerate(one.shape):
                name = dimension.name
                if name and dimension.plain and self.defined_by.get(name, one.name) == one.name:
                    found.setdefault(name, (one.name, index))
        return found

    @cached_property
    def param_struct(self) -> ParamStruct:
        """The parameter struct of the op's CUDA kernels."""
        return ParamStruct.of(self.arguments, self.params)


@cache
def op_specs() -> Mapping[str, OpSpec]:
    """Op name -> declaration, of every folder in kernels/ops that has a spec.py."""
    specs = {}
    roots = map(Path, importlib.import_module(_OPS).__path__)
    for name in sorted({file.parent.name for root in roots for file in root.glob("*/spec.py")}):
        spec = importlib.import_module(f"{_OPS}.{name}.spec").SPEC
        assert spec.name == name, f"ops/{name}/spec.py declares {spec.name}"
        specs[name] = spec
    return specs


def op_spec(op: str) -> OpSpec:
    """The declaration of an op. Raises TableError if there is no such op."""
    check_names([op], op_specs(), "op")
    return op_specs()[op]
