"""What the workloads of the state ops share: random cases, judging, and what is tuned alike."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.codegen import TableError, Variant
from kvfold.runtime.arguments import DTYPES
from kvfold.workload import EXACT, Tolerance, copy_of

METADATA = ("block_table_kv", "block_table_score", "kv_lens", "cu_seq_lens", "cu_outputs")
PREFETCH = {name: {"prefetch": name} for name in ("none", "metadata", "state")}
TOLERANCES = {
    "paged_kv": EXACT,
    "paged_score": EXACT,
    # fp32 rounding and the order of the sums; for bf16, half a unit in the last place.
    "output": Tolerance(2e-5, {torch.float32: 2e-5, torch.bfloat16: 2.0**-8}),
}

RESERVED_BYTES = 1024  # of an SM's shared memory that the system takes per CTA
TRITON_TILE = 128  # rows x columns per thread; larger tiles compile for minutes, then spill


class CaseMaker:
    """Makes the tensors of one case, random by a seed."""

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self._device = device
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator(device).manual_seed(seed)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of normally distributed values."""
        return torch.randn(shape, generator=self._generator, dtype=dtype, device=self._device)

    def int32(self, values: np.ndarray) -> Tensor:
        """The values as an int32 tensor."""
        return torch.from_numpy(values.astype(np.int32)).to(self._device)

    def prefix_sums(self, counts: np.ndarray) -> Tensor:
        """0 and the prefix sums of the counts, as an int32 tensor."""
        return self.int32(np.concatenate(([0], counts.cumsum())))

    def state(self, in_use: np.ndarray, problem: Any, options: Any, columns: int = 0) -> dict:
        """The pools and the block tables, by the names of the op's arguments.

        Physical pages are shuffled. Entries of the tables that are not in use are -1.

        Args:
            in_use: bool [batch, pages]: the logical pages that there are.
            columns: of the block tables, if that is more than `in_use` has.
        """
        pages = int(in_use.sum())
        state_dim = problem.head_dim * (2 if problem.overlap else 1)
        dtype = DTYPES[problem.state_dtype]
        pool = (pages, options.page_size)

        def block_table() -> Tensor:
            physical = np.full(in_use.shape, -1)
            physical[in_use] = self._rng.permutation(pages)
            size = (len(in_use), max(columns, in_use.shape[1]))
            table = torch.full(size, -1, dtype=torch.int32, device=self._device)
            table[:, : in_use.shape[1]] = self.int32(physical)
            return table

        table_kv = block_table()
        if options.layout == "packed":
            table_score = table_kv.clone()
            packed = self.random(*pool, 2 * state_dim, dtype=dtype)
            paged_kv, paged_score = packed.split(state_dim, dim=2)
        else:
            table_score = block_table()
            paged_kv, paged_score = (self.random(*pool, state_dim, dtype=dtype) for _ in range(2))
        return {
            "paged_kv": paged_kv,
            "paged_score": paged_score,
            "block_table_kv": table_kv,
            "block_table_score": table_score,
        }

    def output(self, rows: int, problem: Any, options: Any) -> Tensor:
        """An output whose rows are NaN."""
        size = (rows, problem.head_dim)
        dtype = DTYPES[options.output_dtype]
        return torch.full(size, torch.nan, dtype=dtype, device=self._device)


def by_reference(reference: ModuleType, arguments: Any) -> dict[str, Tensor]:
    """What a call must leave, by the op's reference; the output is in fp32."""
    copies = copy_of(arguments, ("paged_kv", "paged_score"))
    copies = replace(copies, output=arguments.output.float())
    reference.run(copies)
    return {name: getattr(copies, name) for name in ("paged_kv", "paged_score", "output")}


def window_rows(problem: Any) -> int:
    """Rows of a window, with those that it overlaps."""
    return problem.compress_ratio * (2 if problem.overlap else 1)


def runnable(problem: Any, backend: str, tuning: Any, arch: str) -> Variant | None:
    """The variant; None if it cannot run on a GPU of this arch."""
    try:
        variant = Variant(problem=problem, backend=backend, tuning=tuning)
        variant.check_arch(arch)
    except TableError:
        return None
    return variant
