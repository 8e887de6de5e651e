"""What patch() changes, for which models, and that unpatch() undoes it."""

import pytest
import torch
from transformers import cache_utils
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers_models import config, greedy, logits_in_chunks, make, new_cache, prompt

import kvfold.adapters.transformers as adapter
from kvfold.adapters.transformers.cache_layers import KvfoldLayer
from kvfold.adapters.transformers.compressors import CSACompressor, HCACompressor, Indexer


def state_of_transformers() -> tuple:
    return (
        dict(modeling.COMPRESSOR_CLASSES),
        dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING),
        modeling.DeepseekV4PreTrainedModel._is_stateful,
    )


def test_the_import_alone_changes_nothing():
    assert modeling.COMPRESSOR_CLASSES["heavily_compressed_attention"].__module__ == (
        modeling.__name__
    )
    layers = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    assert layers["compressed_sparse_attention"] is modeling.DeepseekV4CSACache
    assert modeling.DeepseekV4PreTrainedModel._is_stateful is True


def test_patch_is_undone_by_unpatch_and_by_the_end_of_a_with_statement():
    before = state_of_transformers()
    adapter.patch()
    with adapter.patch():
        pass  # it is not the first
    assert state_of_transformers() != before
    adapter.unpatch()
    assert state_of_transformers() == before
    adapter.unpatch()
    with pytest.raises(KeyError), adapter.patch():
        assert state_of_transformers() != before
        raise KeyError
    assert state_of_transformers() == before


def test_a_model_has_kvfolds_compressors_under_the_same_names():
    plain, kvfold = make(kvfold=False, device="cpu"), make(kvfold=True, device="cpu")
    kinds = [type(layer.self_attn.compressor) for layer in kvfold.model.layers]
    assert kinds == [HCACompressor, CSACompressor]
    assert isinstance(kvfold.model.layers[1].self_attn.compressor.indexer, Indexer)
    want = {name: value.shape for name, value in plain.state_dict().items()}
    assert {name: value.shape for name, value in kvfold.state_dict().items()} == want


def test_a_checkpoint_loads(tmp_path):
    plain = make(kvfold=False, device="cpu", seed=5)
    plain.save_pretrained(tmp_path)
    with adapter.patch():
        loaded = type(plain).from_pretrained(tmp_path, dtype=torch.float32).eval()
    for name, value in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_random_weights_are_initialised():
    with adapter.patch():
        model = modeling.DeepseekV4ForCausalLM(config())
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    indexer = model.model.layers[1].self_attn.compressor.indexer
    assert not indexer.position_bias.any() and indexer.kv_proj.weight.std() > 0


@pytest.mark.parametrize("field", ["head_dim", "index_head_dim"])
def test_a_size_that_kvfold_does_not_serve_is_refused(field):
    message = rf"config\.{field} is 64; kvfold accepts: 128, 256, 512"
    with adapter.patch(), pytest.raises(ValueError, match=message):
        modeling.DeepseekV4ForCausalLM(config(**{field: 64}))


def test_drafts_are_refused_for_models_without_kvfold_alone():
    plain, kvfold = make(kvfold=False, device="cpu"), make(kvfold=True, device="cpu")
    tokens = prompt(1, 12, "cpu")
    adapter.unpatch()
    with adapter.patch():
        with pytest.raises(ValueError, match="stateful"):
            greedy(plain, tokens, 4, prompt_lookup_num_tokens=2)
        greedy(kvfold, tokens, 4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        greedy(kvfold, tokens, 4, prompt_lookup_num_tokens=2)


def test_models_and_caches_of_both_kinds_mix():
    """A model without kvfold with caches of kvfold, and the other way round."""
    plain, kvfold = make(kvfold=False, device="cpu"), make(kvfold=True, device="cpu")
    adapter.unpatch()
    tokens = prompt(2, 150, "cpu")
    want = logits_in_chunks(plain, tokens, [140])
    own = new_cache(kvfold)
    with adapter.patch():
        cache = new_cache(plain)
    assert isinstance(cache.layers[0], KvfoldLayer) and not isinstance(own.layers[0], KvfoldLayer)
    torch.testing.assert_close(logits_in_chunks(plain, tokens, [140], cache), want)
    torch.testing.assert_close(logits_in_chunks(kvfold, tokens, [140], own), want)
    assert not cache.layers[0].states
