"""The contract of paged_kv_compress as calls, and the comparison of a call with the oracle.

CASES maps the name of a line of the contract to a function that makes a call. Every implementation
runs each of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from calls import STATE, Call, in_wide_tables, make
from numerics import assert_rows_close, assert_same_bits
from state_calls import INT_MAX, INT_MIN
from torch import Tensor

from kvfold.ops import state_oracle

CASES: dict[str, Callable[[], Call]] = {}


def oracle(call: Call) -> dict[str, Tensor]:
    """What the call must leave in the mutated tensors; changes nothing."""
    return state_oracle.expected(call, call.next_n)


def assert_follows_contract(
    run: Callable[[Call], None], call: Call, expected: Mapping[str, Tensor] | None = None
) -> Call:
    """Runs a copy of the call and compares everything that it wrote with the oracle.

    The state must be the same bit by bit. So must output rows that the call does not write, and
    every byte outside the mutated tensors.

    Args:
        run: an implementation; it gets the copy.
        expected: oracle(call), for a call that several implementations run.

    Returns:
        the copy after the run.
    """
    expected = expected or oracle(call)
    result = call.clone()
    run(result)
    for name in STATE:
        assert_same_bits(getattr(result, name), expected[name], name)
    finite = expected["paged_kv"][expected["paged_kv"].isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    assert_rows_close(result.output, expected["output"], scale, "output")
    before, after = call.output.cpu(), result.output.cpu()
    kept = expected["output"] == before.double()
    assert_same_bits(after[kept], before[kept], "output that the call does not write")
    for before, after in zip(call.outside(), result.outside(), strict=True):
        assert torch.equal(before, after), "bytes outside the mutated tensors changed"
    return result


# Multi-token prediction, at the sizes of real models.
MTP = {
    "mtp_overlap_hd128_n4": {"head_dim": 128, "compress_ratio": 4, "next_n": 4},
    "mtp_overlap_hd512_n3": {"head_dim": 512, "compress_ratio": 4, "next_n": 3},
    "mtp_r128_hd128_n4": {"head_dim": 128, "compress_ratio": 128, "next_n": 4},
    "mtp_r128_hd512_n4": {"head_dim": 512, "compress_ratio": 128, "next_n": 4},
}
for name, fields in MTP.items():
    ratio, next_n = fields["compress_ratio"], fields["next_n"]
    spans = [(2 * ratio - 2, next_n), (ratio - 1, 1), (ratio, 2)]
    CASES[name] = partial(make, spans, **fields, page_size=32)

# Which of three new tokens closes the window.
for ratio in (4, 128):
    for token, before in {"first": 1, "middle": 2, "last": 3}.items():
        CASES[f"closes_on_{token}_new_token_r{ratio}"] = partial(
            make, [(2 * ratio - before, 3)], compress_ratio=ratio, page_size=32
        )

for page_size in (1, 2, 3, 4, 7, 8, 16, 32, 100):
    CASES[f"page_size_{page_size}"] = partial(
        make, [(14, 3), (7, 2)], compress_ratio=8, page_size=page_size
    )

for page_size in (1, 2, 4, 8):
    CASES[f"r128_page_size_{page_size}"] = partial(
        make, [(254, 3), (127, 2)], compress_ratio=128, page_size=page_size
    )


def far_away(page_size: int, shared: bool) -> Call:
    """Requests in the last columns of wide block tables. Each closes a window or more."""
    call = make([(6, 3), (11, 4), (7, 1)], page_size=page_size)
    return in_wide_tables(call, 262_144, shared=shared)


for page_size in (1, 2, 4, 8):
    for shared in (False, True):
        name = f"wide_{'shared' if shared else 'own'}_block_tables_page_size_{page_size}"
        CASES[name] = partial(far_away, page_size, shared)

for next_n in range(1, 9):
    CASES[f"next_n_{next_n}"] = partial(
        make, [(7, next_n), (4, next_n), (0, next_n), (11, 1)], next_n=next_n, page_size=2
    )

for layout in ("split", "packed", "strided"):
    for overlap in (False, True):
        CASES[f"{layout}_pools{'_overlap' if overlap else ''}"] = partial(
            make, [(7, 2), (4, 3), (2, 2)], overlap=overlap, layout=layout
        )

for kv_dtype in ("bf16", "fp32"):
    for state_dtype in ("bf16", "fp32"):
        for output_dtype in ("bf16", "fp32"):
            CASES[f"{kv_dtype}_to_{state_dtype}_to_{output_dtype}"] = partial(
                make,
                [(7, 2), (15, 1)],
                kv_dtype=kv_dtype,
                state_dtype=state_dtype,
                output_dtype=output_dtype,
                layout="strided",
            )


def case(build: Callable[[], Call]) -> Callable[[], Call]:
    CASES[build.__name__] = build
    return build


# Windows.


@case
def no_window_closes():
    return make([(0, 1), (4, 3), (9, 2)])


@case
def first_overlapping_window_has_none_before_it():
    return make([(0, 4), (3, 1), (2, 4)])


@case
def window_of_new_rows_alone():
    return make([(8, 4)], overlap=False)


@case
def many_windows_close():
    return make([(5, 8), (0, 7), (3, 1)], compress_ratio=2, next_n=8, page_size=3)


@case
def many_overlapping_windows_close():
    return make([(5, 8), (0, 7), (3, 1)], compress_ratio=2, overlap=True, next_n=8)


@case
def every_token_is_a_window():
    return make([(5, 3), (0, 2)], compress_ratio=1, page_size=2)


@case
def ratio_not_a_power_of_two():
    return make([(9, 3), (3, 3)], compress_ratio=5, next_n=3)


@case
def ratio_not_a_power_of_two_overlap():
    return make([(9, 3), (3, 3)], compress_ratio=5, overlap=True, next_n=3)


# Batches.


@case
def ragged_batch():
    return make([(7, 4), (3, 0), (12, 1), (0, 2), (5, 3)])


@case
def padding_requests():
    call = make([(7, 1), (0, 0), (6, 2), (0, 0), (0, 0)])
    call.kv_lens[3], call.kv_lens[4] = INT_MAX, INT_MIN  # without new tokens: ignored
    return call


@case
def empty_batch():
    return make([])


@case
def no_tokens_at_all():
    return make([(4, 0), (7, 0)])


@case
def more_output_rows_reserved_than_filled():
    return make([(7, 2), (4, 1), (3, 4)], reserve=3)


@case
def rollback_to_within_the_stored_rows():
    call = make([(11, 3)])
    call.kv_lens[0] = 9  # its rows from 6 on are stale; 6, 7 and 8 are written anew
    return call


# Absent rows.


def with_pages(spans, pages: dict[tuple[int, int], int], tables=("kv", "score"), **fields):
    call = make(spans, **fields)
    for name in tables:
        for at, page in pages.items():
            getattr(call, f"block_table_{name}")[at] = page
    return call


@case
def negative_page():
    return with_pages([(14, 3)], {(0, 1): -1, (0, 2): INT_MIN}, compress_ratio=8, page_size=3)


@case
def page_past_the_pool():
    call = make([(14, 3)], compress_ratio=8, page_size=3)
    call.block_table_kv[0, 2] = call.paged_kv.size(0)
    call.block_table_score[0, 4] = INT_MAX
    return call


@case
def row_absent_in_one_pool_is_absent_in_both():
    pages = {(0, 2): -1, (0, 5): -1}
    return with_pages([(13, 4)], pages, ("score",), compress_ratio=8, page_size=3)


@case
def new_row_absent():
    return with_pages([(13, 4)], {(0, 14): -1}, compress_ratio=8, page_size=1)


@case
def new_row_absent_holds_no_weight_whatever_it_is():
    call = with_pages([(13, 4)], {(0, 14): -1}, compress_ratio=8, page_size=1)
    call.kv_score[1] = torch.nan
    return call


@case
def no_row_present():
    return with_pages([(7, 1), (7, 1)], {(0, 0): -1, (0, 1): -9, (1, 1): 1000})


@case
def block_table_too_short():
    call = make([(14, 4)], compress_ratio=8, page_size=2)
    return replace(
        call,
        block_table_kv=call.block_table_kv[:, :7],
        block_table_score=call.block_table_score[:, :7],
    )


@case
def no_columns_in_the_block_table():
    call = make([(7, 2)])
    return replace(
        call,
        block_table_kv=call.block_table_kv[:, :0],
        block_table_score=call.block_table_score[:, :0],
    )


@case
def no_pages_in_the_pool():
    call = make([(7, 2)])
    return replace(call, paged_kv=call.paged_kv[:0], paged_score=call.paged_score[:0])


# Output rows out of bounds.


@case
def fewer_output_rows_reserved_than_windows():
    call = make([(1, 6), (3, 4)], compress_ratio=2, next_n=8)
    call.cu_outputs[1:] -= 1
    return call


@case
def fewer_output_rows_than_reserved():
    call = make([(1, 6), (3, 4)], compress_ratio=2, next_n=8)
    return replace(call, output=call.output[:4])


@case
def no_output_rows():
    call = make([(1, 6)], compress_ratio=2, next_n=8)
    return replace(call, output=call.output[:0])


@case
def negative_output_rows():
    call = make([(1, 6), (3, 4)], compress_ratio=2, next_n=8)
    call.cu_outputs[0] = -2  # the third of its windows has a row
    return call


@case
def output_rows_at_the_end_of_int32():
    call = make([(1, 6)], compress_ratio=2, next_n=8)
    call.cu_outputs[0], call.cu_outputs[1] = INT_MAX, INT_MAX
    return call


# Requests with impossible metadata are skipped. Each is in a batch with two that are valid.

ENDS = torch.tensor([INT_MAX, INT_MIN], dtype=torch.int32)


def beside(**ints: tuple) -> Call:
    """Three requests. An argument names a metadata tensor and gives (index, value) to set in it."""
    call = make([(7, 2), (6, 3), (3, 2)])
    for name, (at, value) in ints.items():
        getattr(call, name)[at] = value
    return call


CASES |= {
    "more_new_tokens_than_next_n": lambda: beside(cu_seq_lens=(2, 7)),
    "fewer_new_tokens_than_none": lambda: beside(cu_seq_lens=(1, 6)),
    "tokens_before_the_first": lambda: beside(cu_seq_lens=(0, -1)),
    "tokens_past_the_last": lambda: beside(cu_seq_lens=(3, 8)),
    "tokens_at_both_ends_of_int32": lambda: beside(cu_seq_lens=(1, INT_MAX)),
    "tokens_at_both_other_ends_of_int32": lambda: beside(cu_seq_lens=(1, INT_MIN)),
    "tokens_that_int32_counts_as_one": lambda: beside(cu_seq_lens=(slice(1, 3), ENDS)),
    "shorter_than_its_new_tokens": lambda: beside(kv_lens=(1, 2)),
    "negative_length": lambda: beside(kv_lens=(1, -5)),
    "smallest_length": lambda: beside(kv_lens=(1, INT_MIN)),
    "largest_length": lambda: beside(kv_lens=(1, INT_MAX)),
}


@case
def largest_length_with_odd_sizes():
    call = make([(7, 2)], compress_ratio=5, overlap=True, page_size=3)
    call.kv_lens[0] = INT_MAX - 2  # the end of a window of 5
    return call


# Counts of new tokens apart from cu_seq_lens.


@case
def rows_that_requests_do_not_use():
    call = make([(7, 3), (6, 3), (3, 2), (5, 1)]).without_last([2, 0, 1, 1])
    call.cu_seq_lens[-1] = INT_MIN  # says nothing
    return call


@case
def windows_that_unused_rows_would_close():
    return make([(127, 4), (126, 3), (255, 1)], compress_ratio=128).without_last([3, 2, 1])


def counted(**ints: tuple) -> Call:
    """As `beside`, with counts of new tokens."""
    call = make([(7, 2), (6, 3), (3, 2)]).without_last([1, 0, 0])
    for name, (at, value) in ints.items():
        getattr(call, name)[at] = value
    return call


CASES |= {
    "count_above_next_n": lambda: counted(new_tokens=(0, 5)),
    "count_below_none": lambda: counted(new_tokens=(1, -1)),
    "count_past_the_last_token": lambda: counted(new_tokens=(2, 3)),
    "count_above_the_length": lambda: counted(kv_lens=(1, 2)),
    "largest_count": lambda: counted(new_tokens=(1, INT_MAX)),
    "smallest_count": lambda: counted(new_tokens=(1, INT_MIN)),
    "count_from_the_end_of_int32": lambda: counted(cu_seq_lens=(1, INT_MAX)),
}


@case
def next_n_smaller_than_what_requests_have():
    return replace(make([(7, 2), (6, 3), (3, 1)]), next_n=2)


# Values.


def with_values(score=None, kv=None, rows=slice(None), **fields) -> Call:
    """One window of 8 rows, the last one new. score and kv are set in column 1 of these rows."""
    call = make([(7, 1)], compress_ratio=8, page_size=8, **fields)
    for value, pool, table in (
        (score, call.paged_score, call.block_table_score),
        (kv, call.paged_kv, call.block_table_kv),
    ):
        if value is not None:
            pool[table[0, 0], rows, 1] = value
    return call


FLT_MAX = torch.finfo(torch.float32).max
CASES |= {
    "score_minus_infinity": lambda: with_values(score=-torch.inf, rows=2),
    "score_plus_infinity": lambda: with_values(score=torch.inf, rows=2),
    "score_nan": lambda: with_values(score=torch.nan, rows=2),
    "score_largest": lambda: with_values(score=FLT_MAX, rows=2),
    "score_smallest": lambda: with_values(score=-FLT_MAX, rows=2),
    "kv_infinite": lambda: with_values(kv=torch.inf, rows=2),
    "kv_nan": lambda: with_values(kv=torch.nan, rows=2),
}


@case
def scores_of_both_extremes():
    return with_values(score=torch.tensor([FLT_MAX, -FLT_MAX, FLT_MAX, 1, 0, -1, FLT_MAX, 0]))


@case
def scores_all_minus_infinity():
    call = with_values(score=-torch.inf)
    call.kv_score[:, 16:] = -torch.inf
    return call


@case
def scores_minus_infinity_but_for_the_new_row():
    return with_values(score=-torch.inf)


@case
def kv_infinite_at_weight_zero():
    return with_values(score=-torch.inf, kv=torch.inf, rows=2)


@case
def new_row_is_infinite():
    call = with_values()
    call.kv_score[0, 1], call.kv_score[0, 2] = torch.inf, torch.nan
    call.kv_score[0, 17], call.kv_score[0, 18] = -torch.inf, torch.inf
    return call


@case
def state_rounds_to_infinity():
    call = make([(7, 1)], kv_dtype="fp32", state_dtype="bf16")
    call.kv_score.fill_(FLT_MAX)
    return call


@case
def large_scores():
    call = make([(7, 2), (14, 3)], compress_ratio=8)
    call.paged_score.mul_(100)
    return call


# Modes: the lines above with raw scores in the state, and with one of the two steps.

RAW_SCORE = (
    "mtp_overlap_hd128_n4",
    "mtp_r128_hd128_n4",
    "bf16_to_bf16_to_fp32",
    "fp32_to_bf16_to_fp32",
    "fp32_to_fp32_to_fp32",
    "packed_pools_overlap",
    "strided_pools",
    "first_overlapping_window_has_none_before_it",
    "many_overlapping_windows_close",
    "every_token_is_a_window",
    "ratio_not_a_power_of_two_overlap",
    "rollback_to_within_the_stored_rows",
    "negative_page",
    "new_row_absent_holds_no_weight_whatever_it_is",
    "no_row_present",
    "scores_of_both_extremes",
    "scores_all_minus_infinity",
    "score_nan",
    "new_row_is_infinite",
    "large_scores",
)
ONE_STEP = (
    "mtp_overlap_hd128_n4",
    "mtp_r128_hd128_n4",
    "bf16_to_bf16_to_fp32",
    "strided_pools_overlap",
    "many_windows_close",
    "ragged_batch",
    "padding_requests",
    "empty_batch",
    "more_output_rows_reserved_than_filled",
    "rollback_to_within_the_stored_rows",
    "negative_page",
    "new_row_absent_holds_no_weight_whatever_it_is",
    "no_row_present",
    "fewer_output_rows_reserved_than_windows",
    "no_output_rows",
    "more_new_tokens_than_next_n",
    "tokens_at_both_ends_of_int32",
    "largest_length",
)


def in_mode(name: str, mode: Mapping[str, object]) -> Call:
    """The call of a line above in another mode."""
    return replace(LINES[name](), **mode)


LINES = dict(CASES)
for name in RAW_SCORE:
    CASES[f"{name}__raw_score"] = partial(in_mode, name, {"ape_in_state": False})
for name in ONE_STEP:
    for work in ("store", "reduce"):
        CASES[f"{name}__{work}"] = partial(in_mode, name, {"work": work})
for name in ("mtp_overlap_hd128_n4", "mtp_r128_hd128_n4"):
    for work in ("store", "reduce"):
        mode = {"work": work, "ape_in_state": False}
        CASES[f"{name}__{work}_raw_score"] = partial(in_mode, name, mode)
