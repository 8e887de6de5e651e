"""Compiling CUDA variants with NVRTC; none of it needs a GPU."""

import importlib.metadata
import sys

import pytest

from kvfold.bench.build import variants_for
from kvfold.codegen import Problem, Variant, load_table, op_specs, render
from kvfold.runtime import compiler

needs_nvrtc = pytest.mark.skipif(
    compiler.unavailable() is not None, reason=f"no CUDA compiler: {compiler.unavailable()}"
)
ARCH = "sm_90"
VARIANT = next(v for v in load_table().variants if v.backend == "cuda")
KERNEL = f"ops/{VARIANT.op}/kernel.cuh"


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """An empty folder that headers are read from."""
    monkeypatch.setattr(compiler, "HEADERS", tmp_path)
    compiler._header.cache_clear()
    yield tmp_path
    compiler._header.cache_clear()


# ---- the shipped variants ------------------------------------------------------------------------


def dtypes_of(problem: Problem) -> tuple:
    """The values of a problem's fields that are dtypes."""
    return tuple(value for name, value in problem.values().items() if name.endswith("_dtype"))


def sample(arch: str) -> list[Variant]:
    """Variants that a GPU may run, of each kind the one with the most new tokens and columns.

    Of two that differ in ape_in_state alone, it is the one that adds ape to every row. Kinds differ
    in op, tuning, state_dtype and compress_ratio; for sm_90 in the other dtypes too.
    """

    def work(variant: Variant) -> tuple:
        values = variant.problem.values()
        most = values.get("next_n", 0), values.get("head_dim", 0)
        return *most, not values.get("ape_in_state"), variant.symbol

    found = {}
    for variant in sorted(variants_for(load_table(), arch), key=work):
        values = variant.problem.values()
        dtypes = dtypes_of(variant.problem) if arch == ARCH else values.get("state_dtype")
        found[variant.op, variant.tuning, values.get("compress_ratio"), dtypes] = variant
    return list(found.values())


SAMPLES = [(arch, v) for arch in ("sm_80", "sm_90", "sm_100", "sm_120") for v in sample(arch)]


def test_the_sample_has_every_tuning_and_dtype_of_the_table():
    problems = {variant.problem for arch, variant in SAMPLES if arch == ARCH}
    of_state_ops = [one for one in problems if "kv_dtype" in one.values()]
    assert {(p.op, p.kv_dtype, p.state_dtype, p.compress_ratio) for p in of_state_ops} == {
        (p.op, kv, state, ratio) for p in of_state_ops for kv in ("bf16", "fp32")
        for state in ("bf16", "fp32") for ratio in (2, 4, 128)
    }  # fmt: skip
    assert {p.ape_in_state for p in of_state_ops} == {False, True}
    assert {one.op for one in problems} == set(op_specs())
    for arch in dict(SAMPLES):
        variants = variants_for(load_table(), arch)
        chosen = [variant for name, variant in SAMPLES if name == arch]
        assert {(v.op, v.tuning) for v in chosen} == {(v.op, v.tuning) for v in variants}
        if arch == ARCH:
            dtypes = {(v.op, *dtypes_of(v.problem)) for v in variants}
            assert {(v.op, *dtypes_of(v.problem)) for v in chosen} == dtypes


@needs_nvrtc
@pytest.mark.parametrize(
    ("arch", "variant"),
    SAMPLES,
    ids=lambda value: value if isinstance(value, str) else value.symbol,
)
def test_shipped_variants_compile_without_spills(arch, variant):
    compiled = compiler.compile_variant(variant, arch)
    assert (compiled.symbol, compiled.arch) == (variant.symbol, arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.registers > 0
    assert compiled.spill_bytes == 0


@pytest.mark.parametrize(
    ("arch", "target"),
    [("sm_80", "sm_80"), ("sm_90", "sm_90"), ("sm_90a", "sm_90a"), ("sm_100", "sm_100f"),
     ("sm_100a", "sm_100a"), ("sm_121", "sm_121f")],
)  # fmt: skip
def test_an_architecture_of_a_family_has_its_instructions(arch, target):
    assert f"--gpu-architecture={target}" in compiler.options(arch)


@needs_nvrtc
@pytest.mark.parametrize(("arch", "has_family"), [("sm_90", False), ("sm_100", True)])
def test_device_code_knows_whether_it_has_them(arch, has_family):
    """device/quantise.cuh asks for this macro."""
    source = """
#ifdef __CUDA_ARCH_FAMILY_SPECIFIC__
extern "C" __global__ void family() {}
#else
extern "C" __global__ void plain() {}
#endif
"""
    compiled = compiler.compile_source("family", source, {}, arch)
    assert (b"family" in compiled.cubin, b"plain" in compiled.cubin) == (has_family, not has_family)


@needs_nvrtc
def test_spills_are_reported():
    source = """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* in, float* out) {
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = in[threadIdx.x * 96 + i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) out[(95 - i) * 1024 + threadIdx.x] = held[i] * held[(i * 7) % 96];
}
"""
    compiled = compiler.compile_source("spilling", source, {}, ARCH)
    assert compiled.spill_bytes > 0
    assert 0 < compiled.registers <= 32


@needs_nvrtc
def test_what_a_table_renders_compiles_as_a_whole(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        f"version: 1\n{VARIANT.op}:\n"
        "  - {head_dim: [64, 128], compress_ratio: 4, kv_dtype: bf16, state_dtype: fp32, next_n: 1,"
        " backend: cuda, reduce_warps: 1, head_slice: 32}\n"
    )
    table = load_table(file)
    source = render(table).instantiations
    compiled = compiler.compile_source("all", source, compiler.headers_of(source), ARCH)
    assert len(table.variants) == 2
    for variant in table.variants:
        assert variant.symbol.encode() in compiled.cubin


# ---- errors --------------------------------------------------------------------------------------


@needs_nvrtc
def test_a_compile_error_names_the_variant_and_holds_the_log(monkeypatch):
    monkeypatch.setattr(compiler, "headers_of", lambda source: {KERNEL: "int broken = x;"})
    with pytest.raises(compiler.CompileError, match=f"{VARIANT.symbol} for {ARCH}: ") as caught:
        compiler.compile_variant(VARIANT, ARCH)
    assert 'identifier "x" is undefined' in str(caught.value)


@pytest.fixture
def unavailable():
    """compiler.unavailable, as a new process has it."""
    compiler.unavailable.cache_clear()
    yield compiler.unavailable
    compiler.unavailable.cache_clear()


def test_without_cupy_the_reason_names_it(monkeypatch, unavailable):
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", None)
    why = unavailable()
    assert why.startswith("ModuleNotFoundError: ") and "cupy_backends" in why


def test_without_the_library_the_reason_is_one_line(monkeypatch, unavailable):
    pytest.importorskip("cupy_backends.cuda.api")

    def missing():
        raise OSError("libnvrtc.so.13: cannot open\ndetails")

    monkeypatch.setattr(compiler, "nvrtc_version", missing)
    assert unavailable() == "OSError: libnvrtc.so.13: cannot open"


@needs_nvrtc
def test_the_version_is_that_of_the_wheel_or_of_the_library(monkeypatch):
    version = compiler.nvrtc_version()

    def no_wheel(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_wheel)
    compiler.nvrtc_version.cache_clear()
    try:
        assert version.startswith(f"{compiler.nvrtc_version()}.")
    finally:
        compiler.nvrtc_version.cache_clear()


# ---- headers -------------------------------------------------------------------------------------


def test_headers_are_found_by_following_includes(headers):
    (headers / "device").mkdir()
    (headers / "device/a.cuh").write_text('#pragma once\n  #include "device/b.cuh"\n// a\n')
    (headers / "device/b.cuh").write_text('#include "device/a.cuh"\n#include "c.cuh"\n')
    (headers / "c.cuh").write_text("// c\n")
    (headers / "d.cuh").write_text("// d\n")
    source = '#include <cuda.h>\n// #include "d.cuh"\n#include "device/a.cuh"\nint x;\n'
    found = compiler.headers_of(source)
    assert list(found) == ["c.cuh", "device/a.cuh", "device/b.cuh"]
    assert found["c.cuh"] == "// c\n"
    assert compiler.headers_of("int x;\n") == {}


def test_a_header_that_is_missing_is_named(headers):
    (headers / "a.cuh").write_text('#include "gone/b.cuh"\n')
    with pytest.raises(compiler.CompileError, match=r'#include "gone/b.cuh": .*No such file'):
        compiler.headers_of('#include "a.cuh"\n')


def test_a_variants_headers_are_its_ops_and_the_devices_with_the_generated_one():
    found = compiler.headers_of(f'#include "{KERNEL}"\n')
    assert f"ops/{VARIANT.op}/params.cuh" in found
    assert not (compiler.HEADERS / f"ops/{VARIANT.op}/params.cuh").exists()
    assert "struct Params" in found[f"ops/{VARIANT.op}/params.cuh"]
    assert {name.split("/")[0] for name in found} == {"ops", "device"}
    assert {name.split("/")[1] for name in found if name.startswith("ops")} == {VARIANT.op}
