"""The demo's cache of compressed rows: where they go, and what bytes they must be."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import kvfold
from kvfold.formats import cache_format
from kvfold.ops.norm_rope_store import reference
from kvfold.ops.norm_rope_store.spec import Arguments

FORMAT = "mixed_584"
ROPE_DIM = 64
ROWS_PER_PAGE = 64
EPS = 1e-6


class CompressedCache:
    """Pages for the compressed rows of one layer, and a copy of them that the reference fills.

    A request has the same pages as long as it runs. A row's slot follows from its window, so a
    window that is emitted again after a rollback overwrites its row.
    """

    def __init__(
        self, head_dim: int, compress_ratio: int, slots: int, max_length: int,
        device: torch.device, seed: int,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        layout = cache_format(FORMAT).layout(head_dim, ROPE_DIM, ROWS_PER_PAGE)
        self.ratio, self.device = compress_ratio, device
        self.pages = -(-max_length // compress_ratio // ROWS_PER_PAGE) + 1  # of a request
        self.copy = torch.zeros(slots * self.pages, layout.page_bytes, dtype=torch.uint8)
        self.cache = self.copy.to(device, copy=True)
        # A physical page of each request's pages; the last line is that of padding.
        table = np.arange(slots * self.pages).reshape(slots, self.pages)
        self.table = np.append(table, np.full((1, self.pages), -1), axis=0).astype(np.int32)
        self.weight = torch.rand(head_dim, generator=generator)
        angle = torch.rand(max_length + compress_ratio, ROPE_DIM // 2, generator=generator)
        self.rope_table = torch.stack([angle.cos(), angle.sin()], dim=1)
        self.on_device = [x.to(device) for x in (self.weight, self.rope_table)]

    def store(
        self, rows: Tensor, positions: Tensor, slots: Tensor, metadata: dict[str, Tensor],
        next_n: int | None = None,
    ) -> None:  # fmt: skip
        """Stores the rows that a state op has emitted.

        Args:
            rows: [num_rows, head_dim], fp32.
            positions, slots: [num_rows], int32 and int64: memory for where the rows go.
            metadata: kv_lens, cu_seq_lens, cu_outputs and block_table_cache.
            next_n: of a decode step.
        """
        kvfold.locate_rows(
            metadata["kv_lens"],
            metadata["cu_seq_lens"],
            metadata["cu_outputs"],
            positions,
            slots,
            self.ratio,
            ROWS_PER_PAGE,
            block_table_cache=metadata["block_table_cache"],
            next_n=next_n,
        )
        weight, rope_table = self.on_device
        kvfold.norm_rope_store(
            rows, weight, rope_table, positions, slots, self.cache, EPS, ROWS_PER_PAGE, FORMAT
        )

    def wrong_rows(self, rows: Tensor, slot: np.ndarray, window: np.ndarray) -> np.ndarray:
        """Which rows have wrong bytes; all if any other byte of the cache is wrong.

        Args:
            rows: [num_rows, head_dim], fp32: those that windows filled.
            slot, window: [num_rows], int64: the request's slot in the demo, and the window.
        """
        page, place = slot * self.pages + window // ROWS_PER_PAGE, window % ROWS_PER_PAGE
        reference.run(
            Arguments(
                rows=rows.cpu(),
                weight=self.weight,
                rope_table=self.rope_table,
                positions=torch.from_numpy((window * self.ratio).astype(np.int32)),
                slots=torch.from_numpy(page * ROWS_PER_PAGE + place),
                cache=self.copy,
                eps=EPS,
                rows_per_page=ROWS_PER_PAGE,
                format=FORMAT,
            )
        )
        wrong_page = (self.cache.cpu() != self.copy).any(1).numpy()
        wrong = wrong_page[page]
        return wrong if wrong.any() or not wrong_page.any() else np.ones_like(wrong)
