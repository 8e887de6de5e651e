"""A decode step around the kernels, four ways, from pageable copies and eager launches to a graph.

Each step uploads its metadata and then runs, per layer, a projection and the compressor.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvfold.bench import report, step_model
from kvfold.bench.report import Environment
from kvfold.bench.step_model import Layer, Shape
from kvfold.bench.verify import WrongResult
from kvfold.step import SegmentPrefetcher, StagingPool, StepBatch

OFFLOADS = "staging_batch_prefetch"  # a step of which takes up to a quarter of a second
WAYS = ("to_device_eager", "staging_eager", "staging_batch", OFFLOADS)
COMPRESS_RATIOS = (128, 4) * 30 + (128,)  # 61 layers
BATCHES = (16, 256)
WARM_UP = 4  # steps: one eager, one captured, two replayed
CHECKED_STEPS = 6
RING_BYTES = 1 << 24

OneStep = Callable[[dict[str, np.ndarray]], None]
SYNCHRONISATIONS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class StepRow:
    """One way of running a step. Times in microseconds per step.

    Attributes:
        scenario: the way, of WAYS.
        median_us, min_us, max_us: wall time of a step among many in a row.
        host_us: host time of a step, until its last launch, with an empty queue before it.
        device_us: sum of its kernels' times on the device, by a profile of many steps in a row.
            What two kernels overlap counts twice.
        copy_us: the time of the states' copies alone, both directions at once; None for ways that
            leave the states on the device.
        syncs: times the host waited for the device within a step, rounded up.
    """

    op: str
    scenario: str
    problem: dict
    batch: int
    median_us: float
    min_us: float
    max_us: float
    host_us: float
    device_us: float
    copy_us: float | None
    syncs: int


@dataclass(frozen=True)
class StepReport(Environment):
    """All rows of one run and where they come from."""

    rows: list[StepRow]


def load(file: Path) -> StepReport:
    """Reads what report.save wrote of a StepReport. Raises as report.load_as does."""
    return report.load_as(StepReport, StepRow, "step", file)


@contextlib.contextmanager
def way(
    name: str, shape: Shape, model: list[Layer], hidden_states: Tensor, device: torch.device
) -> Iterator[OneStep]:
    """A function that runs one step, given its metadata as CPU arrays.

    Where states are offloaded, `model` has them back when the context ends.
    """

    def layers(inputs: dict[str, Tensor], prefetcher: SegmentPrefetcher | None = None) -> None:
        step_model.run(model, inputs, hidden_states, shape.next_n, prefetcher=prefetcher)

    with contextlib.ExitStack() as stack:
        if name == "to_device_eager":
            yield lambda arrays: layers(
                {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            )
        elif name == "staging_eager":
            pool = stack.enter_context(StagingPool(device, RING_BYTES))
            yield lambda arrays: layers(pool.upload(arrays))
        else:
            batch = stack.enter_context(StepBatch(device, RING_BYTES))
            prefetcher = None
            if name == OFFLOADS:
                prefetcher = stack.enter_context(_offloaded(model, device))

            def one_step(arrays: dict[str, np.ndarray]) -> None:
                with batch.step((shape.batch, shape.next_n)) as step:
                    step.run(layers, step.upload(arrays), prefetcher)

            yield one_step
            batch.synchronize()
            if prefetcher is not None:
                prefetcher.synchronize()
                for layer, segment in zip(model, prefetcher.segments, strict=True):
                    for state, tensor in segment.items():
                        layer.state[state].copy_(tensor)


def _offloaded(model: list[Layer], device: torch.device) -> SegmentPrefetcher:
    segments = [{name: pool.cpu() for name, pool in layer.state.items()} for layer in model]
    largest = max(sum(pool.nbytes for pool in segment.values()) for segment in segments)
    return SegmentPrefetcher(segments, device, 2 * largest + (1 << 16), write_back=True)


def _metadata(
    shape: Shape, steps: Iterator[tuple[np.ndarray, np.ndarray]], count: int
) -> list[dict[str, np.ndarray]]:
    """Those of the first `count` steps."""
    return [step_model.metadata(shape, *step) for step in itertools.islice(steps, count)]


# ---- right ---------------------------------------------------------------------------------------


def check(
    shape: Shape, device: torch.device, steps: Iterator[tuple[np.ndarray, np.ndarray]], count: int
) -> None:
    """Runs the same steps in all four ways.

    Raises:
        WrongResult: they do not end with the same bits.
    """
    metadata = _metadata(shape, steps, count)
    expected: list[Tensor] | None = None
    for name in WAYS:
        model = step_model.layers(shape, device)
        with way(name, shape, model, hidden_states(shape, device), device) as one_step:
            for arrays in metadata:
                one_step(arrays)
        found = [tensor for layer in model for tensor in (layer.output, *layer.state.values())]
        if expected is None:
            expected = found
        for number, (tensor, wanted) in enumerate(zip(found, expected, strict=True)):
            if not torch.equal(tensor, wanted):
                raise WrongResult(f"{name}: tensor {number} differs from that of {WAYS[0]}")


def hidden_states(shape: Shape, device: torch.device) -> Tensor:
    """bf16 [tokens, hidden], the same for every step."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(shape.tokens, shape.hidden, generator=generator)
    return states.bfloat16().to(device)


# ---- fast ----------------------------------------------------------------------------------------


def measure(
    batches: tuple[int, ...], device: torch.device, started: Callable[[str], None]
) -> StepReport:
    """Checks, then times all ways at each batch size; `started` is told what comes next.

    Raises:
        WrongResult: the ways do not agree.
    """
    with contextlib.ExitStack() as stack:
        timed = []
        for batch in batches:
            few = Shape(COMPRESS_RATIOS[:4], batch)
            started(f"batch {batch}: check")
            check(few, device, step_model.steady_steps(few), CHECKED_STEPS)
            shape = Shape(COMPRESS_RATIOS, batch)
            model = step_model.layers(shape, device)
            states = hidden_states(shape, device)
            for name in WAYS:
                started(f"batch {batch}: {name}")
                one_step = stack.enter_context(way(name, shape, model, states, device))
                steps = step_model.steady_steps(shape)
                metadata = _metadata(shape, steps, count=8 if name == OFFLOADS else 32)
                times = _times(name, shape, model, one_step, metadata)
                timed.append((times, one_step, metadata))
        # Last: once a process has been profiled, its launches take longer.
        started("profiles")
        rows = [StepRow(**times, **_profile(*profiled)) for times, *profiled in timed]
    return StepReport(**report.environment(device), rows=rows)


def _times(
    name: str, shape: Shape, model: list[Layer], one_step: OneStep, metadata: list[dict]
) -> dict:
    """What a StepRow has of one way, all but its profile."""
    for arrays in metadata[:WARM_UP]:
        one_step(arrays)
    times = [_wall(one_step, metadata) for _ in range(3 if name == OFFLOADS else 9)]
    return {
        "op": "step",
        "scenario": name,
        "problem": {
            "layers": len(shape.compress_ratios), "hidden": shape.hidden,
            "head_dim": shape.head_dim, "next_n": shape.next_n,
        },
        "batch": shape.batch,
        "median_us": statistics.median(times),
        "min_us": min(times),
        "max_us": max(times),
        "host_us": _host(one_step, metadata),
        "copy_us": _copies(model) if name == OFFLOADS else None,
    }  # fmt: skip


def _wall(one_step: OneStep, metadata: list[dict]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for arrays in metadata:
        one_step(arrays)
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / len(metadata)


def _host(one_step: OneStep, metadata: list[dict]) -> float:
    times = []
    for arrays in metadata:
        torch.cuda.synchronize()
        began = time.perf_counter()
        one_step(arrays)
        times.append(1e6 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return statistics.median(times)


def _profile(one_step: OneStep, metadata: list[dict]) -> dict:
    """What a StepRow has of profiled steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        with torch.profiler.record_function("kvfold steps"):
            for arrays in metadata:
                one_step(arrays)
        torch.cuda.synchronize()
    events = profiler.events()
    (steps,) = (
        event for event in events
        if event.name == "kvfold steps" and event.device_type == torch.autograd.DeviceType.CPU
    )  # fmt: skip
    inside = steps.time_range
    syncs = sum(
        event.name in SYNCHRONISATIONS and inside.start <= event.time_range.start <= inside.end
        for event in events
    )
    kernels = (
        event for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Mem", "kvfold steps"))
    )  # fmt: skip
    device_us = sum(event.time_range.elapsed_us() for event in kernels)
    return {"device_us": device_us / len(metadata), "syncs": math.ceil(syncs / len(metadata))}


def _copies(model: list[Layer]) -> float:
    """Microseconds to bring all states in and, at the same time, as many bytes home."""
    states = [pool for layer in model for pool in layer.state.values()]
    host = [torch.empty(pool.shape, dtype=pool.dtype, pin_memory=True) for pool in states[:4]]
    inward, outward = torch.cuda.Stream(), torch.cuda.Stream()

    def copy() -> None:
        for number, pool in enumerate(states):
            # Neighbouring layers differ in size, every other one does not.
            with torch.cuda.stream(inward):
                pool.copy_(host[number % 4], non_blocking=True)
            with torch.cuda.stream(outward):
                host[number % 4].copy_(states[number % 4], non_blocking=True)

    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        copy()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - began))
    return min(times)
