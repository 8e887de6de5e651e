"""The Triton kernel against the reference: compiled where there is a GPU, else interpreted."""

import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from norm_calls import (
    FLOATS,
    HEAD_DIMS,
    OUTPUTS,
    Call,
    assert_is,
    assert_stores,
    fits,
    make,
    random_call,
    random_rows,
    run_variant,
    special_rows,
    variant_of,
    ways,
)

from kvfold.codegen import CacheFormat, load_table
from kvfold.ops.norm_rope_store import reference
from kvfold.runtime import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = load_table().formats
WAYS = [(name, *way) for name, format in FORMATS.items() for way in ways(format)]
MADE_UP = {
    "fp4_tensor": CacheFormat(code="fp4_e2m1", scale="tensor", ties="down", rope="bf16"),
    "padded_fp32": CacheFormat(
        code="fp8_e4m3", block=16, scale="fp32", ties="down", rope="bf16", scale_bytes=132,
        placement="after_row",
    ),
    "fp8_e4m3_scales": CacheFormat(
        code="fp8_e4m3", block=64, scale="e4m3", floor=0.01, rope="bf16"
    ),
    "one_block": CacheFormat(code="fp4_e2m1", block=128, scale="fp32", rule="pow2", floor=1e-30),
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def run(call: Call, warps: int = 4) -> None:
    run_variant(variant_of(call, "triton", warps), call)


def by_reference(call: Call) -> Call:
    """A copy on the CPU, as the reference leaves it."""
    done = call.clone("cpu")
    reference.run(done)
    return done


def assert_matches(call: Call, warps: int = 4) -> None:
    """The kernel leaves all memory of the call as the reference does."""
    assert_stores(lambda mine: run(mine, warps), call, by_reference(call))


def rng(*names: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(names).encode()))


# ---- from the row to the values ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rounding", "rotate"), WAYS)
def test_every_format_and_rounding(name, rounding, rotate):
    random = rng(name, rounding, rotate)
    shapes = [
        (head_dim, rope_dim)
        for head_dim in HEAD_DIMS
        for rope_dim in (0, 64, 128, head_dim)
        if fits(FORMATS[name], head_dim, rope_dim)
    ]
    head_dim, rope_dim = shapes[random.integers(len(shapes))]
    values = random_rows(random, 4, head_dim)
    special = random.permutation(special_rows(random, head_dim))
    call = make(
        format=name,
        head_dim=head_dim,
        rope_dim=rope_dim,
        values=np.concatenate([values, special[:3]]),
        rounding=rounding,
        rotate=rotate,
        rows_dtype=random.choice(FLOATS),
        weight_dtype=random.choice(FLOATS),
        outputs={output: random.choice(FLOATS) for output in OUTPUTS},
        padding=4,
        skipped=0.2,
        device=DEVICE,
    )
    assert_matches(call)


@pytest.mark.parametrize("seed", range(10))
def test_random_calls(seed):
    assert_matches(random_call(seed, device=DEVICE))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rope", ["none", "some", "all"])
def test_every_width_with_rows_of_all_kinds(head_dim, rope):
    random = rng(head_dim, rope)
    values = random.permutation(special_rows(random, head_dim))[: 80 if DEVICE == "cuda" else 16]
    call = make(
        format="fp32",
        head_dim=head_dim,
        rope_dim={"none": 0, "some": 64, "all": head_dim}[rope],
        values=values,
        rows_dtype="fp32",
        weight_dtype="fp32",
        rotate=rope != "some",
        outputs={"latent_out": "fp32", "rows_out": "bf16"},
        device=DEVICE,
    )
    assert_matches(call)


@pytest.mark.parametrize("warps", [1, 2, 8, 16])
@pytest.mark.parametrize("head_dim", [128, 512])
def test_any_number_of_warps(warps, head_dim):
    call = make(head_dim=head_dim, num_rows=3, outputs=OUTPUTS, device=DEVICE)
    assert_matches(call, warps)


def test_without_optional_outputs_the_cache_is_the_same():
    call = make(num_rows=3, outputs=OUTPUTS, device=DEVICE)
    alone = replace(call.clone(), **dict.fromkeys(OUTPUTS))
    run(alone)
    assert torch.equal(alone.cache.cpu(), by_reference(call).cache)


# ---- places --------------------------------------------------------------------------------------


def test_a_row_whose_place_is_outside_is_skipped():
    call = make(num_rows=13, outputs=OUTPUTS, padding=16, strided=True, device=DEVICE)
    num_slots = call.cache.size(0) * call.rows_per_page
    slots = torch.tensor([-1, -(2**63), -(2**32), num_slots, num_slots + 1, 2**32, 2**63 - 1])
    positions = torch.tensor([-1, -(2**31), len(call.rope_table), 2**31 - 1], dtype=torch.int32)
    call.slots[:7] = slots.to(DEVICE)
    call.positions[7:11] = positions.to(DEVICE)
    assert_matches(call)
    call = replace(
        call,
        rows=call.rows[:11],
        positions=call.positions[:11],
        slots=call.slots[:11],
        **{name: getattr(call, name)[:11] for name in OUTPUTS},
    )
    before = call.clone()
    run(call)
    assert_is(call, before)


@pytest.mark.gpu
def test_a_page_may_start_behind_two_gibibytes():
    call = make(num_rows=12, rows_per_page=4, more_pages=0, device=DEVICE)
    memory = torch.zeros(2**31 + 2**20, dtype=torch.uint8, device=DEVICE)
    far = memory.as_strided(call.cache.shape, (2**30, 1))
    far.copy_(call.cache)
    run(replace(call, cache=far))
    assert torch.equal(far.cpu(), by_reference(call).cache)


# ---- quantisation --------------------------------------------------------------------------------


def edges(format: CacheFormat, columns: int, random: np.random.Generator) -> np.ndarray:
    """Columns in whose blocks the scale lies at a tie or next to one, and so does every code."""
    code = format.float_code
    if code.bits > 8:
        return (random.integers(0, 1 << 32, columns) & 0xFFFF8000).astype(np.uint32).view("f4")
    grid = np.array([code.value(i) for i in range(code.largest + 1)])
    width = format.block or 32
    blocks = random.choice((grid[1:] + grid[:-1]) / 2, (columns // width, width))
    blocks[:, 0] = grid[-1]
    scale = random.choice([1, 17 / 16, 19 / 16]) * np.exp2(
        random.integers(-16, 9, (len(blocks), 1))
    )
    values = (blocks * scale).astype(np.float32).reshape(columns)
    towards = random.choice([-np.inf, 0, np.inf], columns).astype(np.float32)
    values = np.where(towards == 0, values, np.nextafter(values, towards))
    return values * random.choice([-1, 1], columns).astype(np.float32)


def unit_call(name: str, weight: np.ndarray, scale: float | None = None) -> Call:
    """A call whose rows, after the norm, are the weight and its negative."""
    format, head_dim = dispatch.table().formats[name], len(weight)
    rope_dim = 64 if format.rope == "bf16" else 0
    still = np.stack([np.ones((1, rope_dim // 2)), np.zeros((1, rope_dim // 2))], axis=1)
    return make(
        format=name,
        head_dim=head_dim,
        rope_dim=rope_dim,
        values=np.stack([np.ones(head_dim), -np.ones(head_dim)]).astype(np.float32),
        weight=weight,
        rope_table=still.astype(np.float32),
        rows_dtype="fp32",
        weight_dtype="fp32",
        eps=0.0,
        scale=scale,
        outputs=("codes_out", "scales_out"),
        device=DEVICE,
    )


@pytest.mark.parametrize("name", [*FORMATS, *MADE_UP])
def test_codes_and_scales_at_the_edges(name, monkeypatch):
    for made_up, format in MADE_UP.items():
        monkeypatch.setitem(dispatch.table().formats, made_up, format)
    format, random = dispatch.table().formats[name], rng(name)
    special = random.permutation(special_rows(random, 256))
    weights = [edges(format, 256, random) for _ in range(2)] + list(special[:5])
    for weight in weights:
        assert_matches(unit_call(name, weight))


@pytest.mark.parametrize("scale", [0.37, 1e-30, 0.0, -2.0, np.inf, np.nan])
@pytest.mark.parametrize("name", ["fp8_tensor", "fp4_tensor"])
def test_a_scale_of_the_caller_divides_every_value(name, scale, monkeypatch):
    monkeypatch.setitem(dispatch.table().formats, "fp4_tensor", MADE_UP["fp4_tensor"])
    format, random = dispatch.table().formats[name], rng(name, scale)
    special = random.permutation(special_rows(random, 128))
    for weight in (edges(format, 128, random), *special[:3]):
        assert_matches(unit_call(name, weight, scale))


# ---- the compiled code ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What compile_norm_triton.py prints."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_norm_triton.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compiled_code_rounds_every_step_and_keeps_denormals(compiled):
    for name, instructions in compiled["instructions"].items():
        floating = {one for one in instructions if one.endswith(".f32") and "cvt" not in one}
        arithmetic = {one for one in floating if not one.startswith(("selp", "setp", "mov", "neg"))}
        allowed = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
        assert {"div.rn.f32", "sqrt.rn.f32"} <= arithmetic <= allowed, name


def test_no_number_and_no_metadata_makes_a_kernel_of_its_own(compiled):
    outputs = ["latent_out", "rows_out", "codes_out"]
    assert compiled["specialized"] == ["rows", "weight", "cache", *outputs]
