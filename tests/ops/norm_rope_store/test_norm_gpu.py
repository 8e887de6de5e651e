"""The kernels on a GPU: the bytes of the CPU reference, however they are run; safe, capturable."""

import itertools
import zlib
from dataclasses import replace

import gate
import numpy as np
import pytest
import torch
from graphs import captured
from norm_calls import (
    FLOATS,
    HEAD_DIMS,
    OUTPUTS,
    Call,
    assert_is,
    assert_stores,
    every_bf16,
    fits,
    make,
    random_call,
    run_op,
    run_variant,
    special_rows,
    variant_of,
    ways,
)
from numerics import assert_same_bits

import kvfold
import kvfold.torch_ops  # registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import Variant, load_table
from kvfold.ops.norm_rope_store import reference
from kvfold.ops.norm_rope_store.spec import ROW_WARPS, SPEC, WARPS, Problem, Tuning
from kvfold.runtime import dispatch, driver
from kvfold.runtime.arguments import check

pytestmark = pytest.mark.gpu

TABLE = [variant for variant in load_table().variants if variant.op == "norm_rope_store"]
PROBLEMS = list(dict.fromkeys(variant.problem for variant in TABLE))
FORMATS = load_table().formats
EVERY_WAY = [(name, *way) for name, format in FORMATS.items() for way in ways(format)]
PREFETCH = ("none", "metadata", "state")
ALL = {"latent_out": "fp32", "rows_out": "bf16", "codes_out": "", "scales_out": ""}
SWAPPED = ALL | {"latent_out": "bf16", "rows_out": "fp32"}

each_way = pytest.mark.parametrize(("name", "rounding", "rotate"), EVERY_WAY)


def name_of(one: Problem) -> str:
    return "_".join(one.symbol_parts())


each_problem = pytest.mark.parametrize("one", PROBLEMS, ids=name_of)


def rng(*words) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def cuda_variants(one: Problem) -> list[Variant]:
    """CUDA variants of a problem: of the table, of any number of warps, and with rows shared."""
    found = [v for v in TABLE if v.problem == one and v.backend == "cuda"]
    tunings = [Tuning(warps=warps) for warps in WARPS]
    for row_warps in ROW_WARPS:
        if 128 * row_warps <= one.head_dim:
            tunings += [
                Tuning(warps=row_warps, row_warps=row_warps),
                Tuning(warps=8, row_warps=row_warps, min_ctas=3),
            ]
    found += [Variant(problem=one, backend="cuda", tuning=tuning) for tuning in tunings]
    return list(dict.fromkeys(found))


def by_reference(call: Call) -> Call:
    """A copy of a call on the CPU, as the reference leaves it."""
    done = call.clone("cpu")
    reference.run(done)
    return done


def assert_all_store(variants: list[Variant], call: Call, what: str = "") -> None:
    """All variants make of a call what the reference makes of it."""
    expected = by_reference(call)
    for variant in variants:
        assert_stores(
            lambda c, v=variant: run_variant(v, c), call, expected, f"{variant.symbol} {what}"
        )


def kernel_fields(name: str, rounding: str, rotate: bool, head_dim: int) -> dict:
    """Fields of `make` for which one kernel is compiled; dtypes and rope_dim take turns."""
    seed = zlib.crc32(f"{name} {rounding} {rotate}".encode()) + HEAD_DIMS.index(head_dim)
    legal = [r for r in (0, 2, 64, 126, 128, head_dim) if fits(FORMATS[name], head_dim, r)]
    return {
        "format": name,
        "rounding": rounding,
        "rotate": rotate,
        "head_dim": head_dim,
        "rope_dim": legal[seed % len(legal)],
        "rows_dtype": FLOATS[seed % 2],
        "weight_dtype": FLOATS[seed // 2 % 2],
        "outputs": (ALL, SWAPPED)[seed // 4 % 2],
    }


def calls_of(fields: dict) -> list[Call]:
    """Calls that one kernel serves: plain, with gaps and odd pages, and of special values."""
    head_dim = fields["head_dim"]
    odd = {"strided": True, "rope_layout": "interleaved", "rows_per_page": 5, "padding": 20}
    special = special_rows(rng(*fields.values()), head_dim)
    others = [
        {"num_rows": 37, "rows_per_page": 64, "skipped": 0.2},
        {"num_rows": 37, **odd, "skipped": 0.2, "seed": 1},
        {"values": special, "eps": 0.0, "rope_layout": "transposed"},
        {"values": special, "eps": 1e-30},
        {"values": every_bf16(head_dim), "eps": 0.0},
    ]
    return [make(**fields, **other, device="cuda") for other in others]


@pytest.fixture
def backend(request, monkeypatch):
    """The backend that serves all calls of the test."""
    monkeypatch.setenv("KVFOLD_BACKEND", request.param)
    dispatch.reload()
    yield request.param
    monkeypatch.undo()
    dispatch.reload()


BOTH_BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)


# ---- Right ---------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cuda_variants_store_what_the_reference_stores(name, rounding, rotate, head_dim):
    warps = rng(name, rounding, rotate, head_dim).choice(WARPS)
    for number, call in enumerate(calls_of(kernel_fields(name, rounding, rotate, head_dim))):
        assert_all_store([variant_of(call, "cuda", int(warps))], call, f"call {number}")


@each_way
def test_the_triton_variant_stores_what_the_reference_stores(name, rounding, rotate):
    head_dim = int(rng(name, rounding, rotate).choice(HEAD_DIMS))
    for number, call in enumerate(calls_of(kernel_fields(name, rounding, rotate, head_dim))):
        assert_all_store([variant_of(call, "triton", 1)], call, f"call {number}")


@each_problem
def test_every_variant_of_the_table_stores_what_the_reference_stores(one):
    fields = {"head_dim": one.head_dim, "rows_dtype": one.rows_dtype, "outputs": ALL}
    for call in calls_of(fields):
        assert_all_store([variant for variant in TABLE if variant.problem == one], call)


@pytest.mark.parametrize("seed", range(100))
def test_random_calls(seed):
    call = random_call(seed, device="cuda")
    assert_all_store([variant_of(call, "cuda", WARPS[seed % len(WARPS)])], call)


@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("scale", [None, 1.0, 0.37, 1e-30, 1e30, 0.0, -2.0, np.inf, np.nan])
def test_the_scale_of_the_caller(scale, kind):
    call = make(format="fp8_tensor", num_rows=16, scale=scale, outputs=ALL, device="cuda")
    assert_all_store([variant_of(call, kind, 1)], call)


@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("count", range(5))
def test_any_optional_outputs_may_be_given(count, kind):
    for outputs in itertools.combinations(OUTPUTS, count):
        call = make(outputs=outputs, num_rows=9, device="cuda")
        assert_all_store([variant_of(call, kind, 1)], call, str(outputs))


@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("more_bytes", [0, 4, 8, 12])
def test_pages_at_every_multiple_of_4_bytes(more_bytes, kind):
    """Pages whose address is a multiple of 16 take another way."""
    for name, format in FORMATS.items():
        if kind == "triton" and name not in ("mixed_584", "fp4_288_interleaved"):
            continue
        head_dim = 512 if fits(format, 512, 64) else 128
        call = make(
            format=name,
            head_dim=head_dim,
            num_rows=20,
            rows_per_page=3,
            more_bytes=more_bytes,
            outputs=["codes_out", "scales_out"],
            device="cuda",
        )
        assert_all_store([variant_of(call, kind, 1)], call, name)


@BOTH_BACKENDS
def test_many_rows_by_the_variants_that_dispatch_chooses(backend):
    for num_rows in (1, 2048, 2049, 20_000):
        call = make(num_rows=num_rows, rows_per_page=64, outputs=ALL, skipped=0.1, device="cuda")
        assert_stores(run_op, call, by_reference(call), str(num_rows))


def test_a_cache_and_rows_of_more_than_2_to_the_31_bytes():
    """The last rows are stored in the last page, which no 32-bit offset reaches."""
    call = make(num_rows=64, rows_per_page=64, more_pages=0, device="cuda")
    call.slots.copy_(torch.arange(64))
    expected = by_reference(call)
    num_rows = (1 << 22) + 64
    rows = torch.zeros(num_rows, 512, dtype=torch.bfloat16, device="cuda")
    rows[-64:] = call.rows
    positions = torch.full((num_rows,), -1, dtype=torch.int32, device="cuda")
    positions[-64:] = call.positions
    slots = torch.arange(num_rows, device="cuda")
    cache = torch.zeros(num_rows // 64, call.cache.size(1), dtype=torch.uint8, device="cuda")
    large = replace(call, rows=rows, positions=positions, slots=slots, cache=cache)
    run_op(large)
    assert torch.equal(cache[-1].cpu(), expected.cache[0])
    assert not cache[:-1].any()


@pytest.fixture
def own_formats(tmp_path, monkeypatch):
    """A table with a few formats that the shipped one lacks is in force."""
    formats = {
        "fp4_tensor": "{code: fp4_e2m1, scale: tensor, ties: down, rope: bf16}",
        "fp8_down": "{code: fp8_e4m3, block: 32, scale: fp32, floor: 1e-3, ties: down, rope: bf16,"
        " scale_bytes: 32, placement: after_row}",
        "fp8_e4m3_scale": "{code: fp8_e4m3, block: 128, scale: e4m3, placement: after_page}",
        "fp8_block16": "{code: fp8_e4m3, block: 16, scale: e8m0, rule: pow2, floor: 1e-4,"
        " scale_bytes: 40}",
        "fp4_fp32_scale": "{code: fp4_e2m1, block: 64, scale: fp32, ties: down, rope: bf16}",
        "fp8_whole_row": "{code: fp8_e4m3, block: 512, scale: fp32, placement: after_row}",
    }
    file = tmp_path / "formats.yaml"
    lines = [f"  {name}: {fields}" for name, fields in formats.items()]
    file.write_text("\n".join(["version: 1", "cache_formats:", *lines, ""]))
    monkeypatch.setenv("KVFOLD_CONFIG", str(file))
    dispatch.reload()
    yield list(formats)
    monkeypatch.undo()
    dispatch.reload()


@pytest.mark.parametrize("kind", ["cuda", "triton"])
def test_formats_of_ones_own(own_formats, kind):
    for name in own_formats:
        for seed in range(6 if kind == "cuda" else 1):
            call = random_call(seed, format=name, device="cuda")
            assert_all_store([variant_of(call, kind, 1)], call, f"{name} {seed}")


# ---- Safe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_random_slots_and_positions_touch_nothing_outside(share, kind):
    """Guard zones and gaps stay as they are, and so do rows that are skipped."""
    random = rng(share)
    for name in ("mixed_584", "fp4_288_interleaved", "fp8_block128"):
        call = make(
            format=name, num_rows=300, rows_per_page=7, padding=36, outputs=ALL, device="cuda"
        )
        for field, bits in (("slots", 64), ("positions", 32)):
            values = getattr(call, field)
            nonsense = random.integers(
                -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 300, endpoint=True, dtype=f"int{bits}"
            )
            chosen = torch.from_numpy(random.random(300) < share).to("cuda")
            values.copy_(torch.where(chosen, torch.from_numpy(nonsense).to("cuda"), values))
        assert_all_store([variant_of(call, kind, 1)], call, name)


@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("field", ["slots", "positions"])
def test_slots_and_positions_next_to_the_ends(field, kind):
    call = make(num_rows=14, outputs=ALL, device="cuda")
    bound = call.cache.size(0) * call.rows_per_page if field == "slots" else 33
    bits = 64 if field == "slots" else 32
    outside = [-1, -bound, bound, bound + 1, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1]
    if bits == 64:
        outside += [2**31, 2**32, -(2**31), -(2**32), 2**32 + 1]
    values = getattr(call, field)
    values[: len(outside)] = torch.tensor(outside, dtype=values.dtype)
    values[-1] = bound - 1
    if field == "slots":
        values[-2] = 0
        values[-3] = -1
    assert_all_store([variant_of(call, kind, 1)], call)


def test_no_rows_and_no_positions():
    assert_stores(run_op, make(num_rows=0, outputs=ALL, device="cuda"))
    call = make(outputs=ALL, device="cuda")
    for changed in ({"rope_table": call.rope_table[:0]}, {"cache": call.cache[:0]}):
        spoiled = replace(call, **changed)
        before = spoiled.clone("cpu")
        run_op(spoiled)
        assert_is(spoiled, before)


# ---- The same bytes ------------------------------------------------------------------------------


@each_problem
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", ["mixed_584", "fp8_block128", "fp4_288"])
def test_bytes_depend_on_neither_the_batch_nor_the_warps(name, rotate, one):
    variants = cuda_variants(one)
    crowd = make(
        format=name,
        head_dim=one.head_dim,
        num_rows=300,
        rows_dtype=one.rows_dtype,
        rotate=rotate,
        outputs=ALL,
        device="cuda",
    )
    expected = by_reference(crowd)
    for variant in variants:
        mine = crowd.clone()
        run_variant(variant, mine)
        assert_is(mine, expected, variant.symbol)
        for index in (0, 1, 150, 299):
            alone = crowd.taken([index])
            run_variant(variant, alone)
            for output in ("codes_out", "scales_out"):
                assert torch.equal(getattr(alone, output)[0], getattr(mine, output)[index])
            for output in ("latent_out", "rows_out"):
                assert_same_bits(getattr(alone, output)[0], getattr(mine, output)[index])


@pytest.mark.parametrize("rotate", [False, True])
def test_rows_in_fp32_give_the_bytes_of_the_same_values_in_bf16(rotate):
    narrow = make(num_rows=40, rotate=rotate, outputs=["codes_out"], device="cuda")
    wide = replace(narrow.clone(), rows=narrow.rows.float())
    run_op(narrow)
    run_op(wide)
    assert torch.equal(wide.cache, narrow.cache)
    assert torch.equal(wide.codes_out, narrow.codes_out)


# ---- Repeated calls ------------------------------------------------------------------------------


@BOTH_BACKENDS
def test_repeated_calls_with_and_without_optional_tensors(backend):
    """The second and later calls of a layout skip the dispatcher. Each is on new memory."""
    dispatch.reload()
    chosen = [(), OUTPUTS, ["codes_out"], ["scales_out"], ["latent_out"], ["rows_out"]]
    calls = [make(outputs=outputs, device="cuda") for outputs in chosen]
    calls += [make(outputs=SWAPPED, device="cuda"), make(outputs=ALL, device="cuda")]
    calls += [make(format="fp8_tensor", scale=scale, device="cuda") for scale in (None, 0.37, 1.0)]
    expected = [by_reference(call) for call in calls]
    for turn in range(4):
        for call, wanted in zip(calls, expected, strict=True):
            assert_stores(run_op, call, wanted, f"turn {turn}")
    for call, wanted in zip(calls, expected, strict=True):
        for turn in range(3):
            assert_stores(run_op, call, wanted, f"in a row, {turn}")


def test_repeated_calls_with_other_numbers():
    dispatch.reload()
    calls = [
        make(eps=eps, rounding=rounding, rotate=rotate, outputs=ALL, device="cuda")
        for eps, rounding, rotate in itertools.product(
            (1e-6, 0.5), ("once", "each_step"), (False, True)
        )
    ]
    calls += [make(format=name, device="cuda") for name in ("mixed_584", "mixed_584_low_floor")]
    calls += [make(rows_per_page=4, more_bytes=584, device="cuda")]
    calls += [replace(calls[-1].clone(), rows_per_page=5)]  # the same tensors
    expected = [by_reference(call) for call in calls]
    for turn in range(3):
        for call, wanted in zip(calls, expected, strict=True):
            assert_stores(run_op, call, wanted, f"turn {turn}")


def test_a_repeated_call_with_memory_that_is_not_aligned_is_refused():
    call = make(outputs=["latent_out", "codes_out"], device="cuda")
    for _ in range(3):
        run_op(call)
    for name, elements in (("rows", 1), ("latent_out", 4), ("codes_out", 2), ("cache", 2)):
        tensor = getattr(call, name)
        flat = torch.zeros(64 + tensor.size(0) * tensor.stride(0), dtype=tensor.dtype).to("cuda")
        moved = flat.as_strided(tensor.shape, tensor.stride(), elements)
        with pytest.raises(ValueError, match=f"{name} is at an address"):
            run_op(replace(call, **{name: moved}))
        assert not flat.any()


def test_a_call_is_one_launch(monkeypatch):
    call = make(num_rows=100, outputs=ALL, device="cuda")
    run_op(call)
    constants = check(SPEC, call).constants
    kernel = dispatch.launcher(call.problem, 100, call.rows.device, constants)
    assert isinstance(kernel, driver.Kernel)
    launches = []
    launch = kernel.cu_launch

    def counted(*args):
        launches.append(args)
        return launch(*args)

    monkeypatch.setattr(kernel, "cu_launch", counted)
    for count in range(1, 4):
        run_op(call)
        assert len(launches) == count


# ---- Graphs and streams --------------------------------------------------------------------------


@pytest.fixture
def first_use(tmp_path, monkeypatch):
    """As in a new process with an empty cache: no kernel is loaded."""
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_kernels", {})
    dispatch.reload()
    yield
    dispatch.reload()


@BOTH_BACKENDS
@pytest.mark.parametrize("outputs", [{}, ALL], ids=["plain", "all outputs"])
def test_a_first_call_can_be_captured_and_replayed_with_other_values(first_use, backend, outputs):
    calls = [
        make(num_rows=50, outputs=outputs, skipped=0.3, seed=seed, device="cuda")
        for seed in range(4)
    ]
    replay = captured(run_op, calls[0])

    for call in [*calls, calls[0]]:
        assert_stores(replay, call, by_reference(call))


def test_a_call_launches_on_the_current_stream_and_never_synchronises():
    call = make(num_rows=100, outputs=ALL, device="cuda")
    want = call.clone()
    run_op(want)
    run_op(call.clone())
    stream = torch.cuda.Stream()
    late = call.rows.clone()
    call.rows.zero_()
    torch.cuda.synchronize()
    # Work on another stream would not wait for the gate.
    with torch.cuda.stream(stream), gate.closed():
        torch.cuda.set_sync_debug_mode("error")
        try:
            call.rows.copy_(late)
            run_op(call)
            assert not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_is(call, want.clone("cpu"))


def chain(prefetch: str, layers: int = 6, steps: int = 8) -> list[torch.Tensor]:
    """The caches that a captured graph of several calls leaves after every step.

    The kernel right before each call computes the call's rows into one buffer that all calls share.
    """
    calls = [
        make(num_rows=200, prefetch=prefetch, outputs=ALL, seed=seed, device="cuda")
        for seed in range(layers)
    ]
    rows = torch.empty_like(calls[0].rows)
    calls = [replace(call, rows=rows, slots=calls[0].slots) for call in calls]
    weights = torch.randn(layers, 64, rows.size(1), device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(rows.size(0), 64, device="cuda", dtype=torch.bfloat16)

    def step():
        for layer, call in enumerate(calls):
            rows.copy_(hidden @ weights[layer])
            run_op(call)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found = []
    for _ in range(steps):
        hidden.copy_(torch.randn_like(hidden))
        graph.replay()
        found += [call.cache.clone() for call in calls]
        found += [call.codes_out.clone() for call in calls]
    return found


def test_prefetch_changes_no_byte():
    results = []
    for prefetch in PREFETCH:
        torch.manual_seed(0)
        results.append(chain(prefetch))
    assert not torch.equal(results[0][0], results[0][len(results[0]) // 2])
    for other in results[1:]:
        for mine, wanted in zip(other, results[0], strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_call_waits_for_the_one_before_it(backend, prefetch):
    """Each call's rows are the rows_out of the call before it (programmatic dependent launch)."""
    first = make(
        format="bf16", num_rows=2000, rows_dtype="fp32", rope_dim=128, prefetch=prefetch,
        outputs={"rows_out": "fp32"}, device="cuda",
    )  # fmt: skip
    calls = [first]
    for _ in range(11):
        before = calls[-1]
        calls.append(replace(before.clone(), rows=before.rows_out))

    def run_calls():
        for call in calls:
            run_op(call)

    for call in calls:
        call.cache.zero_()
    run_calls()
    expected = [(call.rows_out.clone(), call.cache.clone()) for call in calls]
    for call in (calls[0], calls[-1]):
        assert_is(call, by_reference(call))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_calls()
    for _ in range(20):
        for call in calls:
            call.rows_out.fill_(torch.nan)
            call.cache.zero_()
        graph.replay()
        for call, (rows, cache) in zip(calls, expected, strict=True):
            assert_same_bits(call.rows_out, rows)
            assert torch.equal(call.cache, cache)


# ---- torch.library and torch.compile -------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"outputs": ALL, "rotate": True}], ids=["plain", "all"])
def test_opcheck(fields):
    args, kwargs = make(**fields, device="cuda").args_and_kwargs()
    torch.library.opcheck(torch.ops.kvfold.norm_rope_store.default, args, kwargs)


@pytest.mark.parametrize("outputs", [{}, ALL], ids=["plain", "all outputs"])
def test_torch_compile_with_inductor(outputs):
    def step(factor, kwargs, rows, *rest):
        kvfold.norm_rope_store(rows * factor, *rest, **kwargs)
        return rest[4] + 1  # the cache

    call = make(num_rows=30, outputs=outputs, rope_layout="interleaved", device="cuda")
    halved = replace(call.clone(), rows=call.rows * 0.5)
    expected = by_reference(halved)
    args, kwargs = call.args_and_kwargs()
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True)(0.5, kwargs, *args)
    assert torch.equal(got.cpu(), expected.cache + 1)
    assert_is(replace(call, rows=halved.rows), expected)


def test_tensors_on_the_cpu_and_the_gpu_are_refused():
    call = make(outputs=ALL, device="cuda")
    for name in ("positions", "slots", "codes_out"):
        elsewhere = replace(call, **{name: getattr(call, name).cpu()})
        with pytest.raises(ValueError, match=f"{name} is on cpu; accepted: cuda:0, where rows is"):
            run_op(elsewhere)
