"""The kernels on a GPU: right, the same bits however they are run, safe, capturable."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gate
import problems
import pytest
import torch
from contract import CASES
from numerics import assert_does_its_job, assert_same_bits

import kvfold
from kvfold import dispatch, nvrtc
from kvfold.bench import cases
from kvfold.codegen import TableError, Variant, load_table
from kvfold.ops.paged_kv_compress import reference
from kvfold.ops.paged_kv_compress.op import OP, run_variant

pytestmark = pytest.mark.gpu

TABLE = load_table()
BACKENDS = ("cuda", "triton")
KEYS = sorted({variant.key for variant in TABLE.variants})
PRODUCTION = (512, 128, False, "bf16", "fp32", 4)
SOME_KEYS = [
    PRODUCTION,
    (512, 128, False, "fp32", "bf16", 3),
    (128, 128, False, "bf16", "bf16", 4),
    (512, 4, True, "bf16", "fp32", 4),
    (128, 4, True, "fp32", "fp32", 1),
]


def problem_of(key) -> dict:
    return dict(zip(Variant.spec("problem"), key, strict=True))


def variants_of(key, backend: str) -> list[Variant]:
    return [v for v in TABLE.variants if v.key == key and v.backend == backend]


def all_variants(key) -> list[Variant]:
    """Every CUDA variant of the problem that there can be, within reason; in the table or not."""
    found = []
    for schedule in ("direct", "persistent"):
        for reduce_warps in (1, 2, 8, 16):
            for head_slice in (16, 32, 128, 512):
                with contextlib.suppress(TableError):
                    tuning = {"reduce_warps": reduce_warps, "head_slice": head_slice}
                    variant = Variant(
                        op=OP, backend="cuda", schedule=schedule, **problem_of(key), **tuning
                    )
                    variant.check_shared("sm_90")
                    found.append(variant)
    assert len({variant.schedule for variant in found}) == 2 and len(found) > 8
    return found


def schedules_of(key) -> list[Variant]:
    """The table's CUDA variants of the problem, and under every schedule that they can have."""
    found = dict.fromkeys(variants_of(key, "cuda"))
    for variant in list(found):
        for schedule in Variant.spec("tuning")["schedule"]["legal"]:
            with contextlib.suppress(TableError):
                found[replace(variant, schedule=schedule)] = None
    assert len({variant.schedule for variant in found}) == 2
    return list(found)


def spans_for(compress_ratio: int, next_n: int) -> list[tuple[int, int]]:
    """Requests that close a window with their first, a middle or the last token, or none; the
    first window and later ones; padding; and nothing but new tokens."""
    ends = [compress_ratio + late for late in range(next_n)]
    spans = [(end - next_n, next_n) for end in ends if end >= next_n]
    spans += [(2 * compress_ratio + start, new) for start, new in spans]
    spans += [(0, next_n), (0, 0), (3 * compress_ratio - 1, 1), (5, 0), (compress_ratio, next_n)]
    return spans


# ---- Right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_table_variants_do_their_job(key, backend):
    problem = problem_of(key)
    ratio, next_n = problem["compress_ratio"], problem["next_n"]
    layouts = [("split", 32), ("packed", 7), ("strided", 128)]
    for seed, (layout, page_size) in enumerate(layouts):
        for variant in variants_of(key, backend):
            case = problems.make(
                spans_for(ratio, next_n), **problem, layout=layout, page_size=page_size,
                output_dtype=("bf16", "fp32")[seed % 2], seed=seed, device="cuda",
            )  # fmt: skip
            assert_does_its_job(lambda *args, v=variant: run_variant(v, *args), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_random_problems(seed, backend):
    """All fields at random, sizes that no table row has."""
    case = problems.random_problem(seed, head_dim=(8, 16, 64, 128)[seed % 4], device="cuda")
    tuning = {"backend": backend, "reduce_warps": 1 << seed % 4}
    variant = Variant(op=OP, **case.key, head_slice=(8, 16, 32, 64)[seed % 4], **tuning)
    assert_does_its_job(lambda *args: run_variant(variant, *args), case)


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    """Every line of the contract, by CUDA variants that deal out a window in different ways."""
    case = CASES[name]().clone("cuda")
    head_dim = case.key["head_dim"]
    for reduce_warps, head_slice in ((1, head_dim), (2, 8), (8, min(head_dim, 128))):
        tuning = {"backend": "cuda", "reduce_warps": reduce_warps, "head_slice": head_slice}
        variant = Variant(op=OP, **case.key, **tuning)
        assert_does_its_job(lambda *args, v=variant: run_variant(v, *args), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_dim_that_one_row_adds(backend, tmp_path, monkeypatch):
    table = tmp_path / "table.yaml"
    table.write_text(
        "version: 1\npaged_kv_compress:\n"
        "  - {head_dim: 256, compress_ratio: [4, 128], kv_dtype: [bf16, fp32], state_dtype: [bf16, "
        "fp32], next_n: [1, 2, 3, 4], backend: [cuda, triton], reduce_warps: 4, head_slice: 64}\n"
    )
    monkeypatch.setenv("KVFOLD_CONFIG", str(table))
    monkeypatch.setenv("KVFOLD_BACKEND", backend)
    dispatch.reload()
    try:
        for ratio in (4, 128):
            fields = {"head_dim": 256, "compress_ratio": ratio, "next_n": 3, "page_size": 16}
            case = problems.make(spans_for(ratio, 3), **fields, device="cuda")
            assert_does_its_job(kvfold.paged_kv_compress, case)
    finally:
        monkeypatch.undo()
        dispatch.reload()


def test_persistent_ctas_whose_new_rows_change_threads_from_window_to_window():
    """Token 0 is row 15 of one request's window and row 16 of the next one's, in another warp."""
    spans = [(15, 2), (16, 1)] * 300
    case = problems.make(spans, head_dim=64, compress_ratio=17, next_n=2, device="cuda")
    variant = Variant(
        op=OP, **case.key, backend="cuda", schedule="persistent", reduce_warps=2, head_slice=64
    )
    for _ in range(5):
        assert_does_its_job(lambda *args: run_variant(variant, *args), case.clone())


def test_windows_of_a_request_take_the_slots_in_which_the_last_ones_partials_lie():
    spans = [(start % 8, 16) for start in range(300)]
    case = problems.make(spans, head_dim=128, compress_ratio=8, next_n=16, device="cuda")
    variant = Variant(op=OP, **case.key, backend="cuda", reduce_warps=2, head_slice=128)
    for _ in range(5):
        assert_does_its_job(lambda *args: run_variant(variant, *args), case.clone())


# ---- The same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SOME_KEYS, ids=str)
def test_every_cuda_variant_gives_the_same_bits(key):
    problem = problem_of(key)
    spans = spans_for(problem["compress_ratio"], problem["next_n"])
    case = problems.make(spans, **problem, page_size=16, output_dtype="fp32", device="cuda")
    first = None
    with ThreadPoolExecutor(4) as pool:  # NVRTC compiles outside of Python's lock
        list(
            pool.map(
                lambda variant: nvrtc.cubin_for(variant, dispatch.arch_of(case.ape.device)),
                all_variants(key),
            )
        )
    for variant in all_variants(key):
        mine = case.clone()
        run_variant(variant, *mine.args())
        first = first or mine
        for name in problems.MUTATED:
            assert_same_bits(getattr(mine, name), getattr(first, name), f"{variant.symbol} {name}")


@pytest.mark.parametrize("key", SOME_KEYS, ids=str)
def test_a_cuda_window_has_the_same_bits_whenever_its_rows_came(key):
    """All new tokens at once, and one by one, so that the last finds the others in the state."""
    problem = problem_of(key)
    ratio, next_n = problem["compress_ratio"], problem["next_n"]
    at_once = problems.make(
        [(2 * ratio - next_n, next_n)] * 3, **problem, output_dtype="fp32", device="cuda"
    )
    for variant in schedules_of(key):
        mine, one = at_once.clone(), at_once.clone()
        run_variant(variant, *mine.args())
        for token in range(next_n):
            args = list(one.args())
            args[0] = at_once.kv_score[token::next_n].contiguous()
            args[7] = at_once.kv_lens - (next_n - 1 - token)
            args[8] = torch.arange(4, dtype=torch.int32, device="cuda")
            run_variant(variant, *args)
        for name in problems.MUTATED:
            assert_same_bits(getattr(mine, name), getattr(one, name), f"{variant.symbol} {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", SOME_KEYS, ids=str)
def test_bits_do_not_depend_on_run_neighbours_position_or_pages(key, backend):
    """One request alone, then among 2 to 512 others at various places, pages shuffled anew."""
    problem = problem_of(key)
    ratio, next_n = problem["compress_ratio"], problem["next_n"]
    alone = problems.make(
        [(2 * ratio - next_n, next_n)], **problem, page_size=16, output_dtype="fp32", device="cuda"
    )
    for variant in schedules_of(key) if backend == "cuda" else variants_of(key, backend):
        for batch in (1, 2, 17, 512):
            for place in {0, batch // 2, batch - 1}:
                crowd = cases.make(
                    **problem, batch=batch, scenario="all-hit", page_size=16, output_dtype="fp32",
                    device="cuda", seed=batch,
                )  # fmt: skip
                transplant(alone, crowd, place)
                twin = alone.clone()
                run_variant(variant, *twin.args())
                for _ in range(2):
                    run_variant(variant, *crowd.args())
                    row = int(crowd.cu_outputs[place])
                    assert_same_bits(crowd.output[row], twin.output[0], f"{variant.symbol} {batch}")


def transplant(one: problems.Problem, crowd: cases.Case, place: int) -> None:
    """Puts the only request of `one` in the place of another in a crowd of the same page size."""
    length = int(one.kv_lens[0])
    pages = -(-length // one.paged_kv.size(1))
    crowd.kv_lens[place] = length
    begin, end = crowd.cu_seq_lens[place : place + 2].tolist()
    crowd.kv_score[begin:end] = one.kv_score
    crowd.ape.copy_(one.ape)
    for pool, table in (("paged_kv", "block_table_kv"), ("paged_score", "block_table_score")):
        old_pages = getattr(one, table)[0, :pages].long()
        new_pages = getattr(crowd, table)[place, :pages].long()
        assert (new_pages >= 0).all()
        getattr(crowd, pool)[new_pages] = getattr(one, pool)[old_pages]


# ---- Safe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_metadata_touches_nothing_outside(seed, share, backend):
    """Random 32-bit integers in every table: guard zones stay, and the oracle agrees."""
    fields = {"head_dim": 64, "compress_ratio": (4, 16)[seed % 2], "next_n": 4, "reserve": 8}
    layout = ("split", "packed", "strided")[seed % 3]
    case = problems.random_problem(seed, **fields, layout=layout, page_size=(3, 16)[seed // 2 % 2])
    case = problems.scramble(case, share, seed).clone("cuda")
    variant = Variant(op=OP, **case.key, backend=backend, reduce_warps=2, head_slice=32)
    assert_does_its_job(lambda *args: run_variant(variant, *args), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzzed_metadata_at_production_shape(backend):
    for seed in range(3):
        case = problems.make(
            spans_for(128, 4), **problem_of(PRODUCTION), page_size=32, reserve=2, seed=seed
        )
        case = problems.scramble(case, (0.05, 0.3, 1.0)[seed], seed).clone("cuda")
        for variant in variants_of(PRODUCTION, backend):
            assert_does_its_job(lambda *args, v=variant: run_variant(v, *args), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_past_2_31_elements(backend):
    """The pages at the end of a pool of more than 2^31 elements hold what small pools would."""
    problem = problem_of((512, 128, False, "bf16", "bf16", 4))
    small = cases.make(**problem, batch=3, page_size=64, device="cuda")
    num_pages = 2**31 // (64 * 512) + 64
    needed = 2 * 2 * num_pages * 64 * 512 + (2 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    shift = num_pages - small.paged_kv.size(0)
    large = dict(zip(small.__dataclass_fields__, small.args(), strict=False))
    for pool, table in (("paged_kv", "block_table_kv"), ("paged_score", "block_table_score")):
        large[pool] = torch.empty(num_pages, 64, 512, dtype=torch.bfloat16, device="cuda")
        large[pool][shift:] = getattr(small, pool)
        large[table] = getattr(small, table) + shift
    large["output"] = small.output.clone()
    variant = variants_of((512, 128, False, "bf16", "bf16", 4), backend)[0]
    run_variant(variant, *small.args())
    run_variant(variant, *large.values())
    assert large["paged_kv"].numel() > 2**31
    assert_same_bits(large["output"], small.output)
    for pool in ("paged_kv", "paged_score"):
        assert_same_bits(large[pool][shift:], getattr(small, pool))


# ---- Graphs, streams, threads, devices, torch.compile --------------------------------------------


@pytest.fixture
def first_use(tmp_path, monkeypatch):
    """As in a new process with an empty cache: nothing is loaded."""
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_kernels", {})
    dispatch.reload()
    yield
    dispatch.reload()


@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_at_first_call_and_replay_with_other_lengths(backend, first_use, monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", backend)
    dispatch.reload()
    fields = problem_of((128, 4, True, "bf16", "fp32", 3)) | {"page_size": 8, "reserve": 2}
    steps = [
        problems.make(spans, **fields, seed=seed, device="cuda")
        for seed, spans in enumerate([[(9, 3), (8, 3), (0, 0)], [(1, 3), (11, 3), (0, 0)]])
    ]
    static = steps[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kvfold.paged_kv_compress(*static.args())

    def replay(*args):
        for mine, value in zip(static.args(), args, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(value)
        graph.replay()
        for mine, value in zip(static.args(), args, strict=True):
            if isinstance(mine, torch.Tensor):
                value.copy_(mine)

    shapes = [[x.shape for x in step.args() if isinstance(x, torch.Tensor)] for step in steps]
    assert shapes[0] == shapes[1]
    for step in [*steps, steps[0]]:
        assert_does_its_job(replay, step)


def test_launches_on_the_current_stream_and_never_synchronises():
    case = cases.make(batch=4, device="cuda")
    want = cases.make(batch=4, device="cuda")
    kvfold.paged_kv_compress(*want.args())
    stream = torch.cuda.Stream()
    late = case.kv_score.clone()
    case.kv_score.zero_()
    torch.cuda.synchronize()
    # What runs on another stream does not wait for the gate.
    with torch.cuda.stream(stream), gate.closed():
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.kv_score.copy_(late)
            kvfold.paged_kv_compress(*case.args())
            assert not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(case.output, want.output)


def chain(key, prefetch_state: bool, layers: int = 6) -> list:
    """Steps of decoding by one captured graph, on `layers` states whose new tokens a kernel right
    before each call computes; returns the outputs of every step and the states at the end."""
    problem = problem_of(key)
    next_n = problem["next_n"]
    made = [
        cases.make(**problem, batch=40, scenario="spread", device="cuda", seed=seed)
        for seed in range(layers)
    ]
    states = [made[0], *(cases.sharing_metadata(case, made[0]) for case in made[1:])]
    weights = torch.randn(3, 64, states[0].kv_score.size(1), device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(states[0].kv_score.size(0), 64, device="cuda", dtype=torch.bfloat16)
    kv_score = torch.empty_like(states[0].kv_score)  # one buffer for all layers

    def step():
        for layer, state in enumerate(states):
            kv_score.copy_((hidden @ weights[layer % 3]).to(kv_score.dtype))
            args = (kv_score, *state.args()[1:])
            kvfold.paged_kv_compress(*args, prefetch_state=prefetch_state)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    written = []
    for number in range(32):
        hidden.copy_(torch.randn_like(hidden))
        states[0].kv_lens.copy_(states[0].kv_lens + (number % 3 - 1) * next_n)  # on and back
        graph.replay()
        written += [state.output.clone() for state in states]
    return written + [pool for state in states for pool in (state.paged_kv, state.paged_score)]


@pytest.mark.parametrize("key", [PRODUCTION, (128, 4, True, "bf16", "fp32", 2)], ids=str)
def test_prefetching_the_state_changes_no_bit(key):
    results = []
    for prefetch_state in (False, True):
        torch.manual_seed(0)
        results.append(chain(key, prefetch_state))
    for mine, other in zip(*results, strict=True):
        assert_same_bits(mine, other)


def test_calls_in_a_row_on_one_state_see_each_other_unless_told_otherwise():
    """Each call overlaps the one before it (programmatic dependent launch) and must still wait."""
    case = cases.make(batch=40, head_dim=128, next_n=4, scenario="all-hit", device="cuda")
    steps = []
    for number in range(32):  # a whole window of new rows, each read back by the last step
        data = torch.randn_like(case.kv_score)
        steps.append((data, case.kv_lens - 4 * (31 - number)))
    graph = torch.cuda.CUDAGraph()

    def run():
        for data, lengths in steps:
            args = list(case.args())
            args[0], args[7] = data, lengths
            kvfold.paged_kv_compress(*args)

    run()
    with torch.cuda.graph(graph):
        run()
    want = cases.make(batch=40, head_dim=128, next_n=4, scenario="all-hit", device="cuda")
    for data, lengths in steps:
        args = list(want.args())
        args[0], args[7] = data, lengths
        kvfold.paged_kv_compress(*args)
        torch.cuda.synchronize()
    for _ in range(20):
        case.paged_kv.zero_()
        case.paged_score.zero_()
        graph.replay()
        assert_same_bits(case.output, want.output)


def test_several_threads_at_first_use(first_use):
    """Threads that have never touched CUDA launch the same new variant on streams of their own."""
    made = [cases.make(batch=3, device="cuda", seed=seed) for seed in range(8)]
    want = [cases.make(batch=3, device="cuda", seed=seed) for seed in range(8)]
    failures = []

    def work(case):
        try:
            for _ in range(20):
                kvfold.paged_kv_compress(*case.args())
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(case,)) for case in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for mine, other in zip(made, want, strict=True):
        kvfold.paged_kv_compress(*other.args())
        assert_same_bits(mine.output, other.output)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_gpu_of_the_same_process(backend, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setenv("KVFOLD_BACKEND", backend)
    dispatch.reload()
    try:
        assert torch.cuda.current_device() == 0
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            case = problems.make(spans_for(128, 4), **problem_of(PRODUCTION), device=device)
            assert_does_its_job(kvfold.paged_kv_compress, case)
            assert torch.cuda.current_device() == 0
    finally:
        monkeypatch.undo()
        dispatch.reload()


def test_torch_compile_with_inductor():
    def step(weight, *arguments):
        kv_score, *rest = arguments
        kvfold.paged_kv_compress((kv_score @ weight) * 1.0, *rest)
        return rest[5].float().nan_to_num().sum()

    eager, compiled = (cases.make(batch=8, layout="packed", device="cuda") for _ in range(2))
    weight = torch.eye(eager.kv_score.size(1), dtype=torch.bfloat16, device="cuda")
    want = step(weight, *eager.args())
    got = torch.compile(step, fullgraph=True)(weight, *compiled.args())
    assert want != 0
    torch.testing.assert_close(got, want)
    for name in problems.MUTATED:
        assert_same_bits(getattr(compiled, name), getattr(eager, name), name)


def test_opcheck():
    case = cases.make(batch=4, device="cuda")
    torch.library.opcheck(torch.ops.kvfold.paged_kv_compress.default, case.args())


def test_the_reference_serves_a_gpu_too():
    case = problems.make(spans_for(4, 3), head_dim=64, next_n=3, device="cuda")
    assert_does_its_job(reference.paged_kv_compress, case)


# ---- Compile and load ----------------------------------------------------------------------------


def test_first_use_and_cached_load_are_quick(tmp_path):
    """In a new process each: at most 1.5 s to compile, 50 ms to load from the cache.

    Processor time, and the least of some: what runs at the same time can only add to it.
    """
    program = (
        "import json, time, torch, kvfold\n"
        "from kvfold import dispatch\n"
        "device = torch.zeros(1, device='cuda').device\n"
        "began = time.process_time()\n"
        f"dispatch.launcher({OP!r}, {PRODUCTION!r}, 16, device)\n"
        "print(json.dumps(time.process_time() - began))\n"
    )
    environment = os.environ | {"KVFOLD_CACHE_DIR": str(tmp_path)}

    def seconds() -> float:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    assert seconds() < 1.5
    assert min(seconds() for _ in range(3)) < 0.05
