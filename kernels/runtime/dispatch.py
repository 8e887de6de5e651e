"""From a problem to the kernel that solves it: backend, variant and launcher."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from kvfold.codegen import Arguments, Problem, Table, Variant, load_table
from kvfold.codegen.fields import Value
from kvfold.runtime import compiler, driver, repeat
from kvfold.runtime.arguments import constants_of, dimensions_of

log = logging.getLogger("kvfold")

BACKENDS = ("cuda", "triton", "reference")

Launcher = Callable[[Arguments], None]


@functools.cache
def table() -> Table:
    """The table in force: KVFOLD_CONFIG's, else the shipped one. Read once."""
    return load_table()


@functools.cache
def backend_for(device_type: str) -> str:
    """The backend that serves tensors on 'cuda' or 'cpu'; logged once with the reason.

    Raises:
        ValueError: KVFOLD_BACKEND names no backend, or one that cannot serve the device.
    """
    if forced := os.environ.get("KVFOLD_BACKEND"):
        if forced not in BACKENDS:
            raise ValueError(f"KVFOLD_BACKEND is {forced!r}; accepted: {', '.join(BACKENDS)}")
        if (obstacle := _obstacle(forced, device_type)) is not None:
            raise ValueError(f"KVFOLD_BACKEND is {forced!r}, but {obstacle}")
        backend, why = forced, "KVFOLD_BACKEND says so"
    elif device_type != "cuda":
        backend, why = "reference", f"the tensors are on {device_type!r}"
    elif (no_cuda := _obstacle("cuda", device_type)) is None:
        backend, why = "cuda", "cupy and NVRTC are there"
    elif (no_triton := _obstacle("triton", device_type)) is None:
        backend, why = "triton", f"no CUDA variants: {no_cuda}"
    else:
        backend, why = "reference", f"{no_triton}, and no CUDA variants: {no_cuda}"
    log.info("backend for %s tensors: %s (%s)", device_type, backend, why)
    return backend


def _obstacle(backend: str, device_type: str) -> str | None:
    """Why a backend cannot serve a device; None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the tensors are on {device_type!r}, where TRITON_INTERPRET=1 is needed"
        return None
    if device_type != "cuda":
        return f"the tensors are on {device_type!r}"
    return compiler.unavailable()


@functools.cache
def arch_of(device: torch.device) -> str:
    """The architecture that rows may name, 'sm_90' for an H200; 'any' without a GPU."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def select(problem: Problem, size: int, device: torch.device) -> Variant:
    """The variant that serves a problem at a size on a device.

    A problem without a row for the cuda backend is served by its triton row.

    Raises:
        TableError: no row; the message holds the row to add.
    """
    preferred = backend_for(device.type)
    backends = [preferred]
    if preferred == "cuda" and not os.environ.get("KVFOLD_BACKEND"):
        backends.append("triton")
    arch = arch_of(device)
    for backend in backends:
        variant = table().find(problem, backend, arch, size)
        if variant is not None:
            return variant
    table().refuse(problem, preferred, arch)


def bind(variant: Variant, device: torch.device) -> Launcher:
    """The function that launches a variant; compiles or loads it if need be.

    Raises:
        TableError: a CTA of it needs more shared memory than the device has.
    """
    variant.check_arch(arch_of(device))
    if variant.backend == "cuda":
        if variant.spec.specialise is not None and not variant.constants:
            return functools.partial(_launch_specialised, variant, device)
        return driver.load(variant, device)
    module = importlib.import_module(f"kvfold.ops.{variant.op}.{variant.backend}_kernel")
    return functools.partial(module.launch, variant)


def _launch_specialised(variant: Variant, device: torch.device, arguments: Arguments) -> None:
    """Launches the variant's kernel for the constants of this call."""
    spec = variant.spec
    constants = constants_of(spec, arguments, dimensions_of(spec, arguments))
    driver.load(replace(variant, constants=constants), device)(arguments)


@functools.cache
def launcher(
    problem: Problem,
    size: int,
    device: torch.device,
    constants: tuple[tuple[str, Value], ...] = (),
) -> Launcher:
    """The function that solves a problem on a device. Raises as `select` does.

    Args:
        constants: of the call, as Call has them.
    """
    if backend_for(device.type) == "reference":
        return importlib.import_module(f"kvfold.ops.{problem.op}.reference").run
    variant = select(problem, size, device)
    if variant.backend == "cuda":
        variant = replace(variant, constants=constants)
    return bind(variant, device)


def reload() -> None:
    """Forgets the table and every choice, so that changed KVFOLD_* variables take effect."""
    for cached in (table, backend_for, launcher):
        cached.cache_clear()
    repeat.forget()
