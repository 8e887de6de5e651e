"""What the host computes for a launch, against what kernel.cuh makes of it."""

import pytest
from calls import WORK, Call, make
from hypothesis import assume, given
from hypothesis import strategies as st

from kvfold.codegen import Variant
from kvfold.ops.decode_plan import MAX_ITEMS_BY_TOKEN, storing_share
from kvfold.ops.paged_kv_compress.cuda_kernel import plan
from kvfold.ops.paged_kv_compress.spec import SPEC, Tuning
from kvfold.runtime.arguments import check, divider
from kvfold.runtime.driver import GridPlan

INT_MAX = 2**31 - 1


@given(st.integers(1, INT_MAX), st.integers(0, INT_MAX))
def test_a_product_and_a_shift_divide(divisor, x):
    multiplier, shift = divider(divisor)
    assert multiplier < 2**32 and shift < 64
    assert x * multiplier >> shift == x // divisor


def jobs(storing: int, ctas: int, share: int) -> list[tuple[bool, int]]:
    """(whether it stores, its number among those that do) of every CTA, as job_of in kernel.cuh."""
    if storing == ctas:
        return [(True, cta) for cta in range(ctas)]
    found = []
    for cta in range(ctas):
        before = cta * share >> 32
        if before < storing and (cta + 1) * share >> 32 > before:
            found.append((True, before))
        else:
            found.append((False, cta - min(before, storing)))
    return found


@given(st.integers(0, 400), st.integers(0, 400))
def test_every_cta_has_a_job_of_its_own(storing, reducing):
    ctas = storing + reducing
    assume(ctas)
    share = storing_share(storing, ctas)
    assert share < 2**32
    found = jobs(storing, ctas, share)
    assert [number for stores, number in found if stores] == list(range(storing))
    assert [number for stores, number in found if not stores] == list(range(reducing))


@given(st.integers(1, 100), st.integers(1, 400))
def test_the_grid_does_not_end_with_ctas_that_store_if_they_are_few(storing, reducing):
    ctas = storing + reducing
    found = jobs(storing, ctas, storing_share(storing, ctas))
    if 5 * storing <= ctas:
        assert not any(stores for stores, _ in found[-(ctas // 5) :])


# ---- plan ----------------------------------------------------------------------------------------


def variant_of(call: Call, **tuning) -> Variant:
    return Variant(problem=call.problem, backend="cuda", tuning=Tuning(**tuning))


def plan_of(call: Call, variant: Variant) -> GridPlan:
    return plan(variant, 132, call, check(SPEC, call).dimensions)


SMALL = {"head_dim": 64, "compress_ratio": 128, "state_dtype": "fp32", "next_n": 4}


@pytest.mark.parametrize(
    ("batch", "head_slice", "reducing", "by_token", "storing"),
    [
        # 16 vectors of four fp32 columns per row, 4 rows per request, 256 threads per CTA.
        (1, 64, 1, True, 1),
        (5, 64, 5, True, 2),
        (5, 16, 20, True, 2),
        (256, 64, 256, True, 64),  # MAX_ITEMS_BY_TOKEN threads
        (257, 64, 257, False, 17),  # one more request: a thread stores all rows of a request
    ],
)
def test_the_grid_has_ctas_for_every_slice_and_for_the_store(
    batch, head_slice, reducing, by_token, storing
):
    call = make([(0, 1)] * batch, **SMALL)
    variant = variant_of(call, reduce_warps=8, head_slice=head_slice)
    assert variant.launch.threads == 256 and variant.launch.constants["items_at_once"] == 1
    planned = plan_of(call, variant)
    assert planned.ctas == reducing + storing
    assert planned.values["store_by_token"] == by_token
    assert (batch * 16 * 4 <= MAX_ITEMS_BY_TOKEN) == by_token
    found = jobs(storing, planned.ctas, planned.values["storing_share"])
    assert sum(stores for stores, _ in found) == storing


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize(
    ("tuning", "reducing", "storing"),
    [
        ({"head_slice": 16}, 20, 2),
        ({"head_slice": 16, "requests_per_cta": 2}, 12, 2),
        ({"head_slice": 16, "requests_per_cta": 8}, 4, 2),
        ({"head_slice": 16, "deal": True}, 20, 2),
    ],
    ids=str,
)
def test_the_grid_has_ctas_for_the_steps_that_are_done(tuning, reducing, storing, work):
    call = make([(0, 1)] * 5, work=work, **SMALL)
    planned = plan_of(call, variant_of(call, reduce_warps=8, **tuning))
    reducing, storing = reducing * (work != "store"), storing * (work != "reduce")
    assert planned.ctas == reducing + storing
    assert planned.values["reducing"] == reducing
    assert (planned.values["stores"], planned.values["reduces"]) == (storing > 0, reducing > 0)
    found = jobs(storing, planned.ctas, planned.values["storing_share"])
    assert [stores for stores, _ in found].count(True) == storing


@pytest.mark.parametrize(("head_slice", "groups"), [(64, 132), (32, 66), (16, 33)])
def test_a_dealt_grid_reduces_in_as_many_ctas_as_run_at_once(head_slice, groups):
    call = make([(0, 1)] * 300, **SMALL)
    planned = plan_of(call, variant_of(call, reduce_warps=8, head_slice=head_slice, deal=True))
    assert planned.values["reducing"] == groups * 64 // head_slice


@pytest.mark.parametrize("work", WORK)
def test_a_fused_grid_is_the_same_whichever_steps_are_done(work):
    call = make([(0, 1)] * 5, head_dim=256, work=work)
    planned = plan_of(call, variant_of(call, reduce_warps=1, head_slice=128, fused=True))
    assert planned.ctas == planned.values["reducing"] == 5 * 2
    assert planned.values["stores"] == (work != "reduce")
    assert planned.values["reduces"] == (work != "store")


def test_a_storing_thread_of_a_large_batch_has_several_requests_if_registers_suffice():
    call = make([(0, 1)] * 2048, head_dim=64, compress_ratio=4, state_dtype="fp32", next_n=1)
    variant = variant_of(call, reduce_warps=1, head_slice=64)
    # A row's vector takes 4 columns x (kv and score in bf16, ape in fp32) = 32 bytes of 128.
    assert variant.launch.constants["items_at_once"] == 4
    planned = plan_of(call, variant)
    items = 2048 * 128 // 4
    assert not planned.values["store_by_token"]
    assert planned.ctas == 2048 + items // 4 // variant.launch.threads


@pytest.mark.parametrize("next_n", [1, 3])
@pytest.mark.parametrize("batch", [1, 3, 100, 2000, 5001])
def test_every_item_of_the_store_has_a_thread(batch, next_n):
    call = make([(0, 1)] * batch, head_dim=8, compress_ratio=4, next_n=next_n)
    variant = variant_of(call, reduce_warps=2, head_slice=8)
    planned = plan_of(call, variant)
    threads = (planned.ctas - batch) * variant.launch.threads
    items = batch * 4  # vectors of 4 of the 16 columns
    if planned.values["store_by_token"]:
        needed = items * next_n
    else:
        needed = items / variant.launch.constants["items_at_once"]
    assert needed <= threads < needed + variant.launch.threads


@pytest.mark.parametrize("page_size", [1, 3, 32, 100])
def test_the_plan_divides_positions_by_the_page_size(page_size):
    call = make([(7, 1)], page_size=page_size)
    values = plan_of(call, variant_of(call, reduce_warps=1, head_slice=16)).values
    for position in (0, 1, page_size - 1, page_size, 12345, INT_MAX):
        quotient = position * values["page_multiplier"] >> values["page_shift"]
        assert quotient == position // page_size


@pytest.mark.parametrize(("output_dtype", "is_bf16"), [("bf16", True), ("fp32", False)])
def test_the_plan_tells_the_dtype_of_the_output(output_dtype, is_bf16):
    call = make([(7, 1)], kv_dtype="fp32", output_dtype=output_dtype)
    values = plan_of(call, variant_of(call, reduce_warps=1, head_slice=16)).values
    assert values["output_is_bf16"] is is_bf16


def test_the_plan_gives_every_member_that_is_no_dimension_and_no_scalar():
    call = make([(7, 1)])
    planned = plan_of(call, variant_of(call, reduce_warps=1, head_slice=16))
    scalars = {one.name: getattr(call, one.name) for one in SPEC.arguments.declared_scalars()}
    known = scalars | dict(check(SPEC, call).dimensions) | dict(planned.values)
    assert {name for _, name in SPEC.param_struct.numbers} <= known.keys()
    assert planned.values.keys().isdisjoint(check(SPEC, call).dimensions)
