"""Inputs of paged_kv_compress: one step of decoding, made to order."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

SCENARIOS = ("all-hit", "spread", "no-hit")
LAYOUTS = ("split", "packed")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Arguments:
    """The op's arguments, in its order."""

    kv_score: Tensor
    ape: Tensor
    paged_kv: Tensor
    paged_score: Tensor
    block_table_kv: Tensor
    block_table_score: Tensor
    output: Tensor
    kv_lens: Tensor
    cu_seq_lens: Tensor
    cu_outputs: Tensor
    compress_ratio: int
    next_n: int

    def args(self) -> tuple:
        """What `paged_kv_compress(*args)` takes."""
        return tuple(getattr(self, field.name) for field in fields(Arguments))


@dataclass(frozen=True)
class Case(Arguments):
    """The arguments of one call and what it does with them.

    Attributes:
        emitted: output rows the call writes.
        bytes: what it must move, as `must_move` counts.
    """

    emitted: int
    bytes: int

    @property
    def allocated(self) -> int:
        """Bytes of memory its tensors hold; views of one pool count once."""
        storages = [arg.untyped_storage() for arg in self.args() if isinstance(arg, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def lengths(
    scenario: str, batch: int, compress_ratio: int, next_n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens each request has before the step and new in it: two int64 arrays of [batch].

    all-hit: every request's window closes, on the last of its next_n new tokens.
    spread: request i ends at phase next_n*i mod compress_ratio, so that request 0 closes a window
        and, of many, next_n in compress_ratio do.
    no-hit: no window closes; where next_n tokens always close one, requests bring fewer.
    """
    request = np.arange(batch)
    new = next_n if scenario != "no-hit" else min(next_n, compress_ratio - 1)
    # A few windows in, so that there is history; more where a step is longer than a window.
    window_end = (-(-next_n // compress_ratio) + request % 3 + 1) * compress_ratio
    if scenario == "all-hit":
        end = window_end
    elif scenario == "spread":
        end = window_end + new * request % compress_ratio
    elif scenario == "no-hit":
        end = window_end + new + new * request % (compress_ratio - new)
    else:
        raise ValueError(f"scenario is {scenario!r}; accepted: {', '.join(SCENARIOS)}")
    return end - new, np.full(batch, new)


def must_move(
    start: np.ndarray,
    new: np.ndarray,
    *,
    head_dim: int,
    compress_ratio: int,
    overlap: bool,
    kv_size: int,
    state_size: int,
    output_size: int,
) -> int:
    """Bytes a step must move, each read or written once; sizes are bytes per element.

    new tokens x 2 state_dim x (kv_size read + state_size stored)
    + distinct positions mod compress_ratio among the new tokens x state_dim x 4 (ape)
    + for each window that closes: its rows older than this step x 2 head_dim x state_size
      (new rows come from kv_score) + head_dim x output_size.

    Lengths and block tables are not counted.
    """
    state_dim = head_dim * (2 if overlap else 1)
    end = start + new
    phases = {p % compress_ratio for s, e in zip(start, end, strict=True) for p in range(s, e)}
    total = int(new.sum()) * 2 * state_dim * (kv_size + state_size) + len(phases) * state_dim * 4
    for s, e in zip(start, end, strict=True):
        for window in range(s // compress_ratio, e // compress_ratio):
            first = max(0, (window - int(overlap)) * compress_ratio)
            old_rows = max(0, min(s, (window + 1) * compress_ratio) - first)
            total += int(old_rows) * 2 * head_dim * state_size + head_dim * output_size
    return total


def make(
    *,
    head_dim: int = 512,
    compress_ratio: int = 128,
    overlap: bool | None = None,
    kv_dtype: str = "bf16",
    state_dtype: str = "fp32",
    next_n: int = 4,
    batch: int = 16,
    scenario: str = "all-hit",
    page_size: int = 32,
    layout: str = "split",
    output_dtype: str = "bf16",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Makes one step. The same arguments make the same case, whatever output_dtype.

    Data are random, physical pages shuffled, unused block-table entries -1, output is NaN. Every
    request reserves as many output rows as its new tokens could close.

    Args:
        overlap: None for the table's rule, which is: compress_ratio 4 overlaps.
        scenario: 'all-hit', 'spread' or 'no-hit', see `lengths`.
        layout: 'split': paged_kv and paged_score are two pools with a block table each.
            'packed': views of one pool [num_pages, page_size, 2*state_dim], the tables equal.
        output_dtype, kv_dtype, state_dtype: 'bf16' or 'fp32'.

    Raises:
        ValueError: an unknown scenario or layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(LAYOUTS)}")
    overlap = compress_ratio == 4 if overlap is None else overlap
    state_dim = head_dim * (2 if overlap else 1)
    state = DTYPES[state_dtype]
    start, new = lengths(scenario, batch, compress_ratio, next_n)
    end = start + new
    closed = end // compress_ratio - start // compress_ratio
    reserved = -(-new // compress_ratio)

    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    def int32(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(device)

    def sums(counts: np.ndarray) -> Tensor:
        return int32(np.concatenate(([0], counts.cumsum())))

    pages = -(-end // page_size)
    in_use = np.arange(pages.max(initial=1)) < pages[:, None]

    def block_table() -> np.ndarray:
        table = np.full(in_use.shape, -1)
        table[in_use] = rng.permutation(int(pages.sum()))
        return table

    pool = (int(pages.sum()), page_size)
    table_kv = block_table()
    if layout == "packed":
        table_score = table_kv
        paged_kv, paged_score = random(*pool, 2 * state_dim, dtype=state).split(state_dim, dim=2)
    else:
        table_score = block_table()
        paged_kv, paged_score = (random(*pool, state_dim, dtype=state) for _ in range(2))
    return Case(
        kv_score=random(int(new.sum()), 2 * state_dim, dtype=DTYPES[kv_dtype]),
        ape=random(compress_ratio, state_dim, dtype=torch.float32),
        paged_kv=paged_kv,
        paged_score=paged_score,
        block_table_kv=int32(table_kv),
        block_table_score=int32(table_score),
        output=torch.full(
            (int(reserved.sum()), head_dim), torch.nan, dtype=DTYPES[output_dtype], device=device
        ),
        kv_lens=int32(end),
        cu_seq_lens=sums(new),
        cu_outputs=sums(reserved),
        compress_ratio=compress_ratio,
        next_n=next_n,
        emitted=int(closed.sum()),
        bytes=must_move(
            start,
            new,
            head_dim=head_dim,
            compress_ratio=compress_ratio,
            overlap=overlap,
            kv_size=DTYPES[kv_dtype].itemsize,
            state_size=state.itemsize,
            output_size=DTYPES[output_dtype].itemsize,
        ),
    )


METADATA = ("block_table_kv", "block_table_score", "kv_lens", "cu_seq_lens", "cu_outputs")


def sharing_metadata(case: Case, other: Case) -> Case:
    """The case with the lengths and block tables of another of the same problem, as one step's
    calls for a model's layers share them."""
    return replace(case, **{name: getattr(other, name) for name in METADATA})
