"""prefill_compress_store in torch: what CPU tensors run and what the kernels must match."""

import torch

from kvfold.ops import row_reference, state_reference
from kvfold.ops.prefill_compress_store.spec import Arguments
from kvfold.runtime.arguments import DTYPES


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Stores new rows in the paged state, and the compressed rows in the cache.

    Args:
        arguments: checked; kvfold.prefill_compress_store documents them. prefetch has no effect.
    """
    a = arguments
    size = len(a.positions), len(a.weight)
    rows = torch.zeros(size, dtype=DTYPES[a.row_dtype], device=a.weight.device)
    filled = state_reference.run_prefill(a, rows)
    row_reference.store(a, rows, filled)
