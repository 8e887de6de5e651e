"""SegmentPrefetcher on a fake device that does its work in the worst order that it may."""

import contextlib
import logging

import fake_streams
import pytest
import torch

from kvfold.step.prefetch import SegmentPrefetcher


def segments(count: int) -> list[dict[str, torch.Tensor]]:
    """Of unequal size, so that one lies across the tensors of another."""
    made = []
    for i in range(count):
        segment = {
            "a": torch.full((40 + 70 * (i * 7 % 4),), 10.0 * i),
            "b": torch.full((20 + 90 * (i * 5 % 3),), 1.0 * i),
        }
        if i % 2:
            segment["c"] = torch.full((130,), 2.0 * i)
        made.append(segment)
    return made


class Visits:
    """Visits segments, and knows what they must hold: every visit makes x into 1.5 x + amount."""

    def __init__(self, device: fake_streams.Device, count: int, write_back: bool, budget: int):
        self.device, self.write_back = device, write_back
        self.prefetcher = SegmentPrefetcher(
            segments(count), "cuda:0", budget, write_back=write_back
        )
        self.held = [{name: t.numpy().copy() for name, t in s.items()} for s in segments(count)]
        self.seen: list[list] = []  # on the device, as its work was done
        self.due: list[list] = []

    def visit(self, index: int) -> int:
        """Queues or captures one visit; returns its amount."""
        amount = self.device.rng.randint(1, 3)
        fails = self.device.rng.random() < 0.1
        with contextlib.suppress(KeyError), self.prefetcher.segment(index) as tensors:
            for tensor in tensors.values():
                x = tensor.numpy()
                self.device.current.push(lambda x=x: x.__imul__(1.5))
                self.device.current.push(lambda x=x: x.__iadd__(amount))
                self.device.current.push(lambda x=x: self.seen.append(x.tolist()))
            if fails:
                raise KeyError
        return amount

    def expect(self, index: int, amount: int) -> None:
        """One visit has been queued, by itself or in a graph."""
        for name, x in self.held[index].items():
            x = 1.5 * x + amount
            self.due.append(x.tolist())
            if self.write_back:
                self.held[index][name] = x

    def assert_home(self) -> None:
        for segment, held in zip(self.prefetcher.segments, self.held, strict=True):
            for name, x in held.items():
                assert segment[name].tolist() == x.tolist(), name


@pytest.mark.parametrize("seed", range(150))
def test_random_programs(seed, monkeypatch, caplog):
    caplog.set_level(logging.ERROR, "kvfold")  # that there is one buffer only is said each time
    device = fake_streams.install(monkeypatch, seed)
    rng = device.rng
    count, write_back = rng.choice([1, 2, 3, 6]), rng.random() < 0.6
    visits = Visits(device, count, write_back, 3500 if rng.random() < 0.2 else 1 << 14)
    prefetcher = visits.prefetcher
    graphs = []
    for _ in range(rng.randint(1, 6)):
        order = list(range(count)) * rng.randint(1, 2)
        if rng.random() < 0.4:
            order = [rng.randrange(count) for _ in order]
        what = rng.random()
        if what < 0.5:
            if rng.random() < 0.2:
                other = fake_streams.Stream(device)
                other.wait_stream(device.current)
                device.current = other
            for index in order:
                visits.expect(index, visits.visit(index))
                device.run_some(3)
            if write_back and rng.random() < 0.3:
                prefetcher.synchronize()
                if graphs:
                    device.synchronize()
                visits.assert_home()
        elif what < 0.75:
            prefetcher.join()
            with device.capturing() as graph:
                made = [(index, visits.visit(index)) for index in [*order, count - 1]]
            graphs.append((graph, made))
        elif graphs:
            prefetcher.join()
            graph, made = rng.choice(graphs)
            device.replay(graph)
            for index, amount in made:
                visits.expect(index, amount)
    device.synchronize()
    visits.assert_home()
    assert visits.seen == visits.due
    if not graphs:
        prefetcher.close()
