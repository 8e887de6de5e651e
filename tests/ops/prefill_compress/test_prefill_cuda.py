"""What the host computes for a CUDA launch, and that the CUDA source compiles; needs no GPU."""

import pytest
from prefill_backends import cuda_variant
from prefill_calls import Call, make

from kvfold.codegen import TableError, Variant
from kvfold.ops.prefill_compress.cuda_kernel import plan
from kvfold.ops.prefill_compress.spec import SPEC, Problem, Tuning
from kvfold.runtime import compiler
from kvfold.runtime.arguments import check
from kvfold.runtime.driver import GridPlan

INT_MAX = 2**31 - 1
SMS = 132


def plan_of(call: Call, **tuning) -> GridPlan:
    tuning = {"reduce_warps": 2, "head_slice": 8} | tuning
    variant = cuda_variant(call, **tuning)
    ctas_at_once = SMS * variant.launch.min_ctas
    return plan(variant, ctas_at_once, call, check(SPEC, call).dimensions)


def long_window(spans: list[tuple[int, int]], **fields) -> Call:
    return make(spans, **{"compress_ratio": 16, "head_dim": 16} | fields)


# ---- plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_ctas", [1, 4])
@pytest.mark.parametrize(
    "new",
    [[1], [7], [8], [9], [5000], [100_000], [1] * 300, [0, 3, 0], [4000] + [1] * 255],
    ids=len,
)
def test_the_ranges_have_every_row_once_and_are_few_enough_to_run_at_once(new, min_ctas):
    planned = plan_of(long_window([(3, n) for n in new]), min_ctas=min_ctas)
    rows, ranges = planned.values["range_rows"], planned.values["ranges"]
    assert rows >= 1 and (ranges - 1) * rows < sum(new) <= ranges * rows
    assert planned.ctas == 2 * ranges  # slices of 8 columns
    assert planned.ctas <= max(2, SMS * min_ctas)
    # As many as can run at once, unless a range would have few rows.
    assert planned.ctas > 0.8 * SMS * min_ctas or rows <= 8


def test_many_requests_get_as_many_ranges():
    """Each may have a window that takes as long as many rows."""
    planned = plan_of(long_window([(15, 1)] * 60))
    assert planned.values["ranges"] == 60


@pytest.mark.parametrize("page_size", [1, 3, 32, 100])
def test_the_plan_divides_positions_by_the_page_size(page_size):
    values = plan_of(long_window([(7, 1)], page_size=page_size)).values
    for position in (0, 1, page_size - 1, page_size, 12345, INT_MAX):
        quotient = position * values["page_multiplier"] >> values["page_shift"]
        assert quotient == position // page_size


@pytest.mark.parametrize(
    ("work", "stores", "reduces"),
    [("all", True, True), ("store", True, False), ("reduce", False, True)],
)
@pytest.mark.parametrize(("output_dtype", "is_bf16"), [("bf16", True), ("fp32", False)])
def test_the_plan_tells_the_work_and_the_dtype_of_the_output(
    work, stores, reduces, output_dtype, is_bf16
):
    values = plan_of(long_window([(7, 1)], work=work, output_dtype=output_dtype)).values
    assert (values["stores"], values["reduces"]) == (stores, reduces)
    assert values["output_is_bf16"] == is_bf16


def test_the_plan_gives_every_member_that_is_no_dimension_and_no_scalar():
    call = long_window([(7, 1)])
    planned, dimensions = plan_of(call), dict(check(SPEC, call).dimensions)
    scalars = {one.name: getattr(call, one.name) for one in SPEC.arguments.declared_scalars()}
    known = scalars | dimensions | dict(planned.values)
    assert {name for _, name in SPEC.param_struct.numbers} <= known.keys()
    assert planned.values.keys().isdisjoint(dimensions)


# ---- What cannot run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "tuning", "field"),
    [
        ({}, {"head_slice": 48}, "head_slice"),
        ({"compress_ratio": 4}, {"reduce_warps": 2}, "reduce_warps"),
        ({"compress_ratio": 16, "overlap": True}, {"head_slice": 256}, "compress_ratio"),
        ({"compress_ratio": 256}, {"reduce_warps": 1, "head_slice": 128}, "reduce_warps"),
        ({}, {"head_slice": 512, "reduce_warps": 16}, "reduce_warps"),
        ({}, {"head_slice": 128, "reduce_warps": 8, "min_ctas": 9}, "min_ctas"),
    ],
    ids=str,
)
def test_a_variant_that_cannot_run_is_refused_with_the_field(problem, tuning, field):
    problem = {
        "head_dim": 512,
        "compress_ratio": 128,
        "kv_dtype": "bf16",
        "state_dtype": "fp32",
    } | problem
    tuning = {"reduce_warps": 1, "head_slice": 32} | tuning
    with pytest.raises(TableError) as error:
        Variant(problem=Problem(**problem), backend="cuda", tuning=Tuning(**tuning))
    assert error.value.field == field


# ---- The source ----------------------------------------------------------------------------------

# Problem fields after head_dim, then tuning: few and many warps, all dtypes, both kinds of state.
SOURCES = [
    (512, 128, "bf16", "fp32", True, {"reduce_warps": 8, "head_slice": 32, "min_ctas": 2}),
    (512, 128, "fp32", "bf16", False, {"reduce_warps": 4, "head_slice": 32, "stages": 2}),
    (512, 4, "bf16", "bf16", False, {"reduce_warps": 1, "head_slice": 256, "min_ctas": 6}),
    (128, 4, "fp32", "fp32", True, {"reduce_warps": 1, "head_slice": 128, "stages": 4}),
]


@pytest.mark.skipif(compiler.unavailable() is not None, reason="no CUDA compiler")
@pytest.mark.parametrize(
    ("arch", "source"),
    [
        *(("sm_90", source) for source in SOURCES),
        ("sm_80", SOURCES[0]),
        ("sm_100", SOURCES[2]),
    ],
    ids=lambda value: value if isinstance(value, str) else "_".join(map(str, value[:5])),
)
def test_the_source_compiles_without_spills(arch, source):
    head_dim, compress_ratio, kv_dtype, state_dtype, ape_in_state, tuning = source
    problem = Problem(
        head_dim=head_dim,
        compress_ratio=compress_ratio,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        ape_in_state=ape_in_state,
    )
    variant = Variant(problem=problem, backend="cuda", tuning=Tuning(**tuning))
    compiled = compiler.compile_variant(variant, arch)
    assert compiled.symbol.encode() in compiled.cubin
    assert (compiled.arch, compiled.spill_bytes) == (arch, 0)
