"""The contract's lines as problems: CASES, name -> function that makes one.

Each is to be run against the oracle, by every implementation.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from problems import INT_MAX, INT_MIN, Problem, make

CASES: dict[str, Callable[[], Problem]] = {}

# The multi-token prediction cases, at their real sizes.
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

for page_size in (1, 3, 7, 16, 32, 100):
    CASES[f"page_size_{page_size}"] = partial(
        make, [(14, 3), (7, 2)], compress_ratio=8, page_size=page_size
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


def case(build: Callable[[], Problem]) -> Callable[[], Problem]:
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
    problem = make([(7, 1), (0, 0), (6, 2), (0, 0), (0, 0)])
    problem.kv_lens[3], problem.kv_lens[4] = INT_MAX, INT_MIN  # no new tokens: length is idle
    return problem


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
    problem = make([(11, 3)])
    problem.kv_lens[0] = 9  # its rows from 6 on are stale; 6, 7 and 8 are written anew
    return problem


# Absent rows.


def with_pages(spans, pages: dict[tuple[int, int], int], tables=("kv", "score"), **fields):
    problem = make(spans, **fields)
    for name in tables:
        for at, page in pages.items():
            getattr(problem, f"block_table_{name}")[at] = page
    return problem


@case
def negative_page():
    return with_pages([(14, 3)], {(0, 1): -1, (0, 2): INT_MIN}, compress_ratio=8, page_size=3)


@case
def page_past_the_pool():
    problem = make([(14, 3)], compress_ratio=8, page_size=3)
    problem.block_table_kv[0, 2] = problem.paged_kv.size(0)
    problem.block_table_score[0, 4] = INT_MAX
    return problem


@case
def row_absent_in_one_pool_is_absent_in_both():
    pages = {(0, 2): -1, (0, 5): -1}
    return with_pages([(13, 4)], pages, ("score",), compress_ratio=8, page_size=3)


@case
def new_row_absent():
    return with_pages([(13, 4)], {(0, 14): -1}, compress_ratio=8, page_size=1)


@case
def new_row_absent_holds_no_weight_whatever_it_is():
    problem = with_pages([(13, 4)], {(0, 14): -1}, compress_ratio=8, page_size=1)
    problem.kv_score[1] = torch.nan
    return problem


@case
def no_row_present():
    return with_pages([(7, 1), (7, 1)], {(0, 0): -1, (0, 1): -9, (1, 1): 1000})


@case
def block_table_too_short():
    problem = make([(14, 4)], compress_ratio=8, page_size=2)
    return replace(
        problem,
        block_table_kv=problem.block_table_kv[:, :7],
        block_table_score=problem.block_table_score[:, :7],
    )


@case
def no_columns_in_the_block_table():
    problem = make([(7, 2)])
    return replace(
        problem,
        block_table_kv=problem.block_table_kv[:, :0],
        block_table_score=problem.block_table_score[:, :0],
    )


@case
def no_pages_in_the_pool():
    problem = make([(7, 2)])
    return replace(problem, paged_kv=problem.paged_kv[:0], paged_score=problem.paged_score[:0])


# Output rows out of bounds.


@case
def fewer_output_rows_reserved_than_windows():
    problem = make([(1, 6), (3, 4)], compress_ratio=2, next_n=8)
    problem.cu_outputs[1:] -= 1
    return problem


@case
def fewer_output_rows_than_reserved():
    problem = make([(1, 6), (3, 4)], compress_ratio=2, next_n=8)
    return replace(problem, output=problem.output[:4])


@case
def no_output_rows():
    problem = make([(1, 6)], compress_ratio=2, next_n=8)
    return replace(problem, output=problem.output[:0])


@case
def negative_output_rows():
    problem = make([(1, 6), (3, 4)], compress_ratio=2, next_n=8)
    problem.cu_outputs[0] = -2  # the third of its windows has a row
    return problem


@case
def output_rows_at_the_end_of_int32():
    problem = make([(1, 6)], compress_ratio=2, next_n=8)
    problem.cu_outputs[0], problem.cu_outputs[1] = INT_MAX, INT_MAX
    return problem


# Requests that make no sense are skipped: two sound ones stand beside each.


ENDS = torch.tensor([INT_MAX, INT_MIN], dtype=torch.int32)


def beside(**ints: tuple) -> Problem:
    """Three requests with, in the metadata tensors named, the value given at the index given."""
    problem = make([(7, 2), (6, 3), (3, 2)])
    for name, (at, value) in ints.items():
        getattr(problem, name)[at] = value
    return problem


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
    problem = make([(7, 2)], compress_ratio=5, overlap=True, page_size=3)
    problem.kv_lens[0] = INT_MAX - 2  # the end of a window of 5
    return problem


@case
def next_n_smaller_than_what_requests_have():
    return replace(make([(7, 2), (6, 3), (3, 1)]), next_n=2)


# Values.


def with_values(score=None, kv=None, rows=slice(None), **fields) -> Problem:
    """One window of 8 whose last row is new, with the given state in these rows, column 1."""
    problem = make([(7, 1)], compress_ratio=8, page_size=8, **fields)
    for value, pool, table in (
        (score, problem.paged_score, problem.block_table_score),
        (kv, problem.paged_kv, problem.block_table_kv),
    ):
        if value is not None:
            pool[table[0, 0], rows, 1] = value
    return problem


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
    problem = with_values(score=-torch.inf)
    problem.kv_score[:, 16:] = -torch.inf
    return problem


@case
def scores_minus_infinity_but_for_the_new_row():
    return with_values(score=-torch.inf)


@case
def kv_infinite_at_weight_zero():
    return with_values(score=-torch.inf, kv=torch.inf, rows=2)


@case
def new_row_is_infinite():
    problem = with_values()
    problem.kv_score[0, 1], problem.kv_score[0, 2] = torch.inf, torch.nan
    problem.kv_score[0, 17], problem.kv_score[0, 18] = -torch.inf, torch.inf
    return problem


@case
def state_rounds_to_infinity():
    problem = make([(7, 1)], kv_dtype="fp32", state_dtype="bf16")
    problem.kv_score.fill_(FLT_MAX)
    return problem


@case
def large_scores():
    problem = make([(7, 2), (14, 3)], compress_ratio=8)
    problem.paged_score.mul_(100)
    return problem
