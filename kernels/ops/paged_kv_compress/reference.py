"""paged_kv_compress in torch: what CPU tensors run and what the kernels must match."""

import torch

from kvfold.ops import state_reference
from kvfold.ops.paged_kv_compress.spec import Arguments
from kvfold.ops.state_reference import Requests


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Stores every request's new rows in the paged state and writes the windows that they close.

    Args:
        arguments: checked; kvfold.paged_kv_compress documents them. prefetch has no effect, and no
            gradient is recorded, as by the kernels.
    """
    a = arguments
    requests = Requests.read(a.kv_lens, a.cu_seq_lens, a.kv_score.size(0), a.next_n)
    state_reference.run(
        a, requests, lambda request, position: torch.ones_like(position, dtype=torch.bool)
    )
