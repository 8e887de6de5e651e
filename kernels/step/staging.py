"""Asynchronous uploads of host arrays to the device.

A copy to the device is asynchronous only if its source is pinned memory, and the source must not
change until the copy has been made. The staging pool copies arrays into a pinned ring buffer first.
A CUDA event behind each copy tells when its part of the ring is free again.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvfold.step.device import on_device, resolve_device
from kvfold.step.packing import Array, Packing
from kvfold.step.ring import Done, Ring
from kvfold.step.sizes import ALIGNMENT, aligned, positive_integer

_leaked_memory: list[torch.Tensor] = []  # of pools that were released during a capture


@dataclass(frozen=True)
class StagingCounters:
    """What a pool has done so far.

    Attributes:
        uploads: completed calls of `StagingPool.upload`, `StagingPool.stage` and `Staged.refresh`.
        copies: host-to-device copies of these calls, one each, none if there are no bytes.
        bytes: bytes of the arrays, without the gaps between them.
        waits: how often an upload waited for the oldest slot of a full ring.
        high_water_bytes: the largest number of bytes of the ring that were in use at one time.
    """

    uploads: int
    copies: int
    bytes: int
    waits: int
    high_water_bytes: int


class StagingPool:
    """A pinned ring buffer for uploads to one device. Its size is fixed.

    An upload waits for the device only if the ring is full. On a CPU device every copy is made
    before the call returns; results, errors and counters are the same.

    Threads may share a pool. Uploads are made one at a time, each on the current stream of its
    thread.

    Args:
        device: "cpu", a CUDA device, or the index of a CUDA device. A CUDA device without an
            index is torch's current device.
        capacity_bytes: size of the ring in bytes, any positive integral number. One upload must
            fit; a larger ring holds more uploads whose copies have not been made yet.

    Raises:
        ValueError: the device is neither a CUDA device nor the CPU, or capacity_bytes is not a
            positive integer.
        RuntimeError: the memory cannot be pinned.
    """

    def __init__(self, device: torch.device | str | int, capacity_bytes: int) -> None:
        self.device = resolve_device(device)
        capacity_bytes = positive_integer("capacity_bytes", capacity_bytes)
        self._ring = Ring(capacity_bytes, ALIGNMENT)
        self._lock = threading.Lock()
        self._uploads = self._copies = self._bytes = 0
        with on_device(self.device):
            self._memory = _allocate(capacity_bytes, pinned=self.device.type == "cuda")
        # The finalizer also refers to the memory, so that it outlives the copies from it.
        self._finalizer = weakref.finalize(self, _release_unclosed, *self._parts())

    @property
    def counters(self) -> StagingCounters:
        """The counters as they are now. The object does not change later."""
        with self._lock:
            return StagingCounters(
                uploads=self._uploads,
                copies=self._copies,
                bytes=self._bytes,
                waits=self._ring.waits,
                high_water_bytes=self._ring.high_water,
            )

    def upload(self, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Copies arrays to new tensors on the device, with one asynchronous copy.

        The arrays may be changed as soon as this returns.

        Args:
            arrays: name -> CPU tensor or numpy array, of any shape, strides and dtype that torch
                has.

        Returns:
            name -> contiguous tensor on the device, of the same shape and dtype. The tensors are
            views of one allocation, each at a multiple of 256 bytes. The current stream fills them.

        Raises:
            ValueError: an array is not a strided CPU tensor or a numpy array, has a dtype that
                torch does not have, or the arrays take more bytes than the ring has.
            RuntimeError: the pool is closed, or the current stream is being captured.
        """
        return self.stage(arrays).tensors

    def stage(self, arrays: Mapping[str, Array]) -> Staged:
        """Like `upload`, for tensors that get new values later: see `Staged.refresh`."""
        arrays = dict(arrays)  # a mapping of the caller's may call this pool, so not under the lock
        with self._lock, on_device(self.device):
            self._check_usable()
            packing = Packing.of(arrays)
            if packing.size > self._ring.capacity:
                raise ValueError(
                    f"an upload of {packing.size} bytes does not fit in the ring of "
                    f"{self._ring.capacity} bytes (capacity_bytes)"
                )
            block = torch.empty(aligned(packing.size), dtype=torch.uint8, device=self.device)
            self._send(packing, arrays, block)
        return Staged(self, packing, block)

    def close(self) -> None:
        """Releases the pinned memory, after waiting for the copies from it. May be called twice."""
        with self._lock:
            if self._finalizer.detach() is not None:
                _release(*self._parts())
                del self._memory

    def __enter__(self) -> StagingPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _refresh(self, packing: Packing, block: torch.Tensor, arrays: Mapping[str, Array]) -> None:
        arrays = dict(arrays)  # as in stage()
        packing.check(arrays)
        with self._lock, on_device(self.device):
            self._check_usable()
            self._send(packing, arrays, block)

    def _parts(self) -> tuple[torch.device, Ring, torch.Tensor]:
        return self.device, self._ring, self._memory

    def _check_usable(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("the staging pool is closed")
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the current stream is being captured: a replay of the graph would copy from a "
                "part of the ring that then holds another upload; call stage() before the capture "
                "and Staged.refresh() before each replay"
            )

    def _send(self, packing: Packing, arrays: Mapping[str, Array], block: torch.Tensor) -> None:
        """Copies the arrays through a slot of the ring to `block`, uint8 on the device."""
        if packing.size:
            offset = self._ring.reserve(packing.size)
            slot, destination = self._memory[offset : offset + packing.size], block[: packing.size]
            packing.write(arrays, slot)
            try:
                with torch.inference_mode():  # in it, inference and other tensors may be written
                    destination.copy_(slot, non_blocking=True)
            finally:  # after an interrupt the copy may have been enqueued
                self._ring.commit(offset, packing.size, self._enqueued_work())
            self._copies += 1
        self._uploads += 1
        self._bytes += packing.nbytes

    def _enqueued_work(self) -> Done:
        """The end of the work that has been enqueued on the current stream so far."""
        if self.device.type != "cuda":
            return _AlreadyDone()
        event = torch.cuda.Event()
        event.record()
        return event


class Staged:
    """Tensors on the device that one copy fills, any number of times.

    Attributes:
        tensors: name -> tensor, as `StagingPool.upload` returns them. They keep their addresses.
    """

    def __init__(self, pool: StagingPool, packing: Packing, block: torch.Tensor) -> None:
        self.tensors = packing.views(block)
        self._pool, self._packing, self._block = pool, packing, block

    def refresh(self, arrays: Mapping[str, Array]) -> None:
        """Gives the tensors new values, with one asynchronous copy on the current stream.

        Args:
            arrays: arrays of the names, shapes and dtypes that were staged.

        Raises:
            ValueError: names, shapes or dtypes differ. Nothing is copied.
            RuntimeError: the pool is closed, or the current stream is being captured.
        """
        self._pool._refresh(self._packing, self._block, arrays)


class _AlreadyDone:
    """The end of work that has been done already."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _allocate(capacity_bytes: int, pinned: bool) -> torch.Tensor:
    """A uint8 tensor [capacity_bytes] on the host.

    Raises:
        RuntimeError: the memory cannot be pinned.
    """
    try:
        return torch.empty(capacity_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    except RuntimeError as error:
        if not pinned:
            raise
        raise RuntimeError(
            f"cannot pin {capacity_bytes} bytes of host memory for the staging pool; lower "
            "capacity_bytes, or raise the limit on locked memory (ulimit -l)"
        ) from error


def _release(device: torch.device, ring: Ring, memory: torch.Tensor) -> None:
    """Waits for the copies from the memory. During a capture, keeps the memory for good instead.

    A query of an event would make the capture fail.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _leaked_memory.append(memory)
    else:
        ring.drain()


def _release_unclosed(device: torch.device, ring: Ring, memory: torch.Tensor) -> None:
    """`_release` for a pool that was never closed, perhaps while the interpreter exits."""
    with contextlib.suppress(Exception):  # a device that has failed makes no more copies
        _release(device, ring, memory)
