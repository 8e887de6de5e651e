"""Allocation in a ring buffer: slots are taken and released in the same order.

The module does the bookkeeping only. The caller owns the memory and knows what uses a slot.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from kvfold.step.sizes import aligned


class Done(Protocol):
    """Tells when a slot is no longer in use. torch.cuda.Event implements it."""

    def query(self) -> bool:
        """Whether the slot is no longer in use."""
        ...

    def synchronize(self) -> None:
        """Blocks until the slot is no longer in use."""
        ...


@dataclass(frozen=True)
class _Slot:
    offset: int
    size: int
    done: Done


class Ring:
    """Contiguous slots in `capacity` bytes, each at a multiple of `alignment` bytes.

    Attributes:
        waits: how often `reserve` had to wait for the oldest slot.
        high_water: the largest number of bytes that were in slots at one time.
    """

    def __init__(self, capacity: int, alignment: int = 1) -> None:
        self.capacity = capacity
        self.alignment = alignment
        self.waits = 0
        self.high_water = 0
        self._slots: deque[_Slot] = deque()  # oldest first
        self._used = 0  # bytes

    def reserve(self, size: int) -> int:
        """The offset of `size` free bytes. The bytes stay free until `commit` is called.

        Releases the oldest slots that are done. While there is no room, waits for the oldest slot.

        Raises:
            ValueError: `size` is less than 1 or larger than the capacity.
        """
        if not 0 < size <= self.capacity:
            raise ValueError(f"size is {size}; accepted: 1 to {self.capacity}")
        self._release_done()
        while (offset := self._free_offset(size)) is None:
            self.waits += 1
            self._slots[0].done.synchronize()
            self._release_oldest()
            self._release_done()
        return offset

    def commit(self, offset: int, size: int, done: Done) -> None:
        """Makes the bytes that the last `reserve` returned a slot that is in use until `done`."""
        self._slots.append(_Slot(offset, size, done))
        self._used += size
        self.high_water = max(self.high_water, self._used)

    def drain(self) -> None:
        """Releases all slots, after waiting for those that are not done."""
        while self._slots:
            if not self._slots[0].done.query():
                self._slots[0].done.synchronize()
            self._release_oldest()

    def _release_done(self) -> None:
        """Releases the oldest slots up to the first that is not done."""
        while self._slots and self._slots[0].done.query():
            self._release_oldest()

    def _release_oldest(self) -> None:
        self._used -= self._slots.popleft().size

    def _free_offset(self, size: int) -> int | None:
        """Where `size` bytes are free: behind the newest slot, or at the start of the ring.

        Returns None if there is no room in either place. Bytes at the end of the ring that are too
        few for the slot stay unused.
        """
        if not self._slots:
            return 0
        oldest, newest = self._slots[0].offset, self._slots[-1]
        head = aligned(newest.offset + newest.size, self.alignment)
        if newest.offset < oldest:  # the slots wrap around: head to oldest is free
            return head if head + size <= oldest else None
        if head + size <= self.capacity:
            return head
        return 0 if size <= oldest else None
