"""Compiling and caching CUDA variants; none of it needs a GPU."""

import logging
import subprocess
import sys

import pytest

from kvfold import nvrtc
from kvfold.bench.build import variants_for
from kvfold.codegen import load_table

if reason := nvrtc.available():
    pytest.skip(f"no CUDA compiler: {reason}", allow_module_level=True)

VARIANTS = [v for v in load_table().variants if v.backend == "cuda"]
ARCH = "sm_90"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def count_compiles(monkeypatch):
    """A list that grows by one symbol per compilation."""
    compiled, compile_variant = [], nvrtc.compile_variant

    def counting(variant, arch):
        compiled.append(variant.symbol)
        return compile_variant(variant, arch)

    monkeypatch.setattr(nvrtc, "compile_variant", counting)
    return compiled


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_default_variants_compile_without_spills(arch):
    for variant in variants_for(load_table(), arch):
        compiled = nvrtc.compile_variant(variant, arch)
        assert compiled.cubin[:4] == b"\x7fELF"
        assert compiled.registers > 0
        assert compiled.spill_bytes == 0, variant.symbol


def test_compile_error_names_the_variant(monkeypatch):
    monkeypatch.setattr(nvrtc, "_headers", lambda: {"common.cuh": b"int broken = x;"})
    with pytest.raises(nvrtc.CompileError, match=VARIANTS[0].symbol):
        nvrtc.compile_variant(VARIANTS[0], ARCH)


def test_second_use_reads_the_cache(cache, count_compiles):
    first = nvrtc.cubin_for(VARIANTS[0], ARCH)
    assert nvrtc.cubin_for(VARIANTS[0], ARCH) == first
    assert count_compiles == [VARIANTS[0].symbol]
    assert [file.suffix for file in cache.iterdir()] == [".cubin"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: b"", lambda data: data + b"x"]
)
def test_damaged_file_is_compiled_again(cache, count_compiles, caplog, damage):
    first = nvrtc.cubin_for(VARIANTS[0], ARCH)
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING, "kvfold"):
        assert nvrtc.cubin_for(VARIANTS[0], ARCH) == first
    assert "damaged" in caplog.text
    assert len(count_compiles) == 2
    assert nvrtc.cubin_for(VARIANTS[0], ARCH) == first
    assert len(count_compiles) == 2, "the file was not repaired"


def test_unwritable_cache_costs_a_log_line(tmp_path, monkeypatch, count_compiles, caplog):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "kvfold"):
        assert nvrtc.cubin_for(VARIANTS[0], ARCH)[:4] == b"\x7fELF"
    assert "cannot write" in caplog.text
    assert nvrtc.cubin_for(VARIANTS[0], ARCH)
    assert len(count_compiles) == 2


def test_key_covers_source_options_arch_and_nvrtc(monkeypatch):
    variant = VARIANTS[0]
    files = {nvrtc._cache_file(variant, ARCH).name, nvrtc._cache_file(variant, "sm_80").name}
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "version", lambda: "0.0")
        files.add(nvrtc._cache_file(variant, ARCH).name)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "_options", lambda arch: ("--other", arch))
        files.add(nvrtc._cache_file(variant, ARCH).name)
    with monkeypatch.context() as patch:
        headers = nvrtc._headers()
        patch.setattr(nvrtc, "_headers", lambda: headers | {"common.cuh": b"// other"})
        files.add(nvrtc._cache_file(variant, ARCH).name)
    files.add(nvrtc._cache_file(VARIANTS[1], ARCH).name)
    assert len(files) == 6


def test_another_ops_header_does_not_cost_the_cache(monkeypatch):
    before = nvrtc._cache_file(VARIANTS[0], ARCH)
    headers = nvrtc._headers()
    monkeypatch.setattr(nvrtc, "_headers", lambda: headers | {"other_op/kernel.cuh": b"// other"})
    assert nvrtc._cache_file(VARIANTS[0], ARCH) == before


def test_two_processes_race(cache):
    program = (
        "from kvfold import nvrtc; from kvfold.codegen import load_table; import hashlib;"
        "v = [v for v in load_table().variants if v.backend == 'cuda'][0];"
        f"print(hashlib.sha256(nvrtc.cubin_for(v, {ARCH!r})).hexdigest())"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    digests = {racer.communicate()[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert len(digests) == 1
    assert [file.suffix for file in cache.iterdir()] == [".cubin"]
