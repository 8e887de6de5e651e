"""The torch op: its checks, and how it stands with torch.library and torch.compile."""

import inspect
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numerics import assert_same_bits
from prefill_backends import run_op, triton_variant
from prefill_calls import MUTATED, Call, make
from prefill_contract import CASES, assert_follows_contract

import kvfold
import kvfold.torch_ops  # registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import Variant
from kvfold.ops.prefill_compress.spec import SPEC, Arguments, Problem
from kvfold.runtime.arguments import check
from kvfold.runtime.torch_op import torch_op

NAMES = tuple(one.name for one in Arguments.declared())
TENSORS = tuple(one.name for one in Arguments.declared_tensors())
KEYWORDS = {one.name: one.default for one in Arguments.declared_scalars() if one.keyword}


def small(**fields) -> Call:
    return make([(6, 9), (3, 0), (1, 4)], **fields)


def by_dispatcher(call: Call) -> None:
    args, kwargs = call.args_and_kwargs()
    torch.ops.kvfold.prefill_compress(*args, **kwargs)


ENTRIES = pytest.mark.parametrize("run", [run_op, by_dispatcher])


def assert_unchanged(call: Call, before: Call) -> None:
    for name in MUTATED:
        assert_same_bits(getattr(call, name), getattr(before, name), name)


# ---- The function is what the declaration says ---------------------------------------------------


def test_the_signature_is_the_declaration():
    parameters = inspect.signature(kvfold.prefill_compress).parameters
    assert tuple(parameters) == NAMES
    types = {one.name: one.type.__name__ for one in Arguments.declared_scalars()}
    for name, parameter in parameters.items():
        assert parameter.default == KEYWORDS.get(name, inspect.Parameter.empty)
        assert (parameter.kind is parameter.KEYWORD_ONLY) == (name in KEYWORDS)
        assert parameter.annotation == types.get(name, "Tensor")


def test_the_docstring_explains_every_argument_in_order():
    text = inspect.getdoc(kvfold.prefill_compress)
    explained = text[text.index("Args:") : text.index("Raises:")]
    lines = [line for line in explained.splitlines() if line.startswith("    ")]
    heads = [line.strip().split(": ")[0] for line in lines if line[4] != " "]
    assert tuple(name for head in heads for name in head.split(", ")) == NAMES
    for one in Arguments.declared_tensors():
        line = next(line for line in lines if line.startswith(f"    {one.name}: "))
        assert ("mutated" in line) == one.mutated, one.name


def test_the_schema_declares_what_is_written_and_the_defaults():
    schema = torch.ops.kvfold.prefill_compress.default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == list(MUTATED)
    assert tuple(a.name for a in schema.arguments) == NAMES
    assert {a.name: a.default_value for a in schema.arguments if a.kwarg_only} == KEYWORDS


def test_all_entries_do_the_same():
    by_function, by_op, by_name = small(), small(), small()
    run_op(by_function)
    by_dispatcher(by_op)
    kvfold.prefill_compress(**{name: getattr(by_name, name) for name in NAMES})
    assert not by_function.output.isnan().any()
    assert_unchanged(by_op, by_function)
    assert_unchanged(by_name, by_function)


def test_a_missing_an_unknown_and_a_positional_keyword_are_type_errors():
    args, kwargs = small().args_and_kwargs()
    with pytest.raises(TypeError, match="next_n"):
        kvfold.prefill_compress(*args, **kwargs, next_n=4)
    with pytest.raises(TypeError, match="positional"):
        kvfold.prefill_compress(*args, "tail")
    with pytest.raises(TypeError, match="compress_ratio"):
        kvfold.prefill_compress(*args[:-1], **kwargs)


@ENTRIES
@pytest.mark.parametrize("name", ["empty_batch", "tokens_of_no_request", "no_output_rows"])
def test_little_or_no_work(name, run):
    assert_follows_contract(run, CASES[name]())


@pytest.mark.parametrize("prefetch", ["none", "metadata", "state"])
def test_prefetch_has_no_effect_on_the_result(prefetch):
    assert_follows_contract(run_op, replace(small(), prefetch=prefetch))


def test_one_block_table_for_both_pools():
    call = small(layout="packed")
    assert_follows_contract(run_op, replace(call, block_table_score=call.block_table_kv))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_has_no_effect(dtype):
    call, expected = small(output_dtype="fp32"), small(output_dtype="fp32")
    run_op(expected)
    torch.set_default_dtype(dtype)
    try:
        run_op(call)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_unchanged(call, expected)


def test_no_gradient_is_recorded():
    call = small()
    run_op(replace(call, ape=torch.nn.Parameter(call.ape)))
    assert not any(getattr(call, name).requires_grad for name in MUTATED)


# ---- Argument errors -----------------------------------------------------------------------------


def unaligned(tensor):
    """The same values one element off a 16-byte boundary."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view(tensor.shape).copy_(tensor)


FLOATS = "torch.bfloat16 or torch.float32"
BAD = {
    "write_state": ("write_state", lambda v: "some", "'all', 'tail'"),
    "max_rollback below": ("max_rollback", lambda v: -1, "0 to 2147483647"),
    "max_rollback above": ("max_rollback", lambda v: 2**31, "0 to 2147483647"),
    "state_period below": ("state_period", lambda v: -1, "0 to 2147483647"),
    "state_period above": ("state_period", lambda v: 2**31, "0 to 2147483647"),
    "prefetch": ("prefetch", lambda v: "all", "'none', 'metadata', 'state'"),
    "work": ("work", lambda v: "both", "'all', 'store', 'reduce'"),
    "compress_ratio": ("compress_ratio", lambda v: 0, "1 or more"),
    "kv_score dtype": ("kv_score", lambda t: t.half(), FLOATS),
    "kv_score width": ("kv_score", lambda t: t[:, :-8].clone(), r"\[num_tokens, 2\*state_dim\]"),
    "kv_score dims": ("kv_score", lambda t: t[None], r"\[num_tokens, 2\*state_dim\]"),
    "kv_score start": ("kv_score", unaligned, "multiples of 16 bytes"),
    "kv_score transposed": ("kv_score", lambda t: t.T.contiguous().T, "contiguous last dimension"),
    "ape dtype": ("ape", lambda t: t.bfloat16(), "torch.float32"),
    "ape shape": ("ape", lambda t: t[:-1], r"\[compress_ratio, state_dim\] = \[4, 32\]"),
    "paged_kv dtype": ("paged_kv", lambda t: t.double(), FLOATS),
    "paged_kv state_dim": ("paged_kv", lambda t: t[..., :24], "32 for an overlapping window"),
    "paged_kv page_size": ("paged_kv", lambda t: t[:, :0], "1 or more"),
    "paged_kv expanded": ("paged_kv", lambda t: t[:1].expand(t.shape), "rows that do not overlap"),
    "paged_score dtype": ("paged_score", lambda t: t.bfloat16(), "torch.float32, as paged_kv"),
    "paged_score shape": ("paged_score", lambda t: t[:-1], r"\[num_pages, page_size, state_dim\]"),
    "block_table_kv dtype": ("block_table_kv", lambda t: t.long(), "torch.int32"),
    "block_table_kv batch": ("block_table_kv", lambda t: t[:-1], r"\[batch, max_pages\]"),
    "block_table_score": ("block_table_score", lambda t: t[:, :-1], r"\[batch, max_pages\]"),
    "output dtype": ("output", lambda t: t.half(), FLOATS),
    "output head_dim": ("output", lambda t: t[:, :12], "8 or more in steps of 8"),
    "kv_lens dtype": ("kv_lens", lambda t: t.float(), "torch.int32"),
    "cu_seq_lens": ("cu_seq_lens", lambda t: t[:-1], r"\[batch\+1\] = \[4\]"),
    "cu_outputs": ("cu_outputs", lambda t: t[:-1], r"\[batch\+1\] = \[4\]"),
}


@ENTRIES
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_argument_is_named_and_nothing_is_written(fault, run):
    name, spoil, accepted = BAD[fault]
    call = small()
    before = call.clone()
    spoiled = replace(call, **{name: spoil(getattr(call, name))})
    message = rf"^kvfold\.prefill_compress: {name} (is|has) .*; accepted: .*{accepted}"
    with pytest.raises(ValueError, match=message):
        run(spoiled)
    assert_unchanged(call, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("write_state", 1), ("max_rollback", 1.0), ("state_period", None), ("prefetch", True),
     ("ape_in_state", "no"), ("work", b"all"), ("compress_ratio", torch.tensor(4))],
)  # fmt: skip
def test_a_scalar_of_another_type_is_named_and_nothing_is_written(name, value):
    call = small()
    before = call.clone()
    kind = {one.name: one.type.__name__ for one in Arguments.declared_scalars()}[name]
    message = rf"^kvfold\.prefill_compress: {name} is .*; accepted: a value of type {kind}$"
    with pytest.raises(ValueError, match=message):
        run_op(replace(call, **{name: value}))
    assert_unchanged(call, before)


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_tensor_or_on_another_device_is_named(name):
    call = small()
    before = call.clone()
    with pytest.raises(ValueError, match=rf"^kvfold\.prefill_compress: {name} is a list"):
        run_op(replace(call, **{name: getattr(call, name).tolist()}))
    with pytest.raises(ValueError, match=r"is on (cpu|meta); accepted: (cpu|meta), where kv_score"):
        run_op(replace(call, **{name: getattr(call, name).to("meta")}))
    assert_unchanged(call, before)


@pytest.mark.parametrize(
    ("name", "other"), list(itertools.combinations(("kv_score", *MUTATED), 2)), ids=str
)
def test_memory_that_is_written_and_shared_is_refused(name, other):
    call = small(head_dim=16, overlap=False, kv_dtype="fp32", page_size=1)
    flat = torch.zeros(2048)
    shared = {one: flat[: getattr(call, one).numel()].view(getattr(call, one).shape)
              for one in (name, other)}  # fmt: skip
    shared["block_table_score"] = call.block_table_kv  # with another table they may be one pool
    with pytest.raises(ValueError, match="memory of its own: it is written"):
        run_op(replace(call, **shared))
    assert not flat.any()


def test_integers_of_numpy_are_integers():
    call, expected = small(write_state="tail"), small(write_state="tail", max_rollback=3)
    run_op(expected)
    run_op(replace(call, compress_ratio=np.int64(4), max_rollback=np.int32(3)))
    assert_unchanged(call, expected)


def test_rows_that_the_table_lacks_are_not_needed_on_the_cpu():
    call = make([(7, 12)], head_dim=40, compress_ratio=7)
    assert_follows_contract(run_op, call)


# ---- Dispatch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ape_in_state", [False, True])
def test_the_arguments_tell_the_problem_and_the_size(overlap, ape_in_state):
    call = make(
        [(7, 20), (4, 3)],
        head_dim=24,
        compress_ratio=5,
        overlap=overlap,
        kv_dtype="fp32",
        state_dtype="bf16",
        ape_in_state=ape_in_state,
    )
    found = check(SPEC, call)
    assert found.problem == Problem(
        head_dim=24,
        compress_ratio=5,
        overlap=overlap,
        kv_dtype="fp32",
        state_dtype="bf16",
        ape_in_state=ape_in_state,
    )
    assert (found.size, found.device) == (23, torch.device("cpu"))


def test_run_variant_refuses_a_variant_of_another_problem():
    call = small()
    variant = triton_variant(call)
    other = Variant(
        problem=replace(variant.problem, ape_in_state=False),
        backend="triton",
        tuning=variant.tuning,
    )
    with pytest.raises(ValueError, match=r"ape_in_state false; got .*ape_in_state true"):
        torch_op("prefill_compress").run_variant(other, *call.args())


# ---- torch.library and torch.compile -------------------------------------------------------------


@pytest.mark.parametrize(("layout", "write_state"), [("split", "all"), ("packed", "tail")])
def test_opcheck(layout, write_state):
    args, kwargs = small(layout=layout, write_state=write_state, state_period=6).args_and_kwargs()
    torch.library.opcheck(torch.ops.kvfold.prefill_compress.default, args, kwargs)


def test_fake_tensors_need_no_data():
    with torch._subclasses.FakeTensorMode() as mode:
        call = small()
        tensors = {name: mode.from_tensor(getattr(call, name)) for name in TENSORS}
        assert run_op(replace(call, **tensors)) is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_fullgraph(dynamic):
    def step(scale, kwargs, kv_score, *rest):
        kvfold.prefill_compress(kv_score * scale, *rest, **kwargs)
        return rest[5] + 1  # the output

    eager, compiled = (small(write_state="tail", max_rollback=2) for _ in range(2))
    scale = torch.tensor(0.5)
    want = step(scale, eager.args_and_kwargs()[1], *eager.args_and_kwargs()[0])
    torch._dynamo.reset()
    program = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = program(scale, compiled.args_and_kwargs()[1], *compiled.args_and_kwargs()[0])
    assert not got.isnan().any()
    assert_same_bits(got, want)
    assert_unchanged(compiled, eager)
