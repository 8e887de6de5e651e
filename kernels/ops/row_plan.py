"""What the host works out for a launch of any op that stores rows in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.ops.row_spec import layout_of

SCALE_CODES = ("none", "tensor", "fp32", "e8m0", "e4m3")  # in the order of device/quantise.cuh


def row_values(arguments: Any, dimensions: Mapping[str, int]) -> dict[str, int | float]:
    """The members of ROW_PARAMS that are neither dimensions nor arguments."""
    layout = layout_of(arguments, dimensions)
    format, lane_columns = layout.format, dimensions["head_dim"] // 32
    return {
        "weight_is_bf16": _is_bf16(arguments.weight),
        "latent_out_is_bf16": _is_bf16(arguments.latent_out),
        "rows_out_is_bf16": _is_bf16(arguments.rows_out),
        "code_bits": format.float_code.bits,
        "ties_down": format.ties == "down",
        "largest": format.largest,
        "block_lanes": format.block // lane_columns if format.per_block else 0,
        "scale_code": SCALE_CODES.index(format.scale),
        "pow2": format.rule == "pow2",
        "floor_on_scale": format.floor_on == "scale",
        "floor_bits": format.floor_bits,
        "code_columns": layout.columns,
        "code_bytes": layout.code_bytes,
        "row_stride": layout.row_stride,
        "scale_start": layout.scale_start,
        "scale_stride": layout.scale_stride,
        "scale_count": layout.scale_count,
        "scale_bytes": layout.scale_bytes,
    }


def fused_row_values(arguments: Any, dimensions: Mapping[str, int]) -> dict[str, int | float]:
    """The same for an op that reduces the rows itself, and what it has in place of an output."""
    return {
        **row_values(arguments, dimensions),
        "num_outputs": dimensions["num_rows"],
        "row_is_bf16": arguments.row_dtype == "bf16",
    }


def _is_bf16(tensor: Any) -> bool:
    """Whether a tensor that may be absent holds bf16."""
    return tensor is not None and tensor.element_size() == 2
