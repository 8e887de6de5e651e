"""CUDA graph captures that, where they fail, leave torch as it was."""

from __future__ import annotations

import contextlib
import sys
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
        BaseException: the first thing that went wrong, in body or in the capture.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    handled = sys.exc_info()[1]  # by the caller, if it is handling something
    try:
        with _capturing(graph, stream, pool):
            return graph, body(*args)
    except BaseException as error:
        first = error
    while first.__context__ not in (None, handled):  # the end fails too, less telling
        first = first.__context__
    del graph
    _mend(pool, stream)
    raise first


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
    180395), and its random numbers would fail until another capture ends.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # the allocator knows of no capture: it has ended
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with contextlib.suppress(RuntimeError), _capturing(torch.cuda.CUDAGraph(), stream):
        torch.zeros(1, device=device)
