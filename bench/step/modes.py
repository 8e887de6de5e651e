"""A whole decode step in four modes, from pageable copies and eager launches to one CUDA graph.

A step uploads its metadata, and then runs a projection and the compressor per layer.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from kvfold.bench.measure.verify import WrongResult
from kvfold.bench.step.model import Layer, Shape, make_layers, run_step, step_metadata
from kvfold.step import SegmentPrefetcher, StagingPool, StepBatch

OFFLOADS = "staging_batch_prefetch"  # a step of which takes up to a quarter of a second
MODES = ("to_device_eager", "staging_eager", "staging_batch", OFFLOADS)
RING_BYTES = 1 << 24

OneStep = Callable[[dict[str, np.ndarray]], None]


@contextlib.contextmanager
def mode(
    name: str, shape: Shape, layers: list[Layer], hidden_states: Tensor, device: torch.device
) -> Iterator[OneStep]:
    """A function that runs one step, given its metadata as CPU arrays.

    If states are offloaded, `layers` has them back when the context ends.
    """

    def body(inputs: dict[str, Tensor], prefetcher: SegmentPrefetcher | None = None) -> None:
        run_step(layers, inputs, hidden_states, shape.next_n, prefetcher)

    with contextlib.ExitStack() as stack:
        if name == "to_device_eager":
            yield lambda arrays: body(
                {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            )
        elif name == "staging_eager":
            pool = stack.enter_context(StagingPool(device, RING_BYTES))
            yield lambda arrays: body(pool.upload(arrays))
        else:
            batch = stack.enter_context(StepBatch(device, RING_BYTES))
            prefetcher = None
            if name == OFFLOADS:
                prefetcher = stack.enter_context(_offloaded(layers, device))

            def one_step(arrays: dict[str, np.ndarray]) -> None:
                with batch.step((shape.batch, shape.next_n)) as step:
                    step.run(body, step.upload(arrays), prefetcher)

            yield one_step
            batch.synchronize()
            if prefetcher is not None:
                prefetcher.synchronize()
                for layer, segment in zip(layers, prefetcher.segments, strict=True):
                    for state, tensor in segment.items():
                        layer.state[state].copy_(tensor)


def _offloaded(layers: list[Layer], device: torch.device) -> SegmentPrefetcher:
    segments = [{name: pool.cpu() for name, pool in layer.state.items()} for layer in layers]
    largest = max(sum(pool.nbytes for pool in segment.values()) for segment in segments)
    return SegmentPrefetcher(segments, device, 2 * largest + (1 << 16), write_back=True)


def first_steps(
    shape: Shape, steps: Iterator[tuple[np.ndarray, np.ndarray]], count: int
) -> list[dict[str, np.ndarray]]:
    """The metadata of the first `count` steps."""
    return [step_metadata(shape, *step) for step in itertools.islice(steps, count)]


def check(
    shape: Shape, device: torch.device, steps: Iterator[tuple[np.ndarray, np.ndarray]], count: int
) -> None:
    """Runs the same steps in all modes.

    Raises:
        WrongResult: they do not end with the same bits.
    """
    metadata = first_steps(shape, steps, count)
    expected: list[Tensor] | None = None
    for name in MODES:
        layers = make_layers(shape, device)
        with mode(name, shape, layers, hidden_states(shape, device), device) as one_step:
            for arrays in metadata:
                one_step(arrays)
        found = [tensor for layer in layers for tensor in (layer.output, *layer.state.values())]
        if expected is None:
            expected = found
        for number, (tensor, wanted) in enumerate(zip(found, expected, strict=True)):
            if not torch.equal(tensor, wanted):
                raise WrongResult(f"{name}: tensor {number} differs from that of {MODES[0]}")


def hidden_states(shape: Shape, device: torch.device) -> Tensor:
    """bf16 [tokens, hidden], the same for every step."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(shape.tokens, shape.hidden, generator=generator)
    return states.bfloat16().to(device)
