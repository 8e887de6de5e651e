"""The kernels on a GPU: the bits of two ops, however they are run; safe, capturable."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graphs import captured
from numerics import assert_same_bits
from store_calls import (
    ALL_OUTPUTS,
    DECODE,
    OPS,
    PREFETCH,
    PREFILL,
    STATE,
    WORK,
    StoreCall,
    assert_stores,
    by_two_ops,
    by_variant,
    make,
    run_op,
    run_variant,
    spans_for,
    variant_of,
    with_scalars,
)
from store_feed import Feed

from kvfold.codegen import Problem, Variant, load_table, op_spec
from kvfold.runtime import cubin_cache, dispatch, driver
from kvfold.runtime.arguments import check

pytestmark = pytest.mark.gpu

TABLE = load_table()
BOTH_OPS = pytest.mark.parametrize("op", OPS)


def problem(
    op: str, head_dim: int, ratio: int, kv_dtype: str, state_dtype: str, **others
) -> Problem:
    fields = {
        "head_dim": head_dim,
        "compress_ratio": ratio,
        "kv_dtype": kv_dtype,
        "state_dtype": state_dtype,
    }
    return op_spec(op).problem.of(fields | others)


# Each kernel is compiled for a way to the cache, so that a problem has one throughout the file.
WAYS: dict[Problem, dict[str, Any]] = {
    problem(DECODE, 512, 128, "bf16", "fp32", next_n=4): {"format": "mixed_584"},
    problem(DECODE, 512, 4, "bf16", "fp32", next_n=2): {
        "format": "mixed_584", "rounding": "codes_from_bf16", "row_dtype": "fp32",
        "outputs": ALL_OUTPUTS,
    },
    problem(DECODE, 128, 4, "fp32", "fp32", next_n=4, ape_in_state=False): {
        "format": "fp8_block128", "rotate": True, "rounding": "before_codes",
    },
    problem(DECODE, 128, 128, "fp32", "bf16", next_n=1): {
        "format": "fp4_288_interleaved", "rounding": "each_step", "outputs": ["codes_out"],
    },
    problem(DECODE, 512, 2, "bf16", "bf16", next_n=8): {"format": "bf16", "row_dtype": "fp32"},
    problem(PREFILL, 512, 128, "bf16", "fp32"): {"format": "mixed_584"},
    problem(PREFILL, 512, 4, "bf16", "fp32"): {
        "format": "mixed_584", "rounding": "codes_from_bf16", "row_dtype": "fp32",
        "outputs": ALL_OUTPUTS,
    },
    problem(PREFILL, 128, 4, "fp32", "fp32", ape_in_state=False): {
        "format": "mxfp4", "rotate": True, "weight_dtype": "fp32",
    },
    problem(PREFILL, 128, 128, "fp32", "bf16", ape_in_state=False): {
        "format": "fp8_tensor", "scale": 0.37, "outputs": ["scales_out"],
    },
    problem(PREFILL, 512, 2, "bf16", "bf16"): {"format": "fp8_528", "rope_dim": 128},
}  # fmt: skip
PROBLEMS = list(WAYS)
OF_MODELS = [
    one for one in PROBLEMS if (one.head_dim, one.compress_ratio) in ((512, 128), (512, 4))
]


def name_of(one: Problem) -> str:
    return "_".join([one.op, *one.symbol_parts()])


each_problem = pytest.mark.parametrize("one", PROBLEMS, ids=name_of)
of_models = pytest.mark.parametrize("one", OF_MODELS, ids=name_of)


def variants_of(one: Problem) -> list[Variant]:
    """The CUDA variants of a problem on an H100 or H200, for any size."""
    buckets = TABLE.buckets_for(one, "cuda", "sm_90")
    assert buckets
    return list(dict.fromkeys(bucket.variant for bucket in buckets))


def call_of(one: Problem, **fields) -> Any:
    """A call of the problem on a GPU, of the problem's way to the cache."""
    next_n = getattr(one, "next_n", 4)
    spans = fields.pop("spans", None) or spans_for(one.op, one.compress_ratio, next_n)
    fields = {"page_size": 16, "device": "cuda", "skipped": 0.1} | fields
    return make(one.op, spans, **one.values(), **WAYS[one], **fields)


def safe_call_of(one: Problem, **fields) -> Any:
    """The same with rows for all windows that all tokens can close, as `scrambled` needs them."""
    next_n = getattr(one, "next_n", 4)
    spans = spans_for(one.op, one.compress_ratio, next_n)
    reserve = sum(new for _, new in spans) // one.compress_ratio + 2
    return call_of(one, spans=spans, reserve=reserve, **fields)


def compile_ahead(variants: list[Variant], call: StoreCall) -> None:
    """Compiles variants for a call, several at a time: NVRTC releases Python's lock."""
    arch = dispatch.arch_of(torch.device("cuda", torch.cuda.current_device()))
    constants = dict(check(op_spec(call.op), call).constants)
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(cubin_cache.compiled, variant.specialised(constants), arch)
            for variant in variants
        ]
        for job in jobs:
            job.result()


def assert_all_store(variants: list[Variant], call: StoreCall, what: str = "") -> None:
    """All variants make of a call what the state op and the reference of the rows make of it."""
    compile_ahead(variants, call)
    expected = by_two_ops(call)
    for variant in variants:
        assert_stores(
            lambda c, v=variant: run_variant(v, c), call, expected, f"{variant.symbol} {what}"
        )


# ---- Right ---------------------------------------------------------------------------------------


@each_problem
def test_table_variants_give_the_bits_of_two_ops(one):
    for seed, layout in enumerate(("split", "packed", "strided")):
        page_size = (32, 7, 128)[seed]
        call = call_of(one, layout=layout, page_size=page_size, reserve=(None, 9)[seed % 2],
                       padding=20 * seed, seed=seed)  # fmt: skip
        assert call.stored().any()
        assert_all_store(variants_of(one), call, layout)


@of_models
@pytest.mark.parametrize("work", WORK)
def test_one_step_alone(one, work):
    assert_all_store(variants_of(one), with_scalars(call_of(one), work=work))


@of_models
def test_prefills_that_store_a_tail(one):
    if one.op == DECODE:
        pytest.skip("decode stores every row")
    call = call_of(one, write_state="tail", max_rollback=3, state_period=2 * one.compress_ratio)
    assert_all_store(variants_of(one), call)


@of_models
def test_large_calls_by_the_variants_that_dispatch_chooses(one):
    """A CTA has many rows, and a cluster more rows than warps."""
    ratio = one.compress_ratio
    if one.op == DECODE:
        spans = [(b % (2 * ratio), 1 + b % one.next_n) for b in range(700)]
    else:
        spans = [(3, 3000), *((b % (2 * ratio), b % 9) for b in range(200)), (ratio, 4000)]
    call = call_of(one, spans=spans, rows_per_page=64)
    assert_stores(run_op, call, by_two_ops(call))


@pytest.mark.parametrize(
    ("ratio", "tunings"),
    [
        (128, [{"reduce_warps": 8, "head_slice": 64}, {"reduce_warps": 4, "head_slice": 64},
               {"reduce_warps": 8, "head_slice": 128},
               {"reduce_warps": 4, "head_slice": 64, "requests_per_cta": 4},
               {"reduce_warps": 4, "head_slice": 128, "deal": True}]),
        (4, [{"reduce_warps": 1, "head_slice": 128}, {"reduce_warps": 1, "head_slice": 512},
             {"reduce_warps": 1, "head_slice": 128, "fused": True},
             {"reduce_warps": 1, "head_slice": 512, "fused": True},
             {"reduce_warps": 1, "head_slice": 128, "requests_per_cta": 4},
             {"reduce_warps": 1, "head_slice": 512, "deal": True}]),
    ],
)  # fmt: skip
def test_every_decode_tuning_gives_the_same_bytes(ratio, tunings):
    one = next(p for p in OF_MODELS if p.op == DECODE and p.compress_ratio == ratio)
    call = call_of(one)
    variants = [variant_of(call, "cuda", **tuning) for tuning in tunings]
    assert len({variant.launch.cluster for variant in variants}) >= 2
    assert_all_store(variants, call)


@pytest.mark.parametrize(
    ("ratio", "tunings"),
    [
        (128, [{"reduce_warps": 8, "head_slice": 64, "stages": 2},
               {"reduce_warps": 4, "head_slice": 64, "stages": 2}]),
        (4, [{"reduce_warps": 1, "head_slice": 128, "stages": 4},
             {"reduce_warps": 1, "head_slice": 512, "stages": 3, "min_ctas": 2}]),
    ],
)  # fmt: skip
def test_every_prefill_tuning_gives_the_same_bytes(ratio, tunings):
    one = next(p for p in OF_MODELS if p.op == PREFILL and p.compress_ratio == ratio)
    call = call_of(one)
    assert_all_store([variant_of(call, "cuda", **tuning) for tuning in tunings], call)


# ---- Safe ----------------------------------------------------------------------------------------


@each_problem
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_random_metadata_touches_nothing_outside(one, share):
    """Random integers in every table: guard zones stay, and what is stored is right."""
    for seed in range(2):
        call = safe_call_of(one, seed=seed, layout=("split", "strided")[seed])
        assert_all_store(variants_of(one)[:1], call.scrambled(share, seed), f"{share} {seed}")


# ---- Graphs and streams --------------------------------------------------------------------------


@of_models
def test_a_captured_call_can_be_replayed_with_other_metadata(one):
    """Lengths, slots and positions of the replays differ; the shapes are those of the capture."""
    ratio = one.compress_ratio
    if one.op == DECODE:
        spans = [[(ratio - 1, 1), (2 * ratio - 2, 2)], [(ratio - 2, 2), (2 * ratio - 1, 1)],
                 [(ratio, 1), (3 * ratio - 2, 2)]]  # fmt: skip
    else:
        spans = [[(3, 2 * ratio), (2 * ratio - 1, 1)], [(ratio - 1, 1), (ratio, 2 * ratio)],
                 [(ratio, 2 * ratio + 1), (5, 0)]]  # fmt: skip
    calls = [
        call_of(one, spans=s, reserve=4, seed=seed, page_size=4 * ratio, skipped=0.0)
        for seed, s in enumerate(spans)
    ]
    shapes = [[x.shape for x in call.args() if isinstance(x, torch.Tensor)] for call in calls]
    assert all(shape == shapes[0] for shape in shapes)
    replay = captured(run_op, calls[0])

    for call in [*calls, calls[0]]:
        assert call.stored().any()
        assert_stores(replay, call, by_two_ops(call))


@of_models
def test_a_call_is_one_launch(one, monkeypatch):
    call = call_of(one)
    run_op(call)
    found = check(op_spec(one.op), call)
    kernel = dispatch.launcher(found.problem, found.size, found.device, found.constants)
    assert isinstance(kernel, driver.Kernel)
    launches = []
    launch = kernel.cu_launch

    def counted(*args):
        launches.append(args)
        return launch(*args)

    monkeypatch.setattr(kernel, "cu_launch", counted)
    for count in range(1, 4):
        run_op(call)
        assert len(launches) == count


def test_repeated_calls_with_other_outputs_dtypes_and_formats_are_told_apart():
    """The second and later calls of a layout skip the dispatcher."""
    one = PROBLEMS[2]
    dispatch.reload()
    ways = [{}, {"outputs": ["rows_out"]}, {"outputs": {"rows_out": "fp32"}},
            {"weight_dtype": "fp32"}, {"row_dtype": "fp32"}, {"format": "fp8_528"}]  # fmt: skip
    for _, way in itertools.product(range(2), ways):
        fields = one.values() | WAYS[one] | {"device": "cuda"} | way
        call = make(one.op, spans_for(one.op, one.compress_ratio), **fields)
        for _ in range(2):
            assert_stores(run_op, call, by_two_ops(call), str(way))


# ---- The kernel before ---------------------------------------------------------------------------


def chain(one: Problem, prefetch: str, written: tuple[str, ...], captured: bool) -> list:
    """Calls in a row on states and caches of their own, with inputs that kernels write before each.

    Args:
        written: arguments that are written right before each call; another one is the last in each.
        captured: in a CUDA graph; otherwise the host waits for each call.

    Returns:
        the caches after each step, and the states at the end.
    """
    torch.manual_seed(0)
    made = [call_of(one, seed=seed, skipped=0.0) for seed in range(5)]
    names = [tensor.name for tensor in type(made[0]).declared_tensors() if not tensor.mutated]
    shared = {name: getattr(made[0], name) for name in names}
    shared |= {name: shared[name].clone() for name in written}
    calls = [replace(call, **shared, prefetch=prefetch) for call in made]
    hidden = torch.randn(shared["kv_score"].size(0), 64, device="cuda")
    weights = torch.randn(len(calls), 64, shared["kv_score"].size(1), device="cuda")
    sources = {
        name: [getattr(made[0], name).roll(layer, 0) for layer in range(len(calls))]
        for name in written
    }

    def step() -> None:
        for layer, call in enumerate(calls):
            for name in (*written[layer % len(written) :], *written[: layer % len(written)]):
                if name == "kv_score":
                    shared[name].copy_(hidden @ weights[layer])
                else:
                    shared[name].copy_(sources[name][layer])
            run_op(call)
            if not captured:
                torch.cuda.synchronize()

    step()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            step()
    caches = []
    for _ in range(6):
        hidden.copy_(torch.randn_like(hidden))
        graph.replay() if captured else step()
        caches += [call.cache.clone() for call in calls]
    return [*caches, *(getattr(call, name) for call in calls for name in STATE)]


FLOAT_INPUTS = ("weight", "rope_table", "kv_score")
WRITTEN = {
    "none": (*FLOAT_INPUTS, "positions", "slots", "kv_lens"),
    "metadata": FLOAT_INPUTS,
    "state": FLOAT_INPUTS,
}


@of_models
@pytest.mark.parametrize("prefetch", PREFETCH)
def test_what_the_kernel_before_writes_is_read_after_it(one, prefetch):
    captured, apart = (chain(one, prefetch, WRITTEN[prefetch], how) for how in (True, False))
    assert not torch.equal(captured[0], captured[5])  # the first layer's, a step later
    for mine, wanted in zip(captured, apart, strict=True):
        if mine.is_floating_point():
            assert_same_bits(mine, wanted)
        else:
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("prefetch", ["none", "metadata"])
@pytest.mark.parametrize(("ratio", "format"), [(128, "mixed_584"), (4, "mixed_584")])
def test_calls_in_a_row_on_one_state_and_cache_see_each_other(ratio, format, prefetch):
    """Each call overlaps the one before it, whose rows of state it reads, and must still wait."""
    fields = {
        "compress_ratio": ratio, "head_dim": 512, "format": format, "page_size": 16,
        "rows_per_page": 64, "device": "cuda",
    }  # fmt: skip
    lengths = [2 * ratio + 70 - b for b in range(20)]
    whole, parts = Feed(lengths, **fields), Feed(lengths, **fields)
    whole.feed(PREFILL, whole.left)
    calls = [parts.next_call(PREFILL, np.full(20, ratio + 3), prefetch=prefetch)]
    sizes = itertools.cycle((1, 4, 2, 3))
    while parts.left.any():
        calls.append(parts.next_call(DECODE, np.full(20, next(sizes)), next_n=4, prefetch=prefetch))

    def run_all() -> None:
        for call in calls:
            run_op(call)

    before = parts.whole.cache.clone()
    run_all()
    assert torch.equal(parts.whole.cache, whole.whole.cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    for _ in range(5):
        parts.whole.cache.copy_(before)
        for name in STATE:
            getattr(parts.whole, name).fill_(torch.nan)
        graph.replay()
        assert torch.equal(parts.whole.cache, whole.whole.cache)
        for name in STATE:
            assert_same_bits(getattr(parts.whole, name), getattr(whole.whole, name), name)


# ---- torch.library and torch.compile -------------------------------------------------------------


@BOTH_OPS
def test_opcheck(op):
    one = next(p for p in OF_MODELS if p.op == op and p.compress_ratio == 4)
    args, kwargs = call_of(one).args_and_kwargs()
    torch.library.opcheck(getattr(torch.ops.kvfold, op).default, args, kwargs)


@BOTH_OPS
def test_triton_serves_where_it_is_forced(op, monkeypatch):
    one = next(p for p in OF_MODELS if p.op == op and p.compress_ratio == 4)
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    dispatch.reload()
    try:
        call = call_of(one)
        size = len(call.kv_lens) if op == DECODE else len(call.kv_score)
        variant = dispatch.select(one, size, call.ape.device)
        assert variant.backend == "triton"
        assert_stores(run_op, call, by_variant(variant, call))
    finally:
        monkeypatch.undo()
        dispatch.reload()
