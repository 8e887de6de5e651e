"""The compressors of DeepSeek-V4 that use kvfold.

They are those of transformers, with the same parameters. Each enters itself in the cache layer,
which then runs kvfold in place of the code of transformers. Without a cache, and with a cache of
another kind, the code of transformers runs.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from kvfold.adapters.transformers.cache_layers import KvfoldLayer
from kvfold.adapters.transformers.graph_layers import GraphLayer
from kvfold.ops.row_spec import HEAD_DIMS


def _enter(compressor: nn.Module, name: str, cache: Any, layer_idx: int) -> Any:
    """Enters a compressor in its cache layer, if that is one of kvfold's. Returns the layer."""
    layer = None if cache is None else cache.layers[layer_idx]
    if isinstance(layer, KvfoldLayer):
        layer.compressors[name] = compressor
    return layer


def _check(config: Any, field: str) -> None:
    if getattr(config, field) not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"config.{field} is {getattr(config, field)}; kvfold accepts: {accepted}")


class HCACompressor(modeling.DeepseekV4HCACompressor):
    """The compressor of a heavily compressed layer."""

    def __init__(self, config: Any) -> None:
        _check(config, "head_dim")
        super().__init__(config)

    def forward(self, hidden_states, q_residual, position_ids, cache, layer_idx) -> Any:
        """As that of transformers."""
        layer = _enter(self, "compressor", cache, layer_idx)
        rows, bias = super().forward(hidden_states, q_residual, position_ids, cache, layer_idx)
        if isinstance(layer, GraphLayer):
            bias = layer.bias  # not all rows are valid
        return rows, bias


class Indexer(modeling.DeepseekV4Indexer):
    """The indexer of a compressed sparse layer, which has a compressor of its own."""

    def forward(self, hidden_states, q_residual, position_ids, cache, layer_idx) -> Any:
        """As that of transformers."""
        _enter(self, "indexer", cache, layer_idx)
        return super().forward(hidden_states, q_residual, position_ids, cache, layer_idx)


class CSACompressor(modeling.DeepseekV4CSACompressor):
    """The compressor of a compressed sparse layer."""

    def __init__(self, config: Any) -> None:
        _check(config, "head_dim")
        _check(config, "index_head_dim")
        super().__init__(config)
        # Another indexer would draw other random weights than a model without kvfold.
        self.indexer.__class__ = Indexer

    def forward(self, hidden_states, q_residual, position_ids, cache, layer_idx) -> Any:
        """As that of transformers."""
        _enter(self, "compressor", cache, layer_idx)
        return super().forward(hidden_states, q_residual, position_ids, cache, layer_idx)
