"""Models with kvfold give the logits, tokens and gradients of those without."""

import copy

import pytest
import torch
from transformers_models import (
    DEVICES,
    forward,
    greedy,
    logits_in_chunks,
    make,
    new_cache,
    prompt,
)

import kvfold.adapters.transformers as adapter
from kvfold.adapters.transformers.cache_layers import KvfoldLayer

CHUNKS = {
    "whole": [],
    "token by token at the end": [300] + [1] * 40,
    "drafts": [257, 3, 5, 8, 2, 1, 6, 7, 4],
    "chunks of all phases": [1, 2, 5, 127, 130, 9],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_logits(device, batch, chunks):
    """Chunks in both models: without, transformers adds the same numbers in the same order."""
    plain, kvfold = make(kvfold=False, device=device), make(kvfold=True, device=device)
    tokens = prompt(batch, 345, device)
    cache = new_cache(kvfold)
    got = logits_in_chunks(kvfold, tokens, CHUNKS[chunks], cache)
    assert all(isinstance(layer, KvfoldLayer) and layer.states for layer in cache.layers)
    adapter.unpatch()
    torch.testing.assert_close(
        got, logits_in_chunks(plain, tokens, CHUNKS[chunks]), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_generation(device, batch):
    plain, kvfold = make(kvfold=False, device=device), make(kvfold=True, device=device)
    tokens = prompt(batch, 250, device)
    got = greedy(kvfold, tokens, 24)
    adapter.unpatch()
    assert torch.equal(got, greedy(plain, tokens, 24))


@pytest.mark.parametrize("device", DEVICES)
def test_left_padding(device):
    plain, kvfold = make(kvfold=False, device=device), make(kvfold=True, device=device)
    tokens = prompt(3, 150, device)
    mask = torch.ones_like(tokens)
    mask[1, :7], mask[2, :40] = 0, 0
    tokens[mask == 0] = 0
    got = greedy(kvfold, tokens, 12, attention_mask=mask)
    adapter.unpatch()
    assert torch.equal(got, greedy(plain, tokens, 12, attention_mask=mask))


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_logits_are_as_close_to_fp32(device):
    """Squared errors against fp32 models with the same weights, over the logits of six models."""
    errors = {True: 0.0, False: 0.0}
    for seed in range(6):
        tokens = prompt(2, 200, device, seed=seed)
        rounded = make(kvfold=False, device=device, dtype=torch.bfloat16, seed=seed)
        exact = logits_in_chunks(rounded.float(), tokens, [])
        for kvfold in errors:
            model = make(kvfold=kvfold, device=device, dtype=torch.bfloat16, seed=seed)
            got = logits_in_chunks(model, tokens, [150]).float()
            errors[kvfold] += (got - exact).square().mean().item()
    assert errors[True] <= 1.1 * errors[False]


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_rows_are_closer_to_fp32(device):
    """The rows of each compressor, from the same KV and scores."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    for kvfold in errors:
        model = make(kvfold=kvfold, device=device, dtype=torch.bfloat16)
        hidden = torch.randn(2, 260, 64, generator=torch.Generator().manual_seed(1))
        hidden = hidden.to(device, torch.bfloat16)
        position = torch.arange(260, device=device).expand(2, -1)
        for layer in model.model.layers:
            compressor = layer.self_attn.compressor
            exact = copy.deepcopy(compressor).float()
            q_residual = torch.zeros(2, 260, 32, device=device)
            with torch.no_grad():
                of_layer = layer.self_attn.layer_idx
                got, _ = compressor(
                    hidden, q_residual.to(hidden.dtype), position, new_cache(model), of_layer
                )
                want, _ = exact(hidden.float(), q_residual, position, None, of_layer)
            errors[kvfold].append((got.float() - want).square().mean().item())
    assert all(ours <= theirs for ours, theirs in zip(*errors.values(), strict=True)), errors


def test_without_a_cache_and_with_gradients_the_code_of_transformers_runs():
    plain, kvfold = make(kvfold=False, device="cpu"), make(kvfold=True, device="cpu")
    tokens = prompt(2, 140, "cpu")
    gradients = []
    for model, cache in ((plain, None), (kvfold, None), (kvfold, new_cache(kvfold))):
        model.zero_grad()
        forward(model, tokens, cache).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()
                          if parameter.grad is not None])  # fmt: skip
    for other in gradients[1:]:
        for got, want in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_gradients_after_a_call_without_are_refused():
    model = make(kvfold=True, device="cpu")
    tokens, cache = prompt(1, 20, "cpu"), new_cache(model)
    logits_in_chunks(model, tokens, [], cache)
    with pytest.raises(RuntimeError, match=r"require gradients; accepted: none .*no_grad"):
        forward(model, tokens[:, :1], cache)
    with torch.no_grad():
        forward(model, tokens[:, :1], cache)


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_calls_with_and_without_inference_mode_in_turn(first):
    model = make(kvfold=True, device="cpu")
    tokens = prompt(2, 300, "cpu")
    modes = [torch.no_grad, torch.inference_mode]
    modes.sort(key=lambda mode: mode is not first)
    cache, parts = new_cache(model), []
    for number, part in enumerate(tokens.split([150, 1, 30, 119], dim=1)):
        with modes[number % 2]():
            parts.append(forward(model, part, cache))
    want = logits_in_chunks(model, tokens, [])
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=0, atol=1e-4)
