"""What the host works out for a launch of any prefill op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.codegen import Variant
from kvfold.ops.state_plan import state_values
from kvfold.runtime.driver import GridPlan

MIN_RANGE_ROWS = 8


def prefill_plan(
    variant: Variant, sms: int, arguments: Any, dimensions: Mapping[str, int]
) -> GridPlan:
    """The grid of a prefill op, and the values that the host computes for all of them."""
    problem, tuning = variant.problem, variant.tuning
    batch, num_tokens = dimensions["batch"], dimensions["num_tokens"]
    slices = problem.head_dim // tuning.head_slice
    places = max(1, sms * tuning.min_ctas // slices)  # slices of ranges that run at once
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
