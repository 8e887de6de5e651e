"""The times of `kvfold tune`, on the GPU: candidates compiled, checked and timed cold."""

import functools
import importlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kvfold import dispatch, nvrtc
from kvfold.bench import build, report, timing, tune, verify
from kvfold.bench.tune_report import Measured
from kvfold.bench.verify import WrongResult
from kvfold.codegen import Variant
from kvfold.nvrtc import Compiled

MOST_STATES = 256  # per point; small batches would take thousands to leave the L2, and long
CHECKED_BATCH = verify.ORACLE_BATCH + 1  # past what plain loops check, which would take longer


def run(
    plan: tune.Plan, device: torch.device, progress: Callable[[str, int, int], None]
) -> Measured:
    """Times the candidates of every family on the GPU `device`, torch's current one.

    Args:
        progress: called with what is being done, how many are done, and of how many.

    Raises:
        TableError: a problem that no variant can solve.
        CompileError: a candidate does not compile.
        WrongResult: a candidate is wrong.
    """
    arch = dispatch.arch_of(device)
    found = plan.candidates(arch)
    codes = {}
    if plan.backend == "cuda":
        jobs = {v.symbol: v for v in itertools.chain.from_iterable(found)}
        progress("compiling", 0, len(jobs))
        for code in build.compile_all((variant, arch) for variant in jobs.values()):
            codes[jobs[code.symbol]] = code
            progress("compiling", len(codes), len(jobs))
        found = [tune.distinct((v, codes[v]) for v in candidates) for candidates in found]

    # How many survive is known late, so the bar may jump at a family's end.
    most = [tune.most_times(len(one), plan.batches, plan.scenarios) for one in found]
    times = []
    for index, (family, candidates) in enumerate(zip(plan.families, found, strict=True)):
        timer = Timer(family.problem, device, codes, plan.prefetch_state)
        text = f"timing problem {index + 1} of {len(found)}"
        count = itertools.count(sum(most[:index]))

        def time(*point, timer=timer, text=text, count=count) -> float:
            progress(text, next(count), sum(most))
            return timer(*point)

        times.append(tune.measure(candidates, time, plan.batches, plan.scenarios))
    return Measured(**report.environment(device), arch=arch, plan=plan, times=times)


def launcher(variant: Variant, code: Compiled | None, prefetch_state: bool) -> Callable[..., None]:
    """What runs a variant on the op's first twelve arguments, on the current device.

    Args:
        code: of a cuda variant; a Triton kernel compiles when it is called.
        prefetch_state: the op's last argument.
    """
    module = importlib.import_module(f"kvfold.ops.{variant.op}.{variant.backend}_kernel")
    subject = variant if code is None else nvrtc.Kernel(variant, code.cubin)
    return functools.partial(module.launch, subject, prefetch_state=prefetch_state)


class Timer:
    """Times the variants of one problem, each checked before its first time.

    The states of a point are made once; they stay until another point is asked for.
    """

    def __init__(
        self,
        problem: dict[str, Any],
        device: torch.device,
        codes: Mapping[Variant, Compiled],
        prefetch_state: bool,
    ):
        """device: torch's current one. codes: of the cuda variants. prefetch_state: of the op."""
        self._problem = problem
        self._device = device
        self._codes = codes
        self._prefetch_state = prefetch_state
        self._calls = {}
        self._point = None
        self._arguments = []

    def __call__(self, variant: Variant, scenario: str, batch: int) -> float:
        """Median microseconds of a call, the L2 cold.

        Raises:
            WrongResult: the variant is wrong.
        """
        call = self._calls.get(variant) or self._checked(variant)
        if self._point != (scenario, batch):
            self._point, self._arguments = None, []  # gone before the next states need the room
            self._arguments = self._states(scenario, batch)
            self._point = scenario, batch
        calls = [functools.partial(call, *args) for args in self._arguments]
        return timing.replay(calls).median_us

    def _checked(self, variant: Variant) -> Callable[..., None]:
        code = self._codes.get(variant)
        call = launcher(variant, code, self._prefetch_state)
        case = self._problem | {"batch": CHECKED_BATCH, "device": self._device}
        try:
            verify.verify(verify.settled(call, self._device), **case)
        except WrongResult as error:
            raise WrongResult(f"{variant.symbol} is wrong: {error}") from None
        self._calls[variant] = call
        return call

    def _states(self, scenario: str, batch: int) -> list[tuple]:
        """Arguments of so many states that none is in the L2 in its turn, or of MOST_STATES."""
        case = self._problem | {"scenario": scenario, "batch": batch, "device": self._device}
        return [state.args() for state in timing.cold_states(case, self._device, MOST_STATES)]
