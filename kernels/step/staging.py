"""Uploads from the host to the device that the host need not wait for.

A copy is asynchronous only from pinned memory, which must stay as it is until the copy has been
made. Here it is a ring buffer of fixed size, whose slots are taken again once an event behind their
copy has passed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvfold.step.align import ALIGNMENT, aligned
from kvfold.step.device import on_device, resolve_device
from kvfold.step.packing import Array, Packing, Place, accepted
from kvfold.step.ring import Ring

log = logging.getLogger("kvfold")

_kept: list[torch.Tensor] = []  # memory of pools dropped during a capture, when nothing can wait


@dataclass(frozen=True)
class StagingCounters:
    """What a pool has done so far.

    Attributes:
        uploads: calls of upload and upload_into that went through.
        copies: host-to-device copies they issued.
        bytes: bytes of the arrays, without what lies between them.
        waits: times a full ring waited for its oldest slot.
        high_water_bytes: the most bytes of the ring in use at once.
        synchronisations: other waits of an upload for the device. There are none: 0.
    """

    uploads: int
    copies: int
    bytes: int
    waits: int
    high_water_bytes: int
    synchronisations: int = 0


class StagingPool:
    """A pinned ring buffer of `capacity_bytes` for uploads to a device. It never grows.

    On a CPU everything is done at once, with the same results, errors and counters. Threads may
    share a pool; uploads are made one at a time, each on its thread's current stream.

    Args:
        device: a CUDA device, the current one if it has no index, or the CPU.
        capacity_bytes: must hold the largest upload; more lets more uploads be under way.
        fallback: take pageable memory where none can be pinned, and say so. Uploads may then wait.

    Raises:
        ValueError: no such kind of device, or a capacity that is no positive int.
        RuntimeError: the memory cannot be pinned.
    """

    def __init__(
        self, device: torch.device | str | int, capacity_bytes: int, *, fallback: bool = False
    ) -> None:
        self.device = resolve_device(device)
        if type(capacity_bytes) is not int or capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes!r}; accepted: a positive int")
        self._ring = Ring(capacity_bytes, ALIGNMENT)
        self._lock = threading.Lock()
        self._uploads = self._copies = self._bytes = 0
        with on_device(self.device):
            self._memory = _allocate(capacity_bytes, self.device.type == "cuda", fallback)
        # The finalizer holds the memory too, so it outlives the copies under way.
        self._finalizer = weakref.finalize(self, _abandon, *self._parts())

    @property
    def counters(self) -> StagingCounters:
        """A snapshot."""
        with self._lock:
            return StagingCounters(
                uploads=self._uploads,
                copies=self._copies,
                bytes=self._bytes,
                waits=self._ring.waits,
                high_water_bytes=self._ring.high_water,
            )

    def upload(self, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """New device tensors with the arrays' values, shapes and dtypes, contiguous.

        They are views of one allocation, each at a multiple of 256 bytes, which one asynchronous
        copy on the current stream fills. The arrays may be changed once this returns.

        Raises:
            ValueError: no array, one of a dtype torch does not have, one that is not on the CPU,
                or more bytes than the ring has.
            RuntimeError: the pool is closed, or the current stream is being captured.
        """
        return self.stage(arrays).tensors

    def stage(self, arrays: Mapping[str, Array]) -> Staged:
        """As `upload`, for tensors that are to be refreshed: `Staged.refresh` is quick."""
        with self._lock, on_device(self.device):
            self._check_usable()
            packing = self._pack(arrays)
            block = torch.empty(aligned(packing.size), dtype=torch.uint8, device=self.device)
            self._send(packing, arrays, _whole(block, packing.size))
        return Staged(self, packing, block)

    def _refresh(self, packing: Packing, block: torch.Tensor, arrays: Mapping[str, Array]) -> None:
        packing.check(arrays)
        with self._lock, on_device(self.device):
            self._check_usable()
            self._send(packing, arrays, _whole(block, packing.size))

    def upload_into(
        self,
        destinations: Mapping[str, torch.Tensor],
        arrays: Mapping[str, Array],
    ) -> None:
        """Refreshes tensors on the device, such as those a captured graph reads.

        One asynchronous copy on the current stream for each of them; what `stage` returned is
        refreshed by one for all. After an error nothing is copied.

        Args:
            destinations: contiguous tensors on the pool's device.
            arrays: of the same names, shapes and dtypes.

        Raises:
            ValueError: as `upload`; or an array and its destination do not match.
            RuntimeError: as `upload`.
        """
        with self._lock, on_device(self.device):
            self._check_usable()
            for name in arrays:
                if name not in destinations:
                    raise ValueError(f"array {name!r} has no destination; {accepted(destinations)}")
            for name in destinations:
                if name not in arrays:
                    raise ValueError(f"destination {name!r} has no array; {accepted(arrays)}")
            packing = self._pack(arrays)
            for place in packing.places:
                _check_destination(destinations[place.name], place, self.device)
            targets = {
                place.start: destinations[place.name].detach().view(-1).view(torch.uint8)
                for place in packing.places
                if place.nbytes
            }
            self._send(packing, arrays, targets)

    def close(self) -> None:
        """Waits for the copies under way, if any, and gives the memory back."""
        with self._lock:
            if self._finalizer.detach() is not None:
                _finish(*self._parts())
                del self._memory

    def __enter__(self) -> StagingPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _parts(self) -> tuple[torch.device, Ring, torch.Tensor]:
        return self.device, self._ring, self._memory

    def _check_usable(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("the staging pool is closed")
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the current stream is being captured: the graph would copy from a slot that is "
                "reused by the time it is replayed; upload before the capture, and before each "
                "replay with upload_into"
            )

    def _pack(self, arrays: Mapping[str, Array]) -> Packing:
        packing = Packing.of(arrays)
        if packing.size > self._ring.capacity:
            raise ValueError(
                f"an upload of {packing.size} bytes does not fit in the ring of "
                f"{self._ring.capacity} bytes (capacity_bytes)"
            )
        return packing

    def _send(
        self, packing: Packing, arrays: Mapping[str, Array], targets: dict[int, torch.Tensor]
    ) -> None:
        """Copies through one slot to uint8 device tensors, by the offset in it of their bytes."""
        if packing.size:
            offset = self._ring.reserve(packing.size)
            slot = self._memory[offset : offset + packing.size]
            packing.write(arrays, slot)
            try:
                with torch.inference_mode():  # where every tensor may be written to
                    for start, target in targets.items():
                        target.copy_(slot[start : start + target.numel()], non_blocking=True)
            finally:  # some copies may be under way
                self._ring.commit(offset, packing.size, self._done())
        self._uploads += 1
        self._copies += len(targets)
        self._bytes += packing.nbytes

    def _done(self) -> torch.cuda.Event | _Now:
        """When the work queued so far on the current stream is done."""
        if self.device.type != "cuda":
            return _Now()
        event = torch.cuda.Event()
        event.record()
        return event


class _Now:
    """The end of what is over already."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Staged:
    """Tensors on the device that one copy fills, and fills again.

    Attributes:
        tensors: name -> tensor, as StagingPool.upload returns them.
    """

    def __init__(self, pool: StagingPool, packing: Packing, block: torch.Tensor) -> None:
        self.tensors = packing.views(block)
        self._pool, self._packing, self._block = pool, packing, block

    def refresh(self, arrays: Mapping[str, Array]) -> None:
        """Gives the tensors new values, from arrays of the same names, shapes and dtypes.

        Raises:
            ValueError: they are not; nothing is copied.
            RuntimeError: as StagingPool.upload.
        """
        self._pool._refresh(self._packing, self._block, arrays)


def _whole(block: torch.Tensor, size: int) -> dict[int, torch.Tensor]:
    """What _send takes to fill a block at once."""
    return {0: block[:size]} if size else {}


def _allocate(capacity: int, pinned: bool, fallback: bool) -> torch.Tensor:
    """uint8 [capacity] on the host, pinned or, where that fails and `fallback`, pageable."""
    if pinned:
        try:
            return torch.empty(capacity, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            if not fallback:
                raise RuntimeError(
                    f"cannot pin {capacity} bytes of host memory for the staging pool: lower "
                    "capacity_bytes, raise the limit on locked memory (ulimit -l), or give "
                    "fallback=True for pageable memory"
                ) from error
            log.warning(
                "cannot pin %d bytes of host memory; uploads go through pageable memory: %s",
                capacity,
                error,
            )
    return torch.empty(capacity, dtype=torch.uint8, device="cpu")


def _finish(device: torch.device, ring: Ring, memory: torch.Tensor) -> None:
    """Waits until the memory's copies are made; during a capture, keeps it for good instead."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _kept.append(memory)  # looking at an event would spoil the capture
    else:
        ring.drain()


def _abandon(device: torch.device, ring: Ring, memory: torch.Tensor) -> None:
    """_finish() for a pool that nobody closed, perhaps at the interpreter's exit."""
    with contextlib.suppress(Exception):  # nobody to tell; a failed device makes no more copies
        _finish(device, ring, memory)


def _check_destination(destination: torch.Tensor, place: Place, device: torch.device) -> None:
    """Raises ValueError if an array's bytes cannot be copied to the destination's."""
    if not isinstance(destination, torch.Tensor):
        value, legal = f"of type {type(destination).__name__}", "tensors"
    elif destination.device != device:
        value, legal = f"on {str(destination.device)!r}", f"{str(device)!r}"
    elif destination.dtype != place.dtype:
        value, legal = f"of dtype {destination.dtype}", f"{place.dtype}, the array's"
    elif destination.shape != place.shape:
        value = f"of shape {tuple(destination.shape)}"
        legal = f"{place.shape}, the array's"
    elif not destination.is_contiguous():
        value, legal = f"of stride {destination.stride()}", "contiguous tensors"
    else:
        return
    raise ValueError(f"destination {place.name!r} is {value}; accepted: {legal}")
