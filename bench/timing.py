"""Times on the GPU by replay of a CUDA graph, and on the host per eager call."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvfold.bench import cases

REPLAYS = 15
WARM_UP = 0.03  # seconds, for the clocks to rise
MIN_CALLS = 20  # in one graph, so that the gap between two replays does not count
MAX_CALLS = 4096
L2_SIZES = 4  # a replay that touches this many times the L2 finds nothing of its last round there


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, least and most over the replays."""

    median_us: float
    min_us: float
    max_us: float


def l2_size(device: torch.device) -> int:
    """Bytes of the device's L2."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def states_for(touched: int, allocated: int, device: torch.device) -> int:
    """How many cases make the L2 cold, as far as the memory allows.

    Args:
        touched: bytes one call moves.
        allocated: bytes of memory one case holds.
    """
    wanted = max(MIN_CALLS, -(-L2_SIZES * l2_size(device) // touched))
    torch.cuda.empty_cache()  # so that what torch holds unused counts as free
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(wanted, MAX_CALLS, int(0.8 * free) // allocated))


def cold_states(problem: dict, device: torch.device, most: int = MAX_CALLS) -> list[cases.Case]:
    """As many cases as make the L2 cold, or as memory and `most` allow, with one metadata.

    Args:
        problem: the arguments of `cases.make`.
    """
    first = cases.make(**problem)
    count = min(most, states_for(first.bytes, first.allocated, device))
    others = (cases.make(**problem | {"seed": seed}) for seed in range(1, count))
    return [first, *(cases.sharing_metadata(other, first) for other in others)]


def replay(calls: Sequence[Callable[[], None]]) -> Timing:
    """Captures the calls back to back in one graph and times its replays."""
    for call in calls[:2]:  # compile and load outside the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP:
        graph.replay()
        torch.cuda.synchronize()
    # The replays queue up behind this one, so the host's time to launch them stays hidden.
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [
        1000 * before.elapsed_time(after) / len(calls)
        for before, after in itertools.pairwise(marks)
    ]
    return Timing(statistics.median(times), min(times), max(times))


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
