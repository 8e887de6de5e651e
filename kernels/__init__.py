"""kvfold: GPU kernels for the KV compressor of models with compressed attention.

Attributes are loaded at first use, so that `import kvfold.codegen` loads no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfold.ops.locate_rows.op import locate_rows
    from kvfold.ops.norm_rope_store.op import norm_rope_store
    from kvfold.ops.paged_kv_compress.check import check
    from kvfold.ops.paged_kv_compress.op import paged_kv_compress
    from kvfold.ops.prefill_compress.op import prefill_compress
    from kvfold.state import live_rows

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "check",
    "live_rows",
    "locate_rows",
    "norm_rope_store",
    "paged_kv_compress",
    "prefill_compress",
]

_MODULES = {"check": "kvfold.ops.paged_kv_compress.check", "live_rows": "kvfold.state"}


def __getattr__(name: str) -> Any:
    """Loads a function of _MODULES, an op's function, or a submodule."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    from kvfold.codegen import op_specs

    if name in op_specs():
        value = _function(name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _function(op: str) -> Any:
    """The function of an op's op.py; without such a file, one made from the declaration."""
    if importlib.util.find_spec(f"kvfold.ops.{op}.op") is not None:
        return getattr(importlib.import_module(f"kvfold.ops.{op}.op"), op)
    return importlib.import_module("kvfold.runtime.torch_op").torch_op(op)
