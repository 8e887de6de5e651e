"""toy in Triton."""

import triton
import triton.language as tl

from kvfold.codegen import Variant
from kvfold.ops.toy.spec import Arguments


@triton.jit
def scale_row(x, y, x_stride, y_stride, factor, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Scales one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < COLUMNS
    value = tl.load(x + row * x_stride + column, inside)
    tl.store(y + row * y_stride + column, value * factor, inside)


def launch(variant: Variant, arguments: Arguments) -> None:
    """Launches a variant."""
    x, y = arguments.x, arguments.y
    columns = variant.problem.columns
    scale_row[(x.size(0),)](
        x,
        y,
        x.stride(0),
        y.stride(0),
        arguments.factor,
        COLUMNS=columns,
        TILE=triton.next_power_of_2(columns),
        num_warps=variant.tuning.warps,
    )
