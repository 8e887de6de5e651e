"""Compiles some of the table's Triton variants for sm_90 and prints facts about the code as JSON.

Needs no GPU. It is a program of its own because TRITON_INTERPRET must not be set.
"""

import hashlib
import json
import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kvfold.codegen import Variant, load_table
from kvfold.ops.paged_kv_compress.spec import Problem
from kvfold.ops.paged_kv_compress.triton_kernel import OPTIONS, _kernel, register_cap

PROBLEMS = [
    Problem(
        head_dim=head_dim,
        compress_ratio=compress_ratio,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        next_n=next_n,
    )
    for head_dim, compress_ratio, kv_dtype, state_dtype, next_n in (
        (512, 128, "bf16", "fp32", 4),
        (128, 128, "fp32", "bf16", 1),
        (512, 4, "bf16", "bf16", 3),
        (128, 4, "fp32", "fp32", 2),
    )
]


def compile_variant(variant: Variant, page_is_power_of_two: bool) -> CompiledKernel:
    problem, tuning = variant.problem, variant.tuning
    constants = {"page_is_power_of_two": page_is_power_of_two, "head_slice": tuning.head_slice}
    constants |= {k: v for k, v in problem.values().items() if not k.endswith("dtype")}
    constants |= {"stores": True, "reduces": True, "new_tokens": None}
    floats = {
        "kv_score": problem.kv_dtype,
        "ape": "fp32",
        "paged_kv": problem.state_dtype,
        "paged_score": problem.state_dtype,
        "output": problem.kv_dtype,
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
            "num_warps": tuning.reduce_warps,
            "maxnreg": register_cap(variant),
            **OPTIONS,
        },
    )


def stack_bytes(kernel: CompiledKernel) -> int:
    """Local memory per thread: spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def cubin_hash(variant: Variant, fp_fusion_default: bool) -> str:
    """Hash of a variant's machine code where Triton's default of enable_fp_fusion is this."""
    os.environ["TRITON_DEFAULT_FP_FUSION"] = str(int(fp_fusion_default))
    cubin = compile_variant(variant, page_is_power_of_two=True).asm["cubin"]
    return hashlib.sha256(cubin).hexdigest()


def main() -> None:
    table = load_table()
    variants = [table.find(problem, "triton", "any", 64) for problem in PROBLEMS]
    compiled = {}
    for variant, page_is_power_of_two in zip(variants, (True, True, True, False), strict=True):
        kernel = compile_variant(variant, page_is_power_of_two)
        loads = kernel.asm["ptx"].count("ld.global.v4.b32")
        compiled[variant.symbol] = {"stack_bytes": stack_bytes(kernel), "wide_loads": loads}
    specialized = [
        param.name
        for param in _kernel.params
        if not (param.is_constexpr or param.do_not_specialize)
    ]
    cubins = [cubin_hash(variants[-1], default) for default in (True, False)]
    result = {
        "compiled": compiled,
        "specialized": specialized,
        "cubins_by_fp_fusion_default": cubins,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
