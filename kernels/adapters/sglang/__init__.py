"""SGLang's compressor calls for DeepSeek-V4, made with kvfold's ops.

`compress_forward` and `compress_norm_rope_store` have SGLang's signatures, and `patch` puts them in
the place of SGLang's own. docs/engines.md says what is covered.

A folder's files in the order of the data's way: plan.py, metadata.py, prepare.py with
metadata_kernels.py and metadata_reference.py, step.py, kept.py, forward.py, store.py, patching.py.
"""

from kvfold.adapters.sglang.forward import compress_forward
from kvfold.adapters.sglang.kept import refresh
from kvfold.adapters.sglang.patching import patch, unpatch
from kvfold.adapters.sglang.store import compress_norm_rope_store

__all__ = ["compress_forward", "compress_norm_rope_store", "patch", "refresh", "unpatch"]
