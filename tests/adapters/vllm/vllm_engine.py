"""vLLM's side of the compressor, written from its facts: batches and metadata, and an oracle.

A `Batcher` hands out pages and makes the metadata of steps as vLLM's scheduler, block tables and
slot mappings do. An `Oracle` goes through a step token by token, as vLLM's kernels do. Neither uses
the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import row_oracle
import torch
from torch import Tensor

import kvfold
from kvfold.codegen import load_table

NULL = 0  # vLLM's null block: what a table has where a request has no page
EPS = 1e-6
ROPE_DIM = 64
MAX_POS = 2048
FORMATS = load_table().formats


@dataclass(frozen=True)
class Kind:
    """A kind of compressor layer.

    Attributes:
        compress_ratio, head_dim: of the layer.
        block_size: rows of a page of the state.
        rows_per_page: of the cache.
        dtype, columns: of a row of the cache.
        alignment: pages start at multiples of so many bytes.
        format, rounding: what vLLM's CUDA kernels write, as a name of kvfold's table.
        scale: of the cache as a whole.
        kv_dtype, weight_dtype: of kv_score and of the norm's weight.
    """

    compress_ratio: int
    head_dim: int
    block_size: int
    rows_per_page: int
    dtype: torch.dtype
    columns: int
    alignment: int
    format: str
    rounding: str
    scale: float | None = None
    kv_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.bfloat16

    @property
    def width(self) -> int:
        """Columns of KV, and as many of scores, of a token."""
        return self.head_dim * (2 if self.compress_ratio == 4 else 1)

    @property
    def window(self) -> int:
        """Tokens that a window reads; vLLM keeps the pages of so many."""
        return self.compress_ratio * (2 if self.compress_ratio == 4 else 1)

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def page_stride(self) -> int:
        """Bytes from page to page: state and cache share one buffer, page by page."""
        state = self.block_size * 2 * self.width * 4
        needed = max(state, self.rows_per_page * self.row_bytes) + 1  # at least a gap
        return -(-needed // self.alignment) * self.alignment


_U8, _FP8 = torch.uint8, torch.float8_e4m3fn
KINDS = {
    "c4": Kind(4, 512, 4, 64, _U8, 584, 576, "mixed_584_scale_floor", "codes_from_bf16"),
    "c128": Kind(128, 512, 8, 2, _U8, 584, 576, "mixed_584_scale_floor", "codes_from_bf16"),
    "index_fp8": Kind(4, 128, 4, 64, _U8, 132, 576, "fp8_block128_pow2", "before_codes"),
    "index_fp4": Kind(4, 128, 4, 64, _U8, 68, 512, "mxfp4", "before_codes"),
    "c4_bf16": Kind(4, 512, 4, 64, torch.bfloat16, 512, 512, "bf16", "once"),
    "c128_bf16": Kind(128, 512, 8, 2, torch.bfloat16, 512, 512, "bf16", "once"),
    "c4_fp8": Kind(4, 512, 4, 64, _FP8, 512, 512, "fp8_tensor", "before_codes", 0.37),
    "c128_fp8": Kind(128, 512, 8, 2, _FP8, 512, 512, "fp8_tensor", "before_codes"),
    # Pages that do not end where windows do.
    "index_pages_6": Kind(4, 128, 6, 64, _U8, 132, 576, "fp8_block128_pow2", "before_codes"),
    "c4_bf16_in": Kind(
        4, 512, 4, 64, _U8, 584, 576, "mixed_584_scale_floor", "codes_from_bf16",
        kv_dtype=torch.bfloat16, weight_dtype=torch.float32,
    ),
}  # fmt: skip


# ---- what vLLM gives a layer ---------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer's tensors. State and cache are views of one buffer; every byte of it is compared."""

    kind: Kind
    ape: Tensor
    weight: Tensor
    cos_sin_cache: Tensor
    buffer: Tensor

    @classmethod
    def make(cls, kind: Kind, num_blocks: int, seed: int = 0) -> Layer:
        """A layer with a state full of NaN and random bytes elsewhere."""
        rng = torch.Generator().manual_seed(seed)
        angle = torch.rand(MAX_POS, ROPE_DIM // 2, generator=rng) * 6.3
        buffer = torch.randint(
            0, 256, (num_blocks * kind.page_stride,), dtype=torch.uint8, generator=rng
        )
        layer = cls(
            kind,
            torch.randn(kind.compress_ratio, kind.width, generator=rng),
            (1 + torch.randn(kind.head_dim, generator=rng) / 4).to(kind.weight_dtype),
            torch.cat([angle.cos(), angle.sin()], dim=1),
            buffer,
        )
        for block in range(0, num_blocks, 2):
            layer.state_cache[block] = torch.nan
        return layer

    def to(self, device: str) -> Layer:
        """A copy with memory of its own."""
        fields = ("ape", "weight", "cos_sin_cache", "buffer")
        return replace(self, **{f: getattr(self, f).to(device, copy=True) for f in fields})

    @property
    def num_blocks(self) -> int:
        return self.buffer.numel() // self.kind.page_stride

    @property
    def state_cache(self) -> Tensor:
        """[blocks, block_size, 2 * width], fp32. Even blocks belong to the state."""
        kind = self.kind
        shape = (self.num_blocks, kind.block_size, 2 * kind.width)
        stride = (kind.page_stride // 4, 2 * kind.width, 1)
        return self.buffer.view(torch.float32).as_strided(shape, stride)

    @property
    def kv_cache(self) -> Tensor:
        """[blocks, rows_per_page, columns]. Odd blocks belong to the cache."""
        kind = self.kind
        shape = (self.num_blocks, kind.rows_per_page, kind.columns)
        stride = (kind.page_stride // kind.dtype.itemsize, kind.columns, 1)
        return self.buffer.view(kind.dtype).as_strided(shape, stride)

    @property
    def fp8_scale(self) -> Tensor | None:
        scale = self.kind.scale
        return None if scale is None else torch.tensor([scale], device=self.ape.device)


@dataclass(frozen=True)
class Batch:
    """A step: new tokens and metadata, as vLLM's builders have them."""

    kv_score: Tensor
    positions: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    cache_slot_mapping: Tensor
    max_query_len: int

    def to(self, device: str) -> Batch:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


# ---- what vLLM's scheduler does ------------------------------------------------------------------


@dataclass
class Request:
    """Tokens and pages of a request. A page of the state that is no longer needed is NULL."""

    length: int = 0
    state_pages: list[int] = field(default_factory=list)
    cache_pages: list[int] = field(default_factory=list)


class Batcher:
    """Requests that are fed in steps, and their pages."""

    def __init__(self, kind: Kind, num_blocks: int, seed: int = 0) -> None:
        self.kind = kind
        self.requests: dict[str, Request] = {}
        self._rng = np.random.default_rng(seed)
        blocks = self._rng.permutation(np.arange(1, num_blocks))
        self._state_blocks = [int(b) for b in blocks if b % 2 == 0]
        self._cache_blocks = [int(b) for b in blocks if b % 2]

    def share(self, name: str, other: str, length: int) -> None:
        """A new request that has the first tokens of another one, in its pages: a prefix hit.

        They end with a page of the state, so that the two never write one page.
        """
        kind, source = self.kind, self.requests[other]
        assert length % kind.block_size == 0 and length <= source.length
        self.requests[name] = Request(
            length,
            source.state_pages[: length // kind.block_size],
            source.cache_pages[: length // (kind.compress_ratio * kind.rows_per_page)],
        )

    def step(
        self,
        new: Mapping[str, int],
        *,
        rejected: Mapping[str, int] | None = None,
        replayed: Mapping[str, int] | None = None,
        unstored_end: Mapping[str, int] | None = None,
        dummies: Sequence[int] = (),
        padding_requests: int = 0,
        padding_tokens: int = 0,
        max_query_len: int | None = None,
    ) -> Batch:
        """The batch of a step.

        Args:
            new: new tokens of requests, which come into being when first named.
            rejected: how many of these, from the end, are drafts that are rejected after the step.
            replayed: how many tokens before the new ones are computed again, without a slot.
            unstored_end: how many of the new tokens, from the end, have no slot. They are not
                counted as tokens of the request afterwards.
            dummies: requests without slots, with the pages of others, and so many tokens.
            padding_requests, padding_tokens: what a CUDA graph of a larger batch has.
        """
        kind, ratio = self.kind, self.kind.compress_ratio
        rejected, replayed, unstored_end = rejected or {}, replayed or {}, unstored_end or {}
        scores, positions, slots, cache_slots = [], [], [], []
        starts, lengths, tables = [0], [], []
        for name, count in new.items():
            request = self.requests.setdefault(name, Request())
            again, unstored = replayed.get(name, 0), unstored_end.get(name, 0)
            start, end = request.length, request.length + count
            self._reserve(request, end)
            scores.append(self._kv_score(again + count))
            for position in range(start - again, end):
                stored = start <= position < end - unstored
                page = request.state_pages[position // kind.block_size]
                slot = page * kind.block_size + position % kind.block_size
                window = position // ratio
                cache_page = request.cache_pages[window // kind.rows_per_page]
                cache_slot = cache_page * kind.rows_per_page + window % kind.rows_per_page
                closes = (position + 1) % ratio == 0
                positions.append(position)
                slots.append(slot if stored else -1)
                cache_slots.append(cache_slot if stored and closes else -1)
            starts.append(starts[-1] + count + again)
            lengths.append(end)
            tables.append(list(request.state_pages))
            request.length = end - max(rejected.get(name, 0), unstored)
        for count in dummies:
            scores.append(self._kv_score(count))
            positions += [0] * count
            slots += [-1] * count
            cache_slots += [-1] * count
            starts.append(starts[-1] + count)
            lengths.append(count)
            tables.append(tables[0] if tables else [])
        starts += [starts[-1]] * padding_requests
        lengths += [0] * padding_requests
        tables += [[]] * padding_requests
        scores.append(self._kv_score(padding_tokens))
        for column in (slots, cache_slots):
            column += [-1] * padding_tokens
        positions += [0] * padding_tokens
        columns = max([1, *(len(table) + 2 for table in tables)])
        block_table = torch.full((len(tables), columns), NULL, dtype=torch.int32)
        for row, table in zip(block_table, tables, strict=True):
            row[: len(table)] = torch.tensor(table, dtype=torch.int32)
        queries = np.diff(starts)
        return Batch(
            torch.cat(scores),
            torch.tensor(positions, dtype=torch.int64),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            block_table,
            torch.tensor(slots, dtype=torch.int64),
            torch.tensor(cache_slots, dtype=torch.int64),
            max_query_len or int(max([0, *queries])),
        )

    def _reserve(self, request: Request, end: int) -> None:
        """Pages for the tokens up to `end`; pages that no window reads any more are freed."""
        kind = self.kind
        while len(request.state_pages) * kind.block_size < end:
            request.state_pages.append(self._state_blocks.pop())
        per_page = kind.compress_ratio * kind.rows_per_page
        while len(request.cache_pages) * per_page < end:
            request.cache_pages.append(self._cache_blocks.pop())
        skipped = max(0, request.length - kind.window + 1) // kind.block_size
        others = [r for r in self.requests.values() if r is not request]
        for index in range(skipped):
            page, request.state_pages[index] = request.state_pages[index], NULL
            if page != NULL and not any(page in other.state_pages for other in others):
                self._state_blocks.insert(0, page)

    def _kv_score(self, tokens: int) -> Tensor:
        values = self._rng.standard_normal((tokens, 2 * self.kind.width), np.float32)
        values[:, self.kind.width :] *= 3
        # Some blocks of a row are so small that a floor decides on their scale.
        values[:, : self.kind.width : 3] *= 1e-6 if self._rng.random() < 0.1 else 1
        return torch.from_numpy(values).to(self.kind.kv_dtype)


# ---- what vLLM's kernels do ----------------------------------------------------------------------


def run_oracle(layer: Layer, batch: Batch, device: str = "cpu") -> int:
    """Does to a layer what vLLM's kernels do in a step; returns how many rows it stores.

    First every token with a slot goes to the state. Then every such token that closes a window
    reads the window's rows from the state. The sums of a window are those of a plain call of
    kvfold on `device`, because the order of a sum is not part of a format; they are compared with
    float64 sums here. Norm, RoPE, quantisation and store are row_oracle's. Layer and batch are on
    the CPU.
    """
    kind, state = layer.kind, layer.state_cache
    request = np.repeat(
        np.arange(len(batch.seq_lens)), np.diff(batch.query_start_loc.numpy())
    ).tolist()
    slots, positions = batch.slot_mapping.tolist(), batch.positions.tolist()
    kv, score = batch.kv_score.float().split(kind.width, dim=1)
    for token, slot in enumerate(slots):
        if slot >= 0:
            row = state[slot // kind.block_size, slot % kind.block_size]
            row[: kind.width] = kv[token]
            row[kind.width :] = score[token] + layer.ape[positions[token] % kind.compress_ratio]

    closing, windows = [], []
    for token, slot in enumerate(slots):
        position = positions[token]
        if slot < 0 or (position + 1) % kind.compress_ratio or batch.cache_slot_mapping[token] < 0:
            continue
        rows = []
        for p in range(max(0, position - kind.window + 1), position + 1):
            block = int(batch.block_table[request[token], p // kind.block_size])
            rows.append(state[block, p % kind.block_size])
        closing.append(token)
        windows.append(torch.stack(rows))
    if not closing:
        return 0
    compressed = compress(kind, [window.to(device) for window in windows]).cpu()
    for row, window in zip(compressed, windows, strict=True):
        torch.testing.assert_close(row.double(), exact(kind, window), atol=2e-5, rtol=0)
    position = np.array([positions[token] for token in closing])
    cos, sin = layer.cos_sin_cache.chunk(2, dim=1)
    cache = layer.buffer.view(layer.num_blocks, kind.page_stride).numpy()
    stored = row_oracle.store(
        compressed.numpy(),
        layer.weight.float().numpy(),
        torch.stack([cos, sin], dim=1).numpy(),
        position // kind.compress_ratio * kind.compress_ratio,
        batch.cache_slot_mapping[closing].numpy(),
        cache,
        EPS,
        kind.rows_per_page,
        FORMATS[kind.format],
        rounding=kind.rounding,
        rotate=False,
        scale=kind.scale,
    )
    return len(stored.which)


def exact(kind: Kind, window: Tensor) -> Tensor:
    """The compressed row of a window [rows, 2 * width], in float64."""
    kv, score = window.double().split(kind.width, dim=1)
    first = slice(0, kind.head_dim)
    last = slice(kind.width - kind.head_dim, kind.width)
    before = len(window) - kind.compress_ratio  # rows of the window before
    kv = torch.cat([kv[:before, first], kv[before:, last]])
    score = torch.cat([score[:before, first], score[before:, last]])
    return (kv * score.softmax(0)).sum(0)


def compress(kind: Kind, windows: Sequence[Tensor]) -> Tensor:
    """The compressed rows of windows, in fp32, by a plain call on a plain state.

    Each window is a request with no tokens before, and its rows are new tokens whose scores have
    ape already.
    """
    ratio, device = kind.compress_ratio, windows[0].device
    lengths = torch.tensor([len(window) for window in windows], dtype=torch.int32)
    begin = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
    closed = lengths // ratio
    rows = torch.nn.functional.pad(closed.cumsum(0, dtype=torch.int32), (1, 0))
    pool = torch.zeros(len(windows), kind.window, kind.width, device=device)
    table = torch.arange(len(windows), dtype=torch.int32, device=device)[:, None]
    output = torch.empty(int(rows[-1]), kind.head_dim, device=device)
    kvfold.prefill_compress(
        torch.cat(list(windows)),
        torch.zeros(ratio, kind.width, device=device),
        pool,
        pool.clone(),
        table,
        table,
        output,
        lengths.to(device),
        begin,
        rows.to(device),
        ratio,
    )
    return output[(rows[1:] - 1).long().to(device)]
