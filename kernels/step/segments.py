"""Segments: named tensors in pinned host memory, and their layout in device memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from kvfold.step.sizes import aligned

Segment = Mapping[str, torch.Tensor]


class Span(NamedTuple):
    """The bytes `start` to `end` of a device buffer, which hold one tensor of a segment."""

    name: str
    start: int
    end: int


def check(segments: Sequence[Segment]) -> None:
    """Checks what a caller gives as segments.

    Raises:
        ValueError: there is no segment, or one is not a mapping of strided CPU tensors.
    """
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


def host_tensor(tensor: torch.Tensor, pin: bool) -> torch.Tensor:
    """A contiguous tensor in host memory with the same values, pinned if `pin`.

    A tensor that is pinned and contiguous already is not copied: the result shares its memory and
    its version.
    """
    # An inference tensor has no version, so it is copied.
    if tensor.is_contiguous() and not tensor.is_inference() and tensor.is_pinned():
        return tensor.detach()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
    return host.copy_(tensor)


def signature(segment: Segment) -> tuple:
    """A value that changes when torch changes a tensor of the segment."""
    return tuple((name, host.shape, host.dtype, host._version) for name, host in segment.items())


def spans(segment: Segment) -> list[Span]:
    """The bytes of each tensor in a device buffer, each at a multiple of 256 bytes."""
    result, start = [], 0
    for name, tensor in segment.items():
        result.append(Span(name, start, start + tensor.nbytes))
        start += aligned(tensor.nbytes)
    return result


def end(segment: Segment) -> int:
    """The number of bytes from the start of a device buffer to the end of the last tensor."""
    return max((span.end for span in spans(segment)), default=0)


def device_bytes(segment: Segment) -> int:
    """The size in bytes of a device buffer for the segment."""
    return sum(aligned(tensor.nbytes) for tensor in segment.values())
