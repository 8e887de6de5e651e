"""What the host works out for a launch of kernel.cuh."""

from __future__ import annotations

from collections.abc import Mapping

from kvfold.codegen import Variant
from kvfold.ops.locate_rows.spec import Arguments, token_bounds
from kvfold.runtime.driver import GridPlan


def plan(
    variant: Variant, ctas_at_once: int, arguments: Arguments, dimensions: Mapping[str, int]
) -> GridPlan:
    """A thread per output row."""
    most_tokens, most_new = token_bounds(arguments)
    return GridPlan(
        ctas=-(-dimensions["num_outputs"] // variant.launch.threads),
        values={
            # A tensor that is absent has no elements.
            "max_pages": dimensions.get("max_pages", 0),
            "num_token_slots": dimensions.get("num_token_slots", 0),
            "most_tokens": most_tokens,
            "most_new": most_new,
        },
    )
