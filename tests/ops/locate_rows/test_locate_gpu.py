"""The kernels on a GPU: right, safe, capturable, in order with the kernel before."""

from functools import partial

import gate
import pytest
import torch
from graphs import captured
from locate_calls import (
    CASES,
    MUTATED,
    SOURCES,
    Call,
    assert_follows_contract,
    assert_safe,
    make,
    random_call,
    run_op,
    run_variant,
    variant_of,
)

import kvfold.torch_ops  # noqa: F401  registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import load_table
from kvfold.ops.locate_rows import workload
from kvfold.ops.locate_rows.spec import WARPS, Problem
from kvfold.runtime import dispatch, driver

pytestmark = pytest.mark.gpu

CUDA = partial(run_variant, variant_of("cuda"))
TABLE = [variant for variant in load_table().variants if variant.op == "locate_rows"]
BOTH_SOURCES = pytest.mark.parametrize("source", SOURCES)


def case_of(rows: int, scenario: str, **options) -> Call:
    """A case of the workload as a call."""
    options = workload.Options.of(options)
    case = workload.make(Problem(), rows, scenario, options, "cuda")
    return Call(*case.arguments.args())


@pytest.fixture
def backend(request, monkeypatch):
    """The backend that serves all calls of the test."""
    monkeypatch.setenv("KVFOLD_BACKEND", request.param)
    dispatch.reload()
    yield request.param
    monkeypatch.undo()
    dispatch.reload()


BOTH_BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)


# ---- Right and safe ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_cuda_kernel_follows_the_contract(name):
    assert_follows_contract(CUDA, CASES[name]().clone("cuda"))


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed):
    assert_follows_contract(CUDA, random_call(seed, "cuda"))


@pytest.mark.parametrize("share", [0.05, 0.3, 1])
@pytest.mark.parametrize("seed", range(40))
def test_random_metadata_touches_nothing_outside(seed, share):
    call = random_call(seed, "cuda")
    assert_follows_contract(CUDA, call.with_nonsense(share, seed))
    assert_safe(CUDA, call.with_nonsense(share, seed, monotone=False))


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("rows", [31, 32, 33, 513])
def test_the_rows_are_shared_by_ctas(rows, warps):
    call = make([(3, 9)] * 5, reserve=6, first_row=1, spare_rows=rows - 31, device="cuda")
    assert_follows_contract(partial(run_variant, variant_of("cuda", warps)), call)


@pytest.mark.parametrize("variant", TABLE, ids=lambda variant: variant.symbol)
@pytest.mark.parametrize("scenario", workload.SCENARIOS)
@BOTH_SOURCES
def test_the_tables_variants_at_real_sizes(source, scenario, variant):
    for rows, ratio, requests in ((1, 4, 1), (5000, 4, 64), (512, 128, 1)):
        call = case_of(rows, scenario, source=source, compress_ratio=ratio, requests=requests)
        assert_follows_contract(partial(run_variant, variant), call)


@BOTH_SOURCES
def test_repeated_calls_follow_the_contract(source):
    """The second and later calls of a layout skip the dispatcher. Each is on new memory."""
    dispatch.reload()
    for next_n in (-1, 4, 4, -1):
        for spans in ([(3, 9), (2, 4)], [(0, 5), (7, 8)]):
            assert_follows_contract(run_op, make(
                spans, reserve=3, max_pages=4, source=source, next_n=next_n, device="cuda"
            ))  # fmt: skip


def test_both_sources_in_turn():
    dispatch.reload()
    for source in SOURCES * 3:
        assert_follows_contract(run_op, make([(3, 9), (2, 4)], source=source, device="cuda"))


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
@BOTH_SOURCES
def test_a_first_call_can_be_captured_and_replayed_with_other_metadata(first_use, source, backend):
    # All have 135 tokens.
    spans = [
        [(3, 130), (128, 5), (0, 0)],
        [(127, 1), (1, 133), (9, 1)],
        [(0, 0), (0, 0), (1, 135)],
        [(5, 45), (90, 45), (91, 45)],
    ]
    calls = [
        make(s, reserve=34, max_pages=20, source=source, device="cuda", seed=seed)
        for seed, s in enumerate(spans)
    ]
    calls += [call.with_nonsense(0.5, seed) for seed, call in enumerate(calls)]
    replay = captured(run_op, calls[0])

    for call in [*calls, calls[0]]:
        assert_follows_contract(replay, call)


def test_a_call_launches_on_the_current_stream_and_never_synchronises():
    call, want = (case_of(512, "decode") for _ in range(2))
    run_op(want)
    stream = torch.cuda.Stream()
    late = call.kv_lens.clone()
    call.kv_lens.zero_()
    torch.cuda.synchronize()
    # Work on another stream would not wait for the gate.
    with torch.cuda.stream(stream), gate.closed():
        torch.cuda.set_sync_debug_mode("error")
        try:
            call.kv_lens.copy_(late)
            run_op(call)
            assert not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name in MUTATED:
        assert torch.equal(getattr(call, name), getattr(want, name)), name


def test_a_call_is_one_launch(monkeypatch):
    call = case_of(512, "decode")
    run_op(call)
    kernel = dispatch.launcher(Problem(), 512, call.kv_lens.device)
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


def test_the_kernel_waits_for_the_kernel_before_it():
    """The lengths come from the kernel right before the call, in a graph of many such pairs."""
    call = case_of(4096, "decode")
    steps = 64
    kv_lens = call.kv_lens.clone()
    positions = torch.empty(steps, 4096, dtype=torch.int32, device="cuda")

    def all_steps() -> None:
        call.kv_lens.copy_(kv_lens)
        for step in range(steps):
            call.kv_lens.add_(1)
            run_op(call)
            positions[step].copy_(call.positions)

    all_steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_steps()
    graph.replay()
    got = positions.cpu()
    for step in range(steps):
        call.kv_lens.copy_(kv_lens + (step + 1))
        assert got[step].tolist() == call.expected()["positions"].tolist()
