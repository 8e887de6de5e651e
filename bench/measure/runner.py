"""The microbenchmark runner: which points to time, with which kernels, against which limit."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kvfold.bench.measure import limit, timing
from kvfold.bench.measure.verify import WrongResult, verify
from kvfold.bench.records import KernelReport, KernelRow, environment
from kvfold.codegen import FieldSet, Problem, TableError, Variant
from kvfold.codegen.fields import check_names, check_value
from kvfold.runtime import dispatch, repeat
from kvfold.runtime.torch_op import torch_op
from kvfold.workload import Case, Measurement, Workload

SIZES = range(1, 2**20 + 1)  # of a case; a larger one fits in no GPU's memory


@dataclass(frozen=True)
class Point:
    """One place to measure."""

    problem: Problem
    options: FieldSet
    scenario: str
    size: int

    def __str__(self) -> str:
        axis = f"size {self.size}"
        return ", ".join(filter(None, (self.scenario, axis, str(self.problem), str(self.options))))

    def make(self, workload: Workload, device: torch.device, seed: int = 0) -> Case:
        """The point's case."""
        return workload.make(
            self.problem, self.size, self.scenario, self.options, device=device, seed=seed
        )


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        workload: of the op.
        points: in the order in which they are measured.
        override: 'backend' and tuning fields of a variant to time in place of the dispatched one.
        baseline: time the dispatched variant too, the yardsticks, and host times.
        prefetch: how to call, names of the workload's prefetch.
    """

    workload: Workload
    points: tuple[Point, ...]
    override: dict[str, Any]
    baseline: bool
    prefetch: tuple[str, ...]


def plan(
    workload: Workload, measurement: Measurement, prefetch: Sequence[str] | None = None
) -> Plan:
    """The plan of a measurement; a field that holds a list stands for each of its values.

    Raises:
        TableError: a name or a value that is not accepted.
    """
    spec = workload.spec
    scenarios = measurement.scenarios or tuple(workload.scenarios)
    sizes = measurement.sizes or workload.sizes
    prefetch = tuple(workload.prefetch) if prefetch is None else tuple(prefetch)
    check_names(scenarios, workload.scenarios, "scenario")
    check_names(prefetch, workload.prefetch, "prefetch")
    for size in sizes:
        check_value(spec.axis, size, SIZES)
    overrides = ["backend", *(field.name for field in spec.tuning.fields())]
    check_names(measurement.override, overrides, "tuning field")
    points = tuple(
        Point(spec.problem.of(problem), workload.options.of(options), scenario, size)
        for problem in combinations({**workload.defaults, **measurement.problem})
        for options in combinations(measurement.options)
        for scenario, size in itertools.product(scenarios, sizes)
    )
    return Plan(workload, points, dict(measurement.override), measurement.baseline, prefetch)


def combinations(fields: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the fields' values, of which some are lists."""
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in fields.values()]
    for values in itertools.product(*lists):
        yield dict(zip(fields, values, strict=True))


# ---- checking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A point found right: the rows that the call writes, and the largest error in them."""

    point: Point
    rows: int
    largest_error: float


def check(plan: Plan, device: torch.device) -> Iterator[Checked]:
    """Runs the op at every point and compares, with no timing.

    Raises:
        WrongResult: naming the point.
    """
    op = torch_op(plan.workload.spec.name)
    for point in plan.points:
        case = point.make(plan.workload, device)
        error = _verified(lambda a: op(*a.args()), plan.workload, point, "the op", case)
        yield Checked(point, case.rows, error)


def _verified(
    call: Callable[[Any], None], workload: Workload, point: Point, name: str, case: Case
) -> float:
    try:
        return verify(call, workload, case)
    except WrongResult as error:
        raise WrongResult(f"{name} is wrong at {point}: {error}") from None


# ---- timing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Something to time: `call` takes the op's arguments."""

    variant: str
    backend: str
    chosen_by: str
    prefetch: str
    call: Callable[[Any], None]


def measure(
    plans: Sequence[Plan], device: torch.device, started: Callable[[Point], None]
) -> KernelReport:
    """Times every point on the GPU `device`, which must be torch's current one.

    Each kernel's results are checked before it is timed.

    Args:
        started: called with every point before it is measured.

    Raises:
        ValueError: the reference serves the device, or no kernel has the plans' prefetch.
        TableError: the table has no row for a problem, or the override cannot run.
        WrongResult: a kernel that is wrong is not timed.
    """
    if dispatch.backend_for(device.type) == "reference":
        raise ValueError("the reference serves this GPU, so there is no kernel to time")
    best = limit.measure(device)
    rows = []
    for plan in plans:
        for point in plan.points:
            started(point)
            rows += _measure_point(plan, point, device, best)
    if not rows:
        wanted = ", ".join(plans[0].prefetch)
        raise ValueError(f"no kernel of the plan has prefetch {wanted}; accepted: none")
    return KernelReport(
        **environment(KernelReport, device),
        read_bandwidth_gbs=best.read_bandwidth_gbs,
        copy_bandwidth_gbs=best.copy_bandwidth_gbs,
        empty_node_us=best.empty_node_us,
        rows=rows,
    )


def _measure_point(
    plan: Plan, point: Point, device: torch.device, best: limit.Limit
) -> Iterator[KernelRow]:
    workload = plan.workload
    subjects = list(_subjects(plan, point, device))
    for subject in subjects:
        case = point.make(workload, device)
        _verified(subject.call, workload, point, subject.variant, case)
    cases = timing.cold_cases(
        lambda seed: point.make(workload, device, seed), workload.metadata, device
    )
    moved = cases[0].moved_bytes
    cold = len(cases) * moved > timing.l2_bytes(device)
    for subject in subjects:
        calls = timing.calls_of(subject.call, cases)
        time = timing.replay(calls)
        measure_host = plan.baseline and subject.chosen_by == "table" and subject.prefetch == "none"
        yield KernelRow(
            op=workload.spec.name,
            scenario=point.scenario,
            size=point.size,
            problem=point.problem.values(),
            options=point.options.values(),
            l2="cold" if cold else "warm",
            backend=subject.backend,
            variant=subject.variant,
            chosen_by=subject.chosen_by,
            prefetch=subject.prefetch,
            median_us=time.median_us,
            min_us=time.min_us,
            max_us=time.max_us,
            moved_bytes=moved,
            limit_us=best.us(moved),
            efficiency=best.us(moved) / time.median_us,
            host_us=_host_times(point, cases[0].arguments, device) if measure_host else {},
        )


def _subjects(plan: Plan, point: Point, device: torch.device) -> Iterator[Subject]:
    """What is to be timed at a point."""
    workload, op = plan.workload, torch_op(plan.workload.spec.name)
    variant = dispatch.select(point.problem, point.size, device)
    if plan.baseline or not plan.override:
        for name, call in _calls(plan, variant, lambda a: op(*a.args())):
            yield Subject(variant.symbol, variant.backend, "table", name, call)
    if plan.override:
        other = overridden(variant, plan.override, point, device)
        launcher = dispatch.bind(other, device)
        for name, call in _calls(plan, other, launcher):
            yield Subject(other.symbol, other.backend, "override", name, call)
    if plan.baseline and variant.backend == "cuda":
        for name, bind in workload.yardsticks.items():
            yield Subject(name, "cuda", "yardstick", "none", bind(variant, device))


def _calls(
    plan: Plan, variant: Variant, call: Callable[[Any], None]
) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """The call with each prefetch of the plan that the backend knows."""
    for name in plan.prefetch:
        if variant.backend == "cuda" or name == "none":
            yield name, with_scalars(call, plan.workload.prefetch[name])


def with_scalars(call: Callable[[Any], None], scalars: Any) -> Callable[[Any], None]:
    """The call with other scalar arguments."""
    return lambda arguments: call(replace(arguments, **scalars))


def overridden(
    variant: Variant, override: dict[str, Any], point: Point, device: torch.device
) -> Variant:
    """The variant with another backend or tuning.

    Another backend's own row, if the table has one, says what is left out.

    Raises:
        TableError: it cannot run.
    """
    fields = dict(override)
    backend = fields.pop("backend", variant.backend)
    arch = dispatch.arch_of(device)
    base = variant
    if backend != variant.backend:
        base = dispatch.table().find(point.problem, backend, arch, point.size) or variant
    try:
        tuning = type(base.tuning).of(base.tuning.values() | fields, "tuning field")
        other = Variant(problem=variant.problem, backend=backend, tuning=tuning)
        other.check_arch(arch)
    except TableError as error:
        raise TableError(f"override of {variant.symbol}: {error}") from None
    return other


def _host_times(point: Point, arguments: Any, device: torch.device) -> dict[str, float]:
    """Host times of one call, by how it is made."""
    op = torch_op(point.problem.op)
    args = arguments.args()
    through_torch = partial(getattr(torch.ops.kvfold, point.problem.op), *args)
    times = {"call": timing.host(partial(op, *args)), "torch_ops": timing.host(through_torch)}
    with repeat.disabled():
        times["unrepeated"] = timing.host(partial(op, *args))
    triton = dispatch.table().find(point.problem, "triton", dispatch.arch_of(device), point.size)
    if triton is not None:
        with contextlib.suppress(ImportError):
            times["triton"] = timing.host(partial(dispatch.bind(triton, device), arguments))
    return times
