"""compress_norm_rope_store: the bytes of every layout, for every kind of plan."""

from enum import Enum

import numpy as np
import pytest
import torch
from sglang_calls import Cache, as_sglang_has_it, forward, make_ape
from sglang_plans import Simulation, StateLayout

from kvfold.adapters import sglang

BF16, FP32 = torch.bfloat16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


class KVLayout(str, Enum):  # noqa: UP042
    """As SGLang's."""

    V4 = "v4"
    V41 = "v41"
    V41_FP4 = "v41_fp4"
    UNIFORM_FP8 = "uniform_fp8"
    V41_NEW = "v41_new"
    V41_FP4_NEW = "v41_fp4_new"


# head_dim, dtype of the rows, format, rounding, alignment of a page, arguments
WAYS = {
    "584": (512, FP32, "mixed_584", "codes_from_bf16", 576, {}),
    "584-bf16": (512, BF16, "mixed_584", "codes_from_bf16", 576, {"layout": KVLayout.V4}),
    "bf16": (512, FP32, "bf16", "once", 1, {"bf16_store": True}),
    "528": (512, BF16, "fp8_528", "each_step", 512, {"layout": KVLayout.V41}),
    "528-fp32": (512, FP32, "fp8_528", "once", 512, {"layout": "v41"}),
    "528-new": (512, BF16, "fp8_528_interleaved", "each_step", 1, {"layout": KVLayout.V41_NEW}),
    "288": (512, BF16, "fp4_288", "each_step", 256, {"layout": KVLayout.V41_FP4}),
    "288-new": (512, FP32, "fp4_288_interleaved", "once", 1, {"layout": KVLayout.V41_FP4_NEW}),
    "512": (512, BF16, "fp8_tensor", "each_step", 512, {"layout": KVLayout.UNIFORM_FP8}),
    "512-fp32": (512, FP32, "fp8_tensor", "once", 512, {"layout": "UNIFORM_FP8"}),
    "132": (128, FP32, "fp8_block128_floor", "once", 1, {}),
    "132-bf16": (128, BF16, "fp8_block128_floor", "once", 1, {"layout": "V4"}),
    "68": (128, FP32, "mxfp4_ties_down", "once", 1, {"use_fp4": True}),
}


class Run:
    """Calls of both functions, with the bytes of the cache checked after each."""

    def __init__(self, way, layout=None, page_size=4, seed=0):
        head_dim, dtype, format, rounding, align, arguments = WAYS[way]
        layout = layout or StateLayout(4, 16)
        self.simulation = Simulation(layout, head_dim, dtype=dtype, device=DEVICE, seed=seed)
        self.dtype, self.state = dtype, self.simulation.state()
        ape = make_ape(self.simulation)
        self.ape = as_sglang_has_it(ape, head_dim).to(DEVICE)
        self.cache = Cache(self.simulation, format, rounding, page_size, align, **arguments)

    def forward(self, call):
        return forward(self.simulation, call, self.state, self.ape, self.dtype)

    def check(self, call, kv=None):
        kv = self.forward(call) if kv is None else kv
        before = self.cache.bytes.cpu().numpy().copy()
        self.cache.store(kv, call)
        expected = self.cache.expected(kv, call, before)
        np.testing.assert_array_equal(self.cache.bytes.cpu().numpy(), expected)
        return (expected != before).any()


@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_of_a_layout(way):
    run = Run(way)
    requests = run.simulation.requests
    assert run.check(run.simulation.extend(requests, [17, 6, 9]))
    assert run.check(run.simulation.extend(requests, [4] * 3, shuffled=True, padded=True))
    changed = [run.check(run.simulation.decode(requests)) for _ in range(4)]
    assert any(changed)


@pytest.mark.parametrize("page_size", [1, 2, 64])
@pytest.mark.parametrize("way", ["584", "132", "bf16"])
def test_any_page_size(way, page_size):
    run = Run(way, page_size=page_size)
    assert run.check(run.simulation.extend(run.simulation.requests, [17, 6, 9]))


def test_ratio_128():
    run = Run("584", StateLayout(128, 256), page_size=2)
    requests = run.simulation.requests
    assert run.check(run.simulation.extend(requests, [300, 127, 128], shuffled=True))
    assert run.check(run.simulation.decode(requests))
    assert not run.check(run.simulation.decode(requests))


def test_the_norm_s_weight_has_the_rows_dtype():
    """SGLang rounds an fp32 weight for bf16 rows; a bf16 weight is exact in fp32."""
    for way, dtype in (("584-bf16", FP32), ("584", BF16)):
        run = Run(way)
        run.cache.weight = torch.nn.Parameter(run.cache.weight.to(dtype))
        with torch.no_grad():
            assert run.check(run.simulation.extend(run.simulation.requests, [17, 6, 9]))
            run.cache.weight.mul_(1.37)
            assert run.check(run.simulation.extend(run.simulation.requests, [8, 8, 8]))


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_of_another_compress_forward(shuffled):
    """Row i belongs to entry i of a plan that kvfold has not sorted."""
    run = Run("584")
    call = run.simulation.extend(run.simulation.requests, [17, 6, 9], shuffled=shuffled)
    kv = torch.randn(len(call.plan.plan_c), 512, generator=run.simulation.generator).to(DEVICE)
    entries = call.plan.plan_c.view(torch.int32).cpu()
    order = (entries[:, 1] & 0xFFFF).argsort().argsort()
    call.closing = [call.closing[i] for i in order.tolist()]
    assert run.check(call, kv)
    assert torch.equal(call.plan.plan_c.view(torch.int32).cpu(), entries)
    call = run.simulation.decode(run.simulation.requests)
    run.check(call, torch.randn(3, 512, device=DEVICE))


def test_a_rows_place_outside_is_skipped():
    run = Run("584")
    call = run.simulation.extend(run.simulation.requests, [17, 6, 9])
    kv = run.forward(call)
    call.out_loc.fill_(run.simulation.num_slots + 64)
    call.out_loc[::2] = -1
    before = run.cache.bytes.clone()
    run.cache.store(kv, call)
    assert torch.equal(run.cache.bytes, before)


def call_with(run, **changes):
    call = run.simulation.extend(run.simulation.requests, [17, 6, 9])
    arguments = {
        "kv": run.forward(call), "plan": call.plan, "norm_weight": run.cache.weight,
        "norm_eps": 1e-6, "freq_cis": run.cache.freq_cis, "out_loc": call.out_loc,
        "kvcache": run.cache.bytes, "page_size": run.cache.page_size, **run.cache.arguments,
    }  # fmt: skip
    return arguments | {
        name: change(arguments.get(name)) if callable(change) else change
        for name, change in changes.items()
    }


REFUSED = [
    ("584", {"fp8_2buff": True}, "fp8_2buff is True; accepted: False"),
    ("584", {"kvcache_rope": lambda _: torch.zeros(1)}, "kvcache_rope is a Tensor; accepted: None"),
    ("584", {"kvcache_scale": lambda _: torch.zeros(1)}, "kvcache_scale is a Tensor"),
    ("584", {"rope_cache": (1, 2)}, "rope_cache is a tuple; accepted: None"),
    ("584", {"fp4_k_write_metadata": 3}, "fp4_k_write_metadata is a int; accepted: None"),
    ("584", {"layout": "v5"}, "layout is 'v5'; accepted: v4, v41"),
    ("584", {"use_fp4": True}, "use_fp4 is True; accepted: False, with head_dim 512"),
    ("528", {"bf16_store": True}, "bf16_store is True; accepted: False, with layout v41"),
    ("132", {"bf16_store": True}, "bf16_store is True; accepted: False, with head_dim 128"),
    ("132", {"layout": "v41"}, "layout is 'v41'; accepted: v4, with head_dim 128"),
    ("584", {"kv": lambda x: x[:-1]}, r"kv is of shape \[6, 512\]; accepted: \[7, 128 or 512\]"),
    ("584", {"kv": lambda x: x.double()}, "kv is of torch.float64"),
    ("584", {"norm_weight": lambda x: x[:-1]}, r"norm_weight is of shape \[511\]"),
    ("584", {"freq_cis": lambda x: x.real}, "freq_cis is of torch.float32; accepted: torch.compl"),
    ("584", {"out_loc": lambda x: x.int()}, "out_loc is of torch.int32; accepted: torch.int64"),
    ("584", {"out_loc": lambda x: x[:6]}, r"out_loc is of shape \[6\]; accepted: \[7 or more\]"),
    ("584", {"out_loc": lambda x: x[::2]}, r"out_loc is of strides \(2,\)"),
    ("584", {"kvcache": lambda x: x.view(torch.int8)}, "kvcache is of torch.int8"),
    ("584", {"kvcache": lambda x: x[:, None]}, "kvcache is of shape"),
    (
        "584",
        {"kvcache": lambda x: x[:, :-577]},
        "kvcache is of 2303 bytes per page; accepted: 2336",
    ),
    ("584", {"page_size": 0}, "page_size is 0; accepted: 1 or more"),
]


@pytest.mark.parametrize(("way", "changes", "message"), REFUSED)
def test_calls_that_are_refused(way, changes, message):
    run = Run(way)
    arguments = call_with(run, **changes)
    before = run.cache.bytes.clone()
    with pytest.raises(ValueError, match=message):
        sglang.compress_norm_rope_store(**arguments)
    assert torch.equal(run.cache.bytes, before)


def test_the_rope_table_is_a_view():
    run = Run("584")
    call = run.simulation.extend(run.simulation.requests, [17, 6, 9])
    run.check(call)
    run.cache.freq_cis.mul_(torch.polar(torch.ones(()), torch.tensor(0.7)).to(DEVICE))
    run.check(run.simulation.extend(run.simulation.requests, [17, 6, 9]))
