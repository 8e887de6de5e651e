"""Whole steps: state and cache hold the bytes that vLLM's kernels would write."""

from dataclasses import replace

import pytest
import torch
from vllm_cases import (
    BLOCKS,
    adapter_layer,
    assert_same_bytes,
    build,
    padded,
    random_steps,
    replay_steps,
    run_steps,
    serving_steps,
    shifted,
)
from vllm_engine import EPS, KINDS, Batcher, Layer, run_oracle

from kvfold import formats
from kvfold.adapters.vllm import CompressorLayer
from kvfold.adapters.vllm import layer as layer_module
from kvfold.adapters.vllm.step_metadata import MOST_DECODE_TOKENS
from kvfold.codegen import load_table, op_spec
from kvfold.runtime.arguments import DTYPE_NAMES

torch.set_num_threads(1)

KIND = KINDS["index_fp8"]
each_kind = pytest.mark.parametrize("name", KINDS)


# ---- The same bytes ------------------------------------------------------------------------------


@each_kind
def test_steps_of_a_server(name):
    assert run_steps(KINDS[name], serving_steps(KINDS[name]), replays=False) > 10


@pytest.mark.parametrize("name", ["c128", "index_fp8"])
def test_the_same_where_replays_are_possible(name):
    assert run_steps(KINDS[name], serving_steps(KINDS[name], seed=1)) > 10


@pytest.mark.parametrize("name", ["c4", "c128", "c128_bf16", "index_fp8", "index_pages_6"])
def test_tokens_that_are_computed_again_are_not_stored(name):
    assert run_steps(KINDS[name], replay_steps(KINDS[name])) > 5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["c128", "index_fp8", "index_pages_6"])
def test_random_steps(name, seed):
    assert run_steps(KINDS[name], random_steps(KINDS[name], seed)) > 2


@pytest.mark.parametrize("replays", [True, False])
def test_query_start_loc_may_begin_behind_padding(replays):
    batches = [shifted(batch, 3) for batch in serving_steps(KIND)]
    # The oracle's requests begin with token 3, as its tokens before have no slot.
    expected = Layer.make(KIND, BLOCKS)
    actual = expected.to("cpu")
    for plain, batch in zip(serving_steps(KIND), batches, strict=True):
        run_oracle(expected, plain)
        step = build(KIND, batch, replays=replays)
        adapter_layer(actual).compress_and_store(batch.kv_score, step)
        assert_same_bytes(actual, expected, "shifted")


@pytest.mark.parametrize("name", ["c128", "index_fp8"])
def test_decodes_through_the_prefill_op_are_the_same(name):
    kind = KINDS[name]
    batches = [replace(batch, max_query_len=999) for batch in serving_steps(kind)]
    assert all(build(kind, batch).next_n is None for batch in batches[:2])
    assert run_steps(kind, batches, replays=False) > 10


@pytest.mark.parametrize("replays", [True, False])
def test_batches_that_are_padded_to_one_shape_are_the_same(replays):
    steps = list(serving_steps(KIND))
    assert run_steps(KIND, [padded(batch, steps) for batch in steps], replays=replays) > 10


def test_rows_of_kv_score_beyond_the_slots_are_not_read():
    expected = Layer.make(KIND, BLOCKS)
    actual = expected.to("cpu")
    batch = Batcher(KIND, BLOCKS).step({"a": 9, "b": 5})
    run_oracle(expected, batch)
    padded = torch.nn.functional.pad(batch.kv_score, (0, 0, 0, 4), value=torch.nan)
    adapter_layer(actual).compress_and_store(padded, build(KIND, batch))
    assert_same_bytes(actual, expected, "padded")


def test_a_request_beyond_the_slots_is_not_stored():
    """query_start_loc may be wrong; the tokens beyond slot_mapping have no slot."""
    expected = Layer.make(KIND, BLOCKS)
    actual = expected.to("cpu")
    batch = Batcher(KIND, BLOCKS).step({"a": 9, "b": 8})
    cut = replace(
        batch, slot_mapping=batch.slot_mapping[:9], cache_slot_mapping=batch.cache_slot_mapping[:9]
    )
    for slots in (batch.slot_mapping, batch.cache_slot_mapping):
        slots[9:] = -1
    run_oracle(expected, batch)
    for replays in (False, True):
        step = build(KIND, cut, replays=replays)
        adapter_layer(actual).compress_and_store(batch.kv_score, step)
        assert_same_bytes(actual, expected, f"{replays=}")


@pytest.mark.parametrize("replays", [True, False])
def test_tokens_beyond_cache_slot_mapping_have_no_slot_in_the_cache(replays):
    expected = Layer.make(KIND, BLOCKS)
    actual = expected.to("cpu")
    batch = Batcher(KIND, BLOCKS).step({"a": 9, "b": 8})
    cut = replace(batch, cache_slot_mapping=batch.cache_slot_mapping[:-1])
    batch.cache_slot_mapping[-1] = -1
    assert run_oracle(expected, batch) == 3
    step = build(KIND, cut, replays=replays)
    adapter_layer(actual).compress_and_store(batch.kv_score, step)
    assert_same_bytes(actual, expected, f"{replays=}")


@pytest.mark.parametrize("replays", [True, False])
def test_tokens_beyond_the_block_table_are_not_stored(replays):
    expected = Layer.make(KIND, BLOCKS)
    actual = expected.to("cpu")
    batch = Batcher(KIND, BLOCKS).step({"a": 11})
    cut = replace(
        batch,
        block_table=batch.block_table[:, :2],
        cache_slot_mapping=torch.full_like(batch.cache_slot_mapping, -1),
    )
    run_oracle(expected, replace(cut, slot_mapping=batch.slot_mapping.clone().index_fill_(
        0, torch.arange(8, 11), -1)))  # fmt: skip
    step = build(KIND, cut, replays=replays)
    adapter_layer(actual).compress_and_store(batch.kv_score, step)
    assert_same_bytes(actual, expected, f"{replays=}")


def test_a_request_with_tokens_without_a_slot_between_others_is_skipped():
    layer = Layer.make(KIND, BLOCKS)
    before = layer.to("cpu")
    vllm = Batcher(KIND, BLOCKS)
    batch = vllm.step({"a": 9})
    batch.slot_mapping[3] = -1
    adapter_layer(layer).compress_and_store(batch.kv_score, build(KIND, batch))
    assert_same_bytes(layer, before, "a hole")


@pytest.mark.parametrize(
    ("tokens", "most", "replays"), [(7, 4, False), (7, 4, True), (20, 9, True)]
)
def test_requests_of_more_tokens_than_max_query_len_are_skipped(tokens, most, replays):
    layer = Layer.make(KIND, BLOCKS)
    before = layer.to("cpu")
    batch = replace(Batcher(KIND, BLOCKS).step({"a": tokens}), max_query_len=most)
    adapter_layer(layer).compress_and_store(batch.kv_score, build(KIND, batch, replays=replays))
    assert_same_bytes(layer, before, "longer than promised")


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("requests", [0, 2])
def test_a_step_without_tokens_does_nothing(replays, padding, requests):
    layer = Layer.make(KIND, BLOCKS)
    before = layer.to("cpu")
    vllm = Batcher(KIND, BLOCKS)
    batch = vllm.step({}, padding_requests=requests, padding_tokens=padding)
    adapter_layer(layer).compress_and_store(batch.kv_score, build(KIND, batch, replays=replays))
    assert_same_bytes(layer, before, "no tokens")


@pytest.mark.parametrize("replays", [True, False])
def test_nonsense_in_the_metadata_writes_to_no_page_that_it_does_not_name(replays):
    rng = torch.Generator().manual_seed(0)
    corners = torch.tensor([-(2**31), -5, -1, 0, 1, 2, 3, 7, 60, 2**31 - 1])
    for _ in range(40):
        layer = Layer.make(KIND, 40)
        before = layer.to("cpu")
        batch = Batcher(KIND, 40).step({"a": 7, "b": 4, "c": 11}, padding_tokens=2)
        for x in (batch.query_start_loc, batch.seq_lens, batch.slot_mapping,
                  batch.cache_slot_mapping):  # fmt: skip
            nonsense = corners[torch.randint(len(corners), x.shape, generator=rng)].to(x.dtype)
            x.copy_(torch.where(torch.rand(x.shape, generator=rng) < 0.3, nonsense, x))
        # What lies in pages 1 and 39 is in no table, and no slot of the cache is there.
        named = set(batch.block_table.flatten().tolist())
        named |= {slot // KIND.rows_per_page for slot in batch.cache_slot_mapping.tolist()}
        step = build(KIND, batch, replays=replays)
        adapter_layer(layer).compress_and_store(batch.kv_score, step)
        for block in set(range(40)) - named:
            page = slice(block * KIND.page_stride, (block + 1) * KIND.page_stride)
            assert torch.equal(layer.buffer[page], before.buffer[page])


# ---- The scale of fp8 rows -----------------------------------------------------------------------


RANDOM_SCALES = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 1e-3


@pytest.mark.parametrize(
    ("scales", "most"), [([0.25, 1.0, 8.0], 0), (RANDOM_SCALES.tolist(), 0), ([1.75], 30)]
)
def test_fp8_codes_of_all_bf16_values_against_vllms_reciprocal(scales, most):
    """vLLM multiplies by the rounded reciprocal of the scale. kvfold divides by the scale."""
    values = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    rows = torch.nn.functional.pad(values, (0, -len(values) % 512)).view(-1, 512)
    for scale in torch.tensor(scales).split(1):
        codes, _ = formats.quantise(rows, "fp8_tensor", rope_dim=64, scale=scale)
        product = (rows * (1 / scale)).clamp(-448, 448)
        difference = codes.int() - product.to(torch.float8_e4m3fn).view(torch.uint8).int()
        assert int((difference != 0).sum()) == most, scale
        assert int(difference.abs().max()) <= 1


# ---- One launch ----------------------------------------------------------------------------------


def test_a_layer_is_one_call_of_one_op(monkeypatch):
    calls = []
    for op in ("paged_kv_compress_store", "prefill_compress_store"):
        monkeypatch.setattr(
            layer_module, op, lambda *tensors, op=op, **options: calls.append((op, tensors))
        )
    vllm = Batcher(KIND, BLOCKS)
    layer = adapter_layer(Layer.make(KIND, BLOCKS))
    for count, op in ((9, "prefill_compress_store"), (8, "paged_kv_compress_store")):
        batch = vllm.step({"a": count})
        layer.compress_and_store(batch.kv_score, build(KIND, batch, replays=False))
        (name, tensors), *others = calls
        assert name == op and not others
        # Nothing is copied: the state, and the pages of the table, are vLLM's.
        assert tensors[4].data_ptr() == batch.block_table.data_ptr()
        assert tensors[2].data_ptr() == layer.state_cache.data_ptr()
        assert tensors[13].data_ptr() == layer.kv_cache.data_ptr()
        calls.clear()


# ---- Refused -------------------------------------------------------------------------------------


def layer_arguments(kind):
    layer = Layer.make(kind, 4)
    return {
        "ape": layer.ape,
        "state_cache": layer.state_cache,
        "rms_norm_weight": layer.weight,
        "rms_norm_eps": EPS,
        "cos_sin_cache": layer.cos_sin_cache,
        "kv_cache": layer.kv_cache,
        "compress_ratio": kind.compress_ratio,
        "fp8_scale": layer.fp8_scale,
    }


C4 = KINDS["c4"]
WRONG_LAYERS = [
    (C4, "rms_norm_weight", torch.ones(256), "128 or 512"),
    (C4, "state_cache", torch.zeros(4, 4, 1024), "2048"),
    (C4, "state_cache", torch.zeros(4, 8192), "2048"),
    (C4, "kv_cache", torch.zeros(4, 64, 580, dtype=torch.uint8), "584"),
    (C4, "kv_cache", torch.zeros(4, 64, 512), "torch.bfloat16"),
    (C4, "kv_cache", torch.zeros(4, 64 * 584, dtype=torch.uint8), "584"),
    (C4, "kv_cache", torch.zeros(4, 64, 600, dtype=torch.uint8)[..., :584], "contiguous"),
    (C4, "fp8_scale", torch.ones(1), "None"),
    (C4, "cos_sin_cache", torch.zeros(8, 32), "64"),
    (C4, "cos_sin_cache", torch.zeros(8, 2, 32), "64"),
    (C4, "compress_ratio", 128, "state_cache"),
    (KINDS["index_fp8"], "kv_cache", torch.zeros(4, 64, 128, dtype=torch.uint8), "132"),
    (KINDS["index_fp8"], "kv_cache", torch.zeros(4, 64, 128, dtype=torch.bfloat16), "132"),
]


@pytest.mark.parametrize(("kind", "name", "value", "accepted"), WRONG_LAYERS)
def test_layers_that_are_refused(kind, name, value, accepted):
    CompressorLayer(**layer_arguments(kind))
    with pytest.raises(ValueError, match=accepted) as error:
        CompressorLayer(**layer_arguments(kind) | {name: value})
    assert name == "compress_ratio" or f": {name} is " in str(error.value)


def test_metadata_of_another_group_is_refused():
    layer = Layer.make(KIND, BLOCKS)
    before = layer.to("cpu")
    batch = Batcher(KIND, BLOCKS).step({"a": 9})
    for other in (replace(KIND, block_size=8), replace(KIND, compress_ratio=128)):
        with pytest.raises(ValueError, match=r"step is of .*\(4, 4\)"):
            adapter_layer(layer).compress_and_store(batch.kv_score, build(other, batch))
    assert_same_bytes(layer, before, "refused")


def test_a_kv_score_that_an_op_refuses_changes_nothing():
    layer = Layer.make(KIND, BLOCKS)
    before = layer.to("cpu")
    batch = Batcher(KIND, BLOCKS).step({"a": 9})
    for wrong in (batch.kv_score.double(), batch.kv_score[:, :-4], batch.kv_score[0]):
        with pytest.raises(ValueError, match="kv_score"):
            adapter_layer(layer).compress_and_store(wrong, build(KIND, batch))
    assert_same_bytes(layer, before, "refused")


WRONG_BATCHES = [
    ("query_start_loc", lambda x: x.long(), "torch.int32"),
    ("query_start_loc", lambda x: x[:-1], r"shape \[3\]"),
    ("seq_lens", lambda x: x.long(), "torch.int32"),
    ("seq_lens", lambda x: x[0], r"shape \[1\]"),
    ("block_table", lambda x: x.long(), "torch.int32"),
    ("block_table", lambda x: x[:1], r"shape \[2, any\]"),
    ("slot_mapping", lambda x: x.int(), "torch.int64"),
    ("slot_mapping", lambda x: x[None], r"shape \[any\]"),
    ("cache_slot_mapping", lambda x: x.int(), "torch.int64"),
    ("max_query_len", lambda x: -1, "at least 0"),
    ("max_query_len", lambda x: torch.tensor(x), "at least 0"),
]


@pytest.mark.parametrize(("name", "change", "accepted"), WRONG_BATCHES)
def test_metadata_that_is_refused(name, change, accepted):
    batch = Batcher(KIND, BLOCKS).step({"a": 9, "b": 2})
    wrong = replace(batch, **{name: change(getattr(batch, name))})
    with pytest.raises(ValueError, match=accepted) as error:
        build(KIND, wrong)
    assert f": {name} is " in str(error.value)


# ---- The table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_103"])
@pytest.mark.parametrize("name", ["c4", "c128", "index_fp8", "c4_bf16_in"])
def test_the_table_has_cuda_kernels_for_every_call(name, arch):
    kind = KINDS[name]
    fields = {
        "head_dim": kind.head_dim,
        "compress_ratio": kind.compress_ratio,
        "kv_dtype": DTYPE_NAMES[kind.kv_dtype],
        "state_dtype": "fp32",
    }
    problems = [op_spec("prefill_compress_store").problem.of(fields)]
    decode = op_spec("paged_kv_compress_store").problem
    problems += [decode.of(fields | {"next_n": n}) for n in range(1, MOST_DECODE_TOKENS + 1)]
    table = load_table()
    assert all(table.buckets_for(problem, "cuda", arch) for problem in problems)
