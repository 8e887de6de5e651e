"""What a GPU offers a kernel, per architecture."""

import re
import string
from typing import Any

from .errors import TableError

MAX_THREADS = 1024  # per CTA
FIRST_WITH_CLUSTERS = "sm_90"
MAX_CLUSTER = 8  # CTAs of a cluster, that every architecture with clusters has
SM_THREADS = 1536  # per SM, that every architecture has
SM_REGISTERS = 65536  # per SM, likewise
# KiB of shared memory that a CTA may ask for. Other architectures are taken to have the least.
_SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227}
_LEAST_SHARED_KIB = 99  # sm_86, sm_89, sm_120, sm_121


def shared_bytes(arch: str) -> int:
    """Bytes of shared memory that a CTA may have on arch ('any' or 'sm_90')."""
    return 1024 * _SHARED_KIB.get(arch.rstrip(string.ascii_lowercase), _LEAST_SHARED_KIB)


def has_clusters(arch: str) -> bool:
    """Whether every GPU of arch ('any' or 'sm_90') has clusters of CTAs."""
    return arch != "any" and _number(arch) >= _number(FIRST_WITH_CLUSTERS)


def _number(arch: str) -> int:
    """90 of 'sm_90' or 'sm_90a'."""
    return int(arch.removeprefix("sm_").rstrip(string.ascii_lowercase))


def check_arch(arch: Any) -> None:
    """Raises TableError unless arch is 'any' or a name such as 'sm_90' or 'sm_90a'."""
    if not (isinstance(arch, str) and re.fullmatch("any|sm_[0-9]+[a-z]?", arch)):
        legal = "any, or sm_<number> as in sm_90"
        raise TableError("is not accepted", field="arch", value=arch, legal=legal)
