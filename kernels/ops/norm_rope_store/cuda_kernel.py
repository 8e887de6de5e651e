"""What the host works out for a launch of kernel.cuh."""

from __future__ import annotations

from collections.abc import Mapping

from kvfold.codegen import Variant
from kvfold.ops.norm_rope_store.spec import Arguments
from kvfold.ops.row_plan import with_rows
from kvfold.runtime.driver import GridPlan


def plan(
    variant: Variant, ctas_at_once: int, arguments: Arguments, dimensions: Mapping[str, int]
) -> GridPlan:
    """As many CTAs as the rows keep busy; each takes rows in turn."""
    at_once = variant.tuning.warps // variant.tuning.row_warps
    ctas = min(-(-dimensions["num_rows"] // at_once), ctas_at_once)
    return with_rows(GridPlan(ctas=ctas, values={}), arguments, dimensions)
