"""The adapter on a GPU: CUDA graphs, streams, no synchronisation, launches, SGLang's own plans."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sglang_calls import Cache, as_sglang_has_it, assert_rows, assert_state, forward, make_ape
from sglang_plans import Simulation, StateLayout

from kvfold.adapters import sglang
from kvfold.adapters.sglang.metadata_reference import ragged_id

pytestmark = pytest.mark.gpu

FP32 = torch.float32
C4, C128 = StateLayout(4, 16), StateLayout(128, 256)
both_layouts = pytest.mark.parametrize("layout", [C4, C128], ids=str)
both_plans = pytest.mark.parametrize("kind", ["decode", "verify"])


class Layers:
    """Some layers of one ratio, and calls of all of them."""

    def __init__(self, layout, layers=2, requests=8, seed=0):
        self.simulation = Simulation(layout, 128, requests, device="cuda", seed=seed)
        self.apes = [make_ape(self.simulation) for _ in range(layers)]
        self.given_apes = [as_sglang_has_it(ape, 128).cuda() for ape in self.apes]
        self.states = [self.simulation.state() for _ in range(layers)]
        self.caches = [
            Cache(self.simulation, "fp8_block128_floor", "once", 64) for _ in range(layers)
        ]

    def call(self, kind):
        """A step whose number of tokens is always the same."""
        requests = self.simulation.requests
        if kind == "decode":
            return self.simulation.decode(requests)
        return self.simulation.extend(requests, [4] * len(requests), shuffled=True, padded=True)

    def begin(self):
        """Prompts, so that the steps after them close windows."""
        ratio = self.simulation.layout.ratio
        counts = [2 * ratio - 1 - i % 4 for i in range(len(self.simulation.requests))]
        self.run(self.simulation.extend(self.simulation.requests, counts))

    def run(self, call):
        """The outputs of both functions in all layers."""
        outputs = []
        for state, ape, cache in zip(self.states, self.given_apes, self.caches, strict=True):
            outputs.append(forward(self.simulation, call, state, ape, FP32))
            cache.store(outputs[-1], call)
        return outputs

    def copies(self):
        states = [state.clone() for state in self.states]
        return states, [cache.bytes.cpu().numpy().copy() for cache in self.caches]

    def check(self, call, outputs, before):
        """Compares the results of a step with the oracles'."""
        states, caches = before
        for i, out in enumerate(outputs):
            assert_state(self.states[i], states[i], call)
            assert_rows(self.simulation, call, out, self.apes[i], FP32)
            expected = self.caches[i].expected(out, call, caches[i])
            np.testing.assert_array_equal(self.caches[i].bytes.cpu().numpy(), expected)


def copy_to(static, call):
    """Writes a call into the tensors of another one, as an engine does before a replay."""
    for mine, new in zip(static.plan[1:3], call.plan[1:3], strict=True):
        if isinstance(mine, torch.Tensor):
            mine.copy_(new)
    static.kv_score.copy_(call.kv_score)
    static.out_loc.copy_(call.out_loc)


@both_layouts
@both_plans
def test_a_graph_serves_other_steps(layout, kind):
    layers = Layers(layout)
    layers.begin()
    before = layers.copies()
    static = layers.call(kind)
    layers.check(static, layers.run(static), before)  # eagerly, with the plan of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layers.run(static)
    for _ in range(6):
        call = layers.call(kind)
        copy_to(static, call)
        before = layers.copies()
        graph.replay()
        layers.check(replace(call, plan=static.plan), outputs, before)
        for request in layers.simulation.requests[::2] if kind == "verify" else ():
            layers.simulation.reject(request, 2)
    call = layers.call(kind)  # eagerly again, in the graph's tensors
    copy_to(static, call)
    before = layers.copies()
    call = replace(call, plan=static.plan)
    layers.check(call, layers.run(call), before)


@both_layouts
@both_plans
def test_no_call_synchronises(layout, kind):
    layers = Layers(layout)
    layers.begin()
    layers.run(layers.call(kind))  # compiles
    before = layers.copies()
    call, stream = layers.call(kind), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1 << 28)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = layers.run(call)
            assert not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    layers.check(call, outputs, before)


@pytest.mark.parametrize("capture", [False, True])
@both_plans
def test_layers_on_streams_of_their_own(kind, capture):
    """The second stream waits for the metadata that the first one makes late."""
    layers = Layers(C4)
    layers.begin()
    layers.run(layers.call(kind))  # compiles
    before = layers.copies()
    call, streams = layers.call(kind), [torch.cuda.Stream() for _ in layers.states]

    def run():
        current, outputs = torch.cuda.current_stream(), []
        for i, stream in enumerate(streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                if i == 0:
                    torch.cuda._sleep(1 << 26)
                out = forward(layers.simulation, call, layers.states[i], layers.given_apes[i], FP32)
                layers.caches[i].store(out, call)
                outputs.append(out)
        for stream in streams:
            current.wait_stream(stream)
        return outputs

    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        graph.replay()
    else:
        outputs = run()
    torch.cuda.synchronize()
    layers.check(call, outputs, before)


def kernels_of(run):
    """How many kernels and copies a function launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")


@both_layouts
@pytest.mark.parametrize(("kind", "per_layer", "per_step"), [("decode", 2, 1), ("verify", 3, 2)])
def test_launches(layout, kind, per_layer, per_step):
    """A layer has those of the ops, a step one or two more."""
    layers = Layers(layout, layers=3)
    layers.begin()
    layers.run(layers.call(kind))  # compiles
    call = layers.call(kind)
    torch.cuda.synchronize()
    outputs = [torch.empty(call.plan[1].size(0), 128, device="cuda") for _ in layers.states]

    def run():
        for i, state in enumerate(layers.states):
            sglang.compress_forward(
                state, call.kv_score, layers.given_apes[i], call.plan, head_dim=128,
                compress_ratio=layout.ratio, out=outputs[i],
            )  # fmt: skip
            layers.caches[i].store(outputs[i], call)

    assert kernels_of(run) == 3 * per_layer + per_step


# ---- SGLang's own planner, where it can be imported ----------------------------------------------


def sglang_plans():
    compress = pytest.importorskip(
        "sglang.kernels.ops.attention.dsv4.compress", exc_type=ImportError
    )
    return compress.CompressorDecodePlan, compress.CompressorPrefillPlan


@pytest.mark.parametrize("layout", [C4, C128, StateLayout(4, 16, swa_page=32)], ids=str)
def test_the_plans_of_the_tests_are_sglang_s(layout):
    decode_plan, prefill_plan = sglang_plans()
    simulation = Simulation(layout, 128, 5, device="cuda", seed=3)
    requests, page = simulation.requests, layout.swa_page or 256
    req_to_token = torch.zeros(16, 1024, dtype=torch.int32)
    for request in requests:
        pages = request.pages if layout.swa_page else [request.number] * 8
        for i, one in enumerate(pages):
            req_to_token[request.number, i * page : (i + 1) * page] = (
                torch.arange(page) + one * page
            )
    int64 = {"dtype": torch.int64}
    common = {
        "compress_ratio": layout.ratio,
        "req_pool_indices": torch.tensor([r.number for r in requests], **int64).cuda(),
        "req_to_token": req_to_token.cuda(),
        "full_to_state": torch.arange(1 << 16, **int64).cuda(),
        "swa_page_size": page,
        "ring_size": layout.ring,
        "use_req_ring": layout.ratio == 4 and not layout.swa_page,
    }
    for counts in ([130, 9, 260, 31, 4], [4] * 5):
        for on_device in (False, True):
            call = simulation.extend(requests, counts, padded=on_device)
            device = "cuda" if on_device else "cpu"
            theirs = prefill_plan.generate(
                **common,
                seq_lens=torch.tensor([len(r.tokens) for r in requests], **int64).to(device),
                extend_lens=torch.tensor(counts, **int64).to(device),
                num_q_tokens=sum(counts),
            )
            for mine, other in zip(call.plan[1:3], theirs[1:3], strict=True):
                assert sorted(map(bytes, mine.cpu().numpy())) == sorted(
                    map(bytes, other.cpu().numpy())
                )
            for request, count in zip(requests, counts, strict=True):
                simulation.reject(request, count - 4)
    call = simulation.decode(requests)
    lengths = torch.tensor([len(r.tokens) for r in requests], **int64).cuda()
    theirs = decode_plan.generate(**common, seq_lens=lengths)
    assert torch.equal(call.plan.plan_d, theirs.plan_d)


@both_layouts
def test_sglang_s_functions_make_the_same_rows(layout):
    sglang_plans()
    from sglang.kernels.ops.attention.dsv4 import compress

    layers = Layers(layout, layers=1)
    layers.begin()
    for kind in ("verify", "decode"):
        call, state = layers.call(kind), layers.states[0].clone()
        order = ragged_id(call.plan[1].view(torch.int32)).argsort() if kind == "verify" else None
        theirs = compress.compress_forward(
            state, call.kv_score, layers.given_apes[0], call.plan, head_dim=128,
            compress_ratio=layout.ratio,
        )  # fmt: skip
        (out,) = layers.run(call)
        assert torch.equal(state.nan_to_num(), layers.states[0].nan_to_num())
        valid = [i for i, closes in enumerate(call.closing) if closes is not None]
        theirs = theirs[order][-len(valid) :] if order is not None else theirs[valid]
        torch.testing.assert_close(theirs, out[valid], atol=2e-5, rtol=2e-5)
