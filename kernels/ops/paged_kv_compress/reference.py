"""paged_kv_compress in torch: what CPU tensors run and what the kernels must match."""

import torch

from kvfold.ops.paged_kv_compress.spec import Arguments
from kvfold.ops.state_reference import Requests, StateRows, closing_windows


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Stores every request's new rows in the paged state and writes the windows that they close.

    Args:
        arguments: checked; kvfold.paged_kv_compress documents them. prefetch has no effect, and no
            gradient is recorded, as by the kernels.
    """
    a = arguments
    requests = Requests.read(a.kv_lens, a.cu_seq_lens, a.kv_score.size(0), a.next_n)
    rows = StateRows(
        kv_score=a.kv_score,
        ape=a.ape,
        paged_kv=a.paged_kv,
        paged_score=a.paged_score,
        tables=(a.block_table_kv, a.block_table_score),
        requests=requests,
        stored=lambda request, position: torch.ones_like(position, dtype=torch.bool),
        compress_ratio=a.compress_ratio,
        ape_in_state=a.ape_in_state,
    )
    # Reduced first: with a ring, the store may overwrite rows that a window still reads.
    if a.work != "store":
        windows = closing_windows(requests, a.cu_outputs, a.output.size(0), a.compress_ratio)
        rows.reduce(windows, a.output)
    if a.work != "reduce":
        rows.store()
