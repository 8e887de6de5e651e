"""compress_norm_rope_store with SGLang's signature."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from kvfold import formats
from kvfold.adapters.sglang.kept import Record, rope_table, rounded
from kvfold.adapters.sglang.plan import HEAD_DIMS, refuse
from kvfold.adapters.sglang.step import step_of
from kvfold.runtime.layout_guard import layout_guard
from kvfold.runtime.torch_op import torch_op

# The op itself: its function in Python, and keywords, take time.
_norm_rope_store = torch_op("norm_rope_store")

# SGLang's name of a layout of rows of 512 columns -> the cache format. v4 has 584 bytes per row.
FORMATS = {
    "v4": "mixed_584",
    "v41": "fp8_528",
    "v41_new": "fp8_528_interleaved",
    "v41_fp4": "fp4_288",
    "v41_fp4_new": "fp4_288_interleaved",
    "uniform_fp8": "fp8_tensor",
}


class Epilogue(Record):
    """What a layer's rows go through on their way to the cache.

    Attributes:
        arguments: that choose the format.
    """

    def __init__(
        self,
        norm_weight: Tensor,
        freq_cis: Tensor,
        dtype: torch.dtype,
        format: str,
        arguments: tuple,
    ) -> None:
        # SGLang rounds the weight to the rows' dtype; bf16 to fp32 is exact.
        rounded_to = norm_weight.dtype if dtype == torch.float32 else torch.bfloat16
        self.weight = rounded(norm_weight, rounded_to)
        self.rope_table = rope_table(freq_cis)
        self.format, self.rounding = format, rounding(format, dtype)
        self.rotate = norm_weight.size(0) == 128
        self.arguments = arguments
        self.has_layouts = layout_guard(norm_weight, freq_cis)


_epilogues: dict[Hashable, Epilogue] = {}  # by addresses and the dtype of rows


def compress_norm_rope_store(
    kv: Tensor,
    plan: Any,
    *,
    norm_weight: Tensor,
    norm_eps: float,
    freq_cis: Tensor,
    out_loc: Tensor,
    kvcache: Tensor,
    page_size: int,
    use_fp4: bool = False,
    bf16_store: bool = False,
    kvcache_scale: Tensor | None = None,
    rope_cache: tuple[Tensor, Tensor] | None = None,
    fp4_k_write_metadata: Any = None,
    layout: Any = "v4",
    fp8_2buff: bool = False,
    kvcache_rope: Tensor | None = None,
) -> None:
    """Takes compressed rows to the cache, by one launch.

    The first call of a step with a prefill plan makes positions and slots by one launch more; with
    a decode plan only if compress_forward of this module has not made them.

    Args:
        kv: [entries, head_dim], bf16 or fp32: what compress_forward returned.
        plan: the same as compress_forward's.
        norm_weight: [head_dim], bf16 or fp32.
        norm_eps: of the norm.
        freq_cis: [max_pos, pairs], complex64.
        out_loc: int64: the slot of the window that a token closes. Decode: [entries]; else by
            token, [num_tokens].
        kvcache: [pages, page_bytes], uint8, mutated.
        page_size: rows per page of kvcache.
        use_fp4: the indexer's rows are fp4 codes; else fp8.
        bf16_store: rows are stored as bf16.
        layout: KVLayout, or its value.
        kvcache_scale, rope_cache, fp4_k_write_metadata: must be None; they are for AMD GPUs.
        fp8_2buff: must be False.
        kvcache_rope: must be None.

    Raises:
        ValueError: an argument is not accepted. Nothing is launched or written.
    """
    step = step_of("compress_norm_rope_store", plan, kvcache.data_ptr())
    key = (norm_weight.data_ptr(), freq_cis.data_ptr(), kv.dtype)
    epilogue, made = _epilogues.get(key), step.rows(out_loc)
    arguments = (
        use_fp4, bf16_store, layout, fp8_2buff, kvcache_scale, rope_cache, fp4_k_write_metadata,
        kvcache_rope,
    )  # fmt: skip
    # The op checks the rest at each call.
    if (
        epilogue is None
        or made is None
        or epilogue.arguments != arguments
        or epilogue.weight.version != epilogue.weight.source._version
        or not epilogue.has_layouts(norm_weight, freq_cis)
    ):
        format = cache_format(kv.size(-1), use_fp4, bf16_store, layout)
        _refuse_others(fp8_2buff, kvcache_scale, rope_cache, fp4_k_write_metadata, kvcache_rope)
        _check(kv, plan, norm_weight, freq_cis, out_loc, kvcache, page_size, format)
        epilogue = Epilogue(norm_weight, freq_cis, kv.dtype, format, arguments)
        if epilogue.weight.version is not None:
            epilogue.keep(_epilogues, key, norm_weight, freq_cis)
        made = step.make_rows(plan, out_loc)
    if not step.entries:
        return
    rows = made.get()
    _norm_rope_store(
        kv, epilogue.weight.tensor, epilogue.rope_table, rows.positions,
        out_loc if step.is_decode else rows.slots, kvcache, norm_eps, page_size, epilogue.format,
        epilogue.rounding, epilogue.rotate,
    )  # fmt: skip


def cache_format(head_dim: int, use_fp4: bool, bf16_store: bool, layout: Any) -> str:
    """The name of the cache format that SGLang's arguments stand for. Raises ValueError."""
    function = "compress_norm_rope_store"
    name = str(getattr(layout, "value", layout)).lower()
    if name not in FORMATS:
        refuse(function, "layout", repr(layout), ", ".join(FORMATS))
    if head_dim == 128:
        if name != "v4":
            refuse(function, "layout", repr(layout), "v4, with head_dim 128")
        if bf16_store:
            refuse(function, "bf16_store", bf16_store, "False, with head_dim 128")
        return "mxfp4_ties_down" if use_fp4 else "fp8_block128_floor"
    if use_fp4:
        refuse(function, "use_fp4", use_fp4, f"False, with head_dim {head_dim}")
    if bf16_store and name != "v4":
        refuse(function, "bf16_store", bf16_store, f"False, with layout {name}")
    return "bf16" if bf16_store else FORMATS[name]


def rounding(format: str, dtype: torch.dtype) -> str:
    """Where SGLang rounds rows of a dtype on their way to a format."""
    if format == "mixed_584":
        return "codes_from_bf16"
    # Its V4.1 epilogue rounds to the dtype of the rows after the norm and after RoPE.
    if format in FORMATS.values() and dtype == torch.bfloat16:
        return "each_step"
    return "once"


def _refuse_others(
    fp8_2buff: bool, kvcache_scale: Any, rope_cache: Any, metadata: Any, kvcache_rope: Any
) -> None:
    """Raises ValueError for an argument that kvfold has no use for."""
    function = "compress_norm_rope_store"
    if fp8_2buff:
        refuse(function, "fp8_2buff", fp8_2buff, "False; a cache format has one pool")
    for name, value in (
        ("kvcache_scale", kvcache_scale),
        ("rope_cache", rope_cache),
        ("fp4_k_write_metadata", metadata),
        ("kvcache_rope", kvcache_rope),
    ):
        if value is not None:
            refuse(function, name, f"a {type(value).__name__}", "None")


def _check(
    kv: Tensor,
    plan: Any,
    norm_weight: Tensor,
    freq_cis: Tensor,
    out_loc: Tensor,
    kvcache: Tensor,
    page_size: int,
    format: str,
) -> None:
    """Checks the tensors of a call. Raises ValueError."""
    function, entries, head_dim = "compress_norm_rope_store", plan[1].size(0), kv.size(-1)
    if list(kv.shape) != [entries, head_dim] or head_dim not in HEAD_DIMS:
        refuse(function, "kv", f"of shape {list(kv.shape)}", f"[{entries}, 128 or 512]")
    floats = (torch.bfloat16, torch.float32)
    for name, tensor, dims, dtypes in (
        ("kv", kv, 2, floats),
        ("norm_weight", norm_weight, 1, floats),
        ("freq_cis", freq_cis, 2, (torch.complex64,)),
        ("out_loc", out_loc, 1, (torch.int64,)),
        ("kvcache", kvcache, 2, (torch.uint8,)),
    ):
        if tensor.dtype not in dtypes:
            refuse(function, name, f"of {tensor.dtype}", " or ".join(map(str, dtypes)))
        if tensor.dim() != dims:
            refuse(function, name, f"of shape {list(tensor.shape)}", f"{dims} dimensions")
        if tensor.device != plan[1].device:
            refuse(function, name, f"on {tensor.device}", f"{plan[1].device}, where the plan is")
    if norm_weight.size(0) != head_dim:
        refuse(function, "norm_weight", f"of shape {list(norm_weight.shape)}", f"[{head_dim}]")
    if plan.is_decode and out_loc.size(0) != entries:
        refuse(function, "out_loc", f"of shape {list(out_loc.shape)}", f"[{entries}]")
    if not plan.is_decode and out_loc.size(0) < entries:
        refuse(function, "out_loc", f"of shape {list(out_loc.shape)}", f"[{entries} or more]")
    if not out_loc.is_contiguous():
        refuse(function, "out_loc", f"of strides {out_loc.stride()}", "a contiguous tensor")
    if page_size < 1:
        refuse(function, "page_size", page_size, "1 or more")
    needed = cache_page(format, head_dim, 2 * freq_cis.size(1), page_size)
    if kvcache.size(1) < needed:
        refuse(function, "kvcache", f"of {kvcache.size(1)} bytes per page", f"{needed} or more")


def cache_page(format: str, head_dim: int, rope_dim: int, page_size: int) -> int:
    """The bytes of a page that hold rows; SGLang pads pages to multiples of its own."""
    return formats.cache_format(format).layout(head_dim, rope_dim, page_size).page_bytes
