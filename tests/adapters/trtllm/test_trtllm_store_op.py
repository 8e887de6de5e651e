"""The op that takes rows to the cache, through torch.ops.trtllm, to the byte."""

import contextvars
import itertools
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from trtllm_calls import scatter_call
from trtllm_memory import assert_same_memory, copied
from trtllm_oracle import scatter

import kvfold
import kvfold.adapters.trtllm as trtllm
from kvfold.adapters.trtllm import pages

DEVICES = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module"
)
SCATTER = torch.ops.trtllm.compressor_postprocess_scatter
KINDS = pytest.mark.parametrize("kind", range(4))
METADATA = ("num_outputs", "cu_kv_comp", "start_pos", "block_offsets", "compressed_mask")
# Rows in the cache, rows that are stored, rows that are reserved.
MIXED = [(0, 5, 5), (7, 1, 1), (3, 0, 2), (9, 1, 2), (0, 0, 0), (2, 2, 2)]


def assert_stores(call, device):
    """The op leaves all memory of the call as the oracle does. Returns the call after it."""
    done = copied(call, device)
    SCATTER(*done.values())
    assert_same_memory(done, scatter(call))
    return done


@DEVICES
@KINDS
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(128, 64), (512, 64), (512, 256), (128, 128)])
def test_every_cache_type(kind, head_dim, rope_dim, rotate, device):
    call = scatter_call(
        MIXED, kind=kind, head_dim=head_dim, rope_dim=rope_dim, rotate=rotate, seed=kind
    )
    done = assert_stores(call, device)
    changed = (done["kv_cache"].cpu() != call["kv_cache"]).any(1).sum()
    assert changed >= 4, "the call stores something"


@DEVICES
@KINDS
@pytest.mark.parametrize("per_page", [1, 3, 32])
def test_pages_of_any_number_of_rows(kind, per_page, device):
    assert_stores(scatter_call(MIXED, kind=kind, per_page=per_page, seed=per_page), device)


@DEVICES
@KINDS
@pytest.mark.parametrize("rows_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotate", [False, True])
def test_optional_outputs_get_the_stored_rows_and_no_other(kind, rows_dtype, rotate, device):
    call = scatter_call(
        MIXED, kind=kind, rows_dtype=rows_dtype, rotate=rotate, outputs=True, masked=0.3
    )
    assert_stores(call, device)


@DEVICES
@pytest.mark.parametrize("kind", [0, 1])
def test_types_without_scales_leave_quant_output_and_scale_output_alone(kind, device):
    call = scatter_call(MIXED, kind=kind)
    call["quant_output"] = torch.zeros(12, 128, dtype=torch.uint8)
    call["scale_output"] = torch.zeros(1)
    assert_stores(call, device)


@DEVICES
@KINDS
def test_masked_rows_and_rows_beyond_num_outputs_are_not_stored(kind, device):
    call = scatter_call([(0, 2, 4), (5, 3, 3), (1, 0, 3)], kind=kind, masked=0.5, seed=3)
    assert_stores(call, device)
    nothing = {**call, "compressed_mask": torch.zeros(10, dtype=torch.bool)}
    assert_same_memory(assert_stores(nothing, device), nothing)


@DEVICES
def test_longer_tensors_and_rows_before_the_first_request(device):
    call = scatter_call(MIXED, first_row=3, longer=2, outputs=True)
    assert_stores(call, device)


@DEVICES
@pytest.mark.parametrize("first_row", [0, 3])
def test_a_single_request_has_all_rows(first_row, device):
    """The engine does not read cu_kv_comp then."""
    call = scatter_call([(3, 2, 3)], first_row=first_row, longer=first_row, seed=4)
    call["num_outputs"].fill_(4)
    call["block_offsets"] = torch.tensor([[1, 0]], dtype=torch.int32)
    assert_stores(call, device)


@DEVICES
def test_no_row_and_no_request(device):
    assert_stores(scatter_call([(5, 0, 0), (0, 0, 0)]), device)
    assert_stores(scatter_call([], first_row=3), device)


@DEVICES
@KINDS
@pytest.mark.parametrize(
    "cache_dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8]
)
def test_the_cache_is_bytes_of_any_dtype_and_shape(kind, cache_dtype, device):
    call = scatter_call(MIXED, kind=kind, cache_dtype=cache_dtype)
    call["kv_cache"] = call["kv_cache"].view(-1, 1, 1)
    assert_stores(call, device)


@DEVICES
def test_a_flat_table_and_weights_of_another_dtype(device):
    assert_stores(scatter_call(MIXED, flat_table=True, weight_dtype=torch.float32), device)


@DEVICES
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_rows_of_zeros_and_of_tiny_and_large_values(eps, device):
    for kind in range(4):
        call = scatter_call([(0, 6, 6)], kind=kind, rows_dtype=torch.bfloat16, outputs=True)
        for row, value in enumerate([0.0, -0.0, 1e-38, 3e38]):
            call["kv_comp"][row] = value
        call["kv_comp"][4, 32:] = 0
        assert_stores({**call, "rms_eps": eps}, device)


@DEVICES
def test_pages_and_positions_that_are_not_there(device):
    call = scatter_call(MIXED, outputs=True, kind=2)
    call["block_offsets"][0, 1] = -1
    call["block_offsets"][1, 2] = 2**31 - 1
    call["start_pos"][3] = 2**31 - 2
    call["position_ids"][2] = -1
    call["position_ids"][3] = len(call["cos_sin_table"])
    assert_stores(call, device)


@DEVICES
def test_any_metadata_stays_inside_the_tensors(device):
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([-(2**31), -5, -1, 0, 1, 3, 8, 100, 2**31 - 1], dtype=torch.int32)
    for seed in range(20):
        call = scatter_call([(1, 3, 3), (0, 4, 4)], seed=seed)
        for name in ("num_outputs", "cu_kv_comp", "start_pos", "block_offsets", "position_ids"):
            x = call[name]
            spoilt = corners[torch.randint(len(corners), x.shape, generator=generator)]
            x.copy_(torch.where(torch.rand(x.shape, generator=generator) < 0.4, spoilt, x))
        done = copied(call, device)
        SCATTER(*done.values())
        done["kv_cache"].copy_(call["kv_cache"])
        assert_same_memory(done, call)


# ---- steps ---------------------------------------------------------------------------------------


@pytest.fixture
def located(monkeypatch):
    """Counts the calls of kvfold.locate_rows."""
    counter = SimpleNamespace(calls=0)
    locate_rows = kvfold.locate_rows

    def counted(*args, **kwargs):
        counter.calls += 1
        locate_rows(*args, **kwargs)

    monkeypatch.setattr(kvfold, "locate_rows", counted)
    return counter


def layers(call, number):
    """Calls of layers: views made anew of the same metadata, and rows and caches of their own."""
    found = []
    for layer in range(number):
        other = copied(scatter_call(MIXED, longer=2, seed=layer))
        for name in METADATA:
            other[name] = call[name][:]
        found.append(other)
    return found


def test_the_layers_of_a_step_share_their_slots(located):
    calls = layers(scatter_call(MIXED, longer=2), 3)
    with trtllm.step():
        for call in calls:
            assert_stores_in_place(call)
    assert located.calls == 1
    for call in calls:
        assert_stores_in_place(call)
    assert located.calls == 4


def assert_stores_in_place(call):
    expected = scatter(call)
    SCATTER(*call.values())
    assert_same_memory(call, expected)


@pytest.mark.parametrize("change", ["tokens_per_block", "start_pos", "layout", "compressed_mask"])
def test_calls_of_a_step_with_other_metadata_have_slots_of_their_own(change, located):
    call = scatter_call([(0, 2, 2), (5, 1, 2), (3, 2, 2)], longer=1)
    with trtllm.step():
        assert_stores_in_place(call)
        if change == "tokens_per_block":
            call["tokens_per_block"] = 2
        elif change == "layout":  # the same address and length, another stride
            call["start_pos"] = torch.tensor([0, 5, 3, 1, 4, 2], dtype=torch.int32)[:3]
            assert_stores_in_place(call)
            call["start_pos"] = call["start_pos"].as_strided((3,), (2,))
        else:
            call[change] = call[change].clone().flip(0)
        assert_stores_in_place(call)
    assert located.calls == 2 + (change == "layout")


def test_a_step_ends_and_belongs_to_its_thread(located):
    call = scatter_call(MIXED)
    for _ in range(2):
        with trtllm.step():
            assert_stores_in_place(call)
            with trtllm.step():
                call["start_pos"] += 1
                assert_stores_in_place(call)
            call["start_pos"] -= 1
            assert_stores_in_place(call)
    assert located.calls == 4
    with trtllm.step():
        assert_stores_in_place(call)
        threads = [threading.Thread(target=assert_stores_in_place, args=(call,)) for _ in range(2)]
        for thread in threads:
            thread.start()
            thread.join()
    assert located.calls == 7


def test_the_memory_of_a_steps_metadata_is_kept_until_it_ends():
    """No other tensor takes it. What belongs to a layer is not kept."""
    call = scatter_call(MIXED, kind=2, outputs=True)
    call["start_pos"] = call["start_pos"].clone()
    memory = {
        name: weakref.ref(x.untyped_storage())
        for name, x in call.items()
        if isinstance(x, torch.Tensor)
    }
    with trtllm.step():
        trtllm.compressor_postprocess_scatter(**call)
        call["start_pos"].set_(torch.zeros(0, dtype=torch.int32))
        call.clear()
        assert {name for name, storage in memory.items() if storage() is not None} == {*METADATA}
    assert all(storage() is None for storage in memory.values())


def test_a_context_that_outlives_a_step_is_outside_of_it(located):
    call = scatter_call(MIXED)
    with trtllm.step():
        assert_stores_in_place(call)
        context = contextvars.copy_context()
    call["start_pos"] += 1
    context.run(assert_stores_in_place, call)
    assert located.calls == 2


@pytest.mark.parametrize("change", ["rows_dtype", "flat_table", "positions", "kind"])
def test_a_step_sees_other_rows_and_tables(change):
    first = scatter_call(MIXED)
    changed = {
        "rows_dtype": {"rows_dtype": torch.float32},
        "flat_table": {"flat_table": True},
        "positions": {"longer": 2},
        "kind": {"kind": 1},
    }[change]
    other = scatter_call(MIXED, **changed)
    for name in METADATA:
        other[name] = first[name]
    with trtllm.step():
        for call in (first, other, first):
            assert_stores_in_place(call)


# ---- caches --------------------------------------------------------------------------------------


def test_a_cache_in_the_place_of_another_one():
    """Other sizes, dtypes and formats at one address, as after a cache has been freed."""
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    for kind, dtype, per_page, requests in itertools.product(
        range(4), [torch.uint8, torch.bfloat16], [2, 4], [MIXED[:1], MIXED]
    ):
        call = scatter_call(requests, kind=kind, per_page=per_page, cache_dtype=dtype)
        cache = memory[: call["kv_cache"].nbytes].view(dtype).view(call["kv_cache"].shape)
        call["kv_cache"] = cache
        assert_stores_in_place(call)


def test_a_cache_tensor_that_gets_other_memory():
    call = scatter_call(MIXED)
    with trtllm.step():
        assert_stores_in_place(call)
        left = call["kv_cache"].detach().clone()
        before = call["kv_cache"].detach()
        call["kv_cache"].set_(torch.zeros_like(before))
        assert_stores_in_place(call)
        assert torch.equal(before, left)
        call["kv_cache"].t_()
        with pytest.raises(ValueError, match="contiguous"):
            SCATTER(*call.values())


def test_few_pages_are_remembered(monkeypatch):
    monkeypatch.setattr(pages, "CAPACITY", 2)
    monkeypatch.setattr(pages, "_known", {})
    for _ in range(5):
        assert_stores_in_place(scatter_call(MIXED))
        assert len(pages._known) <= 2


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache_scale_type": 4}, "cache_scale_type is 4; accepted: 0 to 3"),
        ({"cache_scale_type": -1}, "cache_scale_type is -1; accepted: 0 to 3"),
        ({"nope_dim": 0}, r"nope_dim \+ rope_dim is 0 \+ 64; accepted: 128"),
        ({"tokens_per_block": 0}, "tokens_per_block is 0; accepted: 1 or more"),
        ({"kv_comp": torch.zeros(11)}, r"kv_comp is of shape \[11\]; accepted: \[num_rows"),
        ({"kv_comp": torch.zeros(12, 64), "nope_dim": 0}, "head_dim 64; accepted: 128"),
        ({"cos_sin_table": torch.zeros(9, 65)}, r"cos_sin_table is of shape \[9, 65\]; accepted"),
        ({"cos_sin_table": torch.zeros(9, 2, 32).half()}, "rope_table is of torch.float16"),
        ({"position_ids": torch.zeros(11, dtype=torch.int32)}, "position_ids is of length 11"),
        ({"position_ids": torch.zeros(12)}, "positions is of torch.float32; accepted: torch.int32"),
        ({"compressed_mask": torch.ones(9, dtype=torch.bool)}, "compressed_mask is of length 9;"),
        ({"compressed_mask": torch.ones(12)}, "compressed_mask is .*float32.*; accepted: .*bool"),
        ({"cu_kv_comp": torch.zeros(6, dtype=torch.int32)}, "cu_kv_comp is of length 6"),
        ({"start_pos": torch.zeros(5, dtype=torch.int32)}, "start_pos is of length 5"),
        ({"start_pos": torch.zeros(6)}, "start_pos is .*float32.*; accepted: .*int32"),
        ({"num_outputs": torch.zeros(6, dtype=torch.int64)}, "num_outputs is .*int64.*; accepted"),
        ({"block_offsets": torch.zeros(6, dtype=torch.int32)}, "block_offsets is of shape"),
        ({"kv_cache": torch.zeros(8, 2, 128).transpose(0, 1)}, "kv_cache is .* contiguous"),
        ({"rms_weight": torch.zeros(64)}, r"weight is of shape \[64\]; accepted: \[head_dim"),
        ({"rms_eps": -1.0}, "eps is -1.0; accepted: 0 or more"),
        ({"kv_out": torch.zeros(11, 128)}, "rows_out is of shape"),
        ({"cache_scale_type": 2, "quant_output": torch.zeros(12, 64, dtype=torch.uint8)},
         "codes_out has 64 bytes per row; accepted: 128"),
        ({"cache_scale_type": 3, "scale_output": torch.zeros(12, 1)[:, :0]}, "scales_out has 0"),
    ],
)  # fmt: skip
def test_arguments_that_are_not_accepted_are_named(changed, message, monkeypatch):
    call = scatter_call(MIXED) | changed
    before = copied(call)
    monkeypatch.setattr(torch.Tensor, "fill_", None)  # the first step to slots
    with pytest.raises(ValueError, match=message):
        SCATTER(*call.values())
    assert_same_memory(call, before)
