"""Stand-ins for CUDA streams, events and graph captures, which need no GPU.

Enqueued work is run in a random order out of those that streams and events allow. A missing wait
then gives a wrong value in some of many orders. On a GPU it would do so rarely.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from kvfold.step import device_buffer, segments, streams


class Work:
    """One enqueued operation, which runs after other operations."""

    def __init__(self, run: Callable[[], None], after: frozenset[Work]) -> None:
        self.run = run
        self.after = after
        self.done = False


class Capture:
    """The operations of a captured graph."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.streams: dict[Stream, frozenset[Work]] = {}  # their last work before the capture
        self.end: frozenset[Work] = frozenset()


class Device:
    """All streams and their enqueued work."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.queue: list[Work] = []
        self.capture: Capture | None = None
        self.current = Stream(self)

    def run_some(self, most: int) -> None:
        for _ in range(self.rng.randint(0, most)):
            if self.queue:
                self._run_one()

    def run_until(self, work: frozenset[Work]) -> None:
        while not all(one.done for one in work):
            self._run_one()

    def synchronize(self) -> None:
        while self.queue:
            self._run_one()

    def _run_one(self) -> None:
        ready = [work for work in self.queue if all(other.done for other in work.after)]
        work = self.rng.choice(ready)
        work.run()
        work.done = True
        self.queue.remove(work)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Capture]:
        """Like torch.cuda.graph: waits for all work so far, and captures on a stream of its own."""
        self.synchronize()
        self.capture = capture = Capture()
        before, self.current = self.current, Stream(self)
        self.current.enter(capture)
        try:
            yield capture
        finally:
            capture.end = self.current.last
            self.current, self.capture = before, None
            for stream, last in capture.streams.items():
                stream.capture, stream.last = None, last
        joined, open_ = set(), list(capture.end)
        while open_:
            work = open_.pop()
            if work not in joined:
                joined.add(work)
                open_ += work.after
        assert joined >= set(capture.work), "a capture ended with work that was not joined"

    def replay(self, capture: Capture) -> None:
        """Enqueues the captured work on the current stream."""
        before, copies = self.current.last, {}
        for work in capture.work:
            copies[work] = Work(work.run, before | {copies[other] for other in work.after})
            self.queue.append(copies[work])
        if capture.work:
            self.current.last = frozenset(copies[work] for work in capture.end)


class Event:
    def __init__(self, device: Device, last: frozenset[Work], capture: Capture | None) -> None:
        self.device, self.last, self.capture = device, last, capture

    def synchronize(self) -> None:
        assert self.device.capture is None, "the host waits during a capture"
        assert self.capture is None, "the host waits for a captured event"
        self.device.run_until(self.last)


class Stream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.last: frozenset[Work] = frozenset()
        self.capture: Capture | None = None

    def enter(self, capture: Capture) -> None:
        capture.streams[self] = self.last
        self.capture, self.last = capture, frozenset()

    def push(self, run: Callable[[], None]) -> None:
        work = Work(run, self.last)
        self.last = frozenset([work])
        (self.device.queue if self.capture is None else self.capture.work).append(work)

    def record_event(self) -> Event:
        return Event(self.device, self.last, self.capture)

    def wait_event(self, event: Event) -> None:
        if event.capture is not None and self.capture is None:
            assert event.capture is self.device.capture, "the event is of a capture that has ended"
            self.enter(event.capture)
        assert event.capture is self.capture, "the event is from outside of the capture"
        self.last = self.last | event.last

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


def install(monkeypatch: pytest.MonkeyPatch, seed: int) -> Device:
    """Replaces the device that kvfold.step.prefetch uses by a fake one."""
    device = Device(seed)

    def copy(to: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        to.add_(0)  # a copy changes the version when it is enqueued
        a, b = to.detach().numpy(), source.detach().numpy()
        half = len(a) // 2  # in two parts, between which other work may run
        stream.push(lambda: a.__setitem__(slice(half), b[:half]))
        stream.push(lambda: a.__setitem__(slice(half, None), b[half:]))

    host_tensor = segments.host_tensor
    monkeypatch.setattr(torch.cuda, "Stream", lambda _=None: Stream(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: device.current)
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: device.current.capture is not None
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(streams, "copy", copy)
    monkeypatch.setattr(segments, "host_tensor", lambda tensor, pin: host_tensor(tensor, False))
    monkeypatch.setattr(
        device_buffer, "_allocate", lambda nbytes, _: torch.zeros(nbytes, dtype=torch.uint8)
    )
    return device
