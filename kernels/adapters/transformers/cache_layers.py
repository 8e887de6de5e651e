"""Cache layers for DeepSeek-V4 whose compressors run on kvfold.

They are the layers of transformers with two methods replaced, by which a compressor hands over its
new tokens and gets all rows so far. A compressor without kvfold, or one that needs gradients, finds
the methods of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from kvfold.adapters.transformers.compressor_state import FORMATS, CompressorState

RECORDED = 256  # tokens that a layer can remove which records its past, as for assisted generation


class KvfoldLayer(modeling.DeepseekV4HCACache):
    """What the two layers share.

    Attributes:
        states: the state of each compressor that has run on kvfold, by its name.
        compressors: the compressors that use kvfold, by name; each enters itself before it runs.
    """

    _layer_type = None  # a class with a layer type enters itself in the mapping of transformers

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.states: dict[str, CompressorState] = {}
        self.compressors: dict[str, Any] = {}

    # ---- what a compressor calls -----------------------------------------------------------------

    def store_compression_weights(
        self, name: str, kv: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Takes the new tokens of a compressor.

        Args:
            name: "compressor" or "indexer".
            kv: [batch, new, state_dim], bf16 or fp32.
            gate: like kv, without the position bias.

        Returns:
            The tokens that the caller is to compress itself: none, if kvfold does it.
        """
        state = self.states.get(name)
        if state is None:
            if not self._serves(name, kv):
                return super().store_compression_weights(name, kv, gate)
            state = CompressorState(
                self.compressors[name], kv.size(0), kv.dtype, self._least_rollback()
            )
            self.states[name] = state
        state.append(kv, gate)
        return kv[:, :0], gate[:, :0], 0

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """All rows of a compressor so far, [batch, windows, head_dim]."""
        if name not in self.states:
            return super().update_compressor_states(name, compressed)
        state = self.states[name]
        return state.rows[:, : state.windows]

    def _serves(self, name: str, kv: Tensor) -> bool:
        """Whether kvfold takes the first tokens of a compressor."""
        fresh = self.buffer_kv[name] is None  # transformers has taken none
        return name in self.compressors and fresh and kv.dtype in FORMATS and not kv.requires_grad

    def _least_rollback(self) -> int:
        # Without a record the keys can be cropped only below the length of the sliding window.
        return RECORDED if self.record_past else self.sliding_window - 1

    # ---- what a cache calls ----------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        """Appends keys, which are the values too. Returns those that the queries may see.

        Args:
            key_states: [batch, 1, new, head_dim].

        Raises:
            RuntimeError: key_states require gradients, and kvfold has taken earlier tokens.
        """
        if key_states.requires_grad and self.states:
            raise RuntimeError(
                "key_states require gradients; accepted: none after a call without (under"
                " torch.no_grad), or a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.cumulative_length += new
        assert self.keys is not None
        full = torch.cat([self.keys, key_states], dim=-2)
        before = self.sliding_window - 1
        self.keys = full if self.record_past else full[:, :, -before:]
        self.values = self.keys
        visible = full[:, :, -before - new :]
        return visible, visible

    def activate_past_recording(self) -> None:
        """Keeps what a later `crop` needs."""
        super().activate_past_recording()
        for state in self.states.values():
            state.keep(RECORDED)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens, as the method of transformers does. Windows that they closed reopen.

        Raises:
            RuntimeError: transformers cannot crop the keys.
            ValueError: the state no longer has the rows that are needed.
        """
        keys, length = self.keys, self.cumulative_length
        super().crop(int(tokens_to_remove))  # transformers 5.17 passes a tensor
        try:
            for state in self.states.values():
                state.crop(self.cumulative_length)
        except ValueError:
            self.keys = self.values = keys
            self.cumulative_length = length
            raise
        self.values = self.keys

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.is_initialized = False
        for name in self.compressed_kv:
            self.buffer_kv[name] = self.buffer_gate[name] = self.compressed_kv[name] = None
            self.entry_count[name] = 0
        self.states.clear()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Puts the sequences in another order, as beam search does.

        Args:
            beam_idx: [batch], int64.
        """
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        super().batch_repeat_interleave(repeats)
        for state in self.states.values():
            index = torch.arange(state.batch, device=state.rows.device)
            state.select(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences."""
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, sequences: Tensor) -> None:
        for state in self.states.values():
            state.select(sequences.to(state.rows.device))
        self.values = self.keys


class HCALayer(KvfoldLayer):
    """The cache of a heavily compressed layer."""


class CSALayer(KvfoldLayer, modeling.DeepseekV4CSACache):
    """The cache of a compressed sparse layer, with the state of its indexer."""

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        for name in self.overlap_kv:
            self.overlap_kv[name] = self.overlap_gate[name] = None
