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

from kvfold.adapters.sglang.internals import is_capturing
from kvfold.adapters.sglang.metadata import RowMetadata
from kvfold.adapters.sglang.plan import check_plan
from kvfold.adapters.sglang.prepare import decode_metadata, prefill_metadata, row_metadata
from kvfold.runtime.internals import raw_stream

Made = TypeVar("Made")

ATTRIBUTE = "_kvfold_steps"  # of a plan's first tensor: its steps, by whether they are captured


class Step:
    """The metadata of one plan in one step.

    Attributes:
        ratio, is_decode: of the plan.
        entries: of the plan's first tensor.
        device: index of the plan's GPU; -1 for the CPU.
        version: of the plan's first tensor, as torch counts its writes; None if it counts none.
        layers: the addresses of the states and caches that have been in a call.
        by_tokens: the metadata that has been made, by the rows of kv_score_input.
    """

    def __init__(self, plan: Any) -> None:
        part = plan[1]
        self.ratio, self.is_decode = plan.compress_ratio, plan.is_decode
        self.entries, self.device = part.size(0), part.get_device()
        self.by_tokens: dict[int, OnStreams[Any]] = {}
        self.version = _version(part)
        self.layers: set[int] = set()
        self._rows: OnStreams[RowMetadata] | None = None
        self._out_loc: Tensor | None = None

    def make(self, plan: Any, num_tokens: int) -> OnStreams[Any]:
        """DecodeMetadata or PrefillMetadata for that many rows of kv_score_input."""
        found = self.by_tokens.get(num_tokens)
        if found is None:
            if self.is_decode:
                metadata = decode_metadata(plan)
            else:
                metadata = prefill_metadata(plan, num_tokens)
                self.version = _version(plan[1])  # the plan has been sorted
            found = self.by_tokens[num_tokens] = OnStreams(metadata, self.device)
        return found

    def rows(self, out_loc: Tensor) -> OnStreams[Any] | None:
        """What has positions and slots of the compressed rows; of a decode plan, only positions."""
        if self.is_decode:
            return self.by_tokens.get(self.entries)
        return self._rows if self._out_loc is out_loc else None

    def make_rows(self, plan: Any, out_loc: Tensor) -> OnStreams[Any]:
        """Positions and slots of the compressed rows."""
        if self.is_decode:
            return self.make(plan, self.entries)
        if self._rows is None or self._out_loc is not out_loc:
            self._rows, self._out_loc = OnStreams(row_metadata(plan, out_loc), self.device), out_loc
        return self._rows


def step_of(function: str, plan: Any, layer: int) -> Step:
    """The step of a call, or a new one. Raises ValueError for a plan that is none.

    Args:
        function: that is called, for the error.
        layer: the address of the state, or of the cache, that the call writes.
    """
    part = plan[1]
    steps: dict[bool, Step] | None = getattr(part, ATTRIBUTE, None)
    capturing = is_capturing()
    step = None if steps is None else steps.get(capturing)
    if (
        step is None
        or layer in step.layers
        or (step.version is not None and step.version != part._version)
    ):
        check_plan(function, plan)
        step = Step(plan)
        part.__dict__.setdefault(ATTRIBUTE, {})[capturing] = step
    step.layers.add(layer)
    return step


class OnStreams(Generic[Made]):
    """What the current stream has just made, for this stream and for others."""

    def __init__(self, made: Made, device: int) -> None:
        self._made, self._device = made, device
        if device >= 0:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
            self._streams = {raw_stream(device)}

    def get(self) -> Made:
        """What was made. The current stream waits for it."""
        if self._device >= 0:
            stream = raw_stream(self._device)
            if stream not in self._streams:
                torch.cuda.current_stream(self._device).wait_event(self._event)
                self._streams.add(stream)
        return self._made


def _version(part: Tensor) -> int | None:
    """Counts the writes to a plan by torch; torch counts none to an inference tensor."""
    return None if part.is_inference() else part._version
