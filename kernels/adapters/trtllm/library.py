"""The ops in torch's library trtllm: definitions, and the kernels of others replaced."""

from __future__ import annotations

import importlib.util
import sys

import torch

from kvfold.adapters.trtllm.state_ops import (
    compressor_paged_kv_compress,
    compressor_prefill_reduction,
)
from kvfold.adapters.trtllm.store_op import compressor_postprocess_scatter

NAMESPACE = "trtllm"
DEVICES = ("CPU", "CUDA")

_STATE = (
    "Tensor kv_score, Tensor ape, Tensor(a!) paged_kv, Tensor(b!) paged_score,"
    " Tensor block_table_kv, Tensor block_table_score, Tensor(c!) output"
)
_SIZES = "int batch_size, int page_size, int head_dim, int compress_ratio"
_NEW_TOKENS = ", Tensor? new_tokens_per_seq=None"  # older versions of TensorRT-LLM lack it

# As TensorRT-LLM defines them in cpp/tensorrt_llm/thop/compressorOp.cpp.
SCHEMAS = {
    "compressor_paged_kv_compress": f"({_STATE}, Tensor kv_lens, Tensor cu_seq_lens,"
    f" Tensor cu_kv_comp, {_SIZES}, int next_n{_NEW_TOKENS}) -> ()",
    "compressor_prefill_reduction": f"({_STATE}, Tensor kv_lens, Tensor start_pos,"
    f" Tensor cu_seq_lens, Tensor cu_kv_comp, {_SIZES}, int max_outputs) -> ()",
    "compressor_postprocess_scatter": "(Tensor kv_comp, Tensor(a!)? kv_out, Tensor rms_weight,"
    " float rms_eps, Tensor cos_sin_table, Tensor position_ids, int nope_dim, int rope_dim,"
    " Tensor(b!) kv_cache, Tensor num_outputs, Tensor cu_kv_comp, Tensor start_pos,"
    " Tensor block_offsets, Tensor compressed_mask, int tokens_per_block, int cache_scale_type,"
    " bool rotate_activation, Tensor(c!)? quant_output, Tensor(d!)? scale_output) -> ()",
}

_FUNCTIONS = {
    "compressor_paged_kv_compress": compressor_paged_kv_compress,
    "compressor_prefill_reduction": compressor_prefill_reduction,
    "compressor_postprocess_scatter": compressor_postprocess_scatter,
}

_definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
_defined: set[str] = set()  # the ops that this module has defined
_replacements: torch.library.Library | None = None  # holds the kernels of `patch`


def define_missing() -> None:
    """Defines the ops that do not exist yet, for the CPU and for CUDA.

    Raises:
        ImportError: TensorRT-LLM is installed and not imported yet. Its import would fail later,
            because no library may define an op that exists.
    """
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.trtllm, name)]
    if missing and "tensorrt_llm" not in sys.modules and importlib.util.find_spec("tensorrt_llm"):
        raise ImportError("import tensorrt_llm before kvfold.adapters.trtllm: both define its ops")
    for name in missing:
        _definitions.define(name + SCHEMAS[name], tags=(torch.Tag.needs_exact_strides,))
        _implement(_definitions, name)
        _defined.add(name)


def patch() -> None:
    """Makes kvfold serve the ops that TensorRT-LLM has defined, on CUDA and on the CPU.

    Raises:
        ValueError: an op has other arguments than those known here. No op is changed then.
    """
    global _replacements
    others = [name for name in SCHEMAS if name not in _defined]
    for name in others:
        _check_schema(name)
    if _replacements is None:
        library = torch.library.Library(NAMESPACE, "IMPL")
        for name in others:
            _implement(library, name)
        _replacements = library


def unpatch() -> None:
    """Undoes `patch`: TensorRT-LLM's kernels serve its ops again."""
    global _replacements
    _replacements = None  # torch removes a library's kernels when the library is deleted


def _implement(library: torch.library.Library, name: str) -> None:
    for device in DEVICES:
        library.impl(name, _FUNCTIONS[name], device, allow_override=True)
    torch.library.register_fake(
        f"{NAMESPACE}::{name}", lambda *args: None, lib=library, allow_override=True
    )


def _check_schema(name: str) -> None:
    """Raises ValueError if an op has not the arguments of SCHEMAS."""
    found = str(getattr(torch.ops.trtllm, name).default._schema)
    wanted = f"{NAMESPACE}::{name}{SCHEMAS[name]}"
    if found not in (wanted, wanted.replace(_NEW_TOKENS, "")):
        raise ValueError(f"torch.ops.trtllm.{name} has schema {found}; accepted: {wanted}")
