"""paged_kv_compress in torch: what CPU tensors run and what the kernels must match."""

import torch

from kvfold.ops import state_reference
from kvfold.ops.paged_kv_compress.spec import Arguments


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Stores every request's new rows in the paged state and writes the windows that they close.

    Args:
        arguments: checked; kvfold.paged_kv_compress documents them. prefetch has no effect, and no
            gradient is recorded, as by the kernels.
    """
    state_reference.run_decode(arguments, arguments.output)
