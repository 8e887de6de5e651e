"""Calls that look like one before: what was found right then is right again.

Going through torch's dispatcher and looking at ten tensors takes several times as long as launching
a kernel. torch.compile has the same to do at every call of a compiled function; its guard compares
all tensors' layouts with those of one earlier call in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a torch that has no such guard: every call takes the long way
    TensorGuards = None

MOST = 1024  # looks kept; more than an engine's batch sizes times its kinds of layers

_known: dict[Hashable, tuple[Callable, Callable]] = {}


def nobody_watches() -> bool:
    """Whether nothing wants to see the op's call that a guard does not know of.

    A guard knows of tensor subclasses, gradients and function transforms, which change a tensor's
    type or dispatch keys, but not of every mode.
    """
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def find(look: Hashable, tensors: Sequence[torch.Tensor]) -> Callable | None:
    """What `remember` was given for a call whose tensors were laid out like these, or None."""
    known = _known.get(look)
    return known[1] if known is not None and known[0](*tensors) else None


def can_remember(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a guard can tell calls like one with these tensors, each of which must differ."""
    return (
        TensorGuards is not None
        and len(set(map(id, tensors))) == len(tensors)
        and all(map(_is_plain, tensors))
        and not _transformed()
    )


def remember(look: Hashable, tensors: Sequence[torch.Tensor], launch: Callable) -> None:
    """Keeps `launch` for calls like this one, which can_remember().

    Args:
        look: cheap to make, and tells apart what a program may have at once: of calls with one
            look only the last is known.
    """
    if len(_known) >= MOST:
        del _known[next(iter(_known))]  # the oldest
    guard = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )
    _known[look] = (guard.check, launch)


def _transformed() -> bool:
    """Whether a mode or a function transform has its hand in every call."""
    transforms = torch._C._functorch.peek_interpreter_stack()
    return transforms is not None or torch._C._len_torch_dispatch_stack() > 0


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.requires_grad


def forget() -> None:
    """Forgets all; for when the table changes."""
    _known.clear()
