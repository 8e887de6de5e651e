"""Repeated calls: a call with the same layouts as an earlier one is launched at once.

To go through torch's dispatcher and to check ten tensors takes several times as long as to launch a
kernel. A guard compares the layouts of all tensors with those of an earlier call instead.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from kvfold.runtime import internals
from kvfold.runtime.layout_guard import layout_guard, layouts

CAPACITY = 1024  # calls kept: more than an engine's batch sizes times its kinds of layers

Launch = Callable[[Sequence[int]], None]  # takes the tensors' addresses

# key -> guard, launch, layout
_known: dict[Hashable, tuple[Callable[..., bool], Launch, Hashable]] = {}
_writing = threading.Lock()
_enabled = internals.FOUND


def find(key: Hashable, tensors: Sequence[torch.Tensor]) -> Launch | None:
    """What `remember` was given for this key, if the tensors are laid out as they were then."""
    known = _known.get(key)
    return known[1] if known is not None and known[0](*tensors) else None


def launch_of(key: Hashable, tensors: Sequence[torch.Tensor]) -> Launch | None:
    """As `find`, for a caller in another dispatch state, in which the guard would fail.

    The layouts are compared in Python: another thread may have remembered a call of the same key.
    """
    known = _known.get(key)
    return known[1] if known is not None and known[2] == layouts(tensors) else None


def can_remember(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a guard can recognise calls with tensors like these. No tensor may be there twice."""
    return (
        _enabled
        and len(set(map(id, tensors))) == len(tensors)
        and all(map(_is_plain, tensors))
        and not internals.transformed()
    )


def remember(key: Hashable, tensors: Sequence[torch.Tensor], launch: Launch) -> None:
    """Keeps the launch of a call with these tensors.

    Args:
        key: cheap to make. Of calls with one key only the last is kept, so the key tells apart the
            calls that a program makes in turn.
    """
    guard = layout_guard(*tensors)
    with _writing:
        if len(_known) >= CAPACITY:
            del _known[next(iter(_known))]  # the oldest
        _known[key] = (guard, launch, layouts(tensors))


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.requires_grad


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Every call is like the first one, as with a torch that lacks the internals."""
    global _enabled
    before, _enabled = _enabled, False
    forget()
    try:
        yield
    finally:
        _enabled = before


def forget() -> None:
    """Forgets all calls; for when the table changes."""
    with _writing:
        _known.clear()
