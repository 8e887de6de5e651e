"""A store op as its two steps: a state op, whose rows go through memory, then norm_rope_store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold.codegen import Variant, op_spec
from kvfold.ops.state_reference import Requests
from kvfold.runtime import dispatch
from kvfold.runtime.arguments import DTYPE_NAMES, DTYPES


def run_two_steps(state_op: str, variant: Variant, arguments: Any) -> None:
    """Runs a store op by the Triton kernels of its steps.

    Args:
        state_op: name of the op that reduces the windows.
        variant: of the store op; its tuning is that of the state op.
        arguments: of the store op, checked.
    """
    a, spec, rows_spec = arguments, op_spec(state_op), op_spec("norm_rope_store")
    device = a.weight.device
    size = len(a.positions), len(a.weight)
    rows = torch.empty(size, dtype=DTYPES[a.row_dtype], device=device)
    problem = spec.problem(**variant.problem.values())
    reduce = Variant(problem=problem, backend="triton", tuning=variant.tuning)
    dispatch.bind(reduce, device)(taken(spec, a, output=rows))
    if a.work == "store" or not len(rows):
        return
    problem = rows_spec.problem.of({"head_dim": size[1], "rows_dtype": DTYPE_NAMES[rows.dtype]})
    arch = dispatch.arch_of(device)
    store = dispatch.table().find(problem, "triton", arch, len(rows))
    if store is None:
        dispatch.table().refuse(problem, "triton", arch)
    slots = torch.where(filled_rows(a), a.slots, -1)
    dispatch.bind(store, device)(taken(rows_spec, a, rows=rows, slots=slots))


def taken(spec: Any, arguments: Any, **others: Any) -> Any:
    """Arguments of another op, by name."""
    names = [one.name for one in spec.arguments.declared()]
    found = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return spec.arguments(**{**found, **others})


def filled_rows(arguments: Any) -> Tensor:
    """The output rows that a window fills: bool [num_rows]. It does not synchronise.

    Where cu_outputs descends, some of these rows may be missing.
    """
    a, ratio = arguments, arguments.compress_ratio
    row = torch.arange(len(a.slots), device=a.slots.device)
    if not len(a.kv_lens):
        return torch.zeros_like(row, dtype=torch.bool)
    first = a.cu_outputs.long()
    request = torch.searchsorted(first, row, right=True) - 1
    known = (request >= 0) & (request < len(a.kv_lens))
    request = request.clamp(0, len(a.kv_lens) - 1)
    number = row - first[request]
    decode_only = (getattr(a, name, None) for name in ("next_n", "new_tokens"))
    requests = Requests.read(a.kv_lens, a.cu_seq_lens, len(a.kv_score), *decode_only)
    closing = (requests.length // ratio - requests.start // ratio)[request]
    return known & (row < first[request + 1]) & (number >= 0) & (number < closing)
