"""The yardstick row_by_row.cu: one warp per window, bound like a variant."""

import functools
from dataclasses import replace
from pathlib import Path

import torch

from kvfold.codegen import Variant, instantiate
from kvfold.device.window_shape import vector
from kvfold.ops.paged_kv_compress.spec import Tuning
from kvfold.runtime import compiler, dispatch
from kvfold.runtime.compiler import Compiled
from kvfold.runtime.driver import Kernel

NAME = "row_by_row"


def source(variant: Variant) -> str:
    """CUDA source of the yardstick for a variant that has one warp and a warp's columns."""
    text = Path(__file__).with_name("row_by_row.cu").read_text()
    return f"{instantiate(variant)}\n#define CONFIG {variant.symbol}_config\n{text}"


def one_warp(variant: Variant) -> Variant:
    """The problem's variant in which one warp has all the columns that it can: 16 bytes a lane."""
    head_slice = min(variant.problem.head_dim, 32 * vector(variant.problem.state_dtype))
    return replace(variant, backend="cuda", tuning=Tuning(reduce_warps=1, head_slice=head_slice))


def compiled(one: Variant, arch: str) -> Compiled:
    """The yardstick for an architecture ('sm_90'). `one` is as one_warp returns it."""
    text = source(one)
    return compiler.compile_source(NAME, text, compiler.headers_of(text), arch)


@functools.cache
def bind(variant: Variant, device: torch.device) -> Kernel:
    """What runs the yardstick on the op's arguments, for the variant's problem."""
    one = one_warp(variant)
    return Kernel(one, compiled(one, dispatch.arch_of(device)).cubin, NAME)
