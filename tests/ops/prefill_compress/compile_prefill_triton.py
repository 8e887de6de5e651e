"""Compiles Triton kernels for sm_90 and prints facts about the code as JSON. Needs no GPU.

It is a program of its own because TRITON_INTERPRET must not be set. The interpreter takes what the
compiler refuses: a variable that changes its type in a loop, for one.
"""

import json

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kvfold.ops.prefill_compress.triton_kernel import BATCH_BLOCK, OPTIONS, TILE_ROWS, _kernel

# name -> dtypes of kv_score and of the state, warps, constants.
KERNELS = {
    "long_window": ("bf16", "fp32", 4, {"compress_ratio": 128, "head_slice": 32}),
    "overlap": ("fp32", "bf16", 2, {"compress_ratio": 4, "overlap": True, "head_slice": 64}),
    "raw_score": ("bf16", "bf16", 1, {"compress_ratio": 8, "ape_in_state": False}),
    "reduce": ("bf16", "fp32", 1, {"compress_ratio": 8, "stores": False}),
    "store": ("bf16", "fp32", 1, {"compress_ratio": 8, "reduces": False}),
}
CONSTANTS = {
    "page_is_power_of_two": True,
    "head_dim": 128,
    "overlap": False,
    "ape_in_state": True,
    "stores": True,
    "reduces": True,
    "head_slice": 128,
    "tile_rows": TILE_ROWS,
    "batch_block": BATCH_BLOCK,
}
TABLES = ("block_table_kv", "block_table_score", "kv_lens", "cu_seq_lens", "cu_outputs")


def compiled(kv_dtype: str, state_dtype: str, warps: int, constants: dict) -> str:
    """The PTX of a kernel."""
    constants = CONSTANTS | constants
    floats = {
        "kv_score": kv_dtype,
        "ape": "fp32",
        "paged_kv": state_dtype,
        "paged_score": state_dtype,
        "output": kv_dtype,
    }
    signature = dict.fromkeys(_kernel.arg_names, "i64")
    signature |= dict.fromkeys(constants, "constexpr")
    signature |= dict.fromkeys(TABLES, "*i32")
    signature |= {name: f"*{dtype}" for name, dtype in floats.items()}
    aligned = {(_kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in floats}
    source = ASTSource(_kernel, signature, constants, aligned)
    options = {"num_warps": warps, **OPTIONS}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def main() -> None:
    code = {name: compiled(*kernel) for name, kernel in KERNELS.items()}
    specialized = [
        param.name
        for param in _kernel.params
        if not (param.is_constexpr or param.do_not_specialize)
    ]
    wide_loads = {name: ptx.count("ld.global.v4.b32") for name, ptx in code.items()}
    print(json.dumps({"wide_loads": wide_loads, "specialized": specialized}))


if __name__ == "__main__":
    main()
