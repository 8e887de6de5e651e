"""Device memory for one segment at a time, with the events after which its bytes are free."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from kvfold.step import streams
from kvfold.step.segments import Segment, spans


class Use(NamedTuple):
    """The last use of the bytes `start` to `end`. `done` is an event behind it, None on a CPU."""

    start: int
    end: int
    done: torch.Event | None


class DeviceBuffer:
    """Device memory that holds one segment at a time.

    Uses are recorded by bytes. A tensor of the next segment may then be copied in as soon as the
    tensors of the previous segment in the same bytes have been copied out. If a copy waited for the
    whole buffer, the link would be idle in one direction wherever segments differ in size.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = _allocate(nbytes, device)
        self._uses: list[Use] = []

    def views(self, segment: Segment) -> dict[str, torch.Tensor]:
        """Tensors in the buffer with the names, shapes and dtypes of the segment."""
        return {
            name: self.memory[start:end].view(segment[name].dtype).view(segment[name].shape)
            for name, start, end in spans(segment)
        }

    def record_uses(self, *uses: Use) -> None:
        """Records uses, which together start at byte 0 and are ordered after all earlier uses."""
        end = max((use.end for use in uses), default=0)
        # An earlier use that ends further on is still the last use of the bytes behind `end`.
        self._uses = [use for use in self._uses if use.end > end] + list(uses)

    def forget_uses(self) -> None:
        """Makes all bytes free. The caller orders later work after the uses in another way."""
        self._uses = []

    def wait_until_free(
        self, stream: torch.cuda.Stream | None, start: int = 0, end: int = sys.maxsize
    ) -> None:
        """Makes later work on the stream wait for all uses of the bytes `start` to `end`."""
        for use in self._uses:
            if use.start < end and start < use.end:
                streams.wait_event(stream, use.done)


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
