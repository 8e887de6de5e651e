"""The kernels of a decode step as one launch: a CUDA graph per key, with new inputs every step."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvfold.step import streams
from kvfold.step.capture import capture
from kvfold.step.device import on_device
from kvfold.step.packing import Array
from kvfold.step.sizes import positive_integer
from kvfold.step.staging import Staged, StagingPool

log = logging.getLogger("kvfold")


@dataclass(frozen=True)
class BatchCounters:
    """How the steps were run.

    Attributes:
        eager: steps whose body was called and launched its kernels one by one.
        captured: CUDA graphs that were captured.
        replayed: CUDA graph launches.
        evicted: keys that were dropped because there were more than `max_graphs`.
        synchronisations: how often the host waited for the device: in `read`, in `synchronize`, or
            before the memory of a graph was released.
    """

    eager: int = 0
    captured: int = 0
    replayed: int = 0
    evicted: int = 0
    synchronisations: int = 0


@dataclass
class _KeyState:
    """What a StepBatch keeps for one key.

    Attributes:
        inputs: the tensors of the key's uploads, in the order of the uploads in a step.
        runs: how often `run` has completed.
        uploads: uploads in the step of the second run; each later step must make as many. None
            before the second run has completed.
        graph: the graph; None before the second run, on a CPU, and if the body cannot be captured.
        result: what the body returned when it was captured.
    """

    inputs: list[Staged] = field(default_factory=list)
    runs: int = 0
    uploads: int | None = None
    graph: torch.cuda.CUDAGraph | None = None
    result: Any = None


class StepBatch:
    """Runs the kernels of a step as one CUDA graph launch.

        with batch.step((batch_size, next_n)) as step:
            inputs = step.upload({"kv_lens": kv_lens, "block_table": block_table})
            output = step.run(layers, inputs)
        rows = batch.read(output)

    The first step of a key calls `layers(inputs)`. The second step captures the call into a CUDA
    graph and launches the graph. Later steps launch the graph and do not call `layers`. From the
    third step on, the uploads of a step must be those of the second in number, names, shapes and
    dtypes.

    On a CPU every step calls the body. The same uploads are refused with the same errors.

    One thread uses a StepBatch at a time.
    """

    def __init__(
        self, device: torch.device | str | int, capacity_bytes: int = 1 << 22, max_graphs: int = 64
    ) -> None:
        """
        Args:
            device: where steps run: "cpu", a CUDA device, or the index of a CUDA device. A CUDA
                device without an index is torch's current device.
            capacity_bytes: size in bytes of the pinned ring for uploads, see StagingPool.
            max_graphs: the largest number of keys that are kept. With one more, the key that was
                used least recently is dropped.

        Raises:
            ValueError: capacity_bytes or max_graphs is not a positive integer, or the device is
                neither a CUDA device nor the CPU.
            RuntimeError: the ring's memory cannot be pinned.
        """
        self.max_graphs = positive_integer("max_graphs", max_graphs)
        self.staging = StagingPool(device, capacity_bytes)
        self.device = self.staging.device
        self._on_gpu = self.device.type == "cuda"
        self.counters = BatchCounters()
        self._keys: OrderedDict[Hashable, _KeyState] = OrderedDict()
        self._in_step = False
        self._closed = False
        self._last_stream: torch.cuda.Stream | None = None  # of the last step
        self._pending = False  # whether the last stream may have work that nobody has waited for
        # torch's default stream for captures is on the device that captured first.
        self._capture_stream = torch.cuda.Stream(self.device) if self._on_gpu else None

    @contextlib.contextmanager
    def step(self, key: Hashable) -> Iterator[ActiveStep]:
        """One step.

        If an exception leaves one of the first two steps of a key, the key is dropped, and its
        next step is a first step again.

        Args:
            key: identifies steps of the same shapes and the same work, for example (batch bucket,
                next_n, set of layers).

        Raises:
            RuntimeError: the StepBatch is closed, or another step of it has not ended.
        """
        self._check_not_closed("step")
        if self._in_step:
            raise RuntimeError(f"step {key!r} begins within another step of the same StepBatch")
        with on_device(self.device):
            self._order_current_stream()
            state = self._state_of(key)
            step = ActiveStep(self, state)
            self._in_step = True
            try:
                yield step
            except BaseException:
                if state.uploads is None:
                    with contextlib.suppress(RuntimeError):  # the exception of the step is raised
                        self.synchronize()  # work of the step may use the key's inputs
                    self._keys.pop(key, None)
                raise
            finally:
                self._in_step = step.is_open = False

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor on the CPU, after all steps so far. Waits for the device."""
        if tensor.device != self.device or not self._on_gpu:
            self.synchronize()  # a step may copy to this tensor
            return tensor.detach().to("cpu", copy=True)
        with on_device(self.device):
            self._order_current_stream()
            self._count(synchronisations=1)
            copy = tensor.cpu()
        self._pending = False
        return copy

    def synchronize(self) -> None:
        """Waits for the steps so far. Returns at once if there is nothing to wait for."""
        if self._pending:
            assert self._last_stream is not None
            self._count(synchronisations=1)
            self._last_stream.synchronize()
            self._pending = False

    def close(self) -> None:
        """Waits for the steps so far, then releases all graphs and the ring.

        No step can begin afterwards. An open step can neither upload nor run. `read` still works.
        """
        self.synchronize()
        self._closed = True
        self._keys.clear()
        self.staging.close()

    def __enter__(self) -> StepBatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- within a step ---------------------------------------------------------------------------

    def _upload(self, state: _KeyState, number: int, arrays: Mapping[str, Array]) -> dict:
        """Upload `number` of a step, counted from 0."""
        if state.uploads is not None and number >= state.uploads:
            raise ValueError(
                f"upload {number + 1} of a step; accepted: {state.uploads}, "
                "as in the second step of the key"
            )
        self._pending = self._on_gpu
        if number < len(state.inputs):
            state.inputs[number].refresh(arrays)
        else:
            state.inputs.append(self.staging.stage(arrays))
        return state.inputs[number].tensors

    def _run(self, state: _KeyState, uploads: int, body: Callable, args: tuple) -> Any:
        self._pending = self._on_gpu
        capture_error = self._capture(state, body, args) if state.runs == 1 else None
        if state.graph is not None:
            state.graph.replay()
            self._count(replayed=1)
            result = state.result
        else:
            result = body(*args)  # raises again if the capture failed by an error of the body
            self._count(eager=1)
        if capture_error is not None:
            log.warning("a step cannot be captured, so it runs eagerly: %s", capture_error)
        state.runs += 1
        if state.runs == 2:
            state.uploads = uploads
        return result

    def _capture(self, state: _KeyState, body: Callable, args: tuple) -> str | None:
        """Captures the key's graph. Returns the first line of the error if that fails."""
        if self._capture_stream is None:
            return None
        try:
            state.graph, state.result = capture(self._capture_stream, body, *args)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        self._count(captured=1)
        return None

    def _check_not_closed(self, method: str) -> None:
        if self._closed:
            raise RuntimeError(f"{method}: the StepBatch is closed")

    # ---- keys and streams ------------------------------------------------------------------------

    def _state_of(self, key: Hashable) -> _KeyState:
        state = self._keys.setdefault(key, _KeyState())
        self._keys.move_to_end(key)
        while len(self._keys) > self.max_graphs:
            self.synchronize()  # the memory of the oldest graph is about to be released
            self._keys.popitem(last=False)
            self._count(evicted=1)
        return state

    def _order_current_stream(self) -> None:
        """Makes the current stream wait for the last step's stream, if that is another one."""
        stream = streams.current(self.device)
        if self._last_stream is not None and self._last_stream != stream:
            streams.wait_stream(stream, self._last_stream)
        self._last_stream = stream

    def _count(self, **increments: int) -> None:
        changed = {name: getattr(self.counters, name) + n for name, n in increments.items()}
        self.counters = replace(self.counters, **changed)


class ActiveStep:
    """One step, within the `with` statement of `StepBatch.step`: uploads, then one `run`."""

    def __init__(self, batch: StepBatch, state: _KeyState) -> None:
        self.is_open = True
        self._batch = batch
        self._state = state
        self._uploads = 0
        self._has_run = False

    def upload(self, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Copies arrays to the device, in every step of a key to the same tensors.

        Args:
            arrays: name -> CPU tensor or numpy array.

        Returns:
            name -> contiguous tensor on the device, of the same shape and dtype.

        Raises:
            ValueError: names, shapes or dtypes differ from those of the key's first step; the
                second step of the key made fewer uploads; or as StagingPool.upload.
            RuntimeError: the step has ended, `run` has been called, or the StepBatch is closed.
        """
        self._check_usable("upload")
        arrays = dict(arrays)  # first: a mapping of the caller's may itself upload in this step
        tensors = self._batch._upload(self._state, self._uploads, arrays)
        self._uploads += 1
        return tensors

    def run(self, body: Callable[..., Any], *args: Any) -> Any:
        """Runs the kernels of body(*args): calls it, captures it, or launches its graph.

        Args:
            body: launches kernels on the current stream. Its Python code runs only in steps that do
                not launch a graph.
            args: constants, tensors that keep their addresses, and what `upload` returned.

        Returns:
            What body returned. After a graph launch that is the object which body returned when it
            was captured; its tensors hold the values of this step until the next step of the key.

        Raises:
            ValueError: the second step of the key made more uploads.
            RuntimeError: the step has ended, `run` has been called, or the StepBatch is closed.
            BaseException: what body raises.
        """
        self._check_usable("run")
        uploads, accepted = self._uploads, self._state.uploads
        if accepted is not None and uploads < accepted:
            raise ValueError(
                f"run after {uploads} uploads; accepted: {accepted}, "
                "as in the second step of the key"
            )
        self._has_run = True
        return self._batch._run(self._state, uploads, body, args)

    def _check_usable(self, method: str) -> None:
        if not self.is_open or self._has_run:
            reason = "has ended" if not self.is_open else "has run"
            raise RuntimeError(f"{method}: the step {reason}; begin another with StepBatch.step")
        self._batch._check_not_closed(method)
