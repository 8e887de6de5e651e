"""The contract of prefill_compress as calls, and the comparison of a call with the oracle.

CASES maps the name of a line of the contract to a function that makes a call. It takes fields of
`make`, of which `head_dim` may be any. Every implementation runs each of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from numerics import assert_rows_close, assert_same_bits
from prefill_calls import Call, make
from state_calls import INT_MAX, INT_MIN, LAYOUTS
from torch import Tensor

CASES: dict[str, Callable[..., Call]] = {}


def assert_follows_contract(
    run: Callable[[Call], None], call: Call, expected: Mapping[str, Tensor] | None = None
) -> Call:
    """Runs a copy of the call and compares everything that it wrote with the oracle.

    The state must be the same bit by bit. So must output rows that the call does not write, and
    every byte outside the mutated tensors.

    Args:
        run: an implementation; it gets the copy.
        expected: call.expected(), for a call that several implementations run.

    Returns:
        the copy after the run.
    """
    expected = expected or call.expected()
    result = call.clone()
    run(result)
    for name in ("paged_kv", "paged_score"):
        assert_same_bits(getattr(result, name), expected[name], name)
    kv = torch.cat([x.cpu().double().flatten() for x in (call.paged_kv, call.kv_score)])
    scale = kv[kv.isfinite()].abs().max().item() if kv.isfinite().any() else 1.0
    assert_rows_close(result.output, expected["output"], scale, "output")
    before, after = call.output.cpu(), result.output.cpu()
    kept = expected["output"] == before.double()
    assert_same_bits(after[kept], before[kept], "output that the call does not write")
    for before, after in zip(call.outside(), result.outside(), strict=True):
        assert torch.equal(before, after), "bytes outside the mutated tensors changed"
    return result


def case(build: Callable[..., Call]) -> Callable[..., Call]:
    CASES[build.__name__] = build
    return build


# Every field of the problem and of the layout. The first request has old rows in its first window,
# the second begins with a window, the third closes none, the fourth has no token.
SPANS = [(6, 7), (8, 9), (1, 2), (5, 0), (11, 1)]

for overlap in (False, True):
    for ape_in_state in (False, True):
        for write_state in ("all", "tail"):
            suffix = f"{'_overlap' if overlap else ''}{'' if ape_in_state else '_raw_score'}"
            CASES[f"{write_state}{suffix}"] = partial(
                make,
                SPANS,
                overlap=overlap,
                ape_in_state=ape_in_state,
                write_state=write_state,
                max_rollback=3,
                state_period=6,
            )

for kv_dtype in ("bf16", "fp32"):
    for state_dtype in ("bf16", "fp32"):
        for ape_in_state in (False, True):
            suffix = "" if ape_in_state else "_raw_score"
            CASES[f"{kv_dtype}_to_{state_dtype}{suffix}"] = partial(
                make,
                SPANS,
                kv_dtype=kv_dtype,
                state_dtype=state_dtype,
                output_dtype="fp32" if kv_dtype == "bf16" else "bf16",
                ape_in_state=ape_in_state,
                layout="strided",
            )

for page_size in (1, 3, 7, 16, 100):
    for write_state in ("all", "tail"):
        CASES[f"{write_state}_page_size_{page_size}"] = partial(
            make, [(14, 3), (7, 20)], page_size=page_size, write_state=write_state, state_period=5
        )

for layout in LAYOUTS:
    CASES[f"{layout}_pools"] = partial(make, SPANS, layout=layout)

for work in ("store", "reduce"):
    for write_state in ("all", "tail"):
        CASES[f"{work}_{write_state}"] = partial(make, SPANS, work=work, write_state=write_state)

for ratio in (1, 2, 5, 8, 16, 128):
    for overlap in (False, True) if ratio <= 8 else (False,):
        CASES[f"ratio_{ratio}{'_overlap' if overlap else ''}"] = partial(
            make,
            [(ratio + 1, 2 * ratio - 1), (0, ratio)],
            compress_ratio=ratio,
            overlap=overlap,
        )

for rollback in (0, 1, 4, 7, 8, 9, 100, INT_MAX):
    CASES[f"tail_after_rollback_{rollback}"] = partial(
        make, [(3, 10), (0, 12), (6, 1)], write_state="tail", max_rollback=rollback
    )

for period in (1, 2, 4, 6, 8, 11, 17, INT_MAX):
    CASES[f"tail_with_restarts_each_{period}"] = partial(
        make, [(3, 14), (11, 9)], write_state="tail", state_period=period
    )


# Batches.


@case
def many_requests_of_few_tokens(**fields):
    return make([(b % 9, b % 4) for b in range(60)], **fields)


@case
def one_token_each(**fields):
    return make([(b, 1) for b in range(20)], **fields)


@case
def requests_without_tokens_of_any_length(**fields):
    call = make([(7, 1), (0, 0), (6, 2), (0, 0), (0, 0)], **fields)
    call.kv_lens[3], call.kv_lens[4] = INT_MAX, INT_MIN
    return call


@case
def empty_batch(**fields):
    return make([], **fields)


@case
def tokens_of_no_request(**fields):
    call = make([(7, 9)], **fields)
    return replace(
        call,
        block_table_kv=call.block_table_kv[:0],
        block_table_score=call.block_table_score[:0],
        kv_lens=call.kv_lens[:0],
        cu_seq_lens=call.cu_seq_lens[:1],
        cu_outputs=call.cu_outputs[:1],
    )


@case
def tokens_between_requests(**fields):
    call = make([(7, 9), (2, 5), (6, 7)], **fields)
    call.kv_lens[1] = 3  # fewer than its new tokens
    return call


@case
def more_output_rows_reserved_than_filled(**fields):
    return make([(7, 12), (4, 1), (3, 14)], reserve=5, **fields)


@case
def rollback_to_within_the_stored_rows(**fields):
    call = make([(11, 3)], **fields)
    call.kv_lens[0] = 9  # its rows from 6 on are stale; 6, 7 and 8 are written anew
    return call


# Absent rows.


def with_pages(spans, pages: dict, tables=("kv", "score"), **fields) -> Call:
    call = make(spans, **fields)
    for name in tables:
        for at, page in pages.items():
            getattr(call, f"block_table_{name}")[at] = page
    return call


# Of page size 3, pages 1 and 2 have old rows, 5 and 6 new ones of a whole window, 8 and later the
# tail.
for write_state in ("all", "tail"):
    for name, tables in {"both": ("kv", "score"), "kv": ("kv",), "score": ("score",)}.items():
        CASES[f"{write_state}_absent_in_{name}"] = partial(
            with_pages,
            [(7, 20)],
            {(0, 1): -1, (0, 5): INT_MIN, (0, 6): 10_000, (0, 8): INT_MAX},
            tables,
            page_size=3,
            write_state=write_state,
        )
        CASES[f"{write_state}_absent_in_{name}_long_window"] = partial(
            with_pages,
            [(10, 60)],
            {(0, 1): -1, (0, 3): -1, (0, 7): INT_MIN, (0, 22): INT_MAX},
            tables,
            compress_ratio=16,
            page_size=3,
            write_state=write_state,
        )


@case
def no_page_at_all(**fields):
    return with_pages([(7, 10)], {0: -1}, **fields)


@case
def no_page_at_all_and_few_needed(**fields):
    return with_pages([(7, 10)], {0: -1}, write_state="tail", **fields)


@case
def absent_row_holds_no_weight_whatever_it_is(**fields):
    call = with_pages([(8, 8)], {(0, 9): -1}, page_size=1, **fields)
    call.kv_score[1] = torch.nan
    return call


@case
def row_that_is_not_stored_counts_without_a_page(**fields):
    return with_pages([(0, 17)], {(0, 9): -1}, page_size=1, write_state="tail", **fields)


@case
def block_table_too_short(**fields):
    call = make([(14, 24), (0, 20)], compress_ratio=8, page_size=2, **fields)
    return replace(
        call,
        block_table_kv=call.block_table_kv[:, :11],
        block_table_score=call.block_table_score[:, :11],
    )


@case
def block_table_too_short_for_rows_that_are_not_stored(**fields):
    call = block_table_too_short(**fields)
    return replace(call, write_state="tail")


@case
def no_columns_in_the_block_table(**fields):
    call = make([(7, 12)], **fields)
    return replace(
        call,
        block_table_kv=call.block_table_kv[:, :0],
        block_table_score=call.block_table_score[:, :0],
    )


@case
def no_pages_in_the_pool(**fields):
    call = make([(7, 12)], write_state="tail", **fields)
    return replace(call, paged_kv=call.paged_kv[:0], paged_score=call.paged_score[:0])


# Output rows out of bounds.


def with_outputs(num_outputs: int | None = None, rows: dict | None = None, **fields) -> Call:
    """Requests of 4 and 3 windows. rows: index of cu_outputs -> its value."""
    call = make([(1, 16), (3, 12)], **fields)
    for index, row in (rows or {}).items():
        call.cu_outputs[index] = row
    return replace(call, output=call.output[:num_outputs])


CASES |= {
    "fewer_output_rows_reserved_than_windows": partial(with_outputs, rows={1: 3, 2: 5}),
    "fewer_output_rows_than_reserved": partial(with_outputs, 5),
    "no_output_rows": partial(with_outputs, 0),
    "negative_output_rows": partial(with_outputs, rows={0: -2, 1: 3, 2: 6}),
    "output_rows_from_the_start_of_int32": partial(with_outputs, rows={0: INT_MIN}),
    "output_rows_at_the_end_of_int32": partial(with_outputs, rows={1: INT_MAX, 2: INT_MAX}),
    "output_rows_that_end_before_they_begin": partial(with_outputs, rows={0: 7, 1: 2}),
}


# Requests with impossible metadata are skipped. Each is in a batch with two that are valid.

ENDS = torch.tensor([INT_MAX, INT_MIN], dtype=torch.int32)


def beside(spoiled: dict, **fields) -> Call:
    """Three requests. spoiled: metadata tensor -> (index, value) to set in it."""
    call = make([(7, 5), (6, 7), (3, 7)], reserve=8, **fields)
    for name, (at, value) in spoiled.items():
        getattr(call, name)[at] = value
    return call


for name, spoiled in {
    "request_that_has_rows_of_the_next": {"cu_seq_lens": (2, 16)},
    "fewer_new_tokens_than_none": {"cu_seq_lens": (1, 13)},
    "tokens_before_the_first": {"cu_seq_lens": (0, -1)},
    "tokens_past_the_last": {"cu_seq_lens": (3, 20)},
    "tokens_at_one_end_of_int32": {"cu_seq_lens": (1, INT_MAX)},
    "tokens_at_the_other_end_of_int32": {"cu_seq_lens": (1, INT_MIN)},
    "tokens_that_int32_counts_as_one": {"cu_seq_lens": (slice(1, 3), ENDS)},
    "shorter_than_its_new_tokens": {"kv_lens": (1, 6)},
    "as_long_as_its_new_tokens": {"kv_lens": (1, 7)},
    "negative_length": {"kv_lens": (1, -5)},
    "smallest_length": {"kv_lens": (1, INT_MIN)},
    "largest_length": {"kv_lens": (1, INT_MAX)},
}.items():
    CASES[name] = partial(beside, spoiled)


@case
def rows_of_kv_score_of_two_requests(**fields):
    call = make([(7, 9), (2, 6), (6, 10)], reserve=8, **fields)
    call.cu_seq_lens.copy_(torch.tensor([0, 20, 3, 25]))
    call.kv_lens.copy_(torch.tensor([20, 8, 25]))
    return call


@case
def largest_length_with_odd_sizes(**fields):
    call = make(
        [(7, 12)], compress_ratio=5, overlap=True, page_size=3, write_state="tail", **fields
    )
    call.kv_lens[0] = INT_MAX - 2  # the end of a window of 5
    return replace(call, state_period=7, max_rollback=2)


# Values.


def with_values(score=None, kv=None, rows=slice(None), **fields) -> Call:
    """Windows of 8 rows, one of them old and one new. score and kv are set in column 1 of rows."""
    call = make([(6, 10)], compress_ratio=8, page_size=8, **fields)
    for value, pool, table, column in (
        (score, call.paged_score, call.block_table_score, call.paged_kv.size(2) + 1),
        (kv, call.paged_kv, call.block_table_kv, 1),
    ):
        if value is not None:
            pool[table[0, 0], rows, 1] = value
            call.kv_score[rows, column] = value
    return call


FLT_MAX = torch.finfo(torch.float32).max
CASES |= {
    "score_minus_infinity": partial(with_values, score=-torch.inf, rows=2),
    "score_plus_infinity": partial(with_values, score=torch.inf, rows=2),
    "score_nan": partial(with_values, score=torch.nan, rows=2),
    "score_largest": partial(with_values, score=FLT_MAX, rows=2, kv_dtype="fp32"),
    "score_smallest": partial(with_values, score=-FLT_MAX, rows=2, kv_dtype="fp32"),
    "kv_infinite": partial(with_values, kv=torch.inf, rows=2),
    "kv_nan": partial(with_values, kv=torch.nan, rows=2),
    "scores_all_minus_infinity": partial(with_values, score=-torch.inf),
    "kv_infinite_at_weight_zero": partial(with_values, score=-torch.inf, kv=torch.inf, rows=2),
}


@case
def state_rounds_to_infinity(**fields):
    call = make([(7, 9)], kv_dtype="fp32", state_dtype="bf16", write_state="tail", **fields)
    call.kv_score.fill_(FLT_MAX)
    return call


@case
def large_scores(**fields):
    call = make([(7, 30)], compress_ratio=8, **fields)
    call.kv_score[:, call.paged_kv.size(2) :].mul_(100)
    return call
