"""What the host works out for a launch of any op that stores rows in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.ops.row_spec import layout_of
from kvfold.runtime.arguments import divider
from kvfold.runtime.driver import GridPlan


def with_rows(plan: GridPlan, arguments: Any, dimensions: Mapping[str, int]) -> GridPlan:
    """A plan with the members of ROW_PARAMS that are neither dimensions nor arguments."""
    layout = layout_of(arguments, dimensions)
    multiplier, shift = divider(arguments.rows_per_page)
    return plan.with_values(
        rows_multiplier=multiplier,
        rows_shift=shift,
        largest=layout.format.largest,
        floor_bits=layout.format.floor_bits,
        row_stride=layout.row_stride,
        scale_start=layout.scale_start,
        scale_stride=layout.scale_stride,
    )
