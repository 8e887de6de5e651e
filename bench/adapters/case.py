"""A pair of calls whose difference is the cost of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class HostCase:
    """One call of an engine, as a step makes it once per layer.

    Attributes:
        name: of the call, as "decode, ratio 4".
        adapter: makes the call through the adapter.
        ops: makes the calls of kvfold's ops that the adapter makes, with the same tensors.
    """

    name: str
    adapter: Callable[[], None]
    ops: Callable[[], None]
