"""Compiles Triton kernels for sm_90 and prints facts about the code as JSON. Needs no GPU.

It is a program of its own because TRITON_INTERPRET must not be set. The interpreter takes what the
compiler refuses, and cannot show which instructions a step becomes.
"""

import json
import re

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kvfold.codegen import load_table
from kvfold.device.row_triton import OPTIONS, format_constants
from kvfold.ops.norm_rope_store.triton_kernel import _kernel

# name -> dtype of the rows, warps, format, head_dim, rope_dim, rounding, rotate.
KERNELS = {
    "fp32": ("fp32", 16, "fp32", 128, 128, "each_step", True),
    "fp8_tensor": ("bf16", 1, "fp8_tensor", 512, 0, "once", False),
    "fp8_block128": ("fp32", 4, "fp8_block128", 128, 64, "once", True),
    "mixed_584": ("bf16", 4, "mixed_584", 512, 64, "codes_from_bf16", False),
    "mxfp4_ties_down": ("bf16", 2, "mxfp4_ties_down", 128, 64, "before_codes", False),
    "fp4_288": ("bf16", 8, "fp4_288", 512, 64, "each_step", False),
}
POINTERS = {
    "weight": "*bf16",
    "rope_table": "*fp32",
    "positions": "*i32",
    "slots": "*i64",
    "cache": "*u8",
    "latent_out": "*bf16",
    "rows_out": "*fp32",
    "codes_out": "*u8",
    "scales_out": "*u8",
}


def compiled(rows_dtype, warps, name, head_dim, rope_dim, rounding, rotate) -> str:
    """The PTX of a kernel."""
    format = load_table().formats[name]
    constants = format_constants(format.layout(head_dim, rope_dim)) | {
        "head_dim": head_dim,
        "rope_pairs": rope_dim // 2,
        "rounding": rounding,
        "rotate": rotate,
    }
    pointers = POINTERS | {"rows": f"*{rows_dtype}"}
    if format.scale == "tensor":
        pointers["scale"] = "*fp32"
    else:
        constants["scale"] = None
    signature = dict.fromkeys(_kernel.arg_names, "i64") | {"eps": "fp32"} | pointers
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (_kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in pointers
        if name in specialized()
    }
    source = ASTSource(_kernel, signature, constants, aligned)
    options = {"num_warps": warps, **OPTIONS}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def specialized() -> list[str]:
    """The parameters whose values make kernels of their own."""
    return [
        param.name
        for param in _kernel.params
        if not (param.is_constexpr or param.do_not_specialize)
    ]


def main() -> None:
    code = {name: compiled(*kernel) for name, kernel in KERNELS.items()}
    instructions = {
        name: sorted(set(re.findall(r"^\s+(?:@\S+ )?([a-z]\S*)", ptx, re.M)))
        for name, ptx in code.items()
    }
    print(json.dumps({"instructions": instructions, "specialized": specialized()}))


if __name__ == "__main__":
    main()
