"""norm_rope_store in Triton: one program per row."""
# Triton's language is not Python's: annotations say how the compiler takes an argument.
# pyright: reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportRedeclaration=false

import triton
import triton.language as tl

from kvfold.codegen import Variant
from kvfold.device.row_triton import NOT_SPECIALIZED, OPTIONS, load_row, row_arguments, row_to_cache
from kvfold.ops.norm_rope_store.spec import Arguments


def launch(variant: Variant, arguments: Arguments) -> None:
    """Launches a variant on arguments that the op has checked. `prefetch` has no effect.

    Runs on the current CUDA device and stream; under TRITON_INTERPRET=1 on CPU tensors.
    """
    rows, head_dim = arguments.rows, variant.problem.head_dim
    _kernel[(rows.size(0),)](
        rows,
        rows.stride(0),
        *row_arguments(arguments, head_dim),
        head_dim,
        num_warps=variant.tuning.warps,
        **OPTIONS,
    )


# No number makes a kernel of its own, nor does where in an engine's buffer the metadata lies: a
# call must not meet a compilation just because its batch differs.
@triton.jit(do_not_specialize=["rows_stride", *NOT_SPECIALIZED])
def _kernel(
    rows,
    rows_stride: tl.int64,
    weight,
    rope_table,
    positions,
    slots,
    cache,
    scale,
    latent_out,
    rows_out,
    codes_out,
    scales_out,
    rope_position_stride: tl.int64,
    rope_part_stride: tl.int64,
    rope_pair_stride: tl.int64,
    page_stride: tl.int64,
    latent_out_stride: tl.int64,
    rows_out_stride: tl.int64,
    codes_out_stride: tl.int64,
    scales_out_stride: tl.int64,
    max_pos: tl.int64,
    num_slots: tl.int64,
    rows_per_page: tl.int64,
    scale_start: tl.int64,
    eps: tl.float32,
    rope_pairs: tl.constexpr,
    rounding: tl.constexpr,
    rotate: tl.constexpr,
    code: tl.constexpr,
    ties: tl.constexpr,
    block: tl.constexpr,
    scale_kind: tl.constexpr,
    rule: tl.constexpr,
    floor_on: tl.constexpr,
    floor_bits: tl.constexpr,
    columns: tl.constexpr,
    row_stride: tl.constexpr,
    scale_stride: tl.constexpr,
    scale_bytes: tl.constexpr,
    head_dim: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Rows are 16-byte aligned, which the op has checked: let the compiler see it.
    vector: tl.constexpr = 128 // rows.dtype.element_ty.primitive_bitwidth
    x = load_row(rows + row * (rows_stride // vector * vector), head_dim)
    row_to_cache(
        x, row, weight, rope_table, positions, slots, cache, scale, latent_out, rows_out,
        codes_out, scales_out, rope_position_stride, rope_part_stride, rope_pair_stride,
        page_stride, latent_out_stride, rows_out_stride, codes_out_stride, scales_out_stride,
        max_pos, num_slots, rows_per_page, scale_start, eps, rope_pairs, rounding, rotate, code,
        ties, block, scale_kind, rule, floor_on, floor_bits, columns, row_stride, scale_stride,
        scale_bytes,
    )  # fmt: skip
