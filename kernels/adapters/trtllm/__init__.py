"""TensorRT-LLM's compressor ops, made with kvfold's.

The import defines those of torch.ops.trtllm.compressor_paged_kv_compress,
compressor_prefill_reduction and compressor_postprocess_scatter that do not exist yet. Where
TensorRT-LLM has defined them, `patch` puts kvfold in the place of its kernels, and `unpatch`
takes it away again. docs/engines.md says what is covered and how results differ.
"""

from kvfold.adapters.trtllm.library import define_missing, patch, unpatch
from kvfold.adapters.trtllm.state_ops import (
    compressor_paged_kv_compress,
    compressor_prefill_reduction,
)
from kvfold.adapters.trtllm.step import step
from kvfold.adapters.trtllm.store_op import compressor_postprocess_scatter

__all__ = [
    "compressor_paged_kv_compress",
    "compressor_postprocess_scatter",
    "compressor_prefill_reduction",
    "patch",
    "step",
    "unpatch",
]

define_missing()
