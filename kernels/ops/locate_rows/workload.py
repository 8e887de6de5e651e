"""How locate_rows is benchmarked and tested: the metadata of a step, and the contract in loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold.codegen import FieldSet, choice, integer
from kvfold.ops.locate_rows.spec import SPEC, UNBOUNDED, Arguments, Problem
from kvfold.ops.state_workload import CaseMaker
from kvfold.workload import EXACT, Case, Measurement, Workload

SCENARIOS = {
    "decode": "requests of 4 new tokens, of which one in compress_ratio / 4 closes a window",
    "prompts": "prompts that share the rows; every row is filled",
}
NEXT_N = 4  # new tokens of a request of decode
HISTORY = 1024  # windows that a request of decode has, at most
UNWRITTEN = -2  # no call leaves it in a row that it writes


@dataclass(frozen=True, kw_only=True)
class Options(FieldSet):
    """A case; the problem has no fields."""

    compress_ratio: int = integer(range(1, 4097), default=4, help="tokens per window")
    rows_per_page: int = integer(range(1, 4097), default=64, help="rows of a page of the cache")
    source: str = choice(
        "block_table", "token_slots", default="block_table", help="what the slots come from"
    )
    requests: int = integer(range(1, 4097), default=1, help="requests that share the rows; prompts")


def lengths(
    scenario: str, rows: int, options: Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each request has: tokens before the call, new ones, output rows; int64 [batch] each.

    decode: request i ends at phase 4*i mod compress_ratio, as in paged_kv_compress's scenario
        spread. Each reserves as many rows as its new tokens can close windows.
    prompts: request i begins at phase 7*i mod compress_ratio and fills its rows.
    """
    ratio = options.compress_ratio
    if scenario == "decode":
        each = -(-NEXT_N // ratio)
        request = np.arange(-(-rows // each))
        windows = -(-NEXT_N // ratio) + 17 * request % HISTORY
        start = windows * ratio + NEXT_N * request % ratio - NEXT_N
        reserved = np.full(len(request), each)
        reserved[-1] = rows - reserved[:-1].sum()
        return start, np.full(len(request), NEXT_N), reserved
    requests = min(options.requests, rows)
    reserved = np.full(requests, rows // requests)
    reserved[: rows - reserved.sum()] += 1
    return 7 * np.arange(requests) % ratio, reserved * ratio, reserved


def make(
    problem: Problem,
    rows: int,
    scenario: str,
    options: Options,
    device: torch.device | str,
    seed: int = 0,
) -> Case:
    """Makes one call. Pages and the slots of tokens are shuffled; positions and slots are -2.

    A call must move, each read or written once: the lengths, positions and slots, and an entry of
    the block table or of token_slots for each page or window that gets a row.
    """
    maker, rng = CaseMaker(device, seed), np.random.default_rng(seed)
    ratio = options.compress_ratio
    start, new, reserved = lengths(scenario, rows, options)
    end = start + new
    filled = np.minimum(end // ratio - start // ratio, reserved)

    table = token_slots = None
    if options.source == "block_table":
        max_pages = -(-int(end.max()) // (ratio * options.rows_per_page))
        table = maker.int32(rng.permutation(len(start) * max_pages).reshape(-1, max_pages))
        first = start // ratio // options.rows_per_page
        last = (start // ratio + filled - 1) // options.rows_per_page
        source_bytes = 4 * int((last - first + 1)[filled > 0].sum())
    else:
        token_slots = torch.from_numpy(rng.permutation(int(new.sum()))).to(device)
        source_bytes = 8 * int(filled.sum())
    arguments = Arguments(
        kv_lens=maker.int32(end),
        cu_seq_lens=maker.prefix_sums(new),
        cu_outputs=maker.prefix_sums(reserved),
        positions=torch.full((rows,), UNWRITTEN, dtype=torch.int32, device=device),
        slots=torch.full((rows,), UNWRITTEN, dtype=torch.int64, device=device),
        compress_ratio=ratio,
        rows_per_page=options.rows_per_page,
        num_tokens=int(new.sum()),
        next_n=NEXT_N if scenario == "decode" else UNBOUNDED,
        block_table_cache=table,
        token_slots=token_slots,
    )
    moved = 4 * (3 * len(start) + 2) + (4 + 8) * rows + source_bytes
    return Case(arguments=arguments, moved_bytes=moved, rows=rows)


def expected(arguments: Arguments) -> Mapping[str, Tensor]:
    """What a call must leave, if cu_outputs does not decrease: the contract, in plain loops."""
    a, ratio = arguments, arguments.compress_ratio
    positions, slots = a.positions.tolist(), a.slots.tolist()
    tokens, outputs = a.cu_seq_lens.tolist(), a.cu_outputs.tolist()
    table = None if a.block_table_cache is None else a.block_table_cache.tolist()
    token_slots = None if a.token_slots is None else a.token_slots.tolist()
    num_tokens = None if a.num_tokens == UNBOUNDED else a.num_tokens
    if num_tokens is None and token_slots is not None:
        num_tokens = len(token_slots)

    def slot_of(request: int, window: int, start: int) -> int:
        if table is not None:
            logical = window // a.rows_per_page
            page = table[request][logical] if logical < len(table[request]) else -1
            return page * a.rows_per_page + window % a.rows_per_page if page >= 0 else -1
        assert token_slots is not None
        token = tokens[request] + (window + 1) * ratio - 1 - start
        return token_slots[token] if token < len(token_slots) else -1

    for row in range(max(outputs[0], 0), len(positions)):
        positions[row] = slots[row] = -1
    for b, length in enumerate(a.kv_lens.tolist()):
        begin, end = tokens[b], tokens[b + 1]
        if a.new_tokens is not None:
            end = begin + int(a.new_tokens[b])
        new = end - begin
        if begin < 0 or not 0 <= new <= length or (num_tokens is not None and end > num_tokens):
            continue
        if a.next_n != UNBOUNDED and new > a.next_n:
            continue
        start = length - new
        for row in range(max(outputs[b], 0), min(outputs[b + 1], len(positions))):
            window = start // ratio + row - outputs[b]
            if window >= length // ratio:
                break
            positions[row], slots[row] = window * ratio, slot_of(b, window, start)
    return {
        "positions": torch.tensor(positions, dtype=torch.int32),
        "slots": torch.tensor(slots, dtype=torch.int64),
    }


_SOURCES = {"source": ["block_table", "token_slots"]}

WORKLOAD = Workload(
    spec=SPEC,
    options=Options,
    scenarios=SCENARIOS,
    defaults={},
    sizes=(64, 512, 4096, 32768),
    check_size=512,
    make=make,
    expected=expected,
    tolerances={"positions": EXACT, "slots": EXACT},
    suite=(
        Measurement(options={"compress_ratio": [4, 128]} | _SOURCES),
        Measurement(options={"requests": 64} | _SOURCES, scenarios=("prompts",)),
        Measurement(override={"backend": "triton"}),
    ),
)
