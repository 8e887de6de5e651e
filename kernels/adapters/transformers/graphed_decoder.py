"""Greedy or sampled decoding in which the whole step of a model is one CUDA graph launch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.transformers.compressor_state import plain_tensors
from kvfold.adapters.transformers.graph_layers import GraphLayer, StepClock
from kvfold.step import StepBatch


class GraphedDecoder:
    """Decodes one token per sequence and step with a DeepSeek-V4 model of kvfold.

        cache = DynamicCache(config=model.config)
        logits = model(input_ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
        with GraphedDecoder(model, cache, max_length=4096, attention_mask=mask) as decoder:
            for _ in range(100):
                logits = decoder.step(logits.argmax(-1))

    The first step runs the model's code, the second captures it in a CUDA graph, and later steps
    launch the graph; on a CPU all run the code. The experts of the model must not wait for the
    device: build it with `experts_implementation="grouped_mm"`. Else the step cannot be captured,
    and all steps run the code; `counters` says which.
    """

    @plain_tensors
    def __init__(
        self, model: Any, cache: Any, max_length: int, attention_mask: Tensor | None = None
    ) -> None:
        """Takes over a cache. No other call may use it from then on.

        Args:
            model: a DeepseekV4ForCausalLM that was built after `patch`.
            cache: the DynamicCache of one or more calls of the model.
            max_length: tokens per sequence that there is room for.
            attention_mask: [batch, length], as the model takes it: 0 for padding, on the left.

        Raises:
            ValueError: an argument is not accepted. The cache stays as it is.
        """
        self.model, self.max_length = model, max_length
        self._check(cache)
        self.length = cache.get_seq_length()
        if not self.length <= max_length:
            raise ValueError(f"max_length is {max_length}; accepted: {self.length} or more")
        states = [s for layer in cache.layers for s in getattr(layer, "states", {}).values()]
        keys = cache.layers[0].keys
        batch = keys.size(0)
        if attention_mask is None:
            attention_mask = torch.ones(batch, self.length, device=keys.device)
        if tuple(attention_mask.shape) != (batch, self.length):
            raise ValueError(
                f"attention_mask is of shape {list(attention_mask.shape)};"
                f" accepted: [batch, length] = {[batch, self.length]}"
            )
        for state in states:
            state.reserve(max_length)
        self._clock = StepClock(
            attention_mask.long().sum(1, keepdim=True) - 1,
            self._mask(attention_mask, cache.layers[0].sliding_window, keys.dtype),
            self.length,
        )
        for state in states:
            self._clock.windows_of(state)
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=keys.device)
        cache.layers = [GraphLayer(layer, self._clock) for layer in cache.layers]
        by_new_name = "cache" in inspect.signature(model.model.forward).parameters
        self._cache = {"cache" if by_new_name else "past_key_values": cache}
        self._batch = StepBatch(keys.device)

    @staticmethod
    def _check(cache: Any) -> None:
        for index, layer in enumerate(cache.layers):
            if not (layer.get_seq_length() and hasattr(layer, "sliding_window")):
                raise ValueError(f"layer {index} of cache, {layer}, is empty; accepted: one in use")
            if hasattr(layer, "compressed_kv") and not getattr(layer, "states", {}):
                raise ValueError(
                    f"layer {index} of cache has run without kvfold; accepted: a cache of calls"
                    " under torch.no_grad of a model that was built after patch()"
                )

    @staticmethod
    def _mask(attention_mask: Tensor, window: int, dtype: torch.dtype) -> Tensor:
        """The mask of the keys in the ring before the first step, [batch, 1, 1, window]."""
        batch, length = attention_mask.shape
        least = torch.finfo(dtype).min
        mask = torch.full((batch, 1, 1, window), least, dtype=dtype, device=attention_mask.device)
        position = torch.arange(max(0, length - window), length, device=mask.device)
        seen = attention_mask[:, position].bool()
        mask[:, 0, 0, position % window] = torch.where(seen, 0.0, least).to(dtype)
        return mask

    @property
    def counters(self) -> Any:
        """How steps were run, a kvfold.step.BatchCounters."""
        return self._batch.counters

    def step(self, tokens: Tensor) -> Tensor:
        """Takes one token per sequence.

        Args:
            tokens: [batch], int64, on the model's device.

        Returns:
            [batch, vocabulary]: the logits of the next tokens. They are valid until the next step.

        Raises:
            ValueError: tokens has another shape, or a sequence has max_length tokens.
        """
        if tuple(tokens.shape) != (len(self._tokens),):
            raise ValueError(
                f"tokens is of shape {list(tokens.shape)}; accepted: [{len(self._tokens)}]"
            )
        if self.length == self.max_length:
            raise ValueError(f"a sequence has max_length = {self.max_length} tokens")
        self._tokens.copy_(tokens[:, None])
        with torch.no_grad(), self._batch.step("decode") as step:
            logits = step.run(self._run)
        self.length += 1
        return logits

    def _run(self) -> Tensor:
        self._clock.advance()
        output = self.model(
            input_ids=self._tokens,
            attention_mask=self._clock.mask,
            position_ids=self._clock.position_ids,
            use_cache=True,
            **self._cache,
        )
        return output.logits[:, -1]

    def close(self) -> None:
        """Waits for the steps so far, and releases the graph."""
        self._batch.close()

    def __enter__(self) -> GraphedDecoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
