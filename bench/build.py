"""Compiles a table's CUDA variants ahead of time, in parallel and without a GPU."""

import os
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor

from kvfold.codegen import Table, Variant
from kvfold.runtime import cubin_cache
from kvfold.runtime.compiler import Compiled

Job = tuple[Variant, str]  # and the architecture to compile it for


def variants_for(table: Table, arch: str) -> list[Variant]:
    """The table's CUDA variants that a GPU of this arch ('sm_90') may run, each once."""
    problems = dict.fromkeys(group.problem for group in table.groups)
    buckets = (bucket for one in problems for bucket in table.buckets_for(one, "cuda", arch))
    return list(dict.fromkeys(bucket.variant for bucket in buckets))


def compile_all(jobs: Iterable[Job]) -> Generator[tuple[Compiled, bool], None, None]:
    """The machine code of every job, in order, and whether it was compiled now.

    What the cache does not hold is compiled in threads, on all cores, and put into the cache. An
    error, or closing the generator, cancels the compilations that have not begun.

    Raises:
        CompileError: one does not compile.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(_compile, jobs)
    finally:  # an interruption while jobs are handed in leaves them in the pool
        pool.shutdown(cancel_futures=True)


def _compile(job: Job) -> tuple[Compiled, bool]:
    if (found := cubin_cache.find(*job)) is not None:
        return found, False
    return cubin_cache.compiled(*job), True
