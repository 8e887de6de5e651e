"""Launches kernel.cuh: packs the op's arguments into its Params."""

from __future__ import annotations

import functools

import torch

from kvfold.nvrtc import Kernel, packer

# Params of kernel.cuh, field by field: 10 pointers, 9 strides in elements, 11 integers.
_pack = packer("10Q9q6iI4i")

FEW_ITEMS = 1 << 14  # storing threads: more of them no longer make the store quicker


@functools.cache
def divider(divisor: int) -> tuple[int, int]:
    """(m, s) such that x // divisor == x * m >> s for every 0 <= x < 2**31; m < 2**32.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


def launch(
    kernel: Kernel,
    kv_score,
    ape,
    paged_kv,
    paged_score,
    block_table_kv,
    block_table_score,
    output,
    kv_lens,
    cu_seq_lens,
    cu_outputs,
    compress_ratio,
    next_n,
    prefetch_state=False,
) -> None:
    """Launches on torch's current stream of the tensors' device, which must be current."""
    variant = kernel.variant
    num_pages, page_size, state_dim = paged_kv.shape
    batch, max_pages = block_table_kv.shape
    kv_page, kv_slot, _ = paged_kv.stride()
    score_page, score_slot, _ = paged_score.stride()
    items = batch * state_dim // variant.vector  # of storing: a vector of a request's new rows
    if variant.schedule == "persistent":
        most = kernel.sms * variant.min_ctas // variant.slices
        ctas = max(1, min(batch, most)) * variant.slices
        by_token = items * next_n <= ctas * variant.threads
    else:
        by_token = items * next_n <= FEW_ITEMS
        storing = items * next_n if by_token else items
        ctas = batch * variant.slices + -(-storing // variant.threads)
    multiplier, shift = divider(page_size)
    kernel.launch(
        ctas,
        torch._C._cuda_getCurrentRawStream(kv_score.get_device()),
        _pack,
        kv_score.data_ptr(),
        ape.data_ptr(),
        paged_kv.data_ptr(),
        paged_score.data_ptr(),
        block_table_kv.data_ptr(),
        block_table_score.data_ptr(),
        output.data_ptr(),
        kv_lens.data_ptr(),
        cu_seq_lens.data_ptr(),
        cu_outputs.data_ptr(),
        kv_score.stride(0),
        ape.stride(0),
        kv_page,
        kv_slot,
        score_page,
        score_slot,
        block_table_kv.stride(0),
        block_table_score.stride(0),
        output.stride(0),
        batch,
        kv_score.shape[0],
        output.shape[0],
        num_pages,
        max_pages,
        page_size,
        multiplier,
        shift,
        output.element_size() == 2,
        by_token,
        prefetch_state,
    )
