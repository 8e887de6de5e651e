"""The reference against the oracle, and both against results computed here by hand."""

from dataclasses import replace

import pytest
import torch
from calls import MUTATED, Call, make, random_call
from contract import CASES, assert_follows_contract, oracle, with_values
from mode_relations import RELATIONS
from numerics import assert_same_bits
from rings import RINGS, decoding, each

from kvfold.ops import state_reference
from kvfold.ops.paged_kv_compress import reference


def run_oracle(call: Call) -> None:
    """The oracle as an implementation."""
    for name, expected in oracle(call).items():
        getattr(call, name).copy_(expected)


@pytest.fixture(params=[reference.run, run_oracle], ids=["reference", "oracle"])
def run(request):
    """run(call) -> a copy of the call after it ran."""

    def run(call: Call) -> Call:
        result = call.clone()
        request.param(result)
        return result

    return run


def row(pool: torch.Tensor, table: torch.Tensor, position: int, request: int = 0) -> torch.Tensor:
    """The state's row at a request's position."""
    page_size = pool.size(1)
    return pool[table[request, position // page_size], position % page_size]


def rows(call: Call, positions, request: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """KV and score of a request's positions, in float64."""
    kv = [row(call.paged_kv, call.block_table_kv, p, request) for p in positions]
    score = [row(call.paged_score, call.block_table_score, p, request) for p in positions]
    return torch.stack(kv).double(), torch.stack(score).double()


def compress(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return (kv * torch.softmax(score, 0)).sum(0)


# Against the oracle.


@pytest.mark.parametrize("name", CASES)
def test_the_reference_follows_the_contract(name):
    assert_follows_contract(reference.run, CASES[name]())


@pytest.mark.parametrize("seed", range(100))
def test_the_reference_runs_random_calls(seed):
    assert_follows_contract(reference.run, random_call(seed))


@pytest.mark.parametrize("share", [0.03, 0.2, 1])
@pytest.mark.parametrize("seed", range(40))
def test_the_reference_is_safe_for_any_metadata(seed, share):
    assert_follows_contract(reference.run, random_call(seed, reserve=8).scrambled(share, seed))


@pytest.mark.parametrize("name", RELATIONS)
def test_modes_agree_to_the_bit(name):
    RELATIONS[name](reference.run, "cpu")


@pytest.mark.parametrize("kind", RINGS, ids=str)
def test_a_ring_gives_the_bits_of_a_state_without_bound(kind):
    decoding(kind, steps=200).compare(each(reference.run))


@pytest.mark.gpu
def test_the_reference_follows_the_contract_on_a_gpu():
    for build in CASES.values():
        assert_follows_contract(reference.run, build().clone("cuda"))


# By hand: store.


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("state_dtype", ["bf16", "fp32"])
def test_a_state_without_ape_holds_kv_and_score_as_they_are(run, kv_dtype, state_dtype):
    call = make(
        [(6, 3)], compress_ratio=8, kv_dtype=kv_dtype, state_dtype=state_dtype, ape_in_state=False
    )
    result = run(call)
    for t, token in enumerate(call.kv_score):
        kv = row(result.paged_kv, call.block_table_kv, 6 + t)
        score = row(result.paged_score, call.block_table_score, 6 + t)
        assert_same_bits(kv, token[:16].to(kv.dtype))
        assert_same_bits(score, token[16:].to(kv.dtype))


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("state_dtype", ["bf16", "fp32"])
def test_stores_kv_and_score_plus_ape_rounded_to_the_state(run, kv_dtype, state_dtype):
    call = make([(6, 3)], compress_ratio=8, kv_dtype=kv_dtype, state_dtype=state_dtype)
    result = run(call)
    for t, token in enumerate(call.kv_score):
        kv = row(result.paged_kv, call.block_table_kv, 6 + t)
        score = row(result.paged_score, call.block_table_score, 6 + t)
        assert_same_bits(kv, token[:16].to(kv.dtype))
        assert_same_bits(score, (token[16:].float() + call.ape[(6 + t) % 8]).to(kv.dtype))


def test_writes_new_rows_alone(run):
    call = make([(6, 1), (2, 0)], layout="packed")
    result = run(call)
    new = call.block_table_kv[0, 1], 2
    for before, after in (
        (call.paged_kv, result.paged_kv),
        (call.paged_score, result.paged_score),
    ):
        before[new] = after[new]
        assert_same_bits(after, before)
    assert_same_bits(result.output, call.output)


# By hand: count and reduce.


def test_window_is_a_softmax_over_its_rows(run):
    result = run(make([(14, 3)], compress_ratio=8, output_dtype="fp32"))
    expected = compress(*rows(result, range(8, 16)))
    torch.testing.assert_close(result.output[0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("work", ["all", "reduce"])
def test_ape_is_added_in_fp32_to_the_rounded_scores_of_a_state_without_it(run, work):
    """New rows, which the state may not hold yet, have the score that it will hold."""
    call = make(
        [(14, 3)], compress_ratio=8, state_dtype="bf16", kv_dtype="fp32", ape_in_state=False,
        work=work,
    )  # fmt: skip
    kv, score = rows(call, range(8, 14))
    new_kv, new_score = call.kv_score[:2].bfloat16().double().split(16, dim=1)
    score = torch.cat([score, new_score]).float() + call.ape
    expected = compress(torch.cat([kv, new_kv]), score.double())
    torch.testing.assert_close(run(call).output[0].double(), expected, atol=1e-5, rtol=0)


def test_overlapping_window_takes_half_of_the_columns_of_each(run):
    result = run(make([(6, 3)], output_dtype="fp32"))
    (kv0, score0), (kv1, score1) = rows(result, range(0, 4)), rows(result, range(4, 8))
    kv = torch.cat([kv0[:, :16], kv1[:, 16:]])
    score = torch.cat([score0[:, :16], score1[:, 16:]])
    expected = compress(kv, score)
    torch.testing.assert_close(result.output[0].double(), expected, atol=1e-5, rtol=0)


def test_first_overlapping_window_has_none_before_it(run):
    result = run(make([(2, 3)], output_dtype="fp32"))
    kv, score = rows(result, range(0, 4))
    expected = compress(kv[:, 16:], score[:, 16:])
    torch.testing.assert_close(result.output[0].double(), expected, atol=1e-5, rtol=0)


def test_window_of_one_row_is_that_row(run):
    call = make([(9, 3), (0, 2)], compress_ratio=1)
    assert_same_bits(run(call).output, call.kv_score[:, :16])


@pytest.mark.parametrize(
    ("start", "new", "closed"), [(0, 3, 0), (0, 4, 1), (3, 1, 1), (4, 3, 0), (5, 7, 2), (3, 9, 3)]
)
def test_counts_the_windows_that_close(run, start, new, closed):
    call = make([(start, new)], next_n=9, reserve=4)
    result = run(call)
    written = (result.output != call.output).all(1)
    assert written.tolist() == [True] * closed + [False] * (4 - closed)


# By hand: one step.


def test_store_alone_writes_rows_and_no_output(run):
    call = make([(6, 3), (0, 4)])
    result, both = run(replace(call, work="store")), run(call)
    assert_same_bits(result.paged_kv, both.paged_kv)
    assert_same_bits(result.paged_score, both.paged_score)
    assert_same_bits(result.output, call.output)


def test_reduce_alone_writes_output_and_no_row(run):
    call = make([(6, 3), (0, 4)])
    result, both = run(replace(call, work="reduce")), run(call)
    assert_same_bits(result.paged_kv, call.paged_kv)
    assert_same_bits(result.paged_score, call.paged_score)
    assert_same_bits(result.output, both.output)


# By hand: values that are not numbers. The column is 1; 7 of the window's 8 rows are stored.


@pytest.mark.parametrize(
    ("score", "kv", "at", "nan"),
    [
        (-torch.inf, None, 2, False),
        (-torch.inf, torch.inf, 2, True),
        (torch.inf, None, 2, True),
        (torch.nan, None, 2, True),
        (None, torch.nan, 2, True),
        (-torch.inf, None, slice(None), False),
    ],
    ids=["-inf", "-inf_times_inf", "+inf", "nan", "kv_nan", "-inf_but_one"],
)
def test_softmax_of_infinities_and_nan(run, score, kv, at, nan):
    result = run(with_values(score, kv, at, output_dtype="fp32"))
    expected = compress(*rows(result, range(8)))
    assert expected[1].isnan() == nan
    torch.testing.assert_close(
        result.output[0].double(), expected, atol=1e-5, rtol=0, equal_nan=True
    )


def test_all_scores_minus_infinity_is_nan(run):
    assert run(CASES["scores_all_minus_infinity"]()).output[0, 1].isnan()


def test_largest_score_takes_all_the_weight(run):
    largest = torch.finfo(torch.float32).max
    call = with_values(score=-largest)
    call.paged_score[call.block_table_score[0, 0], 4, 1] = largest
    expected = call.paged_kv[call.block_table_kv[0, 0], 4, 1]
    assert run(call).output[0, 1] == expected.bfloat16()


# By hand: absent rows and bounds.


def test_window_without_rows_is_zeros(run):
    call = make([(7, 1)], page_size=4)
    call.block_table_score[0] = -1
    assert run(call).output.tolist() == [[0] * 16]


@pytest.mark.parametrize("table", ["block_table_kv", "block_table_score"])
@pytest.mark.parametrize("page", [-1, -(2**31), "first past the pool", 2**31 - 1])
def test_row_is_absent_unless_both_its_pages_are_in_the_pool(run, table, page):
    call = make([(7, 1)], compress_ratio=8, page_size=2, output_dtype="fp32")
    page = call.paged_kv.size(0) if isinstance(page, str) else page
    getattr(call, table)[0, 3] = page  # rows 6 and 7, the last being new
    result = run(call)
    assert_same_bits(result.paged_kv, call.paged_kv)
    assert_same_bits(result.paged_score, call.paged_score)
    expected = compress(*rows(call, range(6)))
    torch.testing.assert_close(result.output[0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("cu_outputs", "written"),
    [
        ([0, 3], [0, 1, 2]),
        ([0, 2], [0, 1]),
        ([0, 0], []),
        ([1, 9], [1, 2]),
        ([-2, 3], [0]),
        ([-(2**31), 3], []),
        ([2**31 - 1, 2**31 - 1], []),
        ([3, 9], []),
    ],
)
def test_writes_no_output_row_but_those_reserved(run, cu_outputs, written):
    call = make([(1, 6)], compress_ratio=2, next_n=6)
    call.cu_outputs.copy_(torch.tensor(cu_outputs))
    result = run(call)
    changed = (result.output != call.output).any(1)
    assert changed.nonzero().flatten().tolist() == written


@pytest.mark.parametrize(
    "broken",
    [
        {"cu_seq_lens": (2, 7)},
        {"cu_seq_lens": (2, 1)},
        {"cu_seq_lens": (1, -1)},
        {"cu_seq_lens": (2, 2**31 - 1)},
        {"kv_lens": (1, 2)},
        {"kv_lens": (1, -(2**31))},
    ],
    ids=str,
)
def test_a_request_with_impossible_metadata_is_skipped(run, broken):
    call = make([(7, 2), (5, 3)])
    for name, (at, value) in broken.items():
        getattr(call, name)[at] = value
    result = run(call)
    kv, score = (x.unique().long() for x in (call.block_table_kv[1], call.block_table_score[1]))
    assert_same_bits(result.paged_kv[kv], call.paged_kv[kv])
    assert_same_bits(result.paged_score[score], call.paged_score[score])
    assert_same_bits(result.output[1], call.output[1])


# By hand: several steps.


def decode(run, steps: list[int], kv_score: torch.Tensor, keep=lambda step, new: new) -> Call:
    """Decodes one request in steps of these sizes; keep gives the accepted tokens of a step."""
    call = make([(0, 0)], next_n=max(steps), page_size=3, reserve=8, output_dtype="fp32")
    pages = torch.arange(20, dtype=torch.int32)[None]
    pool = torch.full((20, 3, 32), torch.nan)
    call = replace(
        call,
        paged_kv=pool,
        paged_score=pool.clone(),
        block_table_kv=pages,
        block_table_score=pages.flip(1).contiguous(),
    )
    length = windows = 0
    for step, new in enumerate(steps):
        tokens = kv_score[length : length + new]
        kept = keep(step, new)
        if kept < new:  # rejected tokens differ from the request's own
            tokens = torch.cat([tokens[:kept], -7 * tokens[kept:]])
        call = run(
            replace(
                call,
                kv_score=tokens,
                kv_lens=torch.tensor([length + new], dtype=torch.int32),
                cu_seq_lens=torch.tensor([0, new], dtype=torch.int32),
                cu_outputs=torch.tensor([windows, 8], dtype=torch.int32),
            )
        )
        length += kept
        windows = length // call.compress_ratio
    return call


@pytest.mark.parametrize("steps", [[4] * 6, [1, 3, 2, 4, 4, 1, 4, 3, 2], [24]], ids=str)
def test_steps_of_any_size_end_with_the_same_bits(run, steps):
    kv_score = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    one_by_one = decode(run, [1] * 24, kv_score)
    result = decode(run, steps, kv_score)
    assert_same_bits(result.paged_kv, one_by_one.paged_kv)
    assert_same_bits(result.paged_score, one_by_one.paged_score)
    assert_same_bits(result.output, one_by_one.output)


def test_rejected_tokens_do_not_change_later_results(run):
    kv_score = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    expected = decode(run, [1] * 22, kv_score)
    steps, accepted = [4] * 10, [2, 4, 1, 3, 1, 2, 4, 1, 3, 1]
    result = decode(run, steps, kv_score, keep=lambda step, new: accepted[step])
    positions = range(22)
    for actual, wanted in zip(rows(result, positions), rows(expected, positions), strict=True):
        assert torch.equal(actual, wanted)
    assert_same_bits(result.output[:5], expected.output[:5])


# What the result does not depend on.


def test_result_does_not_depend_on_the_batch():
    spans = [(7, 4), (13, 3), (6, 2), (3, 4), (15, 1)]
    call = make(spans, head_dim=24, state_dtype="bf16", output_dtype="fp32")
    together = call.clone()
    reference.run(together)
    for b in range(len(spans)):
        alone = call.clone().alone(b)
        reference.run(alone)
        assert_same_bits(alone.output[b], together.output[b])


def test_result_does_not_depend_on_the_chunks(monkeypatch):
    call = make([(5, 7), (12, 8), (0, 4)], next_n=8, output_dtype="fp32")
    whole, chunked = call.clone(), call.clone()
    reference.run(whole)
    monkeypatch.setattr(state_reference, "CHUNK", 1)
    reference.run(chunked)
    assert_same_bits(chunked.output, whole.output)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_result_does_not_depend_on_the_default_dtype(dtype):
    call = make([(5, 4), (12, 2), (0, 4), (7, 1)], output_dtype="fp32")
    expected, result = call.clone(), call.clone()
    reference.run(expected)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        reference.run(result)
    finally:
        torch.set_default_dtype(before)
    for name in MUTATED:
        assert_same_bits(getattr(result, name), getattr(expected, name), name)
