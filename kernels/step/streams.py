"""Operations on CUDA streams that also work on a CPU, where a stream and an event are None.

On a CPU all work is synchronous, so that there is nothing to record and nothing to wait for.
"""

from __future__ import annotations

import contextlib

import torch


def current(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream of a device; None for the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def record(stream: torch.cuda.Stream | None) -> torch.Event | None:
    """An event behind all work that has been enqueued on the stream so far."""
    return None if stream is None else stream.record_event()


def wait_event(stream: torch.cuda.Stream | None, event: torch.Event | None) -> None:
    """Makes later work on the stream wait for the event. The host does not wait."""
    if stream is not None and event is not None:
        stream.wait_event(event)


def wait_stream(stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
    """Makes later work on `stream` wait for the work on `other`. The host does not wait."""
    if stream is not None and other is not None:
        stream.wait_stream(other)


def copy(destination: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
    """Enqueues a copy on the stream. Without a stream the copy is made before this returns."""
    on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
    with torch.no_grad(), on_stream:
        destination.copy_(source, non_blocking=True)
