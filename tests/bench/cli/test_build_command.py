"""kvfold build: what it compiles, the cache that it fills, and how it ends when it is stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import kvfold_command, refused

from kvfold.bench import build
from kvfold.codegen import load_table
from kvfold.runtime import compiler, cubin_cache, dispatch

needs_nvrtc = pytest.mark.skipif(compiler.unavailable() is not None, reason="no NVRTC")
PATIENCE = 60  # seconds; of a busy machine


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVFOLD_CACHE_DIR", str(folder))
    return folder


@needs_nvrtc
def test_build_fills_the_cache_and_a_second_run_compiles_nothing(
    small, cache, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    words = ("build", "--arch", "sm_90", "--arch", "sm_80", "--out", out)
    text = kvfold_command(*words).stdout
    assert "6 variants for sm_90, sm_80: 6 compiled now, 0 from the cache; 0 spill" in text
    assert f"cache: {cache}\n" in text and f"sources and cubins: {out}\n" in text
    shown = r"_s64 +sm_90 +(\d+) +0 +(\d+) *$"
    registers = re.findall(shown, text, re.MULTILINE)
    assert len(registers) == 2 and all(int(number) > 16 for number, _ in registers)
    assert len(list(out.glob("*.sm_80.cubin"))) == 4 and len(list(out.glob("*.sm_90.cubin"))) == 2
    assert all(file.read_bytes().startswith(b"\x7fELF") for file in out.glob("*.cubin"))
    assert load_table().fingerprint in (out / "instantiations.cu").read_text()
    assert "struct" in (out / "ops/paged_kv_compress/params.cuh").read_text()

    # The kernels that the runtime loads are those.
    for variant in load_table().variants:
        code = cubin_cache.find(variant, "sm_80")
        assert code and code.cubin == (out / f"{variant.symbol}.sm_80.cubin").read_bytes()

    monkeypatch.setattr(compiler, "compile_source", None)  # which is not called
    again = kvfold_command("build", "--arch", "sm_90").stdout
    assert "2 variants for sm_90: 0 compiled now, 2 from the cache; 0 spill" in again
    assert re.findall(shown, again, re.MULTILINE) == registers


@needs_nvrtc
def test_a_variant_that_does_not_compile_ends_the_build(small, cache):
    variant = load_table().variants[0]
    with pytest.raises(compiler.CompileError, match=rf"{variant.symbol} for sm_1"):
        list(build.compile_all([(variant, "sm_1")]))
    assert not cache.exists()


def test_an_iteration_that_ends_early_compiles_no_more(cache, monkeypatch):
    """Neither after an error nor after the first result that is wanted."""
    asked = []

    def compiled(variant, arch):
        asked.append(variant)
        time.sleep(0.01)  # all of them take 5 s
        if variant == "wrong":
            raise compiler.CompileError("wrong")
        return variant

    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(cubin_cache, "find", lambda variant, arch: None)
    monkeypatch.setattr(cubin_cache, "compiled", compiled)
    jobs = [(number, "sm_90") for number in range(1000)]
    with pytest.raises(compiler.CompileError):
        list(build.compile_all([("wrong", "sm_90"), *jobs]))
    assert len(asked) < 500
    asked.clear()
    results = build.compile_all(jobs)
    assert next(results) == (0, True)
    results.close()
    assert len(asked) < 500


def test_results_come_in_the_order_of_the_jobs(monkeypatch):
    """Whichever is ready first, and whether it was compiled or in the cache."""
    found = {0: "a", 3: "d"}
    monkeypatch.setattr(cubin_cache, "find", lambda variant, arch: found.get(variant))

    def compiled(variant, arch):
        time.sleep(0.05 if variant == 1 else 0)
        return "abcd"[variant]

    monkeypatch.setattr(cubin_cache, "compiled", compiled)
    assert list(build.compile_all((number, "sm_90") for number in range(4))) == [
        ("a", False), ("b", True), ("c", True), ("d", False)
    ]  # fmt: skip


def test_variants_of_an_arch_are_its_own_rows_or_those_for_any(small):
    table = load_table()
    found = {arch: build.variants_for(table, arch) for arch in ("sm_90", "sm_80")}
    assert [v.problem.next_n for v in found["sm_90"]] == [4, 4]
    assert [v.problem.next_n for v in found["sm_80"]] == [4, 4, 2, 2]


@pytest.mark.parametrize("arch", ["sm_999", "hopper", "any", "sm_90x", ""])
@needs_nvrtc
def test_an_arch_that_nvrtc_does_not_know_is_refused(arch, small):
    line = refused("build", "--arch", arch)
    assert f"--arch is '{arch}'; accepted: sm_" in line and "sm_90," in line


@needs_nvrtc
def test_build_refuses_what_it_cannot_do(small, monkeypatch):
    small.with_name("file").write_text("")
    line = refused("build", "--out", small.with_name("file"))
    assert "file, which is no directory" in line
    monkeypatch.setattr(compiler, "unavailable", lambda: "ImportError: no cupy")
    assert "no NVRTC here (ImportError: no cupy)" in refused("build", code=1)


def test_the_arch_is_this_machines_gpu(small, monkeypatch):
    from kvfold.bench.cli import build as command
    from kvfold.bench.cli import common

    asked = []
    monkeypatch.setattr(compiler, "unavailable", lambda: None)
    monkeypatch.setattr(command, "_check_arch", asked.append)
    monkeypatch.setattr(build, "variants_for", lambda table, arch: [])
    monkeypatch.setattr(common, "current_gpu", lambda: None)
    kvfold_command("build")
    monkeypatch.setattr(common, "current_gpu", lambda: "a GPU")
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_100")
    kvfold_command("build")
    assert asked == ["sm_90", "sm_100"]


# ---- signals -------------------------------------------------------------------------------------


def importing(process: subprocess.Popen) -> bool:
    """Whether torch is being imported."""
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def compiling(process: subprocess.Popen) -> bool:
    """Whether a first kernel is compiled, so that every thread is at work."""
    return any(Path(environment["KVFOLD_CACHE_DIR"]).glob("*.cubin"))


environment: dict[str, str] = {}


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@needs_nvrtc
@pytest.mark.parametrize(
    ("number", "when", "codes"),
    [
        (signal.SIGINT, importing, (-signal.SIGINT, 130)),
        (signal.SIGINT, compiling, (1, 130)),  # 1 with an older click
        (signal.SIGTERM, importing, (-signal.SIGTERM,)),
        (signal.SIGTERM, compiling, (-signal.SIGTERM,)),
    ],
)
def test_a_build_that_is_stopped_leaves_no_process_and_says_nothing(number, when, codes, tmp_path):
    environment.update(os.environ, KVFOLD_CACHE_DIR=str(tmp_path / "cache"))
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfold.bench", "build", "--arch", "sm_90"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process that it starts is in its process group
        # A shell that runs the tests in the background ignores the signal, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=environment,
    )
    try:
        wait_for(lambda: when(process))
        assert process.poll() is None
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode in codes
        assert stderr.replace("Aborted.\n", "").strip() == ""
        with pytest.raises(ProcessLookupError):  # nobody is left in the group
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            process.kill()
