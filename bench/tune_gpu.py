"""The times of `kvfold tune`, on the GPU: candidates compiled, checked and timed cold."""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kvfold import nvrtc
from kvfold.bench import build, cases, timing, tune, verify
from kvfold.bench.verify import WrongResult
from kvfold.codegen import Variant
from kvfold.nvrtc import Compiled

MOST_STATES = 256  # per point; more make small batches no slower, but their graphs long to capture
CHECKED_BATCH = verify.ORACLE_BATCH + 1  # past what plain loops check, which would take longer


def compiled(found: Sequence[Variant], arch: str) -> Iterator[tuple[Variant, Compiled]]:
    """Compiles cuda variants on all cores; yields each as soon as it is done.

    Raises:
        CompileError: one does not compile.
    """
    by_symbol = {variant.symbol: variant for variant in found}
    for one in build.compile_all((variant, arch) for variant in found):
        yield by_symbol[one.symbol], one


def launcher(variant: Variant, code: Compiled | None) -> Callable[..., None]:
    """What runs a variant on the op's arguments and prefetch_state, on the current device.

    Args:
        code: of a cuda variant; a Triton kernel compiles when it is called.
    """
    module = importlib.import_module(f"kvfold.ops.{variant.op}.{variant.backend}_kernel")
    subject = variant if code is None else nvrtc.Kernel(variant, code.cubin)
    return functools.partial(module.launch, subject)


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
        calls = [functools.partial(call, *args, self._prefetch_state) for args in self._arguments]
        return timing.replay(calls).median_us

    def _checked(self, variant: Variant) -> Callable[..., None]:
        call = launcher(variant, self._codes.get(variant))

        def settled(*args) -> None:
            # With prefetch_state the kernel may read before the one that made its input has ended.
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            call(*args, self._prefetch_state)

        case = self._problem | {"batch": CHECKED_BATCH, "device": self._device}
        try:
            verify.verify(settled, **case)
        except WrongResult as error:
            raise WrongResult(f"{variant.symbol} is wrong: {error}") from None
        self._calls[variant] = call
        return call

    def _states(self, scenario: str, batch: int) -> list[tuple]:
        """Arguments of as many states as it takes that none is in the L2 when its turn comes."""
        case = self._problem | {"scenario": scenario, "batch": batch, "device": self._device}
        first = cases.make(**case)
        count = min(MOST_STATES, timing.states_for(first.bytes, first.allocated, self._device))
        others = (
            cases.sharing_metadata(cases.make(**case, seed=seed), first) for seed in range(1, count)
        )
        return [first.args(), *(other.args() for other in others)]


def measure(
    family: tune.Family,
    found: Sequence[Variant],
    codes: Mapping[Variant, Compiled],
    device: torch.device,
    *,
    batches: Sequence[int],
    scenarios: Sequence[str],
    prefetch_state: bool,
    timed: Callable[[], None],
) -> tune.Times:
    """Times a family's candidates on the GPU `device`; `timed` is called after every time taken.

    Raises:
        WrongResult: a candidate is wrong.
    """
    timer = Timer(family.problem, device, codes, prefetch_state)

    def time(variant: Variant, scenario: str, batch: int) -> float:
        us = timer(variant, scenario, batch)
        timed()
        return us

    return tune.measure(found, time, batches, scenarios)
