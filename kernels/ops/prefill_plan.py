"""What the host works out for a launch of any prefill op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.codegen import Variant
from kvfold.ops.state_plan import state_values
from kvfold.runtime.driver import GridPlan

MIN_RANGE_ROWS = 8


def prefill_plan(
    variant: Variant, ctas_at_once: int, arguments: Any, dimensions: Mapping[str, int]
) -> GridPlan:
    """The grid of a prefill op, and the values that the host computes for all of them."""
    batch, num_tokens = dimensions["batch"], dimensions["num_tokens"]
    slices = variant.problem.head_dim // variant.tuning.head_slice
    places = max(1, ctas_at_once // slices)  # ranges that are worked on at once
    # Rows are shared by all CTAs that run at once, and a few of them are enough for a CTA.
    wanted = max(-(-num_tokens // MIN_RANGE_ROWS), batch)
    range_rows = -(-num_tokens // min(max(wanted, 1), places))
    # The kernel begins with a scan of the requests, so there must be one.
    ranges = -(-num_tokens // range_rows) if num_tokens and batch else 0
    return GridPlan(
        ctas=ranges * slices,
        values={
            **state_values(arguments, dimensions),
            "range_rows": range_rows,
            "ranges": ranges,
        },
    )
