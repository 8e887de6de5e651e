"""A decode simulation: how an inference engine uses the op, with every emitted row checked.

Requests come and go. Each step drafts tokens, stores and compresses them, and accepts a random
number of the drafts. The others are rolled back. The simulator keeps the history of every request
and computes each compressed row from it in float64.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import kvfold
from kvfold.bench.measure.verify import outside
from kvfold.ops.paged_kv_compress.spec import Problem
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime import dispatch
from kvfold.step import SegmentPrefetcher, StepBatch

COMPRESS_RATIOS = (4, 128)
NEXT_N = 4
PAGE_SIZE = 16
MAX_LENGTH = 1024  # tokens of a request
BATCH_STEP = 4  # batches are padded to a multiple, as engines do to replay few CUDA graphs


@dataclass
class Summary:
    """What a run did.

    Attributes:
        rows: output rows emitted and checked.
        recomputed: those whose window had closed before, on tokens that were then rejected.
        wrong: rows that are out of tolerance, missing, or written though no window closed.
        first_wrong: where the first of them is; None if there is none.
        largest_error: largest |row - float64|.
        replayed: steps that were one launch of a CUDA graph.
    """

    device: str
    backend: str
    variants: set[str] = field(default_factory=set)
    steps: int = 0
    requests: int = 0
    tokens: int = 0
    rows: int = 0
    recomputed: int = 0
    wrong: int = 0
    first_wrong: str | None = None
    largest_error: float = 0.0
    replayed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """The requests of a step, int64 [batch] each.

    Attributes:
        slot: of each request, -1 for padding.
        start: tokens before the step.
        new: tokens drafted in the step.
    """

    slot: np.ndarray
    start: np.ndarray
    new: np.ndarray

    @property
    def end(self) -> np.ndarray:
        """Tokens after the step."""
        return self.start + self.new


def run(
    steps: int = 300, device: torch.device | str = "cpu", seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Summary:  # fmt: skip
    """Simulates; calls `on_step` after every step.

    Raises:
        TableError: the table in force has no row for the demo's problems.
    """
    began = time.perf_counter()
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    slots, head_dim = (64, 512) if on_gpu else (32, 128)
    requests = Requests(slots, np.random.default_rng(seed))
    summary = Summary(
        device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        backend=dispatch.backend_for(device.type),
    )
    with _one_thread(), contextlib.ExitStack() as stack:
        layers = [Layer(head_dim, ratio, slots, device, seed) for ratio in COMPRESS_RATIOS]
        batch = stack.enter_context(StepBatch(device))
        parameters = [{"ape": layer.ape.cpu()} for layer in layers]
        prefetcher = stack.enter_context(SegmentPrefetcher(parameters, device, 1 << 22))

        def dispatch_layers(inputs: dict[str, Tensor], size: int) -> None:
            for number, layer in enumerate(layers):
                with prefetcher.segment(number) as parameters:
                    layer.compress(inputs, parameters["ape"], size)
            prefetcher.join()

        for _ in range(steps):
            for slot in requests.arrive():
                for layer in layers:
                    layer.admit(slot, requests.length[slot])
            step = requests.draft()
            arrays = {}
            for layer in layers:
                arrays |= layer.prepare(step)
            with batch.step(len(step.slot)) as one:
                one.run(dispatch_layers, one.upload(arrays), len(step.slot))
            for layer in layers:
                layer.check(step, summary)
            for slot in requests.accept(step):
                for layer in layers:
                    layer.release(slot)
            summary.steps += 1
            summary.tokens += int(step.new.sum())
            on_step()
        summary.replayed = batch.counters.replayed
    summary.requests = requests.served
    summary.seconds = time.perf_counter() - began
    return summary


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one CPU thread. The tensors are small, and more threads are much slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Requests:
    """Requests of mixed length in a fixed number of slots."""

    def __init__(self, slots: int, rng: np.random.Generator):
        self.rng = rng
        self.length = np.zeros(slots, np.int64)  # accepted tokens
        self.target = np.zeros(slots, np.int64)  # length at which a request ends; 0: a free slot
        self.served = 0

    def arrive(self) -> list[int]:
        """Starts requests in some of the free slots. Returns those slots."""
        free = np.flatnonzero(self.target == 0)
        slots = free[self.rng.random(len(free)) < 0.2]
        self.length[slots] = self.rng.integers(0, 400, len(slots))  # the prompt
        self.target[slots] = self.length[slots] + self.rng.integers(20, 600, len(slots))
        self.served += len(slots)
        return slots.tolist()

    def draft(self) -> Step:
        """The batch of a step: most requests draft NEXT_N tokens, some fewer, padding none."""
        slots = self.rng.permutation(np.flatnonzero(self.target))
        new = np.where(self.rng.random(len(slots)) < 0.8, NEXT_N, self.rng.integers(1, NEXT_N + 1))
        padding = -len(slots) % BATCH_STEP or (BATCH_STEP if len(slots) == 0 else 0)
        return Step(
            slot=np.pad(slots, (0, padding), constant_values=-1),
            start=np.pad(self.length[slots], (0, padding)),
            new=np.pad(new, (0, padding)),
        )

    def accept(self, step: Step) -> list[int]:
        """Accepts 1 to all of each request's drafts. Returns the slots of requests that end."""
        active = step.slot >= 0
        slots = step.slot[active]
        self.length[slots] += self.rng.integers(1, step.new[active] + 1)
        done = slots[self.length[slots] >= self.target[slots]]
        self.target[done] = 0
        return done.tolist()


class Pages:
    """A block table over physical pages that all requests share, allocated in random order."""

    def __init__(self, slots: int, pages: int, rng: np.random.Generator):
        self.rng = rng
        self.free = list(range(pages))
        self.table = np.full((slots + 1, -(-MAX_LENGTH // PAGE_SIZE)), -1, np.int32)  # -1: padding

    def reserve(self, slot: int, first: int, last: int) -> None:
        """Gives a request the logical pages first to last, and no others; keeps those it has."""
        row = self.table[slot]
        needed = np.zeros(len(row), bool)
        needed[first : last + 1] = True
        for logical in np.flatnonzero(~needed & (row >= 0)):
            self.free.append(int(row[logical]))
            row[logical] = -1
        for logical in np.flatnonzero(needed & (row < 0)):
            row[logical] = self.free.pop(self.rng.integers(len(self.free)))


class Layer:
    """One compressor: its paged state, and the history from which its rows are checked."""

    def __init__(
        self, head_dim: int, compress_ratio: int, slots: int, device: torch.device, seed: int
    ):
        self.head_dim, self.compress_ratio = head_dim, compress_ratio
        self.overlap = compress_ratio == 4
        self.state_dim = state_dim = head_dim * (2 if self.overlap else 1)
        self.generator = torch.Generator(device).manual_seed(seed + compress_ratio)
        self.device = device
        self.ape = self._random(compress_ratio, state_dim)
        # Enough for the windows that a step may read and the tokens that it may store.
        rows = (2 if self.overlap else 1) * compress_ratio + NEXT_N
        pages = slots * (-(-rows // PAGE_SIZE) + 1)
        rng = np.random.default_rng(seed + compress_ratio)
        self.pages_kv, self.pages_score = (Pages(slots, pages, rng) for _ in range(2))
        self.paged_kv, self.paged_score = (
            self._random(pages, PAGE_SIZE, state_dim) for _ in range(2)
        )
        self.history_kv, self.history_score = (
            torch.zeros(slots, MAX_LENGTH + NEXT_N, state_dim, device=device) for _ in range(2)
        )
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by batch size
        self.closed = np.zeros(slots, np.int64)  # windows that closed, on rejected tokens too

    def admit(self, slot: int, length: int) -> None:
        """Starts a request after its prompt: fills the state that decoding will read."""
        self.history_kv[slot, :length] = self._random(length, self.state_dim)
        self.history_score[slot, :length] = self._random(length, self.state_dim)
        self._reserve(slot, length, length)
        first = self._first_needed(length)
        position = np.arange(first, length)
        if length > first:
            for pages, pool, history in (
                (self.pages_kv, self.paged_kv, self.history_kv),
                (self.pages_score, self.paged_score, self.history_score),
            ):
                physical = self._index(pages.table[slot, position // PAGE_SIZE])
                pool[physical, self._index(position % PAGE_SIZE)] = history[slot, first:length]
        self.closed[slot] = length // self.compress_ratio

    def release(self, slot: int) -> None:
        """Frees a request's pages."""
        self.pages_kv.reserve(slot, 0, -1)
        self.pages_score.reserve(slot, 0, -1)

    def prepare(self, step: Step) -> dict[str, np.ndarray]:
        """Draws a step's new tokens. Returns the metadata that the op needs on the device."""
        for slot, start, end in zip(step.slot, step.start, step.end, strict=True):
            if slot >= 0:
                self._reserve(slot, start, end)
        kv_score, output = self._buffers(len(step.slot))
        new = self._random(int(step.new.sum()), 2 * self.state_dim).bfloat16()
        kv_score[: len(new)] = new
        output.fill_(torch.nan)
        self._extend_history(step, new)
        arrays = {
            "block_table_kv": self.pages_kv.table[step.slot],
            "block_table_score": self.pages_score.table[step.slot],
            "kv_lens": step.end,
            "cu_seq_lens": np.concatenate(([0], step.new.cumsum())),
            "cu_outputs": self._first_output(step),
        }
        return {self._name(name): array.astype(np.int32) for name, array in arrays.items()}

    def compress(self, inputs: dict[str, Tensor], ape: Tensor, size: int) -> None:
        """Calls the op on the batch of `size` requests that `prepare` prepared."""
        kv_score, output = self._buffers(size)
        kvfold.paged_kv_compress(
            kv_score,
            ape,
            self.paged_kv,
            self.paged_score,
            inputs[self._name("block_table_kv")],
            inputs[self._name("block_table_score")],
            output,
            inputs[self._name("kv_lens")],
            inputs[self._name("cu_seq_lens")],
            inputs[self._name("cu_outputs")],
            self.compress_ratio,
            NEXT_N,
        )

    def _name(self, name: str) -> str:
        return f"{name}_{self.compress_ratio}"

    def _buffers(self, size: int) -> tuple[Tensor, Tensor]:
        """kv_score and output of a batch size. A CUDA graph holds their addresses, so they stay."""
        if size not in self.buffers:
            rows = size * -(-NEXT_N // self.compress_ratio)
            self.buffers[size] = (
                torch.zeros(
                    size * NEXT_N, 2 * self.state_dim, dtype=torch.bfloat16, device=self.device
                ),
                torch.zeros(rows, self.head_dim, device=self.device),
            )
        return self.buffers[size]

    def _first_output(self, step: Step) -> np.ndarray:
        return np.concatenate(([0], (-(-step.new // self.compress_ratio)).cumsum()))

    def check(self, step: Step, summary: Summary) -> None:
        """Compares the output with the history. Rows that no window fills must still be NaN."""
        first_output, (_, output) = self._first_output(step), self._buffers(len(step.slot))
        summary.variants.add(self._variant(len(step.slot)))
        first = step.start // self.compress_ratio
        count = step.end // self.compress_ratio - first
        request = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(request)) - np.repeat(count.cumsum() - count, count)
        slot, window = step.slot[request], first[request] + nth
        row = first_output[request] + nth
        want = torch.full(output.shape, torch.nan, dtype=torch.float64, device=self.device)
        want[self._index(row)] = self._expected(slot, window)

        summary.rows += len(row)
        summary.recomputed += int((window < self.closed[slot]).sum())
        np.maximum.at(self.closed, slot, window + 1)
        wrong, error = outside(output, want, WORKLOAD.tolerances["output"])
        if not len(output):
            return
        summary.largest_error = max(summary.largest_error, float(error.nan_to_num(0).max()))
        wrong_rows = wrong.any(1).nonzero().flatten().tolist()
        summary.wrong += len(wrong_rows)
        if wrong_rows and summary.first_wrong is None:
            owner = int(np.searchsorted(first_output, wrong_rows[0], side="right")) - 1
            summary.first_wrong = (
                f"step {summary.steps}, ratio {self.compress_ratio}, request {owner} of"
                f" {len(step.slot)}, with {step.new[owner]} new tokens up to {step.end[owner]}"
            )

    def _expected(self, slot: np.ndarray, window: np.ndarray) -> Tensor:
        """The compressed rows of windows of the history: float64 [windows, head_dim]."""
        position = window[:, None] * self.compress_ratio + np.arange(self.compress_ratio)
        kv, score = self._rows(slot, position, slice(self.state_dim - self.head_dim, None))
        if self.overlap:
            before = position - self.compress_ratio
            kv_before, score_before = self._rows(slot, before, slice(self.head_dim))
            score_before[self._index(before) < 0] = -torch.inf
            kv, score = torch.cat((kv_before, kv), 1), torch.cat((score_before, score), 1)
        return (kv * score.softmax(1)).sum(1)

    def _rows(
        self, slot: np.ndarray, position: np.ndarray, columns: slice
    ) -> tuple[Tensor, Tensor]:
        """KV and score of the history, float64 [windows, rows, columns]."""
        index = self._index(slot[:, None]), self._index(position)
        kv, score = (history[index] for history in (self.history_kv, self.history_score))
        return kv[..., columns].double(), score[..., columns].double()

    def _extend_history(self, step: Step, kv_score: Tensor) -> None:
        """Writes the new tokens into the history, over rejected ones."""
        slot = np.repeat(step.slot, step.new)
        nth = np.arange(len(slot)) - np.repeat(step.new.cumsum() - step.new, step.new)
        position = np.repeat(step.start, step.new) + nth
        kv, score = kv_score.float().split(self.state_dim, dim=1)
        index = self._index(slot), self._index(position)
        self.history_kv[index] = kv
        self.history_score[index] = score + self.ape[self._index(position % self.compress_ratio)]

    def _first_needed(self, length: int) -> int:
        """The first position whose state a window that is still open reads."""
        return max(0, (length // self.compress_ratio - int(self.overlap)) * self.compress_ratio)

    def _reserve(self, slot: int, start: int, end: int) -> None:
        first, last = self._first_needed(start) // PAGE_SIZE, (end - 1) // PAGE_SIZE
        self.pages_kv.reserve(slot, first, last)
        self.pages_score.reserve(slot, first, last)

    def _variant(self, batch: int) -> str:
        if dispatch.backend_for(self.device.type) == "reference":
            return "none: the torch reference"
        problem = Problem(
            head_dim=self.head_dim,
            compress_ratio=self.compress_ratio,
            overlap=self.overlap,
            kv_dtype="bf16",
            state_dtype="fp32",
            next_n=NEXT_N,
        )
        return dispatch.select(problem, batch, self.device).symbol

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.device)
