"""Launches kernel.cuh: packs the op's arguments into its Params."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch

from kvfold.nvrtc import Kernel

# Params of state.cuh, field by field: 10 pointers, 9 strides in elements, 12 integers.
_POINTERS = 10
_LAYOUT = struct.Struct("9q6iI3iIi")

FEW_ITEMS = 1 << 14  # storing threads: more of them no longer make the store quicker


@functools.cache
def divider(divisor: int) -> tuple[int, int]:
    """(m, s) such that x // divisor == x * m >> s for every 0 <= x < 2**31; m < 2**32.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


def storing_share(storing: int, ctas: int) -> int:
    """Which share of CTAs store until all is stored, times 2**32; rounded up, so that all get to.

    Where they are few they come early, so that the kernel does not end on writes.
    """
    few = 5 * storing <= ctas
    return -(-(storing << 32) * (5 if few else 4) // (4 * ctas))


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
            storing = 0
            by_token = items * next_n <= ctas * variant.threads
        else:
            by_token = items * next_n <= FEW_ITEMS
            threads = items * next_n if by_token else -(-items // variant.items_at_once)
            storing = -(-threads // variant.threads)
            ctas = batch * variant.slices + storing
        layout = (
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
            storing_share(storing, ctas),
        )
        self._kernel = kernel
        self._device = kv_score.get_device()
        self._templates = [
            kernel.template(ctas, _POINTERS, _LAYOUT.pack(*layout, prefetch_state))
            for prefetch_state in (False, True)
        ]

    def __call__(self, prefetch_state: bool, pointers: Sequence[int]) -> None:
        """Launches on torch's current stream of the tensors' device, which must be current.

        pointers: data_ptr() of the ten tensors, in the op's order.
        """
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._kernel.launch(self._templates[prefetch_state], stream, pointers)


def launch(kernel: Kernel, *args, prefetch_state: bool = False) -> None:
    """Launches on the op's first twelve arguments, as Launch does."""
    Launch(kernel, *args)(prefetch_state, [tensor.data_ptr() for tensor in args[:10]])
