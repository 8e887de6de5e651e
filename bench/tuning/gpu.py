"""The times of `kvfold tune`, on the GPU: candidates are compiled, checked and timed cold."""

import itertools
from collections.abc import Callable, Mapping

import torch

from kvfold.bench.build import compile_all
from kvfold.bench.measure import timing
from kvfold.bench.measure.runner import with_scalars
from kvfold.bench.measure.verify import WrongResult, verify
from kvfold.bench.tuning import search
from kvfold.bench.tuning.search import Plan, TimePoint, Times
from kvfold.codegen import Problem, Variant
from kvfold.runtime import dispatch
from kvfold.runtime.compiler import Compiled
from kvfold.runtime.dispatch import Launcher
from kvfold.runtime.driver import Kernel
from kvfold.workload import Case

MOST_CASES = 256  # per point: small sizes would take thousands to leave the L2, and long
REPLAYS = 7
WARM_UP = 0.005  # seconds; the GPU is busy throughout, so its clocks are up

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


def run(plan: Plan, device: torch.device, progress: Progress) -> list[Times]:
    """Times the candidates of every family on the GPU `device`, torch's current one.

    Raises:
        TableError: a problem that no variant can solve.
        CompileError: a candidate does not compile.
        WrongResult: a candidate is wrong.
    """
    arch = dispatch.arch_of(device)
    found = [search.candidates(plan, family.problem, arch) for family in plan.families]
    codes: dict[Variant, Compiled] = {}
    if plan.backend == "cuda":
        variants = {v.symbol: v for v in itertools.chain.from_iterable(found)}
        progress("compiling", 0, len(variants))
        for code, _ in compile_all((variant, arch) for variant in variants.values()):
            codes[variants[code.symbol]] = code
            progress("compiling", len(codes), len(variants))
        found = [search.distinct((v, codes[v]) for v in family) for family in found]

    # How many survive is known late, so the bar may jump at a family's end.
    most = [search.most_times(plan, len(family)) for family in found]
    times = []
    for index, (family, candidates) in enumerate(zip(plan.families, found, strict=True)):
        timer = FamilyTimer(plan, family.problem, device, codes)
        text = f"timing problem {index + 1} of {len(found)}"
        count = itertools.count(sum(most[:index]))

        def time(variant, point, timer=timer, text=text, count=count) -> float:
            progress(text, next(count), sum(most))
            return timer(variant, point)

        times.append(search.measure(candidates, time, plan))
    return times


class FamilyTimer:
    """Times the variants of one problem, each checked before its first time.

    The cases of a scenario and size are made once. They stay until another is asked for.
    """

    def __init__(
        self,
        plan: Plan,
        problem: Problem,
        device: torch.device,
        codes: Mapping[Variant, Compiled],
    ):
        """Args: device: torch's current one. codes: of the cuda variants."""
        self._work = plan.workload
        self._problem = problem
        self._device = device
        self._codes = codes
        self._options = self._work.options()
        self._launchers: dict[Variant, Launcher] = {}
        self._at: tuple[str, int] | None = None
        self._cases: list[Case] = []

    def __call__(self, variant: Variant, point: TimePoint) -> float:
        """Median microseconds of a call, the L2 cold.

        Raises:
            WrongResult: the variant is wrong.
        """
        launcher = self._launchers.get(variant) or self._checked(variant)
        if self._at != (point.scenario, point.size):
            self._cases = []  # freed before the next cases need the memory
            self._at = point.scenario, point.size
            self._cases = timing.cold_cases(
                lambda seed: self._make(point.scenario, point.size, seed),
                self._work.metadata,
                self._device,
                MOST_CASES,
            )
        call = with_scalars(launcher, self._work.prefetch[point.prefetch])
        calls = timing.calls_of(call, self._cases)
        return timing.replay(calls, REPLAYS, WARM_UP).median_us

    def _make(self, scenario: str, size: int, seed: int = 0) -> Case:
        return self._work.make(
            self._problem, size, scenario, self._options, device=self._device, seed=seed
        )

    def _checked(self, variant: Variant) -> Launcher:
        code = self._codes.get(variant)
        launcher = (
            dispatch.bind(variant, self._device) if code is None else Kernel(variant, code.cubin)
        )
        scenario = next(iter(self._work.scenarios))
        # One more than a small check takes: a large case is compared with the reference.
        case = self._make(scenario, self._work.check_size + 1)
        try:
            verify(launcher, self._work, case)
        except WrongResult as error:
            raise WrongResult(f"{variant.symbol} is wrong: {error}") from None
        self._launchers[variant] = launcher
        return launcher
