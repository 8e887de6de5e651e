"""Compiles a table's CUDA variants ahead of time, in parallel and without a GPU."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from kvfold.codegen import Table, Variant, render
from kvfold.runtime import cubin_cache
from kvfold.runtime.compiler import Compiled


def variants_for(table: Table, arch: str) -> list[Variant]:
    """The table's CUDA variants that a GPU of this arch ('sm_90') may run, each once."""
    problems = dict.fromkeys(group.problem for group in table.groups)
    found = {}
    for problem in problems:
        for bucket in table.buckets_for(problem, "cuda", arch):
            found[bucket.variant] = None
    return list(found)


def compile_all(jobs: Iterable[tuple[Variant, str]]) -> Iterator[tuple[Compiled, bool]]:
    """The machine code of (variant, arch) pairs, and whether it was compiled now.

    What the cache holds comes first. The rest is compiled on all cores and put into the cache. No
    worker outlives this process or the iteration.

    Raises:
        CompileError: one does not compile; the others are given up.
    """
    missing = []
    for job in jobs:
        if (found := cubin_cache.find(*job)) is not None:
            yield found, False
        else:
            missing.append(job)
    if not missing:
        return
    # Not forked: a process that has used CUDA or threads must not be.
    pool = ProcessPoolExecutor(
        min(len(missing), os.cpu_count() or 1),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(),),
    )
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _signals_deferred():
                futures = [
                    pool.submit(_compile, variant, arch, Path(folder, str(number)))
                    for number, (variant, arch) in enumerate(missing)
                ]
                workers += (pool._processes or {}).values()
            for future in as_completed(futures):
                code, file = future.result()
                yield replace(code, cubin=file.read_bytes()), True
            pool.shutdown()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()
            for worker in workers:
                multiprocessing.connection.wait([worker.sentinel])


def _compile(variant: Variant, arch: str, file: Path) -> tuple[Compiled, Path]:
    """Compiles in a worker. The machine code goes into a file.

    A killed worker could leave a part of it in the pipe to the parent, which would then wait for
    the rest.
    """
    code = cubin_cache.compiled(variant, arch)
    file.write_bytes(code.cubin)
    return replace(code, cubin=b""), file


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until the end of the context. Processes started in it ignore them.

    To block the signals is not enough: a thread of another library may receive them.
    """
    numbers, caught = (signal.SIGINT, signal.SIGTERM), []
    handlers = [signal.signal(one, lambda number, _: caught.append(number)) for one in numbers]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        for number in caught:
            signal.raise_signal(number)


def _start_worker(parent: int) -> None:
    """Lets a worker end when its parent does, even if the parent is killed or already dead."""
    pr_set_pdeathsig = 1  # of Linux, which CUDA needs anyway
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def write_cubin(compiled: Compiled, directory: Path) -> Path:
    """Writes directory/SYMBOL.ARCH.cubin; returns its path."""
    file = directory / f"{compiled.symbol}.{compiled.arch}.cubin"
    file.write_bytes(compiled.cubin)
    return file


def emit(table: Table, directory: Path) -> list[Path]:
    """Writes the generated sources; returns their paths."""
    rendered = render(table)
    texts = {"instantiations.cu": rendered.instantiations, **rendered.headers}
    files = []
    for name, text in texts.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        files.append(file)
    return files
