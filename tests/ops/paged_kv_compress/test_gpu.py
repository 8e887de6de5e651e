"""The kernels on a GPU: right, the same bits however they are run, safe, capturable."""

import contextlib
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gate
import pytest
import torch
from calls import MUTATED, PREFETCH, WORK, Call, decode_step, make, random_call
from contract import CASES, assert_follows_contract, oracle
from graphs import captured
from mode_relations import RELATIONS
from numerics import assert_same_bits
from rings import RINGS, decoding, each

import kvfold
import kvfold.torch_ops  # registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import TableError, Variant, load_table
from kvfold.device.window_shape import vector
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime import compiler, cubin_cache, dispatch, driver
from kvfold.runtime.torch_op import torch_op

pytestmark = pytest.mark.gpu

OP = torch_op("paged_kv_compress")
TABLE = load_table()
BACKENDS = ("cuda", "triton")
PROBLEMS = list(dict.fromkeys(v.problem for v in TABLE.variants if v.op == OP.spec.name))


def problem(
    head_dim: int, ratio: int, kv_dtype: str, state_dtype: str, next_n: int, **others
) -> Problem:
    return Problem(
        head_dim=head_dim,
        compress_ratio=ratio,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        next_n=next_n,
        **others,
    )


PRODUCTION = problem(512, 128, "bf16", "fp32", 4)
SOME_PROBLEMS = [
    PRODUCTION,
    problem(512, 128, "fp32", "bf16", 3),
    problem(128, 128, "bf16", "bf16", 4),
    problem(512, 4, "bf16", "fp32", 4),
    problem(128, 4, "fp32", "fp32", 1),
    problem(512, 128, "bf16", "fp32", 8, ape_in_state=False),
    problem(512, 4, "fp32", "bf16", 4, ape_in_state=False),
    problem(128, 2, "bf16", "fp32", 2),
]


def name_of(one: Problem) -> str:
    return "_".join(one.symbol_parts())


def id_of(value: Problem | tuple) -> str:
    return name_of(value) if isinstance(value, Problem) else "_".join(one[0] for _, one in value)


def variant_of(call: Call, backend: str = "cuda", **tuning) -> Variant:
    return Variant(problem=call.problem, backend=backend, tuning=Tuning(**tuning))


def variants_of(one: Problem, backend: str) -> list[Variant]:
    """The table's variants of a problem, for any batch and architecture."""
    found = [v for v in TABLE.variants if v.problem == one and v.backend == backend]
    assert found
    return found


# How a kernel stores and reduces, beside the shape of its CTAs.
SCHEDULES = {
    "plain": {},
    "four_requests": {"requests_per_cta": 4, "store_bytes": 256},
    "many_requests": {"requests_per_cta": 32},
    "dealt": {"deal": True},
    "fused": {"fused": True},
}


def variants_if_legal(one: Problem, *tunings: dict) -> list[Variant]:
    """CUDA variants of a problem with those of the tunings that can run."""
    found = []
    for tuning in tunings:
        with contextlib.suppress(TableError):
            variant = Variant(problem=one, backend="cuda", tuning=Tuning(**tuning))
            variant.check_arch("sm_90")
            found.append(variant)
    return found


def scheduled(one: Problem, schedule: str) -> Variant:
    """A CUDA variant with the schedule; the plain one where the problem forbids it."""
    small = one.compress_ratio <= 8
    warp = 32 * vector(one.state_dtype)  # columns that one warp has, in which to fuse
    shape = {"reduce_warps": 1 if small else 4, "head_slice": warp if small else 64}
    shape["head_slice"] = min(shape["head_slice"], one.head_dim)
    return variants_if_legal(one, shape | SCHEDULES[schedule], shape)[0]


def many_variants(one: Problem) -> list[Variant]:
    """CUDA variants of a problem: those of the table, and others with another tuning."""
    shapes = itertools.product((1, 2, 8, 16), (16, 32, 128, 512))
    tunings = ({"reduce_warps": warps, "head_slice": width} for warps, width in shapes)
    found = dict.fromkeys(variants_of(one, "cuda"))
    found |= dict.fromkeys(variants_if_legal(one, *tunings))
    found |= dict.fromkeys(scheduled(one, schedule) for schedule in SCHEDULES)
    assert len(found) > 8
    return list(found)


def compile_ahead(variants: list[Variant]) -> None:
    """Compiles the CUDA variants among these, several at a time: NVRTC releases Python's lock."""
    arch = dispatch.arch_of(torch.device("cuda", torch.cuda.current_device()))
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(cubin_cache.compiled, v, arch) for v in variants if v.backend == "cuda"]
        for job in jobs:
            job.result()


def on_schedule(schedule: str, **mode) -> Callable[[Call], None]:
    """A function that makes a call with a CUDA variant of the schedule."""
    return lambda call: run(scheduled(call.problem, schedule), replace(call, **mode))


def run(variant: Variant, call: Call) -> None:
    OP.run_variant(variant, *call.args())


def run_op(call: Call) -> None:
    call.pass_to(kvfold.paged_kv_compress)


def assert_all_follow_contract(variants: list[Variant], call: Call) -> None:
    compile_ahead(variants)
    expected = oracle(call)
    for variant in variants:
        assert_follows_contract(lambda c, v=variant: run(v, c), call, expected)


def spans_for(compress_ratio: int, next_n: int) -> list[tuple[int, int]]:
    """(tokens before, new tokens) of requests for `make`.

    Windows close with the first, a middle or the last new token, or not at all; it is the first
    window or a later one. One request is padding, one has nothing but new tokens.
    """
    ends = [compress_ratio + late for late in range(next_n)]
    spans = [(end - next_n, next_n) for end in ends if end >= next_n]
    spans += [(2 * compress_ratio + start, new) for start, new in spans]
    spans += [(0, next_n), (0, 0), (3 * compress_ratio - 1, 1), (5, 0), (compress_ratio, next_n)]
    return spans


def call_of(one: Problem, **fields) -> Call:
    """A call of the problem on a GPU, with the requests of spans_for."""
    spans = fields.pop("spans", None) or spans_for(one.compress_ratio, one.next_n)
    return make(spans, **one.values(), **{"device": "cuda"} | fields)


@pytest.fixture
def backend(request, monkeypatch):
    """The backend that serves all calls of the test."""
    monkeypatch.setenv("KVFOLD_BACKEND", request.param)
    dispatch.reload()
    yield request.param
    monkeypatch.undo()
    dispatch.reload()


BOTH_BACKENDS = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

# ---- Right ---------------------------------------------------------------------------------------


LAYOUTS = (("split", 32), ("packed", 7), ("strided", 128))


def some_problems_with_all_values() -> dict[Problem, tuple]:
    """Problems of the table and the layouts to run them in.

    All problems of up to 4 new tokens with ape in the state, ratio 2 apart, are run in all layouts.
    Of the others, which are many, one pair of dtypes is run in one layout.
    """
    found, others = {}, {}
    for one in PROBLEMS:
        if one.compress_ratio > 2 and one.next_n <= 4 and one.ape_in_state:
            found[one] = tuple(enumerate(LAYOUTS))
        else:
            key = one.head_dim, one.compress_ratio, one.next_n, one.ape_in_state
            others.setdefault(key, []).append(one)
    for number, dtypes in enumerate(others.values()):
        found[dtypes[number % len(dtypes)]] = (tuple(enumerate(LAYOUTS))[number % 3],)
    return found


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize(("one", "layouts"), some_problems_with_all_values().items(), ids=id_of)
def test_table_variants_follow_the_contract(one, layouts, kind):
    for seed, (layout, page_size) in layouts:
        output_dtype = ("bf16", "fp32")[seed % 2]
        call = call_of(
            one, layout=layout, page_size=page_size, output_dtype=output_dtype, seed=seed
        )
        assert_all_follow_contract(variants_of(one, kind), call)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_random_calls_of_sizes_that_no_row_has(seed, kind):
    call = random_call(seed, head_dim=(8, 16, 64, 128)[seed % 4], device="cuda")
    variant = variant_of(
        call, kind, reduce_warps=1 << seed % 4, head_slice=(8, 16, 32, 64)[seed % 4]
    )
    assert_all_follow_contract([variant], call)


@pytest.mark.parametrize("name", CASES)
def test_cuda_variants_follow_every_line_of_the_contract(name):
    """By variants that share a window among threads in different ways."""
    call = CASES[name]().clone("cuda")
    head_dim = call.problem.head_dim
    variants = [
        variant_of(call, reduce_warps=reduce_warps, head_slice=head_slice)
        for reduce_warps, head_slice in ((1, head_dim), (2, 8), (8, min(head_dim, 128)))
    ]
    variants.append(
        variant_of(call, reduce_warps=2, head_slice=8, requests_per_cta=4, store_bytes=256)
    )
    if head_dim >= 128:
        variants += [scheduled(call.problem, schedule) for schedule in SCHEDULES]
    assert_all_follow_contract(variants, call)


@pytest.mark.parametrize(("ratio", "new"), [(128, 4), (4, 3), (4, 0)])
def test_more_requests_than_ctas(ratio, new):
    """Requests that close a window are dealt out, those of several chunks of the batch."""
    spans = [(b * 7 % (2 * ratio), min(new, 1 + b % 4)) for b in range(2500)]
    call = make(spans, head_dim=128, compress_ratio=ratio, page_size=64, next_n=4, device="cuda")
    tunings = [{"reduce_warps": warps, "head_slice": 32, "deal": True} for warps in (1, 4, 16)]
    assert_all_follow_contract([variant_of(call, **tuning) for tuning in tunings], call)


def test_more_requests_than_ctas_of_five_warps():
    """The warps of a CTA check as many requests as they can each have alike."""
    spans = [(b * 7 % 8, 1 + b % 2) for b in range(1200)]
    call = make(spans, head_dim=640, compress_ratio=4, page_size=64, next_n=2, device="cuda")
    variant = variant_of(call, reduce_warps=1, head_slice=640, deal=True)
    assert variant.launch.threads == 160
    assert_all_follow_contract([variant], call)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RELATIONS)
def test_modes_agree_to_the_bit(name, schedule):
    RELATIONS[name](on_schedule(schedule), "cuda")


RINGS_AND_SCHEDULES = [
    (kind, schedule)
    for kind, schedule in itertools.product(RINGS, SCHEDULES)
    if kind.compress_ratio == 4 or schedule != "fused"
]


@pytest.mark.parametrize(("kind", "schedule"), RINGS_AND_SCHEDULES, ids=str)
def test_a_ring_gives_the_bits_of_a_state_without_bound(kind, schedule):
    decoding(kind, 200, "cuda", head_dim=128).compare(each(on_schedule(schedule)))


@pytest.mark.parametrize("kind", BACKENDS)
def test_one_row_adds_a_head_dim(kind, tmp_path, monkeypatch):
    table = tmp_path / "table.yaml"
    table.write_text(
        "version: 1\npaged_kv_compress:\n"
        "  - {head_dim: 256, compress_ratio: [4, 128], kv_dtype: [bf16, fp32], state_dtype: [bf16, "
        "fp32], next_n: [1, 2, 3, 4], backend: [cuda, triton], reduce_warps: 4, head_slice: 64}\n"
    )
    monkeypatch.setenv("KVFOLD_CONFIG", str(table))
    monkeypatch.setenv("KVFOLD_BACKEND", kind)
    dispatch.reload()
    try:
        for ratio in (4, 128):
            call = call_of(problem(256, ratio, "bf16", "fp32", 3), page_size=16)
            assert_follows_contract(run_op, call)
    finally:
        monkeypatch.undo()
        dispatch.reload()


def test_new_rows_on_both_sides_of_a_leafs_end():
    """Token 0 is row 15 of some windows and row 16 of others, which another warp holds."""
    spans = [(15, 2), (16, 1)] * 300
    call = make(spans, head_dim=64, compress_ratio=17, next_n=2, device="cuda")
    assert_all_follow_contract([variant_of(call, reduce_warps=2, head_slice=64)] * 5, call)


def test_a_requests_next_window_reuses_the_memory_of_the_partials():
    spans = [(start % 8, 16) for start in range(300)]
    call = make(spans, head_dim=128, compress_ratio=8, next_n=16, device="cuda")
    assert_all_follow_contract([variant_of(call, reduce_warps=2, head_slice=128)] * 5, call)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_the_reference_serves_a_gpu_if_it_is_forced(backend):
    call = make(spans_for(4, 3), head_dim=64, next_n=3, device="cuda")
    assert_follows_contract(run_op, call)


# ---- Refused -------------------------------------------------------------------------------------


def refusal(call: Call) -> str:
    with pytest.raises(ValueError) as error:
        run_op(call)
    return str(error.value)


@pytest.mark.parametrize("fields", [{"next_n": 17}, {"next_n": 0}, {"head_dim": 12}], ids=str)
def test_what_no_row_can_solve_is_the_same_error_on_a_gpu_and_on_a_cpu(fields):
    call = make([(7, 1)], kv_dtype="fp32", **fields)
    message = refusal(call)
    assert refusal(call.clone("cuda")) == message
    assert "accepted: " in message


def test_a_problem_without_a_row_is_a_table_error_on_a_gpu():
    call = make([(7, 1)], head_dim=40, compress_ratio=128, device="cuda")
    before = call.clone()
    with pytest.raises(TableError, match=r"has no cuda row .*\n.*head_dim: 40"):
        run_op(call)
    for name in MUTATED:
        assert_same_bits(getattr(call, name), getattr(before, name), name)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ({"prefetch": "early"}, "prefetch is 'early'; accepted: 'none', 'metadata', 'state'"),
        ({"work": "both"}, "work is 'both'; accepted: 'all', 'store', 'reduce'"),
        ({"ape_in_state": 1}, "ape_in_state is 1; accepted: a value of type bool"),
    ],
    ids=str,
)
def test_a_mode_that_there_is_not_is_refused_and_nothing_is_written(mode, words):
    call = make([(7, 1)], head_dim=128, ape_in_state="ape_in_state" not in mode, device="cuda")
    before = call.clone()
    run_op(before.clone())  # its like is remembered
    assert refusal(replace(call, **mode)) == f"kvfold.paged_kv_compress: {words}"
    for name in MUTATED:
        assert_same_bits(getattr(call, name), getattr(before, name), name)


@pytest.mark.parametrize("name", ["kv_score", "paged_kv", "block_table_score", "cu_outputs"])
def test_a_cpu_tensor_among_gpu_tensors_is_refused(name):
    call = make([(7, 1)], head_dim=128, device="cuda")
    call = replace(call, **{name: getattr(call, name).cpu()})
    for entry in (kvfold.paged_kv_compress, torch.ops.kvfold.paged_kv_compress):
        with pytest.raises(ValueError, match=r"is on .*; accepted: .*, where kv_score is"):
            call.pass_to(entry)


# ---- The same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("one", SOME_PROBLEMS, ids=name_of)
def test_every_cuda_variant_gives_the_same_bits(one):
    call = call_of(one, page_size=16, output_dtype="fp32")
    variants = many_variants(one)
    compile_ahead(variants)
    first = call.clone()
    run(variants[0], first)
    for variant in variants[1:]:
        mine = call.clone()
        run(variant, mine)
        for name in MUTATED:
            assert_same_bits(getattr(mine, name), getattr(first, name), f"{variant.symbol} {name}")


@pytest.mark.parametrize("one", SOME_PROBLEMS, ids=name_of)
def test_a_cuda_window_has_the_same_bits_whichever_step_brought_its_rows(one):
    """All new tokens at once, and one by one, so that the last finds the others in the state."""
    ratio, next_n = one.compress_ratio, one.next_n
    call = call_of(one, spans=[(2 * ratio - next_n, next_n)] * 3, output_dtype="fp32")
    for variant in variants_of(one, "cuda"):
        at_once, one_by_one = call.clone(), call.clone()
        run(variant, at_once)
        for token in range(next_n):
            step = replace(
                one_by_one,
                kv_score=call.kv_score[token::next_n].contiguous(),
                kv_lens=call.kv_lens - (next_n - 1 - token),
                cu_seq_lens=torch.arange(4, dtype=torch.int32, device="cuda"),
            )
            run(variant, step)
        for name in MUTATED:
            a, b = getattr(at_once, name), getattr(one_by_one, name)
            assert_same_bits(a, b, f"{variant.symbol} {name}")


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("one", SOME_PROBLEMS, ids=name_of)
def test_bits_do_not_depend_on_run_neighbours_position_or_pages(one, kind):
    """One request alone, then at several places among up to 512, on pages of other numbers."""
    ratio, next_n = one.compress_ratio, one.next_n
    spans = [(2 * ratio - next_n, next_n)]
    alone = call_of(one, spans=spans, page_size=16, output_dtype="fp32")
    results = {}
    for variant in variants_of(one, kind):
        mine = alone.clone()
        run(variant, mine)
        assert mine.output.size(0) == 1 and not mine.output.isnan().any()
        results[variant] = mine.output
    for batch in (1, 2, 17, 512):
        crowd = decode_step(
            **one.values(), batch=batch, page_size=16, output_dtype="fp32", device="cuda",
            seed=batch,
        )  # fmt: skip
        places = sorted({0, batch // 2, batch - 1})
        for place in places:
            transplant(alone, crowd, place)
        rows = crowd.cu_outputs[places].long()
        for variant, result in results.items():
            for _ in range(2):
                crowd.output.fill_(torch.nan)
                run(variant, crowd)
                want = result.expand(len(places), -1)
                assert_same_bits(crowd.output[rows], want, f"{variant.symbol} batch {batch}")


def transplant(one: Call, crowd: Call, place: int) -> None:
    """Puts the only request of `one` in the place of another in a crowd of the same page size."""
    length = int(one.kv_lens[0])
    pages = -(-length // one.paged_kv.size(1))
    crowd.kv_lens[place] = length
    begin, end = crowd.cu_seq_lens[place : place + 2].tolist()
    crowd.kv_score[begin:end] = one.kv_score
    crowd.ape.copy_(one.ape)
    for pool, table in (("paged_kv", "block_table_kv"), ("paged_score", "block_table_score")):
        old_pages = getattr(one, table)[0, :pages].long()
        new_pages = getattr(crowd, table)[place, :pages].long()
        assert (new_pages >= 0).all()
        getattr(crowd, pool)[new_pages] = getattr(one, pool)[old_pages]


# ---- Safe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_random_metadata_touches_nothing_outside(seed, share, kind):
    """Random 32-bit integers in every table: guard zones stay, and the oracle agrees."""
    fields = {"head_dim": 64, "compress_ratio": (4, 16)[seed % 2], "next_n": 4, "reserve": 8}
    layout = ("split", "packed", "strided")[seed % 3]
    call = random_call(seed, **fields, layout=layout, page_size=(3, 16)[seed // 2 % 2])
    call = call.scrambled(share, seed).clone("cuda")
    assert_all_follow_contract([variant_of(call, kind, reduce_warps=2, head_slice=32)], call)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("seed", "work", "ape_in_state"),
    [(seed, *mode) for seed, mode in enumerate(itertools.product(WORK, (True, False)))],
)
def test_random_metadata_touches_nothing_outside_in_any_mode(seed, work, ape_in_state, share):
    call = random_call(
        seed, head_dim=128, compress_ratio=4, state_dtype="fp32", next_n=8, reserve=8,
        page_size=(1, 8)[seed % 2], layout=("split", "packed", "strided")[seed % 3],
        ape_in_state=ape_in_state, work=work,
    )  # fmt: skip
    call = call.scrambled(share, seed).clone("cuda")
    variants = [scheduled(call.problem, schedule) for schedule in SCHEDULES]
    variants.append(variant_of(call, "triton", reduce_warps=1, head_slice=64))
    assert_all_follow_contract(variants, call)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_metadata_touches_nothing_outside_at_production_shape(seed, kind):
    call = call_of(PRODUCTION, page_size=32, reserve=2, seed=seed, device="cpu")
    call = call.scrambled((0.05, 0.3, 1.0)[seed], seed).clone("cuda")
    assert_all_follow_contract(variants_of(PRODUCTION, kind), call)


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_pool_past_2_31_elements(kind):
    """The pages at the end of a pool of more than 2^31 elements hold what small pools would."""
    one = problem(512, 128, "bf16", "bf16", 4)
    small = decode_step(**one.values(), batch=3, page_size=64, device="cuda")
    num_pages = 2**31 // (64 * 512) + 64
    needed = 2 * 2 * num_pages * 64 * 512 + (2 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    shift = num_pages - small.paged_kv.size(0)
    changes = {"output": small.output.clone()}
    for pool, table in (("paged_kv", "block_table_kv"), ("paged_score", "block_table_score")):
        changes[pool] = torch.empty(num_pages, 64, 512, dtype=torch.bfloat16, device="cuda")
        changes[pool][shift:] = getattr(small, pool)
        changes[table] = getattr(small, table) + shift
    large = replace(small, **changes)
    variant = variants_of(one, kind)[0]
    run(variant, small)
    run(variant, large)
    assert large.paged_kv.numel() > 2**31
    assert not small.output.isnan().any()
    assert_same_bits(large.output, small.output)
    for pool in ("paged_kv", "paged_score"):
        assert_same_bits(getattr(large, pool)[shift:], getattr(small, pool))


# ---- Graphs, streams, threads, devices, torch.compile --------------------------------------------


@pytest.fixture
def first_use(tmp_path, monkeypatch):
    """As in a new process with an empty cache: no kernel is loaded."""
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_kernels", {})
    dispatch.reload()
    yield
    dispatch.reload()


def capture_and_replay_with_other_lengths(**mode) -> None:
    one = problem(128, 4, "bf16", "fp32", 3, ape_in_state=mode.get("ape_in_state", True))
    steps = [
        replace(call_of(one, spans=spans, page_size=8, reserve=2, seed=seed), **mode)
        for seed, spans in enumerate([[(9, 3), (8, 3), (0, 0)], [(1, 3), (11, 3), (0, 0)]])
    ]
    replay = captured(run_op, steps[0])

    shapes = [[x.shape for x in step.args() if isinstance(x, torch.Tensor)] for step in steps]
    assert shapes[0] == shapes[1]
    for step in [*steps, steps[0]]:
        assert_follows_contract(replay, step)


@BOTH_BACKENDS
def test_a_first_call_can_be_captured_and_replayed_with_other_lengths(first_use, backend):
    capture_and_replay_with_other_lengths()


@BOTH_BACKENDS
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("prefetch", PREFETCH)
def test_every_mode_can_be_captured_and_replayed(prefetch, work, backend):
    for ape_in_state in (True, False):
        capture_and_replay_with_other_lengths(
            prefetch=prefetch, work=work, ape_in_state=ape_in_state
        )


def test_a_call_launches_on_the_current_stream_and_never_synchronises():
    call, want = (decode_step(batch=4, device="cuda") for _ in range(2))
    run_op(want)
    stream = torch.cuda.Stream()
    late = call.kv_score.clone()
    call.kv_score.zero_()
    torch.cuda.synchronize()
    # Work on another stream would not wait for the gate.
    with torch.cuda.stream(stream), gate.closed():
        torch.cuda.set_sync_debug_mode("error")
        try:
            call.kv_score.copy_(late)
            run_op(call)
            assert not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(call.output, want.output)


def test_a_call_is_one_launch(monkeypatch):
    call = decode_step(batch=4, device="cuda")
    run_op(call)
    kernel = dispatch.launcher(call.problem, 4, call.ape.device)
    assert isinstance(kernel, driver.Kernel)
    launches = []
    launch = kernel.cu_launch

    def counted(*args):
        launches.append(args)
        return launch(*args)

    monkeypatch.setattr(kernel, "cu_launch", counted)
    modes = [{"work": work, "prefetch": prefetch} for work in WORK for prefetch in PREFETCH]
    for count, mode in enumerate([{}, {}, {}, *modes], 1):
        run_op(replace(call, **mode))
        replace(call, **mode).pass_to(torch.ops.kvfold.paged_kv_compress)
        assert len(launches) == 2 * count


def test_repeated_calls_skip_the_dispatcher_and_follow_the_contract(monkeypatch):
    """Each call of assert_follows_contract is on new memory."""
    torch_op = OP._torch_op
    dispatched = []

    def counted(*args, **kwargs):
        dispatched.append(args)
        torch_op(*args, **kwargs)

    monkeypatch.setattr(OP, "_torch_op", counted)
    one = problem(128, 4, "bf16", "fp32", 4)
    dispatch.reload()  # forgets the calls of other tests
    for number, layout in enumerate(("split", "strided", "packed"), 1):
        call = call_of(one, layout=layout, page_size=16)
        for _ in range(3):
            assert_follows_contract(run_op, call)
        assert len(dispatched) == number


def chain(one: Problem, prefetch: str, layers: int = 6) -> list[torch.Tensor]:
    """Steps of decoding in one captured graph, on `layers` states with common metadata.

    A kernel right before each call computes the call's new tokens.

    Returns:
        the outputs of all steps, and the states at the end.
    """
    made = [
        decode_step(**one.values(), batch=40, scenario="spread", device="cuda", seed=seed)
        for seed in range(layers)
    ]
    shared = {name: getattr(made[0], name) for name in WORKLOAD.metadata}
    kv_score = torch.empty_like(made[0].kv_score)  # one buffer for all layers
    shared |= {"kv_score": kv_score, "prefetch": prefetch}
    states = [replace(call, **shared) for call in made]
    weights = torch.randn(3, 64, kv_score.size(1), device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(kv_score.size(0), 64, device="cuda", dtype=torch.bfloat16)

    def step():
        for layer, state in enumerate(states):
            kv_score.copy_((hidden @ weights[layer % 3]).to(kv_score.dtype))
            run_op(state)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    written = []
    for number in range(32):
        hidden.copy_(torch.randn_like(hidden))
        states[0].kv_lens.add_((number % 3 - 1) * one.next_n)  # on and back
        graph.replay()
        written += [state.output.clone() for state in states]
    pools = [pool for state in states for pool in (state.paged_kv, state.paged_score)]
    return [torch.stack(written), *pools]


@pytest.mark.parametrize("prefetch", ["metadata", "state"])
@pytest.mark.parametrize(
    "one",
    [
        PRODUCTION,
        problem(128, 4, "bf16", "fp32", 2),
        problem(512, 4, "bf16", "fp32", 8, ape_in_state=False),
    ],
    ids=name_of,
)
def test_prefetching_changes_no_bit(one, prefetch):
    results = []
    for mode in ("none", prefetch):
        torch.manual_seed(0)
        results.append(chain(one, mode))
    for mine, other in zip(*results, strict=True):
        assert_same_bits(mine, other)


@pytest.mark.parametrize("prefetch", ["none", "metadata"])
@pytest.mark.parametrize(("kind", "schedule"), RINGS_AND_SCHEDULES, ids=str)
def test_a_ring_in_a_graph_gives_the_bits_of_a_state_without_bound(kind, schedule, prefetch):
    """Each call reads rows that the one before it stores, or stores rows that it reads."""
    one = on_schedule(schedule, prefetch=prefetch)

    def replay(calls) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            each(one)(calls)
        graph.replay()

    decoding(kind, 60, "cuda", head_dim=128).compare(each(on_schedule(schedule)), replay)


@pytest.mark.parametrize("prefetch", ["none", "metadata"])
def test_calls_in_a_row_on_one_state_see_each_other(prefetch):
    """Each call overlaps the one before it (programmatic dependent launch) and must still wait."""
    call, want = (decode_step(batch=40, head_dim=128, device="cuda") for _ in range(2))
    # A whole window of new rows, each of which the last step reads back.
    steps = [
        {"kv_score": torch.randn_like(call.kv_score), "kv_lens": call.kv_lens - 4 * (31 - number)}
        for number in range(32)
    ]

    def run_steps():
        for step in steps:
            run_op(replace(call, prefetch=prefetch, **step))

    run_steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_steps()
    for step in steps:
        run_op(replace(want, **step))
        torch.cuda.synchronize()
    for _ in range(20):
        call.paged_kv.zero_()
        call.paged_score.zero_()
        graph.replay()
        assert_same_bits(call.output, want.output)


def test_several_threads_may_make_the_first_call(first_use):
    """Threads that have not used CUDA before launch one variant that is not loaded yet."""
    made, want = (
        [decode_step(batch=3, device="cuda", seed=seed) for seed in range(8)] for _ in range(2)
    )
    failures = []

    def work(call: Call) -> None:
        try:
            for _ in range(20):
                run_op(call)
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(call,)) for call in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for mine, other in zip(made, want, strict=True):
        run_op(other)
        assert_same_bits(mine.output, other.output)


@BOTH_BACKENDS
def test_a_second_gpu_of_the_same_process(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        assert_follows_contract(run_op, call_of(PRODUCTION, device=device))
        assert torch.cuda.current_device() == 0


# Two steps are two calls on one state, whose order the compiler must keep.
@pytest.mark.parametrize("works", [("all",), ("reduce", "store")])
@pytest.mark.parametrize("mode", [{}, {"prefetch": "metadata", "ape_in_state": False}], ids=str)
def test_torch_compile_with_inductor(mode, works):
    def step(weight, *arguments):
        kv_score, *rest = arguments
        for work in works:
            kvfold.paged_kv_compress((kv_score @ weight) * 1.0, *rest, work=work, **mode)
        return rest[5].float().nan_to_num().sum()  # of the output

    torch._dynamo.reset()
    eager, compiled = (decode_step(batch=8, layout="packed", device="cuda") for _ in range(2))
    weight = torch.eye(eager.kv_score.size(1), dtype=torch.bfloat16, device="cuda")
    args, _ = eager.args_and_kwargs()
    want = step(weight, *args)
    got = torch.compile(step, fullgraph=True)(weight, *compiled.args_and_kwargs()[0])
    assert want != 0
    torch.testing.assert_close(got, want)
    for name in MUTATED:
        assert_same_bits(getattr(compiled, name), getattr(eager, name), name)


@pytest.mark.parametrize(
    "mode", [{}, {"prefetch": "state", "ape_in_state": False}, {"work": "reduce"}], ids=str
)
def test_opcheck(mode):
    args, kwargs = replace(decode_step(batch=4, device="cuda"), **mode).args_and_kwargs()
    torch.library.opcheck(torch.ops.kvfold.paged_kv_compress.default, args, kwargs)


def test_the_op_works_with_a_torch_that_lacks_the_private_parts():
    script = Path(__file__).with_name("run_without_internals.py")
    done = subprocess.run([sys.executable, script, "cuda"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# ---- Compile and load ----------------------------------------------------------------------------

LOAD_WITHOUT_COMPILING = """
import torch
from kvfold.runtime import compiler, dispatch, driver
from kvfold.ops.paged_kv_compress.spec import Problem

def refuse(*args):
    raise AssertionError(f"compiles {args}")

compiler.compile_source = compiler.compile_variant = refuse
problem = Problem(head_dim=512, compress_ratio=128, kv_dtype="bf16", state_dtype="fp32", next_n=4)
kernel = dispatch.launcher(problem, 16, torch.zeros(1, device="cuda").device)
assert isinstance(kernel, driver.Kernel)
print("loaded")
"""


def test_a_kernel_is_compiled_once_and_the_next_process_loads_it(first_use, monkeypatch):
    compiled = []
    compile_variant = compiler.compile_variant

    def counted(*args):
        compiled.append(args)
        return compile_variant(*args)

    monkeypatch.setattr(compiler, "compile_variant", counted)
    for seed in range(2):
        run_op(decode_step(batch=16, device="cuda", seed=seed))
    assert len(compiled) == 1
    command = [sys.executable, "-c", LOAD_WITHOUT_COMPILING]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr
