"""Small calls of paged_kv_compress for tests: built to order, random, and with broken metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvfold.bench.cases import DTYPES, Arguments

MUTATED = ("paged_kv", "paged_score", "output")
LAYOUTS = ("split", "packed", "strided")
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
GUARD = 32  # elements before and after a tensor in its storage: whole 16 bytes


class Problem(Arguments):
    """The arguments of one call."""

    @property
    def key(self) -> dict:
        """The table's problem fields, name -> value."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {
            "head_dim": self.output.size(1),
            "compress_ratio": self.compress_ratio,
            "overlap": self.paged_kv.size(2) != self.output.size(1),
            "kv_dtype": names[self.kv_score.dtype],
            "state_dtype": names[self.paged_kv.dtype],
            "next_n": self.next_n,
        }

    def clone(self, device: str | torch.device | None = None) -> Problem:
        """A copy with storages of its own, laid out, overlapping and guarded as these are."""
        storages: dict[int, torch.UntypedStorage] = {}

        def copy(x: Tensor) -> Tensor:
            old = x.untyped_storage()
            if old.data_ptr() not in storages:
                flat = _bytes(old, x.device).to(device or x.device, copy=True)
                storages[old.data_ptr()] = flat.untyped_storage()
            new = storages[old.data_ptr()]
            like = torch.empty(0, dtype=x.dtype, device=new.device)
            return like.set_(new, x.storage_offset(), x.size(), x.stride())

        return Problem(*(copy(x) if isinstance(x, Tensor) else x for x in self.args()))

    def alone(self, request: int) -> Problem:
        """The same call for one request only, on the same pools and tokens."""
        one, ends = slice(request, request + 1), slice(request, request + 2)
        return replace(
            self,
            block_table_kv=self.block_table_kv[one],
            block_table_score=self.block_table_score[one],
            kv_lens=self.kv_lens[one],
            cu_seq_lens=self.cu_seq_lens[ends],
            cu_outputs=self.cu_outputs[ends],
        )

    def outside(self) -> list[Tensor]:
        """The bytes of every storage, those that the op may write zeroed: guards, gaps, inputs."""
        copy = self.clone()
        for name in MUTATED:
            getattr(copy, name).zero_()
        tensors = [x for x in copy.args() if isinstance(x, Tensor)]
        return [_bytes(x.untyped_storage(), x.device).cpu() for x in tensors]


def make(
    spans: Sequence[tuple[int, int]],
    *,
    head_dim: int = 16,
    compress_ratio: int = 4,
    overlap: bool | None = None,
    kv_dtype: str = "bf16",
    state_dtype: str = "fp32",
    output_dtype: str | None = None,
    next_n: int = 4,
    page_size: int = 4,
    layout: str = "split",
    reserve: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Problem:
    """A well-formed problem of random data.

    spans holds each request's (start, new): it has start tokens and gets new ones. Pages are
    shuffled. The state before start is random and all else in the pools is NaN, as are the guards
    around every tensor and the gaps in it: whoever reads what it should not is found out.

    Layout 'packed' makes the two pools one, with one block table; 'strided' leaves a gap after
    every row, page and table row, another in each pool, and the metadata at odd addresses.
    reserve is the output rows per request, by default as many as it fills. The output's dtype is
    kv_dtype by default.
    """
    rng = np.random.default_rng(seed)
    overlap = compress_ratio == 4 if overlap is None else overlap
    state_dim = head_dim * (2 if overlap else 1)
    batch = len(spans)
    lens = [start + new for start, new in spans]
    closed = [(start + new) // compress_ratio - start // compress_ratio for start, new in spans]
    max_pages = max([-(-length // page_size) for length in lens], default=0) + 1
    num_pages = batch * max_pages + 1
    strided = layout == "strided"

    def randn(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def floats(x: Tensor, dtype: str, gaps: int = 1) -> Tensor:
        x = x.to(DTYPES[dtype])
        return _place(x, gap=gaps * 16 // x.element_size() if strided else 0)

    def ints(x: Sequence, gap: int = 0) -> Tensor:
        x = torch.as_tensor(np.asarray(x, np.int32))
        return _place(x, gap if strided else 0, odd=strided)

    def table() -> np.ndarray:
        return rng.permutation(num_pages)[: batch * max_pages].reshape(batch, max_pages)

    tables = [table(), table()]
    pools = [torch.full((num_pages, page_size, state_dim), torch.nan) for _ in range(2)]
    if layout == "packed":
        tables[1] = tables[0]
    for pages, pool in zip(tables, pools, strict=True):
        for b, (start, _) in enumerate(spans):
            position = np.arange(start)
            pool[pages[b, position // page_size], position % page_size] = randn(start, state_dim)
    if layout == "packed":
        paged_kv, paged_score = floats(torch.cat(pools, 2), state_dtype).split(state_dim, dim=2)
    else:
        paged_kv, paged_score = (floats(pools[i], state_dtype, gaps=1 + i) for i in range(2))
    tables = [ints(tables[i], gap=1 + i) for i in range(2)]

    problem = Problem(
        kv_score=floats(randn(sum(new for _, new in spans), 2 * state_dim), kv_dtype),
        ape=floats(randn(compress_ratio, state_dim), "fp32"),
        paged_kv=paged_kv,
        paged_score=paged_score,
        block_table_kv=tables[0],
        block_table_score=tables[0] if layout == "packed" else tables[1],
        output=floats(
            randn(sum(closed) if reserve is None else batch * reserve, head_dim),
            output_dtype or kv_dtype,
        ),
        kv_lens=ints(lens),
        cu_seq_lens=ints(np.cumsum([0] + [new for _, new in spans])),
        cu_outputs=ints(np.cumsum([0] + [reserve if reserve is not None else n for n in closed])),
        compress_ratio=compress_ratio,
        next_n=next_n,
    )
    return problem.clone(device)


def random_problem(seed: int, **fixed) -> Problem:
    """A well-formed problem with every field of make drawn at random, but for the fixed ones."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    drawn = {
        "head_dim": one_of(8, 16, 24, 64),
        "compress_ratio": one_of(1, 2, 4, 4, 5, 8, 16),
        "overlap": one_of(None, False, True),
        "kv_dtype": one_of(*DTYPES),
        "state_dtype": one_of(*DTYPES),
        "output_dtype": one_of(*DTYPES),
        "next_n": int(rng.integers(1, 7)),
        "page_size": one_of(1, 3, 4, 7, 16, 32),
        "layout": one_of(*LAYOUTS),
        "reserve": one_of(None, 8),
    } | fixed
    ratio, next_n = drawn["compress_ratio"], drawn["next_n"]
    spans = []
    for _ in range(rng.integers(1, 7)):
        new = int(rng.integers(next_n + 1))
        # Half of the requests are about to close a window.
        near = max(0, ratio * int(rng.integers(1, 4)) - int(rng.integers(new + 1)))
        start = one_of(near, int(rng.integers(3 * ratio + 1)))
        spans.append((start, new))
    return make(spans, **{"seed": seed} | drawn)


def scramble(problem: Problem, share: float, seed: int) -> Problem:
    """A copy with about that share of each metadata tensor's integers replaced by nonsense.

    Nonsense is any 32-bit integer, with the ends of ranges often. It aliases no two rows, for
    which there is no one right result: give the output rows to spare (make's reserve).
    """
    rng = np.random.default_rng(seed)
    problem = problem.clone()

    def spoil(x: Tensor, corners: Sequence[int]) -> None:
        nonsense = rng.integers(INT_MIN, INT_MAX, x.shape, endpoint=True)
        nonsense = np.where(rng.random(x.shape) < 0.5, rng.choice(corners, x.shape), nonsense)
        x.copy_(torch.from_numpy(np.where(rng.random(x.shape) < share, nonsense, x.cpu())))

    ends = [INT_MIN, INT_MIN + 1, -1, INT_MAX - 1, INT_MAX]
    near = [-2, 0, 1, 2, 3, 5, 8]
    spoil(problem.block_table_kv, [*ends, problem.paged_kv.size(0)])
    spoil(problem.block_table_score, [*ends, problem.paged_kv.size(0)])
    spoil(problem.kv_lens, ends + near)
    spoil(problem.cu_seq_lens, ends + near)
    spoil(problem.cu_outputs, [*ends, problem.output.size(0), problem.output.size(0) + 1])
    return problem


def _place(x: Tensor, gap: int, odd: bool = False) -> Tensor:
    """x in a guarded storage of its own, every outer stride wider by gap, at an odd address."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, size * strides[0] + gap)
    extent = x.size(0) * strides[0]
    fill = torch.nan if x.is_floating_point() else 0x5A5A5A5A
    flat = torch.full((GUARD + odd + extent + GUARD,), fill, dtype=x.dtype)
    return flat.as_strided(x.shape, strides, GUARD + odd).copy_(x)


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))
