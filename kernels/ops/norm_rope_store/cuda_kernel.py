"""What the host works out for a launch of kernel.cuh."""

from __future__ import annotations

from collections.abc import Mapping

from kvfold.codegen import Variant
from kvfold.ops.norm_rope_store.spec import Arguments
from kvfold.ops.row_plan import with_rows
from kvfold.runtime.driver import GridPlan


def plan(
    variant: Variant, sms: int, arguments: Arguments, dimensions: Mapping[str, int]
) -> GridPlan:
    """A warp per row."""
    ctas = -(-dimensions["num_rows"] // variant.tuning.warps)
    return with_rows(GridPlan(ctas=ctas, values={}), arguments, dimensions)
