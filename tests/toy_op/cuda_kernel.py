"""What the host works out for a launch of kernel.cuh."""

from collections.abc import Mapping

from kvfold.codegen import Variant
from kvfold.ops.toy.spec import Arguments
from kvfold.runtime.driver import GridPlan


def plan(
    variant: Variant, ctas_at_once: int, arguments: Arguments, dimensions: Mapping[str, int]
) -> GridPlan:
    """One CTA per row."""
    return GridPlan(ctas=dimensions["rows"], values={})
