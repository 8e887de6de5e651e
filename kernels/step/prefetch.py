"""Segments that live in pinned host memory and visit the device one after the other.

While the body of one segment runs, the next segment is copied on a stream of its own. What a body
changed is copied home on another. Everything is ordered by events; the host waits only where it
says so.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch

from kvfold.step.align import aligned
from kvfold.step.device import resolve_device

log = logging.getLogger("kvfold")


@dataclass(frozen=True)
class PrefetchCounters:
    """What a prefetcher has done until now. A graph counts once, when it is captured.

    Attributes:
        adopted: segments that were there, or on their way, when they were asked for.
        missed: segments that were copied only when they were asked for.
        bytes: bytes copied from the host to the device, prefetches in vain among them.
        waited_us: microseconds the host has waited for write-backs.
    """

    adopted: int
    missed: int
    bytes: int
    waited_us: float


class _Use(NamedTuple):
    """The last thing done with some bytes of a buffer."""

    start: int
    end: int
    done: torch.cuda.Event | None


class _Buffer:
    """Device memory that holds one segment at a time.

    Its uses are told apart by bytes: one tensor of the next segment may come in where another of
    the last one has gone home. Else segments of unequal size would keep the link waiting.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.flat = _allocate(nbytes, device)
        self.uses: list[_Use] = []

    def views(self, segment: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: self.flat[start:end].view(segment[name].dtype).view(segment[name].shape)
            for name, start, end in _pieces(segment)
        }

    def used(self, *uses: _Use) -> None:
        """Takes these, which begin at 0 and come after all before, for the last uses."""
        end = max((use.end for use in uses), default=0)
        # Those before stay where they reach further: a smaller segment says nothing of these bytes.
        self.uses = [use for use in self.uses if use.end > end] + list(uses)

    def wait(
        self, stream: torch.cuda.Stream | None, start: int = 0, end: int = sys.maxsize
    ) -> None:
        """Lets a stream wait until these bytes are free."""
        for use in self.uses:
            if use.start < end and start < use.end:
                _wait(stream, use.done)


class _Pending(NamedTuple):
    """A prefetched segment: the copy was enqueued when the host tensors had this signature."""

    index: int
    signature: tuple
    buffer: _Buffer


class SegmentPrefetcher:
    """Gives segments of tensors on a device, the next one being copied while one is in use.

    A segment is a dict of tensors: a layer's parameters, or its offloaded compressor state. The
    tensors are copied once into pinned memory, unless they are pinned and contiguous already.
    `segments[i][name]` are the pinned ones; write-backs arrive there. Change one in place only
    when no copy of it is under way: after synchronize() with write_back, else after the stream
    that used the segment is done. A prefetched segment that torch has changed since is copied
    again; after a change that torch does not see, as through numpy, join() makes sure of it.

    One thread uses a prefetcher at a time. On a CPU device it does the same synchronously.

    CUDA graphs: segment() can be captured. A replay reads and writes the pinned tensors each time,
    so keep the prefetcher open as long as its graphs are replayed. Call join() before a capture,
    and before each replay that follows eager use: a replay uses the same device buffers, and what
    was prefetched before it is old after it. Order eager use after a replay by the current stream.
    The side streams are joined when the last segment ends or a body raises; a capture that stops
    at another segment calls join() itself. A replay's write-backs have arrived when the replay is
    done; synchronize() does not know of them.

    Args:
        segments: what to hold, in the order of use; each {name: CPU tensor}.
        device: a CUDA device, the current one if it has no index, or "cpu".
        budget_bytes: the most device memory to take, in bytes. With room for two segments as large
            as the largest, one is prefetched; with room for one, each is copied when asked for,
            which a warning says.
        write_back: copy each segment home after its body.

    Raises:
        ValueError: no segments, a segment or device of a wrong kind, or a segment larger than the
            budget.
    """

    def __init__(
        self,
        segments: Sequence[Mapping[str, torch.Tensor]],
        device: torch.device | str | int,
        budget_bytes: int,
        *,
        write_back: bool = False,
    ):
        self._device = resolve_device(device)
        self._cuda = self._device.type == "cuda"
        _check(segments)
        sizes = [sum(aligned(tensor.nbytes) for tensor in s.values()) for s in segments]
        largest = max(sizes)
        if largest > budget_bytes:
            raise ValueError(
                f"segment {sizes.index(largest)} takes {largest} bytes on the device, and "
                f"budget_bytes is {budget_bytes}; accepted: {largest} or more, "
                f"{2 * largest} to prefetch"
            )
        self._write_back = write_back
        # Inference tensors have no version, which is how a change is seen.
        with torch.inference_mode(False), torch.no_grad():
            self.segments = tuple(
                MappingProxyType({name: _host(tensor, self._cuda) for name, tensor in s.items()})
                for s in segments
            )
            self._buffers = self._make_buffers(largest, budget_bytes)
        prefetches = len(self._buffers) > 1
        self._inbound = torch.cuda.Stream(self._device) if self._cuda and prefetches else None
        self._outbound = torch.cuda.Stream(self._device) if self._cuda and write_back else None
        self._sides = tuple(s for s in (self._inbound, self._outbound) if s is not None)
        for buffer in self._buffers:
            # Whatever had the memory before may still use it; whoever gets it next waits for us.
            buffer.used(_Use(0, largest, _record(self._current())))
            for stream in self._sides:
                buffer.flat.record_stream(stream)
        self._pending: _Pending | None = None
        self._homes: dict[int, torch.cuda.Event | None] = {}  # each segment's last write-back
        self._arrival: torch.cuda.Event | None = None  # the last one that no graph holds
        self._joined = True  # nothing runs on a side stream that the current one need wait for
        self._captured = False  # the events belong to a capture
        self._open: int | None = None
        self._closed = False
        self._adopted = self._missed = self._bytes = 0
        self._waited_us = 0.0

    def segment(self, index: int) -> contextlib.AbstractContextManager[dict[str, torch.Tensor]]:
        """Segment `index` on the device, for the body of a `with`, on torch's current stream.

        The tensors are valid in the body, and the stream that is current at the body's end must be
        ordered after the body's work. Without write_back what the body changes is lost; with it
        the segment is copied home, also if the body raises.

        Raises:
            IndexError: no such segment.
            RuntimeError: a segment is open, the prefetcher is closed, or a capture begins with
                something not joined.
        """
        self._check_usable()
        if not 0 <= index < len(self.segments):
            raise IndexError(f"segment {index} of {len(self.segments)}; they count from 0")
        return self._visit(index)

    def synchronize(self) -> None:
        """Waits until all write-backs have arrived in `segments`; at once if none is under way.

        Raises:
            RuntimeError: the prefetcher is closed, or a capture is under way and it had to wait.
        """
        if self._closed:
            raise RuntimeError("the prefetcher is closed")
        if self._arrival is None:
            return
        if self._capturing():
            raise RuntimeError("cannot wait for write-backs during a capture; do so before it")
        start = time.perf_counter()
        self._arrival.synchronize()
        self._waited_us += (time.perf_counter() - start) * 1e6
        self._arrival = None

    def join(self) -> None:
        """Makes the current stream wait for all copies, and forgets what was prefetched.

        The host does not wait. The class says when to call it.

        Raises:
            RuntimeError: a segment is open, the prefetcher is closed, or a capture is under way
                that began with something not joined.
        """
        self._check_usable()
        capturing = self._capturing()
        if capturing != self._captured:
            self._change_world(capturing)
        if capturing and self._joined:
            self._captured = False  # nothing of ours is in this capture
        else:
            self._join()

    def close(self) -> None:
        """Waits for write-backs and gives the device memory back. `segments` stay.

        Raises:
            RuntimeError: a segment is open.
        """
        if self._closed:
            return
        self._check_usable()
        self.synchronize()
        self._closed = True
        self._pending = None
        self._buffers = []

    def __enter__(self) -> SegmentPrefetcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def counters(self) -> PrefetchCounters:
        """What was done until now."""
        return PrefetchCounters(self._adopted, self._missed, self._bytes, self._waited_us)

    @contextlib.contextmanager
    def _visit(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        self._check_usable()
        buffer = self._acquire(index)
        views = buffer.views(self.segments[index])
        self._open = index
        ends = True  # a capture may end after this segment
        try:
            # Detached: an in-place operation on one does not draw the buffer into autograd.
            yield {name: view.detach() for name, view in views.items()}
            ends = index == len(self.segments) - 1
        finally:
            self._open = None
            self._release(index, buffer, views)
            if self._captured and ends:
                self._join()

    def _acquire(self, index: int) -> _Buffer:
        """The buffer with a segment in it; the next one is on its way when this returns."""
        capturing, current = self._capturing(), self._current()
        if capturing != self._captured:
            self._change_world(capturing)
        if self._joined:  # all that was until now is ordered by the current stream
            for stream in self._sides:
                stream.wait_stream(current)
            self._joined = False
        pending, self._pending = self._pending, None
        wanted = (index, _signature(self.segments[index]))
        if pending is not None and (pending.index, pending.signature) == wanted:
            buffer = pending.buffer
            self._adopted += 1
            buffer.wait(current)
        else:
            # Not the pending one's buffer, into which a copy may still run.
            buffer = self._buffers[0] if pending is None else self._other(pending.buffer)
            self._missed += 1
            self._copy_in(index, buffer, current)
        if self._cuda and not capturing:
            buffer.flat.record_stream(current)
        spare, following = self._other(buffer), (index + 1) % len(self.segments)
        # A capture may end after the last segment, with no one to join the next one's copy.
        if spare is not None and not (capturing and following == 0):
            buffer.wait(self._inbound)  # a late copy goes first: they share the link
            self._copy_in(following, spare, self._inbound)
            self._pending = _Pending(following, _signature(self.segments[following]), spare)
        return buffer

    def _release(self, index: int, buffer: _Buffer, views: dict[str, torch.Tensor]) -> None:
        """After the body: the buffer is free when the body's work, or the write-back, is done."""
        done = _record(self._current())
        if not self._write_back:
            buffer.used(_Use(0, _end(self.segments[index]), done))
            return
        _wait(self._outbound, done)
        uses = []
        for name, start, end in _pieces(self.segments[index]):
            _copy(self.segments[index][name], views[name], self._outbound)
            uses.append(_Use(start, end, _record(self._outbound)))
        buffer.used(*uses)
        self._homes[index] = _record(self._outbound)
        if not self._captured:
            self._arrival = self._homes[index]

    def _copy_in(self, index: int, buffer: _Buffer, stream: torch.cuda.Stream | None) -> None:
        segment = self.segments[index]
        _wait(stream, self._homes.get(index))
        views = buffer.views(segment)
        for name, start, end in _pieces(segment):
            buffer.wait(stream, start, end)
            _copy(views[name], segment[name], stream)
        buffer.used(_Use(0, _end(segment), _record(stream)))
        self._bytes += sum(host.nbytes for host in segment.values())

    def _join(self) -> None:
        current = self._current()
        for stream in self._sides:
            current.wait_stream(stream)
        for buffer in self._buffers:
            buffer.wait(current)
        self._pending = None
        self._joined = True
        if self._captured:  # the next segment may be in another capture
            self._change_world(False)

    def _change_world(self, capturing: bool) -> None:
        """Into a capture or out of one: an event of the one means nothing in the other."""
        if capturing and not self._joined:
            raise RuntimeError(
                "a capture begins while copies from before it are not joined; call join() on the "
                "prefetcher before the capture"
            )
        for buffer in self._buffers:
            buffer.uses = []
        self._homes.clear()
        self._pending = None
        self._joined = True
        self._captured = capturing

    def _make_buffers(self, nbytes: int, budget_bytes: int) -> list[_Buffer]:
        buffers = [_Buffer(nbytes, self._device)]
        if len(self.segments) == 1 and self._write_back:
            return buffers  # what follows is the segment in use, known only after its body
        if 2 * nbytes > budget_bytes:
            why = f"two take {2 * nbytes}, and budget_bytes is {budget_bytes}"
        else:
            try:
                return [*buffers, _Buffer(nbytes, self._device)]
            except torch.OutOfMemoryError:
                why = "the device has no memory for another"
        log.warning("no prefetch: one device buffer of %d bytes alone; %s", nbytes, why)
        return buffers

    def _other(self, buffer: _Buffer) -> _Buffer | None:
        return next((other for other in self._buffers if other is not buffer), None)

    def _current(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._cuda else None

    def _capturing(self) -> bool:
        if not self._cuda:
            return False
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("the prefetcher is closed")
        if self._open is not None:
            raise RuntimeError(f"segment {self._open} is open; one may be open at a time")


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _check(segments: Sequence[Mapping[str, torch.Tensor]]) -> None:
    if not segments:
        raise ValueError("segments is empty; accepted: one dict of CPU tensors or more")
    for index, segment in enumerate(segments):
        if not isinstance(segment, Mapping):
            raise ValueError(
                f"segment {index} is a {type(segment).__name__}; accepted: a dict of CPU tensors"
            )
        for name, tensor in segment.items():
            if not isinstance(tensor, torch.Tensor):
                kind = f"a {type(tensor).__name__}"
            elif tensor.device.type != "cpu" or tensor.layout != torch.strided:
                kind = f"a {tensor.layout} tensor on {str(tensor.device)!r}"
            else:
                continue
            raise ValueError(
                f"{name!r} of segment {index} is {kind}; accepted: a strided tensor on 'cpu'"
            )


def _host(tensor: torch.Tensor, pin: bool) -> torch.Tensor:
    """A tensor itself if it is pinned and contiguous, else a copy that is, if `pin`."""
    if tensor.is_contiguous() and not tensor.is_inference() and tensor.is_pinned():
        return tensor.detach()  # same memory, same version
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
    return host.copy_(tensor)


def _signature(segment: Mapping[str, torch.Tensor]) -> tuple:
    # A write-back changes the version when it is enqueued. The copy of a segment is enqueued later
    # than the segment's last write-back and waits for it, so its signature is taken after both.
    return tuple((name, host.shape, host.dtype, host._version) for name, host in segment.items())


def _pieces(segment: Mapping[str, torch.Tensor]) -> list[tuple[str, int, int]]:
    """(name, first byte, past the last) of a segment's tensors in a buffer."""
    pieces, start = [], 0
    for name, host in segment.items():
        pieces.append((name, start, start + host.nbytes))
        start += aligned(host.nbytes)
    return pieces


def _end(segment: Mapping[str, torch.Tensor]) -> int:
    return max((end for _, _, end in _pieces(segment)), default=0)


def _copy(to: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
    with torch.no_grad(), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)


def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if event is not None:
        stream.wait_event(event)


def _record(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else stream.record_event()
