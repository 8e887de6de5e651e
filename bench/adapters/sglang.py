"""Calls of the SGLang adapter, as the layers of a step make them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kvfold
from kvfold.adapters import sglang
from kvfold.adapters.sglang import kept, prepare
from kvfold.bench.adapters.case import HostCase

BATCH = 64
LAYERS = 60  # calls with one plan in a step: the first one makes the metadata
DRAFTS = 4  # tokens of a request in a verify step
RINGS = {4: 16, 128: 256}
HEAD_DIM = {"584": 512, "index fp8": 128}


class DecodePlan(NamedTuple):
    """As SGLang's."""

    compress_ratio: int
    plan_d: Tensor

    @property
    def is_decode(self) -> bool:
        return True


class PrefillPlan(NamedTuple):
    """As SGLang's."""

    compress_ratio: int
    plan_c: Tensor
    plan_w: Tensor
    pin_buffer: Tensor | None = None

    @property
    def is_decode(self) -> bool:
        return False


def cases(device: torch.device) -> list[HostCase]:
    """Calls of batch 64; those of a step have 60 states, or caches, in turn."""
    return [
        _forward("decode, ratio 4", _decode_plan(4, device), device),
        _forward("decode, ratio 128", _decode_plan(128, device), device),
        _forward("verify 4 tokens, ratio 4", _verify_plan(device), device),
        _store("584", device),
        _store("index fp8", device),
    ]


def _decode_plan(ratio: int, device: torch.device) -> DecodePlan:
    """A token of each request; every fourth window of ratio 4 closes."""
    entries = []
    for request in range(BATCH):
        position = 1000 + request
        rows = [request * RINGS[ratio] + p % RINGS[ratio] for p in (position - ratio, position)]
        entries.append((position + 1, rows[1], rows[0] // ratio, rows[1] // ratio))
    return DecodePlan(ratio, _as_bytes(entries, device))


def _verify_plan(device: torch.device) -> PrefillPlan:
    """The planner's device path: as many entries as tokens. A window of each request closes."""
    windows, rows, ring = [], [], RINGS[4]
    for token in range(BATCH * DRAFTS):
        request, j = divmod(token, DRAFTS)
        position = 1000 + request + j
        row = request * ring + position % ring
        rows.append((token, row))
        if position % 4 == 3:
            before = request * ring + (position - 4) % ring
            windows.append((position + 1, token | 7 - j << 16, before // 4, row // 4))
    windows += [(-1, 0, -1, -1)] * (BATCH * DRAFTS - len(windows))
    return PrefillPlan(4, _as_bytes(windows, device), _as_bytes(rows, device))


def _as_bytes(entries: list[tuple[int, ...]], device: torch.device) -> Tensor:
    array = np.array(entries, dtype=np.int32)
    return torch.from_numpy(array.view(np.uint8)).to(device)


def _forward(name: str, plan: DecodePlan | PrefillPlan, device: torch.device) -> HostCase:
    ratio, head_dim = plan.compress_ratio, 512
    parts = 2 if ratio == 4 else 1
    num_tokens = BATCH if plan.is_decode else BATCH * DRAFTS
    kv_score = torch.randn(num_tokens, 2 * parts * head_dim, device=device)
    ape = torch.randn(parts * ratio, head_dim, device=device)
    pages = BATCH * RINGS[ratio] // ratio
    states = _layers(torch.zeros(pages + LAYERS, ratio, 2 * parts * head_dim, device=device), pages)
    turn = itertools.cycle(states)

    def adapter() -> None:
        sglang.compress_forward(
            next(turn), kv_score, ape, plan, head_dim=head_dim, compress_ratio=ratio
        )

    views = itertools.cycle([kept.state_views(state) for state in states])
    plain_ape = kept.kvfold_ape(ape, ratio, torch.float32).tensor
    if isinstance(plan, DecodePlan):
        return HostCase(name, adapter, _decode_ops(plan, kv_score, plain_ape, views.__next__))
    return HostCase(name, adapter, _verify_ops(plan, kv_score, plain_ape, views.__next__))


def _decode_ops(
    plan: DecodePlan, kv_score: Tensor, ape: Tensor, state: Callable[[], tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    output, requests = torch.empty(BATCH, 512, device=ape.device), prepare.decode_metadata(plan)
    r = requests.requests

    def ops() -> None:
        kvfold.paged_kv_compress(
            kv_score, ape, *state(), r.block_table, r.block_table, output, r.kv_lens,
            r.cu_seq_lens, r.cu_outputs, plan.compress_ratio, 1, ape_in_state=False,
        )  # fmt: skip

    return ops


def _verify_ops(
    plan: PrefillPlan, kv_score: Tensor, ape: Tensor, state: Callable[[], tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    output = torch.empty(plan.plan_c.size(0), 512, device=ape.device)
    metadata = prepare.prefill_metadata(plan, kv_score.size(0))
    reduce, store, ratio = metadata.reduce, metadata.store, plan.compress_ratio

    def ops() -> None:
        kv, score = state()
        kvfold.prefill_compress(
            kv_score, ape, kv, score, reduce.block_table, reduce.block_table, output,
            reduce.kv_lens, reduce.cu_seq_lens, reduce.cu_outputs, ratio, ape_in_state=False,
            work="reduce",
        )  # fmt: skip
        kvfold.paged_kv_compress(
            kv_score, ape, kv, score, store.block_table, store.block_table, output,
            store.kv_lens, store.cu_seq_lens, store.cu_outputs, ratio, 1, ape_in_state=False,
            work="store",
        )  # fmt: skip

    return ops


def _store(layout: str, device: torch.device) -> HostCase:
    plan, head_dim, page_size = _decode_plan(4, device), HEAD_DIM[layout], 64
    row_bytes, format, rounding = {
        "584": (584, "mixed_584", "codes_from_bf16"),
        "index fp8": (132, "fp8_block128_floor", "once"),
    }[layout]
    stride = -(-row_bytes * page_size // 576) * 576 if layout == "584" else row_bytes * page_size
    caches = _layers(torch.zeros(8 + LAYERS, stride, dtype=torch.uint8, device=device), 8)
    rows, weight = torch.randn(BATCH, head_dim, device=device), torch.ones(head_dim, device=device)
    freq_cis = torch.polar(torch.ones(2048, 32), torch.rand(2048, 32)).to(device)
    out_loc = torch.arange(BATCH, device=device)
    turn, again = itertools.cycle(caches), itertools.cycle(caches)

    def adapter() -> None:
        sglang.compress_norm_rope_store(
            rows, plan, norm_weight=weight, norm_eps=1e-6, freq_cis=freq_cis, out_loc=out_loc,
            kvcache=next(turn), page_size=page_size,
        )  # fmt: skip

    table, positions = kept.rope_table(freq_cis), prepare.decode_metadata(plan).positions

    def ops() -> None:
        kvfold.norm_rope_store(
            rows, weight, table, positions, out_loc, next(again), 1e-6, page_size, format,
            rounding=rounding, rotate=head_dim == 128,
        )  # fmt: skip

    return HostCase(f"store {layout}", adapter, ops)


def _layers(storage: Tensor, length: int) -> list[Tensor]:
    """A tensor per layer: parts of one storage, which overlap."""
    return [storage[i : i + length] for i in range(LAYERS)]
