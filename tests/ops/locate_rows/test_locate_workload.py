"""The workload: what the requests are, which rows are filled, how many bytes must move."""

import itertools

import pytest
import torch
from locate_calls import SOURCES

from kvfold.bench.measure.runner import plan
from kvfold.codegen import TableError
from kvfold.ops.locate_rows.spec import Problem
from kvfold.ops.locate_rows.workload import UNWRITTEN, WORKLOAD, Options
from kvfold.runtime.arguments import check
from kvfold.workload import Case, copy_of
from kvfold.workload import workload as workload_of

RATIOS = (1, 2, 3, 4, 128)
EVERY_RATIO = pytest.mark.parametrize("ratio", RATIOS)
BOTH_SOURCES = pytest.mark.parametrize("source", SOURCES)
BOTH_SCENARIOS = pytest.mark.parametrize("scenario", WORKLOAD.scenarios)


def make(rows: int, scenario: str = "decode", seed: int = 0, **options) -> Case:
    return WORKLOAD.make(Problem(), rows, scenario, Options(**options), device="cpu", seed=seed)


def spans(case: Case) -> list[tuple[int, int]]:
    """Each request's tokens before the call and after it."""
    a = case.arguments
    new = a.cu_seq_lens.diff().tolist()
    return [(length - n, length) for length, n in zip(a.kv_lens.tolist(), new, strict=True)]


def test_the_workload_is_found_by_the_ops_name():
    assert workload_of("locate_rows") is WORKLOAD


@EVERY_RATIO
@BOTH_SOURCES
@BOTH_SCENARIOS
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_a_case_has_the_rows_that_it_is_asked_for(rows, scenario, source, ratio):
    case = make(rows, scenario, compress_ratio=ratio, source=source, requests=3)
    a = case.arguments
    assert check(WORKLOAD.spec, a).size == rows == case.rows
    assert (a.positions == UNWRITTEN).all() and (a.slots == UNWRITTEN).all()
    assert a.cu_outputs[0] == 0 and a.cu_outputs[-1] == rows
    assert all(0 <= start < end for start, end in spans(case))
    assert a.num_tokens == a.cu_seq_lens[-1]
    assert [a.block_table_cache is None, a.token_slots is None].count(True) == 1
    assert (WORKLOAD.expected(a)["positions"] != UNWRITTEN).all()


@EVERY_RATIO
def test_decode_has_four_tokens_of_each_request_and_rows_for_the_windows_they_can_close(ratio):
    case = make(1000, compress_ratio=ratio)
    found = spans(case)
    assert all(end - start == 4 for start, end in found)
    reserved = case.arguments.cu_outputs.diff()
    assert (reserved[:-1] == -(-4 // ratio)).all() and reserved[-1] > 0
    assert {start % ratio for start, _ in found} >= set(range(0, ratio, 4))
    filled = int((WORKLOAD.expected(case.arguments)["positions"] >= 0).sum())
    closed = len(found) * 4 / ratio
    assert abs(filled - closed) <= 0.05 * closed + 2
    assert case.arguments.next_n == 4


@EVERY_RATIO
@pytest.mark.parametrize("requests", [1, 7])
def test_prompts_fill_every_row(ratio, requests):
    case = make(100, "prompts", compress_ratio=ratio, requests=requests)
    assert len(spans(case)) == requests
    assert (WORKLOAD.expected(case.arguments)["positions"] >= 0).all()
    reserved = case.arguments.cu_outputs.diff()
    assert reserved.max() - reserved.min() <= 1


@BOTH_SOURCES
@BOTH_SCENARIOS
def test_every_filled_row_has_a_slot_of_its_own(scenario, source):
    case = make(500, scenario, source=source, requests=5, rows_per_page=7)
    want = WORKLOAD.expected(case.arguments)
    slots = want["slots"][want["positions"] >= 0]
    assert (slots >= 0).all() and len(slots.unique()) == len(slots) > 300


@BOTH_SOURCES
def test_the_same_arguments_make_the_same_case_and_another_seed_another(source):
    def of(seed: int) -> list[torch.Tensor]:
        args = make(50, source=source, seed=seed).arguments.args()
        return [x for x in args if isinstance(x, torch.Tensor)]

    assert all(map(torch.equal, of(0), of(0)))
    assert not all(map(torch.equal, of(0), of(1)))


@pytest.mark.parametrize(
    "wrong", [{"compress_ratio": 0}, {"rows_per_page": 0}, {"source": "pages"}, {"requests": 0}]
)
def test_options_that_no_case_has_are_refused(wrong):
    with pytest.raises(TableError, match=r"is not accepted; legal: "):
        Options(**wrong)


def brute_bytes(case: Case) -> int:
    """Every element that a call must touch, put in a set under its own name."""
    a, touched = case.arguments, {}
    rows_of = a.cu_outputs.tolist()
    for b, (start, end) in enumerate(spans(case)):
        touched |= {("length", b): 4, ("tokens", b): 4, ("rows", b): 4}
        for row in range(rows_of[b], rows_of[b + 1]):
            window = start // a.compress_ratio + row - rows_of[b]
            touched |= {("position", row): 4, ("slot", row): 8}
            if window >= end // a.compress_ratio:
                continue
            if a.block_table_cache is None:
                touched["token", b, window] = 8
            else:
                touched["page", b, window // a.rows_per_page] = 4
    return sum(touched.values()) + 2 * 4  # the last of both prefix sums


@EVERY_RATIO
@BOTH_SOURCES
@BOTH_SCENARIOS
def test_moved_bytes_are_what_a_count_of_every_element_gives(scenario, source, ratio):
    for rows, requests, rows_per_page in itertools.product((1, 90), (1, 4), (1, 5, 64)):
        case = make(
            rows, scenario, compress_ratio=ratio, source=source, requests=requests,
            rows_per_page=rows_per_page,
        )  # fmt: skip
        assert case.moved_bytes == brute_bytes(case)


@BOTH_SOURCES
def test_expected_changes_no_argument(source):
    arguments = make(40, source=source).arguments
    before = copy_of(arguments, ("positions", "slots"))
    found = WORKLOAD.expected(arguments)
    assert found.keys() == WORKLOAD.tolerances.keys()
    for name, want in found.items():
        assert torch.equal(getattr(arguments, name), getattr(before, name))
        assert want.dtype == getattr(arguments, name).dtype


def test_the_suite_measures_both_scenarios_with_both_sources():
    points = [point for one in WORKLOAD.suite for point in plan(WORKLOAD, one).points]
    assert {(point.scenario, point.options.source) for point in points} == set(
        itertools.product(WORKLOAD.scenarios, SOURCES)
    )
    assert {point.size for point in points} == set(WORKLOAD.sizes)
