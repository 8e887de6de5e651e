"""Compiles the kernels that make metadata for sm_90 and prints facts about the code as JSON.

It is a program of its own because TRITON_INTERPRET must not be set. It needs no GPU.
"""

import json

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kvfold.adapters.sglang.metadata_kernels import (
    BLOCK,
    PREFILL_BLOCK,
    PREFILL_WARPS,
    _decode,
    _prefill,
    _rows,
)

INTEGERS = ("batch", "num_windows", "num_rows", "num_tokens", "most_runs", "num_pages")


def compiled(kernel, ratio: int, block: int, warps: int) -> str:
    """The PTX of a kernel."""
    constants = {"ratio": ratio, "block": block}
    if "overlaps" in kernel.arg_names:
        constants["overlaps"] = ratio == 4
    signature = dict.fromkeys(kernel.arg_names, "*i32")
    signature |= {name: "i32" for name in INTEGERS if name in signature}
    signature |= {name: "*i64" for name in ("out_loc", "slots") if name in signature}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    target = GPUTarget("cuda", 90, 32)
    return compile(source, target=target, options={"num_warps": warps}).asm["ttgir"]


def main() -> None:
    for ratio in (4, 128):
        for kernel in (_decode, _rows):
            compiled(kernel, ratio, BLOCK, 4)
    code = [compiled(_prefill, ratio, PREFILL_BLOCK, PREFILL_WARPS) for ratio in (4, 128)]
    specialized = [
        param.name
        for kernel in (_decode, _rows, _prefill)
        for param in kernel.params
        if not (param.is_constexpr or param.do_not_specialize)
    ]
    barriers = [text.count("gpu.barrier") + text.count("ttg.barrier") for text in code]
    print(json.dumps({"barriers": barriers, "specialized": specialized}))


if __name__ == "__main__":
    main()
