"""Small DeepSeek-V4 models of the real architecture, with and without kvfold, and their logits."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import kvfold.adapters.transformers as adapter

HCA, CSA = "heavily_compressed_attention", "compressed_sparse_attention"
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]
VOCABULARY = 97


def config(**fields: Any) -> Any:
    """The real architecture in small. The kernels have rows for its head_dim and its ratios."""
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 128,
        "q_lora_rank": 32,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "layer_types": [HCA, CSA],
        "mlp_layer_types": ["moe", "moe"],
        "sliding_window": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        # Many heads: where all are negative, index scores are 0, and the choice is arbitrary.
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 16,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    return transformers.DeepseekV4Config(**small | fields)


def make(*, kvfold: bool, device: str, seed: int = 0, dtype=torch.float32, **fields: Any) -> Any:
    """A model with random weights; those of one seed are the same with and without kvfold.

    The patch is there afterwards if the model has kvfold.
    """
    adapter.unpatch()
    if kvfold:
        adapter.patch()
    torch.manual_seed(seed)
    model = transformers.DeepseekV4ForCausalLM(config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("position_bias", "sinks")):
                parameter.normal_()
    return model.to(device=device, dtype=dtype)


def prompt(batch: int, length: int, device: str, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(device)


def forward(model: Any, tokens: Tensor, cache: Any = None, **others: Any) -> Tensor:
    """The logits of a call; `cache` is named as the version of transformers does."""
    names = inspect.signature(model.model.forward).parameters
    others["cache" if "cache" in names else "past_key_values"] = cache
    return model(input_ids=tokens, use_cache=cache is not None, **others).logits


def new_cache(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


@torch.no_grad()
def logits_in_chunks(model: Any, tokens: Tensor, chunks: list[int], cache: Any = None) -> Tensor:
    """The logits of all tokens, fed in chunks, of which the last has what is left."""
    cache = new_cache(model) if cache is None else cache
    sizes = [*chunks, tokens.size(1) - sum(chunks)]
    return torch.cat([forward(model, part, cache) for part in tokens.split(sizes, dim=1)], dim=1)


def greedy(model: Any, tokens: Tensor, new: int, **others: Any) -> Tensor:
    """The tokens that greedy generation adds."""
    made = model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, **others)
    return made[:, tokens.size(1) :]
