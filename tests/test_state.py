"""live_rows, and a request that goes on in another pool with these rows alone."""

import itertools
import re
from pathlib import Path

import pytest
import torch

import kvfold

DOCUMENT = (Path(__file__).parents[1] / "docs" / "state.md").read_text()
OVERLAPS = [(128, False), (4, True), (4, False), (2, False), (1, True)]


@pytest.mark.parametrize(("ratio", "overlap"), OVERLAPS)
@pytest.mark.parametrize("max_rollback", [0, 1, 5, 300])
@pytest.mark.parametrize("state_period", [0, 3, 16, 200])
def test_the_rows_are_those_of_the_contract(ratio, overlap, max_rollback, state_period):
    for length in (0, 1, 3, 4, 5, 127, 128, 129, 263, 512):
        found = kvfold.live_rows(
            length, ratio, overlap=overlap, max_rollback=max_rollback, state_period=state_period
        )
        # Position by position, by the words of write_state="tail".
        first = ((length - max_rollback) // ratio - overlap) * ratio
        periods = range(state_period, length + 1, state_period) if state_period else ()
        wanted = [
            p
            for p in range(length)
            if p >= first or any((m // ratio - overlap) * ratio <= p < m for m in periods)
        ]
        assert [p for part in found for p in part] == wanted
        assert all(a.stop < b.start for a, b in itertools.pairwise(found))
        assert all(len(part) > 0 for part in found)


def test_ratio_4_overlaps_by_default_and_others_do_not():
    assert kvfold.live_rows(9, 4) == [range(4, 9)]
    assert kvfold.live_rows(9, 4, overlap=False) == [range(8, 9)]
    assert kvfold.live_rows(9, 8) == [range(8, 9)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": -1}, "length is -1; accepted: an int, 0 or more"),
        ({"length": 3.0}, "length is 3.0; accepted: an int, 0 or more"),
        ({"compress_ratio": 0}, "compress_ratio is 0; accepted: an int, 1 or more"),
        ({"max_rollback": True}, "max_rollback is True; accepted: an int, 0 or more"),
        ({"state_period": "4"}, "state_period is '4'; accepted: an int, 0 or more"),
        ({"overlap": 1}, "overlap is 1; accepted: True, False, None"),
    ],
)
def test_wrong_arguments_are_named(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        kvfold.live_rows(**({"length": 8, "compress_ratio": 4} | changes))


# ---- a request that moves ------------------------------------------------------------------------

HEAD_DIM, NEXT_N = 16, 3


class Pool:
    """The paged state of one request, and its tokens' kv_score."""

    def __init__(self, ratio: int, overlap: bool, page_size: int, pages: int, seed: int):
        random = torch.Generator().manual_seed(seed)
        self.ratio, self.page_size = ratio, page_size
        self.state_dim = HEAD_DIM * (1 + overlap)
        # NaN shows a row that is read and was not copied.
        size = (pages + 3, page_size, self.state_dim)
        self.kv, self.score = (torch.full(size, torch.nan) for _ in range(2))
        self.table = torch.randperm(pages + 3, generator=random)[None, :pages].int()

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and slot of positions."""
        return self.table[0, positions // self.page_size].long(), positions % self.page_size

    def call(
        self, op, kv_score: torch.Tensor, ape: torch.Tensor, start: int, end: int, *more, **kw
    ):
        """Runs an op on tokens `start` to `end`; returns the rows of windows that close."""
        windows = end // self.ratio - start // self.ratio
        output = torch.zeros(windows, HEAD_DIM)
        op(
            kv_score[start:end], ape, self.kv, self.score, self.table, self.table, output,
            torch.tensor([end], dtype=torch.int32),
            torch.tensor([0, end - start], dtype=torch.int32),
            torch.tensor([0, windows], dtype=torch.int32),
            self.ratio, *more, **kw,
        )  # fmt: skip
        return output


@pytest.mark.parametrize(("ratio", "overlap"), [(128, False), (4, True), (8, False)])
@pytest.mark.parametrize("length", [1, 130, 251])
@pytest.mark.parametrize("rejected", [0, 2])
def test_a_request_goes_on_in_another_pool_with_these_rows_alone(ratio, overlap, length, rejected):
    tokens = length + 2 * ratio + 9
    here = Pool(ratio, overlap, page_size=8, pages=-(-tokens // 8), seed=0)
    there = Pool(ratio, overlap, page_size=32, pages=-(-tokens // 32), seed=1)
    random = torch.Generator().manual_seed(2)
    kv_score = torch.randn(tokens, 2 * here.state_dim, generator=random)
    ape = torch.randn(ratio, here.state_dim, generator=random)
    here.call(kvfold.prefill_compress, kv_score, ape, 0, length, write_state="all")

    parts = kvfold.live_rows(length, ratio, overlap=overlap, max_rollback=rejected)
    positions = torch.cat([torch.arange(part.start, part.stop) for part in parts])
    there.kv[there.rows(positions)] = here.kv[here.rows(positions)]
    there.score[there.rows(positions)] = here.score[here.rows(positions)]

    start, rows = max(0, length - rejected), 0
    kv_score[start:] = torch.randn(tokens - start, 2 * here.state_dim, generator=random)
    for first in range(start, tokens - NEXT_N, NEXT_N):
        outputs = [
            pool.call(kvfold.paged_kv_compress, kv_score, ape, first, first + NEXT_N, NEXT_N)
            for pool in (here, there)
        ]
        assert outputs[0].isfinite().all()
        assert torch.equal(*outputs)
        rows += len(outputs[0])
    assert rows >= 2


def test_the_example_of_the_document_runs():
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["tail"] == [range(896, 1000)]
    assert names["pairs"] == [range(996, 1000)]
    assert names["positions"].tolist() == list(range(988, 1000))
    assert names["shared"][:2] == [range(64), range(128, 192)]
