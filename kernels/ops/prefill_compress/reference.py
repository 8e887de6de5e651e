"""prefill_compress in torch: what CPU tensors run and what the kernels must match."""

import torch

from kvfold.ops import state_reference
from kvfold.ops.prefill_compress.spec import Arguments


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Writes the windows that close and stores the new rows that are to be stored.

    Args:
        arguments: checked; kvfold.prefill_compress documents them. prefetch has no effect, and no
            gradient is recorded, as by the kernels.
    """
    state_reference.run_prefill(arguments, arguments.output)
