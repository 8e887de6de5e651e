"""One launch makes a step's metadata for all layers; a new step makes it anew. Refused calls."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from sglang_calls import Cache, as_sglang_has_it, assert_rows, assert_state, forward, make_ape
from sglang_plans import DecodePlan, Simulation, StateLayout

from kvfold.adapters import sglang
from kvfold.adapters.sglang import kept, metadata_reference

FP32 = torch.float32
C4, C128 = StateLayout(4, 16), StateLayout(128, 256)


@pytest.fixture
def made(monkeypatch):
    """The names of the launches that make metadata."""
    names = []
    for name in ("fill_decode", "fill_prefill", "fill_rows"):
        fill = getattr(metadata_reference, name)

        def counted(*arguments, name=name, fill=fill):
            names.append(name)
            fill(*arguments)

        monkeypatch.setattr(metadata_reference, name, counted)
    return names


class Model:
    """Some layers, each with a state and a cache."""

    def __init__(self, layout=C4, layers=3, seed=0):
        self.simulation = Simulation(layout, 128, seed=seed)
        self.layers = []
        for _ in range(layers):
            ape = make_ape(self.simulation)
            cache = Cache(self.simulation, "fp8_block128_floor", "once", 4)
            self.layers.append((self.simulation.state(), ape, as_sglang_has_it(ape, 128), cache))

    def run(self, call, layers=None):
        """Checks both functions in some layers."""
        for state, ape, given_ape, cache in self.layers if layers is None else layers:
            before = state.clone()
            out = forward(self.simulation, call, state, given_ape, FP32)
            assert_state(state, before, call)
            assert_rows(self.simulation, call, out, ape, FP32)
            bytes_before = cache.bytes.numpy().copy()
            cache.store(out, call)
            assert (cache.bytes.numpy() == cache.expected(out, call, bytes_before)).all()


@pytest.mark.parametrize("layout", [C4, C128], ids=str)
def test_the_layers_of_a_step_share_the_metadata(layout, made):
    model = Model(layout)
    requests = model.simulation.requests
    model.run(model.simulation.extend(requests, [140, 3, 131], shuffled=True))
    assert made == ["fill_prefill", "fill_rows"]
    for _ in range(3):
        model.run(model.simulation.decode(requests))
    assert made == ["fill_prefill", "fill_rows"] + 3 * ["fill_decode"]


@pytest.mark.parametrize("how", ["copy_", "uncounted"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_plan_that_is_rewritten_in_place(how, inference, made):
    """As for a CUDA graph's static tensors; torch does not count every write."""
    with torch.inference_mode(inference):
        model = Model()
        requests, static = model.simulation.requests, {}
        for i in range(4):
            call = model.simulation.extend(requests, [4] * 3, shuffled=True, padded=True)
            first = static.setdefault("prefill", call)
            if first is not call:
                for mine, new in zip(first.plan[1:3], call.plan[1:3], strict=True):
                    if how == "copy_":
                        mine.copy_(new)
                    else:
                        mine.numpy()[:] = new.numpy()
                first.out_loc.copy_(call.out_loc)
            call.plan, call.out_loc = first.plan, first.out_loc
            model.run(call)
            assert len(made) == 2 * (i + 1)
            for request in requests:
                model.simulation.reject(request, i % 3)


def test_a_step_that_begins_with_another_layer(made):
    """The tensor is written between two steps of which neither has all layers."""
    model = Model()
    call = model.simulation.decode(model.simulation.requests)
    model.run(call, model.layers[:1])
    later = model.simulation.decode(model.simulation.requests)
    call.plan.plan_d.copy_(later.plan.plan_d)
    later.plan = call.plan
    shadow, _, given_ape, _ = model.layers[1]
    before = shadow.clone()
    forward(model.simulation, later, shadow, given_ape, FP32)
    assert_state(shadow, before, later)
    assert made == ["fill_decode"] * 2


def test_two_slot_tensors_of_one_step(made):
    model = Model(layers=2)
    call = model.simulation.extend(model.simulation.requests, [9, 9, 9])
    model.run(call, model.layers[:1])
    slots = call.out_loc.clone()
    call.out_loc = slots
    model.run(call, model.layers[1:])
    assert made == ["fill_prefill", "fill_rows", "fill_rows"]


def test_nothing_outlives_the_plan_and_the_tensors():
    model = Model(layers=1)
    call = model.simulation.decode(model.simulation.requests)
    model.run(call)
    references = [weakref.ref(x) for x in (call.plan.plan_d, *model.layers[0][:1])]
    del call, model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
def test_the_ape_follows_its_parameter(ratio, dtype):
    parameter = torch.nn.Parameter(torch.randn(ratio, 256 if ratio == 4 else 128))
    parts = 2 if ratio == 4 else 1

    def expected():
        halves = parameter.detach().view(parts, ratio, 128).to(dtype).float()
        return torch.cat(list(halves), dim=1)

    with torch.no_grad():
        found = kept.kvfold_ape(parameter.view(-1, 128), ratio, dtype).tensor
        assert torch.equal(found, expected()) and not found.requires_grad
        parameter.add_(1)
        assert kept.kvfold_ape(parameter.view(-1, 128), ratio, dtype).tensor is found
        assert torch.equal(found, expected())
        parameter.data.add_(1)  # not counted
        sglang.refresh(parameter)
        assert kept.kvfold_ape(parameter.view(-1, 128), ratio, dtype).tensor is found
        assert torch.equal(found, expected())


def test_an_ape_that_is_an_inference_tensor():
    with torch.inference_mode():
        ape = torch.randn(8, 128)
        for _ in range(2):
            found = kept.kvfold_ape(ape.view(-1, 128), 4, FP32).tensor
            assert torch.equal(found, torch.cat([ape[:4], ape[4:]], dim=1))
            ape.add_(1)


def changed(call, **changes):
    return {
        name: change(call[name]) if callable(change) else change for name, change in changes.items()
    }


REFUSED = [
    ({"is_online": True}, "is_online is True; accepted: False"),
    ({"head_dim": 256}, "head_dim is 256; accepted: 128, 512"),
    ({"compress_ratio": 128}, "compress_ratio is 128; accepted: 4, the plan's"),
    ({"kv_score_buffer": lambda x: x[:, :3]}, r"kv_score_buffer is of shape \[20, 3, 512\]"),
    ({"kv_score_buffer": lambda x: x.half()}, "kv_score_buffer is of torch.float16"),
    ({"kv_score_input": lambda x: x[:2]}, r"kv_score_input is of shape \[2, 512\]; accepted: \[3"),
    ({"kv_score_input": lambda x: x.t().contiguous().t()}, "kv_score_input is of strides"),
    ({"ape": lambda x: x[:4]}, r"ape is of shape \[4, 128\]; accepted: \[8, 128\]"),
    ({"out": lambda _: torch.zeros(4, 128)}, r"out is of shape \[4, 128\]; accepted: \[3, 128\]"),
    ({"out": lambda _: torch.zeros(3, 128).half()}, "out is of torch.float16"),
    ({"plan": lambda x: x._replace(compress_ratio=8)}, "plan.compress_ratio is 8; accepted: 4, 12"),
    ({"plan": lambda x: x._replace(plan_d=x.plan_d.int())}, "plan.plan_d is torch.int32"),
    ({"plan": lambda x: x._replace(plan_d=x.plan_d[:, :8])}, r"plan.plan_d is .*\[3, 8\]"),
    ({"plan": lambda x: x._replace(plan_d=x.plan_d[::2])}, "plan.plan_d is of strides"),
    ({"plan": lambda x: x._replace(plan_d=None)}, "plan.plan_d is a NoneType; accepted: a cont"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_calls_that_are_refused(changes, message, made):
    simulation = Simulation(C4, 128)
    call = simulation.decode(simulation.requests)
    arguments = {
        "kv_score_buffer": simulation.state(), "kv_score_input": call.kv_score,
        "ape": as_sglang_has_it(make_ape(simulation), 128), "plan": call.plan, "head_dim": 128,
        "compress_ratio": 4, "out": None,
    }  # fmt: skip
    arguments |= changed(arguments, **changes)
    with pytest.raises(ValueError, match=message):
        sglang.compress_forward(**arguments)
    assert not made
    assert arguments["kv_score_buffer"].isnan().all()


def test_an_online_plan_is_refused():
    """Its plan_w has 16 bytes per entry."""
    simulation = Simulation(C128, 128)
    call = simulation.extend(simulation.requests, [200, 3, 131])
    plan = call.plan._replace(plan_w=torch.zeros(5, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"plan.plan_w is .*\[5, 16\]; accepted: .*\[entries, 8\]"):
        sglang.compress_forward(
            simulation.state(), call.kv_score, make_ape(simulation), plan, head_dim=128,
            compress_ratio=128,
        )  # fmt: skip


def test_more_tokens_than_a_ragged_id_can_name():
    simulation = Simulation(C4, 128)
    call = simulation.extend(simulation.requests, [9, 9, 9])
    many = torch.zeros(1, 512).expand((1 << 16) + 1, 512)
    with pytest.raises(
        ValueError, match="kv_score_input is of 65537 rows; accepted: at most 65536"
    ):
        sglang.compress_forward(
            simulation.state(), many, as_sglang_has_it(make_ape(simulation), 128), call.plan,
            head_dim=128, compress_ratio=4,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_any_plan_is_safe(seed):
    """Whatever a plan holds, nothing outside of the tensors is read or written: no exception."""
    generator = torch.Generator().manual_seed(seed)
    layout = C4 if seed % 2 else C128
    simulation = Simulation(layout, 128, seed=seed)
    ape = as_sglang_has_it(make_ape(simulation), 128)
    cache = Cache(simulation, "fp8_block128_floor", "once", 4)
    for call in (
        simulation.extend(simulation.requests, [130, 9, 4], padded=bool(seed & 2)),
        simulation.decode(simulation.requests),
    ):
        for part in call.plan[1:3]:
            if isinstance(part, torch.Tensor):
                nonsense = torch.randint(0, 256, part.shape, generator=generator)
                chosen = torch.rand(part.shape, generator=generator) < [0.02, 0.3, 1][seed % 3]
                part.copy_(torch.where(chosen, nonsense.to(torch.uint8), part))
        state = simulation.state().zero_()
        arguments = {"head_dim": 128, "compress_ratio": layout.ratio}
        out = sglang.compress_forward(state, call.kv_score, ape, call.plan, **arguments)
        cache.store(out, call)


def test_a_plan_of_another_class_is_served():
    """Plans are told by their attributes: SGLang is not imported."""
    simulation = Simulation(C4, 128)
    call = simulation.decode(simulation.requests)

    class Plan(SimpleNamespace):
        def __getitem__(self, index):
            return (4, self.plan_d)[index]

    call.plan = Plan(compress_ratio=4, plan_d=call.plan.plan_d, is_decode=True)
    state = simulation.state()
    before = state.clone()
    forward(simulation, call, state, as_sglang_has_it(make_ape(simulation), 128), FP32)
    assert_state(state, before, call)
    assert not isinstance(call.plan, DecodePlan)
