"""SGLang's plans: their layout in memory, and the checks of one.

A decode plan has one entry per request, of four 32-bit words: the request's tokens after the step,
the state row that the new token goes to, and two pages: that of the window before the token's, and
that of the token's window. Window 0 counts as the one before itself.

A prefill plan has two tensors. An entry of plan_c is a window that closes: its tokens, its ragged
id (16 bits), the number of its rows that are still in the state (16 bits), and two pages, which are
set only if there are such rows. An entry of plan_w is a row to store: its ragged id and its state
row. A ragged id is a row of kv_score_input. The first word of an entry that is not used is all
ones.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from kvfold.runtime.arguments import refuse as refuse_argument

RATIOS = (4, 128)
HEAD_DIMS = (128, 512)
MAX_TOKENS = 1 << 16  # a ragged id has 16 bits


def refuse(function: str, name: str, value: object, accepted: str) -> NoReturn:
    """Raises the ValueError of an argument."""
    refuse_argument(f"adapters.sglang.{function}", name, value, accepted)


def check_plan(function: str, plan: Any) -> None:
    """Checks the type and the layout of a plan. Raises ValueError."""
    ratio = getattr(plan, "compress_ratio", None)
    if ratio not in RATIOS:
        refuse(function, "plan.compress_ratio", ratio, "4, 128")
    parts = (("plan_d", 16),) if plan.is_decode else (("plan_c", 16), ("plan_w", 8))
    for index, (name, entry_bytes) in enumerate(parts, start=1):
        part = plan[index]
        accepted = f"a contiguous uint8 tensor [entries, {entry_bytes}]"
        if not isinstance(part, Tensor):
            refuse(function, f"plan.{name}", f"a {type(part).__name__}", accepted)
        if part.dtype != torch.uint8 or part.dim() != 2 or part.size(1) != entry_bytes:
            refuse(function, f"plan.{name}", f"{part.dtype} {list(part.shape)}", accepted)
        if not part.is_contiguous() or part.storage_offset() % 4:
            refuse(function, f"plan.{name}", f"of strides {part.stride()}", accepted)
        if part.device != plan[1].device:
            refuse(function, f"plan.{name}", f"on {part.device}", f"{plan[1].device}")


def words(part: Tensor) -> Tensor:
    """The entries of a plan's tensor as int32 [entries, 4 or 2]."""
    if not part.numel():  # the strides of an empty tensor may be any, and torch refuses some
        return part.new_empty((0, part.size(1) // 4), dtype=torch.int32)
    return part.view(torch.int32)
