"""Tensors that stay in pinned host memory and are copied to the device one segment at a time.

While the body of one segment runs, the next segment is copied in on a stream of its own. With
write-back, what a body has changed is copied out on another stream. Events order the copies; the
host waits only in `synchronize` and `close`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from kvfold.step import segments as host_segments
from kvfold.step import streams
from kvfold.step.device import resolve_device
from kvfold.step.device_buffer import DeviceBuffer, Use
from kvfold.step.segments import spans

log = logging.getLogger("kvfold")


@dataclass(frozen=True)
class PrefetchCounters:
    """What a prefetcher has done so far. Captured work counts once, when it is captured.

    Attributes:
        adopted: segments that had been prefetched when they were asked for; the copy may still
            have been under way.
        missed: segments whose copy began only when they were asked for.
        bytes: bytes copied from the host to the device, unused prefetches included.
        waited_us: microseconds that the host has waited for write-backs.
    """

    adopted: int
    missed: int
    bytes: int
    waited_us: float


@dataclass(frozen=True)
class _Prefetch:
    """A segment whose copy to a buffer has been enqueued, with its signature at that time."""

    index: int
    signature: tuple
    buffer: DeviceBuffer


class SegmentPrefetcher:
    """Gives segments of host tensors on a device; the next is copied while one is in use.

        for i in range(len(layers)):
            with prefetcher.segment(i) as tensors:  # {"kv": ..., "score": ...} on the device
                layers[i](tensors)

    A segment is a dict of tensors, for example the parameters of a layer or its compressor state.
    The tensors are copied once into pinned memory, unless they are pinned and contiguous already.
    `segments[i][name]` are the pinned tensors; write-backs go to them. Change one in place only
    while no copy of it is under way: after `synchronize()` with write_back, otherwise after the
    stream that used the segment is done. A prefetched segment that torch has changed since is
    copied again. A change that torch does not see, such as one through numpy, needs `join()`.

    One thread uses a prefetcher at a time. On a CPU device every copy is made at once.

    CUDA graphs: `segment()` can be captured. Each replay reads and writes the pinned tensors, so
    the prefetcher must stay open as long as its graphs are replayed.

    - Call `join()` before a capture, and before a replay that follows eager use. A replay uses the
      same device buffers and overwrites what was prefetched.
    - Eager use after a replay must be ordered after it by the current stream.
    - A capture must end with no work of the side streams under way. That holds after the last
      segment and after a body that raised. Otherwise call `join()` before the capture ends.
    - Write-backs of a replay have arrived when the replay is done. `synchronize()` does not wait
      for them.

    Args:
        segments: iterable of the segments in their order of use; each a mapping of names to strided
            CPU tensors of any shape and dtype.
        device: "cpu", a CUDA device, or the index of a CUDA device. A CUDA device without an
            index is torch's current device.
        budget_bytes: the most device memory to allocate, in bytes. If it holds the largest segment
            twice, the next segment is prefetched. If it holds the largest segment once, a warning
            is logged and each segment is copied when it is asked for.
        write_back: copy each segment to the host after its body.

    Raises:
        ValueError: there is no segment, a segment is not a mapping of strided CPU tensors, the
            device is neither a CUDA device nor the CPU, or a segment is larger than the budget.
    """

    def __init__(
        self,
        segments: Iterable[Mapping[str, torch.Tensor]],
        device: torch.device | str | int,
        budget_bytes: int,
        *,
        write_back: bool = False,
    ) -> None:
        self._device = resolve_device(device)
        self._cuda = self._device.type == "cuda"
        segments = list(segments)
        host_segments.check(segments)
        sizes = [host_segments.device_bytes(segment) for segment in segments]
        largest = max(sizes)
        if largest > budget_bytes:
            raise ValueError(
                f"segment {sizes.index(largest)} takes {largest} bytes on the device, and "
                f"budget_bytes is {budget_bytes}; accepted: {largest} or more, "
                f"{2 * largest} to prefetch"
            )
        self._write_back = write_back
        # Not as inference tensors: they have no version, by which a change is detected.
        with torch.inference_mode(False), torch.no_grad():
            self.segments = tuple(
                MappingProxyType(
                    {name: host_segments.host_tensor(t, pin=self._cuda) for name, t in s.items()}
                )
                for s in segments
            )
            self._buffers = self._make_buffers(largest, budget_bytes)
        prefetches = len(self._buffers) > 1
        self._in_stream = torch.cuda.Stream(self._device) if self._cuda and prefetches else None
        self._out_stream = torch.cuda.Stream(self._device) if self._cuda and write_back else None
        self._side_streams = tuple(
            stream for stream in (self._in_stream, self._out_stream) if stream is not None
        )
        for buffer in self._buffers:
            # Earlier work on the current stream may still use the memory, and the allocator must
            # not reuse the memory before the side streams are done with it.
            buffer.record_uses(Use(0, largest, streams.record(streams.current(self._device))))
            for stream in self._side_streams:
                buffer.memory.record_stream(stream)
        self._prefetch: _Prefetch | None = None
        self._write_backs: dict[int, torch.Event | None] = {}  # each segment's last one
        self._last_write_back: torch.Event | None = None  # of those that are not in a graph
        self._joined = True  # the current stream need not wait for a side stream
        self._captured = False  # the events above belong to a capture
        self._open_segment: int | None = None
        self._closed = False
        self._adopted = self._missed = self._bytes = 0
        self._waited_us = 0.0

    def segment(self, index: int) -> contextlib.AbstractContextManager[dict[str, torch.Tensor]]:
        """Segment `index` on the device, for the body of a `with` statement.

        Copies are ordered with torch's current stream. The tensors are valid in the body. The
        stream that is current when the body ends must be ordered after the body's work. With
        write_back the segment is then copied to the host, also if the body raises; without it the
        body's changes are lost.

        Returns:
            A context manager that gives name -> contiguous tensor on the device.

        Raises:
            IndexError: there is no such segment.
            RuntimeError: a segment is open, the prefetcher is closed, or a capture has begun while
                copies from before it were not joined.
        """
        self._check_usable()
        if not 0 <= index < len(self.segments):
            raise IndexError(f"segment {index} of {len(self.segments)}; they count from 0")
        return self._visit(index)

    def synchronize(self) -> None:
        """Waits until all write-backs have arrived in `segments`.

        Returns at once if no write-back is under way.

        Raises:
            RuntimeError: the prefetcher is closed, or write-backs are under way and the current
                stream is being captured.
        """
        if self._closed:
            raise RuntimeError("the prefetcher is closed")
        if self._last_write_back is None:
            return
        if streams.is_capturing(self._device):
            raise RuntimeError("cannot wait for write-backs during a capture; do so before it")
        start = time.perf_counter()
        self._last_write_back.synchronize()
        self._waited_us += (time.perf_counter() - start) * 1e6
        self._last_write_back = None

    def join(self) -> None:
        """Makes the current stream wait for all copies, and drops what was prefetched.

        The host does not wait. The docstring of the class says when to call this.

        Raises:
            RuntimeError: a segment is open, the prefetcher is closed, or a capture has begun while
                copies from before it were not joined.
        """
        self._check_usable()
        capturing = streams.is_capturing(self._device)
        if capturing != self._captured:
            self._reset_events(capturing)
        if capturing and self._joined:
            self._captured = False  # the capture has no work of this prefetcher
        else:
            self._join()

    def close(self) -> None:
        """Waits for write-backs, then releases the device memory. `segments` stay valid.

        Raises:
            RuntimeError: a segment is open.
        """
        if self._closed:
            return
        self._check_usable()
        self.synchronize()
        self._closed = True
        self._prefetch = None
        self._buffers = []

    def __enter__(self) -> SegmentPrefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def counters(self) -> PrefetchCounters:
        """The counters as they are now. The object does not change later."""
        return PrefetchCounters(self._adopted, self._missed, self._bytes, self._waited_us)

    # ---- one segment -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _visit(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        self._check_usable()
        buffer = self._acquire(index)
        views = buffer.views(self.segments[index])
        self._open_segment = index
        capture_may_end = True
        try:
            # Detached, so that autograd does not see in-place operations of one body in the next.
            yield {name: view.detach() for name, view in views.items()}
            capture_may_end = index == len(self.segments) - 1
        finally:
            self._open_segment = None
            self._release(index, buffer, views)
            if self._captured and capture_may_end:
                self._join()

    def _acquire(self, index: int) -> DeviceBuffer:
        """A buffer that holds segment `index`. Enqueues the copy of the next segment too."""
        capturing, current = streams.is_capturing(self._device), streams.current(self._device)
        if capturing != self._captured:
            self._reset_events(capturing)
        if self._joined:  # the current stream is ordered after all earlier work
            for stream in self._side_streams:
                streams.wait_stream(stream, current)
            self._joined = False
        buffer = self._adopt_or_copy(index, current)
        if current is not None and not capturing:
            buffer.memory.record_stream(current)
        next_index = (index + 1) % len(self.segments)
        # A capture may end after the last segment, and could not end with a copy under way.
        if not (capturing and next_index == 0):
            self._start_prefetch(next_index, buffer)
        return buffer

    def _adopt_or_copy(self, index: int, current: torch.cuda.Stream | None) -> DeviceBuffer:
        """The prefetched buffer if it holds the segment as it is now; otherwise copies it."""
        prefetch, self._prefetch = self._prefetch, None
        if prefetch is None:
            buffer = self._buffers[0]
        elif (prefetch.index, prefetch.signature) == (index, self._signature(index)):
            self._adopted += 1
            prefetch.buffer.wait_until_free(current)  # the copy into it is its last use
            return prefetch.buffer
        else:
            # Not the buffer of the prefetch, into which a copy may still be under way.
            other = self._other_buffer(prefetch.buffer)
            assert other is not None  # or there would be no prefetch
            buffer = other
        self._missed += 1
        self._copy_in(index, buffer, current)
        return buffer

    def _start_prefetch(self, index: int, buffer_in_use: DeviceBuffer) -> None:
        buffer = self._other_buffer(buffer_in_use)
        if buffer is None:
            return
        # If the segment in use is still being copied, that copy goes first: both share the link.
        buffer_in_use.wait_until_free(self._in_stream)
        self._copy_in(index, buffer, self._in_stream)
        self._prefetch = _Prefetch(index, self._signature(index), buffer)

    def _copy_in(self, index: int, buffer: DeviceBuffer, stream: torch.cuda.Stream | None) -> None:
        """Enqueues the copy of a segment from the host to the buffer."""
        segment, views = self.segments[index], buffer.views(self.segments[index])
        streams.wait_event(stream, self._write_backs.get(index))
        for name, start, end in spans(segment):
            buffer.wait_until_free(stream, start, end)
            streams.copy(views[name], segment[name], stream)
        buffer.record_uses(Use(0, host_segments.end(segment), streams.record(stream)))
        self._bytes += sum(host.nbytes for host in segment.values())

    def _release(self, index: int, buffer: DeviceBuffer, views: dict[str, torch.Tensor]) -> None:
        """After the body: enqueues the write-back, and records the last use of the buffer."""
        segment, body_done = self.segments[index], streams.record(streams.current(self._device))
        if not self._write_back:
            buffer.record_uses(Use(0, host_segments.end(segment), body_done))
            return
        streams.wait_event(self._out_stream, body_done)
        uses = []
        for name, start, end in spans(segment):
            streams.copy(segment[name], views[name], self._out_stream)
            uses.append(Use(start, end, streams.record(self._out_stream)))
        buffer.record_uses(*uses)
        self._write_backs[index] = streams.record(self._out_stream)
        if not self._captured:
            self._last_write_back = self._write_backs[index]

    def _signature(self, index: int) -> tuple:
        """The signature of a segment, once its last write-back has been enqueued.

        A write-back changes the version of a tensor when it is enqueued. A prefetch is enqueued
        later and waits for the write-back, so that the signature of the prefetch includes it.
        """
        return host_segments.signature(self.segments[index])

    # ---- buffers, joins and captures -------------------------------------------------------------

    def _make_buffers(self, nbytes: int, budget_bytes: int) -> list[DeviceBuffer]:
        buffers = [DeviceBuffer(nbytes, self._device)]
        if len(self.segments) == 1 and self._write_back:
            return buffers  # the next segment is the one in use, which its body still changes
        if 2 * nbytes > budget_bytes:
            reason = f"two take {2 * nbytes}, and budget_bytes is {budget_bytes}"
        else:
            try:
                return [*buffers, DeviceBuffer(nbytes, self._device)]
            except torch.OutOfMemoryError:
                reason = "the device has no memory for another"
        log.warning("no prefetch: there is one device buffer of %d bytes; %s", nbytes, reason)
        return buffers

    def _other_buffer(self, buffer: DeviceBuffer) -> DeviceBuffer | None:
        return next((other for other in self._buffers if other is not buffer), None)

    def _join(self) -> None:
        current = streams.current(self._device)
        for stream in self._side_streams:
            streams.wait_stream(current, stream)
        for buffer in self._buffers:
            buffer.wait_until_free(current)
        self._prefetch = None
        self._joined = True
        if self._captured:  # the next segment may be outside of this capture
            self._reset_events(False)

    def _reset_events(self, capturing: bool) -> None:
        """Drops all events when a capture begins or ends: they are valid on one side only."""
        if capturing and not self._joined:
            raise RuntimeError(
                "a capture has begun while copies from before it are not joined; call join() on "
                "the prefetcher before the capture"
            )
        for buffer in self._buffers:
            buffer.forget_uses()
        self._write_backs.clear()
        self._prefetch = None
        self._joined = True
        self._captured = capturing

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("the prefetcher is closed")
        if self._open_segment is not None:
            raise RuntimeError(f"segment {self._open_segment} is open; one may be open at a time")
