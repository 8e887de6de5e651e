"""What one compressor of one layer keeps: the paged state and the compressed rows of a batch.

All sequences of the batch have the same number of tokens, as in the caches of transformers. The
state is a ring of rows: it keeps what open windows need, and what a rollback needs. The compressed
rows of a sequence are one page of kvfold's cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.ops.paged_kv_compress_store.op import paged_kv_compress_store
from kvfold.ops.prefill_compress_store.op import prefill_compress_store

PAGE = 128  # rows of a page of the state
MOST_DECODED = 8  # new tokens per sequence that the shipped table has decode kernels for
FIRST_ROWS = 64  # compressed rows per sequence that a state has room for at first
# Tensors that calls with and without inference mode write in turn must not be inference tensors.
plain_tensors = torch.inference_mode(False)
FORMATS = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # dtype of the model -> cache format


class CompressorState:
    """The state and the rows of a compressor.

    Attributes:
        length: tokens per sequence.
        rows: [batch, capacity, head_dim], of the model's dtype: compressed rows after RMSNorm and
            RoPE. Those of length // ratio windows are valid.
        max_rollback: tokens that `crop` can always remove.
    """

    @plain_tensors
    def __init__(self, compressor: Any, batch: int, dtype: torch.dtype, rollback: int) -> None:
        """Makes an empty state.

        Args:
            compressor: has the attributes that the compressors of transformers have: position_bias
                [ratio, state_dim], head_dim, kv_norm, rotary_emb, rope_layer_type.
            batch: sequences.
            dtype: of the rows, torch.bfloat16 or torch.float32.
            rollback: the least max_rollback.
        """
        self.compressor = compressor
        self.ape = compressor.position_bias.detach().float()  # a model in bf16 may have it in bf16
        self.weight = compressor.kv_norm.weight.detach()
        self.batch, self.length = batch, 0
        self.ratio, self.state_dim = compressor.position_bias.shape
        self.windows_before = self.state_dim // compressor.head_dim - 1
        self.oldest = 0  # the ring has the rows of all positions from here on
        self._make_ring(rollback)
        device = compressor.position_bias.device
        self.rows = torch.zeros(batch, 0, compressor.head_dim, dtype=dtype, device=device)
        self.reserve(FIRST_ROWS * self.ratio)

    @property
    def windows(self) -> int:
        """Windows that are complete, per sequence."""
        return self.length // self.ratio

    def first_needed(self, length: int) -> int:
        """The oldest position that a sequence of this length still reads."""
        return max(0, length // self.ratio - self.windows_before) * self.ratio

    # ---- room ------------------------------------------------------------------------------------

    def _make_ring(self, rollback: int) -> None:
        """Makes an empty ring with room for the open windows and the rollback."""
        window_rows = (1 + self.windows_before) * self.ratio
        self.pages = -(-(window_rows + rollback) // PAGE)
        self.ring = self.pages * PAGE
        self.max_rollback = self.ring - window_rows
        size = self.batch * self.pages, PAGE, 2 * self.state_dim
        self.pool = torch.zeros(size, device=self.compressor.position_bias.device)
        self.paged_kv, self.paged_score = self.pool.split(self.state_dim, dim=2)

    @plain_tensors
    def keep(self, rollback: int) -> None:
        """Makes max_rollback at least this many tokens. The rows that are there stay."""
        if rollback <= self.max_rollback:
            return
        old, ring = self.pool.view(self.batch, self.ring, -1), self.ring
        self._make_ring(rollback)
        positions = torch.arange(max(self.oldest, self.length - ring), self.length)
        new = self.pool.view(self.batch, self.ring, -1)
        new[:, positions % self.ring] = old[:, positions % ring]
        self.block_table = self._block_table()

    @plain_tensors
    def reserve(self, length: int) -> None:
        """Makes room for sequences of this length, if there is less."""
        capacity = -(-length // self.ratio)
        if capacity <= self.rows.size(1):
            return
        rows = self.rows.new_zeros(self.batch, capacity, self.rows.size(2))
        rows[:, : self.rows.size(1)] = self.rows
        self.rows = rows
        self.cache = rows.view(torch.uint8).view(self.batch, -1)
        self.rope_table = self._rope_table(capacity)
        self.block_table = self._block_table()

    def _rope_table(self, capacity: int) -> Tensor:
        """[capacity, 2, rope_dim / 2]: cosines and sines at the first token of each window."""
        of = self.compressor
        position = torch.arange(capacity, device=self.rows.device) * self.ratio
        exact = torch.empty(0, device=self.rows.device)  # says device and dtype of the result
        cos, sin = of.rotary_emb(exact, position[None], layer_type=of.rope_layer_type)
        return torch.stack((cos[0], sin[0]), dim=1)

    def _block_table(self) -> Tensor:
        """[batch, columns]: sequence b has the pages b * pages to (b + 1) * pages - 1 in turn."""
        columns = self.rows.size(1) * self.ratio // PAGE + 2
        device = self.rows.device
        page = torch.arange(columns, dtype=torch.int32, device=device) % self.pages
        first = torch.arange(self.batch, dtype=torch.int32, device=device) * self.pages
        return first[:, None] + page

    # ---- tokens ----------------------------------------------------------------------------------

    def append(self, kv: Tensor, score: Tensor) -> None:
        """Takes new tokens, and makes the rows of the windows that they close.

        Args:
            kv: [batch, new, state_dim].
            score: like kv, without the position bias.
        """
        new = kv.size(1)
        if self.length + new > self.rows.size(1) * self.ratio:
            self.reserve(max(self.length + new, 2 * self.rows.size(1) * self.ratio))
        step = step_tensors(
            self.batch, self.length, new, self.ratio, self.rows.size(1), self.rows.device
        )
        self.run(torch.cat((kv, score), dim=-1).flatten(0, 1), new, step)
        self.length += new
        if new <= self.max_rollback:
            self.oldest = max(self.oldest, self.length - self.ring)
        else:
            self.oldest = max(self.oldest, self.first_needed(self.length - self.max_rollback))

    def run(self, kv_score: Tensor, new: int, step: StepTensors) -> None:
        """Launches kvfold for `new` tokens per sequence. The counts on the host stay."""
        of, table = self.compressor, self.block_table
        arguments = (
            kv_score, self.ape, self.paged_kv, self.paged_score, table, table,
            step.kv_lens, step.cu_seq_lens, step.cu_outputs, self.weight, self.rope_table,
            step.positions, step.slots, self.cache, self.ratio,
        )  # fmt: skip
        row = (
            of.kv_norm.variance_epsilon, self.rows.size(1), FORMATS[self.rows.dtype], torch.float32
        )  # fmt: skip
        if new <= MOST_DECODED:
            paged_kv_compress_store(*arguments, new, *row)
        elif new <= self.max_rollback:
            prefill_compress_store(*arguments, *row)
        else:  # new rows of the ring may replace rows that a window reads: reduce first
            prefill_compress_store(*arguments, *row, work="reduce")
            prefill_compress_store(
                *arguments, *row, work="store", write_state="tail", max_rollback=self.max_rollback
            )

    def crop(self, length: int) -> None:
        """Goes back to a smaller length.

        Raises:
            ValueError: the ring no longer has rows that a sequence of this length reads.
        """
        if self.first_needed(length) < self.oldest:
            raise ValueError(
                f"crop to {length} of {self.length} tokens; accepted: a crop by"
                f" {self.max_rollback} or fewer since the most tokens that there were"
            )
        self.length = length

    # ---- the batch -------------------------------------------------------------------------------

    @plain_tensors
    def select(self, sequences: Tensor) -> None:
        """Makes a batch of some sequences, in an order, each any number of times.

        Args:
            sequences: [new batch], int64: indices of sequences.
        """
        pool = self.pool.view(self.batch, -1)[sequences]
        self.rows = self.rows[sequences]
        self.batch = sequences.numel()
        self.pool = pool.view(self.batch * self.pages, PAGE, 2 * self.state_dim)
        self.paged_kv, self.paged_score = self.pool.split(self.state_dim, dim=2)
        self.cache = self.rows.view(torch.uint8).view(self.batch, -1)
        self.block_table = self._block_table()


class StepTensors(NamedTuple):
    """The metadata of a step, as the store ops take them. A sequence is a request."""

    kv_lens: Tensor
    cu_seq_lens: Tensor
    cu_outputs: Tensor
    positions: Tensor
    slots: Tensor


@lru_cache(maxsize=16)
@plain_tensors
def step_tensors(
    batch: int, start: int, new: int, ratio: int, capacity: int, device: torch.device
) -> StepTensors:
    """The metadata of a step. All layers with one ratio share them.

    Row w of the RoPE table and of a sequence's page is that of window w.

    Args:
        batch: sequences, each with `start` tokens before the step and `new` ones in it.
        capacity: rows of a sequence's page.
    """
    ints = {"dtype": torch.int32, "device": device}
    first, end = start // ratio, (start + new) // ratio
    sequences = torch.arange(batch + 1, **ints)
    window = torch.arange(first, end, device=device)
    page = torch.arange(0, batch * capacity, capacity, device=device)
    return StepTensors(
        kv_lens=torch.full((batch,), start + new, **ints),
        cu_seq_lens=sequences * new,
        cu_outputs=sequences * (end - first),
        positions=window.int().repeat(batch),
        slots=(page[:, None] + window).flatten(),
    )
