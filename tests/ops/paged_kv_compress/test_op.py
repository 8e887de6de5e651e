"""The torch op: its checks, how it stands with torch.library and torch.compile, and `check`."""

import pytest
import torch
import torch.utils._python_dispatch

import kvfold
from kvfold import repeat
from kvfold.bench import cases
from kvfold.ops.paged_kv_compress import op

NAMES = (
    "kv_score", "ape", "paged_kv", "paged_score", "block_table_kv", "block_table_score", "output",
    "kv_lens", "cu_seq_lens", "cu_outputs", "compress_ratio", "next_n",
)  # fmt: skip


def make(**changes):
    """A small problem's arguments by name."""
    case = cases.make(
        **{"head_dim": 16, "compress_ratio": 4, "next_n": 2, "batch": 3, "page_size": 4} | changes
    )
    return dict(zip(NAMES, case.args(), strict=True))


def clone(arguments):
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


# ---- Argument errors -----------------------------------------------------------------------------


def unaligned(tensor):
    """The same values one element off a 16-byte boundary."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view(tensor.shape).copy_(tensor)


def padded(tensor, by):
    """The same values with rows `by` elements further apart."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + by, dtype=tensor.dtype)
    return wide[..., : tensor.shape[-1]].copy_(tensor)


BAD = {
    "kv_score dtype": ("kv_score", lambda t: t.half(), "torch.bfloat16 or torch.float32"),
    "kv_score width": ("kv_score", lambda t: t[:, :-8], r"\[num_tokens, 2\*state_dim\]"),
    "kv_score dims": ("kv_score", lambda t: t[None], "2 dimensions"),
    "kv_score rows apart": ("kv_score", lambda t: padded(t, 4), "multiples of 16 bytes"),
    "kv_score start": ("kv_score", unaligned, "multiples of 16 bytes"),
    "kv_score transposed": ("kv_score", lambda t: t.T.contiguous().T, "contiguous last dimension"),
    "ape dtype": ("ape", lambda t: t.bfloat16(), "torch.float32"),
    "ape shape": ("ape", lambda t: t[:-1], r"\[compress_ratio, state_dim\] = \[4, 32\]"),
    "paged_kv dtype": ("paged_kv", lambda t: t.double(), "torch.bfloat16 or torch.float32"),
    "paged_kv state_dim": ("paged_kv", lambda t: t[..., :24], "32 for an overlapping window"),
    "paged_kv page_size": ("paged_kv", lambda t: t[:, :0], "page_size >= 1"),
    "paged_kv expanded": ("paged_kv", lambda t: t[:1].expand(t.shape), "rows that do not overlap"),
    "paged_score dtype": ("paged_score", lambda t: t.bfloat16(), "paged_kv's dtype"),
    "paged_score shape": ("paged_score", lambda t: t[:-1], "paged_kv's shape"),
    "block_table_kv dtype": ("block_table_kv", lambda t: t.long(), "torch.int32"),
    "block_table_kv batch": ("block_table_kv", lambda t: t[:-1], r"\[batch, max_pages\]"),
    "block_table_score": ("block_table_score", lambda t: t[:, :-1], "block_table_kv's shape"),
    "output dtype": ("output", lambda t: t.half(), "torch.bfloat16 or torch.float32"),
    "output head_dim": ("output", lambda t: t[:, :12], "head_dim % 8 == 0"),
    "kv_lens dtype": ("kv_lens", lambda t: t.float(), "torch.int32"),
    "kv_lens strides": ("kv_lens", lambda t: t.repeat_interleave(2)[::2], "contiguous"),
    "cu_seq_lens": ("cu_seq_lens", lambda t: t[:-1], r"\[batch \+ 1\] = \[4\]"),
    "cu_outputs": ("cu_outputs", lambda t: t[:-1], r"\[batch \+ 1\] = \[4\]"),
    "cu_outputs device": ("cu_outputs", lambda t: t.to("meta"), "cpu, where kv_score is"),
    "compress_ratio": ("compress_ratio", lambda r: 0, "a positive integer"),
    "next_n": ("next_n", lambda n: -1, "a positive integer"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_argument_is_named_and_nothing_is_written(fault):
    name, spoil, accepted = BAD[fault]
    arguments = make()
    arguments[name] = spoil(arguments[name])
    before = clone(arguments)
    with pytest.raises(ValueError, match=rf"{name} is .*; accepted: .*{accepted}"):
        kvfold.ops.paged_kv_compress.op.check_arguments(*arguments.values())
    if "device" not in fault:  # tensors on two devices do not reach the op
        with pytest.raises(ValueError, match=name):
            kvfold.paged_kv_compress(*arguments.values())
    for field in ("paged_kv", "paged_score", "output"):
        torch.testing.assert_close(arguments[field], before[field], rtol=0, atol=0, equal_nan=True)


def test_arguments_may_be_given_by_name():
    by_name, in_order = make(), make()
    kvfold.paged_kv_compress(**by_name)
    torch.ops.kvfold.paged_kv_compress(*in_order.values())
    torch.testing.assert_close(by_name["output"], in_order["output"], equal_nan=True)


def test_no_requests_is_no_work():
    arguments = make()
    for name in ("block_table_kv", "block_table_score", "kv_lens"):
        arguments[name] = arguments[name][:0]
    for name in ("cu_seq_lens", "cu_outputs"):
        arguments[name] = arguments[name][:1]
    before = clone(arguments)
    kvfold.paged_kv_compress(**arguments)
    assert torch.equal(arguments["paged_kv"], before["paged_kv"])


# ---- The direct way to the launch, past torch's dispatcher ---------------------------------------


class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists the ops that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **kwargs or {})


class Functions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def remembered(monkeypatch):
    """As on a GPU: a first call is remembered, and what `launch` then gets is listed."""
    launches = []

    def remember(look, tensors, compress_ratio, next_n):
        tensors, way = op._different(tensors), look[-1]
        if repeat.can_remember(tensors):
            launch = lambda prefetch_state, *_: launches.append((way, prefetch_state))  # noqa: E731
            repeat.remember(look, tensors, launch)

    monkeypatch.setattr(op, "_remember", remember)
    repeat.forget()
    yield launches
    repeat.forget()


def test_a_repeated_call_goes_straight_to_the_launch(remembered):
    arguments = make()
    kvfold.paged_kv_compress(**arguments)
    assert remembered == []
    kvfold.paged_kv_compress(**arguments, prefetch_state=True)
    assert remembered == [("direct", True)]
    torch.ops.kvfold.paged_kv_compress(*arguments.values())
    assert remembered == [("direct", True), ("dispatcher", False)]


def test_one_block_table_for_both_pools_is_remembered_and_not_taken_for_two(remembered):
    arguments = make(layout="packed")
    two = dict(arguments)
    one = arguments | {"block_table_score": arguments["block_table_kv"]}
    for call in (one, two):
        kvfold.paged_kv_compress(**call)
    assert remembered == []
    for call in (one, two):
        kvfold.paged_kv_compress(**call)
    assert len(remembered) == 2


def test_a_tensor_given_twice_otherwise_is_not_remembered(remembered):
    arguments = make(next_n=1, compress_ratio=1, overlap=False, scenario="all-hit")
    arguments["cu_outputs"] = arguments["cu_seq_lens"]
    for _ in range(2):
        kvfold.paged_kv_compress(**arguments)
    assert remembered == []


@pytest.mark.parametrize("fault", sorted(BAD.keys() - {"cu_outputs device"}))
def test_what_is_remembered_lets_no_bad_argument_through(remembered, fault):
    good, bad = make(), make()
    kvfold.paged_kv_compress(**good)
    name, spoil, _ = BAD[fault]
    bad[name] = spoil(bad[name])
    with pytest.raises(ValueError, match=name):
        kvfold.paged_kv_compress(**bad)
    assert remembered == []
    kvfold.paged_kv_compress(**good)
    assert len(remembered) == 1


def test_modes_subclasses_profiler_and_gradients_see_a_repeated_call(remembered):
    arguments = make()
    kvfold.paged_kv_compress(**arguments)
    with Dispatched() as mode:
        kvfold.paged_kv_compress(**arguments)
    assert mode.ops == ["kvfold.paged_kv_compress.default"]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        kvfold.paged_kv_compress(**arguments)
    with Functions() as mode:
        kvfold.paged_kv_compress(**arguments)
    assert any("paged_kv_compress" in name for name in mode.seen)
    with torch.profiler.profile() as profile:
        kvfold.paged_kv_compress(**arguments)
    assert "kvfold::paged_kv_compress" in {event.name for event in profile.events()}
    kvfold.paged_kv_compress(
        **arguments | {"kv_score": arguments["kv_score"].as_subclass(Subclass)}
    )
    with pytest.raises(RuntimeError, match="requires grad"):
        leaf = arguments["output"].float().requires_grad_()
        kvfold.paged_kv_compress(**arguments | {"output": leaf})
    assert not any(way == "direct" for way, _ in remembered)
    kvfold.paged_kv_compress(**arguments)
    assert ("direct", False) in remembered


# ---- torch.library and torch.compile -------------------------------------------------------------


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_opcheck(layout):
    torch.library.opcheck(
        torch.ops.kvfold.paged_kv_compress.default, tuple(make(layout=layout).values())
    )


def test_schema_declares_what_is_written():
    schema = torch.ops.kvfold.paged_kv_compress.default._schema
    written = [
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    assert written == ["paged_kv", "paged_score", "output"]
    assert tuple(argument.name for argument in schema.arguments) == (*NAMES, "prefetch_state")


def test_the_fake_runs_without_data():
    arguments = make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [
            mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for value in arguments.values()
        ]
        assert kvfold.paged_kv_compress(*fakes) is None


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_fullgraph(layout, dynamic):
    def step(scale, *arguments):
        kv_score, *rest = arguments
        kvfold.paged_kv_compress(kv_score * scale, *rest)
        return rest[5] + 1  # the output

    eager, compiled = make(layout=layout), make(layout=layout)
    scale = torch.tensor(0.5)
    want = step(scale, *eager.values())
    torch._dynamo.reset()
    program = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = program(scale, *compiled.values())
    assert not got.isnan().all()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    for name in ("paged_kv", "paged_score", "output"):
        torch.testing.assert_close(compiled[name], eager[name], rtol=0, atol=0, equal_nan=True)


# ---- check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", cases.SCENARIOS)
def test_check_accepts_good_metadata(scenario):
    kvfold.check(**make(scenario=scenario, batch=8))


def test_check_accepts_padding_requests():
    arguments = make(batch=2, scenario="no-hit")
    arguments["cu_seq_lens"] = torch.tensor([0, 2, 2], dtype=torch.int32)
    arguments["kv_lens"][1] = 0
    arguments["block_table_kv"][1] = -1
    kvfold.check(**arguments)


def spoiled(name, index, value):
    def spoil(arguments):
        arguments[name][index] = value

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoiled("kv_lens", 1, -5), r"request 1: kv_lens is -5; accepted: >= its 2 new tokens"),
        (spoiled("kv_lens", 2, 10_000), r"request 2: kv_lens is 10000; accepted: <= max_pages"),
        (spoiled("cu_seq_lens", 0, -1), r"request 0: cu_seq_lens is \[-1, 2\]; accepted: within 0"),
        (spoiled("cu_seq_lens", 3, 99), r"request 2: cu_seq_lens is \[4, 99\]; accepted: within"),
        (spoiled("cu_seq_lens", 1, 0), r"request 1: cu_seq_lens is \[0, 4\]; accepted: 0"),
        (spoiled("cu_seq_lens", 1, 5), r"request 0: cu_seq_lens is \[0, 5\]; accepted: 0"),
        (spoiled("cu_outputs", 2, 1), r"request 1: cu_outputs is \[1, 1\]; accepted: 1 rows"),
        (spoiled("cu_outputs", 0, -1), r"request 0: cu_outputs is \[-1, 1\]; accepted: 1 rows"),
        (spoiled("block_table_kv", (1, 1), -1), r"request 1: block_table_kv\[1, 1\] is -1"),
        (spoiled("block_table_score", (2, 2), 99), r"request 2: block_table_score\[2, 2\] is 99"),
    ],
)  # fmt: skip
def test_check_names_request_field_and_value(spoil, message):
    arguments = make()
    kvfold.check(**arguments)
    spoil(arguments)
    before = clone(arguments)
    with pytest.raises(ValueError, match=message):
        kvfold.check(**arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_check_checks_the_arguments_first():
    with pytest.raises(ValueError, match="ape is"):
        kvfold.check(**make() | {"ape": torch.zeros(1, 1)})
