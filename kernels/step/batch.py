"""A step's dispatches as one submission: a CUDA graph per key, its inputs refreshed every step."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvfold.step.capture import capture
from kvfold.step.device import on_device
from kvfold.step.packing import Array
from kvfold.step.staging import Staged, StagingPool

log = logging.getLogger("kvfold")


@dataclass(frozen=True)
class BatchCounters:
    """How the steps were run.

    Attributes:
        eager: bodies run kernel by kernel.
        captured: graphs made.
        replayed: graphs launched.
        evicted: keys forgotten because there were more than `max_graphs`.
        synchronisations: waits for the device, on reading or where a graph's memory was released.
    """

    eager: int = 0
    captured: int = 0
    replayed: int = 0
    evicted: int = 0
    synchronisations: int = 0


@dataclass
class _Entry:
    """What is kept of a key: its inputs on the device, and once there is one, its graph."""

    inputs: list[Staged] = field(default_factory=list)
    graph: torch.cuda.CUDAGraph | None = None
    result: Any = None
    seen: bool = False
    capturable: bool = True


class StepBatch:
    """Runs steps that look alike as one submission.

        with batch.step((batch_size, next_n)) as step:
            inputs = step.upload({"kv_lens": kv_lens, "block_table": block_table})
            output = step.run(layers, inputs)
        rows = batch.read(output)

    The first step of a key runs `layers(inputs)` eagerly, the second captures it in a CUDA graph,
    and from then on the graph is launched and `layers` is not called. A with statement cannot leave
    its own body out, so what is to be left out is a function.

    One thread uses a StepBatch at a time. On a CPU every step runs eagerly.
    """

    def __init__(
        self, device: torch.device | str | int, capacity_bytes: int = 1 << 22, max_graphs: int = 64
    ) -> None:
        """
        Args:
            device: where steps run; "cuda" is torch's current device.
            capacity_bytes: of the pinned ring through which uploads go, see StagingPool.
            max_graphs: keys kept; past it the least recently used is forgotten.

        Raises:
            ValueError: capacity_bytes or max_graphs is not a positive integer.
        """
        if not isinstance(max_graphs, int) or max_graphs < 1:
            raise ValueError(f"max_graphs is {max_graphs!r}; accepted: a positive integer")
        self.staging = StagingPool(device, capacity_bytes)
        self.device = self.staging.device
        self._on_gpu = self.device.type == "cuda"
        self.max_graphs = max_graphs
        self.counters = BatchCounters()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._open = False
        self._stream: torch.cuda.Stream | None = None  # of the last step
        # torch's own stream for captures is of whichever device captured first.
        self._capture_stream = torch.cuda.Stream(self.device) if self._on_gpu else None
        self._pending = False

    @contextlib.contextmanager
    def step(self, key: Hashable) -> Iterator[Step]:
        """One step. After an exception in it a key that has no graph yet starts afresh.

        Args:
            key: tells apart steps that differ in shapes or in the work they do, such as batch
                bucket, next_n and the set of layers.

        Raises:
            RuntimeError: within another step.
        """
        if self._open:
            raise RuntimeError(f"step {key!r} begins within another step of the same StepBatch")
        with on_device(self.device):
            self._follow_stream()
            step = Step(self, self._entry(key))
            self._open = True
            try:
                yield step
            except BaseException:
                if step.entry.graph is None:
                    with contextlib.suppress(RuntimeError):  # the first error counts
                        self.synchronize()  # what the key's inputs are read by
                    self._entries.pop(key, None)
                raise
            finally:
                self._open = step.is_open = False

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU copy of a tensor, of what the steps so far have made of it."""
        if tensor.device != self.device or not self._on_gpu:
            self.synchronize()  # it may be what a step's copies go to
            return tensor.detach().to("cpu", copy=True)
        with on_device(self.device):
            self._follow_stream()
            self._count(synchronisations=1)
            copy = tensor.cpu()
        self._pending = False
        return copy

    def synchronize(self) -> None:
        """Waits for the steps so far; returns at once when nothing is pending."""
        if self._pending:
            self._count(synchronisations=1)
            self._stream.synchronize()
            self._pending = False

    def close(self) -> None:
        """Forgets all graphs and closes the ring, after what is pending."""
        self.synchronize()
        self._entries.clear()
        self.staging.close()

    def __enter__(self) -> StepBatch:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- what a step does ------------------------------------------------------------------------

    def _run(self, entry: _Entry, body: Callable, args: tuple) -> Any:
        self._pending = self._on_gpu
        obstacle = None
        if self._on_gpu and entry.graph is None and entry.seen and entry.capturable:
            obstacle = self._capture(entry, body, args)
        if entry.graph is not None:
            entry.graph.replay()
            self._count(replayed=1)
            return entry.result
        result = body(*args)  # if the obstacle was the body's own error, it is raised here
        if obstacle is not None:
            entry.capturable = False
            log.warning("a step cannot be captured, so it runs eagerly: %s", obstacle)
        entry.seen = True
        self._count(eager=1)
        return result

    def _capture(self, entry: _Entry, body: Callable, args: tuple) -> str | None:
        """Makes the entry's graph; returns why there can be none, or None."""
        try:
            entry.graph, entry.result = capture(self._capture_stream, body, *args)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        self._count(captured=1)
        return None

    def _upload(self, entry: _Entry, number: int, arrays: Mapping[str, Array]) -> dict:
        self._pending = self._on_gpu
        if number < len(entry.inputs):
            entry.inputs[number].refresh(arrays)
        elif entry.graph is None:
            entry.inputs.append(self.staging.stage(arrays))
        else:
            raise ValueError(f"upload {number + 1} in a step; accepted for its key: {number}")
        return entry.inputs[number].tensors

    # ---- keys, streams ---------------------------------------------------------------------------

    def _entry(self, key: Hashable) -> _Entry:
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        while len(self._entries) > self.max_graphs:
            self.synchronize()  # the oldest graph's memory is about to be released
            self._entries.popitem(last=False)
            self._count(evicted=1)
        return entry

    def _follow_stream(self) -> None:
        """Lets the current stream wait for the last step's, if that is another."""
        if not self._on_gpu:
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _count(self, **more: int) -> None:
        changed = {name: getattr(self.counters, name) + n for name, n in more.items()}
        self.counters = replace(self.counters, **changed)


class Step:
    """What the body of `StepBatch.step` has."""

    def __init__(self, batch: StepBatch, entry: _Entry) -> None:
        self.entry = entry
        self.is_open = True
        self._batch = batch
        self._uploads = 0
        self._ran = False

    def upload(self, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Copies CPU tensors or numpy arrays to the device: every step of a key to the same place.

        Raises:
            ValueError: names, shapes or dtypes differ from those of the key's first step; or as
                StagingPool.upload.
            RuntimeError: the step is over, or `run` has been called.
        """
        self._check("upload")
        number, self._uploads = self._uploads, self._uploads + 1
        return self._batch._upload(self.entry, number, arrays)

    def run(self, body: Callable[..., Any], *args: Any) -> Any:
        """Runs body(*args), or what its kernels were when it was captured, once per step.

        args: constants, tensors that stay where they are, and what `upload` returned. What the body
        does in Python happens only while it is not replayed.

        Returns:
            What body returned; of a replayed step, what it returned on capture, its tensors
            holding this step's values until the key's next step.

        Raises:
            ValueError: the key's graph takes more uploads than were made.
            RuntimeError: the step is over, or `run` has been called. And whatever body raises.
        """
        self._check("run")
        if self.entry.graph is not None and self._uploads < len(self.entry.inputs):
            made, taken = self._uploads, len(self.entry.inputs)
            raise ValueError(f"run: {made} uploads in a step; accepted for its key: {taken}")
        self._ran = True
        return self._batch._run(self.entry, body, args)

    def _check(self, what: str) -> None:
        if not self.is_open or self._ran:
            state = "has ended" if not self.is_open else "has run"
            raise RuntimeError(f"{what}: the step {state}; begin another with StepBatch.step")
