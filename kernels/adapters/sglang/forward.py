"""compress_forward with SGLang's signature."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.sglang.internals import new_rows
from kvfold.adapters.sglang.kept import Record, kvfold_ape, state_views
from kvfold.adapters.sglang.plan import HEAD_DIMS, MAX_TOKENS, refuse
from kvfold.adapters.sglang.step import step_of
from kvfold.runtime.layout_guard import layout_guard
from kvfold.runtime.torch_op import torch_op

# The ops themselves: their functions in Python, and keywords, take time.
_paged_kv_compress = torch_op("paged_kv_compress")
_prefill_compress = torch_op("prefill_compress")
NO_PREFETCH, APE_IN_STATE = "none", False

FLOATS = (torch.bfloat16, torch.float32)


class Layer(Record):
    """A layer's state and ape as kvfold takes them."""

    def __init__(
        self, kv_score_buffer: Tensor, ape: Tensor, ratio: int, dtype: torch.dtype
    ) -> None:
        self.has_layouts = layout_guard(kv_score_buffer, ape)
        self.kv, self.score = state_views(kv_score_buffer)
        self.ape = kvfold_ape(ape, ratio, dtype)


_layers: dict[Hashable, Layer] = {}  # by addresses and what else tells calls apart


def compress_forward(
    kv_score_buffer: Tensor,
    kv_score_input: Tensor,
    ape: Tensor,
    plan: Any,
    *,
    head_dim: int,
    compress_ratio: int,
    out: Tensor | None = None,
    is_online: bool = False,
) -> Tensor:
    """Compresses the windows that close, and stores the new rows in the packed state.

    A decode plan takes one launch, a prefill or target-verify plan two: the second stores. The
    first call of a step with a plan makes kvfold's metadata by one launch more. It never
    synchronises, and runs in CUDA graphs.

    With C = 2 for ratio 4 and C = 1 for ratio 128:

    Args:
        kv_score_buffer: [pages, compress_ratio, 2 * C * head_dim], bf16 or fp32, mutated: the
            state, KV and then raw score.
        kv_score_input: [num_tokens, 2 * C * head_dim], bf16 or fp32. A decode plan has one token
            per entry.
        ape: [C * compress_ratio, head_dim], bf16 or fp32, in SGLang's layout.
        plan: CompressorDecodePlan or CompressorPrefillPlan. The valid entries of a prefill's
            plan_c are put in the order of their tokens.
        head_dim: 128 or 512.
        compress_ratio: 4 or 128, as the plan's.
        out: [entries, head_dim], bf16 or fp32, mutated. None: a new tensor of kv_score_input's
            dtype. Row i belongs to entry i; rows of entries that close no window are not written.
        is_online: must be False.

    Returns:
        out.

    Raises:
        ValueError: an argument is not accepted. Nothing is launched or written.
    """
    state, dtype, rows = kv_score_buffer.data_ptr(), kv_score_input.dtype, kv_score_input.shape[0]
    step = step_of("compress_forward", plan, state)
    key = (state, ape.data_ptr(), dtype, head_dim, compress_ratio, is_online)
    layer, made = _layers.get(key), step.by_tokens.get(rows)
    # The ops check the rest at each call.
    if (
        layer is None
        or made is None
        or layer.ape.version != layer.ape.source._version
        or not layer.has_layouts(kv_score_buffer, ape)
        or compress_ratio != step.ratio
        or (out is not None and out.shape != (step.entries, head_dim))
    ):
        _check(kv_score_buffer, kv_score_input, ape, plan, head_dim, compress_ratio, out, is_online)
        layer = Layer(kv_score_buffer, ape, compress_ratio, dtype)
        if layer.ape.version is not None:
            layer.keep(_layers, key, kv_score_buffer, ape)
        made = step.make(plan, rows)
    if out is None:
        out = new_rows(step.device, dtype, step.entries, head_dim)
    if step.is_decode:
        requests = made.get().requests
        _paged_kv_compress(
            kv_score_input, layer.ape.tensor, layer.kv, layer.score, requests.block_table,
            requests.block_table, out, requests.kv_lens, requests.cu_seq_lens,
            requests.cu_outputs, compress_ratio, 1, NO_PREFETCH, APE_IN_STATE,
        )  # fmt: skip
        return out
    # The state is a ring: windows are reduced before new rows overwrite the rows that they read.
    metadata = made.get()
    requests = metadata.reduce
    if step.entries:
        _prefill_compress(
            kv_score_input, layer.ape.tensor, layer.kv, layer.score, requests.block_table,
            requests.block_table, out, requests.kv_lens, requests.cu_seq_lens,
            requests.cu_outputs, compress_ratio, ape_in_state=APE_IN_STATE, work="reduce",
        )  # fmt: skip
    requests = metadata.store
    _paged_kv_compress(
        kv_score_input, layer.ape.tensor, layer.kv, layer.score, requests.block_table,
        requests.block_table, out, requests.kv_lens, requests.cu_seq_lens, requests.cu_outputs,
        compress_ratio, 1, NO_PREFETCH, APE_IN_STATE, "store",
    )  # fmt: skip
    return out


def _check(
    kv_score_buffer: Tensor,
    kv_score_input: Tensor,
    ape: Tensor,
    plan: Any,
    head_dim: int,
    compress_ratio: int,
    out: Tensor | None,
    is_online: bool,
) -> None:
    """Checks a call. Raises ValueError."""
    name = "compress_forward"
    if is_online:
        refuse(name, "is_online", is_online, "False; kvfold keeps every row of an open window")
    if compress_ratio != plan.compress_ratio:
        refuse(name, "compress_ratio", compress_ratio, f"{plan.compress_ratio}, the plan's")
    if head_dim not in HEAD_DIMS:
        refuse(name, "head_dim", head_dim, "128, 512")
    parts = 2 if compress_ratio == 4 else 1
    width, entries = 2 * parts * head_dim, plan[1].size(0)
    tokens = entries if plan.is_decode else kv_score_input.size(0)
    if tokens > MAX_TOKENS and not plan.is_decode:
        refuse(name, "kv_score_input", f"of {tokens} rows", f"at most {MAX_TOKENS} rows")
    tensors = [
        ("kv_score_buffer", kv_score_buffer, [kv_score_buffer.size(0), compress_ratio, width]),
        ("kv_score_input", kv_score_input, [tokens, width]),
        ("ape", ape, [parts * compress_ratio, head_dim]),
    ]
    if out is not None:
        tensors.append(("out", out, [entries, head_dim]))
    for argument, tensor, shape in tensors:
        if list(tensor.shape) != shape:
            refuse(name, argument, f"of shape {list(tensor.shape)}", f"{shape}")
        if tensor.dtype not in FLOATS:
            refuse(name, argument, f"of {tensor.dtype}", "torch.bfloat16 or torch.float32")
        if tensor.device != plan[1].device:
            refuse(name, argument, f"on {tensor.device}", f"{plan[1].device}, where the plan is")
        if tensor.stride(-1) != 1:
            refuse(name, argument, f"of strides {tensor.stride()}", "a contiguous last dimension")
