"""The microbenchmark runner: which points to time, with which kernels, against which limit."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from kvfold.bench.environment import environment
from kvfold.bench.measure import limit, timing
from kvfold.bench.measure.limit import Limit
from kvfold.bench.measure.point import SIZES, Call, Checked, Point, combinations, with_scalars
from kvfold.bench.records import KernelReport, KernelRow
from kvfold.codegen import TableError, Variant
from kvfold.codegen.fields import check_names, check_value
from kvfold.runtime import dispatch, repeat
from kvfold.runtime.torch_op import call_with, torch_op
from kvfold.workload import Measurement, Workload


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        points: in the order in which they are measured.
        override: 'backend' and tuning fields of a variant to time in place of the dispatched one.
        baseline: time the dispatched variant too, the yardsticks, and host times.
        prefetch: how to call, names of the workload's prefetch.
    """

    points: tuple[Point, ...]
    override: Mapping[str, Any]
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
    return Plan(points, measurement.override, measurement.baseline, prefetch)


def check(points: Iterable[Point], device: torch.device) -> Iterator[Checked]:
    """Runs the op at every point and compares, with no timing.

    Raises:
        WrongResult: naming the point.
    """
    for point in points:
        op = torch_op(point.problem.op)
        yield point.verify(lambda a, op=op: call_with(op, a), "the op", device)


# ---- timing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Something to time: `call` takes the op's arguments. KernelRow explains the other fields."""

    variant: str
    backend: str
    chosen_by: str
    prefetch: str
    call: Call


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
    return KernelReport(**environment(device), **asdict(best), rows=rows)


def _measure_point(
    plan: Plan, point: Point, device: torch.device, best: Limit
) -> Iterator[KernelRow]:
    subjects = list(_subjects(plan, point, device))
    for subject in subjects:
        point.verify(subject.call, subject.variant, device)
    cases = point.cold_cases(device)
    moved = cases[0].moved_bytes
    cold = len(cases) * moved > timing.l2_bytes(device)
    for subject in subjects:
        time = timing.replay([partial(subject.call, case.arguments) for case in cases])
        measure_host = plan.baseline and subject.chosen_by == "table" and subject.prefetch == "none"
        yield KernelRow(
            op=point.problem.op,
            scenario=point.scenario,
            size=point.size,
            problem=point.problem.values(),
            options=point.options.values(),
            l2="cold" if cold else "warm",
            backend=subject.backend,
            variant=subject.variant,
            chosen_by=subject.chosen_by,
            prefetch=subject.prefetch,
            **asdict(time),
            moved_bytes=moved,
            limit_us=best.us(moved),
            efficiency=best.us(moved) / time.median_us,
            host_us=_host_times(point, cases[0].arguments, device) if measure_host else {},
        )


def _subjects(plan: Plan, point: Point, device: torch.device) -> Iterator[Subject]:
    """What is to be timed at a point."""
    op = torch_op(point.problem.op)
    variant = dispatch.select(point.problem, point.size, device)
    calls: list[tuple[str, Variant, Call]] = []
    if plan.baseline or not plan.override:
        calls.append(("table", variant, lambda a: call_with(op, a)))
    if plan.override:
        other = overridden(variant, plan.override, point, device)
        calls.append(("override", other, dispatch.bind(other, device)))
    for chosen_by, one, call in calls:
        for name in plan.prefetch:
            if one.backend == "cuda" or name == "none":  # Triton knows no prefetch
                prefetching = with_scalars(call, point.workload.prefetch[name])
                yield Subject(one.symbol, one.backend, chosen_by, name, prefetching)
    if plan.baseline and variant.backend == "cuda":
        for name, bind in point.workload.yardsticks.items():
            yield Subject(name, "cuda", "yardstick", "none", bind(variant, device))


def overridden(
    variant: Variant, override: Mapping[str, Any], point: Point, device: torch.device
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
    args, kwargs = arguments.args_and_kwargs()
    call = partial(op, *args, **kwargs)
    through_torch = partial(getattr(torch.ops.kvfold, point.problem.op), *args, **kwargs)
    times = {"call": timing.host(call), "torch_ops": timing.host(through_torch)}
    with repeat.disabled():
        times["unrepeated"] = timing.host(call)
    triton = dispatch.table().find(point.problem, "triton", dispatch.arch_of(device), point.size)
    if triton is not None:
        with contextlib.suppress(ImportError):
            times["triton"] = timing.host(partial(dispatch.bind(triton, device), arguments))
    return times
