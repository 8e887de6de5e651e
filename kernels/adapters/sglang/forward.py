"""compress_forward with SGLang's signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kvfold
from kvfold.adapters.sglang.kept import kvfold_ape, state_views
from kvfold.adapters.sglang.plan import HEAD_DIMS, MAX_TOKENS, refuse
from kvfold.adapters.sglang.step import Step

FLOATS = (torch.bfloat16, torch.float32)


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
    step = Step.of("compress_forward", plan, kv_score_buffer.data_ptr())
    # The op checks the rest. A check here is for what it cannot know, and for the first call of a
    # step, which launches what makes the metadata.
    call = (
        kv_score_buffer.shape, kv_score_input.shape, ape.shape, head_dim, compress_ratio,
        is_online, None if out is None else out.shape,
    )  # fmt: skip
    if call not in step.accepted:
        _check(kv_score_buffer, kv_score_input, ape, plan, head_dim, compress_ratio, out, is_online)
        step.accepted.add(call)
    if out is None:
        out = kv_score_input.new_empty((plan[1].shape[0], head_dim))
    ape = kvfold_ape(ape, compress_ratio, kv_score_input.dtype)
    paged_kv, paged_score = state_views(kv_score_buffer)
    if plan.is_decode:
        requests = step.decode(plan).requests
        kvfold.paged_kv_compress(
            kv_score_input, ape, paged_kv, paged_score, requests.block_table,
            requests.block_table, out, requests.kv_lens, requests.cu_seq_lens,
            requests.cu_outputs, compress_ratio, 1, ape_in_state=False,
        )  # fmt: skip
        return out
    # The state is a ring: windows are reduced before new rows overwrite the rows that they read.
    metadata = step.prefill(plan, kv_score_input.size(0))
    requests = metadata.reduce
    if len(out):
        kvfold.prefill_compress(
            kv_score_input, ape, paged_kv, paged_score, requests.block_table,
            requests.block_table, out, requests.kv_lens, requests.cu_seq_lens,
            requests.cu_outputs, compress_ratio, ape_in_state=False, work="reduce",
        )  # fmt: skip
    requests = metadata.store
    kvfold.paged_kv_compress(
        kv_score_input, ape, paged_kv, paged_score, requests.block_table, requests.block_table,
        out, requests.kv_lens, requests.cu_seq_lens, requests.cu_outputs, compress_ratio, 1,
        ape_in_state=False, work="store",
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
