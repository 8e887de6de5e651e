"""Which bytes of a ring buffer are free: slots taken and given back in the order they were taken.

Bookkeeping alone: what the bytes are and who uses them is the caller's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from kvfold.step.align import aligned


class Done(Protocol):
    """Tells when a slot's user is through with it; a torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether it is through."""

    def synchronize(self) -> None:
        """Returns once it is."""


@dataclass(frozen=True)
class _Slot:
    offset: int
    size: int
    done: Done


class Ring:
    """Contiguous slots in `capacity` bytes, each at a multiple of `alignment` bytes.

    Attributes:
        waits: how often the oldest slot had to be waited for.
        high_water: the most bytes that were in slots at once.
    """

    def __init__(self, capacity: int, alignment: int = 1) -> None:
        self.capacity = capacity
        self.alignment = alignment
        self.waits = 0
        self.high_water = 0
        self._slots: deque[_Slot] = deque()  # oldest first
        self._used = 0  # bytes

    def reserve(self, size: int) -> int:
        """The offset of `size` free bytes, 1 to capacity; they are taken only by `commit`.

        Gives back the oldest slots that are done with, and waits for more while there is no room.
        """
        if not 0 < size <= self.capacity:
            raise ValueError(f"size is {size}; accepted: 1 to {self.capacity}")
        self._release()
        while (offset := self._room(size)) is None:
            self.waits += 1
            self._slots[0].done.synchronize()
            self._pop()
            self._release()
        return offset

    def commit(self, offset: int, size: int, done: Done) -> None:
        """Takes what the last `reserve` gave, until `done`."""
        self._slots.append(_Slot(offset, size, done))
        self._used += size
        self.high_water = max(self.high_water, self._used)

    def drain(self) -> None:
        """Gives all slots back, waiting for those that are not done with."""
        while self._slots:
            if not self._slots[0].done.query():
                self._slots[0].done.synchronize()
            self._pop()

    def _release(self) -> None:
        while self._slots and self._slots[0].done.query():
            self._pop()

    def _pop(self) -> None:
        self._used -= self._slots.popleft().size

    def _room(self, size: int) -> int | None:
        """Where `size` bytes are free behind the newest slot, or else at the start; None: nowhere.

        What is left behind the newest slot, where the slot does not fit, is skipped.
        """
        if not self._slots:
            return 0
        oldest, newest = self._slots[0].offset, self._slots[-1]
        head = aligned(newest.offset + newest.size, self.alignment)
        if newest.offset < oldest:  # wrapped: free from head to oldest
            return head if head + size <= oldest else None
        if head + size <= self.capacity:
            return head
        return 0 if size <= oldest else None
