"""norm_rope_store in torch: what CPU tensors run and what the kernels must match."""

from __future__ import annotations

import torch

from kvfold.ops import row_reference
from kvfold.ops.norm_rope_store.spec import Arguments


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Stores the rows.

    Args:
        arguments: checked; kvfold.norm_rope_store documents them. prefetch has no effect.
    """
    row_reference.store(
        arguments, arguments.rows, torch.ones_like(arguments.slots, dtype=torch.bool)
    )
