"""Compresses prompts on several ranks, and compares the rows with those of one rank bit by bit.

    torchrun --nproc-per-node 2 examples/ranks.py

Requests are split over the ranks, then one long prompt is. With a GPU per rank the ranks use NCCL,
otherwise gloo and the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import kvfold

HEAD_DIM = 128
PAGE_SIZE = 32
RATIOS = {128: 1, 4: 2}  # compress_ratio -> head_dims per row of the state; 2: windows overlap


def main() -> None:
    """Runs on every rank."""
    ranks = int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        for ratio in RATIOS:
            split_requests(ratio, device)
            split_prompt(ratio, device)
    finally:
        dist.destroy_process_group()


# ---- requests over ranks -------------------------------------------------------------------------


def split_requests(ratio: int, device: torch.device) -> None:
    """Every rank compresses the prompts of some requests."""
    prompts = [random_prompt(ratio, 37 + 211 * i, device, seed=i) for i in range(7)]
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = compress(ratio, prompts[rank::ranks])
    parts = gathered(mine)
    alone = compress(ratio, prompts)
    windows = [len(prompt) // ratio for prompt in prompts]
    wanted = alone.split(windows)
    for other, part in enumerate(parts):
        rows = part.split(windows[other::ranks])
        for found, expected in zip(rows, wanted[other::ranks], strict=True):
            assert torch.equal(found, expected)
    report(f"ratio {ratio}: {len(prompts)} requests on {ranks} ranks, {len(alone)} rows, same bits")


# ---- one prompt over ranks -----------------------------------------------------------------------


def split_prompt(ratio: int, device: torch.device) -> None:
    """Every rank compresses some windows of one prompt.

    Where windows overlap, a rank needs the rows of the window before its first one. The rank before
    it sends these tokens' kv_score. Its first window is then one that a rank in front has, too.
    """
    tokens = 31 * ratio + ratio // 2
    prompt = random_prompt(ratio, tokens, device, seed=1000)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    windows = tokens // ratio
    bounds = [windows * i // ranks * ratio for i in range(ranks)] + [tokens]
    mine = prompt[bounds[rank] : bounds[rank + 1]]  # all that this rank is given
    before = last_window_of_the_rank_before(mine, ratio) if RATIOS[ratio] > 1 else mine[:0]
    rows = compress(ratio, [torch.cat([before, mine])])[len(before) // ratio :]
    found = torch.cat(gathered(rows))
    assert torch.equal(found, compress(ratio, [prompt]))
    report(
        f"ratio {ratio}: a prompt of {tokens} tokens on {ranks} ranks, {windows} rows, same bits"
    )


def last_window_of_the_rank_before(mine: Tensor, ratio: int) -> Tensor:
    """kv_score of the tokens just before this rank's; none on the first rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = len(mine) // ratio * ratio
    sent = mine[whole - ratio : whole].contiguous()
    received = torch.empty_like(sent)
    calls = []
    if rank + 1 < ranks:
        calls.append(dist.P2POp(dist.isend, sent, rank + 1))
    if rank > 0:
        calls.append(dist.P2POp(dist.irecv, received, rank - 1))
    for work in dist.batch_isend_irecv(calls) if calls else ():
        work.wait()
    return received if rank > 0 else received[:0]


# ---- kvfold --------------------------------------------------------------------------------------


def random_prompt(ratio: int, tokens: int, device: torch.device, seed: int) -> Tensor:
    """kv_score of a prompt, the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    width = 2 * RATIOS[ratio] * HEAD_DIM
    return torch.randn(tokens, width, generator=random).to(torch.bfloat16).to(device)


def compress(ratio: int, prompts: Sequence[Tensor]) -> Tensor:
    """The compressed rows of prompts from an empty state, [windows, HEAD_DIM] in fp32."""
    device = prompts[0].device if prompts else torch.device("cpu")
    lengths = [len(prompt) for prompt in prompts]
    windows = [length // ratio for length in lengths]
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    state_dim = RATIOS[ratio] * HEAD_DIM
    ape = torch.linspace(-1, 1, ratio * state_dim, device=device).view(ratio, state_dim)
    state = torch.empty(2, max(1, sum(pages)), PAGE_SIZE, state_dim, device=device)
    table = torch.full((len(prompts), max(pages, default=1)), -1, dtype=torch.int32, device=device)
    for i, first in enumerate(sums(pages)[:-1]):
        table[i, : pages[i]] = torch.arange(first, first + pages[i], device=device)
    output = torch.empty(sum(windows), HEAD_DIM, device=device)
    width = 2 * state_dim
    kv_score = torch.cat([*prompts, torch.empty(0, width, dtype=torch.bfloat16, device=device)])
    kvfold.prefill_compress(
        kv_score, ape, state[0], state[1], table, table, output,
        ints(lengths, device), ints(sums(lengths), device), ints(sums(windows), device), ratio,
        write_state="tail",
    )  # fmt: skip
    return output


def sums(values: Sequence[int]) -> list[int]:
    """0, and the sums of the first values."""
    return [sum(values[:i]) for i in range(len(values) + 1)]


def ints(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# ---- ranks ---------------------------------------------------------------------------------------


def gathered(rows: Tensor) -> list[Tensor]:
    """The rows of every rank, which may have different numbers of them."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    most = max(int(one) for one in counts)
    padded = rows.new_zeros(most, rows.size(1))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[: int(one)] for part, one in zip(parts, counts, strict=True)]


def report(line: str) -> None:
    """Prints a line once."""
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
