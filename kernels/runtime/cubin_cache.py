"""Compiled kernels on disk, so that the next process need not compile them again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from kvfold.codegen import Variant, instantiate
from kvfold.runtime import compiler
from kvfold.runtime.compiler import Compiled
from kvfold.runtime.files import replace_file

log = logging.getLogger("kvfold")

_DIGEST_BYTES = 32


def directory() -> Path:
    """The cache's folder: KVFOLD_CACHE_DIR, else kvfold/ in the user's cache folder."""
    if chosen := os.environ.get("KVFOLD_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfold"


def compiled(variant: Variant, arch: str) -> Compiled:
    """One variant's machine code: from the cache, or compiled and put there.

    Raises:
        CompileError: with NVRTC's log.
    """
    file = _file(variant, arch)
    found = _read(file)
    if found is None:
        found = compiler.compile_variant(variant, arch)
        log.info("compiled %s for %s in %.2f s", variant.symbol, arch, found.seconds)
        _write(file, found)
    return found


def find(variant: Variant, arch: str) -> Compiled | None:
    """One variant's machine code, if the cache holds it."""
    return _read(_file(variant, arch))


def _file(variant: Variant, arch: str) -> Path:
    """The variant's file. The name holds a hash of all that the machine code depends on."""
    source = instantiate(variant)
    key = hashlib.sha256()
    for part in (
        source,
        *(part for header in compiler.headers_of(source).items() for part in header),
        repr(compiler.options(arch)),
        compiler.nvrtc_version(),
    ):
        key.update(len(part).to_bytes(8, "little") + part.encode())
    return directory() / f"{variant.symbol}.{arch}.{key.hexdigest()[:32]}.cubin"


def _read(file: Path) -> Compiled | None:
    """What a file holds; None if it is not there, cannot be read or is damaged."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("cannot read %s (%s); compiling again", file, error)
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        log.warning("%s is damaged; compiling again", file)
        return None
    about, _, cubin = content.partition(b"\n")
    try:
        return Compiled(**json.loads(about), cubin=cubin)
    except (TypeError, ValueError):  # written by a version that keeps other facts
        log.warning("%s is of another version; compiling again", file)
        return None


def _write(file: Path, code: Compiled) -> None:
    """Writes a file: SHA-256 of the rest, a line of JSON, the cubin.

    A cache that cannot be written costs a log line.
    """
    about = asdict(code)
    content = json.dumps({k: v for k, v in about.items() if k != "cubin"}).encode()
    content += b"\n" + code.cubin
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, hashlib.sha256(content).digest() + content)
    except OSError as error:
        log.warning("cannot write %s (%s); the next process compiles again", file, error)
