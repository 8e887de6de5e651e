"""Compiles CUDA variants with NVRTC: no nvcc, no host compiler, no CUDA headers, no GPU.

NVRTC is called through cupy's low-level bindings.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvfold.codegen import Variant, instantiate, op_specs
from kvfold.codegen.render import params_header, params_source

HEADERS = Path(__file__).parents[1]  # includes are relative to kernels/
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)


class CompileError(RuntimeError):
    """NVRTC refused a variant. The message holds its log."""


@dataclass(frozen=True)
class Compiled:
    """The machine code of one kernel.

    Attributes:
        symbol: the kernel's name.
        arch: the architecture it is for.
        cubin: the code.
        registers: per thread.
        spill_bytes: per thread.
        seconds: that the compilation took.
    """

    symbol: str
    arch: str
    cubin: bytes
    registers: int
    spill_bytes: int
    seconds: float


@functools.cache
def unavailable() -> str | None:
    """Why CUDA variants cannot be compiled here; None if they can."""
    try:
        from cupy_backends.cuda.api import driver  # noqa: F401  # pyright: ignore

        nvrtc_version()
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@functools.cache
def nvrtc_version() -> str:
    """NVRTC's version.

    cupy prefers NVRTC's wheel, and the wheel's metadata holds the version. To load the library only
    to ask it takes longer than to load a kernel from the cache.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def headers_of(source: str) -> dict[str, str]:
    """The headers that a source includes, directly or through others: include name -> text.

    Raises:
        CompileError: there is no such header.
    """
    found: dict[str, str] = {}
    pending = [source]
    while pending:
        for name in _INCLUDE.findall(pending.pop()):
            if name not in found:
                found[name] = _header(name)
                pending.append(found[name])
    return dict(sorted(found.items()))


@functools.cache
def _header(name: str) -> str:
    generated = {params_header(op): spec for op, spec in op_specs().items()}
    if name in generated:
        return params_source(generated[name])
    try:
        return (HEADERS / name).read_text()
    except OSError as error:
        raise CompileError(f'#include "{name}": {error}') from None


def options(arch: str) -> tuple[str, ...]:
    """What NVRTC is called with."""
    return ("--std=c++17", f"--gpu-architecture={_target(arch)}", "--ptxas-options=-v")


def _target(arch: str) -> str:
    """What to compile for: 'sm_100f' for 'sm_100', to have the instructions of its family too."""
    number = arch.removeprefix("sm_")
    return f"{arch}f" if number.isdigit() and int(number) >= 100 else arch


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """Compiles one variant for an architecture ('sm_90'), without the cache.

    Raises:
        CompileError: with NVRTC's log.
    """
    source = instantiate(variant)
    return compile_source(variant.symbol, source, headers_of(source), arch)


def compile_source(symbol: str, source: str, headers: Mapping[str, str], arch: str) -> Compiled:
    """Compiles CUDA source that holds the kernel `symbol`; headers: include name -> text.

    Raises:
        CompileError: with NVRTC's log.
    """
    from cupy_backends.cuda.libs import nvrtc

    began = time.perf_counter()
    names = [name.encode() for name in headers]
    texts = [text.encode() for text in headers.values()]
    program = nvrtc.createProgram(source, f"{symbol}.cu", texts, names)
    try:
        nvrtc.compileProgram(program, options(arch))
        # cupy takes the last byte, a zero, for the end of a string and drops it.
        cubin = nvrtc.getCUBIN(program) + b"\0"
        log = nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise CompileError(f"{symbol} for {arch}: {error}\n{log}") from None
    finally:
        nvrtc.destroyProgram(program)
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return Compiled(
        symbol=symbol,
        arch=arch,
        cubin=cubin,
        registers=int(registers[1]) if registers else 0,
        spill_bytes=max(map(int, spills), default=0),
        seconds=time.perf_counter() - began,
    )
