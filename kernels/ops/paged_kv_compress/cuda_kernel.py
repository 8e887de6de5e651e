"""Launches kernel.cuh: packs the op's arguments into its Params."""

from __future__ import annotations

import functools
import struct

import torch

from kvfold.nvrtc import Kernel

# Params of state.cuh, field by field: 10 pointers, 9 strides in elements, 11 integers.
_POINTERS = struct.Struct("10Q")
_LAYOUT = struct.Struct("9q6iI3i")
_PREFETCH_STATE = struct.Struct("i")
_PREFETCH_STATE_AT = _POINTERS.size + _LAYOUT.size

FEW_ITEMS = 1 << 14  # storing threads: more of them no longer make the store quicker


@functools.cache
def divider(divisor: int) -> tuple[int, int]:
    """(m, s) such that x // divisor == x * m >> s for every 0 <= x < 2**31; m < 2**32.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


def _complete(params: memoryview, prefetch_state: bool, *pointers: int) -> None:
    _POINTERS.pack_into(params, 0, *pointers)
    _PREFETCH_STATE.pack_into(params, _PREFETCH_STATE_AT, prefetch_state)


class Launch:
    """A kernel's launch for all arguments of one layout: shapes, strides and dtypes."""

    def __init__(
        self,
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
    ) -> None:
        variant = kernel.variant
        num_pages, page_size, state_dim = paged_kv.shape
        batch, max_pages = block_table_kv.shape
        items = batch * state_dim // variant.vector  # of storing: a vector of all new rows of one
        if variant.schedule == "persistent":
            most = kernel.sms * variant.min_ctas // variant.slices
            ctas = max(1, min(batch, most)) * variant.slices
            by_token = items * next_n <= ctas * variant.threads
        else:
            by_token = items * next_n <= FEW_ITEMS
            storing = items * next_n if by_token else items
            ctas = batch * variant.slices + -(-storing // variant.threads)
        layout = _LAYOUT.pack(
            kv_score.stride(0),
            ape.stride(0),
            *paged_kv.stride()[:2],
            *paged_score.stride()[:2],
            block_table_kv.stride(0),
            block_table_score.stride(0),
            output.stride(0),
            batch,
            kv_score.shape[0],
            output.shape[0],
            num_pages,
            max_pages,
            page_size,
            *divider(page_size),
            output.element_size() == 2,
            by_token,
        )
        params = bytes(_POINTERS.size) + layout + bytes(_PREFETCH_STATE.size)
        self._kernel = kernel
        self._device = kv_score.get_device()
        self._template = kernel.template(ctas, params)

    def __call__(self, prefetch_state: bool, *pointers: int) -> None:
        """Launches on torch's current stream of the tensors' device, which must be current.

        pointers: data_ptr() of the ten tensors, in the op's order.
        """
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._kernel.launch(self._template, stream, _complete, prefetch_state, *pointers)


def launch(kernel: Kernel, *args, prefetch_state: bool = False) -> None:
    """Launches on the op's first twelve arguments, as Launch does."""
    Launch(kernel, *args)(prefetch_state, *(tensor.data_ptr() for tensor in args[:10]))
