"""Drafts that are rejected, beams, and other changes of a cache's sequences."""

import itertools

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
from kvfold.adapters.transformers.compressor_state import PAGE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [20, 250])
@pytest.mark.parametrize("draft", ["same", "other"])
def test_assisted_generation(device, draft, length):
    """Tokens are those of plain greedy generation. Another model's drafts are mostly wrong."""
    model = make(kvfold=True, device=device)
    assistant = model if draft == "same" else make(kvfold=True, device=device, seed=7)
    tokens = prompt(1, length, device)
    want = greedy(model, tokens, 30)
    assert torch.equal(greedy(model, tokens, 30, assistant_model=assistant), want)


@pytest.mark.parametrize("device", DEVICES)
def test_prompt_lookup(device):
    model = make(kvfold=True, device=device)
    tokens = prompt(1, 60, device).repeat(1, 3)
    got = greedy(model, tokens, 30, prompt_lookup_num_tokens=5)
    assert torch.equal(got, greedy(model, tokens, 30))


@pytest.mark.parametrize("device", DEVICES)
def test_crops_of_all_sizes(device):
    """After a crop the logits are those of a cache that never had the tokens."""
    model = make(kvfold=True, device=device)
    tokens, wrong = prompt(2, 500, device), prompt(2, 300, device, seed=2)
    want = logits_in_chunks(model, tokens, [])
    cache = new_cache(model)
    cache.activate_past_recording()
    done, removed = 0, itertools.cycle([1, 0, 7, 33, 130, 256, 2, 5])
    with torch.no_grad():
        for new in (140, 1, 3, 130, 5, 12, 8, 129, 1, 1, 2, 10):
            got = forward(model, tokens[:, done : done + new], cache)
            torch.testing.assert_close(got, want[:, done : done + new], rtol=0, atol=1e-4)
            done += new
            cache.crop(0)
            if count := next(removed):
                forward(model, wrong[:, :count], cache)
                cache.crop(-count)
            assert cache.get_seq_length() == done


def test_a_crop_that_is_too_large_is_refused_and_changes_nothing():
    model = make(kvfold=True, device="cpu")
    tokens, cache = prompt(1, 700, "cpu"), new_cache(model)
    cache.activate_past_recording()
    logits_in_chunks(model, tokens[:, :600], [], cache)
    with pytest.raises(ValueError, match=r"crop to 60 of 600 tokens; accepted: a crop by 256 or"):
        cache.layers[0].crop(-540)
    assert cache.get_seq_length() == 600
    cache = new_cache(model)
    cache.activate_past_recording()
    got = logits_in_chunks(model, tokens, [600], cache)
    torch.testing.assert_close(got, logits_in_chunks(model, tokens, []), rtol=0, atol=1e-4)


def test_recording_that_begins_late_keeps_what_is_there():
    model = make(kvfold=True, device="cpu")
    tokens, cache = prompt(1, 400, "cpu"), new_cache(model)
    want = logits_in_chunks(model, tokens, [])
    logits_in_chunks(model, tokens[:, :333], [], cache)
    pages = cache.layers[0].states["compressor"].pages
    cache.activate_past_recording()
    assert cache.layers[0].states["compressor"].pages > pages
    with torch.no_grad():
        forward(model, tokens[:, :130], cache)
        cache.crop(-130)
        got = forward(model, tokens[:, 333:], cache)
    torch.testing.assert_close(got, want[:, 333:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_beam_search(device):
    plain, kvfold = make(kvfold=False, device=device), make(kvfold=True, device=device)
    tokens = prompt(2, 130, device)
    got = greedy(kvfold, tokens, 14, num_beams=3)
    adapter.unpatch()
    # Without a cache: that of transformers 5.17 does not reorder what its compressors keep.
    assert torch.equal(got, greedy(plain, tokens, 14, num_beams=3, use_cache=False))


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_reordered_repeated_and_selected(device):
    model = make(kvfold=True, device=device)
    tokens = prompt(3, 200, device)
    want = logits_in_chunks(model, tokens, [])
    cache = new_cache(model)
    logits_in_chunks(model, tokens[:, :150], [], cache)
    order = torch.tensor([2, 0, 1], device=device)
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    chosen = torch.tensor([0, 3, 5], device=device)
    cache.batch_select_indices(chosen)
    sequences = order.repeat_interleave(2)[chosen]
    got = logits_in_chunks(model, tokens[sequences, 150:], [20, 1, 1], cache)
    torch.testing.assert_close(got, want[sequences, 150:], rtol=0, atol=1e-4)


def test_a_cache_that_is_reset_is_as_a_new_one():
    model = make(kvfold=True, device="cpu")
    cache = new_cache(model)
    logits_in_chunks(model, prompt(2, 200, "cpu", seed=3), [], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    tokens = prompt(3, 170, "cpu")  # another batch
    got = logits_in_chunks(model, tokens, [165], cache)
    torch.testing.assert_close(got, logits_in_chunks(model, tokens, []), rtol=0, atol=1e-4)


def test_the_state_is_a_ring_and_the_rows_grow():
    model = make(kvfold=True, device="cpu")
    cache = new_cache(model)
    logits_in_chunks(model, prompt(1, 1000, "cpu"), [400], cache)
    for layer, ratio, rows in zip(cache.layers, (128, 4), (7, 250), strict=True):
        for state in layer.states.values():
            assert state.ring == (256 if ratio == 128 else 128) == state.pages * PAGE
            assert state.windows == rows <= state.rows.size(1) <= 2 * max(rows, 64)
    assert [layer._layer_type for layer in cache.layers] == [None, None]
