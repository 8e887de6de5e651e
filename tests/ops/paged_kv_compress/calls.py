"""Small calls of paged_kv_compress for tests: made to order, random, and with broken metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.paged_kv_compress import workload
from kvfold.ops.paged_kv_compress.spec import Arguments, Problem
from kvfold.runtime.arguments import DTYPE_NAMES, DTYPES

MUTATED = ("paged_kv", "paged_score", "output")
LAYOUTS = ("split", "packed", "strided")
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
GUARD = 32  # elements before and after a tensor in its storage: whole 16 bytes


@dataclass(frozen=True)
class Call(Arguments):
    """The arguments of one call."""

    @property
    def problem(self) -> Problem:
        """What dispatch must find in the arguments."""
        return Problem(
            head_dim=self.output.size(1),
            compress_ratio=self.compress_ratio,
            overlap=self.paged_kv.size(2) != self.output.size(1),
            kv_dtype=DTYPE_NAMES[self.kv_score.dtype],
            state_dtype=DTYPE_NAMES[self.paged_kv.dtype],
            next_n=self.next_n,
        )

    def clone(self, device: str | torch.device | None = None) -> Call:
        """A copy with storages of its own; strides, shared storages and guards are kept."""
        storages: dict[int, torch.UntypedStorage] = {}

        def copy(x: Tensor) -> Tensor:
            old = x.untyped_storage()
            if old.data_ptr() not in storages:
                flat = _bytes(old, x.device).to(device or x.device, copy=True)
                storages[old.data_ptr()] = flat.untyped_storage()
            new = storages[old.data_ptr()]
            like = torch.empty(0, dtype=x.dtype, device=new.device)
            return like.set_(new, x.storage_offset(), x.size(), x.stride())

        return Call(*(copy(x) if isinstance(x, Tensor) else x for x in self.args()))

    def alone(self, request: int) -> Call:
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
        """The bytes of every storage with the mutated tensors zeroed: guards, gaps and inputs."""
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
) -> Call:
    """A well-formed call on random data.

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

    call = Call(
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
    return call.clone(device)


def random_call(seed: int, **fixed) -> Call:
    """A well-formed call with every argument of `make` drawn at random, but for the fixed ones."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    drawn = {
        "head_dim": one_of(8, 16, 24, 64),
        "compress_ratio": one_of(1, 2, 4, 4, 5, 8, 16),
        "overlap": one_of(None, False, True),
        "kv_dtype": one_of("bf16", "fp32"),
        "state_dtype": one_of("bf16", "fp32"),
        "output_dtype": one_of("bf16", "fp32"),
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


def scramble(call: Call, share: float, seed: int) -> Call:
    """A copy with about that share of each metadata tensor's integers replaced by nonsense.

    Nonsense is any 32-bit integer; the ends of ranges are frequent. No physical page and no output
    row gets two writers, since a call with two has no single right result. The call must reserve
    output rows to spare (`reserve`).
    """
    rng = np.random.default_rng(seed)
    call = call.clone()

    def spoil(x: Tensor, corners: Sequence[int]) -> None:
        nonsense = rng.integers(INT_MIN, INT_MAX, x.shape, endpoint=True)
        nonsense = np.where(rng.random(x.shape) < 0.5, rng.choice(corners, x.shape), nonsense)
        x.copy_(torch.from_numpy(np.where(rng.random(x.shape) < share, nonsense, x.cpu())))

    ends = [INT_MIN, INT_MIN + 1, -1, INT_MAX - 1, INT_MAX]
    near = [-2, 0, 1, 2, 3, 5, 8]
    spoil(call.block_table_kv, [*ends, call.paged_kv.size(0)])
    spoil(call.block_table_score, [*ends, call.paged_kv.size(0)])
    spoil(call.kv_lens, ends + near)
    spoil(call.cu_seq_lens, ends + near)
    spoil(call.cu_outputs, [*ends, call.output.size(0), call.output.size(0) + 1])
    return call


def decode_step(
    *,
    batch: int = 16,
    scenario: str = "all-hit",
    device: str | torch.device = "cpu",
    seed: int = 0,
    **fields,
) -> Call:
    """A case of the workload as a call. fields are problem fields and the case's options."""
    names = {field.name for field in Problem.fields()}
    problem = {name: value for name, value in fields.items() if name in names}
    options = {name: value for name, value in fields.items() if name not in names}
    case = workload.make(
        Problem.of(dict(workload.WORKLOAD.defaults) | problem),
        batch,
        scenario,
        workload.Options.of(options),
        device,
        seed,
    )
    return Call(*case.arguments.args())


def _place(x: Tensor, gap: int, odd: bool = False) -> Tensor:
    """x in a guarded storage of its own, each outer stride wider by gap.

    odd shifts it by one element from the alignment of its storage.
    """
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
