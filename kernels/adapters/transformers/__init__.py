"""DeepSeek-V4 of transformers with kvfold's compressors. Serves transformers 5.17 and later.

    import kvfold.adapters.transformers as adapter
    adapter.patch()                 # or: with adapter.patch(): ...
    model = DeepseekV4ForCausalLM.from_pretrained(...)

Models that are built from then on have kvfold's compressors, with the same parameters, and their
caches keep kvfold's state. Such a model can be used for assisted generation.
"""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import cache_utils
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from kvfold.adapters.transformers.cache_layers import CSALayer, HCALayer
from kvfold.adapters.transformers.compressors import CSACompressor, HCACompressor
from kvfold.adapters.transformers.graphed_decoder import GraphedDecoder

__all__ = ["GraphedDecoder", "patch", "unpatch"]

_HCA, _CSA = "heavily_compressed_attention", "compressed_sparse_attention"
_undo: contextlib.ExitStack | None = None


def patch() -> contextlib.AbstractContextManager:
    """Makes DeepSeek-V4 models that are built from now on use kvfold.

    Returns:
        A context manager that calls `unpatch` at its end. If the patch is there already, the call
        and the context manager change nothing.
    """
    global _undo
    if _undo is not None:
        return contextlib.nullcontext()
    with contextlib.ExitStack() as undo:
        _replace(undo, modeling.COMPRESSOR_CLASSES, {_HCA: HCACompressor, _CSA: CSACompressor})
        layers = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
        _replace(undo, layers, {_HCA: HCALayer, _CSA: CSALayer})
        model = modeling.DeepseekV4PreTrainedModel
        undo.callback(setattr, model, "_is_stateful", model._is_stateful)
        model._is_stateful = property(_is_stateful)  # pyright: ignore[reportAttributeAccessIssue]
        _undo = undo.pop_all()
    at_the_end = contextlib.ExitStack()
    at_the_end.callback(unpatch)
    return at_the_end


def unpatch() -> None:
    """Undoes `patch`. Without one it does nothing.

    Models that were built with kvfold's compressors stay usable: with the caches that transformers
    makes from now on, they run the code of transformers.
    """
    global _undo
    if _undo is not None:
        _undo.close()
        _undo = None


def _replace(undo: contextlib.ExitStack, mapping: dict, values: dict) -> None:
    undo.callback(mapping.update, {key: mapping[key] for key in values})
    mapping.update(values)


def _is_stateful(model: Any) -> bool:
    """Whether the state of a model cannot be rolled back, so that drafts are refused."""
    return not any(isinstance(one, (HCACompressor, CSACompressor)) for one in model.modules())
