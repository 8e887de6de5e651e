"""A simulation of prefill and decode: how an engine uses both ops, with every emitted row checked.

Requests come and go. All prompts of a step are prefilled in one call. It writes only the tail of
the state, and some of a prompt's last tokens are rejected afterwards. Each decode step drafts
tokens, stores and compresses them, and accepts a random number of the drafts. The others are rolled
back. The simulator keeps the history of every request and computes each compressed row from it in
float64. Compressed rows go on to a cache, all bytes of which are compared with those that the
reference makes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kvfold
from kvfold.bench.demo_cache import CompressedCache
from kvfold.bench.measure.verify import outside
from kvfold.codegen import Problem, op_spec
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime import dispatch
from kvfold.step import SegmentPrefetcher, StepBatch

COMPRESS_RATIOS = (4, 128)
NEXT_N = 4  # the draft length
PAGE_SIZE = 16
MAX_LENGTH = 1024  # tokens of a request
BATCH_STEP = 4  # batches are padded to a multiple, as engines do to replay few CUDA graphs


@dataclass
class Summary:
    """What a run did.

    Attributes:
        tokens: drafted.
        prompt_tokens: prefilled.
        rows: output rows emitted and checked, by either op.
        recomputed: those whose window had closed before, on tokens that were then rejected.
        wrong: rows that are out of tolerance, missing, or written though no window closed, and
            rows with a wrong byte in the cache.
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
    prompt_tokens: int = 0
    rows: int = 0
    recomputed: int = 0
    wrong: int = 0
    first_wrong: str | None = None
    largest_error: float = 0.0
    replayed: int = 0


@dataclass(frozen=True)
class Step:
    """The requests of a decode step or of a prefill, int64 [batch] each.

    Attributes:
        slot: of each request, -1 for padding.
        start: tokens before the step.
        new: tokens drafted in the step, or of the prompt.
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
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    slots, head_dim = (64, 512) if on_gpu else (16, 512)
    requests = Requests(slots, np.random.default_rng(seed))
    layers = [Layer(head_dim, ratio, slots, device, seed) for ratio in COMPRESS_RATIOS]
    parameters = [{"ape": layer.ape.cpu()} for layer in layers]
    summary = Summary(
        device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        backend=dispatch.backend_for(device.type),
    )
    with StepBatch(device) as batch, SegmentPrefetcher(parameters, device, 1 << 22) as prefetcher:

        def compress(inputs: dict[str, Tensor], size: int) -> None:
            for number, layer in enumerate(layers):
                with prefetcher.segment(number) as parameters:
                    layer.compress(inputs, parameters["ape"], size)
            prefetcher.join()

        for _ in range(steps):
            prompts = requests.arrive()
            if len(prompts.slot):
                for layer in layers:
                    layer.prefill(prompts, summary)
            step = requests.draft()
            arrays = {}
            for layer in layers:
                arrays |= layer.prepare(step)
            size = len(step.slot)
            with batch.step(size) as one:
                one.run(compress, one.upload(arrays), size)
            for layer in layers:
                layer.check(step, summary)
            for slot in requests.accept(step):
                for layer in layers:
                    layer.release(slot)
            summary.steps += 1
            summary.tokens += int(step.new.sum())
            summary.prompt_tokens += int(prompts.new.sum())
            on_step()
        summary.replayed = batch.counters.replayed
    summary.requests = requests.served
    return summary


class Requests:
    """Requests of mixed length in a fixed number of slots."""

    def __init__(self, slots: int, rng: np.random.Generator):
        self.rng = rng
        self.length = np.zeros(slots, np.int64)  # accepted tokens
        self.target = np.zeros(slots, np.int64)  # length at which a request ends; 0: a free slot
        self.served = 0

    def arrive(self) -> Step:
        """Starts requests in some of the free slots. Returns their prompts, which may be empty.

        A prompt's last NEXT_N tokens are drafts, of which some are rejected after the prefill.
        """
        free = np.flatnonzero(self.target == 0)
        slots = free[self.rng.random(len(free)) < 0.2]
        prompt = self.rng.integers(0, 400, len(slots))
        rejected = self.rng.integers(0, np.minimum(prompt, NEXT_N) + 1)
        self.length[slots] = prompt - rejected
        self.target[slots] = self.length[slots] + self.rng.integers(20, 600, len(slots))
        self.served += len(slots)
        return Step(slot=slots, start=np.zeros_like(prompt), new=prompt)

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
    """One compressor: its paged state, and the history from which its rows are checked.

    Pages, state and history are of KV, then of score. A token's state has `parts` rows: with an
    overlapping window one for the window after its own, then one for its own.
    """

    def __init__(
        self, head_dim: int, compress_ratio: int, slots: int, device: torch.device, seed: int
    ):
        fields = {"head_dim": head_dim, "compress_ratio": compress_ratio}
        fields |= {"kv_dtype": "bf16", "state_dtype": "fp32"}
        self.prefill_problem = op_spec("prefill_compress").problem.of(fields)
        self.decode_problem = op_spec("paged_kv_compress").problem.of(fields | {"next_n": NEXT_N})
        self.ratio, self.device = compress_ratio, device
        self.parts = 2 if compress_ratio == 4 else 1
        self.generator = torch.Generator(device).manual_seed(seed + compress_ratio)
        self.row = self.parts, head_dim
        state_dim = self.parts * head_dim
        self.ape = self._random(compress_ratio, state_dim)
        # Enough for the windows that a step may read and the tokens that it may store.
        pages = slots * (-(-(self.parts * compress_ratio + NEXT_N) // PAGE_SIZE) + 1)
        rng = np.random.default_rng(seed + compress_ratio)
        self.pages = [Pages(slots, pages, rng) for _ in range(2)]
        self.state = self._random(2, pages, PAGE_SIZE, state_dim)
        self.history = torch.zeros(2, slots, MAX_LENGTH + NEXT_N, *self.row, device=device)
        self.closed = np.zeros(slots, np.int64)  # windows that closed, on rejected tokens too
        # Of the largest batch. A CUDA graph holds their addresses, so they stay.
        self.kv_score = torch.zeros(
            slots * NEXT_N, 2 * state_dim, dtype=torch.bfloat16, device=device
        )
        rows = slots * self._windows(NEXT_N)
        self.output = torch.zeros(rows, head_dim, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self.slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache = CompressedCache(head_dim, compress_ratio, slots, MAX_LENGTH, device, seed)

    def prefill(self, prompts: Step, summary: Summary) -> None:
        """Runs the prompts of requests that start, and checks their rows.

        Of a prompt, the state gets the rows that decoding needs if it rejects up to NEXT_N tokens,
        and only these have pages.
        """
        self.closed[prompts.slot] = 0
        for slot, length in zip(prompts.slot, prompts.new, strict=True):
            self._reserve(slot, max(0, length - NEXT_N), length)
        metadata = {
            name: torch.from_numpy(array).to(self.device)
            for name, array in self._metadata(prompts).items()
        }
        rows = int(self._cu_outputs(prompts)[-1])
        output = torch.full((rows, self.row[1]), torch.nan, device=self.device)
        kvfold.prefill_compress(
            self._draw(prompts),
            self.ape,
            self.state[0],
            self.state[1],
            metadata["block_table_kv"],
            metadata["block_table_score"],
            output,
            metadata["kv_lens"],
            metadata["cu_seq_lens"],
            metadata["cu_outputs"],
            self.ratio,
            write_state="tail",
            max_rollback=NEXT_N,
        )
        positions, slots = (
            torch.zeros(rows, dtype=dtype, device=self.device)
            for dtype in (torch.int32, torch.int64)
        )
        self.cache.store(output, positions, slots, metadata)
        if tokens := int(prompts.new.sum()):
            summary.variants.add(self._variant(self.prefill_problem, tokens))
        self._check(prompts, output, summary)

    def release(self, slot: int) -> None:
        """Frees a request's pages."""
        for pages in self.pages:
            pages.reserve(slot, 0, -1)

    def prepare(self, step: Step) -> dict[str, np.ndarray]:
        """Draws a step's new tokens. Returns the metadata that the op needs on the device."""
        for slot, start, end in zip(step.slot, step.start, step.end, strict=True):
            if slot >= 0:
                self._reserve(slot, start, end)
        tokens = self._draw(step)
        self.kv_score[: len(tokens)] = tokens
        self.output.fill_(torch.nan)
        return {f"{name}_{self.ratio}": array for name, array in self._metadata(step).items()}

    def compress(self, inputs: dict[str, Tensor], ape: Tensor, size: int) -> None:
        """Calls the op on the batch of `size` requests that `prepare` prepared."""
        kvfold.paged_kv_compress(
            self.kv_score[: size * NEXT_N],
            ape,
            self.state[0],
            self.state[1],
            inputs[f"block_table_kv_{self.ratio}"],
            inputs[f"block_table_score_{self.ratio}"],
            self._output(size),
            inputs[f"kv_lens_{self.ratio}"],
            inputs[f"cu_seq_lens_{self.ratio}"],
            inputs[f"cu_outputs_{self.ratio}"],
            self.ratio,
            NEXT_N,
        )
        rows = size * self._windows(NEXT_N)
        names = ("kv_lens", "cu_seq_lens", "cu_outputs", "block_table_cache")
        metadata = {name: inputs[f"{name}_{self.ratio}"] for name in names}
        output, positions, slots = self._output(size), self.positions[:rows], self.slots[:rows]
        self.cache.store(output, positions, slots, metadata, NEXT_N)

    def check(self, step: Step, summary: Summary) -> None:
        """Compares the rows of a decode step with the history."""
        summary.variants.add(self._variant(self.decode_problem, len(step.slot)))
        self._check(step, self._output(len(step.slot)), summary)

    def _check(self, step: Step, output: Tensor, summary: Summary) -> None:
        """Compares rows with the history. Rows that no window fills must still be NaN."""
        cu_outputs = self._cu_outputs(step)
        first, count = step.start // self.ratio, step.end // self.ratio - step.start // self.ratio
        request, window = _expand(first, count)
        _, row = _expand(cu_outputs[:-1], count)
        slot = step.slot[request]
        want = torch.full(output.shape, torch.nan, dtype=torch.float64, device=self.device)
        want[self._index(row)] = self._expected(slot, window)
        wrong, error = outside(output, want, WORKLOAD.tolerances["output"])
        at = self._index(row)
        wrong_bytes = self.cache.wrong_rows(output[at], slot, window)
        wrong[at] |= torch.from_numpy(wrong_bytes).to(self.device)[:, None]

        summary.rows += len(row)
        summary.recomputed += int((window < self.closed[slot]).sum())
        np.maximum.at(self.closed, slot, window + 1)
        if len(output):
            largest = float(error.nan_to_num(0).max())
            summary.largest_error = max(summary.largest_error, largest)
        wrong_rows = wrong.any(1).nonzero().flatten().tolist()
        summary.wrong += len(wrong_rows)
        if wrong_rows and summary.first_wrong is None:
            owner = int(np.searchsorted(cu_outputs, wrong_rows[0], side="right")) - 1
            summary.first_wrong = (
                f"step {summary.steps}, ratio {self.ratio}, request {owner} of"
                f" {len(step.slot)}, with {step.new[owner]} new tokens up to {step.end[owner]}"
            )

    def _draw(self, step: Step) -> Tensor:
        """Draws a step's new tokens, and writes them to the history: [tokens, 2 * state_dim]."""
        tokens = self._random(int(step.new.sum()), 2, *self.row).bfloat16()
        request, position = _expand(step.start, step.new)
        at = self._index(step.slot[request]), self._index(position)  # over rejected tokens
        self.history[:, *at] = tokens.float().transpose(0, 1)
        self.history[1, *at] += self.ape.unflatten(1, self.row)[self._index(position % self.ratio)]
        return tokens.flatten(1)

    def _metadata(self, step: Step) -> dict[str, np.ndarray]:
        """The int32 metadata of a step."""
        arrays = {
            "block_table_kv": self.pages[0].table[step.slot],
            "block_table_score": self.pages[1].table[step.slot],
            "block_table_cache": self.cache.table[step.slot],
            "kv_lens": step.end,
            "cu_seq_lens": np.append(0, step.new.cumsum()),
            "cu_outputs": self._cu_outputs(step),
        }
        return {name: array.astype(np.int32) for name, array in arrays.items()}

    def _expected(self, slot: np.ndarray, window: np.ndarray) -> Tensor:
        """The compressed rows of windows of the history: float64 [windows, head_dim]."""
        row = np.arange(self.parts * self.ratio)
        position = window[:, None] * self.ratio + row - (self.parts - 1) * self.ratio
        at = self._index(slot[:, None]), self._index(position), self._index(row // self.ratio)
        kv, score = self.history[:, *at].double()
        score[self._index(position) < 0] = -torch.inf
        return (kv * score.softmax(1)).sum(1)

    def _output(self, size: int) -> Tensor:
        """The output rows of a batch."""
        return self.output[: size * self._windows(NEXT_N)]

    def _windows(self, new: Any) -> Any:
        """The most windows that so many new tokens can close."""
        return -(-new // self.ratio)

    def _cu_outputs(self, step: Step) -> np.ndarray:
        return np.append(0, self._windows(step.new).cumsum())

    def _first_needed(self, length: int) -> int:
        """The first position whose state a window that is still open reads."""
        return max(0, (length // self.ratio - self.parts + 1) * self.ratio)

    def _reserve(self, slot: int, start: int, end: int) -> None:
        for pages in self.pages:
            pages.reserve(slot, self._first_needed(start) // PAGE_SIZE, (end - 1) // PAGE_SIZE)

    def _variant(self, problem: Problem, size: int) -> str:
        if dispatch.backend_for(self.device.type) == "reference":
            return "none: the torch reference"
        return dispatch.select(problem, size, self.device).symbol

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.device)


def _expand(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[5, 8], [2, 1] -> [0, 0, 1] and [5, 6, 8]: `count` numbers from `first` on, with an index."""
    index = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(index)) - np.repeat(count.cumsum() - count, count)
    return index, first[index] + nth
