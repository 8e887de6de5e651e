"""What the tests of the benchmark, the tuner and the command line share."""

from dataclasses import dataclass, field

import pytest
import torch

from kvfold.bench import environment
from kvfold.bench.measure import limit, runner, timing
from kvfold.codegen import Variant, load_table
from kvfold.ops.paged_kv_compress import reference
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime.torch_op import torch_op


@pytest.fixture(autouse=True)
def shipped_table(monkeypatch):
    """The shipped table is in force, whatever the environment of the tests says."""
    monkeypatch.delenv("KVFOLD_CONFIG", raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


SHARES = {"none": 1.0, "metadata": 0.75, "state": 0.5}


@dataclass
class FakeGpu:
    """A GPU whose kernels are the reference on the CPU, and whose times are made up.

    Attributes:
        calls: what was launched since the last replay: the kernel's name or variant, and its
            prefetch.
        replays: the calls of every replay.
        us: the time of a call by the kernel's name, 10 by default. Calls that prefetch take a share
            of it: see SHARES.
        wrong: names of kernels that write nothing.
    """

    calls: list[tuple[str, str]] = field(default_factory=list)
    replays: list[list[tuple[str, str]]] = field(default_factory=list)
    us: dict[str, float] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)

    def launcher(self, name: str):
        """A function that launches the kernel of this name."""

        def launch(arguments) -> None:
            self.calls.append((name, arguments.prefetch))
            if name not in self.wrong:
                reference.run(arguments)

        return launch

    def replay(self, calls, *_) -> timing.Timing:
        self.calls.clear()
        for call in calls:
            call()
        self.replays.append(list(self.calls))
        ((name, prefetch),) = set(self.calls)
        us = self.us.get(name, 10.0) * SHARES[prefetch]
        return timing.Timing(us, 0.9 * us, 1.2 * us)


@pytest.fixture
def fake_gpu(monkeypatch) -> FakeGpu:
    """Stands in for the GPU in the benchmark: with the shipped table, an H100 and three cases."""
    gpu = FakeGpu()
    torch_op(WORKLOAD.spec.name)  # registered, for torch.ops

    def op(*args, **kwargs) -> None:
        gpu.launcher("op")(WORKLOAD.spec.arguments(*args, **kwargs))

    def cold_cases(make, metadata, device, most):
        return [make(seed) for seed in range(3)]

    class Dispatch:
        table = staticmethod(load_table)
        backend_for = staticmethod(lambda device_type: "cuda")
        arch_of = staticmethod(lambda device: "sm_90")
        bind = staticmethod(lambda variant, device: gpu.launcher(variant.symbol))

        @staticmethod
        def select(problem, size, device) -> Variant:
            found = load_table().find(problem, "cuda", "sm_90", size)
            assert found is not None
            return found

    monkeypatch.setattr(runner, "dispatch", Dispatch)
    monkeypatch.setattr(runner, "torch_op", lambda name: op)
    monkeypatch.setitem(
        WORKLOAD.yardsticks, "row_by_row", lambda variant, device: gpu.launcher("row_by_row")
    )
    monkeypatch.setattr(limit, "measure", lambda device: limit.Limit(4000.0, 3500.0, 0.5))
    monkeypatch.setattr(timing, "replay", gpu.replay)
    monkeypatch.setattr(timing, "cold_cases", cold_cases)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "host", lambda call: 5.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")
    monkeypatch.setattr(environment, "commit", lambda: None)
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    return gpu
