"""What the host works out for a launch of any decode op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.codegen import Variant
from kvfold.device.window_shape import vector
from kvfold.ops.state_plan import state_values
from kvfold.runtime.driver import GridPlan

MAX_ITEMS_BY_TOKEN = 1 << 14  # storing threads: more of them do not make the store faster


def decode_plan(
    variant: Variant, ctas_at_once: int, arguments: Any, dimensions: Mapping[str, int]
) -> GridPlan:
    """The grid of a decode op, and the values that the host computes for all of them."""
    problem, tuning = variant.problem, variant.tuning
    batch, values = dimensions["batch"], state_values(arguments, dimensions)
    slices = problem.head_dim // tuning.head_slice
    groups = -(-batch // tuning.requests_per_cta)
    if tuning.deal:
        groups = min(groups, max(1, ctas_at_once // slices))
    reducing = groups * slices if values["reduces"] or tuning.fused else 0
    # An item of the store is a vector of all new rows of a request or, by token, of one row.
    items = batch * dimensions["state_dim"] // vector(problem.state_dtype)
    by_token = items * problem.next_n <= MAX_ITEMS_BY_TOKEN
    per_thread = int(variant.launch.constants["items_at_once"])
    threads = items * problem.next_n if by_token else -(-items // per_thread)
    storing = -(-threads // variant.launch.threads) if values["stores"] and not tuning.fused else 0
    cluster = variant.launch.cluster
    storing = -(-storing // cluster) * cluster
    return GridPlan(
        ctas=reducing + storing,
        values={
            **values,
            "store_by_token": by_token,
            "storing_share": storing_share(storing, reducing + storing),
            "reducing": reducing,
        },
    )


def storing_share(storing: int, ctas: int) -> int:
    """The share of CTAs that store until all is stored, times 2**32; rounded up.

    If they are few, they come early, so that the kernel does not end with writes.
    """
    if storing == ctas:
        return 0  # job_of needs no share
    few = 5 * storing <= ctas
    return -(-(storing << 32) * (5 if few else 4) // (4 * ctas))
