"""The CUDA kernels without a GPU: what they are compiled for, and that they compile."""

import functools
import itertools
import re
from dataclasses import replace

import pytest
import torch
from norm_calls import FLOATS, HEAD_DIMS, OUTPUTS, Call, fits, make, variant_of, ways

from kvfold.codegen import Variant, load_table
from kvfold.codegen.render import instantiate
from kvfold.ops.norm_rope_store import cuda_kernel
from kvfold.ops.norm_rope_store.spec import SPEC, WARPS
from kvfold.runtime import compiler, dispatch, driver
from kvfold.runtime.arguments import check

FORMATS = load_table().formats
ALL = {"latent_out": "fp32", "rows_out": "bf16", "codes_out": "", "scales_out": ""}
ARCH = "sm_90"

needs_nvrtc = pytest.mark.skipif(compiler.unavailable() is not None, reason="no CUDA compiler here")


def constants_of(call: Call) -> dict:
    return dict(check(SPEC, call).constants)


# ---- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 16, 17])
def test_a_warp_has_a_row(warps, num_rows):
    call = make(num_rows=num_rows)
    variant = variant_of(call, "cuda", warps)
    plan = cuda_kernel.plan(variant, 132, call, check(SPEC, call).dimensions)
    assert (plan.ctas - 1) * warps < num_rows <= plan.ctas * warps
    assert variant.launch.threads == 32 * warps


# ---- constants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_constants_of_a_call_describe_its_format(name, head_dim):
    format = FORMATS[name]
    found = constants_of(make(format=name, head_dim=head_dim))
    bits = {"bf16": 16, "fp32": 32, "fp8_e4m3": 8, "fp4_e2m1": 4}
    scale_codes = ["none", "tensor", "fp32", "e8m0", "e4m3"]  # as in device/quantise.cuh
    scale_bytes = make(format=name, head_dim=head_dim, outputs=["scales_out"]).scales_out.size(1)
    expected = {
        "code_bits": bits[format.code],
        "ties_down": format.ties == "down",
        "block": format.block,
        "scale_code": scale_codes.index(format.scale),
        "pow2": format.rule == "pow2",
        "floor_on_scale": format.floor_on == "scale",
        "code_columns": head_dim - (64 if format.rope == "bf16" else 0),
        "scale_bytes": scale_bytes,
    }
    assert {key: found[key] for key in expected} == expected


def test_the_constants_of_a_call_describe_its_arguments():
    plain = constants_of(make())
    assert plain == dict(SPEC.constants)  # what a variant is compiled for by itself
    roundings = ["once", "before_codes", "codes_from_bf16", "each_step"]
    for place, rounding in enumerate(roundings):
        assert constants_of(make(rounding=rounding)) == plain | {"rounding": place}
    assert constants_of(make(rotate=True)) == plain | {"rotate": True}
    assert constants_of(make(weight_dtype="fp32")) == plain | {"weight_is_bf16": False}
    for name, (place, dtype) in itertools.product(
        ("latent_out", "rows_out"), enumerate(("bf16", "fp32"), 1)
    ):
        assert constants_of(make(outputs={name: dtype})) == plain | {name: place}
    for name in ("codes_out", "scales_out"):
        assert constants_of(make(outputs=[name])) == plain | {name: True}
    wide = constants_of(make(rope_dim=128))
    assert wide == plain | {"rope_dim": 128, "code_columns": 384}


def test_what_a_kernel_is_not_compiled_for():
    """These change from step to step, and a kernel is compiled at its first use."""
    call = make(outputs=ALL)
    others = [
        make(outputs=ALL, **fields)
        for fields in (
            {"num_rows": 300},
            {"rows_per_page": 64},
            {"more_pages": 5},
            {"more_bytes": 16, "padding": 20},
            {"strided": True},
            {"rope_layout": "transposed", "max_pos": 5},
            {"eps": 0.5},
            {"prefetch": "state"},
        )
    ]
    assert all(constants_of(other) == constants_of(call) for other in others)
    with_scale, without = (make(format="fp8_tensor", scale=scale) for scale in (0.5, None))
    assert constants_of(with_scale) == constants_of(without)


# ---- specialised variants ------------------------------------------------------------------------


def config_of(variant: Variant) -> dict[str, str]:
    """The members of a variant's config struct that are numbers."""
    return dict(re.findall(r"static constexpr \w+ (\w+) = (\w+);", instantiate(variant)))


def test_a_specialised_variant_is_another_kernel_of_the_same_problem_and_tuning():
    call = make(format="fp4_288", rotate=True, outputs=ALL)
    variant, constants = variant_of(call, "cuda", 4), constants_of(call)
    special = variant.specialised(constants)
    assert special != variant and special == variant.specialised(dict(reversed(constants.items())))
    assert (special.problem, special.tuning) == (variant.problem, variant.tuning)
    assert (special.symbol, special.launch) == (variant.symbol, variant.launch)


def test_the_config_of_a_variant_has_the_constants_of_the_call():
    call = make(format="fp4_288", rotate=True, outputs=ALL)
    variant = variant_of(call, "cuda", 4)
    for one, constants in (
        (variant, SPEC.constants),
        (variant.specialised(constants_of(call)), constants_of(call)),
    ):
        config = config_of(one)
        assert {name: config[name] for name in constants} == {
            name: str(value).lower() for name, value in constants.items()
        }
    assert config["code_bits"] == "4" and config["rotate"] == "true"


class FakeKernel:
    """Stands for a loaded kernel; keeps its variant and the calls."""

    def __init__(self, variant: Variant, calls: list) -> None:
        self.variant, self.calls = variant, calls

    def __call__(self, arguments) -> None:
        self.calls.append((self.variant, arguments))


@pytest.fixture
def loaded(monkeypatch):
    """The (variant, arguments) of every launch, with kernels that are not compiled."""
    calls = []
    load = functools.cache(lambda variant, device: FakeKernel(variant, calls))
    monkeypatch.setattr(driver, "load", load)
    monkeypatch.setattr(dispatch, "backend_for", lambda device_type: "cuda")
    dispatch.launcher.cache_clear()
    yield calls
    dispatch.launcher.cache_clear()


def test_dispatch_chooses_a_kernel_for_the_constants_of_each_call(loaded):
    device = torch.device("cpu")
    calls = [make(), make(rotate=True), make(outputs=ALL), make(num_rows=3)]
    for call in calls:
        found = check(SPEC, call)
        launcher = dispatch.launcher(found.problem, found.size, device, found.constants)
        assert isinstance(launcher, FakeKernel)  # which a repeated call launches at once
        launcher(call)
    for (variant, arguments), call in zip(loaded, calls, strict=True):
        assert arguments is call
        assert dict(variant.constants) == constants_of(call)
    assert len({variant for variant, _ in loaded}) == 3  # the first and the last have one kernel


def test_a_variant_that_is_bound_serves_calls_of_any_constants(loaded):
    variant = variant_of(make(), "cuda", 2)
    run = dispatch.bind(variant, torch.device("cpu"))
    calls = [make(), make(rotate=True), make(format="fp8_528"), make()]
    for call in calls:
        run(call)
    assert [dict(one.constants) for one, _ in loaded] == list(map(constants_of, calls))
    assert {replace(one, constants=()) for one, _ in loaded} == {variant}


# ---- compiled ------------------------------------------------------------------------------------


def compiled(call: Call, warps: int) -> compiler.Compiled:
    variant = variant_of(call, "cuda", warps).specialised(constants_of(call))
    return compiler.compile_variant(variant, ARCH)


@needs_nvrtc
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_rounding_compiles_without_spills(name):
    turns = zip(
        ways(FORMATS[name]),
        itertools.cycle(HEAD_DIMS),
        itertools.cycle(itertools.product(FLOATS, FLOATS, ((), ALL))),
        itertools.cycle(WARPS),
        strict=False,
    )
    for (rounding, rotate), head_dim, (rows_dtype, weight_dtype, outputs), warps in turns:
        call = make(
            format=name,
            head_dim=head_dim,
            rounding=rounding,
            rotate=rotate,
            rows_dtype=rows_dtype,
            weight_dtype=weight_dtype,
            outputs=outputs,
        )
        found = compiled(call, warps)
        assert (found.spill_bytes, found.arch) == (0, ARCH)
        assert found.registers <= 128  # an SM has 65,536, enough for the 16 warps of a CTA


@needs_nvrtc
@pytest.mark.parametrize("rope_dim", [0, 2, 126, 512])
def test_every_rope_dim_compiles(rope_dim):
    assert fits(FORMATS["bf16"], 512, rope_dim)
    assert compiled(make(format="bf16", rope_dim=rope_dim), 1).spill_bytes == 0


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100", "sm_120"])
@pytest.mark.parametrize("name", ["mixed_584", "fp4_288", "fp8_block128", "mxfp4_ties_down"])
def test_kernels_compile_for_other_gpus(name, arch):
    call = make(format=name, rotate=True, outputs=OUTPUTS)
    variant = variant_of(call, "cuda", 1).specialised(constants_of(call))
    found = compiler.compile_variant(variant, arch)
    assert (found.arch, found.spill_bytes) == (arch, 0)
