"""Streams, events and graph captures without a GPU: work is done in any order that they allow.

A missing wait then shows as a wrong value in some of many random orders, where a GPU would show it
on a bad day.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from kvfold.step import prefetch


class Work:
    """Something queued, to be run after other work."""

    def __init__(self, run: Callable[[], None], after: frozenset[Work]) -> None:
        self.run = run
        self.after = after
        self.done = False


class Capture:
    """Work that waits to be replayed."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.streams: dict[Stream, frozenset[Work]] = {}  # what each waited for before
        self.end: frozenset[Work] = frozenset()


class Device:
    """What is queued on all streams."""

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
        """As torch.cuda.graph: after all work so far, on a stream of its own."""
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
        """Queues the captured work on the current stream."""
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
            assert event.capture is self.device.capture, "an event of a capture that has ended"
            self.enter(event.capture)
        assert event.capture is self.capture, "an event from outside of the capture"
        self.last = self.last | event.last

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


def install(monkeypatch: pytest.MonkeyPatch, seed: int) -> Device:
    """Puts a fake device under kvfold.step.prefetch."""
    device = Device(seed)

    def copy(to: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        to.add_(0)  # a copy changes the version when it is queued
        a, b = to.detach().numpy(), source.detach().numpy()
        half = len(a) // 2  # it takes a while
        stream.push(lambda: a.__setitem__(slice(half), b[:half]))
        stream.push(lambda: a.__setitem__(slice(half, None), b[half:]))

    host = prefetch._host
    monkeypatch.setattr(torch.cuda, "Stream", lambda _=None: Stream(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: device.current)
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: device.current.capture is not None
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(prefetch, "_copy", copy)
    monkeypatch.setattr(prefetch, "_host", lambda tensor, pin: host(tensor, False))
    monkeypatch.setattr(
        prefetch, "_allocate", lambda nbytes, _: torch.zeros(nbytes, dtype=torch.uint8)
    )
    return device
