"""What the host works out for the CUDA kernels, against what the kernels make of it."""

from hypothesis import given
from hypothesis import strategies as st

from kvfold.ops.paged_kv_compress.cuda_kernel import divider, storing_share


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_a_product_and_a_shift_divide(divisor, x):
    multiplier, shift = divider(divisor)
    assert multiplier < 2**32 and shift < 64
    assert x * multiplier >> shift == x // divisor


@given(st.integers(0, 400), st.integers(1, 400))
def test_every_cta_of_the_direct_schedule_has_a_job_of_its_own(storing, reducing):
    ctas = storing + reducing
    share = storing_share(storing, ctas)
    assert share < 2**32
    stores, reduces = [], []
    for cta in range(ctas):  # as job_of in kernel.cuh
        before = cta * share >> 32
        if before < storing and (cta + 1) * share >> 32 > before:
            stores.append(before)
        else:
            reduces.append(cta - min(before, storing))
    assert stores == list(range(storing))
    assert reduces == list(range(reducing))
