"""Runs the op with a torch that lacks the private parts that kvfold uses. Argument: the device.

A program of its own, because the parts must be gone when kvfold is imported.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch._C._dynamo.guards as guards

HIDDEN = [
    (torch._C, "_cuda_getCurrentRawStream"),
    (torch._C, "_cuda_getDevice"),
    (guards, "TensorGuards"),
]
present = [
    (module, name, getattr(module, name)) for module, name in HIDDEN if hasattr(module, name)
]
assert present
for module, name, _ in present:
    delattr(module, name)

from kvfold.runtime import internals  # noqa: E402

for module, name, value in present:  # for torch's own use
    setattr(module, name, value)

import kvfold  # noqa: E402

folder = Path(__file__).parent
sys.path[:0] = [str(folder), str(folder.parents[1])]
from calls import Call, make  # noqa: E402
from contract import assert_follows_contract  # noqa: E402

ENTRIES = {
    "kvfold": kvfold.paged_kv_compress,
    "torch.ops": torch.ops.kvfold.paged_kv_compress,
}


def main(device: str) -> None:
    assert not internals.FOUND
    call = make([(7, 2), (6, 3), (2, 1)], head_dim=128, device=device)
    for run in ENTRIES.values():
        for _ in range(2):
            assert_follows_contract(lambda c, run=run: c.pass_to(run), call)
        refused(run, call)
    if device == "cuda":
        assert_follows_contract(captured, call)


def refused(run: Callable[..., None], call: Call) -> None:
    try:
        replace(call, next_n=0).pass_to(run)
    except ValueError as error:
        assert "next_n is 0" in str(error)
    else:
        raise AssertionError("next_n 0 was accepted")


def captured(call: Call) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.pass_to(kvfold.paged_kv_compress)
    graph.replay()


if __name__ == "__main__":
    main(sys.argv[1])
    print("done")
