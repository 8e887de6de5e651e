"""What the host works out for a launch of kernel.cuh."""

from __future__ import annotations

from collections.abc import Mapping

from kvfold.codegen import Variant
from kvfold.ops.decode_plan import decode_plan
from kvfold.ops.paged_kv_compress_store.spec import Arguments
from kvfold.ops.row_plan import with_rows
from kvfold.runtime.driver import GridPlan


def plan(
    variant: Variant, ctas_at_once: int, arguments: Arguments, dimensions: Mapping[str, int]
) -> GridPlan:
    """The grid, and the values that the host computes."""
    plan = decode_plan(variant, ctas_at_once, arguments, dimensions).with_values(
        num_outputs=dimensions["num_rows"]
    )
    return with_rows(plan, arguments, dimensions)
