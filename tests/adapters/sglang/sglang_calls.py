"""Calls of the adapter for tests, and what they must leave: rows, state and cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import row_oracle
import torch
from numerics import assert_rows_close, assert_same_bits
from sglang_plans import Call, Simulation
from torch import Tensor

import kvfold
from kvfold.adapters import sglang
from kvfold.codegen import load_table

SENTINEL = -77.0
ROPE_DIM = 64
EPS = 1e-6


def make_ape(simulation: Simulation) -> Tensor:
    """[ratio, state_dim], fp32, as the checkpoint has it."""
    shape = simulation.layout.ratio, simulation.width // 2
    return torch.randn(shape, generator=simulation.generator)


def as_sglang_has_it(ape: Tensor, head_dim: int) -> Tensor:
    """The halves one below the other: a view [parts * ratio, head_dim] of another tensor."""
    relaid = torch.cat(ape.split(head_dim, dim=1), dim=0).contiguous()
    return relaid.view(ape.shape).view(-1, head_dim)


def forward(
    simulation: Simulation, call: Call, state: Tensor, ape: Tensor, dtype: torch.dtype
) -> Tensor:
    """compress_forward with an output that is full of a sentinel."""
    shape = call.plan[1].size(0), simulation.head_dim
    out = torch.full(shape, SENTINEL, dtype=dtype, device=simulation.device)
    found = sglang.compress_forward(
        state, call.kv_score, ape, call.plan, head_dim=simulation.head_dim,
        compress_ratio=simulation.layout.ratio, out=out,
    )  # fmt: skip
    assert found is out
    return out


def assert_entries(call: Call) -> None:
    """Entry i of the plan, as any reader sees it after the call, is the window of row i."""
    entries = call.plan[1].cpu().numpy().reshape(-1).view(np.int32)
    lengths = entries.reshape(-1, 4)[:, 0].tolist()
    if not call.plan.is_decode:
        assert lengths == [-1 if closes is None else closes[1] for closes in call.closing]


def assert_state(state: Tensor, before: Tensor, call: Call) -> None:
    """The rows that the plan names hold the raw input; every other row is as it was."""
    expected = before.flatten(0, 1).clone()
    for row, token in call.written.items():
        expected[row] = call.kv_score[token].to(expected.dtype)
    assert_same_bits(state.flatten(0, 1), expected, "state")


def assert_rows(
    simulation: Simulation, call: Call, out: Tensor, ape: Tensor, state_dtype: torch.dtype
) -> None:
    """The rows against float64, and to the bit those of a plain, unpaged state."""
    plain = {}
    for number in {closes[0] for closes in call.closing if closes is not None}:
        tokens = torch.stack(call.history[number])
        plain[number] = plain_rows(simulation, tokens, ape, state_dtype, out).cpu()
    for row, closes in zip(out.cpu(), call.closing, strict=True):
        if closes is None:
            assert (row == SENTINEL).all(), "a row that no window fills was written"
            continue
        number, length, _ = closes
        tokens = torch.stack(call.history[number][:length])
        expected, scale = exact_row(simulation, tokens.to(state_dtype), ape)
        assert_rows_close(row, expected, scale, f"window that ends at {length}")
        window = length // simulation.layout.ratio - 1
        assert_same_bits(row, plain[number][window], f"window that ends at {length}")


def exact_row(simulation: Simulation, tokens: Tensor, ape: Tensor) -> tuple[Tensor, float]:
    """The last window of some tokens [length, width], in float64, and the largest KV value."""
    ratio, head_dim, width = simulation.layout.ratio, simulation.head_dim, simulation.width
    kvs, scores = [], []
    first = len(tokens) - simulation.layout.window_rows
    for position in range(max(first, 0), len(tokens)):
        is_own = position >= len(tokens) - ratio
        column = head_dim if simulation.layout.overlap and is_own else 0
        at = slice(column, column + head_dim)
        kv, score = tokens[position].double().split(width // 2)
        kvs.append(kv[at])
        scores.append(score[at] + ape[position % ratio].double()[at])
    kv, weight = torch.stack(kvs), torch.softmax(torch.stack(scores), dim=0)
    return (kv * weight).sum(0), float(kv.abs().max())


def plain_rows(
    simulation: Simulation, tokens: Tensor, ape: Tensor, state_dtype: torch.dtype, like: Tensor
) -> Tensor:
    """All windows by one kvfold.prefill_compress for a whole sequence, on a state of one page."""
    device, width = like.device, simulation.width // 2
    ratio, length = simulation.layout.ratio, len(tokens)
    state = torch.zeros(2, 1, length, width, dtype=state_dtype, device=device)
    rows = torch.zeros(length // ratio, simulation.head_dim, dtype=like.dtype, device=device)
    integers = [
        torch.tensor(x, dtype=torch.int32, device=device)
        for x in ([[0]], [length], [0, length], [0, length // ratio])
    ]
    kvfold.prefill_compress(
        tokens.to(device), ape.to(device), state[0], state[1], integers[0], integers[0], rows,
        *integers[1:], ratio, ape_in_state=False,
    )  # fmt: skip
    return rows


class Cache:
    """A cache, what the norm and RoPE need, and the arguments that choose its format."""

    def __init__(
        self, simulation: Simulation, format: str, rounding: str, page_size: int, align: int = 1,
        **arguments: Any,
    ) -> None:  # fmt: skip
        head_dim, generator = simulation.head_dim, simulation.generator
        self.simulation, self.arguments = simulation, arguments
        self.format, self.rounding = load_table().formats[format], rounding
        self.rotate, self.page_size = head_dim == 128, page_size
        needed = row_oracle.page_bytes(self.format, head_dim, ROPE_DIM, page_size)
        pages = -(-simulation.num_slots // page_size)
        shape = pages, -(-needed // align) * align
        self.bytes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.bytes = self.bytes.to(simulation.device)
        self.weight = torch.rand(head_dim, generator=generator).to(simulation.device) + 0.5
        angles = torch.rand(1024, ROPE_DIM // 2, generator=generator) * 6
        self.freq_cis = torch.polar(torch.ones_like(angles), angles).to(simulation.device)

    def store(self, kv: Tensor, call: Call) -> None:
        """compress_norm_rope_store."""
        sglang.compress_norm_rope_store(
            kv, call.plan, norm_weight=self.weight, norm_eps=EPS, freq_cis=self.freq_cis,
            out_loc=call.out_loc, kvcache=self.bytes, page_size=self.page_size,
            **self.arguments,
        )  # fmt: skip

    def expected(self, kv: Tensor, call: Call, before: np.ndarray) -> np.ndarray:
        """What the bytes of the cache must be after a call."""
        ratio, bytes_after = self.simulation.layout.ratio, before.copy()
        closing = call.closing
        positions = [-1 if closes is None else closes[1] - ratio for closes in closing]
        slots = [-1 if closes is None else closes[2] for closes in closing]
        table = torch.view_as_real(self.freq_cis.cpu()).transpose(1, 2).numpy()
        weight = self.weight.cpu().to(kv.dtype)
        row_oracle.store(
            kv.cpu().float().numpy(), weight.float().numpy(), table, np.array(positions),
            np.array(slots), bytes_after, EPS, self.page_size, self.format,
            rounding=self.rounding, rotate=self.rotate, scale=None,
        )  # fmt: skip
        return bytes_after
