"""CUDA graph capture. After a failed capture, torch's allocator and random numbers still work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as PoolHandle


def capture(
    stream: torch.cuda.Stream, body: Callable[..., Any], *args: Any
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures body(*args) into a CUDA graph, on a stream of the current device.

    Returns:
        The graph, and what body returned.

    Raises:
        BaseException: the exception that body raised. If body raised none, the error with which
            the capture began or ended.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    first_error: BaseException | None = None
    try:
        with _capturing(graph, stream, pool):
            try:
                return graph, body(*args)
            except BaseException as error:
                first_error = error  # the end of the capture may raise another one
                raise
    except BaseException as error:
        if first_error is None:
            first_error = error
    del graph
    _clean_up(pool, stream)
    try:
        raise first_error
    finally:
        # The error's traceback refers to this frame. Without this line the two, and all tensors of
        # the body's frame, would stay until the next garbage collection.
        del first_error


@contextlib.contextmanager
def _capturing(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: PoolHandle | None = None
) -> Iterator[None]:
    with (
        # torch leaves the capture's stream the current one if the end of the capture fails.
        torch.cuda.stream(torch.cuda.current_stream()),
        # Other threads may allocate memory during the capture.
        torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
    ):
        yield


def _clean_up(pool: PoolHandle, stream: torch.cuda.Stream) -> None:
    """Ends what a failed capture left open in torch.

    CUDAGraph::capture_end of torch 2.11 returns early if cudaStreamEndCapture fails
    (https://github.com/pytorch/pytorch/pull/180395 describes it):

    - The caching allocator takes the capture for unfinished. Blocks that were used on two streams
      are then never free again. Two private functions of torch end it. They raise RuntimeError
      where the capture has been ended, and a later torch may not have them. Both are ignored.
    - The random number generator takes the capture for unfinished. Every random number outside of
      a capture is then an error. Another capture that succeeds resets it.

    Pinned memory that was allocated during the capture is never free again; no function ends that.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with contextlib.suppress(RuntimeError), _capturing(torch.cuda.CUDAGraph(), stream):
        torch.zeros(1, device=device)
