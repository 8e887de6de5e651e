"""What a failed capture raises and cleans up, with stand-ins for torch's graphs; needs no GPU."""

import contextlib
import gc
import weakref

import pytest
import torch

from kvfold.step import capture as module
from kvfold.step.capture import capture


class Graph:
    """A stand-in for torch.cuda.CUDAGraph."""


@pytest.fixture
def calls(monkeypatch):
    """Records the calls to torch's allocator and counts captures. "end_fails": their end raises."""
    seen = {"ended": [], "released": [], "begun": 0, "end_fails": False}

    @contextlib.contextmanager
    def graph(graph, pool=None, stream=None, capture_error_mode="global"):
        seen["begun"] += 1
        assert isinstance(graph, Graph) and capture_error_mode == "thread_local"
        try:
            yield
        finally:
            if seen["end_fails"] and pool is not None:
                raise RuntimeError("the end of the capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    for name, key in (("endAllocateToPool", "ended"), ("releasePool", "released")):
        monkeypatch.setattr(
            module.torch._C,
            f"_cuda_{name}",
            lambda device, pool, key=key: seen[key].append(pool),
            raising=False,
        )
    return seen


def test_a_capture_gives_the_graph_and_what_the_body_returned(calls):
    graph, result = capture(None, lambda a, b: a + b, 1, 2)
    assert isinstance(graph, Graph) and result == 3
    assert (calls["begun"], calls["ended"]) == (1, [])


@pytest.mark.parametrize("end_fails", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_error_of_the_body_is_raised_whatever_its_context(calls, error, end_fails):
    def body():
        try:
            raise KeyError("before it")
        except KeyError:
            raise error("the body's") from None

    calls["end_fails"] = end_fails
    with pytest.raises(error, match="the body's"):
        capture(None, body)
    with pytest.raises(error, match="the body's"):  # while the caller handles another exception
        try:
            raise OSError
        except OSError:
            capture(None, body)


def test_after_a_failed_end_torch_is_cleaned_up(calls):
    calls["end_fails"] = True
    with pytest.raises(RuntimeError, match="the end of the capture"):
        capture(None, lambda: 1)
    assert calls["ended"] == calls["released"] == [(0, 7)]
    assert calls["begun"] == 2  # another capture resets the random number generator


def test_an_allocation_that_torch_has_ended_is_not_released(calls, monkeypatch):
    def refuse(device, pool):
        raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(module.torch._C, "_cuda_endAllocateToPool", refuse, raising=False)
    with pytest.raises(KeyError):
        capture(None, lambda: {}["x"])
    assert calls["released"] == []


def test_a_torch_without_the_private_functions_raises_the_error_of_the_body(calls, monkeypatch):
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.delattr(module.torch._C, name)
    with pytest.raises(KeyError, match="x"):
        capture(None, lambda: {}["x"])
    assert calls["begun"] == 2


def test_the_tensors_of_a_failed_body_are_freed_without_the_garbage_collector(calls):
    held = []

    def body():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise ValueError

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            capture(None, body)
        assert held[0]() is None
    finally:
        gc.enable()
