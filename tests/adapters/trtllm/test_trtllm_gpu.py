"""The adapter on a GPU: graphs, streams, launches. The other files run their cases there too."""

import gate
import pytest
import torch
from numerics import assert_rows_close
from torch import Tensor
from trtllm_calls import decode_call, prefill_call, scatter_call
from trtllm_memory import assert_same_memory, copied
from trtllm_oracle import decode, prefill, scatter

import kvfold.adapters.trtllm as trtllm
from kvfold.adapters.trtllm import state_ops

pytestmark = pytest.mark.gpu

DECODE = torch.ops.trtllm.compressor_paged_kv_compress
PREFILL = torch.ops.trtllm.compressor_prefill_reduction
SCATTER = torch.ops.trtllm.compressor_postprocess_scatter


def set_to(static, call):
    """Gives the tensors of a call the values of another one's."""
    for name, value in call.items():
        if isinstance(value, Tensor):
            static[name].copy_(value)


def assert_left(static, expected, rows=None):
    """The tensors of a call have the values that an oracle says; output the rows."""
    for name, value in expected.items():
        if isinstance(value, Tensor) and name != "output":
            assert torch.equal(static[name].cpu().view(torch.uint8), value.view(torch.uint8)), name
    if rows is not None:
        filled = ~rows.isnan().any(1)
        output = static["output"].cpu()
        assert_rows_close(output[filled], rows[filled], 4.0, "output")
        assert torch.equal(output[~filled], expected["output"][~filled])


def capture(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def assert_replays(op, oracle, calls):
    """A graph that is captured with the first call does what the oracle does with each."""
    static = copied(calls[0], "cuda")
    graph = capture(lambda: op(*static.values()))
    for call in [*calls, calls[0]]:
        set_to(static, call)
        graph.replay()
        if oracle is scatter:
            assert_left(static, scatter(call))
        else:
            assert_left(static, *oracle(call))


@pytest.fixture
def no_counts(monkeypatch):
    """Nothing is known of earlier calls."""
    monkeypatch.setattr(state_ops, "_uniform_counts", {})


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("counts", [None, ([3, 1, 0], [0, 3, 2])])
def test_decode_replays_with_other_lengths(counts, ratio, no_counts):
    starts = [[ratio - 1, 5, 3], [2, 2 * ratio - 2, ratio - 2]]
    calls = [
        decode_call(
            starts[i], 3, counts and counts[i], ratio=ratio, page_size=4 * ratio, reserve=1, seed=i
        )
        for i in range(2)
    ]
    for call in calls:  # both calls have shapes that serve both
        call["kv_score"] = torch.cat([call["kv_score"], torch.zeros(9, call["kv_score"].size(1))])
        call["kv_score"] = call["kv_score"][:9].bfloat16()
        assert call["paged_kv"].shape == calls[0]["paged_kv"].shape
    assert_replays(DECODE, decode, calls)


def test_counts_that_a_capture_has_made_are_not_used_outside(no_counts):
    call = decode_call([3, 6], 2)
    static = copied(call, "cuda")
    capture(lambda: DECODE(*static.values()))
    assert not any(state_ops._uniform_counts.values())
    DECODE(*static.values())
    assert_left(static, *decode(call))
    assert len(kernels_of(lambda: DECODE(*static.values()))) == 1


def test_prefill_replays_with_other_lengths():
    calls = [
        prefill_call(spans, page_size=16, reserve=3, seed=seed)
        for seed, spans in enumerate([[(0, 9), (5, 4)], [(6, 4), (3, 9)]])
    ]
    assert_replays(PREFILL, prefill, calls)


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("kind", range(4))
def test_scatter_replays_with_other_metadata(kind, in_step):
    shapes = [[(0, 5, 6), (3, 1, 2)], [(4, 2, 3), (1, 3, 5)]]
    calls = [scatter_call(one, kind=kind, seed=i, outputs=True) for i, one in enumerate(shapes)]

    def op(*arguments):
        if not in_step:
            return SCATTER(*arguments)
        with trtllm.step():
            SCATTER(*arguments)

    assert_replays(op, scatter, calls)


def test_a_capture_in_a_step_computes_the_slots_again():
    calls = [scatter_call([(start, 3, 3), (1, 2, 2)], seed=start) for start in (0, 1)]
    static = copied(calls[0], "cuda")
    with trtllm.step():
        SCATTER(*static.values())
        graph = capture(lambda: SCATTER(*static.values()))
    set_to(static, calls[1])
    graph.replay()
    assert_left(static, scatter(calls[1]))


def test_streams_of_a_step_have_slots_of_their_own():
    call = scatter_call([(0, 3, 3), (1, 2, 2)])
    first, second = copied(call, "cuda"), copied(call, "cuda")
    for name in ("num_outputs", "cu_kv_comp", "start_pos", "block_offsets", "compressed_mask"):
        second[name] = first[name]
    other = torch.cuda.Stream()
    warm_up(SCATTER, call)
    with torch.cuda.stream(other):
        warm_up(SCATTER, call)
    with trtllm.step(), gate.closed():
        SCATTER(*first.values())  # waits for the gate
        with torch.cuda.stream(other):
            SCATTER(*second.values())
            assert_left(second, scatter(call))
    torch.cuda.synchronize()
    assert_left(first, scatter(call))


def warm_up(op, call):
    """Runs a copy of a call, so that kernels and memory are there on the current stream."""
    op(*copied(call, "cuda").values())
    torch.cuda.synchronize()


def kernels_of(run):
    """The GPU's work that a function starts: kernels, copies and fills."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return [one.name for one in profile.events() if one.device_type == device]


def test_a_call_is_one_launch_and_slots_are_five_more_once_per_step():
    state = [(DECODE, decode_call([3, 6], 2, longer=2)), (PREFILL, prefill_call([(0, 9), (3, 5)]))]
    for op, call in state:
        static = copied(call, "cuda")
        assert len(kernels_of(lambda op=op, static=static: op(*static.values()))) == 1
        # The stream of a capture is another one.
        assert (
            len(kernels_of(capture(lambda op=op, static=static: op(*static.values())).replay)) == 1
        )
    static = copied(scatter_call([(0, 3, 3), (1, 2, 2)], kind=2, longer=2), "cuda")
    assert len(kernels_of(lambda: SCATTER(*static.values()))) == 1 + 5

    def layers():
        with trtllm.step():
            for _ in range(7):
                SCATTER(*static.values())

    assert len(kernels_of(layers)) == 5 + 7


def test_calls_run_on_the_current_stream_and_never_synchronise():
    state = copied(decode_call([3, 6], 2, longer=2), "cuda")
    prompts = copied(prefill_call([(0, 9), (3, 5)], longer=2), "cuda")
    rows = copied(scatter_call([(0, 3, 3), (1, 2, 2)], kind=2, outputs=True, longer=2), "cuda")
    cases = [(DECODE, state), (PREFILL, prompts), (SCATTER, rows)]
    for op, call in cases:
        want = copied(call)
        op(*want.values())
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            warm_up(op, call)
        with torch.cuda.stream(stream), gate.closed():
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(2):
                    op(*call.values())
                assert not stream.query()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert_same_memory(call, want)
