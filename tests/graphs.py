"""Calls in CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch


def captured(run: Callable[[Any], None], call: Any) -> Callable[[Any], None]:
    """Captures `run` on a copy of a call; returns a function that replays it on another one.

    All tensors of the other call take the places of the copy's for the replay, and get back what it
    wrote. They have the shapes of the first call's.
    """
    static = call.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static)

    def replay(other: Any) -> None:
        tensors = [
            (mine, value)
            for mine, value in zip(static.args(), other.args(), strict=True)
            if isinstance(mine, torch.Tensor)
        ]
        for mine, value in tensors:
            mine.copy_(value)
        graph.replay()
        for mine, value in tensors:
            value.copy_(mine)

    return replay
