"""Which metadata belongs to a call: made at the first call of a step, and shared by all its layers.

The metadata is kept with the plan. SGLang makes a new plan for most steps, and writes other ones
into the same tensors. A step is a new one if

- the plan's tensor has been written since, as far as torch counts it;
- a layer comes again: its state, or its cache, has been in a call with this metadata already;
- a CUDA graph is captured and was not before, or the other way round. So the launch that makes the
  metadata is part of the graph, and each replay makes it anew.

A layer's compressors may run on streams of their own. A stream other than the one on which the
metadata was made waits for an event.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kvfold.adapters.sglang.metadata import DecodeMetadata, PrefillMetadata, RowMetadata
from kvfold.adapters.sglang.plan import check_plan
from kvfold.adapters.sglang.prepare import decode_metadata, prefill_metadata, row_metadata

Made = TypeVar("Made")

ATTRIBUTE = "_kvfold_steps"  # of a plan's first tensor: its steps, by whether they are captured


class Step:
    """The metadata of one plan in one step.

    Attributes:
        accepted: what tells apart the calls that have been checked.
    """

    def __init__(self, part: Tensor) -> None:
        self.accepted: set[tuple] = set()
        self._version = _version(part)
        self._layers: set[int] = set()
        self._by_tokens: dict[int, OnStreams[Any]] = {}
        self._rows: OnStreams[RowMetadata] | None = None
        self._out_loc: Tensor | None = None

    @classmethod
    def of(cls, function: str, plan: Any, layer: int) -> Step:
        """The step of a call, or a new one. Raises ValueError for a plan that is none.

        Args:
            function: that is called, for the error.
            layer: the address of the state, or of the cache, that the call writes.
        """
        part = plan[1]
        steps = getattr(part, ATTRIBUTE, None)
        if steps is None:
            check_plan(function, plan)
            steps = {}
            setattr(part, ATTRIBUTE, steps)
        capturing = part.is_cuda and torch.cuda.is_current_stream_capturing()
        step = steps.get(capturing)
        if step is None or layer in step._layers or step._version != _version(part):
            check_plan(function, plan)
            step = steps[capturing] = cls(part)
        step._layers.add(layer)
        return step

    def decode(self, plan: Any) -> DecodeMetadata:
        """The metadata of a decode plan."""
        made = self._by_tokens.get(0)
        if made is None:
            made = self._by_tokens[0] = OnStreams(decode_metadata(plan), plan[1].is_cuda)
        return made.get()

    def prefill(self, plan: Any, num_tokens: int) -> PrefillMetadata:
        """The metadata of a prefill plan, for a call with that many rows of kv_score_input."""
        made = self._by_tokens.get(num_tokens)
        if made is None:
            made = OnStreams(prefill_metadata(plan, num_tokens), plan[1].is_cuda)
            self._by_tokens[num_tokens] = made
            self._version = _version(plan[1])  # the plan has been sorted
        return made.get()

    def rows(self, plan: Any, out_loc: Tensor) -> RowMetadata:
        """Positions and slots of the rows of a prefill plan."""
        if self._rows is None or self._out_loc is not out_loc:
            self._rows = OnStreams(row_metadata(plan, out_loc), plan[1].is_cuda)
            self._out_loc = out_loc
        return self._rows.get()


class OnStreams(Generic[Made]):
    """What the current stream has just made, for this stream and for others."""

    def __init__(self, made: Made, on_gpu: bool) -> None:
        self._made = made
        self._event = None
        if on_gpu:
            self._event = torch.cuda.Event()
            self._event.record()
            self._streams = {torch.cuda.current_stream().cuda_stream}

    def get(self) -> Made:
        """What was made. The current stream waits for it."""
        if self._event is not None:
            stream = torch.cuda.current_stream()
            if stream.cuda_stream not in self._streams:
                stream.wait_event(self._event)
                self._streams.add(stream.cuda_stream)
        return self._made


def _version(part: Tensor) -> int:
    """Counts the writes to a plan by torch; torch counts none to an inference tensor."""
    return 0 if part.is_inference() else part._version
