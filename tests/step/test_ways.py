"""The same decode trace through all four ways of running a step: the same bits."""

import numpy as np
import pytest
import torch

from kvfold.bench import step, step_model
from kvfold.bench.step_model import Shape
from kvfold.bench.verify import WrongResult

SMALL = Shape((128, 4, 4, 128), batch=3, hidden=32, head_dim=128)
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_prefill_and_200_steps_with_rejections(device):
    step.check(SMALL, device, step_model.trace(SMALL, 210), 210)


def test_a_way_that_goes_wrong_is_found(monkeypatch):
    upload = step.StagingPool.upload

    def wrong(self, arrays):
        return upload(self, arrays | {"kv_lens": arrays["kv_lens"] - 1})

    monkeypatch.setattr(step.StagingPool, "upload", wrong)
    with pytest.raises(WrongResult, match="staging_eager: tensor"):
        step.check(SMALL, torch.device("cpu"), step_model.trace(SMALL, 60), 60)


@pytest.mark.gpu
def test_the_state_has_the_same_bits_as_on_the_cpu():
    states = {}
    for device in ("cpu", "cuda"):
        model = step_model.layers(SMALL, torch.device(device))
        hidden = step.hidden_states(SMALL, torch.device(device)).sign()
        for layer in model:
            layer.weight.copy_(layer.weight.sign())  # small integers: the projection is exact
        with step.way("staging_batch_prefetch", SMALL, model, hidden, torch.device(device)) as one:
            for start, new in step_model.trace(SMALL, 100):
                one(step_model.metadata(SMALL, start, new))
        states[device] = [pool.cpu() for layer in model for pool in layer.state.values()]
        states[device, "output"] = [layer.output.cpu() for layer in model]
    assert all(map(torch.equal, states["cpu"], states["cuda"]))
    for wanted, found in zip(states["cpu", "output"], states["cuda", "output"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_pages_hold_all_that_a_window_may_read():
    rng = np.random.default_rng(0)
    for ratio in (4, 128):
        table = step_model.metadata(SMALL, np.full(3, 500), np.full(3, 4))[f"block_table_{ratio}"]
        for length in rng.integers(1, 2000, 200):
            first = max(0, ((length - 1) // ratio - (ratio == 4)) * ratio)
            pages = np.arange(first // 32, (length + 3) // 32 + 1)
            assert len(set(table[1, pages])) == len(pages)


@pytest.mark.gpu
def test_twenty_thousand_steps_hold_memory_flat():
    import resource

    device = torch.device("cuda")
    shape = Shape((128, 4), batch=2, hidden=32, head_dim=128)
    model = step_model.layers(shape, device)
    steps = step_model.steady_steps(shape)
    with step.way(
        "staging_batch_prefetch", shape, model, step.hidden_states(shape, device), device
    ) as one:
        for count in (2000, 18000):
            for _ in range(count):
                one(step_model.metadata(shape, *next(steps)))
            torch.cuda.synchronize()
            if count == 2000:
                before = torch.cuda.memory_reserved(), resource.getrusage(resource.RUSAGE_SELF)
        assert torch.cuda.memory_reserved() == before[0]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1].ru_maxrss
        assert grown < 8 << 10  # KiB
