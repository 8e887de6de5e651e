"""Compiles some of the table's Triton variants for sm_90 and prints what came out as JSON.

Needs no GPU. A program of its own, since it must run where TRITON_INTERPRET is not set.
"""

import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kvfold.codegen import Variant, load_table
from kvfold.ops.paged_kv_compress.triton_kernel import _kernel, register_cap

PROBLEMS = [
    dict(zip(Variant.spec("problem"), values, strict=True))
    for values in (
        (512, 128, False, "bf16", "fp32", 4),
        (128, 128, False, "fp32", "bf16", 1),
        (512, 4, True, "bf16", "bf16", 3),
        (128, 4, True, "fp32", "fp32", 2),
    )
]


def compile_variant(variant: Variant, page_is_power_of_two: bool) -> CompiledKernel:
    constants = {"page_is_power_of_two": page_is_power_of_two, "head_slice": variant.head_slice}
    constants |= {k: v for k, v in variant.problem.items() if not k.endswith("dtype")}
    floats = {
        "kv_score": variant.kv_dtype,
        "ape": "fp32",
        "paged_kv": variant.state_dtype,
        "paged_score": variant.state_dtype,
        "output": variant.kv_dtype,
    }
    tables = ("block_table_kv", "block_table_score", "kv_lens", "cu_seq_lens", "cu_outputs")
    signature = dict.fromkeys(_kernel.arg_names, "i64")
    signature |= dict.fromkeys(constants, "constexpr")
    signature |= dict.fromkeys(tables, "*i32")
    signature |= {name: f"*{dtype}" for name, dtype in floats.items()}
    aligned = {(_kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in floats}
    return triton.compile(
        ASTSource(_kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={
            "num_warps": variant.reduce_warps,
            "num_stages": 1,
            "maxnreg": register_cap(variant),
        },
    )


def stack_bytes(kernel: CompiledKernel) -> int:
    """Local memory per thread: what its registers spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def main() -> None:
    table = load_table()
    compiled = {}
    for problem, page_is_power_of_two in zip(PROBLEMS, (True, True, True, False), strict=True):
        variant = table.select("paged_kv_compress", batch=64, backend="triton", **problem)
        kernel = compile_variant(variant, page_is_power_of_two)
        loads = kernel.asm["ptx"].count("ld.global.v4.b32")
        compiled[variant.symbol] = {"stack_bytes": stack_bytes(kernel), "wide_loads": loads}
    specialized = [
        param.name
        for param in _kernel.params
        if not (param.is_constexpr or param.do_not_specialize)
    ]
    print(json.dumps({"compiled": compiled, "specialized": specialized}))


if __name__ == "__main__":
    main()
