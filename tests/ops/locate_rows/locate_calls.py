"""Calls of locate_rows for tests, what they must leave, and the cases of the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from state_calls import INT_MAX, INT_MIN, Guarded, guarded
from torch import Tensor

import kvfold
from kvfold.codegen import Variant
from kvfold.ops.locate_rows.spec import Arguments, Problem, Tuning
from kvfold.ops.locate_rows.workload import expected
from kvfold.runtime.torch_op import torch_op

MUTATED = ("positions", "slots")
SOURCES = ("block_table", "token_slots")
BEFORE = 1_000_001  # in positions and slots before a call; no call writes it


@dataclass(frozen=True)
class Call(Guarded, Arguments):
    """The arguments of one call."""

    def expected(self) -> Mapping[str, Tensor]:
        """The mutated tensors as the call must leave them, if cu_outputs does not decrease."""
        return expected(self)

    def with_integers(self, **values: Sequence[int]) -> Call:
        """A copy with other values in some metadata tensors."""
        call = self.clone()
        for name, value in values.items():
            tensor = getattr(call, name)
            tensor.copy_(torch.tensor(value, dtype=tensor.dtype).view(tensor.shape))
        return call

    def without_last(self, tokens: Sequence[int]) -> Call:
        """The same call without the last tokens of each request, whose slots stay."""
        less = torch.tensor(tokens, dtype=torch.int32, device=self.kv_lens.device)
        counts = guarded(self.cu_seq_lens.diff() - less, odd=True)
        return replace(self, kv_lens=guarded(self.kv_lens - less), new_tokens=counts)

    def with_nonsense(self, share: float, seed: int, monotone: bool = True) -> Call:
        """A copy with about that share of each metadata tensor's integers replaced by nonsense.

        Nonsense is any integer; the ends of ranges are frequent.

        Args:
            monotone: whether cu_outputs is sorted again.
        """
        rng = np.random.default_rng(seed)
        call = self.clone()
        near = [-2, -1, 0, 1, 2, 3, 5, 8, call.positions.numel()]
        corners = [INT_MIN, INT_MIN + 1, INT_MAX - 1, INT_MAX, *near]
        names = ("kv_lens", "cu_seq_lens", "cu_outputs", "new_tokens")
        for name in (*names, "block_table_cache", "token_slots"):
            if (x := getattr(call, name)) is None:
                continue
            nonsense = rng.integers(INT_MIN, INT_MAX, x.shape, endpoint=True)
            nonsense = np.where(rng.random(x.shape) < 0.5, rng.choice(corners, x.shape), nonsense)
            x.copy_(torch.from_numpy(np.where(rng.random(x.shape) < share, nonsense, x.cpu())))
        if monotone:
            call.cu_outputs.copy_(call.cu_outputs.sort().values)
        return call


def make(
    spans: Sequence[tuple[int, int]],
    *,
    compress_ratio: int = 4,
    rows_per_page: int = 3,
    source: str = "block_table",
    reserve: Sequence[int] | int | None = None,
    first_row: int = 0,
    spare_rows: int = 2,
    max_pages: int | None = None,
    num_tokens: int = -1,
    next_n: int = -1,
    strided: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Call:
    """A call. Every tensor lies between guard zones. A fifth of the pages are negative.

    Args:
        spans: each request's (tokens before the call, new tokens).
        reserve: output rows per request, by default as many as it fills.
        first_row: the first request's first row.
        spare_rows: rows after the last request's; if it is negative, rows are missing.
        max_pages: of the block table, by default as many as the longest request needs.
        strided: leaves a gap after every row of the block table, and puts the metadata at odd
            addresses.
    """
    rng = np.random.default_rng(seed)
    batch, ratio = len(spans), compress_ratio
    lens = np.array([start + new for start, new in spans], np.int64)
    new = np.array([new for _, new in spans], np.int64)
    rows = lens // ratio - (lens - new) // ratio
    if reserve is not None:
        rows = np.broadcast_to(np.asarray(reserve, np.int64), (batch,))
    num_outputs = max(0, first_row + int(rows.sum()) + spare_rows)

    def ints(values: np.ndarray, dtype: torch.dtype = torch.int32, gap: int = 0) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        return guarded(tensor, gap if strided else 0, odd=strided)

    def prefix_sums(counts: np.ndarray, first: int = 0) -> Tensor:
        return ints(np.concatenate(([0], counts.cumsum())) + first)

    table = token_slots = None
    if source == "block_table":
        if max_pages is None:
            max_pages = int(lens.max(initial=0)) // (ratio * rows_per_page) + 1
        pages = rng.permutation(batch * max_pages).reshape(batch, max_pages)
        table = ints(np.where(rng.random(pages.shape) < 0.2, -1 - pages, pages), gap=3)
    else:
        numbers = rng.permutation(int(new.sum())) * 1_000_000_007
        token_slots = ints(np.where(rng.random(numbers.shape) < 0.2, -1, numbers), torch.int64)
    return Call(
        kv_lens=ints(lens),
        cu_seq_lens=prefix_sums(new),
        cu_outputs=prefix_sums(rows, first_row),
        positions=ints(np.full(num_outputs, BEFORE)),
        slots=ints(np.full(num_outputs, BEFORE), torch.int64),
        compress_ratio=compress_ratio,
        rows_per_page=rows_per_page,
        num_tokens=num_tokens,
        next_n=next_n,
        block_table_cache=table,
        token_slots=token_slots,
    ).clone(device)


def random_call(seed: int, device: str | torch.device = "cpu") -> Call:
    """A call with every argument of `make` drawn at random."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    ratio = one_of(1, 2, 3, 4, 4, 8, 128)
    most = one_of(2, 6, 4 * ratio + 2)
    spans = [
        (int(rng.integers(5 * ratio + 1)), int(rng.integers(most)))
        for _ in range(rng.integers(1, 20))
    ]
    tokens = sum(new for _, new in spans)
    call = make(
        spans,
        compress_ratio=ratio,
        rows_per_page=one_of(1, 2, 3, 64),
        source=one_of(*SOURCES),
        reserve=one_of(None, rng.integers(0, 5, len(spans)).tolist()),
        first_row=one_of(0, 0, 3, -2),
        spare_rows=one_of(0, 5, -1),
        max_pages=one_of(None, None, 1),
        num_tokens=one_of(-1, tokens, max(0, tokens - 3), tokens + 1),
        next_n=one_of(-1, -1, 4),
        strided=one_of(False, True),
        device=device,
        seed=seed,
    )
    if rng.integers(2):
        return call
    return call.without_last([int(rng.integers(new + 1)) for _, new in spans])


# ---- implementations -----------------------------------------------------------------------------


def run_op(call: Call) -> None:
    """By the backend and the variant that dispatch chooses; on the CPU, the reference."""
    args, kwargs = call.args_and_kwargs()
    kvfold.locate_rows(*args, **kwargs)


def variant_of(backend: str, warps: int = 1) -> Variant:
    return Variant(problem=Problem(), backend=backend, tuning=Tuning(warps=warps))


def run_variant(variant: Variant, call: Call) -> None:
    torch_op("locate_rows").run_variant(variant, *call.args())


# ---- the contract --------------------------------------------------------------------------------


def assert_follows_contract(run: Callable[[Call], None], call: Call) -> Call:
    """Runs a copy of the call and compares positions, slots and every byte outside them.

    Returns:
        the copy after the run.
    """
    result = call.clone()
    run(result)
    for name, want in call.expected().items():
        got = getattr(result, name).cpu()
        assert got.dtype == want.dtype
        assert got.tolist() == want.tolist(), name
    assert_nothing_outside(call, result)
    return result


def assert_safe(run: Callable[[Call], None], call: Call) -> None:
    """What holds for any metadata: two runs agree; their rows, and no others, get legal values."""
    result, again = call.clone(), call.clone()
    run(result)
    run(again)
    assert_nothing_outside(call, result)
    first = max(0, int(call.cu_outputs[0]))
    for name in MUTATED:
        got = getattr(result, name)
        assert torch.equal(got, getattr(again, name)), name
        assert (got[:first] == BEFORE).all() and (got[first:] != BEFORE).all(), name
    position = result.positions[first:]
    is_window = (position >= 0) & (position % call.compress_ratio == 0)
    assert ((position == -1) | is_window).all()
    assert (result.slots[first:][position == -1] == -1).all()


def assert_nothing_outside(call: Call, result: Call) -> None:
    for before, after in zip(call.outside(), result.outside(), strict=True):
        assert torch.equal(before, after), "bytes outside positions and slots changed"


CASES: dict[str, Callable[[], Call]] = {}


def case(build: Callable[[str], Call]) -> Callable[[str], Call]:
    """Adds the call with each source."""
    for source in SOURCES:
        CASES[f"{build.__name__}_{source}"] = partial(build, source)
    return build


FEW = [(6, 7), (8, 9), (1, 2), (5, 0), (11, 1)]


@case
def every_phase(source):
    return make([(s, n) for s in range(9) for n in range(10)], source=source)


@case
def windows_of_one_token(source):
    return make(FEW, compress_ratio=1, source=source)


@case
def windows_of_128_tokens(source):
    spans = [(127, 1), (128, 127), (5, 1000), (129, 126)]
    return make(spans, compress_ratio=128, rows_per_page=2, source=source)


@case
def gaps_in_the_metadata(source):
    return make(FEW, compress_ratio=3, strided=True, source=source)


@case
def more_rows_than_windows(source):
    return make(FEW, reserve=5, source=source)


@case
def fewer_rows_than_windows(source):
    return make([(0, 20)] * 4, reserve=[2, 0, 0, 3], source=source)


@case
def rows_of_another_call_before(source):
    return make(FEW, first_row=4, source=source)


@case
def rows_before_the_first(source):
    return make([(0, 20), (0, 12)], first_row=-2, source=source)


@case
def an_output_that_is_too_short(source):
    return make([(0, 20)] * 3, spare_rows=-7, source=source)


@case
def all_rows_are_of_another_call(source):
    return make(FEW, first_row=9, spare_rows=-9, source=source)


@case
def no_requests(source):
    return make([], first_row=1, spare_rows=5, source=source)


@case
def no_rows(source):
    return make([(0, 3)], spare_rows=0, source=source)


@case
def no_new_tokens(source):
    return make([(4, 0), (9, 0)], reserve=2, source=source)


@case
def tokens_that_requests_do_not_use(source):
    call = make(FEW, reserve=3, source=source).without_last([3, 1, 2, 0, 1])
    call.cu_seq_lens[-1] = INT_MIN  # says nothing
    return call


@case
def counts_that_are_not_legal(source):
    call = make([(4, 4)] * 6, reserve=2, num_tokens=23, source=source).without_last([0] * 6)
    return call.with_integers(new_tokens=[4, -1, INT_MIN, INT_MAX, 9, 4])


@case
def many_requests(source):
    return make([(b % 7, b % 6) for b in range(700)], reserve=1, next_n=4, source=source)


@case
def requests_with_too_many_tokens(source):
    return make([(3, 4), (3, 5), (3, 6)], reserve=2, next_n=5, source=source)


@case
def requests_beyond_num_tokens(source):
    return make([(3, 4), (3, 5), (3, 6)], reserve=2, num_tokens=14, source=source)


@case
def no_token_is_accepted(source):
    return make([(3, 4), (3, 5)], num_tokens=0, next_n=0, source=source)


@case
def invalid_requests_between_valid_ones(source):
    """kv_lens below the new tokens and negative; cu_seq_lens negative and decreasing."""
    call = make([(4, 4)] * 7, source=source)
    return call.with_integers(
        kv_lens=[8, 3, -1, INT_MIN, 8, 8, 8], cu_seq_lens=[-4, 0, 4, 8, 12, 16, 12, 20]
    )


@case
def the_last_positions_that_there_are(source):
    call = make([(0, 8), (0, 8)], reserve=[4, 4], rows_per_page=2**29, source=source)
    return call.with_integers(kv_lens=[INT_MAX, INT_MAX - 3])


@case
def the_longest_request(source):
    call = make([(0, 8)], compress_ratio=1, reserve=6, source=source)
    return call.with_integers(kv_lens=[INT_MAX], cu_seq_lens=[0, INT_MAX])


@case
def rows_that_begin_near_the_ends_of_int(source):
    call = make([(0, 40)] * 4, reserve=2, source=source)
    return call.with_integers(cu_outputs=[INT_MIN, -3, 4, 4, INT_MAX])


@case
def a_request_whose_first_row_is_far_below_0(source):
    """Its number of the first row there is would overflow an int together with its first window."""
    call = make([(0, 8)], compress_ratio=1, source=source)
    return call.with_integers(kv_lens=[INT_MAX], cu_seq_lens=[0, 8], cu_outputs=[INT_MIN, INT_MAX])


@case
def the_longest_windows(source):
    call = make([(0, 8)] * 2, compress_ratio=2**30 - 1, reserve=3, source=source)
    return call.with_integers(kv_lens=[INT_MAX, 2**30], cu_seq_lens=[0, INT_MAX, INT_MAX])


def a_block_table_without_columns() -> Call:
    return make(FEW, max_pages=0)


def a_block_table_that_is_too_narrow() -> Call:
    return make([(10, 30)] * 3, max_pages=2)


def the_largest_slots() -> Call:
    call = make([(0, 16)], rows_per_page=2**30 - 1)
    return call.with_integers(block_table_cache=[INT_MAX])


def tokens_past_token_slots() -> Call:
    call = make([(3, 9), (2, 9)], source="token_slots", num_tokens=40)
    return call.with_integers(cu_seq_lens=[4, 13, 22])


def tokens_past_token_slots_without_num_tokens() -> Call:
    return make([(3, 9), (2, 9)], source="token_slots").with_integers(cu_seq_lens=[4, 13, 22])


CASES |= {
    build.__name__: build
    for build in (
        a_block_table_without_columns,
        a_block_table_that_is_too_narrow,
        the_largest_slots,
        tokens_past_token_slots,
        tokens_past_token_slots_without_num_tokens,
    )
}
