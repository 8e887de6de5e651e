"""What the declarations of the ops that store rows in the cache share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvfold import codegen
from kvfold.codegen import Launch, PageLayout, TableError, scalar, tensor
from kvfold.codegen.gpu import MAX_CLUSTER
from kvfold.codegen.variant import refuse

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIMS = (128, 256, 512)  # a lane of a warp has head_dim / 32 columns, a power of two
ROW_BUFFERS = 4  # of a CTA, for rows whose columns arrive from other CTAs
ROUNDINGS = ("once", "before_codes", "codes_from_bf16", "each_step")

# The members of the CUDA parameter struct that describe the way from a row to the cache.
# row_plan.py computes those that are no argument.
ROW_PARAMS = (
    "max_pos",
    "rope_pairs",
    "cache_pages",
    "rows_per_page",
    "float eps",
    "rounding",
    "rotate",
    "weight_is_bf16",
    "latent_out_is_bf16",
    "rows_out_is_bf16",
    "code_bits",
    "ties_down",
    "float largest",
    "block_lanes",
    "scale_code",
    "pow2",
    "floor_on_scale",
    "uint32 floor_bits",
    "code_columns",
    "code_bytes",
    "row_stride",
    "scale_start",
    "scale_stride",
    "scale_count",
    "scale_bytes",
)


# An op's Arguments inherits from these classes; the last one named comes first in its order.


@dataclass(frozen=True)
class RowTensors(codegen.Arguments):
    """The tensors of the way from a row to the cache."""

    weight: Tensor = tensor("head_dim", "bf16, fp32", help="of RMSNorm")
    rope_table: Tensor = tensor(
        "max_pos, 2, rope_pairs",
        "fp32",
        strides="rope_position_stride, rope_part_stride, rope_pair_stride",
        alignment=4,
        help="cosines, then sines of RoPE by position; any strides; rope_dim is 2*rope_pairs",
    )
    positions: Tensor = tensor("num_rows", "int32", help="a row's position in rope_table")
    slots: Tensor = tensor(
        "num_rows", "int64", help="page * rows_per_page + row of the page; negative: none"
    )
    cache: Tensor = tensor(
        "cache_pages, page_bytes", "uint8", mutated=True, alignment=4, help="pages of the cache"
    )


@dataclass(frozen=True)
class RowScalars(codegen.Arguments):
    """Its scalars that are passed by position."""

    eps: float = scalar(float, help="of RMSNorm")
    rows_per_page: int = scalar(int, help="rows of a page of the cache")
    format: str = scalar(str, help="name of a cache format of the table")


@dataclass(frozen=True)
class RowDtypeScalar(codegen.Arguments):
    """The dtype of rows that are in no tensor."""

    row_dtype: str = scalar(
        str,
        choices=("bf16", "fp32"),
        help="dtype that a compressed row is rounded to before the norm",
    )


@dataclass(frozen=True)
class RowKeywords(codegen.Arguments):
    """Its scalars that are passed by name."""

    rounding: str = scalar(
        str,
        default="once",
        choices=ROUNDINGS,
        keyword=True,
        help="where values are rounded to bf16",
    )
    rotate: bool = scalar(
        bool,
        default=False,
        keyword=True,
        help="whether a row is rotated by a Hadamard matrix after RoPE",
    )


@dataclass(frozen=True)
class RowOptions(codegen.Arguments):
    """Its optional tensors."""

    scale: Tensor | None = tensor(
        "1", "fp32", optional=True, alignment=4, help="for formats with scale: tensor; None: 1"
    )
    latent_out: Tensor | None = tensor(
        "num_rows, head_dim",
        "bf16, fp32",
        mutated=True,
        optional=True,
        help="rows after the norm, before RoPE",
    )
    rows_out: Tensor | None = tensor(
        "num_rows, head_dim",
        "bf16, fp32",
        mutated=True,
        optional=True,
        help="rows after RoPE and rotation, before quantisation",
    )
    codes_out: Tensor | None = tensor(
        "num_rows, codes_bytes",
        "uint8",
        mutated=True,
        optional=True,
        alignment=4,
        help="data bytes of the rows, as the cache gets them",
    )
    scales_out: Tensor | None = tensor(
        "num_rows, scales_bytes",
        "uint8",
        mutated=True,
        optional=True,
        help="scale bytes of the rows, as the cache gets them",
    )


def with_cache_output(launch: Launch, head_dim: int, tuning: Any) -> Launch:
    """What a kernel needs whose CTAs, one per slice of a row, take the row to the cache together.

    Raises:
        TableError: head_dim is not served, or a cluster cannot have so many CTAs.
    """
    if head_dim not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        raise TableError("is not served", field="head_dim", value=head_dim, legal=accepted)
    cluster = head_dim // tuning.head_slice
    if cluster > MAX_CLUSTER:
        what = f"makes a cluster of {cluster} CTAs, more than {MAX_CLUSTER}"
        legal = f"{head_dim // MAX_CLUSTER} or more"
        raise refuse(tuning, "head_slice", what, legal)
    # device/cache_output.cuh has the same sum.
    shared_bytes = launch.shared_bytes + ROW_BUFFERS * 4 * head_dim + 16
    return replace(launch, cluster=cluster, shared_bytes=shared_bytes)


def layout_of(arguments: Any, dimensions: Mapping[str, int]) -> PageLayout:
    """The layout of a page of the cache.

    Raises:
        ValueError: the format, the cache or an optional output is not accepted.
    """
    from kvfold.runtime.dispatch import table  # loads torch

    if dimensions["head_dim"] not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"weight has head_dim {dimensions['head_dim']}; accepted: {accepted}")
    if not 0 <= arguments.eps < math.inf:
        raise ValueError(f"eps is {arguments.eps}; accepted: 0 or more, finite")
    formats = table().formats
    if arguments.format not in formats:
        raise ValueError(f"format is {arguments.format!r}; accepted: {', '.join(formats)}")
    format = formats[arguments.format]
    layout = format.layout(
        dimensions["head_dim"], 2 * dimensions["rope_pairs"], arguments.rows_per_page
    )
    lane_columns = dimensions["head_dim"] // 32
    if layout.bf16_columns % lane_columns:
        raise ValueError(
            f"rope_table has rope_dim {layout.bf16_columns}; accepted: a multiple of"
            f" {lane_columns} for format {arguments.format}"
        )
    _require_bytes("cache", dimensions["page_bytes"], layout.page_bytes, "page", least=True)
    if "codes_bytes" in dimensions:
        _require_bytes("codes_out", dimensions["codes_bytes"], layout.data_bytes, "row")
    if "scales_bytes" in dimensions:
        _require_bytes("scales_out", dimensions["scales_bytes"], layout.scale_bytes, "row")
    if arguments.scale is not None and format.scale != "tensor":
        raise ValueError(
            f"scale is a tensor; accepted: None, as format {arguments.format} has scale"
            f" {format.scale}"
        )
    if arguments.rounding == "codes_from_bf16":
        if format.rope != "bf16":
            raise ValueError(
                f"rounding is 'codes_from_bf16'; accepted: {', '.join(ROUNDINGS[:2])} or each_step,"
                f" as format {arguments.format} has rope {format.rope}"
            )
        if arguments.rotate:
            raise ValueError("rotate is True; accepted: False with rounding 'codes_from_bf16'")
    return layout


def _require_bytes(name: str, got: int, wanted: int, of: str, least: bool = False) -> None:
    if got < wanted or (got > wanted and not least):
        raise ValueError(
            f"{name} has {got} bytes per {of}; accepted: {wanted}{' or more' if least else ''}"
        )
