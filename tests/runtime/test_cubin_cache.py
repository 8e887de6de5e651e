"""Compiled kernels on disk; none of it needs a GPU."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys

import pytest

from kvfold.codegen import load_table
from kvfold.runtime import compiler, cubin_cache

if reason := compiler.unavailable():
    pytest.skip(f"no CUDA compiler: {reason}", allow_module_level=True)

VARIANTS = [v for v in load_table().variants if v.backend == "cuda"]
VARIANT = VARIANTS[0]
ARCH = "sm_90"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder, not yet made."""
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiles(monkeypatch):
    """A list that grows by one symbol per compilation."""
    found, compile_variant = [], compiler.compile_variant

    def counting(variant, arch):
        found.append(variant.symbol)
        return compile_variant(variant, arch)

    monkeypatch.setattr(compiler, "compile_variant", counting)
    return found


# ---- the cache's files ---------------------------------------------------------------------------


def test_the_second_use_reads_the_cache(cache, compiles):
    first = cubin_cache.compiled(VARIANT, ARCH)
    assert first.cubin[:4] == b"\x7fELF"
    assert cubin_cache.compiled(VARIANT, ARCH) == first
    assert compiles == [VARIANT.symbol]
    (file,) = cache.iterdir()
    assert file.name.startswith(f"{VARIANT.symbol}.{ARCH}.")
    assert file.suffix == ".cubin"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: b"", lambda data: data + b"x"]
)
def test_a_damaged_file_is_compiled_again(cache, compiles, caplog, damage):
    first = cubin_cache.compiled(VARIANT, ARCH)
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING, "kvfold"):
        assert cubin_cache.compiled(VARIANT, ARCH).cubin == first.cubin
    assert "damaged" in caplog.text
    assert len(compiles) == 2
    assert cubin_cache.compiled(VARIANT, ARCH).cubin == first.cubin
    assert len(compiles) == 2, "the file was not repaired"


def test_a_file_that_holds_other_facts_is_compiled_again(cache, compiles, caplog):
    first = cubin_cache.compiled(VARIANT, ARCH)
    (file,) = cache.iterdir()
    content = json.dumps({"symbol": VARIANT.symbol, "clock": 1}).encode() + b"\n" + first.cubin
    file.write_bytes(hashlib.sha256(content).digest() + content)
    with caplog.at_level(logging.WARNING, "kvfold"):
        assert cubin_cache.compiled(VARIANT, ARCH).cubin == first.cubin
    assert "of another version" in caplog.text
    assert len(compiles) == 2


def test_a_cache_that_cannot_be_written_costs_a_log_line(tmp_path, monkeypatch, compiles, caplog):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "kvfold"):
        assert cubin_cache.compiled(VARIANT, ARCH).cubin[:4] == b"\x7fELF"
    assert "cannot write" in caplog.text
    assert cubin_cache.compiled(VARIANT, ARCH).cubin
    assert len(compiles) == 2


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_the_umask_gives(cache, mask, mode):
    with umask(mask):
        cubin_cache.compiled(VARIANT, ARCH)
    (file,) = cache.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_two_processes_race(cache):
    program = (
        "from kvfold.codegen import load_table; from kvfold.runtime import cubin_cache;"
        "import hashlib; v = next(v for v in load_table().variants if v.backend == 'cuda');"
        f"print(hashlib.sha256(cubin_cache.compiled(v, {ARCH!r}).cubin).hexdigest())"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    digests = {racer.communicate()[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert len(digests) == 1
    assert [file.suffix for file in cache.iterdir()] == [".cubin"]


# ---- the folder ----------------------------------------------------------------------------------


def test_the_folder_is_the_variables_else_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(tmp_path / "own"))
    assert cubin_cache.directory() == tmp_path / "own"
    monkeypatch.setenv("KVFOLD_CACHE_DIR", "")
    assert cubin_cache.directory() == tmp_path / "xdg/kvfold"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cubin_cache.directory() == tmp_path / ".cache/kvfold"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KVFOLD_CACHE_DIR", "~/kernels")
    monkeypatch.chdir(tmp_path)
    cubin_cache.compiled(VARIANT, ARCH)
    assert [file.suffix for file in (tmp_path / "home/kernels").iterdir()] == [".cubin"]
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


# ---- the key -------------------------------------------------------------------------------------


def name(variant=VARIANT, arch=ARCH) -> str:
    """The name of a variant's file, which holds the key, for a process that starts now."""
    compiler._header.cache_clear()
    return cubin_cache._file(variant, arch).name


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the CUDA headers, for a test to change."""
    copy = tmp_path / "kernels"
    ignore = shutil.ignore_patterns("*.py", "__pycache__")
    for folder in ("device", "ops"):
        shutil.copytree(compiler.HEADERS / folder, copy / folder, ignore=ignore)
    monkeypatch.setattr(compiler, "HEADERS", copy)
    yield copy
    compiler._header.cache_clear()


def test_the_key_covers_source_options_arch_and_nvrtc(monkeypatch):
    names = {name(), name(arch="sm_80"), name(VARIANTS[1])}
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "nvrtc_version", lambda: "0.0")
        names.add(name())
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "options", lambda arch: ("--other", arch))
        names.add(name())
    with monkeypatch.context() as patch:
        patch.setattr(cubin_cache, "instantiate", lambda variant: "int other;")
        names.add(name())
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "params_source", lambda spec: "// other")
        names.add(name())
    assert len(names) == 7
    assert name() in names


def test_a_header_that_is_included_changes_the_key(sources):
    before = name()
    for header in ("device/types.cuh", "ops/paged_kv_compress/kernel.cuh"):
        text = (sources / header).read_text()
        (sources / header).write_text(text + "\n// changed\n")
        assert name() != before
        (sources / header).write_text(text)
        assert name() == before


def test_a_header_that_is_not_included_does_not_change_the_key(sources):
    before = name()
    (sources / "device/unrelated.cuh").write_text("// new\n")
    (sources / "ops/other_op").mkdir()
    (sources / "ops/other_op/kernel.cuh").write_text('#include "device/types.cuh"\n')
    assert name() == before
    with (sources / "device/types.cuh").open("a") as header:
        header.write('#include "device/unrelated.cuh"\n')
    assert name() != before
