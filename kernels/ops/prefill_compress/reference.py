"""prefill_compress in torch: what CPU tensors run and what the kernels must match."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.ops import state_reference
from kvfold.ops.prefill_compress.spec import Arguments
from kvfold.ops.state_reference import Requests


@torch.no_grad()
def run(arguments: Arguments) -> None:
    """Writes the windows that close and stores the new rows that are to be stored.

    Args:
        arguments: checked; kvfold.prefill_compress documents them. prefetch has no effect, and no
            gradient is recorded, as by the kernels.
    """
    a = arguments
    requests = Requests.read(a.kv_lens, a.cu_seq_lens, a.kv_score.size(0))
    state_reference.run(
        a, requests, lambda request, position: stored(arguments, requests, request, position)
    )


def stored(arguments: Arguments, requests: Requests, request: Tensor, position: Tensor) -> Tensor:
    """Which new rows are stored: bool, of the shape of request and position."""
    a = arguments
    if a.write_state == "all":
        return torch.ones_like(position, dtype=torch.bool)
    length = requests.length[request]
    chosen = position >= first_needed(a, (length - a.max_rollback).clamp(min=0))
    if a.state_period:
        # The next restart after the position. The needs of later ones begin later.
        restart = (position // a.state_period + 1) * a.state_period
        chosen |= (restart <= length) & (position >= first_needed(a, restart))
    return chosen


def first_needed(arguments: Arguments, tokens: Tensor) -> Tensor:
    """The first position that a decode from this many tokens on may read."""
    overlap = arguments.paged_kv.size(2) != arguments.output.size(1)
    ratio = arguments.compress_ratio
    return ((tokens // ratio - int(overlap)) * ratio).clamp(min=0)
