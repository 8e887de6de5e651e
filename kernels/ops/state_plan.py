"""What the host works out for a launch of any state op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.runtime.arguments import divider


def state_values(arguments: Any, dimensions: Mapping[str, int]) -> dict[str, int]:
    """The members of the CUDA parameter struct that every state op computes alike."""
    multiplier, shift = divider(dimensions["page_size"])
    return {
        "page_multiplier": multiplier,
        "page_shift": shift,
        "stores": arguments.work != "reduce",
        "reduces": arguments.work != "store",
    }
