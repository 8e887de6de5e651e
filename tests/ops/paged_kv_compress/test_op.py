"""The torch op: its checks, how it stands with torch.library and torch.compile, repeated calls."""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils._python_dispatch
from calls import MUTATED, Call, decode_step, make
from contract import assert_follows_contract
from numerics import assert_same_bits
from rings import RINGS, decoding, each

import kvfold
import kvfold.torch_ops  # registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import Variant
from kvfold.ops.paged_kv_compress import reference
from kvfold.ops.paged_kv_compress.spec import SPEC, Arguments, Tuning
from kvfold.runtime import dispatch, internals, repeat
from kvfold.runtime.arguments import check
from kvfold.runtime.driver import Kernel
from kvfold.runtime.torch_op import TorchOp, torch_op

OP = torch_op("paged_kv_compress")
NAMES = tuple(one.name for one in Arguments.declared())
OPTIONAL = ("new_tokens",)
BY_NAME = (*OPTIONAL, *(one.name for one in Arguments.declared_scalars() if one.keyword))
POSITIONAL = tuple(one.name for one in Arguments.declared() if one.name not in BY_NAME)
TENSORS = tuple(x.name for x in Arguments.declared_tensors() if not x.optional)
DEFAULTS = {"prefetch": "none", "ape_in_state": True, "work": "all", "new_tokens": None}


def by_name(call: Call) -> dict:
    """A call's arguments by name."""
    return dict(zip(NAMES, call.args(), strict=True))


def small(**changes) -> dict:
    """A small call's arguments by name."""
    fields = {"head_dim": 16, "compress_ratio": 4, "next_n": 2, "batch": 3, "page_size": 4}
    return by_name(decode_step(**fields | changes))


def by_function(arguments: dict) -> None:
    kvfold.paged_kv_compress(**arguments)


def by_dispatcher(arguments: dict) -> None:
    torch.ops.kvfold.paged_kv_compress(**arguments)


ENTRIES = pytest.mark.parametrize("run", [by_function, by_dispatcher])


def copies(arguments: dict) -> dict:
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def assert_unchanged(arguments: dict, before: dict, names=MUTATED) -> None:
    for name in names:
        torch.testing.assert_close(arguments[name], before[name], rtol=0, atol=0, equal_nan=True)


# ---- The function is what the declaration says ---------------------------------------------------


def test_the_signature_is_the_declaration():
    parameters = inspect.signature(kvfold.paged_kv_compress).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [
        (name, inspect.Parameter.empty if name in POSITIONAL else DEFAULTS[name]) for name in NAMES
    ]
    assert tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY) == POSITIONAL
    types = {one.name: one.type.__name__ for one in Arguments.declared_scalars()}
    types |= dict.fromkeys(OPTIONAL, "Tensor | None")
    assert [p.annotation for p in parameters] == [types.get(name, "Tensor") for name in NAMES]


def test_the_docstring_explains_every_argument_in_order():
    text = inspect.getdoc(kvfold.paged_kv_compress)
    explained = text[text.index("Args:") : text.index("Raises:")]
    places = [explained.find(f"\n    {name}: ") for name in NAMES]
    assert -1 not in places and places == sorted(places)
    for one in Arguments.declared_tensors():
        line = explained[explained.index(f"\n    {one.name}: ") + 1 :].splitlines()[0]
        assert ("mutated" in line) == one.mutated, one.name


def test_check_takes_all_arguments_but_prefetch():
    declared = dict(inspect.signature(kvfold.paged_kv_compress).parameters)
    del declared["prefetch"]
    assert dict(inspect.signature(kvfold.check).parameters) == declared


def test_the_schema_declares_what_is_written():
    schema = torch.ops.kvfold.paged_kv_compress.default._schema
    written = [
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    assert written == ["paged_kv", "paged_score", "output"]
    assert tuple(argument.name for argument in schema.arguments) == NAMES
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    assert defaults == DEFAULTS
    assert {a.name for a in schema.arguments if a.kwarg_only} == defaults.keys()


def test_arguments_may_be_given_by_name_or_in_order():
    by_name, in_order, by_op = small(), small(), small()
    kvfold.paged_kv_compress(**by_name)
    kvfold.paged_kv_compress(*(in_order[name] for name in POSITIONAL))
    torch.ops.kvfold.paged_kv_compress(*(by_op[name] for name in POSITIONAL))
    for name in MUTATED:
        assert_same_bits(by_name[name], in_order[name], name)
        assert_same_bits(by_name[name], by_op[name], name)
    assert not by_name["output"].isnan().any()


def test_a_missing_and_an_unknown_argument_are_a_type_error():
    arguments = small()
    with pytest.raises(TypeError, match="head_dim"):
        kvfold.paged_kv_compress(**arguments, head_dim=16)
    with pytest.raises(TypeError, match="takes 12 positional arguments but 13 were given"):
        kvfold.paged_kv_compress(*list(arguments.values())[:13])
    with pytest.raises(TypeError, match="prefetch_state"):
        kvfold.paged_kv_compress(**arguments, prefetch_state=True)
    del arguments["next_n"]
    with pytest.raises(TypeError, match="next_n"):
        kvfold.paged_kv_compress(**arguments)


def test_no_requests_is_no_work():
    arguments = small()
    for name in ("block_table_kv", "block_table_score", "kv_lens"):
        arguments[name] = arguments[name][:0]
    for name in ("cu_seq_lens", "cu_outputs"):
        arguments[name] = arguments[name][:1]
    before = copies(arguments)
    kvfold.paged_kv_compress(**arguments)
    assert_unchanged(arguments, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_torchs_default_dtype_has_no_effect(dtype):
    expected, by_name, by_op = small(), small(), small()
    kvfold.paged_kv_compress(**expected)
    torch.set_default_dtype(dtype)
    try:
        kvfold.paged_kv_compress(**by_name)
        torch.ops.kvfold.paged_kv_compress(**by_op)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in MUTATED:
        assert_same_bits(by_name[name], expected[name], name)
        assert_same_bits(by_op[name], expected[name], name)


def test_no_gradient_is_recorded():
    """The op has no derivative, and the state of a model whose ape is a parameter is no graph."""
    arguments, expected = small(), small()
    arguments["ape"] = torch.nn.Parameter(arguments["ape"])
    arguments["output"] = arguments["output"].requires_grad_()
    kvfold.paged_kv_compress(**arguments)
    kvfold.paged_kv_compress(**expected)
    assert not arguments["paged_kv"].requires_grad and not arguments["paged_score"].requires_grad
    assert arguments["output"].is_leaf
    assert_unchanged({name: arguments[name].detach() for name in MUTATED}, expected)


# ---- Argument errors -----------------------------------------------------------------------------


def unaligned(tensor):
    """The same values one element off a 16-byte boundary."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view(tensor.shape).copy_(tensor)


def padded(tensor, by):
    """The same values with rows `by` elements further apart."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + by, dtype=tensor.dtype)
    return wide[..., : tensor.shape[-1]].copy_(tensor)


def overlapping(tensor):
    """A pool of the same shape whose pages begin one slot apart."""
    pages, slots, columns = tensor.shape
    return torch.zeros(pages + slots, columns).as_strided(tensor.shape, (columns, columns, 1))


FLOATS = "torch.bfloat16 or torch.float32"
BAD = {
    "kv_score dtype": ("kv_score", lambda t: t.half(), FLOATS),
    "kv_score width": ("kv_score", lambda t: t[:, :-8], r"\[num_tokens, 2\*state_dim\]"),
    "kv_score dims": ("kv_score", lambda t: t[None], r"\[num_tokens, 2\*state_dim\]"),
    "kv_score rows apart": ("kv_score", lambda t: padded(t, 4), "multiples of 16 bytes"),
    "kv_score start": ("kv_score", unaligned, "multiples of 16 bytes"),
    "kv_score transposed": ("kv_score", lambda t: t.T.contiguous().T, "contiguous last dimension"),
    "ape dtype": ("ape", lambda t: t.bfloat16(), "torch.float32"),
    "ape shape": ("ape", lambda t: t[:-1], r"\[compress_ratio, state_dim\] = \[4, 32\]"),
    "paged_kv dtype": ("paged_kv", lambda t: t.double(), FLOATS),
    "paged_kv state_dim": ("paged_kv", lambda t: t[..., :24], "32 for an overlapping window"),
    "paged_kv page_size": ("paged_kv", lambda t: t[:, :0], "1 or more"),
    "paged_kv expanded": ("paged_kv", lambda t: t[:1].expand(t.shape), "rows that do not overlap"),
    "paged_kv slots": ("paged_kv", lambda t: t[:, :1].expand(t.shape), "rows that do not overlap"),
    "paged_kv pages": ("paged_kv", overlapping, "rows that do not overlap"),
    "paged_score dtype": ("paged_score", lambda t: t.bfloat16(), "torch.float32, as paged_kv"),
    "paged_score shape": ("paged_score", lambda t: t[:-1], r"\[num_pages, page_size, state_dim\]"),
    "block_table_kv dtype": ("block_table_kv", lambda t: t.long(), "torch.int32"),
    "block_table_kv batch": ("block_table_kv", lambda t: t[:-1], r"\[batch, max_pages\]"),
    "block_table_score": ("block_table_score", lambda t: t[:, :-1], r"\[batch, max_pages\]"),
    "output dtype": ("output", lambda t: t.half(), FLOATS),
    "output head_dim": ("output", lambda t: t[:, :12], "8 or more in steps of 8"),
    "output expanded": ("output", lambda t: t[:1].expand(t.shape), "rows that do not overlap"),
    "kv_lens dtype": ("kv_lens", lambda t: t.float(), "torch.int32"),
    "kv_lens strides": ("kv_lens", lambda t: t.repeat_interleave(2)[::2], "contiguous"),
    "cu_seq_lens": ("cu_seq_lens", lambda t: t[:-1], r"\[batch\+1\] = \[4\]"),
    "cu_outputs": ("cu_outputs", lambda t: t[:-1], r"\[batch\+1\] = \[4\]"),
    "compress_ratio": ("compress_ratio", lambda r: 0, "1 or more"),
    "next_n below": ("next_n", lambda n: -1, "1, 2, "),
    "next_n above": ("next_n", lambda n: 17, r"1, 2, .*16 \(integer\)"),
    "prefetch": ("prefetch", lambda word: "early", "'none', 'metadata', 'state'$"),
    "work": ("work", lambda word: "both", "'all', 'store', 'reduce'$"),
    "no work": ("work", lambda word: "", "'all', 'store', 'reduce'$"),
}
# What an argument may be instead of a strided tensor: the error through kvfold, and the type of the
# error through torch.ops. There torch itself refuses what the schema does not allow (RuntimeError)
# and layouts for which the op has no kernel (NotImplementedError).
NO_STRIDED_TENSOR = {
    "none": (lambda t: None, "a NoneType; accepted: a tensor", ValueError),  # not torch's
    "a list": (lambda t: t.tolist(), "a list; accepted: a tensor", RuntimeError),
    "an array": (lambda t: t.float().numpy(), "a ndarray; accepted: a tensor", RuntimeError),
    "sparse": (
        lambda t: t.to_sparse(),
        r"a tensor of layout torch.sparse_coo; accepted: torch.strided",
        NotImplementedError,
    ),
}


def spoiled(fault: str) -> tuple[dict, str]:
    """A small call's arguments with a fault of BAD, and the start of the error's message."""
    name, spoil, accepted = BAD[fault]
    arguments = small()
    arguments[name] = spoil(arguments[name])
    return arguments, rf"^kvfold\.paged_kv_compress: {name} (is|has) .*; accepted: .*{accepted}"


@ENTRIES
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_argument_is_named_and_nothing_is_written(fault, run):
    arguments, message = spoiled(fault)
    before = copies(arguments)
    with pytest.raises(ValueError, match=message):
        run(arguments)
    assert_unchanged(arguments, before)


@pytest.mark.parametrize("fault", [fault for fault in BAD if fault != "prefetch"])
def test_kvfold_check_refuses_the_same_arguments(fault):
    arguments, message = spoiled(fault)
    del arguments["prefetch"]
    with pytest.raises(ValueError, match=message):
        kvfold.check(**arguments)


@pytest.mark.parametrize("kind", NO_STRIDED_TENSOR)
@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_strided_tensor_is_named_and_nothing_is_written(name, kind):
    spoil, message, torchs_error = NO_STRIDED_TENSOR[kind]
    arguments = small()
    arguments[name] = spoil(arguments[name])
    written = [other for other in MUTATED if other != name]
    before = copies(arguments)
    with pytest.raises(ValueError, match=rf"^kvfold\.paged_kv_compress: {name} is {message}$"):
        kvfold.paged_kv_compress(**arguments)
    with pytest.raises(torchs_error):
        torch.ops.kvfold.paged_kv_compress(**arguments)
    assert_unchanged(arguments, before, written)


@ENTRIES
@pytest.mark.parametrize("name", TENSORS)
def test_a_meta_tensor_among_cpu_tensors_is_refused(name, run):
    arguments = small()
    arguments[name] = arguments[name].to("meta")
    written = [other for other in MUTATED if other != name]
    before = copies(arguments)
    with pytest.raises(ValueError, match=r"is on (cpu|meta); accepted: (cpu|meta), where kv_score"):
        run(arguments)
    assert_unchanged(arguments, before, written)


@pytest.mark.parametrize(
    ("name", "value"),
    [("compress_ratio", None), ("compress_ratio", "4"), ("next_n", 2.0), ("next_n", [2]),
     ("next_n", torch.tensor(2)), ("prefetch", None), ("prefetch", True), ("prefetch", 1),
     ("ape_in_state", None), ("ape_in_state", 1), ("ape_in_state", "true"), ("work", None),
     ("work", b"all")],
    ids=str,
)  # fmt: skip
def test_a_scalar_of_another_type_is_refused_and_nothing_is_written(name, value):
    arguments = small()
    before = copies(arguments)
    kind = {one.name: one.type.__name__ for one in Arguments.declared_scalars()}[name]
    message = rf"^kvfold\.paged_kv_compress: {name} is .*; accepted: a value of type {kind}$"
    with pytest.raises(ValueError, match=message):
        kvfold.paged_kv_compress(**arguments | {name: value})
    assert_unchanged(arguments, before)


def test_integers_of_numpy_are_integers():
    arguments, expected = small(), small()
    kvfold.paged_kv_compress(**expected)
    numbers = {"compress_ratio": np.int64(4), "next_n": np.int32(2), "ape_in_state": np.True_}
    kvfold.paged_kv_compress(**arguments | numbers)
    assert_unchanged(arguments, expected)


@ENTRIES
def test_a_head_dim_that_the_table_lacks_runs_on_the_cpu(run):
    """The reference needs no row. A problem that no row could solve is refused; see BAD."""
    call = make([(7, 2), (14, 1)], head_dim=40, compress_ratio=8)
    assert_follows_contract(lambda c: run(by_name(c)), call)


@ENTRIES
def test_a_head_dim_that_no_row_can_have_is_refused_on_the_cpu(run):
    arguments = small() | {
        "kv_score": torch.zeros(6, 48),
        "ape": torch.zeros(4, 24),
        "output": torch.zeros(3, 12),
        **{name: torch.zeros(9, 4, 24) for name in ("paged_kv", "paged_score")},
    }
    with pytest.raises(ValueError, match="output is of head_dim 12; accepted: 8 or more"):
        run(arguments)


# ---- Tensors that share memory -------------------------------------------------------------------


def same_pool(arguments):
    arguments["paged_score"] = arguments["paged_kv"]
    arguments["block_table_score"] = arguments["block_table_kv"]


def same_memory(arguments):
    arguments["paged_score"] = arguments["paged_kv"][:]
    arguments["block_table_score"] = arguments["block_table_kv"][:]


def pools_half_a_page_apart(arguments):
    pages, slots, columns = arguments["paged_kv"].shape
    pool = torch.zeros(pages + 1, slots, columns)
    arguments["paged_kv"] = pool[:-1]
    arguments["paged_score"] = pool.view(-1, columns)[2:-2].view(pages, slots, columns)


def columns_in_common(arguments):
    pages, slots, columns = arguments["paged_kv"].shape
    pool = torch.zeros(pages, slots, 2 * columns)
    arguments["paged_kv"], arguments["paged_score"] = (
        pool[..., :columns],
        pool[..., 8 : columns + 8],
    )


def columns_in_common_score_first(arguments):
    columns_in_common(arguments)
    arguments["paged_kv"], arguments["paged_score"] = (
        arguments["paged_score"],
        arguments["paged_kv"],
    )


def pages_in_common(arguments):
    pages, slots, columns = arguments["paged_kv"].shape
    pool = torch.zeros(pages + 1, slots, 2 * columns)
    arguments["paged_kv"], arguments["paged_score"] = pool[:-1, :, columns:], pool[1:, :, columns:]


def output_in_kv_score(arguments):
    arguments["output"] = arguments["kv_score"][:3, 16:32]


def output_in_a_pool(arguments):
    arguments["output"] = arguments["paged_kv"].view(-1)[: 3 * 16].view(3, 16)


def output_in_a_block_table(arguments):
    table = torch.zeros(3, 16, dtype=torch.int32)
    arguments["block_table_kv"], arguments["block_table_score"] = table, table
    arguments["output"] = table.view(torch.float32)


@ENTRIES
@pytest.mark.parametrize(
    ("share", "name"),
    [
        (same_pool, "paged_kv"),
        (same_memory, "paged_kv"),
        (pools_half_a_page_apart, "paged_kv"),
        (columns_in_common, "paged_kv"),
        (columns_in_common_score_first, "paged_kv"),
        (pages_in_common, "paged_kv"),
        (output_in_kv_score, "output"),
        (output_in_a_pool, "paged_kv"),
        (output_in_a_block_table, "output"),
    ],
)
def test_a_written_tensor_in_the_memory_of_another_is_refused(share, name, run):
    arguments = small()
    share(arguments)
    before = copies(arguments)
    with pytest.raises(ValueError, match=rf"{name} is in the memory of .*; accepted: memory of"):
        run(arguments)
    assert_unchanged(arguments, before)


def halves(pool):
    return pool.chunk(2, dim=2)


LAYOUTS_OF_ONE_BUFFER = {
    "halves of each slot": lambda p, s, c: halves(torch.zeros(p, s, 2 * c)),
    "halves, the score first": lambda p, s, c: halves(torch.zeros(p, s, 2 * c))[::-1],
    "halves with a gap after each page": lambda p, s, c: halves(
        torch.zeros(p, s + 1, 2 * c)[:, :s]
    ),
    "halves with a gap after each slot": lambda p, s, c: halves(
        torch.zeros(p, s, 2 * c + 8)[..., : 2 * c]
    ),
    "halves of each page": lambda p, s, c: torch.zeros(p, 2, s, c).unbind(1),
    "every second page": lambda p, s, c: torch.zeros(p, 2, s, c).unbind(1)[::-1],
    "halves of the buffer": lambda p, s, c: torch.zeros(2, p, s, c).unbind(0),
    "every second slot": lambda p, s, c: torch.zeros(p, s, 2, c).unbind(2),
}


@ENTRIES
@pytest.mark.parametrize("layout", LAYOUTS_OF_ONE_BUFFER)
def test_pools_that_share_a_buffer_and_no_byte_are_accepted(layout, run):
    expected, arguments = small(), small()
    pools = LAYOUTS_OF_ONE_BUFFER[layout](*expected["paged_kv"].shape)
    for name, pool in zip(("paged_kv", "paged_score"), pools, strict=True):
        arguments[name] = pool.copy_(expected[name])
    run(arguments)
    kvfold.paged_kv_compress(**expected)
    assert_unchanged(arguments, expected)


@ENTRIES
def test_all_tensors_may_be_slices_of_one_buffer(run):
    expected, arguments = small(kv_dtype="fp32", output_dtype="fp32"), {}
    buffer = torch.zeros(1 << 16, dtype=torch.uint8)
    begin = 0
    for name, value in expected.items():
        arguments[name] = value
        if isinstance(value, torch.Tensor):
            flat = buffer[begin : begin + value.nbytes]
            arguments[name] = flat.view(value.dtype).view(value.shape).copy_(value)
            begin += -(-value.nbytes // 16) * 16
    run(arguments)
    kvfold.paged_kv_compress(**expected)
    assert_unchanged(arguments, expected)


@ENTRIES
def test_the_output_may_be_other_columns_of_the_buffer_of_kv_score(run):
    expected, arguments = small(output_dtype="bf16"), small(output_dtype="bf16")
    tokens, columns = expected["kv_score"].shape
    buffer = torch.zeros(tokens, columns + 16, dtype=torch.bfloat16)
    arguments["kv_score"] = buffer[:, :columns].copy_(expected["kv_score"])
    arguments["output"] = buffer[:3, columns:]
    run(arguments)
    kvfold.paged_kv_compress(**expected)
    assert_unchanged(arguments, expected)


# ---- One variant, chosen by hand -----------------------------------------------------------------


def test_run_variant_runs_the_variant_that_it_is_given(monkeypatch):
    call = make([(7, 2), (6, 1)], head_dim=16, next_n=2)
    tuning = Tuning(reduce_warps=1, head_slice=16)
    variant = Variant(problem=call.problem, backend="triton", tuning=tuning)
    bound = []
    monkeypatch.setattr(
        dispatch, "bind", lambda variant, device: bound.append((variant, device)) or reference.run
    )
    assert_follows_contract(lambda c: OP.run_variant(variant, *c.args()), call)
    assert bound == [(variant, torch.device("cpu"))]


def test_run_variant_refuses_a_variant_of_another_problem():
    call = make([(7, 2)], head_dim=16, next_n=2)
    other = replace(call.problem, next_n=3)
    tuning = Tuning(reduce_warps=1, head_slice=16)
    variant = Variant(problem=other, backend="triton", tuning=tuning)
    with pytest.raises(ValueError, match=r"next_n 3, .*; got .*next_n 2, "):
        OP.run_variant(variant, *call.args())
    raw = replace(call, next_n=3, ape_in_state=False)
    with pytest.raises(ValueError, match=r"ape_in_state true; got .*ape_in_state false"):
        OP.run_variant(variant, *raw.args())
    with pytest.raises(ValueError, match="ape is"):
        OP.run_variant(variant, *replace(call, ape=call.ape[:1]).args())


# ---- Repeated calls ------------------------------------------------------------------------------


class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists the ops that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **kwargs or {})


class Functions(torch.overrides.TorchFunctionMode):
    """Lists the functions that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    pass


class RecordingKernel(Kernel):
    """A kernel that lists its launches: the strides that it was packed for, and the pointers."""

    def __init__(self, launches: list):
        self.launches = launches

    def pack(self, arguments):
        strides = [x.stride() for x in arguments.args() if isinstance(x, torch.Tensor)]
        return lambda pointers: self.launches.append((strides, list(pointers)))


@pytest.fixture
def launches(monkeypatch):
    """The launches of RecordingKernel, which serves every call. CPU calls are remembered too."""
    assert internals.FOUND
    launches = []
    kernel = RecordingKernel(launches)
    monkeypatch.setattr(dispatch, "launcher", lambda *call: kernel)
    monkeypatch.setattr(
        TorchOp, "_may_remember", lambda self, x: repeat.can_remember(self._different(x))
    )
    repeat.forget()
    yield launches
    repeat.forget()


@pytest.fixture
def repeated(launches, monkeypatch):
    """The entry, 'direct' or 'dispatcher', of each call that was launched as a repeated one."""
    repeated = []
    launch_again = TorchOp._launch_again

    def listed(self, key, tensors):
        done = launch_again(self, key, tensors)
        if done:
            repeated.append(key[1])
        return done

    monkeypatch.setattr(TorchOp, "_launch_again", listed)
    return repeated


def test_a_repeated_call_is_launched_without_the_dispatcher(launches, repeated):
    first, second = small(), small()
    by_function(first)
    assert repeated == [] and len(launches) == 1
    by_function(second)
    assert repeated == ["direct"]
    by_dispatcher(first)
    assert repeated == ["direct", "dispatcher"] and len(launches) == 3
    for arguments, (strides, pointers) in zip((first, second, first), launches, strict=True):
        # new_tokens is absent: a null pointer
        assert pointers == [*(arguments[name].data_ptr() for name in TENSORS), 0]
        assert strides == [arguments[name].stride() for name in TENSORS]


def test_calls_that_differ_in_a_scalar_are_not_taken_for_each_other(repeated):
    arguments = small()
    others = [
        {"prefetch": "metadata"}, {"prefetch": "state"}, {"ape_in_state": False},
        {"work": "store"}, {"work": "reduce"}, {"next_n": 3},
    ]  # fmt: skip
    by_function(arguments)
    for other in others:
        by_function(arguments | other)
    assert repeated == []
    for other in others:
        by_function(arguments | other)
    by_function(arguments)
    assert repeated == ["direct"] * (len(others) + 1)


def test_calls_that_differ_in_a_stride_are_not_taken_for_each_other(launches, repeated):
    arguments = small()
    wide = arguments | {"paged_kv": padded(arguments["paged_kv"], 8)}
    for call in (arguments, wide, arguments, wide):
        by_function(call)
        assert launches[-1][0][2] == call["paged_kv"].stride()
    assert repeated == []  # one key: each replaces the other


def test_a_call_of_another_thread_in_between_does_not_lend_its_strides(launches, monkeypatch):
    arguments = small()
    wide = arguments | {"paged_kv": padded(arguments["paged_kv"], 8)}
    torch_op = OP._torch_op

    def interrupted(*args, **kwargs):
        torch_op(*args, **kwargs)
        torch_op(**wide)

    monkeypatch.setattr(OP, "_torch_op", interrupted)
    by_function(arguments)
    monkeypatch.setattr(OP, "_torch_op", torch_op)
    by_function(arguments)
    assert launches[-1][0][2] == arguments["paged_kv"].stride()


def test_one_block_table_for_both_pools_is_not_taken_for_two(repeated):
    arguments = small(layout="packed")
    two = dict(arguments)
    one = arguments | {"block_table_score": arguments["block_table_kv"]}
    for call in (one, two):
        by_function(call)
    assert repeated == []
    for call in (one, two):
        by_function(call)
    assert repeated == ["direct", "direct"]


def test_a_tensor_that_is_given_twice_otherwise_is_not_remembered(repeated):
    arguments = small(next_n=1, compress_ratio=1, overlap=False, scenario="all-hit")
    arguments["cu_outputs"] = arguments["cu_seq_lens"]
    for _ in range(2):
        by_function(arguments)
    assert repeated == []


@pytest.mark.parametrize("fault", BAD)
def test_no_bad_argument_passes_as_a_repeated_call(fault, launches, repeated):
    good = small()
    by_function(good)
    bad, message = spoiled(fault)
    for run in (by_function, by_dispatcher):
        with pytest.raises(ValueError, match=message):
            run(bad)
    assert repeated == [] and len(launches) == 1
    by_function(good)
    assert repeated == ["direct"]


@pytest.mark.parametrize("kind", [*NO_STRIDED_TENSOR, "meta"])
@pytest.mark.parametrize("name", TENSORS)
def test_no_other_object_passes_as_a_repeated_call(name, kind, launches):
    good, bad = small(), small()
    by_function(good)
    spoil = (lambda t: t.to("meta")) if kind == "meta" else NO_STRIDED_TENSOR[kind][0]
    bad[name] = spoil(bad[name])
    with pytest.raises(ValueError, match="accepted"):
        by_function(bad)
    assert len(launches) == 1


def test_one_pool_for_both_states_does_not_pass_as_a_repeated_call(launches):
    arguments = small()
    arguments["block_table_score"] = arguments["block_table_kv"]
    by_function(arguments)
    with pytest.raises(ValueError, match="memory of its own"):
        by_function(arguments | {"paged_score": arguments["paged_kv"]})
    assert len(launches) == 1


def test_modes_subclasses_profiler_and_gradients_see_a_repeated_call(repeated):
    arguments = small()
    by_function(arguments)
    with Dispatched() as mode:
        by_function(arguments)
    assert mode.ops == ["kvfold.paged_kv_compress.default"]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        by_function(arguments)
    with Functions() as mode:
        by_function(arguments)
    assert any("paged_kv_compress" in name for name in mode.seen)
    with torch.profiler.profile() as profile:
        by_function(arguments)
    assert "kvfold::paged_kv_compress" in {event.name for event in profile.events()}
    by_function(arguments | {"kv_score": arguments["kv_score"].as_subclass(Subclass)})
    by_function(arguments | {"output": arguments["output"].float().requires_grad_()})
    assert "direct" not in repeated
    by_function(arguments)
    assert repeated[-1] == "direct"


def test_without_repeated_calls_every_call_goes_through_the_dispatcher(launches, repeated):
    arguments = small()
    with repeat.disabled():
        for _ in range(2):
            by_function(arguments)
            by_dispatcher(arguments)
    assert repeated == [] and len(launches) == 4


def test_the_op_works_with_a_torch_that_lacks_the_private_parts():
    script = Path(__file__).with_name("run_without_internals.py")
    done = subprocess.run([sys.executable, script, "cpu"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# ---- torch.library and torch.compile -------------------------------------------------------------


MODES = [
    {},
    {"prefetch": "metadata"},
    {"prefetch": "state", "ape_in_state": False},
    {"work": "store"},
    {"work": "reduce", "ape_in_state": False},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_opcheck(layout, mode):
    arguments = small(layout=layout)
    positional = tuple(arguments[name] for name in POSITIONAL)
    torch.library.opcheck(torch.ops.kvfold.paged_kv_compress.default, positional, mode)


def test_fake_tensors_need_no_data():
    arguments = small()
    meta = arguments["ape"].to("meta")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        assert kvfold.paged_kv_compress(**fakes) is None
        with pytest.raises(ValueError, match="ape is on meta"):
            by_dispatcher(fakes | {"ape": mode.from_tensor(meta)})


@pytest.mark.parametrize(
    ("layout", "dynamic", "mode"),
    [
        *((layout, dynamic, {}) for layout in ("split", "packed") for dynamic in (False, True)),
        *(("split", False, mode) for mode in MODES[1:]),
    ],
    ids=str,
)
def test_torch_compile_fullgraph(layout, dynamic, mode):
    def step(scale, kv_score, **others):
        kvfold.paged_kv_compress(kv_score * scale, **others)
        return others["output"] + 1

    eager, compiled = (small(layout=layout) | mode for _ in range(2))
    before = copies(eager)
    scale = torch.tensor(0.5)
    want = step(scale, **eager)
    torch._dynamo.reset()
    program = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = program(scale, **compiled)
    assert got.isnan().all() == (mode.get("work") == "store")
    assert torch.equal(compiled["paged_kv"], before["paged_kv"]) == (mode.get("work") == "reduce")
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert_unchanged(compiled, eager)


def test_a_compiled_function_serves_a_ring_in_two_calls():
    """torch.compile keeps their order: the first reads the state, the second writes it."""

    def step(arguments):
        kvfold.paged_kv_compress(**arguments, work="reduce")
        kvfold.paged_kv_compress(**arguments, work="store")

    (kind,) = (ring for ring in RINGS if str(ring) == "r4_rows8_n8_two_calls")
    program = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")

    def run_ring(calls):
        for call in calls[::2]:
            arguments = by_name(call)
            del arguments["work"]
            program(arguments)

    decoding(kind, steps=6).compare(each(reference.run), run_ring)


# ---- check ---------------------------------------------------------------------------------------


def for_check(arguments: dict) -> dict:
    """The arguments of kvfold.check for a call."""
    return {name: value for name, value in arguments.items() if name != "prefetch"}


def metadata(**changes) -> dict:
    """The arguments of kvfold.check for a small call."""
    return for_check(small(**changes))


@pytest.mark.parametrize("scenario", ["all-hit", "spread", "no-hit"])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_check_accepts_good_metadata(scenario, layout):
    kvfold.check(**metadata(scenario=scenario, layout=layout, batch=8))


@pytest.mark.parametrize("length", [0, -1, 10_000, -(2**31)])
def test_check_accepts_padding_of_any_length(length):
    arguments = metadata(batch=2, scenario="no-hit")
    arguments["cu_seq_lens"] = torch.tensor([0, 2, 2], dtype=torch.int32)
    arguments["kv_lens"][1] = length
    arguments["block_table_kv"][1] = -1
    before = copies(arguments)
    kvfold.check(**arguments)
    assert_unchanged(arguments, before, TENSORS)


def set_to(name, index, value):
    def spoil(arguments):
        arguments[name][index] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (set_to("kv_lens", 1, -5), r"request 1: kv_lens is -5; accepted: >= its 2 new tokens"),
        (set_to("kv_lens", 2, 10_000), r"request 2: kv_lens is 10000; accepted: <= max_pages"),
        (set_to("cu_seq_lens", 0, -1), r"request 0: cu_seq_lens is \[-1, 2\]; accepted: within 0"),
        (set_to("cu_seq_lens", 3, 99), r"request 2: cu_seq_lens is \[4, 99\]; accepted: within"),
        (set_to("cu_seq_lens", 1, 0), r"request 1: cu_seq_lens is \[0, 4\]; accepted: 0"),
        (set_to("cu_seq_lens", 1, 5), r"request 0: cu_seq_lens is \[0, 5\]; accepted: 0"),
        (set_to("cu_outputs", 2, 1), r"request 1: cu_outputs is \[1, 1\]; accepted: 1 or more"),
        (set_to("cu_outputs", 0, -1), r"request 0: cu_outputs is \[-1, 1\]; accepted: 1 or more"),
        (set_to("block_table_kv", (1, 1), -1), r"request 1: block_table_kv\[1, 1\] is -1"),
        (set_to("block_table_score", (2, 2), 99), r"request 2: block_table_score\[2, 2\] is 99"),
    ],
)  # fmt: skip
def test_check_names_request_field_and_value(spoil, message):
    arguments = metadata()
    kvfold.check(**arguments)
    spoil(arguments)
    before = copies(arguments)
    with pytest.raises(ValueError, match=message):
        kvfold.check(**arguments)
    assert_unchanged(arguments, before, TENSORS)


@pytest.mark.parametrize("table", ["block_table_kv", "block_table_score"])
def test_check_finds_two_requests_that_write_one_page(table):
    arguments = metadata()
    last_page = (int(arguments["kv_lens"][0]) - 1) // 4, (int(arguments["kv_lens"][2]) - 1) // 4
    page = int(arguments[table][0, last_page[0]])
    arguments[table][2, last_page[1]] = page
    message = rf"request 2: {table}\[2, {last_page[1]}\] is {page}; accepted: .* request 0 writes"
    with pytest.raises(ValueError, match=message):
        kvfold.check(**arguments)


def test_check_accepts_pages_that_requests_share_and_do_not_write():
    """As two requests with one prompt do. The window before the new tokens is read from there."""
    call = make([(7, 1), (7, 1)], compress_ratio=8, page_size=4)
    for table in (call.block_table_kv, call.block_table_score):
        table[1, 0] = table[0, 0]
    kvfold.check(**for_check(by_name(call)))


def in_one_page(work: str, span: tuple[int, int] = (6, 3), **fields) -> dict:
    """A call whose state is a ring of one page of 8 rows, which holds a window and that before."""
    call = make([span], page_size=8, work=work, **fields)
    for table in (call.block_table_kv, call.block_table_score):
        table[:] = table[:, :1]
    return for_check(by_name(call))


def test_check_finds_rows_that_a_window_reads_and_the_call_overwrites():
    """Position 8 lies in the row of position 0, which the window of positions 0 to 7 reads."""
    for table in ("block_table_kv", "block_table_score"):
        arguments = in_one_page("all")
        other = next(name for name in ("block_table_kv", "block_table_score") if name != table)
        arguments[other] = make([(6, 3)], page_size=8).block_table_kv
        message = (
            rf"request 0: {table}\[0, 1\], with the row of position 8, is \d; accepted: a page"
            r' without the row of position 0, .* work "reduce", then one with "store"$'
        )
        with pytest.raises(ValueError, match=message):
            kvfold.check(**arguments)
    for work in ("reduce", "store"):
        kvfold.check(**in_one_page(work))
    kvfold.check(**in_one_page("all", (6, 2)))  # ends with the window
    kvfold.check(**in_one_page("all", (8, 3)))  # no window closes


@pytest.mark.parametrize("work", ["all", "store"])
def test_check_finds_a_row_that_two_new_tokens_have(work):
    arguments = in_one_page(work, (8, 9), compress_ratio=128, next_n=9)
    message = r"position 16, is \d; accepted: a page without the row of position 8, which this call"
    with pytest.raises(ValueError, match=message):
        kvfold.check(**arguments)
    kvfold.check(**arguments | {"work": "reduce"})
    kvfold.check(**in_one_page(work, (8, 8), compress_ratio=128, next_n=8))


def test_check_looks_at_what_the_steps_of_work_need():
    """One of four new tokens closes a window; the table has 4 rows a page."""
    arguments = for_check(by_name(make([(7, 4)])))
    first, second, last = ({"work": work} for work in ("all", "store", "reduce"))
    kvfold.check(**arguments | first)

    def passes(mode: dict, **changes) -> bool:
        try:
            kvfold.check(**arguments | changes | mode)
        except ValueError:
            return False
        return True

    def without(page: int) -> dict:
        table = arguments["block_table_kv"].clone()
        table[0, page] = -1
        return {"block_table_kv": table}

    for changes, accepted in (
        ({"cu_outputs": torch.zeros(2, dtype=torch.int32)}, [False, True, False]),
        (without(0), [False, True, False]),  # old rows alone
        (without(1), [False, False, False]),  # old rows and a new one
        (without(2), [False, False, True]),  # new rows that no window reads
    ):
        assert [passes(mode, **changes) for mode in (first, second, last)] == accepted
    # Without a window that closes, there is nothing to reduce.
    arguments = for_check(by_name(make([(8, 3)])))
    assert [passes(mode, **without(2)) for mode in (first, second, last)] == [False, False, True]


def test_check_of_two_requests_that_write_one_page_is_for_calls_that_store():
    arguments = for_check(by_name(make([(7, 1), (7, 1)])))
    for name in ("block_table_kv", "block_table_score"):
        arguments[name][1] = arguments[name][0]
    for work in ("all", "store"):
        with pytest.raises(ValueError, match="request 0 writes this one too"):
            kvfold.check(**arguments | {"work": work})
    kvfold.check(**arguments | {"work": "reduce"})


def test_check_finds_a_page_that_both_tables_name_in_one_pool():
    arguments = for_check(small())
    kv, score = arguments["block_table_kv"], arguments["block_table_score"]
    arguments["paged_kv"] = torch.zeros(
        2 * len(arguments["paged_kv"]), *arguments["paged_kv"].shape[1:]
    )
    arguments["paged_score"] = arguments["paged_kv"][:]
    arguments["block_table_kv"] = torch.where(kv < 0, kv, 2 * kv)
    arguments["block_table_score"] = torch.where(score < 0, score, 2 * score + 1)
    kvfold.check(**arguments)
    arguments["block_table_score"] = arguments["block_table_kv"].clone()
    with pytest.raises(ValueError, match=r"block_table_score\[0, .*request 0 writes this one too"):
        kvfold.check(**arguments)


def test_check_checks_the_arguments_first():
    with pytest.raises(ValueError, match="ape is"):
        kvfold.check(**metadata() | {"ape": torch.zeros(1, 1)})


# ---- What dispatch is told -----------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ape_in_state", [False, True])
@pytest.mark.parametrize("layout", ["split", "packed", "strided"])
def test_the_arguments_tell_the_problem_and_the_batch(overlap, layout, ape_in_state):
    call: Call = make(
        [(7, 2), (4, 1)], head_dim=24, compress_ratio=5, overlap=overlap, kv_dtype="fp32",
        state_dtype="bf16", next_n=3, layout=layout, ape_in_state=ape_in_state,
    )  # fmt: skip
    found = check(SPEC, call)
    assert found.problem == call.problem
    assert (found.size, found.device) == (2, torch.device("cpu"))
    assert found.problem.values() == {
        "head_dim": 24, "compress_ratio": 5, "overlap": overlap, "kv_dtype": "fp32",
        "state_dtype": "bf16", "next_n": 3, "ape_in_state": ape_in_state,
    }  # fmt: skip
