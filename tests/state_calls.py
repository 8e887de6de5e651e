"""What test calls of the state ops share: guard zones, well-formed arguments, broken metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from kvfold.runtime.arguments import DTYPES

LAYOUTS = ("split", "packed", "strided")
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
GUARD = 32  # elements before and after a tensor in its storage: whole 16 bytes


class Guarded:
    """A mixin for an op's Arguments: copies of a call, and what it must leave alone."""

    def clone(self, device: str | torch.device | None = None) -> Self:
        """A copy with storages of its own; strides, shared storages and guards are kept."""
        storages: dict[int, torch.UntypedStorage] = {}

        def copy(x: Tensor) -> Tensor:
            old = x.untyped_storage()
            if old._cdata not in storages:
                flat = _bytes(old, x.device).to(device or x.device, copy=True)
                storages[old._cdata] = flat.untyped_storage()
            new = storages[old._cdata]
            like = torch.empty(0, dtype=x.dtype, device=new.device)
            return like.set_(new, x.storage_offset(), x.size(), x.stride())

        return type(self)(*(copy(x) if isinstance(x, Tensor) else x for x in self.args()))

    def outside(self) -> list[Tensor]:
        """The bytes of every storage with the mutated tensors zeroed: guards, gaps and inputs."""
        copy = self.clone()
        for one in self.declared_tensors():
            if one.mutated:
                getattr(copy, one.name).zero_()
        tensors = [x for x in copy.args() if isinstance(x, Tensor)]
        return [_bytes(x.untyped_storage(), x.device).cpu() for x in tensors]

    def scrambled(self, share: float, seed: int) -> Self:
        """A copy with about that share of each metadata tensor's integers replaced by nonsense.

        Nonsense is any 32-bit integer; the ends of ranges are frequent. No physical page and no
        output row gets two writers, since a call with two has no single right result. The call must
        reserve output rows for all windows that its tokens can close, for each request.
        """
        rng = np.random.default_rng(seed)
        call = self.clone()

        def spoil(x: Tensor, corners: Sequence[int]) -> None:
            nonsense = rng.integers(INT_MIN, INT_MAX, x.shape, endpoint=True)
            nonsense = np.where(rng.random(x.shape) < 0.5, rng.choice(corners, x.shape), nonsense)
            x.copy_(torch.from_numpy(np.where(rng.random(x.shape) < share, nonsense, x.cpu())))

        ends = [INT_MIN, INT_MIN + 1, INT_MAX - 1, INT_MAX]
        near = [-2, -1, 0, 1, 2, 3, 5, 8]
        num_pages, num_outputs = call.paged_kv.size(0), call.output.size(0)
        spoil(call.block_table_kv, [*ends, -1, num_pages])
        spoil(call.block_table_score, [*ends, -1, num_pages])
        spoil(call.kv_lens, ends + near)
        spoil(call.cu_seq_lens, ends + near)
        if getattr(call, "new_tokens", None) is not None:
            spoil(call.new_tokens, ends + near)
        spoil(call.cu_outputs, [*ends, num_outputs, num_outputs + 1])
        return call


def make_arguments(
    spans: Sequence[tuple[int, int]],
    *,
    head_dim: int = 16,
    compress_ratio: int = 4,
    overlap: bool | None = None,
    kv_dtype: str = "bf16",
    state_dtype: str = "fp32",
    output_dtype: str | None = None,
    page_size: int = 4,
    layout: str = "split",
    reserve: int | None = None,
    seed: int = 0,
) -> dict:
    """The arguments that the state ops share, for a well-formed call on random data.

    Pages are shuffled. The state of the tokens before the call is random. The rest of the pools is
    NaN, as are the guards around every tensor and the gaps in it, so a wrong read shows in the
    result.

    Args:
        spans: each request's (tokens before the call, new tokens).
        overlap: by default true for compress_ratio 4.
        output_dtype: by default kv_dtype.
        layout: 'packed' makes the two pools halves of one pool, with one block table. 'strided'
            leaves a gap after every row, page and table row, a different one in each pool, and puts
            the metadata at odd addresses.
        reserve: output rows per request, by default as many as it fills.
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
        return guarded(x, gap=gaps * 16 // x.element_size() if strided else 0)

    def ints(x: Sequence, gap: int = 0) -> Tensor:
        x = torch.as_tensor(np.asarray(x, np.int32))
        return guarded(x, gap if strided else 0, odd=strided)

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
    return {
        "kv_score": floats(randn(sum(new for _, new in spans), 2 * state_dim), kv_dtype),
        "ape": floats(randn(compress_ratio, state_dim), "fp32"),
        "paged_kv": paged_kv,
        "paged_score": paged_score,
        "block_table_kv": tables[0],
        "block_table_score": tables[0] if layout == "packed" else tables[1],
        "output": floats(
            randn(sum(closed) if reserve is None else batch * reserve, head_dim),
            output_dtype or kv_dtype,
        ),
        "kv_lens": ints(lens),
        "cu_seq_lens": ints(np.cumsum([0] + [new for _, new in spans])),
        "cu_outputs": ints(np.cumsum([0] + [n if reserve is None else reserve for n in closed])),
        "compress_ratio": compress_ratio,
    }


def guarded(x: Tensor, gap: int = 0, odd: bool = False) -> Tensor:
    """x in a guarded storage of its own, each outer stride wider by gap.

    odd shifts it by one element from the alignment of its storage.
    """
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, size * strides[0] + gap)
    extent = x.size(0) * strides[0]
    fill = torch.nan if x.is_floating_point() else 0x5A5A5A5A
    flat = torch.full((GUARD + odd + extent + GUARD,), fill, dtype=x.dtype, device=x.device)
    return flat.as_strided(x.shape, strides, GUARD + odd).copy_(x)


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))
