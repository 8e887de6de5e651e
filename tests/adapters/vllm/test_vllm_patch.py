"""patch(): vLLM's own classes, whose forward is kvfold's."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import vllm_fakes
from vllm_cases import BLOCKS, assert_same_bytes, serving_steps
from vllm_engine import KINDS, Batcher, Layer, run_oracle
from vllm_fakes import ForwardContext, common_metadata, make_compressor, make_rotary_emb

from kvfold.adapters.vllm import StepMetadata, patch, unpatch

torch.set_num_threads(1)

KIND = KINDS["index_fp8"]


@pytest.fixture
def vllm():
    with vllm_fakes.installed() as fake:
        patch()
        try:
            yield fake
        finally:
            unpatch()


@pytest.fixture
def builds(monkeypatch):
    """Counts StepMetadata.build."""
    made = []
    original = StepMetadata.build
    monkeypatch.setattr(StepMetadata, "build", lambda *a, **k: made.append(a) or original(*a, **k))
    return made


def compressor_of(vllm, layer, name="layer"):
    return make_compressor(layer, name, vllm.compressor.DeepseekCompressor)


def metadata_of(vllm, kind, batch, compressors):
    """attn_metadata of a step: layers of one group share their objects."""
    builder = vllm.compressor.CompressorMetadataBuilder(kind.block_size)
    state = builder.build(0, common_metadata(batch))
    cache = SimpleNamespace(slot_mapping=batch.cache_slot_mapping)
    return {
        name: metadata
        for one in compressors
        for name, metadata in ((one.state_cache.prefix, state), (one.k_cache_prefix, cache))
    }


def forward(vllm, kind, batch, layers, compressors):
    """One forward of the model."""
    vllm.context = ForwardContext(metadata_of(vllm, kind, batch, compressors))
    for layer, one in zip(layers, compressors, strict=True):
        one.forward(batch.kv_score, batch.positions, make_rotary_emb(layer))


# ---- The work of the kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index_fp8", "c4_fp8", "c128"])
def test_two_layers_of_a_group(vllm, builds, name):
    kind = KINDS[name]
    expected = [Layer.make(kind, BLOCKS, seed) for seed in range(2)]
    actual = [layer.to("cpu") for layer in expected]
    compressors = [compressor_of(vllm, layer, f"layers.{i}") for i, layer in enumerate(actual)]
    with torch.inference_mode():
        for number, batch in enumerate(serving_steps(kind)):
            for layer in expected:
                run_oracle(layer, batch)
            forward(vllm, kind, batch, actual, compressors)
            for mine, wanted in zip(actual, expected, strict=True):
                assert_same_bytes(mine, wanted, f"step {number}")
            assert len(builds) == number + 1


def test_each_forward_reads_its_metadata_anew(vllm, builds):
    """vLLM updates metadata in place between the forwards of drafts."""
    expected = Layer.make(KIND, BLOCKS)
    actual = expected.to("cpu")
    one = compressor_of(vllm, actual)
    requests = Batcher(KIND, BLOCKS)
    first = requests.step({"a": 7})
    forward(vllm, KIND, first, [actual], [one])
    run_oracle(expected, first)
    batch = requests.step({"a": 3})
    metadata = metadata_of(vllm, KIND, batch, [one])
    for number in range(3):
        vllm.context = ForwardContext(metadata)
        one.forward(batch.kv_score, batch.positions, make_rotary_emb(actual))
        run_oracle(expected, batch)
        assert_same_bytes(actual, expected, f"forward {number}")
        later = requests.step({"a": 3})
        for name in ("seq_lens", "slot_mapping", "cache_slot_mapping"):
            getattr(batch, name).copy_(getattr(later, name))
        batch.positions.copy_(later.positions)
        width = min(batch.block_table.size(1), later.block_table.size(1))
        batch.block_table[:, :width] = later.block_table[:, :width]
        state = metadata[one.state_cache.prefix]
        state.block_table[:, :width] = later.block_table[:, :width]
    assert len(builds) == 4


def test_groups_that_share_a_state_but_not_a_cache_have_steps_of_their_own(vllm, builds):
    expected = [Layer.make(KIND, BLOCKS, seed) for seed in range(2)]
    actual = [layer.to("cpu") for layer in expected]
    compressors = [compressor_of(vllm, layer, f"layers.{i}") for i, layer in enumerate(actual)]
    batch = Batcher(KIND, BLOCKS).step({"a": 9})
    metadata = metadata_of(vllm, KIND, batch, compressors)
    none = torch.full_like(batch.cache_slot_mapping, -1)
    metadata[compressors[1].k_cache_prefix] = SimpleNamespace(slot_mapping=none)
    vllm.context = ForwardContext(metadata)
    for layer, one in zip(actual, compressors, strict=True):
        one.forward(batch.kv_score, batch.positions, make_rotary_emb(layer))
    run_oracle(expected[0], batch)
    batch.cache_slot_mapping.copy_(none)
    run_oracle(expected[1], batch)
    for mine, wanted in zip(actual, expected, strict=True):
        assert_same_bytes(mine, wanted, "two caches")
    assert len(builds) == 2


def test_caches_that_are_bound_anew_are_used(vllm):
    layers = [Layer.make(KIND, BLOCKS) for _ in range(2)]
    one = compressor_of(vllm, layers[0])
    batch = Batcher(KIND, BLOCKS).step({"a": 9})
    forward(vllm, KIND, batch, layers[:1], [one])
    one.state_cache.kv_cache = layers[1].state_cache
    one._static_forward_context[one.k_cache_prefix].kv_cache = layers[1].kv_cache
    forward(vllm, KIND, batch, layers[1:], [one])
    assert_same_bytes(layers[1], layers[0], "the new caches")


def test_a_profiling_run_does_nothing(vllm):
    layer = Layer.make(KIND, BLOCKS)
    before = layer.to("cpu")
    batch = Batcher(KIND, BLOCKS).step({"a": 9})
    vllm.context = ForwardContext(None)
    compressor_of(vllm, layer).forward(batch.kv_score, batch.positions, make_rotary_emb(layer))
    assert_same_bytes(layer, before, "profiling")


# ---- Installing ----------------------------------------------------------------------------------


def test_unpatch_restores_vllm():
    with vllm_fakes.installed() as fake:
        owners = fake.compressor.DeepseekCompressor, fake.compressor.CompressorMetadataBuilder
        before = owners[0].forward, owners[1].build
        patch()
        patch()
        assert owners[0].forward is not before[0] and owners[1].build is not before[1]
        unpatch()
        unpatch()
        assert (owners[0].forward, owners[1].build) == before


def test_functions_of_another_version_are_refused():
    with vllm_fakes.installed() as fake:
        fake.compressor.CompressorMetadataBuilder.build = lambda self, metadata: None
        before = fake.compressor.DeepseekCompressor.forward
        with pytest.raises(ValueError, match=r"CompressorMetadataBuilder.build is .*fast_build"):
            patch()
        assert fake.compressor.DeepseekCompressor.forward is before


def test_without_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from kvfold.adapters.vllm import patch\n"
        "try: patch()\n"
        "except ImportError: print('no vLLM')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no vLLM\n"


# ---- Refused -------------------------------------------------------------------------------------


def refused(vllm, kind, match, one=None):
    layer = Layer.make(kind, BLOCKS)
    before = layer.to("cpu")
    one = one(layer) if one else compressor_of(vllm, layer)
    batch = Batcher(kind, BLOCKS).step({"a": 9})
    with pytest.raises(ValueError, match=match):
        forward(vllm, kind, batch, [layer], [one])
    assert_same_bytes(layer, before, "refused")


def test_scales_as_deep_gemm_takes_them_on_sm_100_are_refused(vllm):
    vllm.mx_scales = True
    refused(vllm, KIND, "indexer's cache is fp8 with a scale of four equal e8m0 bytes")


@pytest.mark.parametrize("name", ["index_fp4", "c4"])
def test_other_caches_are_served_on_sm_100(vllm, name):
    vllm.mx_scales = True
    kind = KINDS[name]
    expected = Layer.make(kind, BLOCKS)
    actual = expected.to("cpu")
    batch = Batcher(kind, BLOCKS).step({"a": 9})
    run_oracle(expected, batch)
    forward(vllm, kind, batch, [actual], [compressor_of(vllm, actual)])
    assert_same_bytes(actual, expected, name)


def test_a_subclass_with_a_layout_of_its_own_is_refused(vllm):
    class RocmCompressor(vllm.compressor.DeepseekCompressor):
        def _compress_norm_rope_store(self) -> None: ...

    refused(vllm, KIND, "RocmCompressor", lambda layer: make_compressor(layer, "x", RocmCompressor))


def test_prefill_context_parallelism_is_refused(vllm):
    builder = vllm.compressor.CompressorMetadataBuilder(4, shards=2)
    batch = Batcher(KIND, BLOCKS).step({"a": 9})
    with pytest.raises(ValueError, match="prefill_context_parallel_size is 2; accepted: 1"):
        builder.build(0, common_metadata(batch))
