"""Decoding with a GraphedDecoder."""

import pytest
import torch
from transformers_models import (
    CSA,
    DEVICES,
    HCA,
    forward,
    logits_in_chunks,
    make,
    new_cache,
    prompt,
)

import kvfold.adapters.transformers as adapter


def decoder_after(model, tokens, length, max_length, mask=None):
    cache = new_cache(model)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        forward(model, tokens[:, :length], cache, attention_mask=mask, position_ids=positions)
    return adapter.GraphedDecoder(model, cache, max_length, attention_mask=mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [3, 130, 254])
def test_logits(device, length):
    """All phases of both windows, and the ring of keys more than once."""
    model = make(kvfold=True, device=device)
    tokens = prompt(2, length + 70, device)
    want = logits_in_chunks(model, tokens, [])
    with decoder_after(model, tokens, length, length + 70) as decoder:
        for place in range(length, length + 70):
            got = decoder.step(tokens[:, place])
            torch.testing.assert_close(got, want[:, place], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_with_a_layer_without_compressor(mode):
    kinds = {"layer_types": ["sliding_attention", HCA, CSA], "mlp_layer_types": ["moe"] * 3}
    model = make(kvfold=True, device="cpu", num_hidden_layers=3, **kinds)
    tokens, cache = prompt(2, 180, "cpu"), new_cache(model)
    want = logits_in_chunks(model, tokens, [])
    with mode():
        forward(model, tokens[:, :130], cache)
    with adapter.GraphedDecoder(model, cache, 180) as decoder:
        for place in range(130, 180):
            got = decoder.step(tokens[:, place])
            torch.testing.assert_close(got, want[:, place], rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_left_padding(device):
    model = make(kvfold=True, device=device)
    tokens = prompt(3, 100, device)
    mask = torch.ones_like(tokens)
    mask[1, :7], mask[2, :38] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = forward(model, tokens, attention_mask=mask, position_ids=positions)
    with decoder_after(model, tokens, 50, 100, mask[:, :50]) as decoder:
        for place in range(50, 100):
            got = decoder.step(tokens[:, place])
            torch.testing.assert_close(got, want[:, place], rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_steps_in_bf16_are_graph_launches_with_the_logits_of_eager_steps():
    """In bf16 the experts of transformers do not wait for the device."""
    model = make(kvfold=True, device="cuda", dtype=torch.bfloat16)
    tokens = prompt(4, 200, "cuda")
    cache = new_cache(model)
    with torch.no_grad():
        forward(model, tokens[:, :100], cache)
        eager = [forward(model, tokens[:, i : i + 1], cache)[:, 0] for i in range(100, 200)]
    with decoder_after(model, tokens, 100, 200) as decoder:
        for place in range(100, 200):
            got = decoder.step(tokens[:, place])
            error = (got - eager[place - 100]).float().square().mean().sqrt()
            assert error < 0.05 * eager[place - 100].float().std()
        assert decoder.counters.replayed == 99 and decoder.counters.captured == 1


@pytest.mark.gpu
def test_a_compressor_never_synchronises_nor_grows():
    """In a decode step, of 1 and of 4 tokens."""
    model = make(kvfold=True, device="cuda", dtype=torch.bfloat16)
    tokens, cache = prompt(2, 300, "cuda"), new_cache(model)
    logits_in_chunks(model, tokens[:, :270], [], cache)  # the rows have just grown
    layer, state = cache.layers[1], cache.layers[1].states["compressor"]
    kv = torch.randn(2, 4, state.state_dim, device="cuda", dtype=torch.bfloat16)
    for new in (1, 4):  # compiles what is needed
        layer.store_compression_weights("compressor", kv[:, :new], kv[:, :new])
    room = state.rows.data_ptr(), state.pool.data_ptr(), state.block_table.data_ptr()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for new in (1, 4, 1, 1, 4):
            layer.store_compression_weights("compressor", kv[:, :new], kv[:, :new])
            layer.update_compressor_states("compressor", kv)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert room == (state.rows.data_ptr(), state.pool.data_ptr(), state.block_table.data_ptr())


def test_what_cannot_be_served_is_refused():
    model = make(kvfold=True, device="cpu")
    tokens = prompt(2, 20, "cpu")
    with pytest.raises(ValueError, match=r"layer 0 of cache, HCALayer, is empty"):
        adapter.GraphedDecoder(model, new_cache(model), 100)
    cache = new_cache(model)
    forward(model, tokens, cache)
    with pytest.raises(ValueError, match=r"layer 0 of cache has run without kvfold"):
        adapter.GraphedDecoder(model, cache, 100)
    adapter.unpatch()
    cache = new_cache(model)
    logits_in_chunks(model, tokens, [], cache)
    with pytest.raises(ValueError, match=r"layer 0 of cache has run without kvfold"):
        adapter.GraphedDecoder(model, cache, 100)
    adapter.patch()
    with pytest.raises(ValueError, match=r"max_length is 19; accepted: 20 or more"):
        decoder_after(model, tokens, 20, 19)
    mask = torch.ones(2, 20)
    cache = new_cache(model)
    logits_in_chunks(model, tokens, [], cache)
    with pytest.raises(ValueError, match=r"attention_mask is of shape \[2, 19\]; accepted: .*20"):
        adapter.GraphedDecoder(model, cache, 100, mask[:, :19])
    with adapter.GraphedDecoder(model, cache, 21, mask) as decoder:
        with pytest.raises(ValueError, match=r"tokens is of shape \[2, 1\]; accepted: \[2\]"):
            decoder.step(tokens[:, :1])
        decoder.step(tokens[:, 0])
        with pytest.raises(ValueError, match="max_length = 21"):
            decoder.step(tokens[:, 0])
        with (
            pytest.raises(ValueError, match="key_states has 2 tokens; accepted: 1"),
            torch.no_grad(),
        ):
            forward(model, tokens[:, :2], cache)
