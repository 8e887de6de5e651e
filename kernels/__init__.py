"""kvfold: GPU kernels for the KV compressor of models with compressed attention."""

from kvfold.ops.paged_kv_compress.check import check
from kvfold.ops.paged_kv_compress.op import paged_kv_compress

__version__ = "0.1.0"

__all__ = ["__version__", "check", "paged_kv_compress"]
