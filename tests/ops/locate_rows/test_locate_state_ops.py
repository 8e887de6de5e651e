"""The windows that locate_rows finds are those that the state ops reduce."""

import numpy as np
import pytest
import torch
from locate_calls import BEFORE, Call, run_op
from state_calls import INT_MAX, INT_MIN, make_arguments

import kvfold
from kvfold.ops.paged_kv_compress.spec import Arguments as DecodeArguments
from kvfold.ops.prefill_compress.spec import Arguments as PrefillArguments

NEXT_N = 4  # of decode
PAGE_ROWS = 3  # of the cache


def state_call(op: str, fields: dict) -> PrefillArguments | DecodeArguments:
    if op == "prefill":
        return PrefillArguments(**fields)
    return DecodeArguments(**fields, next_n=NEXT_N)


def run(op: str, call: PrefillArguments | DecodeArguments, **source: torch.Tensor) -> Call:
    """Runs a state op, and locate_rows with the same metadata, of which it returns the call."""
    args, kwargs = call.args_and_kwargs()
    (kvfold.prefill_compress if op == "prefill" else kvfold.paged_kv_compress)(*args, **kwargs)
    num_outputs = call.output.size(0)
    found = Call(
        kv_lens=call.kv_lens,
        cu_seq_lens=call.cu_seq_lens,
        cu_outputs=call.cu_outputs,
        positions=torch.full((num_outputs,), BEFORE, dtype=torch.int32),
        slots=torch.full((num_outputs,), BEFORE),
        compress_ratio=call.compress_ratio,
        rows_per_page=PAGE_ROWS,
        num_tokens=call.kv_score.size(0),
        next_n=NEXT_N if op == "decode" else -1,
        **source,
    )
    run_op(found)
    return found


OPS = pytest.mark.parametrize("op", ["prefill", "decode"])
BOTH_SOURCES = pytest.mark.parametrize("source", ["block_table", "token_slots"])


# ---- which rows ----------------------------------------------------------------------------------


def spoiled(values: torch.Tensor, share: float, rng: np.random.Generator) -> torch.Tensor:
    """A copy with about that share of the integers replaced by nonsense."""
    corners = [INT_MIN, INT_MAX, -1, 0, 1, 2, 3, 5, 8]
    nonsense = np.where(
        rng.random(values.shape) < 0.7,
        rng.choice(corners, values.shape),
        rng.integers(INT_MIN, INT_MAX, values.shape, endpoint=True),
    )
    chosen = rng.random(values.shape) < share
    return torch.from_numpy(np.where(chosen, nonsense, values)).to(torch.int32)


@OPS
@BOTH_SOURCES
@pytest.mark.parametrize("ratio", [1, 2, 4, 5])
@pytest.mark.parametrize("share", [0, 0.1, 0.4])
def test_a_state_op_fills_exactly_the_rows_that_have_a_position(op, source, ratio, share):
    filled = skipped = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        most = 7 if op == "decode" else 4 * ratio + 3  # decode skips a request of more than NEXT_N
        spans = [(int(rng.integers(3 * ratio)), int(rng.integers(most))) for _ in range(16)]
        fields = make_arguments(
            spans, head_dim=8, compress_ratio=ratio, output_dtype="fp32", seed=seed
        )
        for name in ("paged_kv", "paged_score"):
            fields[name].nan_to_num_(0)  # read by broken metadata
        for name in ("kv_lens", "cu_seq_lens"):
            fields[name] = spoiled(fields[name], share, rng)
        first = int(rng.integers(4))
        reserved = np.concatenate(([first], rng.integers(0, 4, len(spans))))
        num_outputs = first + int(rng.integers(1, 30))
        fields["cu_outputs"] = torch.from_numpy(reserved.cumsum()).to(torch.int32)
        fields["output"] = torch.full((num_outputs, 8), torch.nan)
        call = state_call(op, fields)
        if source == "block_table":
            table = torch.arange(len(spans) * 40, dtype=torch.int32).view(-1, 40)
            found = run(op, call, block_table_cache=table)
        else:
            found = run(op, call, token_slots=torch.arange(call.kv_score.size(0)))
        has_row = ~call.output.isnan().all(1)
        assert (~call.output.isnan()).all(1).equal(has_row)
        assert has_row[first:].equal(found.positions[first:] >= 0)
        assert not has_row[:first].any() and (found.positions[:first] == BEFORE).all()
        filled += int(has_row.sum())
        skipped += int((~has_row[first:]).sum())
    assert filled and skipped


# ---- which windows -------------------------------------------------------------------------------


class Serving:
    """Requests whose row of position p has the KV p. A window's row is its mean position."""

    def __init__(self, ratio: int, lengths: list[int]) -> None:
        self.ratio = ratio
        self.fields = make_arguments(
            [(0, length) for length in lengths],
            head_dim=8,
            compress_ratio=ratio,
            overlap=False,
            kv_dtype="fp32",
        )
        self.done = [0] * len(lengths)
        table = torch.randperm(len(lengths) * 40, generator=torch.Generator().manual_seed(ratio))
        self.table = table.int().view(len(lengths), 40)
        self.cache = torch.full((table.numel() * PAGE_ROWS,), torch.nan)

    def step(self, op: str, new: list[int], source: str) -> None:
        """Feeds tokens, and stores the rows of the windows that close at their slots."""
        end = [s + n for s, n in zip(self.done, new, strict=True)]
        position = torch.cat([torch.arange(s, e) for s, e in zip(self.done, end, strict=True)])
        closed = [e // self.ratio - s // self.ratio for s, e in zip(self.done, end, strict=True)]
        kv_score = torch.zeros(len(position), 16)
        kv_score[:, :8] = position[:, None]

        def prefix_sums(counts: list[int]) -> torch.Tensor:
            return torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)

        call = state_call(
            op,
            self.fields
            | {
                "ape": torch.zeros_like(self.fields["ape"]),
                "kv_score": kv_score,
                "output": torch.full((sum(closed) + 2, 8), torch.nan),
                "kv_lens": torch.tensor(end, dtype=torch.int32),
                "cu_seq_lens": prefix_sums(new),
                "cu_outputs": prefix_sums(closed),
            },
        )
        if source == "block_table":
            found = run(op, call, block_table_cache=self.table)
        else:
            found = run(op, call, token_slots=self.token_slots(new))
        row = found.positions >= 0
        assert (found.positions[~row] == -1).all()
        assert row.sum() == sum(closed)
        middle = found.positions[row] + (self.ratio - 1) / 2
        torch.testing.assert_close(call.output[row], middle[:, None].expand(-1, 8))
        self.cache[found.slots[row]] = call.output[row, 0]
        self.done = end

    def token_slots(self, new: list[int]) -> torch.Tensor:
        """The slots of new tokens: that of the window, for the last token of one."""
        slots = []
        for b, (start, n) in enumerate(zip(self.done, new, strict=True)):
            for p in range(start, start + n):
                window = p // self.ratio
                slot = int(self.table[b, window // PAGE_ROWS]) * PAGE_ROWS + window % PAGE_ROWS
                slots.append(slot if p % self.ratio == self.ratio - 1 else -1)
        return torch.tensor(slots)


@BOTH_SOURCES
@pytest.mark.parametrize("ratio", [1, 3, 8])
def test_the_cache_has_every_window_of_a_request_in_its_place(ratio, source):
    serving = Serving(ratio, [60, 31, 17])
    serving.step("prefill", [20, 0, 3], source)
    serving.step("prefill", [21, 13, 0], source)
    for new in ([1, 4, 0], [3, 2, 4], [0, 4, 4], [4, 1, 2], [2, 4, 4], [4, 3, 0], [4, 0, 0]):
        serving.step("decode", new, source)
    assert serving.done == [59, 31, 17]
    filled = 0
    for b, length in enumerate(serving.done):
        for window in range(length // ratio):
            slot = int(serving.table[b, window // PAGE_ROWS]) * PAGE_ROWS + window % PAGE_ROWS
            assert float(serving.cache[slot]) == pytest.approx(window * ratio + (ratio - 1) / 2)
            filled += 1
    assert int((~serving.cache.isnan()).sum()) == filled
