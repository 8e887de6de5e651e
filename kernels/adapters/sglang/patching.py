"""Puts the two functions in the place of SGLang's, and back."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from kvfold.adapters.sglang.forward import compress_forward
from kvfold.adapters.sglang.kept import refresh
from kvfold.adapters.sglang.store import compress_norm_rope_store

FUNCTIONS = {
    "compress_forward": compress_forward,
    "compress_norm_rope_store": compress_norm_rope_store,
}
OPS = "sglang.kernels.ops.attention.dsv4"
LAYERS = "sglang.srt.layers.attention.dsv4"
# Where the functions are defined, and the modules that import them by name.
MODULES = (f"{OPS}.compress", OPS, f"{LAYERS}.compressor_v2", f"{LAYERS}.compressor_trtllm")
COMPRESSOR = f"{LAYERS}.compressor"

_replaced: list[tuple[Any, str, Any]] = []


def patch() -> None:
    """Makes SGLang call kvfold's functions. Call it before graphs are captured, in each process.

    It also lets kvfold convert a compressor's ape again after SGLang has loaded another one.

    Raises:
        ImportError: SGLang is not installed, or not a version with these modules.
    """
    if _replaced:
        return
    modules = [importlib.import_module(name) for name in MODULES]
    compressor = importlib.import_module(COMPRESSOR).Compressor
    for module in modules:
        for name, function in FUNCTIONS.items():
            if hasattr(module, name):
                _replace(module, name, function)
    relay = compressor._apply_ape_hotfix

    @functools.wraps(relay)
    def relay_and_refresh(self: Any) -> None:
        relay(self)
        refresh(self.ape)

    _replace(compressor, "_apply_ape_hotfix", relay_and_refresh)


def unpatch() -> None:
    """Undoes `patch`."""
    while _replaced:
        owner, name, value = _replaced.pop()
        setattr(owner, name, value)


def _replace(owner: Any, name: str, value: Any) -> None:
    _replaced.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)
