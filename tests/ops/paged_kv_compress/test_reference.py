"""The reference against the oracle, and both against results worked out here by hand."""

from dataclasses import replace

import pytest
import torch
from contract import CASES, with_values
from numerics import assert_does_its_job, assert_same_bits
from problems import Problem, make, random_problem, scramble

from kvfold.bench import oracle
from kvfold.ops.paged_kv_compress import reference


def oracle_call(*args) -> None:
    """The oracle as an implementation."""
    problem = Problem(*args)
    mutated = (problem.paged_kv, problem.paged_score, problem.output)
    for x, expected in zip(mutated, oracle.expected(*args), strict=True):
        x.copy_(expected)


@pytest.fixture(params=[reference.paged_kv_compress, oracle_call], ids=["reference", "oracle"])
def run(request):
    """run(problem) -> the problem after the call; the one given stays as it was."""

    def run(problem: Problem) -> Problem:
        result = problem.clone()
        request.param(*result.args())
        return result

    return run


def row(pool: torch.Tensor, table: torch.Tensor, position: int, request: int = 0) -> torch.Tensor:
    """The state's row at a request's position."""
    page_size = pool.size(1)
    return pool[table[request, position // page_size], position % page_size]


def rows(problem: Problem, positions, request: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """KV and score of a request's positions, in float64."""
    kv = [row(problem.paged_kv, problem.block_table_kv, p, request) for p in positions]
    score = [row(problem.paged_score, problem.block_table_score, p, request) for p in positions]
    return torch.stack(kv).double(), torch.stack(score).double()


def compress(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return (kv * torch.softmax(score, 0)).sum(0)


# Against the oracle.


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    assert_does_its_job(reference.paged_kv_compress, CASES[name]())


@pytest.mark.parametrize("seed", range(100))
def test_random_problem(seed):
    assert_does_its_job(reference.paged_kv_compress, random_problem(seed))


@pytest.mark.parametrize("share", [0.03, 0.2, 1])
@pytest.mark.parametrize("seed", range(40))
def test_scrambled_metadata(seed, share):
    problem = scramble(random_problem(seed, reserve=8), share, seed)
    assert_does_its_job(reference.paged_kv_compress, problem)


@pytest.mark.gpu
def test_contract_on_a_gpu():
    for build in CASES.values():
        assert_does_its_job(reference.paged_kv_compress, build().clone("cuda"))


# By hand: store.


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("state_dtype", ["bf16", "fp32"])
def test_stores_kv_and_score_plus_ape_rounded_to_the_state(run, kv_dtype, state_dtype):
    problem = make([(6, 3)], compress_ratio=8, kv_dtype=kv_dtype, state_dtype=state_dtype)
    result = run(problem)
    for t, token in enumerate(problem.kv_score):
        kv = row(result.paged_kv, problem.block_table_kv, 6 + t)
        score = row(result.paged_score, problem.block_table_score, 6 + t)
        assert_same_bits(kv, token[:16].to(kv.dtype))
        assert_same_bits(score, (token[16:].float() + problem.ape[(6 + t) % 8]).to(kv.dtype))


def test_writes_new_rows_alone(run):
    problem = make([(6, 1), (2, 0)], layout="packed")
    result = run(problem)
    new = problem.block_table_kv[0, 1], 2
    for before, after in (
        (problem.paged_kv, result.paged_kv),
        (problem.paged_score, result.paged_score),
    ):
        before[new] = after[new]
        assert_same_bits(after, before)
    assert_same_bits(result.output, problem.output)


# By hand: count and reduce.


def test_window_is_a_softmax_over_its_rows(run):
    result = run(make([(14, 3)], compress_ratio=8, output_dtype="fp32"))
    expected = compress(*rows(result, range(8, 16)))
    torch.testing.assert_close(result.output[0].double(), expected, atol=1e-5, rtol=0)


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
    problem = make([(9, 3), (0, 2)], compress_ratio=1)
    assert_same_bits(run(problem).output, problem.kv_score[:, :16])


@pytest.mark.parametrize(
    ("start", "new", "closed"), [(0, 3, 0), (0, 4, 1), (3, 1, 1), (4, 3, 0), (5, 7, 2), (3, 9, 3)]
)
def test_counts_the_windows_that_close(run, start, new, closed):
    problem = make([(start, new)], next_n=9, reserve=4)
    result = run(problem)
    written = (result.output != problem.output).all(1)
    assert written.tolist() == [True] * closed + [False] * (4 - closed)


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
    problem = with_values(score=-largest)
    problem.paged_score[problem.block_table_score[0, 0], 4, 1] = largest
    expected = problem.paged_kv[problem.block_table_kv[0, 0], 4, 1]
    assert run(problem).output[0, 1] == expected.bfloat16()


# By hand: absent rows and bounds.


def test_window_without_rows_is_zeros(run):
    problem = make([(7, 1)], page_size=4)
    problem.block_table_score[0] = -1
    assert run(problem).output.tolist() == [[0] * 16]


@pytest.mark.parametrize("table", ["block_table_kv", "block_table_score"])
@pytest.mark.parametrize("page", [-1, -(2**31), "first past the pool", 2**31 - 1])
def test_row_is_absent_unless_both_its_pages_are_in_the_pool(run, table, page):
    problem = make([(7, 1)], compress_ratio=8, page_size=2, output_dtype="fp32")
    page = problem.paged_kv.size(0) if isinstance(page, str) else page
    getattr(problem, table)[0, 3] = page  # rows 6 and 7, the last being new
    result = run(problem)
    assert_same_bits(result.paged_kv, problem.paged_kv)
    assert_same_bits(result.paged_score, problem.paged_score)
    expected = compress(*rows(problem, range(6)))
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
    problem = make([(1, 6)], compress_ratio=2, next_n=6)
    problem.cu_outputs.copy_(torch.tensor(cu_outputs))
    result = run(problem)
    changed = (result.output != problem.output).any(1)
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
def test_request_that_makes_no_sense_is_skipped(run, broken):
    problem = make([(7, 2), (5, 3)])
    for name, (at, value) in broken.items():
        getattr(problem, name)[at] = value
    result = run(problem)
    kv, score = (
        x.unique().long() for x in (problem.block_table_kv[1], problem.block_table_score[1])
    )
    assert_same_bits(result.paged_kv[kv], problem.paged_kv[kv])
    assert_same_bits(result.paged_score[score], problem.paged_score[score])
    assert_same_bits(result.output[1], problem.output[1])


# By hand: steps.


def decode(run, steps: list[int], kv_score: torch.Tensor, keep=lambda step, new: new) -> Problem:
    """Runs one request through steps of so many new tokens; keep says how many are accepted."""
    problem = make([(0, 0)], next_n=max(steps), page_size=3, reserve=8, output_dtype="fp32")
    pages = torch.arange(20, dtype=torch.int32)[None]
    pool = torch.full((20, 3, 32), torch.nan)
    problem = replace(
        problem,
        paged_kv=pool,
        paged_score=pool.clone(),
        block_table_kv=pages,
        block_table_score=pages.flip(1).contiguous(),
    )
    length = windows = 0
    for step, new in enumerate(steps):
        tokens = kv_score[length : length + new]
        kept = keep(step, new)
        if kept < new:  # what is going to be rejected is none of the request's tokens
            tokens = torch.cat([tokens[:kept], -7 * tokens[kept:]])
        problem = run(
            replace(
                problem,
                kv_score=tokens,
                kv_lens=torch.tensor([length + new], dtype=torch.int32),
                cu_seq_lens=torch.tensor([0, new], dtype=torch.int32),
                cu_outputs=torch.tensor([windows, 8], dtype=torch.int32),
            )
        )
        length += kept
        windows = length // problem.compress_ratio
    return problem


@pytest.mark.parametrize("steps", [[4] * 6, [1, 3, 2, 4, 4, 1, 4, 3, 2], [24]], ids=str)
def test_steps_of_any_size_end_alike(run, steps):
    kv_score = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    one_by_one = decode(run, [1] * 24, kv_score)
    result = decode(run, steps, kv_score)
    assert_same_bits(result.paged_kv, one_by_one.paged_kv)
    assert_same_bits(result.paged_score, one_by_one.paged_score)
    assert_same_bits(result.output, one_by_one.output)


def test_rejected_tokens_leave_no_trace(run):
    kv_score = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    expected = decode(run, [1] * 22, kv_score)
    steps, accepted = [4] * 10, [2, 4, 1, 3, 1, 2, 4, 1, 3, 1]
    result = decode(run, steps, kv_score, keep=lambda step, new: accepted[step])
    positions = range(22)
    for actual, wanted in zip(rows(result, positions), rows(expected, positions), strict=True):
        assert torch.equal(actual, wanted)
    assert_same_bits(result.output[:5], expected.output[:5])


# The result depends on nothing else.


def test_result_does_not_depend_on_the_batch():
    spans = [(7, 4), (13, 3), (6, 2), (3, 4), (15, 1)]
    problem = make(spans, head_dim=24, state_dtype="bf16", output_dtype="fp32")
    together = problem.clone()
    reference.paged_kv_compress(*together.args())
    for b in range(len(spans)):
        alone = problem.clone().alone(b)
        reference.paged_kv_compress(*alone.args())
        assert_same_bits(alone.output[b], together.output[b])


def test_result_does_not_depend_on_the_chunks(monkeypatch):
    problem = make([(5, 7), (12, 8), (0, 4)], next_n=8, output_dtype="fp32")
    whole, chunked = problem.clone(), problem.clone()
    reference.paged_kv_compress(*whole.args())
    monkeypatch.setattr(reference, "CHUNK", 1)
    reference.paged_kv_compress(*chunked.args())
    assert_same_bits(chunked.output, whole.output)
