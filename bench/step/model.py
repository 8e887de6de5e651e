"""The compressors of a small model, layer by layer, and its decode steps."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kvfold
from kvfold.step import SegmentPrefetcher

HEAD_DIM = 512
PAGE_SIZE = 32
MAX_LENGTH = 4096  # tokens of a request


@dataclass(frozen=True)
class Shape:
    """What a model is made of.

    Attributes:
        compress_ratios: one per layer, 4 or 128.
        batch: requests in every step.
        next_n: most new tokens of a request in a step.
        hidden: columns of a hidden state.
    """

    compress_ratios: tuple[int, ...]
    batch: int
    next_n: int = 4
    hidden: int = 7168
    head_dim: int = HEAD_DIM

    @property
    def tokens(self) -> int:
        """Rows of a step's hidden states, padding included."""
        return self.batch * self.next_n

    def state_dim(self, ratio: int) -> int:
        return self.head_dim * (2 if ratio == 4 else 1)

    def pages(self, ratio: int) -> int:
        """Pages per request, used in turn: enough for the rows that a window may still read."""
        rows = ratio * (2 if ratio == 4 else 1) + self.next_n
        return -(-rows // PAGE_SIZE) + 1

    def windows(self, ratio: int) -> int:
        """Output rows reserved per request."""
        return self.next_n // ratio + 1


@dataclass
class Layer:
    """One compressor. kv_score: [tokens, 2*state_dim], overwritten by the projection."""

    ratio: int
    weight: Tensor  # [hidden, 2*state_dim], bf16
    ape: Tensor
    kv_score: Tensor
    output: Tensor  # [batch * windows, head_dim]
    state: dict[str, Tensor]  # "kv" and "score", the paged pools


def make_layers(shape: Shape, device: torch.device, seed: int = 0) -> list[Layer]:
    """The model's layers, the same values for a seed on every device; the states hold noise."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    made = []
    for ratio in shape.compress_ratios:
        width = 2 * shape.state_dim(ratio)
        # One random page, repeated: drawing gigabytes takes longer than measuring.
        page = noise(1, PAGE_SIZE, shape.state_dim(ratio)).to(device)
        weight = noise(shape.hidden, width) * shape.hidden**-0.5
        layer = Layer(
            ratio=ratio,
            weight=weight.bfloat16().to(device),
            ape=noise(ratio, shape.state_dim(ratio)).to(device),
            kv_score=torch.zeros(shape.tokens, width, dtype=torch.bfloat16, device=device),
            output=torch.zeros(shape.batch * shape.windows(ratio), shape.head_dim, device=device),
            state={
                name: page.repeat(shape.batch * shape.pages(ratio), 1, 1)
                for name in ("kv", "score")
            },
        )
        made.append(layer)
    return made


def step_metadata(shape: Shape, start: np.ndarray, new: np.ndarray) -> dict[str, np.ndarray]:
    """A step's int32 arrays, under the op's argument names; those of one ratio end in the ratio.

    Args:
        start, new: [batch], tokens before the step and new in it.
    """
    arrays = {
        "kv_lens": start + new,
        "cu_seq_lens": np.concatenate([[0], np.cumsum(new)]),
    }
    logical = np.arange(MAX_LENGTH // PAGE_SIZE)
    for ratio in sorted(set(shape.compress_ratios)):
        pages = shape.pages(ratio)
        arrays[f"cu_outputs_{ratio}"] = np.arange(shape.batch + 1) * shape.windows(ratio)
        arrays[f"block_table_{ratio}"] = np.arange(shape.batch)[:, None] * pages + logical % pages
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def steady_steps(shape: Shape, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(start, new) of an endless series of decode steps: every request has next_n new tokens."""
    start = np.random.default_rng(seed).integers(256, 512, shape.batch)
    while True:
        yield start, np.full(shape.batch, shape.next_n)
        start = start + shape.next_n
        start = np.where(start + shape.next_n > MAX_LENGTH, 256, start)


def trace(shape: Shape, steps: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(start, new) of a trace: a prefill of 40 tokens, then drafts of which some are rejected."""
    rng = np.random.default_rng(seed)
    length = np.zeros(shape.batch, np.int64)
    for step in range(steps):
        prefill = step * shape.next_n < 40
        new = rng.integers(1, shape.next_n + 1, shape.batch)
        if prefill:
            new = np.full(shape.batch, shape.next_n)
        yield length, new
        length = length + (new if prefill else rng.integers(1, new + 1))


def run_step(
    layers: list[Layer],
    inputs: dict[str, Tensor],
    hidden_states: Tensor,
    next_n: int,
    prefetcher: SegmentPrefetcher | None = None,
) -> None:
    """A step's kernels: per layer the projection into kv_score, then the compressor.

    prefetcher: of the layers' states, if these are in host memory.
    """
    for number, layer in enumerate(layers):
        torch.mm(hidden_states, layer.weight, out=layer.kv_score)
        block_table = inputs[f"block_table_{layer.ratio}"]
        resident = contextlib.nullcontext(layer.state)
        with resident if prefetcher is None else prefetcher.segment(number) as state:
            kvfold.paged_kv_compress(
                layer.kv_score, layer.ape, state["kv"], state["score"], block_table, block_table,
                layer.output, inputs["kv_lens"], inputs["cu_seq_lens"],
                inputs[f"cu_outputs_{layer.ratio}"], layer.ratio, next_n,
            )  # fmt: skip
    if prefetcher is not None:
        prefetcher.join()
