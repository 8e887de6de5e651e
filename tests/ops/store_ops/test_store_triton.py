"""The Triton kernels of both steps: compiled where there is a GPU, else interpreted."""

import itertools
from dataclasses import replace

import pytest
import torch
from store_calls import (
    ALL_OUTPUTS,
    DECODE,
    FLOATS,
    OPS,
    OUTPUTS,
    PREFILL,
    STATE,
    WORK,
    StoreCall,
    assert_is,
    assert_stores,
    by_variant,
    make,
    random_call,
    run_variant,
    variant_of,
    ways,
    with_scalars,
)

from kvfold.codegen import Variant, load_table
from kvfold.ops.two_steps import filled_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = load_table().formats
BOTH_OPS = pytest.mark.parametrize("op", OPS)

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def variant(call: StoreCall, **tuning) -> Variant:
    """A Triton variant for the call, of one slice where the window is small."""
    tuning = {"reduce_warps": 4, "head_slice": 128 if call.compress_ratio < 128 else 32} | tuning
    return variant_of(call, "triton", **tuning)


def run(call: StoreCall) -> None:
    run_variant(variant(call), call)


def assert_like_the_state_op_and_the_reference(call: StoreCall) -> None:
    """The bits are those of the Triton variant of the state op and of the rows' reference."""
    assert_stores(run, call, by_variant(variant(call), call))


def small(op: str, **fields) -> StoreCall:
    """A call with rows that windows fill and rows that none fills, each with a slot."""
    fields = {"outputs": ALL_OUTPUTS, "reserve": 3, "device": DEVICE} | fields
    return make(op, [(3, 5), (6, 1), (0, 0), (0, 3)], **fields)


@BOTH_OPS
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(op, name):
    """The roundings in turn; norm_rope_store's own tests try all of them."""
    number = list(FORMATS).index(name)
    rounding, rotate = ways(FORMATS[name])[number % len(ways(FORMATS[name]))]
    call = small(
        op, format=name, rounding=rounding, rotate=rotate, row_dtype=FLOATS[number % 2],
        weight_dtype=FLOATS[number // 2 % 2], reserve=2,
    )  # fmt: skip
    assert_like_the_state_op_and_the_reference(call)


@BOTH_OPS
@pytest.mark.parametrize("seed", range(8))
def test_random_calls(op, seed):
    call = random_call(op, seed, head_dim=128, compress_ratio=(2, 4, 4, 8)[seed % 4], device=DEVICE)
    assert_like_the_state_op_and_the_reference(call)


@BOTH_OPS
@pytest.mark.parametrize(("ratio", "head_dim"), [(2, 512), (4, 512), (4, 256), (128, 128)])
def test_every_shape_of_the_table(op, ratio, head_dim):
    spans = [(2 * ratio - 1, 1), (ratio - 2, 3), (5, 1)]
    call = make(
        op, spans, compress_ratio=ratio, head_dim=head_dim, page_size=16, format="mixed_584",
        row_dtype="fp32", layout="strided", device=DEVICE,
    )  # fmt: skip
    assert call.stored().any()
    assert_like_the_state_op_and_the_reference(call)


@BOTH_OPS
@pytest.mark.parametrize("row_dtype", FLOATS)
def test_a_variant_of_several_slices(op, row_dtype):
    call = small(op, row_dtype=row_dtype, kv_dtype="fp32")
    sliced = variant(call, reduce_warps=1, head_slice=32)
    assert_stores(lambda mine: run_variant(sliced, mine), call, by_variant(sliced, call))


@BOTH_OPS
@pytest.mark.parametrize("work", WORK)
def test_work(op, work):
    call = with_scalars(small(op), work=work)
    expected = by_variant(variant(call), call)
    for names, is_written in ((STATE, work != "reduce"), (("cache", *OUTPUTS), work != "store")):
        for name in names:
            before, after = (getattr(one, name).cpu() for one in (call, expected))
            assert torch.equal(before.nan_to_num(), after.nan_to_num()) != is_written, name
    assert_stores(run, call, expected)


# ---- metadata ------------------------------------------------------------------------------------


@BOTH_OPS
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_random_metadata(op, seed, share):
    """Guards stay, and where cu_outputs ascends the result is that of the two steps."""
    call = random_call(op, seed, head_dim=128, compress_ratio=4, work="all", device=DEVICE)
    spoiled = call.scrambled(share, seed)
    ordered = replace(spoiled, cu_outputs=call.cu_outputs)
    assert_like_the_state_op_and_the_reference(ordered)
    assert torch.equal(filled_rows(ordered).cpu(), ordered.filled())
    # Where it descends, rows may be missing.
    found = filled_rows(spoiled).cpu()
    assert not (found & ~spoiled.filled()).any()
    chosen = torch.where(found.to(spoiled.slots.device), spoiled.slots, -1)
    expected = by_variant(variant(spoiled), replace(spoiled, slots=chosen))
    assert_stores(run, spoiled, replace(expected, slots=spoiled.clone("cpu").slots))


@BOTH_OPS
def test_the_rows_that_a_window_fills_are_found(op):
    for reserve, seed in itertools.product((1, 2, 6), range(6)):
        call = random_call(op, seed, head_dim=128, work="all", reserve=reserve, device=DEVICE)
        assert torch.equal(filled_rows(call).cpu(), call.filled()), (reserve, seed)


BROKEN = {  # of the first or the last of three requests
    "more new tokens than next_n": ("next_n", 4),
    "more new tokens than tokens": ("kv_lens", [4, 8, 5]),
    "tokens before the first": ("cu_seq_lens", [-1, 5, 7, 10]),
    "tokens after the last": ("cu_seq_lens", [0, 5, 7, 11]),
    "an end before its begin": ("cu_seq_lens", [5, 0, 7, 10]),
}


@pytest.mark.parametrize(
    ("op", "fault"),
    [(op, one) for op in OPS for one in BROKEN if op == DECODE or "next_n" not in one],
)
def test_a_request_that_makes_no_sense_fills_no_row(op, fault):
    good = make(op, [(3, 5), (6, 2), (2, 3)], reserve=3, outputs=ALL_OUTPUTS, device=DEVICE)
    name, value = BROKEN[fault]
    if name != "next_n":
        value = torch.tensor(value, dtype=torch.int32, device=DEVICE)
    call = replace(good, **{name: value})
    assert call.filled().sum() < good.filled().sum()
    assert torch.equal(filled_rows(call).cpu(), call.filled())
    assert_like_the_state_op_and_the_reference(call)


def test_rows_before_the_first_output_are_left_alone():
    call = small(DECODE)
    shifted = replace(call, cu_outputs=call.cu_outputs + 2)
    assert not shifted.filled()[:2].any() and shifted.filled().any()
    assert_like_the_state_op_and_the_reference(shifted)


@pytest.mark.parametrize("num_rows", [0, 2])
def test_a_batch_of_no_request(num_rows):
    """There are tokens, so a kernel is launched."""
    call = small(PREFILL)
    call = replace(
        call,
        block_table_kv=call.block_table_kv[:0],
        block_table_score=call.block_table_score[:0],
        kv_lens=call.kv_lens[:0],
        cu_seq_lens=call.cu_seq_lens[:1],
        cu_outputs=call.cu_outputs[:1],
        positions=call.positions[:num_rows],
        slots=call.slots[:num_rows],
        **{name: getattr(call, name)[:num_rows] for name in OUTPUTS},
    )
    after = call.clone()
    run(after)
    assert_is(after, call)


@BOTH_OPS
def test_a_call_without_rows_stores_the_state(op):
    call = small(op)
    none = {name: getattr(call, name)[:0] for name in ("positions", "slots", *OUTPUTS)}
    call = replace(call, **none)
    expected = by_variant(variant(call), call)
    assert not torch.equal(expected.paged_kv.nan_to_num(), call.paged_kv.cpu().nan_to_num())
    assert_stores(run, call, expected)
