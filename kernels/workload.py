"""What an op's workload.py declares: the calls to benchmark, tune and test it by."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvfold.codegen import Arguments, FieldSet, OpSpec, Tuning, Variant, op_spec
from kvfold.runtime.dispatch import Launcher


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        arguments: what the op takes.
        moved_bytes: the fewest bytes that the call must move, each read or written once.
        rows: output rows that the call writes.
    """

    arguments: Arguments
    moved_bytes: int
    rows: int

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory that its tensors hold; views of one storage count once."""
        storages = [a.untyped_storage() for a in self.arguments.args() if isinstance(a, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Tolerance:
    """|got - want| <= absolute + relative[dtype of got] * |want|."""

    absolute: float
    relative: Mapping[torch.dtype, float]


EXACT = Tolerance(0.0, {})


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the tuner searches.

    Attributes:
        candidates: tuning worth a trial, from (problem, backend, arch); some of it may not run.
        shared_field: a problem field whose values share their measurements and rows; the tuner
            times the largest value. None if there is no such field.
        mixture: scenario -> weight in the mean that the tuner minimises.
        prefetch: mode of the workload's prefetch -> weight in that mean.
        sizes: sizes to time.
    """

    candidates: Callable[[Any, str, str], Iterable[Tuning]]
    shared_field: str | None
    mixture: Mapping[str, float]
    prefetch: Mapping[str, float]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One entry of an op's benchmark suite; what is left out is the workload's default.

    Attributes:
        problem: problem fields.
        options: options of the case.
        sizes, scenarios: where to measure.
        override: 'backend' and tuning fields of a variant to time beside the dispatched one.
        baseline: whether to time the yardsticks and host times too.
    """

    problem: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] | None = None
    scenarios: tuple[str, ...] | None = None
    override: Mapping[str, Any] = field(default_factory=dict)
    baseline: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How an op is exercised.

    Attributes:
        spec: the op's declaration.
        options: fields of a case beside its problem, such as page_size.
        scenarios: name -> what happens in it.
        defaults: the problem that is measured if none is given.
        sizes: sizes that are measured if none are given.
        check_size: the largest size to check on a machine without a GPU.
        make: makes a case from (problem, size, scenario, options, device, seed). Output tensors are
            poisoned with NaN. The same arguments give the same case.
        expected: the written tensors as a call must leave them, name -> tensor; changes nothing.
        tolerances: written tensor -> how it is compared.
        metadata: arguments that the calls of a model's layers share within a step.
        prefetch: the ways to call with less order on the stream: name -> scalar arguments.
        yardsticks: name -> function that binds another implementation of a cuda variant's problem.
        search: what the tuner searches.
        suite: the op's standard benchmark.
    """

    spec: OpSpec
    options: type[FieldSet]
    scenarios: Mapping[str, str]
    defaults: Mapping[str, Any]
    sizes: tuple[int, ...]
    check_size: int
    make: Callable[..., Case]
    expected: Callable[[Any], Mapping[str, Tensor]]
    tolerances: Mapping[str, Tolerance]
    metadata: tuple[str, ...] = ()
    prefetch: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"none": {}})
    yardsticks: Mapping[str, Callable[[Variant, torch.device], Launcher]] = field(
        default_factory=dict
    )
    search: Search | None = None
    suite: Sequence[Measurement] = ()


def workload(op: str) -> Workload:
    """The workload of an op. Raises TableError if there is no such op."""
    return importlib.import_module(f"kvfold.ops.{op_spec(op).name}.workload").WORKLOAD


def copy_of(arguments: Any, names: Iterable[str]) -> Any:
    """The arguments with copies of some tensors; views of one storage stay views of one."""
    from dataclasses import replace

    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copies:
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            copies[storage.data_ptr()] = flat.set_(storage).clone()
        base = copies[storage.data_ptr()]
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return replace(arguments, **{name: copy(getattr(arguments, name)) for name in names})
