"""Work on a GPU that waits for the host, so that no test depends on how quick either is."""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator

import torch

EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
GIVE_UP = 60  # seconds


@contextlib.contextmanager
def closed() -> Iterator[Callable[[], None]]:
    """What is queued on the current stream in here starts when the context ends.

    Gives what opens the gate before. It opens by itself for a host that waits behind it, too late
    for a test that has it so.
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

    def open_() -> None:
        flag.fill_(1)

    watchdog = threading.Timer(GIVE_UP, open_)
    watchdog.start()
    try:
        yield open_
    finally:
        open_()
        watchdog.cancel()
        stream.synchronize()
