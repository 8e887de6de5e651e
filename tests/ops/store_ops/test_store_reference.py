"""The ops on a CPU: the bits of a state op and of norm_rope_store, and what must not change."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numerics import assert_same_bits
from store_calls import (
    ALL_OUTPUTS,
    DECODE,
    FLOATS,
    HEAD_DIMS,
    OPS,
    OUTPUTS,
    PREFETCH,
    PREFILL,
    ROPE_DIMS,
    STATE,
    WORK,
    StoreCall,
    assert_is,
    assert_stores,
    fits,
    make,
    outside_positions,
    outside_slots,
    random_call,
    run_op,
    run_state_op,
    spans_for,
    store_by_op,
    ways,
    with_scalars,
)
from store_feed import Feed

from kvfold.codegen import load_table
from kvfold.runtime.arguments import DTYPES

FORMATS = load_table().formats
WAYS = [(name, *way) for name, format in FORMATS.items() for way in ways(format)]
SWAPPED = ALL_OUTPUTS | {"latent_out": "bf16", "rows_out": "fp32"}
BOTH_OPS = pytest.mark.parametrize("op", OPS)


def by_two_ops(call: StoreCall) -> StoreCall:
    """A copy as the state op and norm_rope_store leave it."""
    return call.expected(run_state_op, store_by_op)


def assert_like_two_ops(call: StoreCall, what: str = "") -> None:
    assert_stores(run_op, call, by_two_ops(call), what)


def run(call: StoreCall, **scalars) -> StoreCall:
    """A copy of the call with other scalars, after its run."""
    call = with_scalars(call, **scalars)
    run_op(call)
    return call


def small(op: str, **fields) -> StoreCall:
    """A call with rows that windows fill and rows that none fills, each with a slot."""
    call = make(op, spans_for(op, 4), **{"reserve": 6, "outputs": ALL_OUTPUTS} | fields)
    assert call.work == "store" or 0 < call.stored().sum() < call.num_rows
    return call


# ---- the bits of the two ops ---------------------------------------------------------------------


@BOTH_OPS
@pytest.mark.parametrize(("name", "rounding", "rotate"), WAYS)
def test_every_format_and_rounding(op, name, rounding, rotate):
    head_dim = HEAD_DIMS[WAYS.index((name, rounding, rotate)) % 3]
    rope_dims = [one for one in ROPE_DIMS if fits(FORMATS[name], head_dim, one)]
    for rope_dim, dtype in itertools.product(rope_dims[-2:], FLOATS):
        call = make(
            op,
            [(3, 5), (6, 1), (0, 3)],
            head_dim=head_dim,
            format=name,
            rope_dim=rope_dim,
            rounding=rounding,
            rotate=rotate,
            row_dtype=dtype,
            weight_dtype=dtype,
            outputs=ALL_OUTPUTS if dtype == "bf16" else SWAPPED,
        )
        assert call.stored().sum() == 2
        assert_like_two_ops(call, f"head_dim {head_dim} rope_dim {rope_dim} {dtype}")


@BOTH_OPS
@pytest.mark.parametrize("ratio", [128, 4, 2])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_problem(op, ratio, head_dim):
    modes = itertools.cycle(itertools.product((True, False), FLOATS, ("split", "strided")))
    for kv_dtype, state_dtype in itertools.product(FLOATS, FLOATS):
        ape_in_state, row_dtype, layout = next(modes)
        call = make(
            op,
            spans_for(op, ratio) if ratio < 128 else [(127, 1), (250, 8), (64, 3), (0, 7)],
            head_dim=head_dim,
            compress_ratio=ratio,
            kv_dtype=kv_dtype,
            state_dtype=state_dtype,
            ape_in_state=ape_in_state,
            row_dtype=row_dtype,
            layout=layout,
            page_size=32,
            format="mixed_584",
            outputs=ALL_OUTPUTS,
        )
        assert call.stored().any()
        assert_like_two_ops(call, f"{kv_dtype} {state_dtype} {ape_in_state} {row_dtype} {layout}")


@pytest.mark.parametrize("next_n", range(1, 9))
@pytest.mark.parametrize("ratio", [128, 4, 2])
def test_every_next_n(next_n, ratio):
    spans = [(2 * ratio - late, new) for late, new in itertools.product((1, 2), (1, next_n))]
    call = make(DECODE, spans, compress_ratio=ratio, next_n=next_n, reserve=5, page_size=16)
    assert 0 < call.stored().sum() < call.num_rows
    assert_like_two_ops(call)


@pytest.mark.parametrize("ratio", [128, 4, 2])
@pytest.mark.parametrize("write_state", ["all", "tail"])
def test_prefills_of_several_windows(ratio, write_state):
    call = make(
        PREFILL,
        [(ratio // 2, 3 * ratio), (0, 2 * ratio + 1), (ratio, 0), (ratio - 1, 1)],
        compress_ratio=ratio,
        page_size=16,
        write_state=write_state,
        max_rollback=3,
        state_period=2 * ratio + 1,
    )
    assert call.stored().sum() == 6
    assert_like_two_ops(call)


@BOTH_OPS
@pytest.mark.parametrize("seed", range(60))
def test_random_calls(op, seed):
    assert_like_two_ops(random_call(op, seed))


@BOTH_OPS
def test_random_calls_have_rows_of_all_kinds(op):
    calls = [random_call(op, seed) for seed in range(120)]
    skipped = [(call.filled() & ~call.stored()).sum().item() for call in calls]
    unfilled = [(~call.filled() & (call.slots >= 0)).sum().item() for call in calls]
    assert sum(call.stored().sum().item() for call in calls) > 100
    assert sum(skipped) > 20 and sum(unfilled) > 100
    assert {call.work for call in calls} == set(WORK)


@BOTH_OPS
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_random_metadata(op, seed, share):
    """Nonsense in every table: rows are skipped or stored as by two ops, and guards stay."""
    assert_like_two_ops(random_call(op, seed).scrambled(share, seed))


# ---- what a call does not touch ------------------------------------------------------------------


@BOTH_OPS
def test_rows_that_no_window_fills_are_not_stored(op):
    call = small(op)
    after, filled = run(call), call.filled()
    layout = call.layout
    data, scales = layout.data_bytes, layout.scale_bytes
    assert data % 4 == 0 and layout.format.placement == "after_page"
    for row, slot in enumerate(call.slots.tolist()):
        page, place = divmod(slot, call.rows_per_page)
        for begin, width in (
            (place * data, data),
            (call.rows_per_page * data + place * scales, scales),
        ):
            at = page, slice(begin, begin + width)
            assert torch.equal(after.cache[at], call.cache[at]) != filled[row]
    for name in OUTPUTS:
        before, now = getattr(call, name), getattr(after, name)
        changed = (now != before).any(dim=1)
        assert torch.equal(changed, filled), name


@BOTH_OPS
@pytest.mark.parametrize("field", ["slots", "positions"])
def test_a_row_whose_slot_or_position_is_outside_is_skipped(op, field):
    call = small(op)
    outside = {
        "slots": outside_slots(call.cache.size(0) * call.rows_per_page),
        "positions": outside_positions(len(call.rope_table)),
    }[field]
    _, *rest = call.filled().nonzero()[:, 0].tolist()
    alone = call.clone()
    alone.slots[rest] = -1
    alone = run(alone)
    for value in outside:
        spoiled = call.clone()
        getattr(spoiled, field)[rest] = torch.from_numpy(np.array(value))
        after = run(spoiled)
        for name in ("cache", *OUTPUTS):
            assert torch.equal(getattr(after, name), getattr(alone, name)), f"{name} {value}"
        for name in STATE:
            assert_same_bits(getattr(after, name), getattr(alone, name), name)


@BOTH_OPS
def test_work_store_leaves_the_cache_and_the_outputs_alone(op):
    call = small(op)
    whole, stored = run(call), run(call, work="store")
    for name in STATE:
        assert_same_bits(getattr(stored, name), getattr(whole, name), name)
        assert not torch.equal(getattr(stored, name).nan_to_num(), getattr(call, name).nan_to_num())
    assert_is(stored, replace(call, paged_kv=stored.paged_kv, paged_score=stored.paged_score))


@BOTH_OPS
def test_work_reduce_leaves_the_state_alone(op):
    call = small(op)
    whole, reduced = run(call), run(call, work="reduce")
    for name in ("cache", *OUTPUTS):
        assert torch.equal(getattr(reduced, name), getattr(whole, name)), name
        assert not torch.equal(getattr(reduced, name), getattr(call, name)), name
    for name in STATE:
        assert_same_bits(getattr(reduced, name), getattr(call, name), name)


@BOTH_OPS
def test_reduce_then_store_is_all(op):
    call = small(op)
    both = run(run(call, work="reduce"), work="store")
    assert_is(replace(both, work="all"), run(call))


# ---- what a row's bytes depend on ----------------------------------------------------------------


@BOTH_OPS
@pytest.mark.parametrize("prefetch", PREFETCH)
def test_prefetch_changes_nothing(op, prefetch):
    assert_is(run(small(op), prefetch=prefetch), run(small(op)))


@BOTH_OPS
def test_outputs_change_no_byte_of_the_cache(op):
    without = run(small(op, outputs=()))
    for count in range(1, 5):
        for outputs in itertools.combinations(OUTPUTS, count):
            given = {name: getattr(small(op), name) for name in outputs}
            assert torch.equal(run(replace(small(op, outputs=()), **given)).cache, without.cache)


@BOTH_OPS
def test_row_dtype_is_what_a_row_is_rounded_to_before_the_norm(op):
    """A weight of 1, eps and no RoPE leave a row but for a factor, which latent_out shows."""
    narrow, wide = (
        run(
            small(
                op,
                format="fp32",
                rope_dim=0,
                kv_dtype="fp32",
                row_dtype=dtype,
                outputs={"latent_out": "fp32"},
            )
        )
        for dtype in FLOATS
    )
    filled = narrow.filled()
    reduced = narrow.num_rows, narrow.head_dim
    rows = {dtype: torch.empty(reduced, dtype=DTYPES[dtype]) for dtype in FLOATS}
    for dtype in FLOATS:
        run_state_op(small(op, kv_dtype="fp32").state_arguments(rows[dtype]))
    for call, x in ((narrow, rows["bf16"].float()), (wide, rows["fp32"])):
        x = x[filled].double()
        normed = x / (x.square().mean(1, keepdim=True) + call.eps).sqrt() * call.weight.double()
        got = call.latent_out[filled].double()
        torch.testing.assert_close(got, normed, rtol=2.0**-20, atol=0)
    assert not torch.equal(narrow.cache, wide.cache)


@BOTH_OPS
def test_the_memory_of_the_cache_changes_no_byte(op):
    plain = run(small(op, format="fp8_528_interleaved"))
    written = plain.cache != small(op, format="fp8_528_interleaved").cache
    for fields in ({"padding": 100}, {"padding": 16}, {"layout": "strided"}):
        other = run(small(op, format="fp8_528_interleaved", **fields))
        assert torch.equal(other.cache[written], plain.cache[written]), fields


# ---- runs of several calls -----------------------------------------------------------------------


RUNS = {
    "mixed_584": {"format": "mixed_584", "head_dim": 128, "row_dtype": "bf16"},
    "rotated": {"format": "fp8_block128", "head_dim": 128, "rotate": True, "row_dtype": "fp32"},
    "raw scores": {"format": "fp4_288", "head_dim": 256, "ape_in_state": False},
}


def feeds(ratio: int, name: str) -> tuple[Feed, Feed]:
    """Two runs of the same requests; the first has been fed everything in one call."""
    fields = {"compress_ratio": ratio, "kv_dtype": "fp32", "page_size": 16} | RUNS[name]
    lengths = [3 * ratio + 1, 2 * ratio, ratio - 1, 0]
    whole, parts = Feed(lengths, **fields), Feed(lengths, **fields)
    before = parts.whole.cache.clone()
    whole.feed(PREFILL, whole.left)
    assert not torch.equal(whole.whole.cache, before)
    return whole, parts


def assert_same_run(feed: Feed, whole: Feed, with_state: bool = True) -> None:
    assert not feed.left.any()
    assert torch.equal(feed.whole.cache, whole.whole.cache)
    for name in STATE if with_state else ():
        assert_same_bits(getattr(feed.whole, name), getattr(whole.whole, name), name)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("ratio", [128, 4, 2])
def test_chunks_give_the_bytes_of_the_whole_prompt(ratio, name):
    whole, parts = feeds(ratio, name)
    chunks = itertools.cycle([ratio - 1, 2, 1, ratio + 1, ratio // 2])
    while parts.left.any():
        parts.feed(PREFILL, [next(chunks) for _ in parts.left])
    assert_same_run(parts, whole)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("ratio", "most"), [(128, 1), (4, 1), (2, 1), (128, 8), (4, 3), (2, 8)])
def test_decode_gives_the_bytes_of_the_whole_prompt(ratio, most, name):
    whole, parts = feeds(ratio, name)
    while parts.left.any():
        parts.feed(DECODE, np.full(len(parts.left), most))
    assert_same_run(parts, whole)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("ratio", [4, 2])
def test_rejected_tokens_leave_no_trace_in_the_cache(ratio, name):
    """A tail of the prompt's state, then decode steps whose last tokens are rejected."""
    whole, parts = feeds(ratio, name)
    parts.feed(PREFILL, [ratio + 3, ratio, 0, 0], [3, 0], write_state="tail", max_rollback=3)
    steps = itertools.cycle([0, 3, 1, 2])
    while parts.left.any():
        wrong = np.array([next(steps) for _ in parts.left])
        # Wrong tokens at the end of a request are not followed by the right ones.
        parts.feed(DECODE, wrong + 2, np.where(parts.left >= wrong + 2, wrong, 0).tolist())
    assert_same_run(parts, whole, with_state=False)
