"""Cases: which windows close, how many bytes must move, how the tensors lie."""

import itertools

import numpy as np
import pytest
import torch

import kvfold
from kvfold.bench import cases

PROBLEMS = [
    {"head_dim": 16, "compress_ratio": 128, "next_n": 4},
    {"head_dim": 16, "compress_ratio": 4, "next_n": 4},
    {"head_dim": 16, "compress_ratio": 4, "next_n": 1, "kv_dtype": "fp32", "state_dtype": "bf16"},
    {"head_dim": 8, "compress_ratio": 3, "next_n": 7, "overlap": True, "output_dtype": "fp32"},
    {"head_dim": 8, "compress_ratio": 1, "next_n": 2},
]


def closed(case: cases.Case) -> list[int]:
    """Windows that each request closes, counted token by token."""
    begin = case.cu_seq_lens.tolist()
    return [
        sum((p + 1) % case.compress_ratio == 0 for p in range(length - (end - start), length))
        for length, (start, end) in zip(
            case.kv_lens.tolist(), itertools.pairwise(begin), strict=True
        )
    ]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("scenario", cases.SCENARIOS)
def test_a_case_is_a_valid_call_that_emits_what_it_says(scenario, layout, problem):
    case = cases.make(**problem, batch=7, scenario=scenario, layout=layout, page_size=5)
    kvfold.check(*case.args())
    assert case.emitted == sum(closed(case))
    kvfold.paged_kv_compress(*case.args())
    assert int((~case.output.isnan()).any(1).sum()) == case.emitted


@pytest.mark.parametrize(("compress_ratio", "next_n"), [(128, 4), (128, 1), (4, 4), (4, 1), (5, 3)])
def test_all_hit_closes_on_the_last_token_and_no_hit_nowhere(compress_ratio, next_n):
    problem = {"head_dim": 8, "compress_ratio": compress_ratio, "next_n": next_n, "batch": 40}
    hit = cases.make(**problem, scenario="all-hit")
    assert closed(hit) == [1] * 40
    assert (hit.kv_lens % compress_ratio == 0).all()
    assert hit.cu_seq_lens.diff().tolist() == [next_n] * 40
    assert closed(cases.make(**problem, scenario="no-hit")) == [0] * 40


def test_spread_closes_one_window_in_ratio_over_next_n():
    case = cases.make(head_dim=8, batch=96, scenario="spread")
    assert (case.kv_lens % 128).tolist() == [4 * i % 128 for i in range(96)]
    assert closed(case) == [int(i % 32 == 0) for i in range(96)]


def brute_bytes(case: cases.Case, head_dim: int, overlap: bool, ratio: int) -> int:
    """Every element that a step must touch, put in a set under its own name."""
    state_dim = head_dim * (2 if overlap else 1)
    begin = case.cu_seq_lens.tolist()
    touched = {}
    for b, length in enumerate(case.kv_lens.tolist()):
        start = length - (begin[b + 1] - begin[b])
        for p, pool, c in itertools.product(range(start, length), (0, 1), range(state_dim)):
            touched["read", b, p, pool, c] = case.kv_score.element_size()
            touched["store", b, p, pool, c] = case.paged_kv.element_size()
            touched["ape", p % ratio, c] = 4
        for window in range(start // ratio, length // ratio):
            for c in range(head_dim):
                touched["output", b, window, c] = case.output.element_size()
                rows = [(p, c + state_dim - head_dim) for p in range(ratio * window, length)][
                    :ratio
                ]
                if overlap:
                    rows += [(p, c) for p in range(ratio * (window - 1), ratio * window) if p >= 0]
                for (p, column), pool in itertools.product(rows, (0, 1)):
                    if p < start:
                        touched["state", b, p, pool, column] = case.paged_kv.element_size()
    return sum(touched.values())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("scenario", cases.SCENARIOS)
def test_bytes_are_what_a_count_of_every_element_gives(scenario, problem):
    case = cases.make(**problem, batch=5, scenario=scenario)
    overlap = case.paged_kv.shape[2] == 2 * problem["head_dim"]
    ratio = problem["compress_ratio"]
    assert case.bytes == brute_bytes(case, problem["head_dim"], overlap, ratio)


def test_an_overlapping_window_at_the_start_has_no_window_before_it():
    sizes = {"kv_size": 2, "state_size": 4, "output_size": 2}
    moved = cases.must_move(
        np.array([3]), np.array([1]), head_dim=8, compress_ratio=4, overlap=True, **sizes
    )
    assert moved == 2 * 16 * (2 + 4) + 16 * 4 + 3 * 2 * 8 * 4 + 8 * 2


def test_packed_pools_are_two_views_of_one():
    case = cases.make(head_dim=16, layout="packed", batch=3)
    assert case.paged_kv.untyped_storage().data_ptr() == (
        case.paged_score.untyped_storage().data_ptr()
    )
    assert case.paged_kv.stride() == (32 * 32, 32, 1)
    assert torch.equal(case.block_table_kv, case.block_table_score)
    split = cases.make(head_dim=16, layout="split", batch=3)
    assert not torch.equal(split.block_table_kv, split.block_table_score)
    assert case.allocated - split.allocated == 0


def test_the_same_arguments_make_the_same_case_and_another_seed_another():
    first, again = (cases.make(head_dim=8, batch=3, output_dtype=d) for d in ("bf16", "fp32"))
    other = cases.make(head_dim=8, batch=3, seed=1)
    for a, b in zip(first.args()[:6], again.args()[:6], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.kv_score, other.kv_score)
    assert not torch.equal(first.block_table_kv, other.block_table_kv)


@pytest.mark.parametrize("wrong", [{"scenario": "most-hit"}, {"layout": "woven"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match=r"accepted: "):
        cases.make(**wrong)
