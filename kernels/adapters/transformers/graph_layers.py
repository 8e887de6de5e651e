"""Cache layers of fixed shape for one new token per sequence and call, as a CUDA graph needs them.

Sizes do not depend on the number of tokens: keys are a ring, compressed rows have room for the
largest length, and masks say what is valid. What depends on the number of tokens is on the device,
in a `StepClock` that all layers share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from kvfold.adapters.transformers.compressor_state import CompressorState, StepTensors
from kvfold.ops.locate_rows.op import locate_rows


class StepClock:
    """The device's side of the lengths, for the sequences of a batch.

    Attributes:
        length: [batch], int32: tokens per sequence, the step's token included.
        position_ids: [batch, 1], int64: of the step's tokens, as the model takes them.
        mask: [batch, 1, 1, sliding_window], of the model's dtype: 0 for keys that the step's token
            sees, the least number for others.
        slot: [1], int64: where the step's keys go in the ring.
    """

    def __init__(self, positions: Tensor, mask: Tensor, length: int) -> None:
        """Stands before the first step.

        Args:
            positions: [batch, 1], int64: of the last token of each sequence.
            mask: for the tokens before the step; see the attribute.
            length: tokens per sequence.
        """
        batch, device = positions.size(0), positions.device
        self.length = torch.full((batch,), length, dtype=torch.int32, device=device)
        self.position_ids, self.mask = positions, mask
        self.slot = torch.full((1,), length, dtype=torch.int64, device=device)
        self.windows: dict[tuple[int, int], WindowClock] = {}

    def windows_of(self, state: CompressorState) -> WindowClock:
        """What all states of one ratio and capacity share."""
        key = state.ratio, state.rows.size(1)
        if key not in self.windows:
            self.windows[key] = WindowClock(self, *key)
        return self.windows[key]

    def advance(self) -> None:
        """Begins a step."""
        self.length += 1
        self.position_ids += 1
        torch.remainder(self.length[:1] - 1, self.mask.size(-1), out=self.slot)
        self.mask.index_fill_(-1, self.slot, 0)
        for windows in self.windows.values():
            windows.advance()


class WindowClock:
    """The metadata of a step for the compressors of one ratio, and which rows are valid.

    Attributes:
        tensors: as the store ops take them. A sequence has one output row.
        bias: [batch, 1, 1, capacity], of the model's dtype: 0 for valid rows, the least number for
            others.
    """

    def __init__(self, clock: StepClock, ratio: int, capacity: int) -> None:
        batch, device = clock.length.numel(), clock.length.device
        sequences = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.clock, self.ratio, self.capacity = clock, ratio, capacity
        self.pages = sequences[:batch, None]
        self.row = torch.arange(capacity, device=device)
        self.tensors = StepTensors(
            kv_lens=clock.length,
            cu_seq_lens=sequences,
            cu_outputs=sequences,
            positions=torch.zeros(batch, dtype=torch.int32, device=device),
            slots=torch.zeros(batch, dtype=torch.int64, device=device),
        )
        self.bias = clock.mask.new_zeros(batch, 1, 1, capacity)

    def advance(self) -> None:
        """Begins a step, after the clock's length has grown."""
        step = self.tensors
        locate_rows(
            step.kv_lens, step.cu_seq_lens, step.cu_outputs, step.positions, step.slots,
            self.ratio, self.capacity, block_table_cache=self.pages,
        )  # fmt: skip
        # The RoPE table has a row per window.
        step.positions.div_(self.ratio, rounding_mode="floor")
        missing = self.row >= (step.kv_lens // self.ratio)[:, None]
        self.bias.zero_().masked_fill_(missing[:, None, None], torch.finfo(self.bias.dtype).min)


class GraphLayer(cache_utils.CacheLayerMixin):
    """The cache of any layer of DeepSeek-V4, in fixed shapes.

    Attributes:
        bias: [batch, 1, 1, capacity]: which compressed rows are valid; None for a layer without.
    """

    is_sliding = True

    def __init__(self, layer: Any, clock: StepClock) -> None:
        """Takes over the tokens of a layer that has some.

        Args:
            layer: a layer of kvfold, or one with a sliding window alone.
        """
        super().__init__()
        self.clock = clock
        self.sliding_window = layer.sliding_window
        length, keys = layer.get_seq_length(), layer.keys[:, :, -self.sliding_window :]
        position = torch.arange(length - keys.size(2), length, device=keys.device)
        self._ring = keys.new_zeros(*keys.shape[:2], self.sliding_window, keys.size(3))
        self._ring[:, :, position % self.sliding_window] = keys
        self.keys = self.values = self._ring
        self.is_initialized = True
        self.states: dict[str, CompressorState] = getattr(layer, "states", {})
        self.bias = None
        if self.states:
            self.bias = clock.windows_of(self.states["compressor"]).bias

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        """Puts the keys of one token, [batch, 1, 1, head_dim], in the ring, which it returns.

        Raises:
            ValueError: there is more than one token.
        """
        if key_states.shape[-2] != 1:
            raise ValueError(f"key_states has {key_states.shape[-2]} tokens; accepted: 1")
        self._ring.index_copy_(2, self.clock.slot, key_states)
        return self._ring, self._ring

    def store_compression_weights(
        self, name: str, kv: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """As that of kvfold's other layers."""
        state = self.states[name]
        kv_score = torch.cat((kv, gate), dim=-1).flatten(0, 1)
        state.run(kv_score, 1, self.clock.windows_of(state).tensors)
        return kv[:, :0], gate[:, :0], 0

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """The rows of a compressor, [batch, capacity, head_dim], valid or not."""
        return self.states[name].rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the layer begins with keys."""

    def get_seq_length(self) -> int:
        """Tokens per sequence. Waits for the device."""
        return int(self.clock.length[0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a query sees, and the first of them. The clock's mask is used instead."""
        return self.sliding_window, 0

    def get_max_length(self) -> int:
        """Keys that the layer can hold."""
        return self.sliding_window
