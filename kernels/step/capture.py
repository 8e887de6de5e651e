"""CUDA graph captures after whose failure torch's allocator and random numbers go on as before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def capture(
    stream: torch.cuda.Stream, body: Callable[..., Any], *args: Any
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures body(*args) on a stream of the current device.

    Returns:
        (the graph, what body returned)

    Raises:
        BaseException: what body raised, else what went wrong with the capture.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    first = None
    try:
        with _capturing(graph, stream, pool):
            try:
                return graph, body(*args)
            except BaseException as error:
                first = error  # the capture's end may fail too, less telling
                raise
    except BaseException as error:
        first = error if first is None else first
    del graph
    _mend(pool, stream)
    try:
        raise first
    finally:
        del first  # or it and this frame keep each other, and what the body had


@contextlib.contextmanager
def _capturing(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int] | None = None
) -> Iterator[None]:
    with (
        # A capture whose end fails would leave its own stream the current one.
        torch.cuda.stream(torch.cuda.current_stream()),
        # Other threads may allocate meanwhile.
        torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
    ):
        yield


def _mend(pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Ends for torch what a failed capture has begun; torch 2.11 leaves it open.

    Its allocator would keep what is freed after use on two streams for good (PyTorch's pull request
    180395), and its random numbers would fail until another capture ends. What the body had of
    pinned memory stays with torch: Python cannot end that.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # the allocator knows of no capture: it has ended
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with contextlib.suppress(RuntimeError), _capturing(torch.cuda.CUDAGraph(), stream):
        torch.zeros(1, device=device)
