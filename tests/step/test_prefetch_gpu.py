"""SegmentPrefetcher on a GPU: streams, events and graphs give the results of a CPU."""

import subprocess
import sys
import textwrap

import gate
import pytest
import torch

from kvfold.step import device_buffer
from kvfold.step.prefetch import SegmentPrefetcher

pytestmark = pytest.mark.gpu
COUNT = 6
NUMEL = 1 << 20  # 4 MiB a tensor: a copy takes about 100 us
SLOW = 2_000_000  # cycles, about 1 ms: longer than the copies of a segment
BIG = 1 << 30


def make():
    return [
        {"weight": torch.full((NUMEL,), 10.0 * i), "state": torch.full((NUMEL // 3,), i)}
        for i in range(COUNT)
    ]


def slow():
    if torch.cuda.is_available():
        torch.cuda._sleep(SLOW)


def work(tensors, amount=1):
    """Reads and writes before and after a slow kernel, so that a copy out of order shows."""
    tensors["weight"].mul_(1.5)
    slow()
    tensors["weight"].add_(amount)
    tensors["state"].add_(amount)


def loop(prefetcher, order=range(COUNT), rounds=1):
    for _ in range(rounds):
        for index in order:
            with prefetcher.segment(index) as tensors:
                work(tensors)


def on_cpu(order=range(COUNT), rounds=1):
    with SegmentPrefetcher(make(), "cpu", BIG, write_back=True) as prefetcher:
        loop(prefetcher, order, rounds)
        return prefetcher.segments


def assert_same(got, expected):
    for index, (segment, right) in enumerate(zip(got, expected, strict=True)):
        for name in right:
            assert torch.equal(segment[name], right[name]), (index, name)


@pytest.fixture
def prefetcher():
    with SegmentPrefetcher(make(), "cuda", BIG, write_back=True) as prefetcher:
        yield prefetcher
        torch.cuda.synchronize()


def capture(prefetcher, **kwargs):
    prefetcher.join()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop(prefetcher, **kwargs)
    return graph


@pytest.mark.parametrize("own_stream", [True, False])
def test_write_backs_of_slow_bodies_are_right(prefetcher, own_stream):
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        loop(prefetcher, rounds=5)
    prefetcher.synchronize()
    assert_same(prefetcher.segments, on_cpu(rounds=5))
    counters = prefetcher.counters
    assert (counters.adopted, counters.missed) == (29, 1)
    assert counters.bytes == 31 * sum(t.nbytes for t in make()[0].values())
    assert counters.waited_us > 0  # the host was ahead of 30 ms of work
    prefetcher.synchronize()
    assert prefetcher.counters == counters  # nothing was pending, so there was no wait


def test_segments_are_pinned_and_pinned_ones_are_not_copied():
    given = {
        "pinned": torch.zeros(4).pin_memory(),
        "plain": torch.zeros(4),
        "turned": torch.zeros(3, 4).pin_memory().t(),
    }
    with SegmentPrefetcher([given], "cuda", BIG) as prefetcher:
        (held,) = prefetcher.segments
        assert all(tensor.is_pinned() and tensor.is_contiguous() for tensor in held.values())
        same = {name: held[name].data_ptr() == given[name].data_ptr() for name in given}
    assert same == {"pinned": True, "plain": False, "turned": False}


def test_the_host_does_not_wait_in_segment(prefetcher):
    work({name: tensor.cuda() for name, tensor in make()[0].items()})  # a first launch may wait
    torch.cuda.synchronize()
    with gate.closed():
        loop(prefetcher, order=(0, 1, 4, 2))
        assert not torch.cuda.current_stream().query()
    prefetcher.synchronize()
    assert_same(prefetcher.segments, on_cpu(order=(0, 1, 4, 2)))


def test_the_next_segment_is_copied_while_a_body_runs(prefetcher):
    """The copy is done while the body still waits behind the gate."""
    with prefetcher.segment(0), gate.closed():
        prefetcher._in_stream.synchronize()
        assert prefetcher.counters.bytes == 2 * sum(t.nbytes for t in make()[0].values())
        assert not torch.cuda.current_stream().query()


def test_segments_out_of_order_are_right(prefetcher):
    order = (3, 4, 4, 1, 1, 2, 0, 5, 0, 5, 4)
    loop(prefetcher, order, rounds=3)
    prefetcher.synchronize()
    assert_same(prefetcher.segments, on_cpu(order, rounds=3))


def test_without_write_back_no_body_sees_the_next_segment():
    """A body still reads its own segment after a slow kernel."""
    with SegmentPrefetcher(make(), "cuda", BIG) as prefetcher:
        seen = []
        for index in (0, 1, 2, 3, 4, 5, 0, 3, 1, 2):
            with prefetcher.segment(index) as tensors:
                slow()
                seen.append((index, tensors["weight"].amin(), tensors["weight"].amax()))
        torch.cuda.synchronize()
        for index, low, high in seen:
            assert low == high == 10 * index
        assert_same(prefetcher.segments, make())


def test_a_host_tensor_changed_between_rounds_is_seen(prefetcher):
    loop(prefetcher)
    prefetcher.synchronize()
    torch.cuda.synchronize()  # segment 0 is prefetched
    prefetcher.segments[0]["weight"].fill_(7)
    with prefetcher.segment(0) as tensors:
        seen = tensors["weight"].clone()
    assert (seen == 7).all()
    assert prefetcher.counters.missed == 2


def test_one_pinned_tensor_may_be_in_two_segments():
    shared = torch.zeros(NUMEL).pin_memory()
    segments = [{"weight": shared, "state": torch.zeros(3)} for _ in range(2)]
    with SegmentPrefetcher(segments, "cuda", BIG, write_back=True) as prefetcher:
        loop(prefetcher, order=(0, 1, 1, 0))
        prefetcher.synchronize()
    assert torch.equal(shared, torch.full((NUMEL,), ((1 * 1.5 + 1) * 1.5 + 1) * 1.5 + 1))


def test_a_body_that_raises_is_written_back(prefetcher):
    with pytest.raises(KeyError, match="mine"), prefetcher.segment(0) as tensors:
        work(tensors)
        raise KeyError("mine")
    loop(prefetcher, order=(1, 2, 3, 4, 5))
    prefetcher.synchronize()
    assert_same(prefetcher.segments, on_cpu())
    assert prefetcher.counters.missed == 1


@pytest.fixture
def no_second_buffer(monkeypatch):
    allocate, calls = device_buffer._allocate, []

    def fails(nbytes, device):
        calls.append(nbytes)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")
        return allocate(nbytes, device)

    monkeypatch.setattr(device_buffer, "_allocate", fails)


@pytest.mark.parametrize("budget", [8_000_000, BIG])
def test_one_buffer_gives_the_same_results(budget, request, caplog):
    if budget == BIG:
        request.getfixturevalue("no_second_buffer")
    with SegmentPrefetcher(make(), "cuda", budget, write_back=True) as prefetcher:
        size = prefetcher._buffers[0].memory.nbytes
        assert size <= 7_100_000 and len(prefetcher._buffers) == 1
        loop(prefetcher, rounds=2)
        prefetcher.synchronize()
        assert_same(prefetcher.segments, on_cpu(rounds=2))
        assert (prefetcher.counters.adopted, prefetcher.counters.missed) == (0, 12)
        graph = capture(prefetcher)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(prefetcher.segments, on_cpu(rounds=3))
    assert [record.name for record in caplog.records] == ["kvfold"]


def test_a_captured_loop_gives_the_same_as_eager(prefetcher):
    loop(prefetcher)
    graph = capture(prefetcher)
    adopted = prefetcher.counters.adopted
    assert adopted == 2 * (COUNT - 1)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert_same(prefetcher.segments, on_cpu(rounds=4))
    loop(prefetcher)  # eager after a capture
    prefetcher.join()
    graph.replay()
    loop(prefetcher)
    prefetcher.synchronize()
    assert_same(prefetcher.segments, on_cpu(rounds=7))


def test_a_capture_may_have_segments_in_any_order(prefetcher):
    order = (5, 0, 1, 3, 5, 2, 5)
    graph = capture(prefetcher, order=order, rounds=2)
    again = capture(prefetcher)  # right after another one
    for _ in range(2):
        graph.replay()
        again.replay()
    torch.cuda.synchronize()
    expected = SegmentPrefetcher(make(), "cpu", BIG, write_back=True)
    for _ in range(2):
        loop(expected, order, rounds=2)
        loop(expected)
    assert_same(prefetcher.segments, expected.segments)


def test_a_capture_of_some_segments_is_joined_by_the_caller(prefetcher):
    prefetcher.join()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefetcher.join()  # nothing to join yet
        loop(prefetcher, order=(0, 1, 2))
        prefetcher.join()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(prefetcher.segments, on_cpu(order=(0, 1, 2)))


def test_a_capture_can_end_after_a_body_that_raises(prefetcher):
    graph = torch.cuda.CUDAGraph()
    error = pytest.raises(KeyError, match="mine")
    with torch.cuda.graph(graph), error, prefetcher.segment(0) as tensors:
        work(tensors)
        raise KeyError("mine")
    graph.replay()
    torch.cuda.synchronize()
    assert_same(prefetcher.segments, on_cpu(order=(0,)))
    loop(prefetcher)
    prefetcher.synchronize()
    assert_same(prefetcher.segments, on_cpu(order=(0, *range(COUNT))))


def test_a_capture_that_begins_unjoined_is_refused(prefetcher):
    loop(prefetcher)
    scratch = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        scratch.add_(1)
        for use in (lambda: prefetcher.segment(0).__enter__(), prefetcher.join):
            with pytest.raises(RuntimeError, match=r"call join\(\) on the prefetcher before"):
                use()
        with pytest.raises(RuntimeError, match="during a capture"):
            prefetcher.synchronize()
    loop(prefetcher)
    prefetcher.synchronize()
    assert_same(prefetcher.segments, on_cpu(rounds=2))


def test_close_waits_for_write_backs():
    with SegmentPrefetcher(make(), "cuda", BIG, write_back=True) as prefetcher:
        loop(prefetcher)
    assert_same(prefetcher.segments, on_cpu())
    assert prefetcher.counters.waited_us > 0


def test_the_interpreter_exits_with_work_pending():
    program = """
        import torch
        from kvfold.step.prefetch import SegmentPrefetcher
        segments = [{"a": torch.zeros(1 << 20)} for _ in range(3)]
        prefetcher = SegmentPrefetcher(segments, "cuda", 1 << 30, write_back=True)
        for index in (0, 1):
            with prefetcher.segment(index) as tensors:
                torch.cuda._sleep(200_000_000)
                tensors["a"].add_(1)
        assert not torch.cuda.current_stream().query()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_segments_of_unequal_size_in_any_order_are_right():
    def unequal():
        return [
            {
                "a": torch.full((NUMEL >> index % 4,), 1.0 * index),
                "b": torch.full((NUMEL >> (index + 2) % 3,), 2.0 * index),
            }
            for index in range(COUNT)
        ]

    order = [0, 1, 2, 3, 4, 5, 0, 2, 2, 1, 5, 0, 3, 4, 1, 0, 1, 2, 3, 4, 5]
    got = []
    for device in ("cuda", "cpu"):
        with SegmentPrefetcher(unequal(), device, BIG, write_back=True) as prefetcher:
            for round_ in range(5):
                for index in order:
                    with prefetcher.segment(index) as tensors:
                        tensors["a"].mul_(1.5)
                        tensors["b"].add_(tensors["a"][-1]).add_(round_)
            prefetcher.synchronize()
            got.append([dict(segment) for segment in prefetcher.segments])
    assert_same(got[0], got[1])
