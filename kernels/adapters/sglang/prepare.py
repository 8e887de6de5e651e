"""Makes the metadata of a plan: on a GPU by one launch, on a CPU in torch.

Neither reads a value on the host: the shapes follow from those of the plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.sglang import metadata_reference
from kvfold.adapters.sglang.metadata import (
    DecodeMetadata,
    PrefillMetadata,
    Requests,
    RowMetadata,
)
from kvfold.adapters.sglang.plan import words


def decode_metadata(plan: Any) -> DecodeMetadata:
    """The metadata of a decode plan."""
    entries, ratio = words(plan[1]), plan.compress_ratio
    batch, pages = entries.size(0), 2 if ratio == 4 else 1
    sizes = [*Requests.sizes(batch, batch * pages), batch]
    tensors = _split(entries, sizes)
    requests = Requests.of(tensors[:4], (batch, pages), row_stride=pages)
    metadata = DecodeMetadata(requests, positions=tensors[4])
    if entries.is_cuda:
        from kvfold.adapters.sglang import metadata_kernels

        metadata_kernels.fill_decode(entries, ratio, metadata)
    else:
        metadata_reference.fill_decode(entries, ratio, metadata)
    return metadata


def prefill_metadata(plan: Any, num_tokens: int) -> PrefillMetadata:
    """The metadata of a prefill plan. It also sorts the valid entries of plan_c by ragged id.

    The order of the entries has no meaning for SGLang: its device path takes it from atomic
    operations. kvfold writes the rows in the order of their tokens. After the sort row i of the
    output belongs to entry i of plan_c again, for every reader of the plan.

    Args:
        num_tokens: rows of kv_score_input.
    """
    windows, rows, ratio = words(plan[1]), words(plan[2]), plan.compress_ratio
    num_windows, num_rows = windows.size(0), rows.size(0)
    # With ratio 4 the windows that a request closes are one run, and SGLang stores a row or more
    # of every request. With ratio 128 each window is a run of its own.
    runs = min(num_windows, num_rows) if ratio == 4 else num_windows
    # A run's table begins with its two pages, and those of the next runs follow. A new row needs
    # any page of the pool to count; it is not read there. So the rows of the table overlap.
    columns = num_tokens // ratio + 2 if ratio == 4 else 1
    reduce_sizes = Requests.sizes(2 * runs, 2 * runs + columns)
    store_sizes = Requests.sizes(2 * num_rows, 2 * num_rows)
    tensors = _split(windows, [*reduce_sizes, *store_sizes])
    pages = tensors[3]
    metadata = PrefillMetadata(
        Requests.of(tensors[:4], (2 * runs, columns), row_stride=1),
        Requests.of(tensors[4:], (2 * num_rows, 1), row_stride=1),
    )
    if windows.is_cuda:
        from kvfold.adapters.sglang import metadata_kernels

        metadata_kernels.fill_prefill(windows, rows, num_tokens, ratio, metadata, pages)
    else:
        metadata_reference.fill_prefill(windows, rows, num_tokens, ratio, metadata, pages)
    return metadata


def row_metadata(plan: Any, out_loc: Tensor) -> RowMetadata:
    """Positions and slots of the rows of a prefill plan; -1 for an entry that is not valid.

    Args:
        out_loc: [num_tokens], int64: the slot of the window that a token closes.
    """
    windows = words(plan[1])
    positions = torch.empty(windows.size(0), dtype=torch.int32, device=windows.device)
    metadata = RowMetadata(positions, torch.empty_like(positions, dtype=torch.int64))
    if windows.is_cuda:
        from kvfold.adapters.sglang import metadata_kernels

        metadata_kernels.fill_rows(windows, out_loc, plan.compress_ratio, metadata)
    else:
        metadata_reference.fill_rows(windows, out_loc, plan.compress_ratio, metadata)
    return metadata


def _split(like: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Parts of one new int32 tensor on the device of another one."""
    return torch.empty(sum(sizes), dtype=torch.int32, device=like.device).split(sizes)
