"""SegmentPrefetcher on a fake device that runs its work in random orders."""

import contextlib
import logging

import fake_streams
import pytest
import torch

from kvfold.step.prefetch import SegmentPrefetcher


def segments(count: int) -> list[dict[str, torch.Tensor]]:
    """Segments of unequal size, so that their tensors overlap in a buffer."""
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
    """Visits segments and computes what they must hold: a visit makes x into 1.5 x + amount."""

    def __init__(
        self,
        device: fake_streams.Device,
        given: list[dict[str, torch.Tensor]],
        write_back: bool = True,
        budget: int = 1 << 14,
    ):
        self.device, self.write_back = device, write_back
        self.prefetcher = SegmentPrefetcher(given, "cuda:0", budget, write_back=write_back)
        self.held = [{name: t.numpy().copy() for name, t in s.items()} for s in given]
        self.seen: list[list] = []  # values that the device's work produced
        self.expected: list[list] = []

    def visit(self, index: int) -> int:
        """Enqueues or captures one visit; returns its amount."""
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
        """Expects one visit that was enqueued, by itself or in a graph."""
        for name, x in self.held[index].items():
            x = 1.5 * x + amount
            self.expected.append(x.tolist())
            if self.write_back:
                self.held[index][name] = x

    def assert_written_back(self) -> None:
        for segment, held in zip(self.prefetcher.segments, self.held, strict=True):
            for name, x in held.items():
                assert segment[name].tolist() == x.tolist(), name


@pytest.mark.parametrize("seed", range(150))
def test_random_programs_give_the_results_of_ordered_ones(seed, monkeypatch, caplog):
    caplog.set_level(logging.ERROR, "kvfold")  # one buffer is a warning
    device = fake_streams.install(monkeypatch, seed)
    rng = device.rng
    count, write_back = rng.choice([1, 2, 3, 6]), rng.random() < 0.6
    budget = 3500 if rng.random() < 0.2 else 1 << 14
    visits = Visits(device, segments(count), write_back, budget)
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
                visits.assert_written_back()
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
    visits.assert_written_back()
    assert visits.seen == visits.expected
    if not graphs:
        prefetcher.close()


@pytest.mark.parametrize("seed", range(10))
def test_a_segment_is_copied_in_after_its_own_write_back(seed, monkeypatch):
    device = fake_streams.install(monkeypatch, seed)
    # The second visit of segment 0 uses the buffer of the empty segment, with nothing to wait for.
    visits = Visits(device, [segments(1)[0], {}, {"a": torch.ones(3)}])
    for index in (0, 1, 0):
        visits.expect(index, visits.visit(index))
    device.synchronize()
    visits.assert_written_back()
    assert visits.seen == visits.expected
