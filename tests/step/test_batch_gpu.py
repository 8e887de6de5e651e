"""StepBatch on a GPU: the second step is captured, later steps replay the graph on new inputs."""

import gc
import logging
import subprocess
import sys

import pytest
import torch

from kvfold.step import StepBatch

pytestmark = pytest.mark.gpu


@pytest.fixture
def batch():
    with StepBatch("cuda", 1 << 20, max_graphs=3) as batch:
        yield batch


def step(batch, key, value, body=None, size=1000):
    with batch.step(key) as step:
        inputs = step.upload({"a": torch.full((size,), float(value))})
        return step.run(body or (lambda inputs: inputs["a"] * 2 + 1), inputs)


def test_the_second_step_is_captured_and_later_ones_replay_it_on_new_values(batch):
    for value in range(10):
        output = step(batch, "key", value)
        assert batch.read(output).unique().tolist() == [2 * value + 1]
    counters = batch.counters
    assert (counters.eager, counters.captured, counters.replayed) == (1, 1, 9)


def test_the_body_is_not_called_once_it_is_captured(batch):
    calls = []
    for value in range(5):
        step(batch, "key", value, lambda inputs: calls.append(1) or inputs["a"] + 1)
    assert len(calls) == 2


def test_a_replayed_step_waits_for_nothing(batch):
    for value in range(3):
        step(batch, "key", value)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = step(batch, "key", 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.read(outputs).unique().tolist() == [15]


def test_more_keys_than_graphs_give_right_results(batch):
    for round_ in range(4):
        for key in range(5):
            output = step(batch, key, 10 * round_ + key, size=100 + key)
            assert batch.read(output).tolist() == [2 * (10 * round_ + key) + 1] * (100 + key)
    assert batch.counters.evicted == 4 * 5 - 3
    assert batch.counters.captured == 0  # each key was forgotten before its second step
    for value in range(4):
        step(batch, "stays", value)
    assert batch.counters.captured == 1


def test_the_memory_of_a_graph_is_released_only_when_the_graph_is_done(batch):
    def slow(inputs):
        torch.cuda._sleep(int(5e7))
        return inputs["a"] * 2 + 1

    for value in range(3):
        output = step(batch, "slow", value, slow)
    before = batch.counters.synchronisations
    for key in range(3):  # the third drops the key "slow", whose graph still runs
        step(batch, key, 0)
    assert batch.counters.synchronisations == before + 1
    torch.empty_like(output).fill_(-1)
    assert batch.read(step(batch, "slow", 5, slow)).unique().tolist() == [11]


def test_a_body_that_cannot_be_captured_runs_eagerly_with_one_warning(batch, caplog):
    def synchronises(inputs):
        return inputs["a"] * float(inputs["a"][0].item())

    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, "kvfold"):
        for value in range(5):
            output = step(batch, "key", value, synchronises)
            assert batch.read(output).unique().tolist() == [value * value]
    assert sum("cannot be captured" in record.message for record in caplog.records) == 1
    assert batch.counters.captured == 0 and batch.counters.eager == 5
    assert torch.cuda.current_stream() == stream
    refused = pytest.raises(ValueError, match="run after 0 uploads; accepted: 1")
    with refused, batch.step("key") as one:  # the same error as with a graph
        one.run(lambda: None)
    for value in range(3):  # other keys are still captured
        assert batch.read(step(batch, "other", value)).unique().tolist() == [2 * value + 1]
    assert batch.counters.captured == 1


@pytest.mark.parametrize("how", ["capture broken", "body raises"])
def test_a_failed_capture_leaves_torch_as_it_was(batch, how):
    def fails(inputs):
        if how == "capture broken":
            return inputs["a"] * inputs["a"][0].item()
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("mine")
        return inputs["a"] + torch.rand_like(inputs["a"])

    def kept() -> int:
        """Bytes of blocks used on two streams that torch's allocator does not reuse."""
        side = torch.cuda.Stream()
        before = active()
        for _ in range(10):
            block = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
            block.record_stream(side)
            with torch.cuda.stream(side):
                block.zero_()
            del block
        return active() - before

    def active() -> int:
        gc.collect()  # tensors of other tests
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # the allocator queries its events
        return torch.cuda.memory_stats()["active_bytes.all.current"]

    assert kept() == 0
    for value in range(3):
        step(batch, "key", value, fails)
    assert batch.counters.captured == 0
    assert kept() == 0
    assert torch.rand(8, device="cuda").max() <= 1
    for value in range(3):  # each replay of a graph draws new random numbers
        last = step(batch, "random", value, lambda inputs: torch.rand_like(inputs["a"])).clone()
        again = step(batch, "random", value, lambda inputs: torch.rand_like(inputs["a"]))
        assert not torch.equal(last, again)


def test_after_an_exception_on_capture_the_key_starts_again(batch):
    def fails_when_captured(inputs):
        result = inputs["a"] + 1
        if fail:
            raise KeyError("mine")
        return result

    fail = False
    step(batch, "key", 0, fails_when_captured)
    fail = True
    with pytest.raises(KeyError, match="mine"):
        step(batch, "key", 1, fails_when_captured)
    fail = False
    for value in range(4):
        output = step(batch, "key", value, fails_when_captured)
        assert batch.read(output).unique().tolist() == [value + 1]
    assert batch.counters.captured == 1
    assert not torch.cuda.is_current_stream_capturing()


def test_steps_on_changing_streams_are_in_order(batch):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    total = torch.zeros(1000, device="cuda")

    def adds(inputs):
        torch.cuda._sleep(int(1e6))
        total.add_(inputs["a"])

    torch.cuda.synchronize()
    for value in range(20):
        with torch.cuda.stream(streams[value % 2]):
            step(batch, "key", value, adds)
    with torch.cuda.stream(streams[1]):
        assert batch.read(total).unique().tolist() == [sum(range(20))]


def test_synchronize_waits_only_if_work_is_pending(batch):
    batch.synchronize()
    assert batch.counters.synchronisations == 0
    step(batch, "key", 1)
    batch.synchronize()
    batch.synchronize()
    assert batch.counters.synchronisations == 1


def test_the_interpreter_may_end_with_a_step_under_way():
    program = (
        "import torch\n"
        "from kvfold.step import StepBatch\n"
        "batch = StepBatch('cuda', 1 << 20)\n"
        "for n in range(4):\n"
        "    with batch.step('key') as step:\n"
        "        a = step.upload({'a': torch.ones(1000)})\n"
        "        step.run(lambda a: (torch.cuda._sleep(int(1e8)), a['a'] + 1), a)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_each_gpu_captures_on_its_own():
    for device in ("cuda:1", "cuda:0"):
        with StepBatch(device, 1 << 20) as batch:
            for value in range(4):
                output = step(batch, "key", value)
                assert output.device == torch.device(device)
                assert batch.read(output).unique().tolist() == [2 * value + 1]
            assert batch.counters.captured == 1


def test_reading_a_host_tensor_waits_for_copies_to_it(batch):
    home = torch.zeros(1 << 20, pin_memory=True)

    def copies_home(inputs):
        torch.cuda._sleep(int(1e8))
        home.copy_(inputs["a"].expand(1 << 20), non_blocking=True)

    for value in range(1, 5):
        step(batch, "key", value, copies_home, size=1)
        copy = batch.read(home)
        assert copy.unique().tolist() == [value]
        assert copy.data_ptr() != home.data_ptr()
