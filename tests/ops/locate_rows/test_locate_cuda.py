"""What the host computes for a CUDA launch, and that the CUDA source compiles; needs no GPU."""

import pytest
from locate_calls import SOURCES, Call, make, variant_of

from kvfold.ops.locate_rows.cuda_kernel import plan
from kvfold.ops.locate_rows.spec import SPEC, WARPS
from kvfold.runtime import compiler
from kvfold.runtime.arguments import check, dimensions_of
from kvfold.runtime.driver import GridPlan

INT_MAX = 2**31 - 1


def plan_of(call: Call, warps: int = 4) -> GridPlan:
    return plan(variant_of("cuda", warps), 132, call, check(SPEC, call).dimensions)


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 128, 129, 4096])
def test_every_row_has_a_thread_and_no_cta_is_idle(rows, warps):
    call = make([(0, 3)], spare_rows=rows)
    ctas = plan_of(call, warps).ctas
    assert (ctas - 1) * 32 * warps < rows <= ctas * 32 * warps


@pytest.mark.parametrize("source", SOURCES)
def test_the_plan_gives_every_member_that_is_no_dimension_and_no_scalar(source):
    call = make([(0, 9)], source=source)
    scalars = {one.name: getattr(call, one.name) for one in SPEC.arguments.declared_scalars()}
    known = scalars | dimensions_of(SPEC, call) | dict(plan_of(call).values)
    numbers = {name for _, name in SPEC.param_struct.numbers}
    assert numbers <= known.keys()
    assert all(0 <= known[name] <= INT_MAX for name in numbers)


def test_the_source_that_is_absent_has_no_elements():
    by_page = plan_of(make([(0, 9)], max_pages=5)).values
    by_token = plan_of(make([(0, 9)], source="token_slots")).values
    assert (by_page["max_pages"], by_page["num_token_slots"]) == (5, 0)
    assert (by_token["max_pages"], by_token["num_token_slots"]) == (0, 9)


@pytest.mark.parametrize(
    ("source", "given", "bounds"),
    [
        ("block_table", {}, (INT_MAX, INT_MAX)),
        ("token_slots", {}, (9, INT_MAX)),
        ("block_table", {"num_tokens": 7, "next_n": 4}, (7, 4)),
        ("token_slots", {"num_tokens": 12, "next_n": 0}, (12, 0)),
    ],
)
def test_the_plan_resolves_the_bounds(source, given, bounds):
    values = plan_of(make([(0, 9)], source=source, **given)).values
    assert (values["most_tokens"], values["most_new"]) == bounds


@pytest.mark.skipif(compiler.unavailable() is not None, reason="no CUDA compiler")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("warps", [1, 4, 16])
def test_the_source_compiles_without_spills(arch, warps):
    variant = variant_of("cuda", warps)
    compiled = compiler.compile_variant(variant, arch)
    assert compiled.symbol.encode() in compiled.cubin
    assert (compiled.arch, compiled.spill_bytes) == (arch, 0)
    assert compiled.registers <= 32
