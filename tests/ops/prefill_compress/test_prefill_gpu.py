"""The kernels on a GPU: right, the same bits however they are run, safe, capturable."""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gate
import numpy as np
import pytest
import torch
from graphs import captured
from numerics import assert_rows_close, assert_same_bits
from prefill_backends import Backend, cuda_variant, decode_op, run_op, run_variant, triton_variant
from prefill_calls import MUTATED, Call, Prefill, make, random_call
from prefill_contract import CASES, assert_follows_contract

import kvfold
import kvfold.torch_ops  # registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import TableError, Variant, load_table
from kvfold.ops.prefill_compress import reference, workload
from kvfold.ops.prefill_compress.spec import Problem, Tuning
from kvfold.runtime import cubin_cache, dispatch, driver

pytestmark = pytest.mark.gpu

PREFETCH = ("none", "metadata", "state")
TABLE = [variant for variant in load_table().variants if variant.op == "prefill_compress"]
PROBLEMS = list(dict.fromkeys(variant.problem for variant in TABLE))
# Columns that a CUDA variant can have for any problem: an overlapping window needs a warp's.
COLUMNS = 256


def problem(ratio: int, kv_dtype: str, state_dtype: str, ape_in_state: bool = True) -> Problem:
    return Problem(
        head_dim=512,
        compress_ratio=ratio,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        ape_in_state=ape_in_state,
    )


SOME_PROBLEMS = [
    problem(128, "bf16", "fp32"),
    problem(128, "fp32", "bf16", ape_in_state=False),
    problem(4, "bf16", "fp32"),
    problem(4, "bf16", "bf16", ape_in_state=False),
    problem(4, "fp32", "fp32"),
    problem(2, "bf16", "bf16"),
]


def name_of(one: Problem) -> str:
    return "_".join(one.symbol_parts())


def variants_of(one: Problem, backend: str) -> list[Variant]:
    """The table's variants of a problem, for any number of tokens and architecture."""
    return [v for v in TABLE if v.problem == one and v.backend == backend]


def many_variants(one: Problem) -> list[Variant]:
    """CUDA variants of a problem: those of the table, and others with another tuning."""
    found = dict.fromkeys(variants_of(one, "cuda"))
    stages = itertools.cycle((2, 3, 5, 8))
    min_ctas = itertools.cycle((1, 3, 2))
    for reduce_warps, head_slice in itertools.product(
        (1, 2, 4, 8, 16, 32), (16, 32, 64, 128, 256, 512)
    ):
        for _ in range(2):
            with contextlib.suppress(TableError):
                tuning = Tuning(
                    reduce_warps=reduce_warps,
                    head_slice=head_slice,
                    stages=next(stages),
                    min_ctas=next(min_ctas),
                )
                variant = Variant(problem=one, backend="cuda", tuning=tuning)
                variant.check_arch("sm_90")
                found[variant] = None
    assert len(found) >= 4
    return list(found)


def compile_all(variants: list[Variant]) -> None:
    arch = dispatch.arch_of(torch.device("cuda", 0))
    with ThreadPoolExecutor(4) as pool:  # NVRTC releases Python's lock
        list(pool.map(lambda variant: cubin_cache.compiled(variant, arch), variants))


def spans_for(ratio: int) -> list[tuple[int, int]]:
    """Requests whose windows are old, begin in an earlier call, and are new, at several phases."""
    few = [(2 * ratio - 1, 1), (ratio, 1), (0, 3), (5, 0), (0, 0), (3 * ratio - 2, 4)]
    return [(ratio // 2, 5 * ratio), (0, 3 * ratio + 1), (2 * ratio, 2 * ratio - 1), *few]


def call_of(one: Problem, **fields) -> Call:
    """A call of the problem on a GPU."""
    fields = one.values() | {"page_size": 16, "device": "cuda"} | fields
    return make(fields.pop("spans", None) or spans_for(one.compress_ratio), **fields)


def case_of(one: Problem, tokens: int, scenario: str, seed: int = 0, **options) -> Call:
    """A case of the workload as a call."""
    options = workload.Options.of(options)
    case = workload.make(one, tokens, scenario, options, "cuda", seed)
    return Call(*case.arguments.args())


def assert_all_follow_contract(variants: list[Variant], call: Call) -> None:
    expected = call.expected()
    for variant in variants:
        assert_follows_contract(lambda c, v=variant: run_variant(v, c), call, expected)


def assert_like_the_reference(run: Prefill, call: Call) -> None:
    """For calls that are too large for the oracle."""
    mine = call.clone()
    wanted = replace(call.clone(), output=call.output.float())
    run(mine)
    reference.run(wanted)
    for name in ("paged_kv", "paged_score"):
        assert_same_bits(getattr(mine, name), getattr(wanted, name), name)
    assert not mine.output.isnan().any()
    scale = call.kv_score.abs().max().item()
    assert_rows_close(mine.output, wanted.output, scale, "output")


@pytest.fixture
def backend(request, monkeypatch):
    """The backend that serves all calls of the test."""
    monkeypatch.setenv("KVFOLD_BACKEND", request.param)
    dispatch.reload()
    yield request.param
    monkeypatch.undo()
    dispatch.reload()


BOTH_BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)


# ---- Right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("one", PROBLEMS, ids=name_of)
def test_every_table_variant_follows_the_contract(one, kind):
    variants = variants_of(one, kind)
    if not variants:
        pytest.skip(f"the table has no {kind} row")
    layouts = [("split", 32, "all"), ("packed", 7, "tail"), ("strided", 128, "tail")]
    for seed, (layout, page_size, write_state) in enumerate(layouts):
        call = call_of(
            one,
            layout=layout,
            page_size=page_size,
            output_dtype=("bf16", "fp32")[seed % 2],
            write_state=write_state,
            max_rollback=3 * seed,
            state_period=(0, 0, one.compress_ratio + 2)[seed],
            seed=seed,
        )
        assert_all_follow_contract(variants, call)


@pytest.mark.parametrize("name", CASES)
def test_cuda_variants_follow_every_line_of_the_contract(name):
    call = CASES[name](head_dim=COLUMNS).clone("cuda")
    tunings = [(1, COLUMNS, 3), (2, 16, 2), (8, 32, 4)]
    if call.overlap:
        tunings = [(1, COLUMNS, stages) for stages in (2, 3, 8)]
    variants = [
        cuda_variant(call, reduce_warps=warps, head_slice=head_slice, stages=stages)
        for warps, head_slice, stages in tunings
        if call.compress_ratio < 128 or warps > 1
    ]
    compile_all(variants)
    assert_all_follow_contract(variants, call)


def random_cuda_call(seed: int) -> Call:
    """A random call of a problem that has CUDA variants."""
    ratio = (1, 2, 4, 5, 8, 16, 128)[seed % 7]
    overlap = ratio <= 8 and bool(seed // 7 % 2)
    return random_call(seed, head_dim=COLUMNS, compress_ratio=ratio, overlap=overlap, device="cuda")


@pytest.mark.parametrize("seed", range(28))
def test_random_calls(seed):
    call = random_cuda_call(seed)
    assert_all_follow_contract([cuda_variant(call)], call)


@pytest.mark.parametrize("one", SOME_PROBLEMS, ids=name_of)
@pytest.mark.parametrize("scenario", workload.SCENARIOS)
@pytest.mark.parametrize("write_state", ["all", "tail"])
def test_the_workloads_cases_at_real_sizes(one, scenario, write_state):
    options = {"write_state": write_state, "max_rollback": 2, "state_period": 256}
    call = case_of(one, 4096, scenario, output_dtype="fp32", **options)
    assert_like_the_reference(run_op, call)


@BOTH_BACKENDS
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("write_state", ["all", "tail"])
def test_a_prompt_of_100_000_tokens(backend, ratio, write_state):
    one = replace(problem(ratio, "bf16", "fp32"), head_dim=128)
    call = call_of(
        one,
        spans=[(ratio + 1, 100_000), (ratio - 1, 2)],
        page_size=64,
        write_state=write_state,
        state_period=1000,
    )
    assert_like_the_reference(run_op, call)


@BOTH_BACKENDS
@pytest.mark.parametrize("ratio", [4, 128])
def test_2000_requests_of_1_to_8_tokens(backend, ratio):
    one = replace(problem(ratio, "bf16", "fp32"), head_dim=128)
    spans = [(7 * b % (2 * ratio), 1 + b % 8) for b in range(2000)]
    assert_like_the_reference(run_op, call_of(one, spans=spans))


# ---- Safe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(14))
def test_random_metadata_touches_nothing_outside(seed, share):
    """Random 32-bit integers in every table: guard zones stay, and the oracle agrees."""
    call = random_cuda_call(seed).scrambled(share, seed)
    assert_all_follow_contract([cuda_variant(call)], call)


@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("one", SOME_PROBLEMS[:3], ids=name_of)
@pytest.mark.parametrize("seed", range(3))
def test_random_metadata_touches_nothing_outside_at_production_shape(one, seed, kind):
    spans = spans_for(one.compress_ratio)
    reserve = sum(new for _, new in spans) // one.compress_ratio + 2
    call = call_of(one, spans=spans, page_size=32, reserve=reserve, seed=seed)
    call = call.scrambled((0.05, 0.3, 1.0)[seed], seed)
    assert_all_follow_contract(variants_of(one, kind), call)


def test_many_requests_with_broken_metadata_beside_good_ones():
    """More requests than a CTA or a program looks at together."""
    call = make(
        [(b % 7, b % 5) for b in range(1500)], head_dim=128, overlap=False, reserve=2, device="cuda"
    )
    broken = torch.arange(1, 1500, 3, device="cuda")
    call.kv_lens[broken] = -(2**31)
    assert_all_follow_contract([cuda_variant(call), triton_variant(call, head_slice=64)], call)


# ---- The same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("one", SOME_PROBLEMS, ids=name_of)
@pytest.mark.parametrize("write_state", ["all", "tail"])
def test_every_cuda_variant_gives_the_same_bits(one, write_state):
    call = call_of(one, output_dtype="fp32", write_state=write_state, state_period=6)
    variants = many_variants(one)
    compile_all(variants)
    first = call.clone()
    run_variant(variants[0], first)
    for variant in variants[1:]:
        mine = call.clone()
        run_variant(variant, mine)
        for name in MUTATED:
            assert_same_bits(getattr(mine, name), getattr(first, name), f"{variant.symbol} {name}")


@pytest.mark.parametrize("one", SOME_PROBLEMS, ids=name_of)
def test_the_ops_that_dispatch_chooses_continue_each_other(one):
    """Whole, chunks and decode after the tail, by the table's variants, which sizes change."""
    ops = Backend("cuda", one.head_dim, run_op, decode_op, same_bits=True)
    ratio = one.compress_ratio
    lengths = [5 * ratio + 3, 300, 40]
    fields = {name: value for name, value in one.values().items() if name != "overlap"}
    whole = ops.whole_run(lengths, page_size=16, **fields)
    for seed in range(2):
        run = ops.run(lengths, page_size=16, **fields)
        rng = np.random.default_rng(seed)
        for _ in range(4):
            new = np.minimum(run.left, rng.integers(0, 120, 3))
            run.prefill(ops.prefill, new, write_state="tail", max_rollback=2)
        run.decode_all(ops.decode, most=4)
        assert_same_bits(run.whole.output, whole.whole.output)


@pytest.mark.parametrize("one", SOME_PROBLEMS, ids=name_of)
@pytest.mark.parametrize("kind", ["cuda", "triton"])
def test_bits_do_not_depend_on_the_run_or_on_the_size_of_the_call(one, kind):
    """The rows of one request, alone and among others."""
    crowd = call_of(one, output_dtype="fp32")
    variant = variants_of(one, kind)[0]
    first, again = crowd.clone(), crowd.clone()
    run_variant(variant, first)
    run_variant(variant, again)
    assert_same_bits(again.output, first.output)
    tokens, rows = crowd.cu_seq_lens.tolist(), crowd.cu_outputs.tolist()
    for b in (1, 2):
        alone = replace(
            crowd.clone(),
            kv_score=crowd.kv_score[tokens[b] : tokens[b + 1]].clone(),
            block_table_kv=crowd.block_table_kv[b : b + 1],
            block_table_score=crowd.block_table_score[b : b + 1],
            output=crowd.output[rows[b] : rows[b + 1]].clone(),
            kv_lens=crowd.kv_lens[b : b + 1],
            cu_seq_lens=crowd.cu_seq_lens[b : b + 2] - tokens[b],
            cu_outputs=crowd.cu_outputs[b : b + 2] - rows[b],
        )
        run_variant(variant, alone)
        assert_same_bits(alone.output, first.output[rows[b] : rows[b + 1]])


# ---- Graphs and streams --------------------------------------------------------------------------


@pytest.fixture
def first_use(tmp_path, monkeypatch):
    """As in a new process with an empty cache: no kernel is loaded."""
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_kernels", {})
    dispatch.reload()
    yield
    dispatch.reload()


@BOTH_BACKENDS
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("write_state", ["all", "tail"])
def test_a_first_call_can_be_captured_and_replayed_with_other_lengths(
    first_use, backend, ratio, write_state
):
    one = problem(ratio, "bf16", "fp32")
    # All have 135 tokens and as many pages.
    spans = [
        [(3, 130), (128, 5), (0, 0)],
        [(127, 1), (1, 133), (9, 1)],
        [(0, 0), (0, 0), (1, 135)],
        [(5, 45), (90, 45), (91, 45)],
    ]
    calls = [
        call_of(one, spans=s, page_size=8, reserve=40, write_state=write_state, seed=seed)
        for seed, s in enumerate(spans)
    ]
    replay = captured(run_op, calls[0])

    shapes = [[x.shape for x in call.args() if isinstance(x, torch.Tensor)] for call in calls]
    assert all(shape == shapes[0] for shape in shapes)
    for call in [*calls, calls[0]]:
        assert_follows_contract(replay, call)


def test_a_call_launches_on_the_current_stream_and_never_synchronises():
    call, want = (case_of(SOME_PROBLEMS[0], 512, "chunk") for _ in range(2))
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
    call = case_of(SOME_PROBLEMS[0], 512, "mixed")
    run_op(call)
    kernel = dispatch.launcher(call.problem, 512, call.ape.device)
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


def test_repeated_calls_follow_the_contract():
    """The second and later calls of a layout skip the dispatcher. Each is on new memory."""
    dispatch.reload()
    for write_state, layout in itertools.product(("all", "tail"), ("split", "packed")):
        call = call_of(SOME_PROBLEMS[2], layout=layout, write_state=write_state)
        for max_rollback in (0, 0, 5):
            assert_follows_contract(run_op, replace(call, max_rollback=max_rollback))


# ---- The kernel before ---------------------------------------------------------------------------


def chain(one: Problem, scenario: str, prefetch: str, layers: int = 6) -> list[torch.Tensor]:
    """Prompts in one captured graph, on `layers` states with common metadata.

    A kernel right before each call computes the call's new tokens.

    Returns:
        the outputs of all steps, and the states at the end.
    """
    made = [
        case_of(one, 1024, scenario, seed, write_state="all", output_dtype="fp32")
        for seed in range(layers)
    ]
    shared = {name: getattr(made[0], name) for name in workload.WORKLOAD.metadata}
    kv_score = torch.empty_like(made[0].kv_score)  # one buffer for all layers
    states = [replace(call, kv_score=kv_score, prefetch=prefetch, **shared) for call in made]
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
    for _ in range(8):
        hidden.copy_(torch.randn_like(hidden))
        graph.replay()
        written += [state.output.clone() for state in states]
    pools = [pool for state in states for pool in (state.paged_kv, state.paged_score)]
    return [torch.stack(written), *pools]


@pytest.mark.parametrize("one", SOME_PROBLEMS[:3], ids=name_of)
@pytest.mark.parametrize("scenario", ["chunk", "decode"])
def test_prefetch_changes_no_bit(one, scenario):
    results = []
    for prefetch in PREFETCH:
        torch.manual_seed(0)
        results.append(chain(one, scenario, prefetch))
    for other in results[1:]:
        for mine, wanted in zip(other, results[0], strict=True):
            assert_same_bits(mine, wanted)


@pytest.mark.parametrize("prefetch", ["none", "metadata"])
@pytest.mark.parametrize("ratio", [4, 128])
def test_calls_in_a_row_on_one_state_see_each_other(prefetch, ratio):
    """Each call overlaps the one before it (programmatic dependent launch) and must still wait."""
    ops = Backend("cuda", 512, run_op, decode_op, same_bits=True)
    lengths = [3 * ratio + 40] * 40
    fields = {"compress_ratio": ratio, "page_size": 16}
    whole = ops.whole_run(lengths, **fields)
    run = ops.run(lengths, **fields)
    chunks = []
    while run.left.any():  # most chunks begin within a window
        new = np.minimum(run.left, ratio + 3)
        chunks.append(run.next_call(new, prefetch=prefetch))
        run.length += new

    def run_chunks():
        for call in chunks:
            run_op(call)

    run_chunks()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_chunks()
    for _ in range(10):
        for call in chunks:
            call.output.fill_(torch.nan)
        run.whole.paged_kv.fill_(torch.nan)
        run.whole.paged_score.fill_(torch.nan)
        graph.replay()
        run.length[:] = 0
        for call in chunks:
            run.accept(call, np.diff(call.cu_seq_lens.cpu().numpy()))
        assert_same_bits(run.whole.output, whole.whole.output)


def test_torch_compile_with_inductor():
    def step(weight, kwargs, kv_score, *rest):
        kvfold.prefill_compress((kv_score @ weight) * 1.0, *rest, **kwargs)
        return rest[5].float().nan_to_num().sum()  # of the output

    one = SOME_PROBLEMS[0]
    eager, compiled = (case_of(one, 512, "chunk", layout="packed") for _ in range(2))
    weight = torch.eye(eager.kv_score.size(1), dtype=torch.bfloat16, device="cuda")
    args, kwargs = eager.args_and_kwargs()
    want = step(weight, kwargs, *args)
    got = torch.compile(step, fullgraph=True)(weight, kwargs, *compiled.args_and_kwargs()[0])
    assert want != 0
    torch.testing.assert_close(got, want)
    for name in MUTATED:
        assert_same_bits(getattr(compiled, name), getattr(eager, name), name)


def test_opcheck():
    args, kwargs = case_of(SOME_PROBLEMS[0], 64, "decode").args_and_kwargs()
    torch.library.opcheck(torch.ops.kvfold.prefill_compress.default, args, kwargs)
