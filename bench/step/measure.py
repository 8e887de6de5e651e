"""Times of a whole decode step: wall time, host time, kernels and copies."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch._C._autograd import DeviceType

from kvfold.bench.environment import environment
from kvfold.bench.measure import timing
from kvfold.bench.measure.timing import Timing
from kvfold.bench.records import StepReport, StepRow
from kvfold.bench.step.model import Layer, Shape, make_layers, steady_steps
from kvfold.bench.step.modes import (
    MODES,
    OFFLOADS,
    OneStep,
    check,
    first_steps,
    hidden_states,
    mode,
)

COMPRESS_RATIOS = (128, 4) * 30 + (128,)  # 61 layers
BATCHES = (16, 256)
WARM_UP = 4  # steps: one eager, one captured, two replayed
CHECKED_STEPS = 6
SYNCHRONISATIONS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def measure(
    batches: tuple[int, ...], device: torch.device, started: Callable[[str], None]
) -> StepReport:
    """Checks, then times all modes at each batch size; `started` is told what comes next.

    Raises:
        WrongResult: the modes do not agree.
    """
    with contextlib.ExitStack() as stack:
        timed = []
        for batch in batches:
            few = Shape(COMPRESS_RATIOS[:4], batch)
            started(f"batch {batch}: check")
            check(few, device, steady_steps(few), CHECKED_STEPS)
            shape = Shape(COMPRESS_RATIOS, batch)
            layers = make_layers(shape, device)
            states = hidden_states(shape, device)
            for name in MODES:
                started(f"batch {batch}: {name}")
                one_step = stack.enter_context(mode(name, shape, layers, states, device))
                steps = steady_steps(shape)
                metadata = first_steps(shape, steps, count=8 if name == OFFLOADS else 32)
                times = _times(name, shape, layers, one_step, metadata)
                timed.append((times, one_step, metadata))
        # Last: once a process has been profiled, its launches take longer.
        started("profiles")
        rows = [StepRow(**times, **_profile(*profiled)) for times, *profiled in timed]
    return StepReport(**environment(device), rows=rows)


def _times(
    name: str, shape: Shape, layers: list[Layer], one_step: OneStep, metadata: list[dict]
) -> dict:
    """What a StepRow has of one mode, but for its profile."""
    for arrays in metadata[:WARM_UP]:
        one_step(arrays)
    calls = [partial(one_step, arrays) for arrays in metadata]
    times = [_wall(calls) for _ in range(3 if name == OFFLOADS else 9)]
    steps = iter(calls)
    return {
        "mode": name,
        "problem": {
            "layers": len(shape.compress_ratios), "hidden": shape.hidden,
            "head_dim": shape.head_dim, "next_n": shape.next_n,
        },
        "batch": shape.batch,
        **asdict(Timing.of(times)),
        "host_us": timing.host(lambda: next(steps)(), len(calls), queue=1),
        "copy_us": _copies(layers) if name == OFFLOADS else None,
    }  # fmt: skip


def _wall(calls: Sequence[Callable[[], None]]) -> float:
    """Microseconds per call, of calls in a row."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / len(calls)


def _profile(one_step: OneStep, metadata: list[dict]) -> dict:
    """What a StepRow has of profiled steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        with torch.profiler.record_function("kvfold steps"):
            for arrays in metadata:
                one_step(arrays)
        torch.cuda.synchronize()
    events = list(profiler.events() or ())
    (steps,) = (
        event for event in events
        if event.name == "kvfold steps" and event.device_type == DeviceType.CPU
    )  # fmt: skip
    inside = steps.time_range
    syncs = sum(
        event.name in SYNCHRONISATIONS and inside.start <= event.time_range.start <= inside.end
        for event in events
    )
    kernels = (
        event for event in events
        if event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Mem", "kvfold steps"))
    )  # fmt: skip
    device_us = sum(event.time_range.elapsed_us() for event in kernels)
    return {
        "device_us": device_us / len(metadata),
        "synchronisations": math.ceil(syncs / len(metadata)),
    }


def _copies(layers: list[Layer]) -> float:
    """Microseconds to bring all states in and, at the same time, as many bytes home."""
    states = [pool for layer in layers for pool in layer.state.values()]
    host = [torch.empty(pool.shape, dtype=pool.dtype, pin_memory=True) for pool in states[:4]]
    inward, outward = torch.cuda.Stream(), torch.cuda.Stream()

    def copy() -> None:
        for number, pool in enumerate(states):
            # Neighbouring layers differ in size, every other one does not.
            with torch.cuda.stream(inward):
                pool.copy_(host[number % 4], non_blocking=True)
            with torch.cuda.stream(outward):
                host[number % 4].copy_(states[number % 4], non_blocking=True)

    return min(_wall([copy]) for _ in range(4))
