"""The same decode trace in all four modes of running a step gives the same bits."""

import contextlib

import numpy as np
import pytest
import torch

from kvfold.bench.measure.verify import WrongResult
from kvfold.bench.step import modes
from kvfold.bench.step.model import (
    PAGE_SIZE,
    Shape,
    make_layers,
    steady_steps,
    step_metadata,
    trace,
)
from kvfold.bench.step.modes import MODES, OFFLOADS, check, first_steps, hidden_states, mode

SMALL = Shape((128, 4, 4, 128), batch=3, hidden=32, head_dim=128)
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def one_thread():
    """Runs CPU ops in one thread. They are so small that several threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_prefill_and_200_steps_with_rejections_give_the_same_bits(device):
    check(SMALL, device, trace(SMALL, 210), 210)


@pytest.mark.parametrize("wrong_mode", MODES[1:])
def test_a_mode_that_goes_wrong_is_found(wrong_mode, monkeypatch):
    @contextlib.contextmanager
    def with_a_wrong_one(name, *arguments):
        with mode(name, *arguments) as one_step:
            if name == wrong_mode:
                yield lambda arrays: one_step(arrays | {"kv_lens": arrays["kv_lens"] - 1})
            else:
                yield one_step

    monkeypatch.setattr(modes, "mode", with_a_wrong_one)
    with pytest.raises(WrongResult, match=f"{wrong_mode}: tensor .* differs from that of"):
        check(SMALL, torch.device("cpu"), trace(SMALL, 60), 60)


@pytest.mark.gpu
def test_the_state_has_the_same_bits_as_on_the_cpu():
    states, outputs = {}, {}
    for device in (torch.device("cpu"), torch.device("cuda")):
        layers = make_layers(SMALL, device)
        hidden = hidden_states(SMALL, device).sign()
        for layer in layers:
            layer.weight.copy_(layer.weight.sign())  # small integers: the projection is exact
        with mode(OFFLOADS, SMALL, layers, hidden, device) as one_step:
            for arrays in first_steps(SMALL, trace(SMALL, 100), 100):
                one_step(arrays)
        states[device.type] = [pool.cpu() for layer in layers for pool in layer.state.values()]
        outputs[device.type] = [layer.output.cpu() for layer in layers]
    assert all(map(torch.equal, states["cpu"], states["cuda"]))
    for expected, found in zip(outputs["cpu"], outputs["cuda"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_pages_of_a_request_hold_all_rows_that_a_window_may_read():
    rng = np.random.default_rng(0)
    for ratio in (4, 128):
        arrays = step_metadata(SMALL, np.full(3, 500), np.full(3, 4))
        table = arrays[f"block_table_{ratio}"]
        for length in rng.integers(1, 2000, 200):
            first = max(0, ((length - 1) // ratio - (ratio == 4)) * ratio)
            pages = np.arange(first // PAGE_SIZE, (length + 3) // PAGE_SIZE + 1)
            assert len(set(table[1, pages])) == len(pages)


@pytest.mark.gpu
def test_the_memory_use_of_20000_steps_is_constant():
    import resource

    device = torch.device("cuda")
    shape = Shape((128, 4), batch=2, hidden=32, head_dim=128)
    layers = make_layers(shape, device)
    steps = steady_steps(shape)
    with mode(OFFLOADS, shape, layers, hidden_states(shape, device), device) as one_step:

        def run(count: int) -> tuple[int, int]:
            """Runs steps; returns the device's reserved bytes and the host's peak in KiB."""
            for _ in range(count):
                one_step(step_metadata(shape, *next(steps)))
            torch.cuda.synchronize()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return torch.cuda.memory_reserved(), peak

        reserved, peak = run(2000)
        reserved_later, peak_later = run(18000)
    assert reserved_later == reserved
    assert peak_later - peak < 8 << 10
