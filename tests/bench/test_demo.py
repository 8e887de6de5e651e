"""The simulation of prefill and decode: passes with the ops, fails with a broken one."""

import numpy as np
import pytest

import kvfold
from kvfold.bench import demo
from kvfold.ops.norm_rope_store.op import norm_rope_store
from kvfold.ops.paged_kv_compress import reference
from kvfold.ops.paged_kv_compress.spec import Arguments
from kvfold.ops.prefill_compress import reference as prefill_reference
from kvfold.ops.prefill_compress.spec import Arguments as PrefillArguments


def test_a_short_run_is_right():
    steps = []
    done = demo.run(40, on_step=lambda: steps.append(1))
    assert done.wrong == 0 and done.first_wrong is None
    assert done.steps == len(steps) == 40
    assert done.rows > 500 and done.recomputed > 0
    assert done.prompt_tokens > 1000 and done.tokens > 1000
    assert 0 < done.largest_error < 1e-5
    assert done.device == "CPU" and done.backend == "reference"


def test_the_seed_decides_all():
    first, again, other = (demo.run(5, seed=seed) for seed in (3, 3, 4))
    assert (first.rows, first.largest_error) == (again.rows, again.largest_error)
    assert (first.rows, first.largest_error) != (other.rows, other.largest_error)


def no_store(*args):
    """Emits, but does not store the new tokens."""
    arguments = Arguments(*args)
    pools = arguments.paged_kv.clone(), arguments.paged_score.clone()
    reference.run(arguments)
    arguments.paged_kv.copy_(pools[0])
    arguments.paged_score.copy_(pools[1])


def no_output(*args):
    """Stores, but writes no row."""
    reference.run(Arguments(*args[:6], args[6].clone(), *args[7:]))


def imprecise(*args):
    """Is off by a thousandth."""
    reference.run(Arguments(*args))
    args[6].mul_(1.001)


def extra_rows(*args):
    """Also writes rows that no window fills."""
    reference.run(Arguments(*args))
    args[6].nan_to_num_(0)


@pytest.mark.parametrize("op", [no_store, no_output, imprecise, extra_rows])
def test_a_broken_decode_is_found(monkeypatch, op):
    monkeypatch.setattr(kvfold, "paged_kv_compress", op)
    done = demo.run(30)
    assert done.wrong > 0
    assert "request" in done.first_wrong and "ratio" in done.first_wrong


def prefill(*args, changed, **kwargs):
    """Prefills with some arguments changed."""
    prefill_reference.run(PrefillArguments(*args, **(kwargs | changed)))


def prefill_nothing(*args, **kwargs):
    """Neither stores nor emits."""


def prefill_without_state(*args, **kwargs):
    prefill(*args, **kwargs, changed={"work": "reduce"})


def prefill_without_rows(*args, **kwargs):
    prefill(*args, **kwargs, changed={"work": "store"})


def prefill_without_rollback(*args, **kwargs):
    """Does not store what a decode needs after a rejection."""
    prefill(*args, **kwargs, changed={"max_rollback": 0})


@pytest.mark.parametrize(
    "op",
    [prefill_nothing, prefill_without_state, prefill_without_rows, prefill_without_rollback],
)
def test_a_broken_prefill_is_found(monkeypatch, op):
    monkeypatch.setattr(kvfold, "prefill_compress", op)
    done = demo.run(30)
    assert done.wrong > 0
    assert "request" in done.first_wrong and "ratio" in done.first_wrong


def nowhere(*args, **kwargs):
    """Stores no row, or locates none."""


def in_another_place(*args):
    """Stores every row one place further."""
    args[4].add_(1)
    norm_rope_store(*args)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("norm_rope_store", nowhere),
        ("norm_rope_store", in_another_place),
        ("locate_rows", nowhere),
    ],
)
def test_a_broken_store_is_found(monkeypatch, name, op):
    monkeypatch.setattr(kvfold, name, op)
    assert demo.run(10).wrong > 0


def test_a_prompt_stores_only_its_tail(monkeypatch):
    asked = []

    def watched(*args, **kwargs):
        asked.append((kwargs["write_state"], kwargs["max_rollback"]))
        table, lengths, ratio = args[4], args[7].tolist(), args[10]
        overlap = int(args[2].size(2) != args[6].size(1))
        for row, length in zip(table, lengths, strict=True):
            first = max(0, ((length - demo.NEXT_N) // ratio - overlap) * ratio)
            pages = range(first // demo.PAGE_SIZE, (length - 1) // demo.PAGE_SIZE + 1)
            assert set((row >= 0).nonzero().flatten().tolist()) == set(pages if length else ())
        prefill(*args, **kwargs, changed={})

    monkeypatch.setattr(kvfold, "prefill_compress", watched)
    assert demo.run(10).wrong == 0
    assert set(asked) == {("tail", demo.NEXT_N)} and len(asked) > 2


def test_requests_come_roll_back_and_go():
    requests = demo.Requests(8, np.random.default_rng(0))
    sizes, padded, ragged, rejected = set(), 0, 0, set()
    for _ in range(200):
        prompts = requests.arrive()
        assert (prompts.start == 0).all()
        rejected |= set(prompts.new - requests.length[prompts.slot])
        step = requests.draft()
        active = step.slot >= 0
        assert len(step.slot) % demo.BATCH_STEP == 0 and len(step.slot) > 0
        assert (step.new[~active] == 0).all()
        before = requests.length[step.slot[active]]
        requests.accept(step)
        kept = requests.length[step.slot[active]] - before
        assert (kept >= 1).all() and (kept <= step.new[active]).all()
        sizes.add(len(step.slot))
        padded += (~active).sum()
        ragged += (step.new[active] < demo.NEXT_N).sum()
    assert len(sizes) > 1 and padded and ragged
    assert rejected == set(range(demo.NEXT_N + 1))
    assert requests.served > 8


def test_pages_are_shared_and_no_page_has_two_owners():
    pages = demo.Pages(3, 10, np.random.default_rng(0))
    pages.reserve(0, 0, 3)
    pages.reserve(1, 2, 4)
    kept = pages.table[0, 2:4].tolist()
    pages.reserve(0, 2, 5)
    assert pages.table[0, 2:4].tolist() == kept
    reserved = pages.table[pages.table >= 0].tolist()
    assert sorted(reserved + pages.free) == list(range(10))
    pages.reserve(0, 0, -1)
    assert (pages.table[0] == -1).all() and len(pages.free) == 7
