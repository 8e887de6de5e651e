"""The parts of torch that are not public and that make a repeated call cheap.

A repeated call does without torch's dispatcher (see repeat.py). `kvfold bench OP --baseline`
measures what that saves: the host time of a 'call' against that of an 'unrepeated' one. If torch
lacks one of these parts, FOUND is false and every call goes through the dispatcher.
"""

from __future__ import annotations

import torch

try:
    from torch._C import (
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._dynamo.guards import TensorGuards
    from torch._C._functorch import peek_interpreter_stack
except ImportError:
    FOUND = False
else:
    FOUND = True
    make_guard = TensorGuards

    def unobserved() -> bool:
        """Whether nothing wants to see an op's call that a guard does not know of.

        A guard sees tensor subclasses, gradients and function transforms: they change a tensor's
        type or its dispatch keys. It does not see every mode.
        """
        return not (
            _len_torch_dispatch_stack()
            or _len_torch_function_stack()
            or _profiler_enabled()
            or _get_tracing_state() is not None
        )

    def transformed() -> bool:
        """Whether a dispatch mode or a function transform takes part in every call."""
        return peek_interpreter_stack() is not None or _len_torch_dispatch_stack() > 0


try:  # a torch without CUDA lacks these
    from torch._C import _cuda_getCurrentRawStream as raw_stream
    from torch._C import _cuda_getDevice as current_device
except ImportError:
    current_device = torch.cuda.current_device

    def raw_stream(device: int) -> int:
        """The current stream of a device, as CUDA's handle."""
        return torch.cuda.current_stream(device).cuda_stream
