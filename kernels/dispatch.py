"""From a problem to the kernel that solves it: which backend, which variant, bound and ready.

The choice of the variant is the dispatcher that codegen renders from the table in force.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable

import torch

from kvfold import nvrtc, repeat
from kvfold.codegen import Table, Variant, load_table, render
from kvfold.codegen.variant import OPS

log = logging.getLogger("kvfold")

BACKENDS = ("cuda", "triton", "reference")


@functools.cache
def table() -> Table:
    """The table in force: KVFOLD_CONFIG's, else the shipped one. Read once."""
    return load_table()


@functools.cache
def variants() -> dict[str, Variant]:
    """Every variant of the table in force, by symbol."""
    return {variant.symbol: variant for variant in table().variants}


@functools.cache
def _generated() -> dict:
    """The namespace of the generated dispatcher."""
    namespace: dict = {}
    exec(compile(render(table()).dispatch, "<kvfold dispatch>", "exec"), namespace)
    return namespace


@functools.cache
def backend_for(device_type: str) -> str:
    """The backend that serves tensors on "cuda" or "cpu"; logged once with the reason.

    Raises:
        ValueError: KVFOLD_BACKEND names no backend, or one that cannot serve the device.
    """
    forced = os.environ.get("KVFOLD_BACKEND")
    if forced is not None:
        if forced not in BACKENDS:
            raise ValueError(f"KVFOLD_BACKEND is {forced!r}; accepted: {', '.join(BACKENDS)}")
        if forced == "cuda" and device_type != "cuda":
            raise ValueError(f"KVFOLD_BACKEND is 'cuda', but the tensors are on {device_type!r}")
        if forced == "cuda" and nvrtc.available() is not None:
            raise ValueError(f"KVFOLD_BACKEND is 'cuda', but {nvrtc.available()}")
        backend, why = forced, "KVFOLD_BACKEND says so"
    elif device_type != "cuda":
        backend, why = "reference", f"the tensors are on {device_type!r}"
    elif nvrtc.available() is None:
        backend, why = "cuda", "cupy and NVRTC are there"
    elif importlib.util.find_spec("triton") is not None:
        backend, why = "triton", f"no CUDA variants: {nvrtc.available()}"
    else:
        backend, why = "reference", f"no triton, and no CUDA variants: {nvrtc.available()}"
    log.info("backend for %s tensors: %s (%s)", device_type, backend, why)
    return backend


@functools.cache
def arch_of(device: torch.device) -> str:
    """The architecture rows may name: "sm_90" for an H200; "any" where there is no GPU."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def select(op: str, key: tuple, batch: int, device: torch.device) -> Variant:
    """The variant that serves a problem: `key` is Variant.key, batch the number of requests.

    A problem that has no row for the CUDA backend is served by its Triton row.

    Raises:
        TableError: no row; the message holds the row to add.
    """
    preferred = backend_for(device.type)
    backends = (preferred,)
    if preferred == "cuda" and "KVFOLD_BACKEND" not in os.environ:
        backends = ("cuda", "triton")
    for backend in backends:
        symbol = _generated()["select"](op, backend, arch_of(device), key, batch)
        if symbol is not None:
            return variants()[symbol]
    problem = dict(zip(OPS[op].spec("problem"), key, strict=True))
    return table().select(op, batch=batch, backend=preferred, **problem)  # raises, with the row


def bind(variant: Variant, device: torch.device) -> Callable[..., None]:
    """What launches a variant: takes the op's arguments. Compiles or loads it if need be.

    Raises:
        TableError: a CTA of it needs more shared memory than the device has.
    """
    variant.check_shared(arch_of(device))
    module = importlib.import_module(f"kvfold.ops.{variant.op}.{variant.backend}_kernel")
    subject = nvrtc.load(variant, device) if variant.backend == "cuda" else variant
    return functools.partial(module.launch, subject)


@functools.cache
def launcher(op: str, key: tuple, batch: int, device: torch.device) -> Callable[..., None]:
    """What solves a problem on a device: takes the op's arguments. Raises as `select` does."""
    if backend_for(device.type) == "reference":
        return getattr(importlib.import_module(f"kvfold.ops.{op}.reference"), op)
    return bind(select(op, key, batch, device), device)


def reload() -> None:
    """Forgets the table and every choice, so that changed KVFOLD_* variables take effect."""
    for cached in (table, variants, _generated, backend_for, launcher):
        cached.cache_clear()
    repeat.forget()
