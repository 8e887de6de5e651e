"""GPU work that waits for the host, so that no test depends on how fast either of them is."""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator

import torch

EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
TIMEOUT = 60  # seconds after which the gate opens by itself


@contextlib.contextmanager
def closed() -> Iterator[Callable[[], None]]:
    """Work that is queued on the current stream within the context starts when the context ends.

    Yields a function that opens the gate earlier. If the host blocks on the stream within the
    context, the gate opens after TIMEOUT and the test fails by its own assertions.
    """
    stream = torch.cuda.current_stream()
    flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    status = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue32_v2(
        ctypes.c_void_p(stream.cuda_stream),
        ctypes.c_uint64(flag.data_ptr()),
        ctypes.c_uint32(1),
        ctypes.c_uint(EQUAL),
    )
    assert status == 0, f"cuStreamWaitValue32: {status}"

    def open_gate() -> None:
        flag.fill_(1)

    watchdog = threading.Timer(TIMEOUT, open_gate)
    watchdog.start()
    try:
        yield open_gate
    finally:
        open_gate()
        watchdog.cancel()
        stream.synchronize()
