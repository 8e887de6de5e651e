"""Compiles the Triton kernel for sm_90 and prints facts about the code as JSON. Needs no GPU.

It is a program of its own because TRITON_INTERPRET must not be set. The interpreter takes what the
compiler refuses: a variable that changes its type in a loop, for one.
"""

import json

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kvfold.ops.locate_rows.triton_kernel import _kernel


def compiled(source_dtype: str, by_page: bool) -> str:
    """The PTX of the kernel for one source of the slots."""
    constants = {"by_page": by_page, "rows": 128, "new_tokens": None}
    signature = dict.fromkeys(_kernel.arg_names, "i64")
    signature |= dict.fromkeys(("kv_lens", "cu_seq_lens", "cu_outputs", "positions"), "*i32")
    signature |= {"slots": "*i64", "source": f"*{source_dtype}"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(_kernel, signature, constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


def main() -> None:
    code = {"block_table": compiled("i32", True), "token_slots": compiled("i64", False)}
    specialized = [
        param.name
        for param in _kernel.params
        if not (param.is_constexpr or param.do_not_specialize)
    ]
    stores = {name: ptx.count("st.global") for name, ptx in code.items()}
    print(json.dumps({"stores": stores, "specialized": specialized}))


if __name__ == "__main__":
    main()
