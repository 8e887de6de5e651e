"""The workload: what the requests are, how many bytes must move, which pages there are."""

import itertools

import pytest
import torch

import kvfold
from kvfold.bench.measure.runner import plan
from kvfold.codegen import TableError, Variant, load_table
from kvfold.codegen.gpu import SM_REGISTERS, SM_THREADS
from kvfold.ops import prefill_workload, state_oracle
from kvfold.ops.prefill_compress import workload
from kvfold.ops.prefill_compress.spec import Problem, Tuning
from kvfold.ops.prefill_compress.workload import WORKLOAD, Options
from kvfold.workload import Case, copy_of
from kvfold.workload import workload as workload_of

WRITTEN = ("paged_kv", "paged_score", "output")


def problem(**fields) -> Problem:
    defaults = {"head_dim": 8, "compress_ratio": 4, "kv_dtype": "bf16", "state_dtype": "fp32"}
    return Problem(**{**defaults, **fields})


PROBLEMS = [
    problem(compress_ratio=16),
    problem(),
    problem(kv_dtype="fp32", state_dtype="bf16"),
    problem(compress_ratio=3, overlap=True),
    problem(compress_ratio=2),
    problem(ape_in_state=False),
]
TAILS = [
    {"write_state": "all"},
    {},
    {"max_rollback": 5, "requests": 3},
    {"state_period": 8, "max_rollback": 1, "requests": 2},
]


def make(one: Problem, tokens: int, scenario: str = "whole", seed: int = 0, **options) -> Case:
    return WORKLOAD.make(one, tokens, scenario, Options(**options), device="cpu", seed=seed)


def spans(case: Case) -> list[tuple[int, int]]:
    """Each request's tokens before the call and after it."""
    a = case.arguments
    new = a.cu_seq_lens.diff().tolist()
    return [(length - n, length) for length, n in zip(a.kv_lens.tolist(), new, strict=True)]


def test_the_workload_is_found_by_the_ops_name():
    assert workload_of("prefill_compress") is WORKLOAD


# ---- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", PROBLEMS)
@pytest.mark.parametrize("options", TAILS)
@pytest.mark.parametrize("scenario", WORKLOAD.scenarios)
def test_a_case_writes_as_many_rows_as_it_says(scenario, options, one):
    case = make(one, 70, scenario, page_size=5, **options)
    assert case.arguments.output.isnan().all()
    args, kwargs = case.arguments.args_and_kwargs()
    kvfold.prefill_compress(*args, **kwargs)
    assert int((~case.arguments.output.isnan()).any(1).sum()) == case.rows
    closed = [end // one.compress_ratio - start // one.compress_ratio for start, end in spans(case)]
    assert case.rows == sum(closed) == case.arguments.output.size(0)


@pytest.mark.parametrize("one", PROBLEMS)
def test_a_case_is_of_the_problem_that_it_is_made_for(one):
    from kvfold.runtime.arguments import check

    call = check(WORKLOAD.spec, make(one, 70).arguments)
    assert (call.problem, call.size) == (one, 70)


@pytest.mark.parametrize("scenario", WORKLOAD.scenarios)
@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
def test_a_case_has_the_tokens_that_it_is_asked_for(tokens, scenario):
    case = make(problem(), tokens, scenario, requests=5)
    assert case.arguments.kv_score.size(0) == tokens
    assert sum(end - start for start, end in spans(case)) == tokens
    assert all(0 <= start < end for start, end in spans(case))


def test_whole_prompts_start_at_0_and_share_the_tokens_evenly():
    assert spans(make(problem(), 20)) == [(0, 20)]
    assert spans(make(problem(), 20, requests=3)) == [(0, 7), (0, 7), (0, 6)]


@pytest.mark.parametrize("ratio", [2, 3, 4, 128])
def test_a_chunk_begins_within_a_window(ratio):
    found = spans(make(problem(compress_ratio=ratio), 40, "chunk", requests=20))
    assert len(found) == 20
    assert all(start > ratio and start % ratio for start, _ in found)


def test_mixed_is_one_prompt_beside_255_requests_of_one_token():
    (prompt, *others) = spans(make(problem(), 1000 + 255, "mixed"))
    assert prompt == (0, 1000)
    assert len(others) == 255 and all(end - start == 1 for start, end in others)
    assert {start % 4 for start, _ in others} == {0, 1, 2, 3}


def test_decode_is_256_requests_of_1_to_4_tokens():
    found = spans(make(problem(compress_ratio=128), 640, "decode"))
    assert [end - start for start, end in found] == [1, 2, 3, 4] * 64
    assert len({start % 128 for start, _ in found}) > 100


def test_options_choose_pages_layout_and_output_dtype():
    packed = make(problem(), 40, page_size=7, layout="packed", output_dtype="fp32").arguments
    assert packed.paged_kv.shape[1] == 7 and packed.output.dtype == torch.float32
    storages = {x.untyped_storage().data_ptr() for x in (packed.paged_kv, packed.paged_score)}
    assert len(storages) == 1
    assert torch.equal(packed.block_table_kv, packed.block_table_score)
    told = make(problem(), 40, write_state="tail", max_rollback=3, state_period=9).arguments
    assert (told.write_state, told.max_rollback, told.state_period) == ("tail", 3, 9)


@pytest.mark.parametrize(
    "wrong",
    [{"write_state": "none"}, {"requests": 0}, {"max_rollback": -1}, {"page_size": 4097}],
)
def test_options_that_no_case_has_are_refused(wrong):
    with pytest.raises(TableError, match=r"is not accepted; legal: "):
        Options(**wrong)


def test_the_same_arguments_make_the_same_case_and_another_seed_another():
    first, again = (make(problem(), 40, output_dtype=d).arguments for d in ("bf16", "fp32"))
    other = make(problem(), 40, seed=1).arguments
    for a, b in zip(first.args()[:6], again.args()[:6], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.kv_score, other.kv_score)


@pytest.mark.parametrize("one", PROBLEMS)
@pytest.mark.parametrize("options", TAILS)
@pytest.mark.parametrize("scenario", WORKLOAD.scenarios)
def test_there_are_the_pages_of_rows_that_are_stored_or_read_and_no_others(scenario, options, one):
    case = make(one, 70, scenario, page_size=3, **options)
    ratio, overlap = one.compress_ratio, int(one.overlap)
    for request, (start, end) in enumerate(spans(case)):
        needed = {
            p for p in range(start, end)
            if prefill_workload.is_stored(start, end, p, one, Options(**options))
        }  # fmt: skip
        needed |= set(range(max(0, (start // ratio - overlap) * ratio), start))
        pages = {p // 3 for p in needed}
        for table in (case.arguments.block_table_kv, case.arguments.block_table_score):
            assert set(torch.nonzero(table[request] >= 0).flatten().tolist()) == pages
    used = case.arguments.block_table_kv[case.arguments.block_table_kv >= 0]
    assert sorted(used.tolist()) == list(range(case.arguments.paged_kv.size(0)))


@pytest.mark.parametrize("one", PROBLEMS)
@pytest.mark.parametrize("options", TAILS)
def test_the_mask_of_stored_rows_is_the_contracts(options, one):
    chosen = Options(**options)
    for start, new in itertools.product((0, 3, 11, 40), (1, 2, 17, 33)):
        mask = prefill_workload.stored_mask(start, new, one, chosen)
        words = [
            prefill_workload.is_stored(start, start + new, p, one, chosen)
            for p in range(start, start + new)
        ]
        assert mask.tolist() == words


# ---- bytes ---------------------------------------------------------------------------------------


def brute_bytes(case: Case, one: Problem, options: Options) -> int:
    """Every element that a call must touch, put in a set under its own name."""
    a, ratio = case.arguments, one.compress_ratio
    state_dim = one.head_dim * (2 if one.overlap else 1)
    touched = {}
    for b, (start, end) in enumerate(spans(case)):
        for p, pool, c in itertools.product(range(start, end), (0, 1), range(state_dim)):
            touched["read", b, p, pool, c] = a.kv_score.element_size()
            if prefill_workload.is_stored(start, end, p, one, options):
                touched["store", b, p, pool, c] = a.paged_kv.element_size()
            if one.ape_in_state:
                touched["ape", p % ratio, c] = 4
        for window in range(start // ratio, end // ratio):
            for c in range(one.head_dim):
                touched["output", b, window, c] = a.output.element_size()
                own = c + state_dim - one.head_dim
                rows = [(p, own) for p in range(ratio * window, ratio * (window + 1))]
                if one.overlap:
                    rows += [(p, c) for p in range(ratio * (window - 1), ratio * window) if p >= 0]
                for (p, column), pool in itertools.product(rows, (0, 1)):
                    if not one.ape_in_state:
                        touched["ape", p % ratio, column] = 4
                    if p < start:
                        touched["state", b, p, pool, column] = a.paged_kv.element_size()
    return sum(touched.values())


@pytest.mark.parametrize("one", PROBLEMS)
@pytest.mark.parametrize("options", TAILS)
@pytest.mark.parametrize("scenario", WORKLOAD.scenarios)
@pytest.mark.parametrize("tokens", [6, 70])
def test_moved_bytes_are_what_a_count_of_every_element_gives(tokens, scenario, options, one):
    case = make(one, tokens, scenario, **options)
    assert case.moved_bytes == brute_bytes(case, one, Options(**options))


def test_a_tail_moves_fewer_bytes_than_the_whole_state():
    one = problem(compress_ratio=128, head_dim=512)
    tail, everything = (make(one, 1024, write_state=w).moved_bytes for w in ("tail", "all"))
    assert everything - tail == 1024 * 2 * 512 * 4


# ---- what a call must leave ----------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [90, workload.ORACLE_TOKENS + 1])
@pytest.mark.parametrize("options", TAILS)
def test_expected_is_the_oracles_and_changes_no_argument(options, tokens):
    one, chosen = problem(), Options(**options)
    case = make(one, tokens, "chunk", **options)
    before = copy_of(case.arguments, WRITTEN)
    found = WORKLOAD.expected(case.arguments)
    for name in WRITTEN:
        assert torch.equal(
            getattr(case.arguments, name).nan_to_num(7), getattr(before, name).nan_to_num(7)
        )
    assert found.keys() == WORKLOAD.tolerances.keys() == set(WRITTEN)
    oracle = state_oracle.expected(
        case.arguments, None, lambda s, end, p: prefill_workload.is_stored(s, end, p, one, chosen)
    )
    for name, want in oracle.items():
        torch.testing.assert_close(
            found[name].double(), want.double(), rtol=1e-6, atol=1e-6, equal_nan=True
        )


# ---- candidates ----------------------------------------------------------------------------------

PRODUCTION = Problem.of(WORKLOAD.defaults)


def candidates(one: Problem, backend: str = "cuda", arch: str = "sm_90") -> list[Tuning]:
    return list(workload.candidates(one, backend, arch))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("state_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("head_dim", "ratio"), [(512, 128), (128, 128), (512, 4), (512, 2)])
def test_candidates_can_run_are_unique_and_few(head_dim, ratio, state_dtype, kv_dtype, arch):
    one = problem(
        head_dim=head_dim, compress_ratio=ratio, state_dtype=state_dtype, kv_dtype=kv_dtype
    )
    found = candidates(one, arch=arch)
    assert found and len(set(found)) == len(found) <= 60
    sm_bytes = {"sm_80": 164, "sm_90": 228, "sm_120": 100}[arch] * 1024
    for tuning in found:
        variant = Variant(problem=one, backend="cuda", tuning=tuning)
        variant.check_arch(arch)
        # All CTAs run at once: the grid has as many as min_ctas says.
        assert tuning.min_ctas * (variant.launch.shared_bytes + 1024) <= sm_bytes
        assert tuning.min_ctas * variant.launch.threads <= SM_THREADS
        assert tuning.min_ctas == 1 or (
            tuning.min_ctas * variant.launch.threads * 80 <= SM_REGISTERS
        )


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("tokens", [1, 8192, 65536])
@pytest.mark.parametrize("ratio", [128, 4])
def test_candidates_hold_what_the_shipped_table_has(ratio, tokens, backend):
    one = Problem.of({**WORKLOAD.defaults, "compress_ratio": ratio})
    shipped = load_table().find(one, backend, "sm_90", tokens)
    assert shipped is not None and shipped.tuning in candidates(one, backend)


def test_every_candidate_has_a_window_on_its_way():
    for ratio in (128, 4):
        least = 3 if ratio == 4 else 2  # an overlapping window also keeps the one before it
        found = candidates(problem(head_dim=512, compress_ratio=ratio))
        assert min(tuning.stages for tuning in found) == least


def test_no_triton_tile_is_huge():
    found = candidates(PRODUCTION, "triton")
    assert Tuning(reduce_warps=4, head_slice=32) in found
    assert Tuning(reduce_warps=1, head_slice=512) not in found
    assert {(tuning.stages, tuning.min_ctas) for tuning in found} == {(3, 1)}


# ---- the suite and the search --------------------------------------------------------------------


def suite_points() -> set[tuple]:
    """(problem, options, scenario, size) of every point of the suite."""
    return {
        (point.problem, point.options, point.scenario, point.size)
        for one in WORKLOAD.suite
        for point in plan(WORKLOAD, one).points
    }


@pytest.mark.parametrize(
    ("fields", "options", "scenario", "sizes"),
    [
        ({}, {}, "whole", (8192, 65536)),
        ({}, {"requests": 8}, "whole", (65536,)),
        ({"compress_ratio": 4}, {}, "whole", (8192, 65536)),
        ({"compress_ratio": 4, "head_dim": 128}, {}, "whole", (8192, 65536)),
        ({"kv_dtype": "fp32"}, {}, "whole", (65536,)),
        ({"kv_dtype": "fp32", "compress_ratio": 4}, {}, "whole", (65536,)),
        ({}, {"write_state": "all"}, "whole", (65536,)),
        ({}, {"write_state": "all", "requests": 8}, "whole", (524288,)),
        ({}, {"write_state": "all"}, "decode", (640,)),
        ({}, {}, "mixed", (65791,)),
    ],
)
def test_the_suite_measures_what_has_a_target(fields, options, scenario, sizes):
    one = Problem.of({**WORKLOAD.defaults, **fields})
    points = suite_points()
    for size in sizes:
        assert (one, Options.of(options), scenario, size) in points


def test_the_search_weighs_scenarios_prefetch_and_sizes_that_there_are():
    search = WORKLOAD.search
    assert search is not None and set(search.mixture) <= set(WORKLOAD.scenarios)
    assert set(search.prefetch) == set(WORKLOAD.prefetch) == {"none", "metadata", "state"}
    for weights in (search.mixture, search.prefetch):
        assert sum(weights.values()) == pytest.approx(1)
    assert max(search.prefetch, key=search.prefetch.get) == list(search.prefetch)[-1]
    assert search.sizes == (1024, 8192, 65536)


def test_metadata_are_what_the_calls_of_a_step_share():
    names = {one.name for one in WORKLOAD.spec.arguments.declared_tensors() if not one.is_float}
    assert set(WORKLOAD.metadata) == names
