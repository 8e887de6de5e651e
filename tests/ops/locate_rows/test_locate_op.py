"""The torch op: its checks, and how it stands with torch.library and torch.compile."""

import inspect
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from locate_calls import MUTATED, SOURCES, Call, assert_follows_contract, make, run_op

import kvfold
import kvfold.torch_ops  # registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import load_table
from kvfold.ops.locate_rows.spec import SPEC, Arguments, Problem
from kvfold.runtime.arguments import check

NAMES = tuple(one.name for one in Arguments.declared())
TENSORS = tuple(one.name for one in Arguments.declared_tensors())
POSITIONAL = NAMES[:7]


def small(source: str = "block_table", **fields) -> Call:
    return make([(6, 9), (3, 0), (1, 4)], source=source, **fields)


def with_every(source: str) -> Call:
    """A call with new_tokens, too."""
    return small(source).without_last([0, 0, 0])


def by_dispatcher(call: Call) -> None:
    args, kwargs = call.args_and_kwargs()
    torch.ops.kvfold.locate_rows(*args, **kwargs)


ENTRIES = pytest.mark.parametrize("run", [run_op, by_dispatcher])
BOTH_SOURCES = pytest.mark.parametrize("source", SOURCES)


def assert_equal(call: Call, other: Call) -> None:
    for name in MUTATED:
        assert torch.equal(getattr(call, name), getattr(other, name)), name


# ---- The function is what the declaration says ---------------------------------------------------


def test_the_signature_has_every_argument_and_takes_none_for_no_bound():
    parameters = inspect.signature(kvfold.locate_rows).parameters
    assert tuple(parameters)[:7] == POSITIONAL
    assert set(parameters) == set(NAMES)
    types = {one.name: "int" for one in Arguments.declared_scalars()}
    for name, parameter in parameters.items():
        optional = name not in POSITIONAL
        assert (parameter.kind is parameter.KEYWORD_ONLY) == optional
        assert parameter.default is (None if optional else inspect.Parameter.empty)
        kind = types.get(name, "Tensor")
        assert parameter.annotation == (f"{kind} | None" if optional else kind)


def test_the_docstring_explains_every_argument_in_order():
    text = inspect.getdoc(kvfold.locate_rows)
    explained = text[text.index("Args:") : text.index("Raises:")]
    lines = [line for line in explained.splitlines() if line.startswith("    ")]
    heads = [line.strip().split(": ")[0] for line in lines if line[4] != " "]
    assert tuple(heads) == tuple(inspect.signature(kvfold.locate_rows).parameters)
    for one in Arguments.declared_tensors():
        line = next(line for line in lines if line.startswith(f"    {one.name}: "))
        assert ("mutated" in line) == one.mutated, one.name


def test_the_schema_declares_what_is_written_and_the_defaults():
    schema = torch.ops.kvfold.locate_rows.default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == list(MUTATED)
    assert tuple(a.name for a in schema.arguments) == NAMES
    assert {a.name: a.default_value for a in schema.arguments if a.kwarg_only} == {
        "num_tokens": -1,
        "next_n": -1,
        "block_table_cache": None,
        "token_slots": None,
        "new_tokens": None,
    }


@BOTH_SOURCES
def test_all_entries_do_the_same(source):
    by_function, by_op, by_name = (small(source, next_n=4, num_tokens=13) for _ in range(3))
    run_op(by_function)
    by_dispatcher(by_op)
    kvfold.locate_rows(**{name: getattr(by_name, name) for name in NAMES})
    assert by_function.positions.tolist() == [-1, -1, 0, -1, -1]
    assert_equal(by_op, by_function)
    assert_equal(by_name, by_function)


@BOTH_SOURCES
def test_none_is_no_bound(source):
    call, expected = small(source), small(source)
    run_op(expected)
    args = (*call.args()[:5], call.compress_ratio, call.rows_per_page)
    tensors = {name: getattr(call, name) for name in ("block_table_cache", "token_slots")}
    kvfold.locate_rows(*args, num_tokens=None, next_n=None, **tensors)
    assert_equal(call, expected)
    assert (call.positions >= 0).any()


def test_a_missing_an_unknown_and_a_positional_keyword_are_type_errors():
    args, kwargs = small().args_and_kwargs()
    with pytest.raises(TypeError, match="prefetch"):
        kvfold.locate_rows(*args, **kwargs, prefetch="none")
    with pytest.raises(TypeError, match="positional"):
        kvfold.locate_rows(*args, kwargs["block_table_cache"])
    with pytest.raises(TypeError, match="rows_per_page"):
        kvfold.locate_rows(*args[:-1], **kwargs)


def test_integers_of_numpy_are_integers():
    call, expected = small(next_n=4), small(next_n=4)
    run_op(expected)
    run_op(replace(call, compress_ratio=np.int64(4), next_n=np.int32(4)))
    assert_equal(call, expected)


# ---- Argument errors -----------------------------------------------------------------------------

BOUND = "-1 to 2147483647"
BAD = {
    "compress_ratio below": ("compress_ratio", lambda v: 0, "1 to 1073741823"),
    "compress_ratio above": ("compress_ratio", lambda v: 2**30, "1 to 1073741823"),
    "rows_per_page below": ("rows_per_page", lambda v: 0, "1 to 1073741823"),
    "rows_per_page above": ("rows_per_page", lambda v: 2**30, "1 to 1073741823"),
    "num_tokens below": ("num_tokens", lambda v: -2, BOUND),
    "num_tokens above": ("num_tokens", lambda v: 2**31, BOUND),
    "next_n below": ("next_n", lambda v: -2, BOUND),
    "next_n above": ("next_n", lambda v: 2**31, BOUND),
    "kv_lens dtype": ("kv_lens", lambda t: t.long(), "torch.int32"),
    "kv_lens dims": ("kv_lens", lambda t: t[None], r"\[batch\]"),
    "cu_seq_lens dtype": ("cu_seq_lens", lambda t: t.float(), "torch.int32"),
    "cu_seq_lens": ("cu_seq_lens", lambda t: t[:-1], r"\[batch\+1\] = \[4\]"),
    "cu_outputs dtype": ("cu_outputs", lambda t: t.long(), "torch.int32"),
    "cu_outputs": ("cu_outputs", lambda t: t[1:], r"\[batch\+1\] = \[4\]"),
    "cu_outputs strides": (
        "cu_outputs", lambda t: t.repeat_interleave(2)[::2], "contiguous last dimension"
    ),
    "positions dtype": ("positions", lambda t: t.long(), "torch.int32"),
    "positions dims": ("positions", lambda t: t[:, None], r"\[num_outputs\]"),
    "positions strides": (
        "positions", lambda t: t.repeat_interleave(2)[::2], "contiguous last dimension"
    ),
    "slots dtype": ("slots", lambda t: t.int(), "torch.int64"),
    "slots shape": ("slots", lambda t: t[1:], r"\[num_outputs\] = \[5\]"),
    "slots expanded": ("slots", lambda t: t[:1].expand(t.shape), "contiguous last dimension"),
    "block_table_cache dtype": ("block_table_cache", lambda t: t.long(), "torch.int32"),
    "block_table_cache batch": ("block_table_cache", lambda t: t[:-1], r"\[batch, max_pages\]"),
    "block_table_cache dims": ("block_table_cache", lambda t: t[0], r"\[batch, max_pages\]"),
    "block_table_cache strides": (
        "block_table_cache", lambda t: t.T.contiguous().T, "contiguous last dimension"
    ),
    "token_slots dtype": ("token_slots", lambda t: t.int(), "torch.int64"),
    "token_slots dims": ("token_slots", lambda t: t[:, None], r"\[num_token_slots\]"),
    "token_slots strides": (
        "token_slots", lambda t: t.repeat_interleave(2)[::2], "contiguous last dimension"
    ),
}  # fmt: skip


@ENTRIES
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_argument_is_named_and_nothing_is_written(fault, run):
    name, spoil, accepted = BAD[fault]
    call = small("token_slots" if name == "token_slots" else "block_table", rows_per_page=1)
    before = call.clone()
    spoiled = replace(call, **{name: spoil(getattr(call, name))})
    message = rf"^kvfold\.locate_rows: {name} is .*; accepted: .*{accepted}"
    with pytest.raises(ValueError, match=message):
        run(spoiled)
    assert_equal(call, before)


@ENTRIES
@pytest.mark.parametrize(("both", "word"), [(True, "given"), (False, "None")])
def test_exactly_one_source_of_slots_must_be_given(both, word, run):
    call = small("token_slots")
    table = small().block_table_cache
    call = replace(call, block_table_cache=table) if both else replace(call, token_slots=None)
    before = call.clone()
    message = rf"^kvfold\.locate_rows: block_table_cache and token_slots are both {word}; accepted:"
    with pytest.raises(ValueError, match=message):
        run(call)
    assert_equal(call, before)


@pytest.mark.parametrize("name", ["compress_ratio", "rows_per_page", "num_tokens", "next_n"])
@pytest.mark.parametrize("value", [1.0, "4", torch.tensor(4)], ids=repr)
def test_a_scalar_of_another_type_is_named_and_nothing_is_written(name, value):
    call = small()
    before = call.clone()
    message = rf"^kvfold\.locate_rows: {name} is .*; accepted: a value of type int$"
    with pytest.raises(ValueError, match=message):
        run_op(replace(call, **{name: value}))
    assert_equal(call, before)


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_tensor_or_on_another_device_is_named(name):
    call = with_every("token_slots" if name == "token_slots" else "block_table")
    before = call.clone()
    with pytest.raises(ValueError, match=rf"^kvfold\.locate_rows: {name} is a list"):
        run_op(replace(call, **{name: getattr(call, name).tolist()}))
    with pytest.raises(ValueError, match=r"is on (cpu|meta); accepted: (cpu|meta), where kv_lens"):
        run_op(replace(call, **{name: getattr(call, name).to("meta")}))
    assert_equal(call, before)


@pytest.mark.parametrize(
    ("name", "other"),
    [pair for pair in itertools.combinations(TENSORS, 2) if set(pair) & set(MUTATED)],
    ids=str,
)
def test_memory_that_is_written_and_shared_is_refused(name, other):
    call = with_every("token_slots" if other == "token_slots" else "block_table")
    flat = torch.zeros(256, dtype=torch.uint8)

    def shared(one: str) -> torch.Tensor:
        like = getattr(call, one)
        return flat[: like.nbytes].view(like.dtype).view(like.shape)

    with pytest.raises(ValueError, match="memory of its own: it is written"):
        run_op(replace(call, **{one: shared(one) for one in (name, other)}))
    assert not flat.any()


# ---- Dispatch ------------------------------------------------------------------------------------


@BOTH_SOURCES
def test_all_calls_are_one_problem_and_the_size_is_the_output_rows(source):
    found = check(SPEC, small(source, spare_rows=9))
    assert found.problem == Problem()
    assert (found.size, found.device) == (12, torch.device("cpu"))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("rows", [1, 100, 1_000_000])
def test_the_table_serves_every_number_of_rows(rows, backend):
    variant = load_table().select("locate_rows", backend=backend, rows=rows)
    assert variant.symbol.startswith("locate_rows_w")
    assert str(variant.problem) == "every call"


# ---- torch.library and torch.compile -------------------------------------------------------------


@BOTH_SOURCES
@pytest.mark.parametrize("bounds", [{}, {"num_tokens": 13, "next_n": 4}], ids=str)
def test_opcheck(source, bounds):
    args, kwargs = small(source, **bounds).args_and_kwargs()
    torch.library.opcheck(torch.ops.kvfold.locate_rows.default, args, kwargs)


def test_fake_tensors_need_no_data():
    with torch._subclasses.FakeTensorMode() as mode:
        call = small()
        tensors = {
            name: mode.from_tensor(getattr(call, name))
            for name in TENSORS
            if getattr(call, name) is not None
        }
        assert run_op(replace(call, **tensors)) is None


@BOTH_SOURCES
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_fullgraph(dynamic, source):
    def step(new, kv_lens, cu_seq_lens, cu_outputs, positions, slots, **tensors):
        kvfold.locate_rows(
            kv_lens + new, cu_seq_lens, cu_outputs, positions, slots, 4, 3, next_n=9, **tensors
        )
        return positions + 1

    eager, compiled = (small(source) for _ in range(2))
    new = torch.tensor(4, dtype=torch.int32)

    def run(function, call):
        tensors = {"block_table_cache": call.block_table_cache, "token_slots": call.token_slots}
        return function(new, *call.args()[:5], **tensors)

    want = run(step, eager)
    torch._dynamo.reset()
    got = run(torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager"), compiled)
    assert (want > 0).any()
    assert torch.equal(got, want)
    assert_equal(compiled, eager)


def test_a_call_follows_the_contract_with_grad_and_in_inference_mode():
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert_follows_contract(run_op, small())
