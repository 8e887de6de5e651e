"""The times of `kvfold tune`, on the GPU: candidates are compiled, checked and timed cold."""

import itertools
from collections.abc import Callable
from functools import partial

import torch

from kvfold.bench.build import compile_all
from kvfold.bench.measure import timing
from kvfold.bench.measure.point import Point, with_scalars
from kvfold.bench.tuning import search
from kvfold.bench.tuning.plan import Plan, TimePoint
from kvfold.bench.tuning.search import Times
from kvfold.codegen import Variant
from kvfold.runtime import dispatch
from kvfold.runtime.dispatch import Launcher
from kvfold.workload import Case

MOST_CASES = 256  # per point: small sizes would take thousands to leave the L2, and long
REPLAYS = 7
WARM_UP = 0.005  # seconds
FIRST_WARM_UP = 0.05  # after new cases: while the host made them, the clocks went down


def run(plan: Plan, device: torch.device, started: Callable[[str], None]) -> Times:
    """Times the candidates of every family on the GPU `device`, torch's current one.

    Args:
        started: is told what comes next.

    Raises:
        TableError: a problem that no variant can solve.
        CompileError: a candidate does not compile.
        WrongResult: a candidate is wrong.
    """
    arch = dispatch.arch_of(device)
    families = [search.candidates(plan, family[-1], arch) for family in plan.families]
    if plan.backend == "cuda":
        variants = list(itertools.chain.from_iterable(families))
        started(f"compiling {len(variants)} variants")
        compiled = compile_all((variant, arch) for variant in variants)
        codes = {variant: code for variant, (code, _) in zip(variants, compiled, strict=True)}
        families = [search.distinct((one, codes[one]) for one in found) for found in families]
    timer = GpuTimer(plan, device, started)
    times: Times = {}
    for found in families:
        times |= search.measure(found, timer, plan)
    return times


class GpuTimer:
    """Times variants, each checked before its first time.

    The cases of a problem, scenario and size are made once. They stay until others are asked for.
    """

    def __init__(self, plan: Plan, device: torch.device, started: Callable[[str], None]):
        """Args: device: torch's current one. started: is told the next scenario and size."""
        self._work = plan.workload
        self._device = device
        self._started = started
        self._launchers: dict[Variant, Launcher] = {}
        self._point: Point | None = None
        self._cases: list[Case] = []

    def __call__(self, variant: Variant, at: TimePoint) -> float:
        """Median microseconds of a call, the L2 cold.

        Raises:
            WrongResult: the variant is wrong.
        """
        if variant not in self._launchers:
            self._launchers[variant] = self._checked(variant)
        point = Point(variant.problem, self._work.options(), at.scenario, at.size)
        warm_up = WARM_UP
        if point != self._point:
            warm_up = FIRST_WARM_UP
            self._started(str(point))
            self._cases = []  # freed before the next cases need the memory
            self._cases, self._point = point.cold_cases(self._device, MOST_CASES), point
        call = with_scalars(self._launchers[variant], self._work.prefetch[at.prefetch])
        calls = [partial(call, case.arguments) for case in self._cases]
        return timing.replay(calls, REPLAYS, warm_up).median_us

    def _checked(self, variant: Variant) -> Launcher:
        """Binds a variant and checks it at one size more than a small check takes.

        A case that large is compared with the reference.
        """
        launcher = dispatch.bind(variant, self._device)
        scenario, size = next(iter(self._work.scenarios)), self._work.check_size + 1
        point = Point(variant.problem, self._work.options(), scenario, size)
        point.verify(launcher, variant.symbol, self._device)
        return launcher
