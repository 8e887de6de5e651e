"""The microbenchmark runner: which points to time, with which kernels, against which limit."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

import kvfold
from kvfold import dispatch
from kvfold.bench import cases, limit, report, row_by_row, timing
from kvfold.bench.report import Report, Row
from kvfold.bench.verify import WrongResult, settled, verify
from kvfold.codegen import TableError, Variant
from kvfold.codegen.variant import POSITIVE, check_value, with_defaults
from kvfold.ops.paged_kv_compress.op import OP, run_variant

BATCHES = (1, 16, 64, 128, 256, 512)
CPU_BATCH = 16  # the largest that is checked on a machine without a GPU
WARM_CALLS = 100  # of the one state, with a warm L2


@dataclass(frozen=True)
class Point:
    """One place to measure."""

    scenario: str
    page_size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.scenario}, batch {self.batch}, page_size {self.page_size}"


@dataclass(frozen=True)
class Plan:
    """What to measure: every scenario x page_size x batch of one problem.

    Attributes:
        problem: the op's problem fields; those with a default may be left out.
        layout: 'split' or 'packed'.
        override: tuning fields to change in the dispatched variant; a variant the table does not
            hold will do.
        baseline: time the dispatched variant too, beside the override, and the yardstick.
        warm_l2: one state, replayed, in place of as many as the L2 cannot hold.
        prefetch_state: time what the table chose a second time, with prefetch_state=True.

    Raises:
        TableError: a value that is not accepted.
    """

    problem: dict
    batches: tuple[int, ...] = BATCHES
    scenarios: tuple[str, ...] = cases.SCENARIOS
    page_sizes: tuple[int, ...] = (32,)
    layout: str = "split"
    override: dict[str, int | str] = field(default_factory=dict)
    baseline: bool = False
    warm_l2: bool = False
    prefetch_state: bool = False

    def __post_init__(self):
        spec = Variant.spec("problem")
        problem = with_defaults(self.problem, spec)
        for name, value in problem.items():
            check_value(name, value, spec[name]["legal"])
        object.__setattr__(self, "problem", problem)
        for name, values, legal in (
            ("scenario", self.scenarios, cases.SCENARIOS),
            ("page_size", self.page_sizes, POSITIVE),
            ("batch", self.batches, POSITIVE),
            ("layout", (self.layout,), cases.LAYOUTS),
            ("override", self.override, tuple(Variant.spec("tuning"))),
        ):
            for value in values:
                check_value(name, value, legal)
        for name, value in self.override.items():
            check_value(name, value, Variant.spec("tuning")[name]["legal"])

    @property
    def key(self) -> tuple:
        """What dispatch looks up."""
        return tuple(self.problem.values())

    def points(self) -> list[Point]:
        """All points, in the order in which they are measured."""
        return list(
            itertools.starmap(
                Point, itertools.product(self.scenarios, self.page_sizes, self.batches)
            )
        )

    def case(self, point: Point, device: torch.device) -> dict:
        """The arguments of `cases.make` at a point."""
        return {
            **self.problem,
            "batch": point.batch,
            "scenario": point.scenario,
            "page_size": point.page_size,
            "layout": self.layout,
            "device": device,
        }


@dataclass(frozen=True)
class Kernel:
    """Something to time: `call` takes the op's first twelve arguments."""

    symbol: str
    backend: str
    call: Callable[..., None]
    dispatched: bool
    prefetch_state: bool = False


@dataclass(frozen=True)
class Checked:
    """One point found right: the rows it emits and the largest error in them."""

    point: Point
    emitted: int
    largest_error: float


def check(plan: Plan, device: torch.device) -> Iterator[Checked]:
    """The correctness part: runs the op at every point and compares, with no timing.

    Raises:
        WrongResult: naming the point.
    """
    for point in plan.points():
        case = plan.case(point, device)
        error = _verified(kvfold.paged_kv_compress, point, "the op", case)
        yield Checked(point, cases.make(**case).emitted, error)


def measure(
    plan: Plan,
    device: torch.device,
    started: Callable[[Point], None],
    best: limit.Limit | None = None,
) -> Report:
    """Times every point on the GPU `device`, which must be torch's current one.

    Each kernel's results are checked before it is timed. `started` is called with every point
    when its turn comes. best: the device's limit, measured first if it is not given.

    Raises:
        ValueError: the device is served by the reference.
        TableError: the table has no row for the problem, or the override cannot run.
        WrongResult: a kernel that is wrong is not timed.
    """
    if dispatch.backend_for(device.type) == "reference":
        raise ValueError("the reference serves this GPU, so there is no kernel to time")
    best = best or limit.measure(device)
    rows = []
    for point in plan.points():
        started(point)
        rows += _measure_point(plan, point, device, best)
    return Report(
        **report.environment(device),
        read_bandwidth_gbs=best.read_bandwidth_gbs,
        copy_bandwidth_gbs=best.copy_bandwidth_gbs,
        empty_node_us=best.empty_node_us,
        rows=rows,
    )


def _measure_point(
    plan: Plan, point: Point, device: torch.device, best: limit.Limit
) -> Iterator[Row]:
    case = plan.case(point, device)
    kernels = list(_kernels(plan, point, device))
    for kernel in kernels:
        call = settled(kernel.call, device) if kernel.prefetch_state else kernel.call
        _verified(call, point, kernel.symbol, case)
    states = [cases.make(**case)] if plan.warm_l2 else timing.cold_states(case, device)
    arguments = [state.args() for state in states]
    moved = states[0].bytes
    # Not cold where memory or the most calls in a graph allow too few states.
    cold = not plan.warm_l2 and len(states) * moved > timing.l2_size(device)
    for kernel in kernels:
        calls = [partial(kernel.call, *args) for args in arguments]
        time = timing.replay(calls * (WARM_CALLS if plan.warm_l2 else 1))
        plain = kernel.dispatched and not kernel.prefetch_state
        yield Row(
            op=OP,
            scenario=point.scenario,
            problem=plan.problem,
            batch=point.batch,
            page_size=point.page_size,
            layout=plan.layout,
            l2="cold" if cold else "warm",
            backend=kernel.backend,
            variant=kernel.symbol,
            prefetch_state=kernel.prefetch_state,
            median_us=time.median_us,
            min_us=time.min_us,
            max_us=time.max_us,
            bytes=moved,
            limit_us=best.us(moved),
            efficiency=best.us(moved) / time.median_us,
            host_us=timing.host(calls[0]) if kernel.dispatched else None,
            **(_host_beside(plan, point, arguments[0]) if plan.baseline and plain else {}),
        )


def _host_beside(plan: Plan, point: Point, args: tuple) -> dict[str, float]:
    """Host times of the same call on other ways, as fields of a Row."""
    times = {"host_torch_ops_us": timing.host(partial(torch.ops.kvfold.paged_kv_compress, *args))}
    with contextlib.suppress(TableError, ImportError):  # no such row, or no Triton
        variant = dispatch.table().select(OP, batch=point.batch, backend="triton", **plan.problem)
        launch = dispatch.bind(variant, args[0].device)
        times["host_triton_us"] = timing.host(partial(launch, *args))
    return times


def _kernels(plan: Plan, point: Point, device: torch.device) -> Iterator[Kernel]:
    """What is to be timed at a point."""
    variant = dispatch.select(OP, plan.key, point.batch, device)
    if plan.baseline or not plan.override:
        op, called = kvfold.paged_kv_compress, (variant.symbol, variant.backend)
        yield Kernel(*called, op, dispatched=True)
        if plan.prefetch_state and variant.backend == "cuda":
            call = lambda *args: op(*args, True)  # noqa: E731
            yield Kernel(*called, call, dispatched=True, prefetch_state=True)
    if plan.override:
        other = overridden(variant, plan.override, dispatch.arch_of(device))
        call = partial(run_variant, other)
        yield Kernel(other.symbol, other.backend, call, dispatched=False)
    if plan.baseline and variant.backend == "cuda":
        call = row_by_row.bind(variant, device)
        yield Kernel(row_by_row.NAME, "cuda", call, dispatched=False)


def overridden(variant: Variant, override: dict[str, int | str], arch: str) -> Variant:
    """The variant with other tuning.

    Raises:
        TableError: it cannot run.
    """
    try:
        # Fields that may be left out are: what suits the variant as it is says nothing of another.
        spec = Variant.spec("tuning")
        given = {name: variant.tuning[name] for name in spec if not spec[name]["default"]}
        other = replace(variant, **with_defaults(given | override, spec))
        other.check_shared(arch)
    except TableError as error:
        raise TableError(f"override of {variant.symbol}: {error}") from None
    return other


def _verified(call: Callable[..., None], point: Point, name: str, case: dict) -> float:
    try:
        return verify(call, **case)
    except WrongResult as error:
        raise WrongResult(f"{name} is wrong at {point}: {error}") from None
