"""Steps of a vLLM engine for tests of the adapter, and runs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from vllm_engine import EPS, Batch, Batcher, Kind, Layer, Request, run_oracle

from kvfold.adapters.vllm import CompressorLayer, StepMetadata

BLOCKS = 400
Steps = Callable[[Kind], Iterator[Batch]]


def serving_steps(kind: Kind, seed: int = 0) -> Iterator[Batch]:
    """Prompts in chunks, decodes, drafts and rejections, padding, dummies: what V4 has."""
    ratio = kind.compress_ratio
    vllm = Batcher(kind, BLOCKS, seed)
    yield vllm.step({"a": 2 * ratio + 3, "b": 1, "c": ratio})
    yield vllm.step({"b": ratio - 2, "a": 1, "d": 2 * ratio - 1, "c": 3}, padding_tokens=5)
    yield vllm.step({"a": 1, "b": 1, "c": 1, "d": 1}, padding_requests=2, padding_tokens=2)
    yield vllm.step({"a": 4, "b": 4, "c": 4, "d": 4}, rejected={"a": 3, "b": 4, "d": 2})
    yield vllm.step({"d": 4, "b": 2, "a": 4}, dummies=[4, 1], padding_tokens=1)
    yield vllm.step({"c": ratio + 9, "a": 1}, dummies=[2 * ratio])
    for count in (8, 5, 2, 7, 3, 6):
        names = [name for name in "abcd" if count % 2 or name != "c"]
        rejected = dict.fromkeys(names[1::2], count // 2)
        yield vllm.step(dict.fromkeys(names, count), rejected=rejected)
    yield vllm.step({"e": 3 * ratio + 1, "b": 8, "a": ratio})


def replay_steps(kind: Kind, seed: int = 0) -> Iterator[Batch]:
    """The same with tokens without a slot beside others: prefix hits that are computed again."""
    ratio = kind.compress_ratio
    vllm = Batcher(kind, BLOCKS, seed)
    prefix = -(-(2 * ratio + ratio // 2) // kind.block_size) * kind.block_size
    yield vllm.step({"a": prefix})
    for name in "bcd":
        vllm.share(name, "a", prefix)
    yield vllm.step({"b": ratio, "a": 2, "c": 1}, replayed={"b": ratio + 3, "c": 2 * ratio})
    yield vllm.step({"d": 1, "b": 3, "c": 2}, replayed={"d": 5, "c": 1}, dummies=[3, 2])
    yield vllm.step(
        {"a": ratio, "d": 2, "b": 7}, replayed={"d": 4}, unstored_end={"a": 2, "b": 7},
        padding_requests=1, padding_tokens=9,
    )  # fmt: skip
    for count in (5, 4, 3, 2, 1):
        yield vllm.step(
            dict.fromkeys("abcd", count), replayed={"b": count % 3}, rejected={"c": count - 1},
            unstored_end={"d": count // 2},
        )  # fmt: skip
    yield vllm.step({"b": ratio + 1, "c": 2 * ratio}, replayed={"c": ratio})


def random_steps(kind: Kind, seed: int, count: int = 25) -> Iterator[Batch]:
    """Steps of up to 4 requests with all of the above, drawn at random."""
    rng = np.random.default_rng(seed)
    vllm = Batcher(kind, BLOCKS, seed)
    ratio, block = kind.compress_ratio, kind.block_size

    def few() -> int:
        return int(rng.integers(4) == 0) * int(rng.integers(1, 5))

    for number in range(count):
        if len(vllm.requests) < 4 and vllm.requests and rng.random() < 0.3:
            other = str(rng.choice(list(vllm.requests)))
            length = vllm.requests[other].length // block * block
            # Pages that no window of the other one reads any more may be gone.
            if length >= vllm.requests[other].length - block:
                vllm.share(f"shared {number}", other, length)
        elif len(vllm.requests) < 4:
            vllm.requests[f"new {number}"] = Request()
        names = [name for name in vllm.requests if rng.random() < 0.8]
        most = int(rng.choice([1, 2, 8, 2 * ratio]))
        new = {name: int(rng.integers(0, most + 1)) for name in names}
        replayed = {
            name: int(rng.integers(0, vllm.requests[name].length + 1))
            for name in names
            if rng.random() < 0.2
        }
        if most <= 8:
            replayed = {name: min(again, 8 - new[name]) for name, again in replayed.items()}
        unstored = {name: min(new[name], few()) for name in names}
        # A draft may be rejected that has a slot; the tokens without one come last.
        rejected = {name: min(new[name], unstored[name] + few()) for name in names}
        yield vllm.step(
            new, rejected=rejected, replayed=replayed, unstored_end=unstored,
            dummies=[few() for _ in range(few() // 2)], padding_requests=few(),
            padding_tokens=few(),
        )  # fmt: skip


def padded(batch: Batch, like: Iterable[Batch]) -> Batch:
    """The batch with the shapes of the largest of some batches, as a CUDA graph has them."""
    shapes = [(len(b.slot_mapping), *b.block_table.shape, b.max_query_len) for b in like]
    tokens, requests, columns, most = (max(sizes) for sizes in zip(*shapes, strict=True))
    tokens -= len(batch.slot_mapping)
    rows = requests - len(batch.seq_lens)
    pad = torch.nn.functional.pad
    return Batch(
        pad(batch.kv_score, (0, 0, 0, tokens)),
        pad(batch.positions, (0, tokens)),
        pad(batch.query_start_loc, (0, rows), value=int(batch.query_start_loc[-1])),
        pad(batch.seq_lens, (0, rows)),
        pad(batch.block_table, (0, columns - batch.block_table.size(1), 0, rows)),
        pad(batch.slot_mapping, (0, tokens), value=-1),
        pad(batch.cache_slot_mapping, (0, tokens), value=-1),
        most,
    )


def adapter_layer(layer: Layer) -> CompressorLayer:
    """The adapter's view of a layer."""
    return CompressorLayer(
        layer.ape,
        layer.state_cache,
        layer.weight,
        EPS,
        layer.cos_sin_cache,
        layer.kv_cache,
        layer.kind.compress_ratio,
        fp8_scale=layer.fp8_scale,
    )


def build(kind: Kind, batch: Batch, *, replays: bool = True) -> StepMetadata:
    """The adapter's metadata of a batch."""
    return StepMetadata.build(
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        batch.slot_mapping,
        batch.cache_slot_mapping,
        kind.block_size,
        kind.compress_ratio,
        batch.max_query_len,
        replays=replays,
    )


def run_steps(
    kind: Kind, batches: Iterable[Batch], *, replays: bool = True, device: str = "cpu"
) -> int:
    """Runs the adapter and the oracle step by step, and compares every byte of a layer.

    Returns:
        how many rows went to the cache.
    """
    expected = Layer.make(kind, BLOCKS)
    actual = expected.to(device)
    ours = adapter_layer(actual)
    rows = 0
    for number, batch in enumerate(batches):
        rows += run_oracle(expected, batch, device)
        there = batch.to(device)
        ours.compress_and_store(there.kv_score, build(kind, there, replays=replays))
        assert_same_bytes(actual, expected, f"step {number}")
    return rows


def assert_same_bytes(actual: Layer, expected: Layer, what: str) -> None:
    """State, cache, the gaps between pages and the null block are equal, byte by byte."""
    differs = actual.buffer.cpu() != expected.buffer.cpu()
    if differs.any():
        block, byte = divmod(int(differs.nonzero()[0]), expected.kind.page_stride)
        part = "cache" if block % 2 else "state"
        raise AssertionError(
            f"{what}: {int(differs.sum())} bytes differ; the first is byte {byte} of {part} page"
            f" {block}"
        )


def shifted(batch: Batch, tokens: int) -> Batch:
    """The batch behind so many tokens of padding: query_start_loc does not begin with 0."""
    pad = partial(torch.nn.functional.pad, pad=(tokens, 0), value=-1)
    return replace(
        batch,
        kv_score=torch.cat([batch.kv_score[:1].expand(tokens, -1), batch.kv_score]),
        positions=pad(batch.positions),
        query_start_loc=batch.query_start_loc + tokens,
        slot_mapping=pad(batch.slot_mapping),
        cache_slot_mapping=pad(batch.cache_slot_mapping),
    )
