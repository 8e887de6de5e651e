"""The yardstick, as far as it runs without a GPU."""

import pytest

from kvfold.codegen import Variant, load_table
from kvfold.ops.paged_kv_compress import row_by_row
from kvfold.runtime import compiler

VARIANTS = {
    (v.problem.compress_ratio, v.problem.kv_dtype, v.problem.state_dtype): v
    for v in load_table().variants
    if v.op == "paged_kv_compress" and v.backend == "cuda"
}


@pytest.mark.skipif(compiler.unavailable() is not None, reason="no CUDA compiler")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.symbol)
def test_the_yardstick_compiles(variant: Variant):
    found = row_by_row.compiled(row_by_row.one_warp(variant), "sm_90")
    assert found.symbol == row_by_row.NAME and found.cubin
