"""The workload: which windows close, how many bytes must move, how the tensors are laid out."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kvfold
from kvfold.bench.measure.runner import plan
from kvfold.bench.records import KernelReport, load
from kvfold.codegen import TableError, Variant, load_table
from kvfold.codegen.gpu import SM_REGISTERS
from kvfold.ops import decode_workload, state_oracle
from kvfold.ops.paged_kv_compress import workload
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning, items_at_once
from kvfold.ops.paged_kv_compress.workload import WORKLOAD, Options
from kvfold.workload import Case, copy_of
from kvfold.workload import workload as workload_of

LAYOUTS = ("split", "packed")
RESULTS = Path(__file__).parents[3] / "bench" / "results" / "h200" / "paged_kv_compress.json"


def problem(**fields) -> Problem:
    defaults = {"head_dim": 16, "compress_ratio": 4, "kv_dtype": "bf16", "state_dtype": "fp32"}
    return Problem(**{**defaults, "next_n": 4, **fields})


PROBLEMS = [
    problem(compress_ratio=128),
    problem(),
    problem(next_n=1, kv_dtype="fp32", state_dtype="bf16"),
    problem(head_dim=8, compress_ratio=3, next_n=7, overlap=True),
    problem(head_dim=8, compress_ratio=1, next_n=2),
    problem(ape_in_state=False, next_n=8),
]


def make(one: Problem, batch: int, scenario: str = "all-hit", seed: int = 0, **options) -> Case:
    return WORKLOAD.make(one, batch, scenario, Options(**options), device="cpu", seed=seed)


def closed(case: Case) -> list[int]:
    """Windows that each request closes, counted token by token."""
    a = case.arguments
    return [
        sum((p + 1) % a.compress_ratio == 0 for p in range(length - (end - start), length))
        for length, (start, end) in zip(
            a.kv_lens.tolist(), itertools.pairwise(a.cu_seq_lens.tolist()), strict=True
        )
    ]


def test_the_workload_is_found_by_the_ops_name():
    assert workload_of("paged_kv_compress") is WORKLOAD
    with pytest.raises(TableError, match="nope is no op"):
        workload_of("nope")


# ---- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", PROBLEMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scenario", WORKLOAD.scenarios)
def test_a_case_is_a_valid_call_that_writes_as_many_rows_as_it_says(scenario, layout, one):
    case = make(one, 7, scenario, layout=layout, page_size=5)
    args, kwargs = case.arguments.args_and_kwargs()
    kvfold.check(*args)
    assert case.rows == sum(closed(case))
    assert case.arguments.output.isnan().all()
    kvfold.paged_kv_compress(*args, **kwargs)
    assert int((~case.arguments.output.isnan()).any(1).sum()) == case.rows


@pytest.mark.parametrize("one", PROBLEMS)
def test_a_case_is_of_the_problem_that_it_is_made_for(one):
    from kvfold.runtime.arguments import check

    case = make(one, 7)
    call = check(WORKLOAD.spec, case.arguments)
    assert (call.problem, call.size) == (one, 7)


@pytest.mark.parametrize(("ratio", "next_n"), [(128, 4), (128, 1), (4, 4), (4, 1), (5, 3)])
def test_all_hit_closes_on_the_last_token_and_no_hit_nowhere(ratio, next_n):
    one = problem(head_dim=8, compress_ratio=ratio, next_n=next_n)
    hit = make(one, 40)
    assert closed(hit) == [1] * 40
    assert (hit.arguments.kv_lens % ratio == 0).all()
    assert hit.arguments.cu_seq_lens.diff().tolist() == [next_n] * 40
    assert closed(make(one, 40, "no-hit")) == [0] * 40


def test_spread_closes_one_window_in_ratio_over_next_n():
    case = make(problem(head_dim=8, compress_ratio=128), 96, "spread")
    assert (case.arguments.kv_lens % 128).tolist() == [4 * i % 128 for i in range(96)]
    assert closed(case) == [int(i % 32 == 0) for i in range(96)]


def test_ragged_requests_have_1_to_next_n_tokens_and_are_those_of_a_prefill():
    from kvfold.ops.prefill_compress.workload import WORKLOAD as PREFILL

    case = make(problem(head_dim=8, compress_ratio=128), 256, "ragged")
    new = case.arguments.cu_seq_lens.diff()
    assert new.tolist() == [1, 2, 3, 4] * 64
    assert 0 < case.rows < 256
    fields = {"head_dim": 8, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32"}
    options = PREFILL.options.of({"write_state": "all"})
    prompts = PREFILL.make(PREFILL.spec.problem.of(fields), 640, "decode", options, "cpu")
    for name in ("kv_lens", "cu_seq_lens"):
        assert torch.equal(getattr(case.arguments, name), getattr(prompts.arguments, name))
    assert prompts.rows == case.rows


def test_packed_pools_are_two_views_of_one():
    one = problem(compress_ratio=128)
    packed = make(one, 3, layout="packed").arguments
    assert packed.paged_kv.untyped_storage().data_ptr() == (
        packed.paged_score.untyped_storage().data_ptr()
    )
    assert packed.paged_kv.stride() == (32 * 32, 32, 1)
    assert torch.equal(packed.block_table_kv, packed.block_table_score)
    split = make(one, 3, layout="split").arguments
    assert not torch.equal(split.block_table_kv, split.block_table_score)
    # Memory that two views share counts once.
    sizes = {make(one, 3, layout=layout).allocated_bytes for layout in LAYOUTS}
    assert len(sizes) == 1


def test_options_choose_page_size_and_output_dtype():
    a = make(problem(), 3, page_size=7, output_dtype="fp32").arguments
    assert a.paged_kv.shape[1] == 7 and a.output.dtype == torch.float32
    assert make(problem(), 3).arguments.output.dtype == torch.bfloat16


def test_block_tables_are_as_wide_as_asked_and_no_narrower_than_needed():
    narrow, same, wide = (make(problem(), 3, page_size=2, max_pages=n) for n in (0, 1, 1000))
    needed = -(-int(narrow.arguments.kv_lens.max()) // 2)
    assert narrow.arguments.block_table_kv.shape == same.arguments.block_table_kv.shape
    assert narrow.arguments.block_table_kv.shape == (3, needed)
    for name in ("block_table_kv", "block_table_score"):
        table = getattr(wide.arguments, name)
        assert table.shape == (3, 1000) and table.dtype == torch.int32
        assert torch.equal(table[:, :needed], getattr(narrow.arguments, name))
        assert (table[:, needed:] == -1).all()
    assert wide.moved_bytes == narrow.moved_bytes


def test_the_same_arguments_make_the_same_case_and_another_seed_another():
    first, again = (make(problem(), 3, output_dtype=d).arguments for d in ("bf16", "fp32"))
    other = make(problem(), 3, seed=1).arguments
    for a, b in zip(first.args()[:6], again.args()[:6], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.kv_score, other.kv_score)
    assert not torch.equal(first.block_table_kv, other.block_table_kv)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": "woven"},
        {"page_size": 0},
        {"page_size": 4097},
        {"output_dtype": "fp16"},
        {"max_pages": -1},
    ],
)
def test_options_that_no_case_has_are_refused(wrong):
    with pytest.raises(TableError, match=r"is not accepted; legal: "):
        Options(**wrong)


# ---- bytes ---------------------------------------------------------------------------------------


def brute_bytes(case: Case, one: Problem) -> int:
    """Every element that a step must touch, put in a set under its own name."""
    a, ratio = case.arguments, one.compress_ratio
    state_dim = one.head_dim * (2 if one.overlap else 1)
    begin = a.cu_seq_lens.tolist()
    touched = {}
    for b, length in enumerate(a.kv_lens.tolist()):
        start = length - (begin[b + 1] - begin[b])
        for p, pool, c in itertools.product(range(start, length), (0, 1), range(state_dim)):
            touched["read", b, p, pool, c] = a.kv_score.element_size()
            touched["store", b, p, pool, c] = a.paged_kv.element_size()
            if one.ape_in_state:
                touched["ape", p % ratio, c] = 4
        for window in range(start // ratio, length // ratio):
            for c in range(one.head_dim):
                touched["output", b, window, c] = a.output.element_size()
                own = c + state_dim - one.head_dim
                rows = [(p, own) for p in range(ratio * window, length)][:ratio]
                if one.overlap:
                    rows += [(p, c) for p in range(ratio * (window - 1), ratio * window) if p >= 0]
                for (p, column), pool in itertools.product(rows, (0, 1)):
                    if not one.ape_in_state:
                        touched["ape", p % ratio, column] = 4
                    if p < start:
                        touched["state", b, p, pool, column] = a.paged_kv.element_size()
    return sum(touched.values())


@pytest.mark.parametrize("one", PROBLEMS)
@pytest.mark.parametrize("scenario", WORKLOAD.scenarios)
def test_moved_bytes_are_what_a_count_of_every_element_gives(scenario, one):
    case = make(one, 5, scenario)
    assert case.moved_bytes == brute_bytes(case, one)


def test_an_overlapping_window_at_the_start_has_no_window_before_it():
    one = problem(head_dim=8, compress_ratio=4, next_n=1)
    moved = decode_workload.must_move(np.array([3]), np.array([1]), one, output_bytes=2)
    assert moved == 2 * 16 * (2 + 4) + 16 * 4 + 3 * 2 * 8 * 4 + 8 * 2


# ---- what a call must leave ----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [workload.ORACLE_BATCH, workload.ORACLE_BATCH + 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_expected_is_the_oracles_and_changes_no_argument(layout, batch):
    case = make(problem(), batch, "spread", layout=layout)
    before = copy_of(case.arguments, ("paged_kv", "paged_score", "output"))
    found = WORKLOAD.expected(case.arguments)
    for name in ("paged_kv", "paged_score", "output"):
        assert torch.equal(
            getattr(case.arguments, name).nan_to_num(7), getattr(before, name).nan_to_num(7)
        )
    assert found.keys() == WORKLOAD.tolerances.keys() == {"paged_kv", "paged_score", "output"}
    for name, want in state_oracle.expected(case.arguments, case.arguments.next_n).items():
        torch.testing.assert_close(
            found[name].double(), want.double(), rtol=1e-6, atol=1e-6, equal_nan=True
        )


def test_views_of_one_storage_stay_so_in_a_copy():
    arguments = make(problem(), 3, layout="packed").arguments
    copies = copy_of(arguments, ("paged_kv", "paged_score"))
    assert torch.equal(copies.paged_kv, arguments.paged_kv)
    assert copies.paged_kv.stride() == arguments.paged_kv.stride()
    storages = [x.untyped_storage().data_ptr() for x in (copies.paged_kv, copies.paged_score)]
    assert storages[0] == storages[1] != arguments.paged_kv.untyped_storage().data_ptr()


# ---- candidates ----------------------------------------------------------------------------------

PRODUCTION = Problem.of(WORKLOAD.defaults)


def candidates(one: Problem, backend: str = "cuda", arch: str = "sm_90") -> list[Tuning]:
    return list(WORKLOAD.search.candidates(one, backend, arch))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("state_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("next_n", [1, 4])
@pytest.mark.parametrize(
    ("head_dim", "ratio"), [(64, 4), (96, 100), (512, 128), (128, 128), (512, 4), (512, 2)]
)
def test_candidates_can_run_are_unique_and_few(head_dim, ratio, next_n, state_dtype, arch):
    one = problem(head_dim=head_dim, compress_ratio=ratio, next_n=next_n, state_dtype=state_dtype)
    found = candidates(one, arch=arch)
    assert found and len(set(found)) == len(found) < 130
    sm_bytes = {"sm_80": 164, "sm_90": 228, "sm_120": 100}[arch] * 1024
    for tuning in found:
        variant = Variant(problem=one, backend="cuda", tuning=tuning)
        variant.check_arch(arch)
        # So many CTAs do fit at once, in shared memory and with few enough registers.
        assert tuning.min_ctas * (variant.launch.shared_bytes + 1024) <= sm_bytes
        assert tuning.min_ctas == 1 or (
            tuning.min_ctas * variant.launch.threads * 80 <= SM_REGISTERS
        )


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("batch", [1, 64, 512])
def test_candidates_hold_what_the_shipped_table_has(batch, backend):
    shipped = load_table().find(PRODUCTION, backend, "sm_90", batch)
    assert shipped is not None and shipped.tuning in candidates(PRODUCTION, backend)


@pytest.mark.parametrize(
    ("warps", "width", "ctas"),
    [
        (4, 32, [1, 4, 5, 6]),  # 128 threads of 128, 96 and 80 registers
        (4, 64, [1, 3]),  # of 67 KiB of shared memory three fit
        (8, 64, [1, 2, 3]),
        (8, 128, [1]),  # more do not fit
    ],
)
def test_min_ctas_is_as_registers_and_shared_memory_allow(warps, width, ctas):
    plain = [
        Tuning(reduce_warps=warps, head_slice=width, min_ctas=min_ctas) for min_ctas in range(1, 33)
    ]
    found = candidates(PRODUCTION)
    assert [tuning.min_ctas for tuning in plain if tuning in found] == ctas


# Those that measurements on an H200 found best, by batch.
WINNERS = [
    (1, 128, {"reduce_warps": 8, "head_slice": 32, "min_ctas": 3}),
    (1, 128, {"reduce_warps": 4, "head_slice": 256}),
    (4, 128, {"reduce_warps": 4, "head_slice": 64, "requests_per_cta": 8, "store_bytes": 256,
              "min_ctas": 3}),
    (4, 128, {"reduce_warps": 8, "head_slice": 64, "deal": True, "min_ctas": 3}),
    (4, 4, {"reduce_warps": 1, "head_slice": 512, "min_ctas": 6}),
    (4, 4, {"reduce_warps": 1, "head_slice": 256, "fused": True, "min_ctas": 8}),
    (4, 4, {"reduce_warps": 1, "head_slice": 256, "requests_per_cta": 4, "min_ctas": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("next_n", "ratio", "tuning"), WINNERS)
def test_candidates_hold_what_was_measured_to_be_best(next_n, ratio, tuning):
    one = problem(head_dim=512, compress_ratio=ratio, next_n=next_n)
    assert Tuning(**tuning) in candidates(one)


def test_more_bytes_in_flight_are_tried_only_where_they_make_another_kernel():
    for ratio, next_n in itertools.product((4, 128), (1, 4, 8)):
        one = problem(head_dim=512, compress_ratio=ratio, next_n=next_n)
        for tuning in candidates(one):
            if tuning.store_bytes > 128:
                threads = Variant(problem=one, backend="cuda", tuning=tuning).launch.threads
                fewer = replace(tuning, store_bytes=128)
                assert items_at_once(one, tuning, threads) > items_at_once(one, fewer, threads)


def test_only_small_windows_are_tried_fused():
    fused = {ratio: [t for t in candidates(problem(head_dim=512, compress_ratio=ratio)) if t.fused]
             for ratio in (2, 4, 128)}  # fmt: skip
    assert fused[2] and fused[4] and not fused[128]
    assert {(t.requests_per_cta, t.store_bytes) for t in fused[4]} == {(1, 128)}


def test_no_triton_tile_is_huge():
    found = candidates(PRODUCTION, "triton")
    alike = [t for t in found if (t.reduce_warps, t.head_slice) == (4, 32)]
    assert [tuning.min_ctas for tuning in alike] == [1, 4, 5, 6]
    assert Tuning(reduce_warps=1, head_slice=512) not in found
    assert Tuning(reduce_warps=16, head_slice=64) in found
    assert not any(
        t.fused or t.deal or t.requests_per_cta > 1 or t.store_bytes > 128 for t in found
    )


# ---- the suite and the search --------------------------------------------------------------------


def suite_points() -> set[tuple]:
    """(problem, options, scenario, size) of every point of the suite."""
    return {
        (point.problem, point.options, point.scenario, point.size)
        for one in WORKLOAD.suite
        for point in plan(WORKLOAD, one).points
    }


def test_the_suite_measures_every_committed_point():
    committed = {
        (Problem.of(row.problem), Options.of(row.options), row.scenario, row.size)
        for row in load(KernelReport, RESULTS).rows
    }
    assert committed and committed <= suite_points()


@pytest.mark.parametrize(
    ("fields", "options", "scenario", "sizes"),
    [
        ({"next_n": 1}, {}, "all-hit", (16, 128, 512)),
        ({"next_n": 1, "compress_ratio": 4}, {}, "all-hit", (16, 128, 512)),
        ({"compress_ratio": 4}, {}, "all-hit", (256, 512, 2048)),
        ({}, {}, "spread", (1024, 4096)),
        *(({}, {"page_size": rows}, "all-hit", (16, 256)) for rows in (1, 2, 4, 8)),
        ({}, {"max_pages": 262_144}, "all-hit", (16, 256)),
        ({}, {}, "ragged", (256,)),
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
    # Candidates that are timed everywhere are chosen with the last.
    assert max(search.prefetch, key=search.prefetch.get) == list(search.prefetch)[-1]
    assert list(search.sizes) == sorted(set(search.sizes))
    assert hasattr(PRODUCTION, str(search.shared_field))


def test_prefetch_is_what_the_op_takes():
    arguments = make(problem(), 1).arguments
    told = {name: replace(arguments, **scalars) for name, scalars in WORKLOAD.prefetch.items()}
    assert {name: one.prefetch for name, one in told.items()} == {
        name: name for name in ("none", "metadata", "state")
    }


def test_metadata_are_what_the_calls_of_a_step_share():
    tensors = WORKLOAD.spec.arguments.declared_tensors()
    names = {one.name for one in tensors if not one.is_float and not one.optional}
    assert set(WORKLOAD.metadata) == names
