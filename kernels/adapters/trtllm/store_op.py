"""The op that takes rows to the cache. Names and order of arguments are TensorRT-LLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from kvfold.adapters.trtllm.pages import cache_pages
from kvfold.adapters.trtllm.slots import row_slots
from kvfold.adapters.trtllm.step import Tensors, first, refuse, shared
from kvfold.ops.norm_rope_store.spec import SPEC, Arguments
from kvfold.runtime.arguments import check
from kvfold.runtime.torch_op import torch_op

FORMATS = ("bf16", "fp8_tensor", "fp8_block128", "mxfp4")  # by cache_scale_type
METADATA = {
    "num_outputs": (1, torch.int32),
    "cu_kv_comp": (1, torch.int32),
    "start_pos": (1, torch.int32),
    "block_offsets": (2, torch.int32),
    "compressed_mask": (1, torch.bool),
}  # dimensions and dtype
CAPACITY = 1024  # of _accepted

_norm_rope_store = torch_op(
    "norm_rope_store"
)  # kvfold's function without the Python call around it

# What tells apart the calls that `_check` has accepted.
_accepted: set[tuple] = set()


def compressor_postprocess_scatter(
    kv_comp: Tensor,
    kv_out: Tensor | None,
    rms_weight: Tensor,
    rms_eps: float,
    cos_sin_table: Tensor,
    position_ids: Tensor,
    nope_dim: int,
    rope_dim: int,
    kv_cache: Tensor,
    num_outputs: Tensor,
    cu_kv_comp: Tensor,
    start_pos: Tensor,
    block_offsets: Tensor,
    compressed_mask: Tensor,
    tokens_per_block: int,
    cache_scale_type: int,
    rotate_activation: bool,
    quant_output: Tensor | None,
    scale_output: Tensor | None,
) -> None:
    """Takes compressed rows to the cache: RMSNorm, RoPE, rotation, quantisation, store.

    kvfold.norm_rope_store says what is done, and which errors are raised. Row cu_kv_comp[b] + i of
    request b, with i < num_outputs[b], is row start_pos[b] + i of the request's cache. If there is
    one request, row i is row start_pos[0] + i, whatever cu_kv_comp is. All other rows, and rows
    without a page or with a position outside cos_sin_table, are skipped as a whole.

    Where a row goes is computed on the device, in five small launches; see `step`.

    Args:
        kv_comp: [num_rows, head_dim], bf16 or fp32: the rows.
        kv_out: [num_rows, head_dim], bf16 or fp32, mutated: rows before quantisation.
        rms_weight: [head_dim], bf16 or fp32.
        cos_sin_table: [max_pos, 2, rope_dim / 2], or contiguous rows of rope_dim, fp32.
        position_ids: [num_rows], int32.
        kv_cache: contiguous pages of any shape and dtype, mutated. It is addressed by bytes.
        num_outputs: [batch], int32: rows of each request that are stored.
        cu_kv_comp: [batch + 1], int32: where the rows of a request begin in kv_comp.
        start_pos: [batch], int32: rows that a request has in the cache already.
        block_offsets: [batch, max_blocks], int32: logical page -> page of kv_cache.
        compressed_mask: [num_rows], bool: false for a row that is not stored.
        tokens_per_block: rows of a page of kv_cache.
        cache_scale_type: 0: the dtype of kv_comp. 1: fp8. 2: fp8 with an fp32 scale per 128
            columns. 3: fp4 with an e8m0 scale per 32 columns.
        rotate_activation: whether rows are rotated by a Hadamard matrix after RoPE.
        quant_output: [num_rows, bytes], mutated: the codes of rows.
        scale_output: [num_rows, scales], mutated: their scales. Both are left alone by types 0
            and 1, as by the engine.
    """
    metadata = num_outputs, cu_kv_comp, start_pos, block_offsets, compressed_mask
    rows = shared(
        _Rows,
        (nope_dim, rope_dim, tokens_per_block, cache_scale_type),
        metadata,
        (kv_comp, position_ids, cos_sin_table),
    )
    if rows.number == 0:
        return
    if rows.positions_are_longer:
        position_ids = position_ids[: rows.number]
    if rows.rope_shape is not None:
        cos_sin_table = cos_sin_table.view(rows.rope_shape)
    codes_out = scales_out = None
    if cache_scale_type >= 2:
        codes_out, scales_out = _bytes(quant_output), _bytes(scale_output)
    cache = cache_pages(kv_cache, rows.page_bytes)
    if not rows.located:
        _check(
            rows.metadata, kv_comp, rms_weight, cos_sin_table, position_ids, rows.slots, cache,
            rms_eps, tokens_per_block, rows.format, "once", rotate_activation, "none", None, None,
            kv_out, codes_out, scales_out,
        )  # fmt: skip
        row_slots(rows.slots, *rows.metadata, tokens_per_block)
        rows.located = True
    _norm_rope_store(
        kv_comp, rms_weight, cos_sin_table, position_ids, rows.slots, cache, rms_eps,
        tokens_per_block, rows.format, rotate=rotate_activation, rows_out=kv_out,
        codes_out=codes_out, scales_out=scales_out,
    )  # fmt: skip


class _Rows:
    """What rows of several layers have in common: where they go, and how.

    Attributes:
        number: of rows.
        positions_are_longer: position_ids must be cut to the rows.
        rope_shape: of the table for kvfold; None if it has it.
        format: of the cache, in kvfold's table.
        page_bytes: of a page of the cache.
        metadata: as row_slots takes it.
        slots: of the rows.
        located: the slots have their values.
    """

    def __init__(self, sizes: tuple, metadata: Tensors, likes: Tensors) -> None:
        """Raises ValueError for sizes that do not go together. Launches nothing.

        Args:
            sizes: nope_dim, rope_dim, tokens_per_block, cache_scale_type.
            metadata: as row_slots takes it, but for a mask that may be longer.
            likes: kv_comp, position_ids, cos_sin_table.
        """
        nope_dim, rope_dim, tokens_per_block, cache_scale_type = sizes
        kv_comp, position_ids, cos_sin_table = likes
        num_outputs, cu_kv_comp, start_pos, block_offsets, mask = metadata
        if kv_comp.dim() != 2:
            refuse("kv_comp", f"of shape {list(kv_comp.shape)}", "[num_rows, head_dim]")
        self.number, head_dim = num_rows, head_dim = kv_comp.shape
        if nope_dim + rope_dim != head_dim or nope_dim < 0 or rope_dim < 0:
            value = f"{nope_dim} + {rope_dim}"
            refuse("nope_dim + rope_dim", value, f"{head_dim}, as kv_comp has")
        if not 0 <= cache_scale_type < len(FORMATS):
            accepted = "0 to 3; kvfold has no format with scales in a buffer of their own"
            refuse("cache_scale_type", cache_scale_type, accepted)
        if tokens_per_block < 1:
            refuse("tokens_per_block", tokens_per_block, "1 or more")
        self.format, row_bytes = _format(cache_scale_type, kv_comp.dtype, head_dim)
        self.page_bytes = tokens_per_block * row_bytes
        self.rope_shape = _rope_shape(cos_sin_table, rope_dim)
        positions = first("position_ids", position_ids, num_rows)
        self.positions_are_longer = positions is not position_ids
        mask = first("compressed_mask", mask, num_rows)
        self.metadata = num_outputs, cu_kv_comp, start_pos, block_offsets, mask
        self.slots = torch.empty(num_rows, dtype=torch.int64, device=kv_comp.device)
        self.located = False


def _format(cache_scale_type: int, dtype: torch.dtype, head_dim: int) -> tuple[str, int]:
    """The cache format of kvfold's table, and the bytes of a row with its scales."""
    if cache_scale_type == 0:
        return ("fp32", 4 * head_dim) if dtype == torch.float32 else ("bf16", 2 * head_dim)
    row_bytes = (head_dim, head_dim + head_dim // 128 * 4, head_dim // 2 + head_dim // 32)
    return FORMATS[cache_scale_type], row_bytes[cache_scale_type - 1]


def _rope_shape(cos_sin_table: Tensor, rope_dim: int) -> tuple[int, int, int] | None:
    """The table's shape for kvfold; None if it is [max_pos, 2, rope_dim / 2] already."""
    shape = cos_sin_table.shape
    if len(shape) == 3 and shape[1] == 2 and 2 * shape[2] == rope_dim:
        return None
    if rope_dim < 2 or not cos_sin_table.is_contiguous() or cos_sin_table.numel() % rope_dim:
        accepted = f"[max_pos, 2, {rope_dim} / 2], or contiguous rows of {rope_dim}"
        refuse("cos_sin_table", f"of shape {list(shape)}", accepted)
    return (-1, 2, rope_dim // 2)


@overload
def _bytes(x: Tensor) -> Tensor: ...
@overload
def _bytes(x: None) -> None: ...
def _bytes(x: Tensor | None) -> Tensor | None:
    """The bytes of a tensor."""
    return x if x is None or x.dtype == torch.uint8 else x.view(torch.uint8)


def _check(metadata: Sequence[Tensor], *arguments: Any) -> None:
    """Raises ValueError for arguments that are not accepted, before anything is launched.

    Args:
        metadata: as row_slots takes it.
        arguments: of norm_rope_store; slots have no values yet.
    """
    key = (
        *[x for x in arguments if not isinstance(x, Tensor)],
        *[
            (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
            for x in (*arguments, *metadata)
            if isinstance(x, Tensor)
        ],
    )
    if key in _accepted:
        return
    checked = Arguments(*arguments)
    device = checked.rows.device
    for (name, (dimensions, dtype)), x in zip(METADATA.items(), metadata, strict=True):
        if (x.dim(), x.dtype, x.device) != (dimensions, dtype, device):
            value = f"of shape {list(x.shape)}, {x.dtype}, on {x.device}"
            refuse(name, value, f"{dimensions}-dimensional, {dtype}, on {device}")
    check(SPEC, checked)
    if len(_accepted) >= CAPACITY:
        _accepted.clear()
    _accepted.add(key)
