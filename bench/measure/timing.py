"""Times on the GPU by replay of a CUDA graph, and on the host per eager call."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from kvfold.workload import Case

REPLAYS = 15
WARM_UP = 0.03  # seconds, for the clocks to rise
MIN_CALLS = 20  # in one graph, so that the gap between two replays does not count
MAX_CALLS = 4096
L2_SIZES = 4  # a replay that touches this many times the L2 finds nothing of its last round there


@dataclass(frozen=True)
class Timing:
    """Microseconds per call or step: median, least and most over several runs."""

    median_us: float
    min_us: float
    max_us: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Self:
        """What these times come to."""
        return cls(statistics.median(times), min(times), max(times))


def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def cold_cases(
    make: Callable[[int], Case],
    metadata: Sequence[str],
    device: torch.device,
    most: int,
) -> list[Case]:
    """As many cases as make the L2 cold, or as memory and `most` allow.

    Args:
        make: makes the case of a seed.
        metadata: arguments that all share with the first, as the layers of a step do.
    """
    first = make(0)
    torch.cuda.empty_cache()  # so that the memory torch holds unused counts as free
    free, _ = torch.cuda.mem_get_info(device)
    wanted = max(MIN_CALLS, -(-L2_SIZES * l2_bytes(device) // first.moved_bytes))
    count = max(1, min(wanted, most, int(0.8 * free) // first.allocated_bytes))
    shared = {name: getattr(first.arguments, name) for name in metadata}
    others = (make(seed) for seed in range(1, count))
    return [first, *(replace(o, arguments=replace(o.arguments, **shared)) for o in others)]


def replay(
    calls: Sequence[Callable[[], None]], replays: int = REPLAYS, warm_up: float = WARM_UP
) -> Timing:
    """Captures the calls back to back in one graph and times its replays."""
    for call in calls[:2]:  # compile and load outside the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    began = time.perf_counter()
    while time.perf_counter() - began < warm_up:
        graph.replay()
        torch.cuda.synchronize()
    # The replays queue up behind this one, so the host's time to launch them stays hidden.
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [
        1000 * before.elapsed_time(after) / len(calls)
        for before, after in itertools.pairwise(marks)
    ]
    return Timing.of(times)


def host(call: Callable[[], None], calls: int = 400, queue: int = 8) -> float:
    """Median host time of an eager call in microseconds, never waiting for a full launch queue."""
    times = []
    for index in range(calls):
        if index % queue == 0:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)
