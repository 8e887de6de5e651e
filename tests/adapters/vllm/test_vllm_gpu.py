"""The adapter on a GPU: the bytes of the CPU's tests, in CUDA graphs, without synchronisation."""

import gate
import pytest
import torch
from vllm_cases import (
    BLOCKS,
    adapter_layer,
    assert_same_bytes,
    build,
    padded,
    random_steps,
    replay_steps,
    run_steps,
    serving_steps,
)
from vllm_engine import KINDS, Batch, Layer, run_oracle

pytestmark = pytest.mark.gpu

each_kind = pytest.mark.parametrize("name", KINDS)
of_models = pytest.mark.parametrize("name", ["c4", "c128", "index_fp8"])
both_ways = pytest.mark.parametrize("replays", [True, False])


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]


@each_kind
def test_steps_of_a_server(name):
    batches = serving_steps(KINDS[name])
    assert run_steps(KINDS[name], batches, replays=False, device="cuda") > 10


@each_kind
def test_tokens_that_are_computed_again_are_not_stored(name):
    assert run_steps(KINDS[name], replay_steps(KINDS[name]), device="cuda") > 5


@of_models
@pytest.mark.parametrize("seed", range(3))
def test_random_steps(name, seed):
    assert run_steps(KINDS[name], random_steps(KINDS[name], seed), device="cuda") > 2


@of_models
@both_ways
def test_a_captured_step_is_replayed_with_other_metadata(name, replays):
    """Decodes and drafts run in one graph; metadata is made in it. Other steps run eagerly."""
    kind = KINDS[name]
    steps = list(replay_steps(kind) if replays else serving_steps(kind))
    decodes = [batch for batch in steps if batch.max_query_len <= 8]
    assert len(decodes) > 3
    expected = Layer.make(kind, BLOCKS)
    actual = expected.to("cuda")
    ours = adapter_layer(actual)

    static = padded(decodes[0], decodes).to("cuda")
    static.slot_mapping.fill_(-1)  # a dummy batch, as vLLM captures with
    static.cache_slot_mapping.fill_(-1)

    def run() -> None:
        step = build(kind, static, replays=replays)
        assert step.next_n is not None
        ours.compress_and_store(static.kv_score, step)

    run()
    assert_same_bytes(actual, expected, "warm-up")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    for number, batch in enumerate(steps):
        run_oracle(expected, batch, "cuda")
        if batch.max_query_len <= 8:
            for mine, value in zip(
                tensors_of(static), tensors_of(padded(batch, decodes)), strict=True
            ):
                mine.copy_(value)
            graph.replay()
        else:
            there = batch.to("cuda")
            ours.compress_and_store(there.kv_score, build(kind, there, replays=replays))
        assert_same_bytes(actual, expected, f"step {number}")


@of_models
def test_a_captured_prefill_is_replayed_with_other_metadata(name):
    kind = KINDS[name]
    steps = list(serving_steps(kind))
    expected = Layer.make(kind, BLOCKS)
    actual = expected.to("cuda")
    ours = adapter_layer(actual)
    static = padded(steps[0], steps).to("cuda")
    static.slot_mapping.fill_(-1)
    graph = torch.cuda.CUDAGraph()
    ours.compress_and_store(static.kv_score, build(kind, static))
    with torch.cuda.graph(graph):
        ours.compress_and_store(static.kv_score, build(kind, static))
    for number, batch in enumerate(steps):
        run_oracle(expected, batch, "cuda")
        for mine, value in zip(tensors_of(static), tensors_of(padded(batch, steps)), strict=True):
            mine.copy_(value)
        graph.replay()
        assert_same_bytes(actual, expected, f"step {number}")


@of_models
@both_ways
def test_no_call_waits_for_the_device(name, replays):
    kind = KINDS[name]
    batches = list(serving_steps(kind))[:5]
    expected = Layer.make(kind, BLOCKS)
    actual, spare = expected.to("cuda"), expected.to("cuda")
    ours, warm = adapter_layer(actual), adapter_layer(spare)
    there = [batch.to("cuda") for batch in batches]
    for batch in there:  # compiles
        warm.compress_and_store(batch.kv_score, build(kind, batch, replays=replays))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    # Work on another stream would not wait for the gate.
    with torch.cuda.stream(stream), gate.closed():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in there:
                ours.compress_and_store(batch.kv_score, build(kind, batch, replays=replays))
            assert not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for batch in batches:
        run_oracle(expected, batch, "cuda")
    assert_same_bytes(actual, expected, "after the gate")
