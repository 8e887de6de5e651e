"""Compiles a table's CUDA variants ahead of time: in parallel, and without a GPU."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from kvfold import nvrtc
from kvfold.codegen import Table, Variant, render
from kvfold.nvrtc import Compiled


def variants_for(table: Table, arch: str) -> list[Variant]:
    """The table's CUDA variants that a GPU of this arch ('sm_90') may run, each once."""
    found = {}
    for (op, backend, where, *key), buckets in table.groups.items():
        own = where == "any" and (op, backend, arch, *key) in table.groups  # goes before
        if backend == "cuda" and where in ("any", arch) and not own:
            found.update((bucket.variant, None) for bucket in buckets)
    return list(found)


def compile_all(jobs: Iterable[tuple[Variant, str]]) -> Iterator[Compiled]:
    """Compiles (variant, arch) pairs on all cores; yields each as soon as it is done.

    Raises:
        CompileError: one does not compile; the others are given up.
    """
    # Not forked: a process that has used CUDA or threads must not be.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        futures = [pool.submit(nvrtc.compile_variant, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def write_cubin(compiled: Compiled, directory: Path) -> Path:
    """Writes directory/SYMBOL.ARCH.cubin; returns its path."""
    file = directory / f"{compiled.symbol}.{compiled.arch}.cubin"
    file.write_bytes(compiled.cubin)
    return file


def emit(table: Table, directory: Path) -> list[Path]:
    """Writes the generated sources, instantiations.cu and dispatch.py; returns their paths."""
    rendered = render(table)
    files = [directory / "instantiations.cu", directory / "dispatch.py"]
    files[0].write_text(rendered.instantiations)
    files[1].write_text(rendered.dispatch)
    return files
