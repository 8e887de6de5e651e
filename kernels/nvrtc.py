"""Compiles CUDA variants with NVRTC, caches the cubins on disk, loads and launches them.

Everything goes through cupy's low-level bindings of NVRTC and the driver: no nvcc, no host
compiler, no CUDA headers, and compiling needs no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from kvfold.codegen import Variant, instantiate

log = logging.getLogger("kvfold")

if torch.backends.cuda.is_built():
    # cupy's driver bindings import all of cupy at their first call. Let that be now, not while a
    # first kernel is waited for.
    with contextlib.suppress(ImportError):
        import cupy  # noqa: F401

_ROOT = Path(__file__).parent
_DIGEST_BYTES = 32


class CompileError(RuntimeError):
    """NVRTC refused a variant; the message holds its log."""


@dataclass(frozen=True)
class Compiled:
    """One variant's machine code and what the assembler said of it (bytes per thread)."""

    symbol: str
    arch: str
    cubin: bytes
    registers: int
    spill_bytes: int
    seconds: float


@functools.cache
def available() -> str | None:
    """None if CUDA variants can be compiled here, else the reason why not."""
    try:
        from cupy_backends.cuda.api import driver  # noqa: F401

        version()
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@functools.cache
def version() -> str:
    """NVRTC's version.

    Where NVRTC comes as a wheel, which cupy prefers, the wheel's metadata tells it: loading the
    library only to ask takes longer than loading a kernel from the cache.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


@functools.cache
def _headers() -> dict[str, bytes]:
    """Include name -> text of every .cuh file."""
    files = {"common.cuh": _ROOT / "common.cuh"}
    files |= {f"{path.parent.name}/{path.name}": path for path in _ROOT.glob("ops/*/*.cuh")}
    return {name: path.read_bytes() for name, path in sorted(files.items())}


def headers_of(variant: Variant) -> dict[str, bytes]:
    """The headers of one op: another op's change must not cost this one its cache."""
    return {
        name: text
        for name, text in _headers().items()
        if "/" not in name or name.startswith(f"{variant.op}/")
    }


def _options(arch: str) -> tuple[str, ...]:
    return ("--std=c++17", f"--gpu-architecture={arch}", "--ptxas-options=-v")


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """Compiles one variant for `arch` ("sm_90"), past the cache.

    Raises:
        CompileError: with NVRTC's log.
    """
    return compile_source(variant.symbol, instantiate(variant), headers_of(variant), arch)


def compile_source(symbol: str, source: str, headers: dict[str, bytes], arch: str) -> Compiled:
    """Compiles CUDA source that holds the kernel `symbol`; headers: include name -> text.

    Raises:
        CompileError: with NVRTC's log.
    """
    from cupy_backends.cuda.libs import nvrtc

    began = time.perf_counter()
    names = [name.encode() for name in headers]
    program = nvrtc.createProgram(source, f"{symbol}.cu", list(headers.values()), names)
    try:
        nvrtc.compileProgram(program, _options(arch))
        # cupy takes the last byte, a zero, for the end of a string and drops it.
        cubin = nvrtc.getCUBIN(program) + b"\0"
        text = nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        text = nvrtc.getProgramLog(program).strip()
        raise CompileError(f"{symbol} for {arch}: {error}\n{text}") from None
    finally:
        nvrtc.destroyProgram(program)
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    return Compiled(
        symbol=symbol,
        arch=arch,
        cubin=cubin,
        registers=int(registers[1]) if registers else 0,
        spill_bytes=max(map(int, spills), default=0),
        seconds=time.perf_counter() - began,
    )


# ---- The disk cache ------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where cubins are kept: KVFOLD_CACHE_DIR, else kvfold/ in the user's cache directory."""
    if chosen := os.environ.get("KVFOLD_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfold"


def _cache_file(variant: Variant, arch: str) -> Path:
    key = hashlib.sha256()
    for part in (
        instantiate(variant).encode(),
        *(part for item in headers_of(variant).items() for part in (item[0].encode(), item[1])),
        repr(_options(arch)).encode(),
        version().encode(),
    ):
        key.update(len(part).to_bytes(8, "little") + part)
    return cache_dir() / f"{variant.symbol}.{arch}.{key.hexdigest()[:32]}.cubin"


def _read(file: Path) -> bytes | None:
    """The cubin in a cache file, or None. A file is the SHA-256 of the cubin, then the cubin."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("cannot read %s (%s); compiling again", file, error)
        return None
    digest, cubin = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(cubin).digest() != digest:
        log.warning("%s is damaged; compiling again", file)
        return None
    return cubin


def _write(file: Path, cubin: bytes) -> None:
    """Puts a cubin in the cache in one step; a cache that cannot be written costs a log line."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as out:
            temporary = out.name
            out.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(temporary, file)
    except OSError as error:
        log.warning("cannot write %s (%s); the next process compiles again", file, error)
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def cubin_for(variant: Variant, arch: str) -> bytes:
    """One variant's machine code, from the cache if it is there.

    Raises:
        CompileError: with NVRTC's log.
    """
    file = _cache_file(variant, arch)
    cubin = _read(file)
    if cubin is None:
        compiled = compile_variant(variant, arch)
        log.info("compiled %s for %s in %.2f s", variant.symbol, arch, compiled.seconds)
        cubin = compiled.cubin
        _write(file, cubin)
    return cubin


# ---- Loading and launching -----------------------------------------------------------------------


# CUlaunchConfig: grid, block, shared bytes, then stream, attributes, their count. The parameters
# follow at once, pointers first, so that all that changes from call to call lies together.
_GRID = struct.Struct("7Ixxxx")
_CHANGES = "QQIxxxx{}Q"
_CHANGES_AT = _GRID.size
_CONFIG_BYTES = _CHANGES_AT + struct.calcsize(_CHANGES.format(0))

# CUlaunchAttribute: the kernel may begin while the one before it on the stream still runs. Those of
# kvfold wait for its end themselves (griddepcontrol), where and as far as they need to.
_OVERLAPPED = ctypes.create_string_buffer(struct.pack("IIi60x", 6, 0, 1))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class _LaunchBuffer(threading.local):
    """A thread's own launch: CUlaunchConfig, then the parameters. The driver copies both."""

    capacity = _CONFIG_BYTES + 4096  # the most a kernel's parameters can be
    made = None  # (its bytes, a pointer to the config, one to the parameters' pointer)

    def make(self, context: int) -> tuple:
        """Makes the buffer, and a context current where torch, which binds one in time, has not."""
        from cupy_backends.cuda.api import driver

        if not driver.ctxGetCurrent():
            driver.ctxSetCurrent(context)
        packed = ctypes.create_string_buffer(self.capacity)
        address = ctypes.addressof(packed)
        pointers = (ctypes.c_void_p * 1)(address + _CONFIG_BYTES)
        self.made = memoryview(packed).cast("B"), ctypes.c_void_p(address), pointers
        return self.made


_buffer = _LaunchBuffer()


class Template(NamedTuple):
    """A packed launch, and what puts stream, attributes and pointers in it."""

    packed: bytes
    complete: Callable[..., None]


class Kernel:
    """A variant loaded on one device."""

    def __init__(self, variant: Variant, cubin: bytes, symbol: str | None = None) -> None:
        """Loads on torch's current device; symbol: the kernel's name, if not the variant's."""
        from cupy_backends.cuda.api import driver, runtime

        if not driver.ctxGetCurrent():
            runtime.setDevice(torch.cuda.current_device())
        self.variant = variant
        self.sms = torch.cuda.get_device_properties().multi_processor_count
        overlaps = torch.cuda.get_device_capability() >= (9, 0)
        self._attributes = (ctypes.addressof(_OVERLAPPED), int(overlaps))
        self._context = driver.ctxGetCurrent()
        self._module = driver.moduleLoadData(cubin)
        function = driver.moduleGetFunction(self._module, symbol or variant.symbol)
        self._function = ctypes.c_void_p(function)
        self._launch = _driver().cuLaunchKernelEx
        if variant.shared_bytes > 48 << 10:
            driver.funcSetAttribute(
                function,
                driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                variant.shared_bytes,
            )

    def template(self, ctas: int, pointers: int, params: bytes) -> Template:
        """A launch of `ctas` CTAs, to be completed by `launch`.

        The kernel's parameter is a struct of so many pointers, then `params`.
        """
        changes = struct.Struct(_CHANGES.format(pointers))
        grid = _GRID.pack(ctas, 1, 1, self.variant.threads, 1, 1, self.variant.shared_bytes)
        return Template(grid + bytes(changes.size) + params, changes.pack_into)

    def launch(self, template: Template, stream: int, pointers: Sequence[int]) -> None:
        """Launches on a raw stream of the kernel's device, which must be current."""
        buffer, config, params = _buffer.made or _buffer.make(self._context)
        packed, complete = template
        buffer[: len(packed)] = packed
        complete(buffer, _CHANGES_AT, stream, *self._attributes, *pointers)
        status = self._launch(config, self._function, params, None)
        if status:
            raise RuntimeError(f"{self.variant.symbol} was not launched: CUDA error {status}")


_kernels: dict[tuple[Variant, int], Kernel] = {}
_loading = threading.Lock()


def load(variant: Variant, device: torch.device) -> Kernel:
    """The variant's kernel on a CUDA device, compiled or read from the cache at first use.

    Safe inside stream capture and from several threads.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _loading:
        kernel = _kernels.get((variant, index))
        if kernel is None:
            major, minor = torch.cuda.get_device_capability(index)
            cubin = cubin_for(variant, f"sm_{major}{minor}")
            with torch.cuda.device(index):
                kernel = _kernels[variant, index] = Kernel(variant, cubin)
    return kernel
