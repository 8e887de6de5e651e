"""What the workloads of the ops that store rows in the cache share: options, tensors, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.codegen import FieldSet, PageLayout, choice, flag, integer, op_spec
from kvfold.formats import cache_format
from kvfold.ops import row_reference
from kvfold.ops.row_spec import ROUNDINGS
from kvfold.ops.two_steps import filled_rows, taken
from kvfold.runtime.arguments import DTYPES
from kvfold.runtime.dispatch import table
from kvfold.runtime.torch_op import call_with, torch_op
from kvfold.workload import EXACT, copy_of

ROW_METADATA = ("rope_table", "positions", "slots")  # that the layers of a model share
ROW_TOLERANCES = {"cache": EXACT}
MAX_POS = 4096
POISON = 0xA5


@dataclass(frozen=True, kw_only=True)
class RowOptions(FieldSet):
    """Options of a case. An op may add its own."""

    format: str = choice(*table().formats, default="mixed_584", help="cache format")
    rope_dim: int = integer(range(0, 513, 2), default=64, help="columns that RoPE rotates")
    rounding: str = choice(*ROUNDINGS, default="once", help="where values are rounded to bf16")
    rotate: bool = flag(default=False, help="whether rows are rotated by a Hadamard matrix")
    rows_per_page: int = integer(range(1, 4097), default=64, help="rows of a page of the cache")
    weight_dtype: str = choice("bf16", "fp32", default="bf16", help="of the norm's weight")

    def page_layout(self, head_dim: int) -> PageLayout:
        """Of a page of the cache."""
        format = cache_format(self.format)
        return format.layout(head_dim, self.rope_dim, self.rows_per_page)


def row_arguments(
    options: Any, head_dim: int, slot: np.ndarray, device: torch.device | str, seed: int
) -> dict[str, Any]:
    """The arguments of the way to the cache, by name.

    The cache is filled with one byte value. Rows have places of their own in random order.

    Args:
        slot: bool [num_rows]: the rows that have a slot; others have slot and position -1.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    number = int(slot.sum())
    layout = options.page_layout(head_dim)
    pages = max(1, -(-number // options.rows_per_page))
    slots, positions = np.full(len(slot), -1), np.full(len(slot), -1, np.int32)
    slots[slot] = rng.permutation(pages * options.rows_per_page)[:number]
    positions[slot] = rng.integers(0, MAX_POS, number)
    # Pages start at multiples of 16 bytes, as an engine's do.
    page_stride = -(-layout.page_bytes // 16) * 16
    memory = torch.full((pages, page_stride), POISON, dtype=torch.uint8, device=device)
    return {
        "weight": random(head_dim).to(DTYPES[options.weight_dtype]),
        "rope_table": random(MAX_POS, 2, options.rope_dim // 2).clamp(-1, 1),
        "positions": torch.from_numpy(positions).to(device),
        "slots": torch.from_numpy(slots).to(device),
        "cache": memory[:, : layout.page_bytes],
        "eps": 1e-6,
        "rows_per_page": options.rows_per_page,
        "format": options.format,
        "rounding": options.rounding,
        "rotate": options.rotate,
    }


def row_bytes(options: Any, head_dim: int) -> int:
    """Bytes that one row must move on the way to the cache, without the row itself."""
    layout = options.page_layout(head_dim)
    return layout.data_bytes + layout.scale_bytes + 4 * options.rope_dim


def by_two_ops(state_op: str, arguments: Any) -> dict[str, Tensor]:
    """What a store op must leave: by the state op, as dispatch serves it, and by the reference.

    Args:
        state_op: name of the op that reduces the windows.
        arguments: of the store op.
    """
    names = ("paged_kv", "paged_score", "cache")
    copies = copy_of(arguments, names)
    size = len(copies.positions), len(copies.weight)
    rows = torch.zeros(size, dtype=DTYPES[copies.row_dtype], device=copies.weight.device)
    call_with(torch_op(state_op), taken(op_spec(state_op), copies, output=rows))
    row_reference.store(copies, rows, filled_rows(copies))
    return {name: getattr(copies, name) for name in names}
