"""The one-warp yardstick: row_by_row.cu, bound like a variant."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kvfold import dispatch, nvrtc
from kvfold.codegen import Variant, instantiate
from kvfold.ops.paged_kv_compress import cuda_kernel

NAME = "row_by_row"


def source(variant: Variant) -> str:
    """CUDA source of the yardstick for a variant that has one warp and a warp's columns."""
    text = Path(__file__).with_name("row_by_row.cu").read_text()
    return f"{instantiate(variant)}\n#define CONFIG {variant.symbol}_config\n{text}"


def one_warp(variant: Variant) -> Variant:
    """The problem's variant in which one warp has all the columns it can: 16 bytes a lane."""
    head_slice = min(variant.head_dim, 32 * variant.vector)
    return replace(variant, backend="cuda", schedule="direct", reduce_warps=1,
                   head_slice=head_slice, min_ctas=1)  # fmt: skip


@functools.cache
def bind(variant: Variant, device: torch.device) -> Callable[..., None]:
    """What runs the yardstick on the op's arguments, for the variant's problem."""
    one = one_warp(variant)
    headers = nvrtc.headers_of(one)
    compiled = nvrtc.compile_source(NAME, source(one), headers, dispatch.arch_of(device))
    return functools.partial(cuda_kernel.launch, nvrtc.Kernel(one, compiled.cubin, NAME))
