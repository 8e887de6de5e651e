"""What the declarations of the ops that store rows in the cache share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvfold import codegen
from kvfold.codegen import Launch, PageLayout, TableError, scalar, tensor
from kvfold.codegen.gpu import MAX_CLUSTER
from kvfold.codegen.variant import refuse

if TYPE_CHECKING:
    from torch import Tensor

LaunchOf = Callable[[Any, str, Any], Launch]  # of problem, backend and tuning

HEAD_DIMS = (128, 256, 512)  # a lane of a warp has head_dim / 32 columns, a power of two
ROW_BUFFERS = 4  # of a CTA, for rows whose columns arrive from other CTAs
ROUNDINGS = ("once", "before_codes", "codes_from_bf16", "each_step")

# The members of the CUDA parameter struct that describe the way from a row to the cache.
# row_plan.py computes those that are no argument.
ROW_PARAMS = (
    "max_pos",
    "cache_pages",
    "rows_per_page",
    "uint32 rows_multiplier",
    "rows_shift",
    "float eps",
    "float largest",
    "uint32 floor_bits",
    "row_stride",
    "scale_start",
    "scale_stride",
)

# The constants for which a kernel is compiled, with those of format mixed_584 at head_dim 512.
ROW_CONSTANTS: Mapping[str, int | bool] = {
    "rounding": 0,  # place in ROUNDINGS
    "rotate": False,
    "weight_is_bf16": True,
    "latent_out": 0,  # place in OUTPUTS
    "rows_out": 0,
    "codes_out": False,
    "scales_out": False,
    "rope_dim": 64,
    "code_bits": 8,
    "ties_down": False,
    "block": 64,
    "scale_code": 3,  # place in SCALE_CODES
    "pow2": True,
    "floor_on_scale": False,
    "code_columns": 448,
    "scale_bytes": 8,
}
# The same of an op that reduces the rows itself.
FUSED_ROW_CONSTANTS: Mapping[str, int | bool] = {**ROW_CONSTANTS, "row_is_bf16": True}
OUTPUTS = ("none", "bf16", "fp32")
SCALE_CODES = ("none", "tensor", "fp32", "e8m0", "e4m3")

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
class OptionalRowTensors(codegen.Arguments):
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


def with_cache_output(launch: LaunchOf) -> LaunchOf:
    """What a variant of a store op needs, from what one of its state op does.

    In CUDA the CTAs with the slices of one row form a cluster, and take the row to the cache
    together. The function raises TableError also if head_dim is not served, or if a cluster cannot
    have so many CTAs.
    """

    def launch_with_store(problem: Any, backend: str, tuning: Any) -> Launch:
        plain, head_dim = launch(problem, backend, tuning), problem.head_dim
        if backend != "cuda":
            return plain
        if head_dim not in HEAD_DIMS:
            accepted = ", ".join(map(str, HEAD_DIMS))
            raise TableError("is not served", field="head_dim", value=head_dim, legal=accepted)
        cluster = head_dim // tuning.head_slice
        if cluster > MAX_CLUSTER:
            what = f"makes a cluster of {cluster} CTAs, more than {MAX_CLUSTER}"
            legal = f"{head_dim // MAX_CLUSTER} or more"
            raise refuse(tuning, "head_slice", what, legal)
        # device/cache_output.cuh has the same sum.
        shared_bytes = plain.shared_bytes + ROW_BUFFERS * (4 * head_dim + 2 * 8)
        return replace(plain, cluster=cluster, shared_bytes=shared_bytes)

    return launch_with_store


def row_constants(arguments: Any, dimensions: Mapping[str, int]) -> dict[str, int | bool]:
    """The constants of a call: ROW_CONSTANTS with its values."""
    a, layout = arguments, layout_of(arguments, dimensions)
    format = layout.format
    return {
        "rounding": ROUNDINGS.index(a.rounding),
        "rotate": a.rotate,
        "weight_is_bf16": a.weight.element_size() == 2,
        "latent_out": _output(a.latent_out),
        "rows_out": _output(a.rows_out),
        "codes_out": a.codes_out is not None,
        "scales_out": a.scales_out is not None,
        "rope_dim": layout.rope_dim,
        "code_bits": format.float_code.bits,
        "ties_down": format.ties == "down",
        "block": format.block,
        "scale_code": SCALE_CODES.index(format.scale),
        "pow2": format.rule == "pow2",
        "floor_on_scale": format.floor_on == "scale",
        "code_columns": layout.columns,
        "scale_bytes": layout.scale_bytes,
    }


def fused_row_constants(arguments: Any, dimensions: Mapping[str, int]) -> dict[str, int | bool]:
    """The same of an op that reduces the rows itself."""
    row_is_bf16 = arguments.row_dtype == "bf16"
    return {**row_constants(arguments, dimensions), "row_is_bf16": row_is_bf16}


def _output(tensor: Any) -> int:
    """The place in OUTPUTS of an optional output."""
    return 0 if tensor is None else OUTPUTS.index("bf16" if tensor.element_size() == 2 else "fp32")


def layout_of(arguments: Any, dimensions: Mapping[str, int]) -> PageLayout:
    """The layout of a page of the cache. Raises TableError if the format has no such rows."""
    from kvfold.runtime.dispatch import table  # loads torch

    rope_dim = 2 * dimensions["rope_pairs"]
    format = table().format(arguments.format)
    return format.layout(dimensions["head_dim"], rope_dim, arguments.rows_per_page)


def check_rows(arguments: Any, dimensions: Mapping[str, int]) -> None:
    """Checks what a call says of the way to the cache.

    Raises:
        ValueError: an argument that is not accepted. TableError, which is one: the format has no
            such rows.
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
    layout = layout_of(arguments, dimensions)
    format = layout.format
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


def _require_bytes(name: str, got: int, wanted: int, of: str, least: bool = False) -> None:
    if got < wanted or (got > wanted and not least):
        raise ValueError(
            f"{name} has {got} bytes per {of}; accepted: {wanted}{' or more' if least else ''}"
        )
