"""What is prepared for a layer is used for its tensors only, and goes with them."""

import gc
import weakref

import pytest
import torch
from sglang_calls import Cache, as_sglang_has_it, assert_rows, assert_state, forward, make_ape
from sglang_plans import Simulation, StateLayout

from kvfold.adapters import sglang
from kvfold.adapters.sglang import internals, kept
from kvfold.adapters.sglang.forward import _layers
from kvfold.adapters.sglang.store import _epilogues
from kvfold.codegen import load_table
from kvfold.runtime import internals as runtime_internals
from kvfold.runtime.layout_guard import layout_guard

FP32, BF16 = torch.float32, torch.bfloat16


class Layer:
    """One layer in decode steps, each of which is checked. It counts what is prepared."""

    def __init__(self, monkeypatch):
        self.simulation = Simulation(StateLayout(4, 16), 128)
        self.ape = make_ape(self.simulation)
        self.given_ape = torch.nn.Parameter(as_sglang_has_it(self.ape, 128).clone())
        self.state = self.simulation.state()
        self.cache = Cache(self.simulation, "fp8_block128_floor", "once", 4)
        self.prepared = []

        def counted(*tensors):
            self.prepared.append(tensors[0].shape)
            return layout_guard(*tensors)

        monkeypatch.setattr("kvfold.adapters.sglang.forward.layout_guard", counted)
        monkeypatch.setattr("kvfold.adapters.sglang.store.layout_guard", counted)

    def begin(self):
        """The steps before the ones that are tested."""
        self.check(self.simulation.extend(self.simulation.requests, [3, 7, 11]))
        self.step()

    def step(self, ape=None):
        """A decode step; returns how much it prepared beyond a step's first layer."""
        call = self.simulation.decode(self.simulation.requests)
        self.first_layer(call)
        self.check(call, ape)
        return len(self.prepared)

    def first_layer(self, call):
        """Another layer, for which the step's metadata is made."""
        ape = as_sglang_has_it(self.ape, 128).clone()
        forward(self.simulation, call, self.simulation.state(), ape, FP32)
        self.prepared.clear()

    def check(self, call, ape=None):
        ape = self.given_ape.view(-1, 128) if ape is None else ape
        before = self.state.clone()
        with torch.no_grad():
            view = self.state.view(self.state.shape)
            out = forward(self.simulation, call, view, ape, FP32)
        assert_state(self.state, before, call)
        assert_rows(self.simulation, call, out, self.ape, FP32)
        bytes_before = self.cache.bytes.numpy().copy()
        self.cache.store(out, call)
        assert (self.cache.bytes.numpy() == self.cache.expected(out, call, bytes_before)).all()

    def change_ape(self):
        """Other values for the oracle; returns them as SGLang has them."""
        self.ape = self.ape + torch.randn(self.ape.shape, generator=self.simulation.generator)
        return as_sglang_has_it(self.ape, 128)


@pytest.fixture(params=["guard", "python"])
def layer(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(runtime_internals, "FOUND", False)
    found = Layer(monkeypatch)
    found.begin()
    return found


def test_new_views_of_the_tensors_find_the_record(layer):
    for _ in range(5):
        assert layer.step() == 0


def test_a_parameter_that_is_written(layer):
    with torch.no_grad():
        layer.given_ape.copy_(layer.change_ape())
        layer.cache.weight.mul_(1.5)
    assert layer.step() == 2
    assert layer.step() == 0


def test_an_alias_whose_writes_torch_counts_apart(layer):
    """A parameter's .data has a count of its own, which stays where it was."""
    layer.step(layer.given_ape.data.view(-1, 128))
    with torch.no_grad():
        layer.given_ape.copy_(layer.change_ape())
    layer.step(layer.given_ape.data.view(-1, 128))


def test_tensors_that_get_other_memory(layer):
    """The same tensors, for Python."""
    layer.given_ape.data = layer.change_ape().clone()
    layer.state.data = layer.state.clone()
    layer.cache.weight.data = layer.cache.weight * 2
    assert layer.step() == 2
    assert layer.step() == 0


def test_a_state_that_gets_another_layout(layer):
    """Two tensors take the same memory in turn, and the pages of one are further apart."""
    width, rows = layer.simulation.width, layer.state.flatten(0, 1).size(0)
    pool = layer.state.new_empty(2 * rows * width)
    for seed in range(1, 5):
        apart = 2 if seed % 2 else 1
        strides = (apart * 4 * width, width, 1)
        layer.state.set_(pool.untyped_storage(), 0, layer.state.shape, strides)
        layer.state.fill_(torch.nan)
        layer.simulation = Simulation(StateLayout(4, 16), 128, seed=seed)
        call = layer.simulation.extend(layer.simulation.requests, [3, 7, 11])
        layer.first_layer(call)
        layer.check(call)
        assert layer.state.shape in layer.prepared
        assert layer.step() == 0


def test_an_ape_and_a_table_that_get_another_layout(layer):
    """The same memory stands for other values."""
    apes = torch.stack([layer.change_ape()] * 2)
    apes[1] *= 2
    layer.given_ape.data = apes[0]
    table = layer.cache.freq_cis
    table.set_(torch.cat([table, table[:, :1]], dim=1)[:, :32])
    layer.step()
    layer.given_ape.data = apes.as_strided((8, 128), (256, 1))
    table.set_(table.as_strided(table.shape, (32, 1)))
    relaid = layer.given_ape.data.clone()
    layer.ape = torch.cat([relaid[:4], relaid[4:]], dim=1)
    assert layer.step() == 2


def test_freed_and_reallocated_tensors(layer):
    """Nothing keeps the memory of tensors that are gone, and new ones in it are served."""
    for _ in range(10):
        reference = weakref.ref(layer.state)
        storage = layer.state.untyped_storage()._weak_ref()
        layer.state = layer.state.clone()
        layer.cache.weight = layer.cache.weight * 1.1
        layer.given_ape = torch.nn.Parameter(layer.change_ape().clone())
        assert reference() is None
        assert torch.UntypedStorage._new_with_weak_ptr(storage) is None
        torch.UntypedStorage._free_weak_ref(storage)
        layer.step()


def test_records_go_with_any_of_their_tensors(monkeypatch):
    before = set(_layers) | set(_epilogues)
    for gone in ("state", "given_ape", "weight", "freq_cis"):
        layer = Layer(monkeypatch)
        layer.check(layer.simulation.extend(layer.simulation.requests, [3, 7, 11]))
        assert len((set(_layers) | set(_epilogues)) - before) == 2
        owner = layer if gone in ("state", "given_ape") else layer.cache
        delattr(owner, gone)
        assert len((set(_layers) | set(_epilogues)) - before) == 1
        del owner, layer
        monkeypatch.undo()  # it refers to the layer
        gc.collect()
        assert not (set(_layers) | set(_epilogues)) - before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 512}, "kv_score_buffer is of shape"),
        ({"is_online": True}, "is_online is True"),
        ({"compress_ratio": 128}, "compress_ratio is 128"),
        ({"out": torch.zeros(4, 128)}, r"out is of shape \[4, 128\]"),
        ({"kv_score_input": torch.zeros(4, 512)}, r"kv_score_input is of shape \[4, 512\]"),
        ({"kv_score_input": torch.zeros(3, 256)}, "kv_score"),
        ({"kv_score_input": torch.zeros(3, 512).half()}, "kv_score_input is of torch.float16"),
    ],
)
def test_other_arguments_are_seen_with_a_record(layer, changes, message):
    call = layer.simulation.decode(layer.simulation.requests)
    forward(layer.simulation, call, layer.simulation.state(), layer.given_ape, FP32)
    arguments = {
        "kv_score_buffer": layer.state, "kv_score_input": call.kv_score, "ape": layer.given_ape,
        "plan": call.plan, "head_dim": 128, "compress_ratio": 4,
    }  # fmt: skip
    before = layer.state.clone()
    with pytest.raises(ValueError, match=message):
        sglang.compress_forward(**arguments | changes)
    assert torch.equal(before.nan_to_num(), layer.state.nan_to_num())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "v41"}, "layout is 'v41'"),
        ({"bf16_store": True}, "bf16_store is True"),
        ({"fp8_2buff": True}, "fp8_2buff is True"),
        ({"kvcache_rope": torch.zeros(1)}, "kvcache_rope is a Tensor"),
        ({"kv": torch.zeros(4, 128)}, "."),
        ({"kv": torch.zeros(3, 512)}, "."),
        ({"kv": torch.zeros(3, 128).half()}, "kv is of torch.float16"),
        ({"out_loc": torch.zeros(2, dtype=torch.int64)}, "."),
        ({"out_loc": torch.zeros(3, dtype=torch.int32)}, "."),
        ({"kvcache": torch.zeros(9, 64, dtype=torch.uint8)}, "."),
        ({"kvcache": torch.zeros(9, 1024, dtype=torch.int8)}, "."),
        ({"page_size": 0}, "."),
    ],
)
def test_other_arguments_of_a_store_are_seen_with_a_record(layer, changes, message):
    call, cache = layer.simulation.decode(layer.simulation.requests), layer.cache
    arguments = {
        "kv": torch.zeros(3, 128), "plan": call.plan, "norm_weight": cache.weight,
        "norm_eps": 1e-6, "freq_cis": cache.freq_cis, "out_loc": call.out_loc,
        "kvcache": cache.bytes.clone(), "page_size": 4,
    }  # fmt: skip
    sglang.compress_norm_rope_store(**arguments)
    arguments["kvcache"] = cache.bytes
    before = cache.bytes.clone()
    with pytest.raises(ValueError, match=message):
        sglang.compress_norm_rope_store(**arguments | changes)
    assert torch.equal(before, cache.bytes)


def test_use_fp4_with_a_record_of_fp8(layer):
    layer.cache.arguments = {"use_fp4": True}
    layer.cache.format = load_table().formats["mxfp4_ties_down"]
    layer.step()


@pytest.mark.parametrize("is_found", [True, False])
def test_rows_are_new(monkeypatch, is_found):
    if not is_found:
        monkeypatch.setattr(internals, "_empty_on_cpu", None)
    for dtype in (FP32, BF16):
        rows = internals.new_rows(-1, dtype, 3, 128)
        assert (rows.shape, rows.stride(), rows.dtype) == ((3, 128), (128, 1), dtype)
        assert rows.data_ptr() != internals.new_rows(-1, dtype, 3, 128).data_ptr()


def test_a_parameter_that_is_used_as_it_is_is_not_written():
    weight = torch.ones(128)
    for _ in range(2):
        assert kept.rounded(weight, FP32).tensor.data_ptr() == weight.data_ptr()
        weight.mul_(2)
    version = weight._version
    kept.rounded(weight, FP32)
    assert weight._version == version


def test_the_rope_table_is_of_the_same_memory():
    freq_cis = torch.polar(torch.ones(8, 32), torch.rand(8, 32))
    table = kept.rope_table(freq_cis)
    assert torch.equal(table, torch.stack([freq_cis.real, freq_cis.imag], dim=1))
    assert table.data_ptr() == freq_cis.data_ptr()
