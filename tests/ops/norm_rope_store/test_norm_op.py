"""The torch op: its checks, and how it stands with torch.library and torch.compile."""

import inspect
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from norm_calls import (
    FLOATS,
    HEAD_DIMS,
    MUTATED,
    OUTPUTS,
    assert_is,
    assert_stores,
    make,
    run_by_dispatcher,
    run_op,
    run_variant,
    variant_of,
)

import kvfold
import kvfold.torch_ops  # registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import Variant, load_table
from kvfold.ops.norm_rope_store.spec import SPEC, Arguments, Problem, Tuning
from kvfold.runtime import dispatch
from kvfold.runtime.arguments import check

DECLARED = Arguments.declared()
NAMES = tuple(one.name for one in DECLARED)
TENSORS = tuple(one.name for one in Arguments.declared_tensors())
OPTIONAL = ("scale", *OUTPUTS)
REQUIRED = tuple(name for name in TENSORS if name not in OPTIONAL)
KEYWORDS = {one.name: one.default for one in Arguments.declared_scalars() if one.keyword}
KEYWORDS |= dict.fromkeys(OPTIONAL)
ALL = {"latent_out": "fp32", "rows_out": "bf16", "codes_out": "", "scales_out": ""}
ENTRIES = pytest.mark.parametrize("run", [run_op, run_by_dispatcher])


# ---- The function is what the declaration says ---------------------------------------------------


def test_the_signature_is_the_declaration():
    parameters = inspect.signature(kvfold.norm_rope_store).parameters
    assert set(parameters) == set(NAMES)
    assert tuple(parameters)[:9] == NAMES[:9]
    types = {one.name: one.type.__name__ for one in Arguments.declared_scalars()}
    types |= dict.fromkeys(OPTIONAL, "Tensor | None")
    for name, parameter in parameters.items():
        assert parameter.default == KEYWORDS.get(name, inspect.Parameter.empty)
        assert (parameter.kind is parameter.KEYWORD_ONLY) == (name in KEYWORDS)
        assert parameter.annotation == types.get(name, "Tensor")


def test_the_docstring_explains_every_argument_in_order():
    text = inspect.getdoc(kvfold.norm_rope_store)
    explained = text[text.index("Args:") : text.index("Raises:")]
    lines = [line for line in explained.splitlines() if line.startswith("    ")]
    heads = [line.strip().split(": ")[0] for line in lines if line[4] != " "]
    assert heads == list(inspect.signature(kvfold.norm_rope_store).parameters)
    for one in Arguments.declared_tensors():
        line = next(line for line in lines if line.startswith(f"    {one.name}: "))
        assert ("mutated" in line) == one.mutated, one.name


def test_the_schema_declares_what_is_written_and_the_defaults():
    schema = torch.ops.kvfold.norm_rope_store.default._schema
    assert str(schema) == (
        "kvfold::norm_rope_store(Tensor rows, Tensor weight, Tensor rope_table, Tensor positions,"
        " Tensor slots, Tensor(a!) cache, float eps, int rows_per_page, str format, *,"
        ' str rounding="once", bool rotate=False, str prefetch="none", Tensor? scale=None,'
        " Tensor(b!)? latent_out=None, Tensor(c!)? rows_out=None, Tensor(d!)? codes_out=None,"
        " Tensor(e!)? scales_out=None) -> ()"
    )
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == list(MUTATED) == ["cache", *OUTPUTS]
    assert tuple(a.name for a in schema.arguments) == NAMES
    assert {a.name: a.default_value for a in schema.arguments if a.kwarg_only} == KEYWORDS


def test_all_entries_do_the_same():
    call = make(format="fp8_tensor", scale=0.37, outputs=ALL, rotate=True)
    assert_stores(run_op, call)
    assert_stores(run_by_dispatcher, call)
    assert_stores(
        lambda c: kvfold.norm_rope_store(**{name: getattr(c, name) for name in NAMES}), call
    )


@ENTRIES
@pytest.mark.parametrize("count", range(5))
def test_any_optional_outputs_may_be_given(run, count):
    for outputs in itertools.combinations(OUTPUTS, count):
        assert_stores(run, make(outputs=outputs), what=str(outputs))


@pytest.mark.parametrize("function", [kvfold.norm_rope_store, torch.ops.kvfold.norm_rope_store])
def test_an_optional_tensor_may_be_left_out_or_be_none(function):
    call = make()
    args = call.args_and_kwargs()[0]
    function(*args)
    expected = make().expected()
    assert torch.equal(call.cache, expected.cache)
    for name in OPTIONAL:
        call.cache.copy_(make().cache)
        function(*args, **{name: None})
        assert torch.equal(call.cache, expected.cache)


def test_a_missing_an_unknown_and_a_positional_keyword_are_type_errors():
    args, kwargs = make().args_and_kwargs()
    with pytest.raises(TypeError, match="compress_ratio"):
        kvfold.norm_rope_store(*args, **kwargs, compress_ratio=4)
    with pytest.raises(TypeError, match="positional"):
        kvfold.norm_rope_store(*args, "once")
    with pytest.raises(TypeError, match="format"):
        kvfold.norm_rope_store(*args[:-1], **kwargs)


@ENTRIES
@pytest.mark.parametrize("outputs", [(), OUTPUTS])
def test_no_rows(run, outputs):
    assert_stores(run, make(num_rows=0, outputs=outputs, more_pages=2))
    assert_stores(run, make(num_rows=0, outputs=outputs, more_pages=0))


@pytest.mark.parametrize("prefetch", ["none", "metadata", "state"])
def test_prefetch_has_no_effect_on_the_result(prefetch):
    assert_stores(run_op, make(prefetch=prefetch, outputs=ALL))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_has_no_effect(dtype):
    calls = [make(format=name, rotate=True, outputs=ALL) for name in ("fp4_288", "fp8_block128")]
    expected = [call.expected() for call in calls]
    torch.set_default_dtype(dtype)
    try:
        for call in calls:
            run_op(call)
    finally:
        torch.set_default_dtype(torch.float32)
    for call, wanted in zip(calls, expected, strict=True):
        assert_is(call, wanted)


def test_no_gradient_is_recorded():
    call = make(outputs=ALL)
    run_op(replace(call, weight=torch.nn.Parameter(call.weight)))
    assert not any(getattr(call, name).requires_grad for name in MUTATED)


# ---- Argument errors -----------------------------------------------------------------------------


def unaligned(tensor, elements=1):
    """The same values so many elements off a 16-byte boundary."""
    flat = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)[elements:]
    return flat.view(tensor.shape).copy_(tensor)


def strided(tensor, stride):
    """The same values in rows that start so many elements apart."""
    flat = torch.empty(tensor.size(0) * stride, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, (stride, 1)).copy_(tensor)


def columns(tensor):
    """The same values, column by column in memory."""
    return tensor.T.contiguous().T


def expanded(tensor):
    return tensor[:1].expand(tensor.shape)


FLOAT = "torch.bfloat16 or torch.float32"
NAMED = ", ".join(load_table().formats)
BAD = {
    "rows dtype": ("rows", lambda t: t.half(), FLOAT),
    "rows dims": ("rows", lambda t: t[None], r"\[num_rows, head_dim\]"),
    "rows start": ("rows", unaligned, "multiples of 16 bytes"),
    "rows stride": ("rows", lambda t: strided(t, 516), "multiples of 16 bytes"),
    "rows by column": ("rows", columns, "contiguous last dimension"),
    "weight dtype": ("weight", lambda t: t.double(), FLOAT),
    "weight shape": ("weight", lambda t: t[:256], r"\[head_dim\] = \[512\]"),
    "weight start": ("weight", unaligned, "multiples of 16 bytes"),
    "weight stride": ("weight", lambda t: t.repeat_interleave(2)[::2], "contiguous last dimension"),
    "rope_table dtype": ("rope_table", lambda t: t.bfloat16(), "torch.float32"),
    "rope_table dims": ("rope_table", lambda t: t.flatten(1), r"\[max_pos, 2, rope_pairs\]"),
    "rope_table parts": (
        "rope_table", lambda t: t[:, :1], r"\[max_pos, 2, rope_pairs\] = \[33, 2, 32\]",
    ),
    "positions dtype": ("positions", lambda t: t.long(), "torch.int32"),
    "positions shape": ("positions", lambda t: t[:-1], r"\[num_rows\] = \[7\]"),
    "positions dims": ("positions", lambda t: t[:, None], r"\[num_rows\]"),
    "positions stride": (
        "positions", lambda t: t.repeat_interleave(2)[::2], "contiguous last dimension",
    ),
    "slots dtype": ("slots", lambda t: t.int(), "torch.int64"),
    "slots shape": ("slots", lambda t: torch.cat([t, t]), r"\[num_rows\] = \[7\]"),
    "cache dtype": ("cache", lambda t: t.view(torch.int8), "torch.uint8"),
    "cache dims": ("cache", lambda t: t.flatten(), r"\[\w+_pages, page_bytes\]"),
    "cache bytes": ("cache", lambda t: t[:, :-1], f"{4 * 584} or more"),
    "cache start": ("cache", lambda t: unaligned(t, 2), "multiples of 4 bytes"),
    "cache stride": ("cache", lambda t: strided(t, 4 * 584 + 2), "multiples of 4 bytes"),
    "cache by column": ("cache", columns, "contiguous last dimension"),
    "cache expanded": ("cache", expanded, "rows that do not overlap: it is written"),
    "eps below": ("eps", lambda v: -1e-6, "0 or more, finite"),
    "eps infinite": ("eps", lambda v: float("inf"), "0 or more, finite"),
    "eps nan": ("eps", lambda v: float("nan"), "0 or more, finite"),
    "rows_per_page below": ("rows_per_page", lambda v: 0, "1 or more"),
    "format": ("format", lambda v: "fp8", NAMED),
    "rounding": ("rounding", lambda v: "never", "'once', 'before_codes'"),
    "prefetch": ("prefetch", lambda v: "all", "'none', 'metadata', 'state'"),
    "latent_out dtype": ("latent_out", lambda t: t.half(), FLOAT),
    "latent_out rows": ("latent_out", lambda t: t[:-1], r"\[num_rows, head_dim\] = \[7, 512\]"),
    "latent_out start": ("latent_out", unaligned, "multiples of 16 bytes"),
    "latent_out expanded": ("latent_out", expanded, "rows that do not overlap: it is written"),
    "rows_out dtype": ("rows_out", lambda t: t.double(), FLOAT),
    "rows_out columns": ("rows_out", lambda t: t[:, :256], r"\[num_rows, head_dim\] = \[7, 512\]"),
    "rows_out stride": ("rows_out", lambda t: strided(t, 513), "multiples of 16 bytes"),
    "codes_out dtype": ("codes_out", lambda t: t.int(), "torch.uint8"),
    "codes_out less": ("codes_out", lambda t: t[:, :-1], "576"),
    "codes_out more": ("codes_out", lambda t: torch.cat([t, t], 1), "576"),
    "codes_out rows": ("codes_out", lambda t: t[:-1], r"\[num_rows, codes_bytes\] = \[7, 576\]"),
    "codes_out start": ("codes_out", unaligned, "multiples of 4 bytes"),
    "codes_out stride": ("codes_out", lambda t: strided(t, 578), "multiples of 4 bytes"),
    "codes_out expanded": ("codes_out", expanded, "rows that do not overlap: it is written"),
    "scales_out dtype": ("scales_out", lambda t: t.float(), "torch.uint8"),
    "scales_out less": ("scales_out", lambda t: t[:, :7], "8"),
    "scales_out rows": ("scales_out", lambda t: t[:-1], r"\[num_rows, scales_bytes\] = \[7, 8\]"),
    "scales_out by column": ("scales_out", columns, "contiguous last dimension"),
}  # fmt: skip


def assert_refused(run, call, changes, message):
    """Raises ValueError with this message, and writes nothing."""
    before = call.clone()
    with pytest.raises(ValueError, match=rf"^kvfold\.norm_rope_store: {message}"):
        run(replace(call, **changes))
    assert_is(call, before)


@ENTRIES
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_argument_is_named_and_nothing_is_written(fault, run):
    name, spoil, accepted = BAD[fault]
    call = make(outputs=ALL)
    changes = {name: spoil(getattr(call, name))}
    assert_refused(run, call, changes, rf"{name} (is|has) .*; accepted: .*{accepted}")


REFUSED = {
    "rope_table, which leaves no whole block": (
        {"format": "mixed_584"}, {"rope_table": torch.zeros(9, 2, 16)},
        "rows is of head_dim 512; accepted: 32 plus a multiple of 64",
    ),
    "rope_table, which leaves no column": (
        {"head_dim": 128}, {"rope_table": torch.zeros(9, 2, 64)},
        "rows is of head_dim 128; accepted: 128 plus a multiple of 64",
    ),
    "rope_table that is too wide": (
        {}, {"rope_table": torch.zeros(9, 2, 257)}, "rope_dim is 514; accepted: 0 to 512",
    ),
    "codes_from_bf16 with a format that quantises all columns": (
        {"format": "fp8_528"}, {"rounding": "codes_from_bf16"},
        "rounding is 'codes_from_bf16'; accepted: once, before_codes or each_step, as format"
        " fp8_528 has rope quantised",
    ),
    "codes_from_bf16 with the rotation": (
        {"rounding": "codes_from_bf16"}, {"rotate": True},
        "rotate is True; accepted: False with rounding 'codes_from_bf16'",
    ),
    "scale for a format with scales of its own": (
        {}, {"scale": torch.ones(1)},
        "scale is a tensor; accepted: None, as format mixed_584 has scale e8m0",
    ),
    "scale for a format without scales": (
        {"format": "bf16"}, {"scale": torch.ones(1)},
        "scale is a tensor; accepted: None, as format bf16 has scale none",
    ),
    "scale of another dtype": (
        {"format": "fp8_tensor"}, {"scale": torch.ones(1).bfloat16()},
        "scale is of torch.bfloat16; accepted: torch.float32",
    ),
    "scale of another shape": (
        {"format": "fp8_tensor"}, {"scale": torch.ones(2)},
        r"scale is of shape \[2\]; accepted: \[1\] = \[1\]",
    ),
    "scale without a dimension": (
        {"format": "fp8_tensor"}, {"scale": torch.ones(())},
        r"scale is of shape \[\]; accepted: \[1\]",
    ),
    "more rows per page than the cache has": (
        {}, {"rows_per_page": 5}, "cache has 2336 bytes per page; accepted: 2920 or more",
    ),
    "scales_out for a format without scales": (
        {"format": "bf16"}, {"scales_out": torch.zeros(7, 8, dtype=torch.uint8)},
        "scales_out has 8 bytes per row; accepted: 0",
    ),
}  # fmt: skip


@ENTRIES
@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(fault, run):
    given, changes, message = REFUSED[fault]
    assert_refused(run, make(**given), changes, message)


@ENTRIES
@pytest.mark.parametrize("head_dim", [0, 32, 64, 192, 1024])
def test_another_head_dim_is_refused(head_dim, run):
    rows, weight = torch.zeros(7, head_dim), torch.zeros(head_dim)
    changes = {"rows": rows, "weight": weight}
    message = rf"weight has head_dim {head_dim}; accepted: 128, 256, 512"
    assert_refused(run, make(format="bf16"), changes, message)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", "1e-6"), ("eps", torch.tensor(1e-6)), ("eps", None), ("rows_per_page", 4.0),
     ("rows_per_page", torch.tensor(4)), ("format", 3), ("format", None), ("rounding", None),
     ("rounding", b"once"), ("rotate", 1), ("rotate", "no"), ("prefetch", True)],
)  # fmt: skip
def test_a_scalar_of_another_type_is_named_and_nothing_is_written(name, value):
    kind = {one.name: one.type.__name__ for one in Arguments.declared_scalars()}[name]
    message = rf"{name} is .*; accepted: a value of type {kind}$"
    assert_refused(run_op, make(), {name: value}, message)


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_tensor_or_on_another_device_is_named(name):
    call = make(format="fp8_tensor", scale=0.5, outputs=ALL)
    assert_refused(run_op, call, {name: getattr(call, name).tolist()}, f"{name} is a list")
    elsewhere = {name: getattr(call, name).to("meta")}
    message = r"\w+ is on (cpu|meta); accepted: (cpu|meta), where rows is"
    assert_refused(run_op, call, elsewhere, message)
    assert_refused(run_by_dispatcher, call, elsewhere, message)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_tensor_that_is_not_optional_must_be_there(name):
    message = f"{name} is a NoneType; accepted: a tensor"
    assert_refused(run_op, make(), {name: None}, message)


PAIRS = [pair for pair in itertools.product(MUTATED, TENSORS) if pair[0] != pair[1]]


@pytest.mark.parametrize(
    ("name", "other"), [pair for pair in PAIRS if pair != ("scales_out", "scale")]
)
def test_memory_that_is_written_and_shared_is_refused(name, other):
    call = make(outputs=ALL)
    if other == "scale":
        call = make(format="fp8_tensor", scale=0.5, outputs=ALL)
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    shared = {}
    for one in (name, other):
        tensor = getattr(call, one)
        part = memory[: tensor.numel() * tensor.element_size()]
        shared[one] = part.view(tensor.dtype).view(tensor.shape)
    names = rf"({name}|{other})"
    message = rf"{names} is in the memory of {names}; accepted: memory of its own: it is written"
    assert_refused(run_op, call, shared, message)
    assert not memory.any()


def test_numbers_of_numpy_are_numbers():
    call = make(outputs=ALL, eps=float(np.float32(1e-5)))
    expected = call.expected()
    run_op(replace(call, eps=np.float32(1e-5), rows_per_page=np.int64(4)))
    assert_is(call, expected)
    call = make(eps=1.0)
    expected = call.expected()
    run_op(replace(call, eps=1))
    assert_is(call, expected)


def test_a_cache_of_one_page_has_any_page_stride():
    call = make(num_rows=4, more_pages=0)
    page = call.cache.as_strided(call.cache.shape, (3, 1))
    assert_stores(run_op, replace(call, cache=page))


# ---- Dispatch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows_dtype", FLOATS)
def test_the_arguments_tell_the_problem_and_the_size(head_dim, rows_dtype):
    call = make(head_dim=head_dim, rows_dtype=rows_dtype, num_rows=11)
    found = check(SPEC, call)
    assert found.problem == Problem(head_dim=head_dim, rows_dtype=rows_dtype)
    assert (found.size, found.device) == (11, torch.device("cpu"))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows_dtype", FLOATS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_table_has_a_variant_for_every_problem(head_dim, rows_dtype, backend):
    for rows in (1, 64, 2048, 2049, 1 << 20):
        variant = load_table().select(
            SPEC.name, rows=rows, backend=backend, head_dim=head_dim, rows_dtype=rows_dtype
        )
        assert variant.problem == Problem(head_dim=head_dim, rows_dtype=rows_dtype)


def test_run_variant_refuses_a_variant_of_another_problem():
    call = make(rows_dtype="bf16")
    other = variant_of(make(rows_dtype="fp32"), "triton", 1)
    with pytest.raises(ValueError, match=r"rows_dtype fp32; got .*rows_dtype bf16"):
        run_variant(other, call)


def test_run_variant_checks_the_arguments():
    call = make()
    with pytest.raises(ValueError, match="format is 'none'; accepted: bf16, "):
        run_variant(variant_of(call, "cuda", 1), replace(call, format="none"))


def test_the_launch_of_a_variant():
    variant = Variant(
        problem=Problem(head_dim=512, rows_dtype="bf16"), backend="cuda", tuning=Tuning(warps=8)
    )
    assert (variant.launch.threads, variant.launch.shared_bytes) == (256, 0)


# ---- torch.library and torch.compile -------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"outputs": ALL, "rounding": "codes_from_bf16"},
        {"outputs": ["codes_out"], "rotate": True, "format": "fp8_tensor", "scale": 0.5},
        {"outputs": ["latent_out", "scales_out"], "strided": True, "rope_layout": "interleaved"},
    ],
    ids=["plain", "all outputs", "scale", "strided"],
)
def test_opcheck(fields):
    args, kwargs = make(**fields).args_and_kwargs()
    torch.library.opcheck(torch.ops.kvfold.norm_rope_store.default, args, kwargs)


@pytest.mark.parametrize("outputs", [(), OUTPUTS])
def test_fake_tensors_need_no_data(outputs):
    with torch._subclasses.FakeTensorMode() as mode:
        call = make(outputs=outputs)
        tensors = {
            name: mode.from_tensor(getattr(call, name))
            for name in TENSORS
            if getattr(call, name) is not None
        }
        assert run_op(replace(call, **tensors)) is None


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"outputs": ALL}, {"format": "fp8_tensor", "scale": 0.5, "outputs": ["codes_out"]}],
    ids=["plain", "all outputs", "scale"],
)
def test_torch_compile_fullgraph(fields, dynamic):
    def step(factor, kwargs, rows, *rest):
        kvfold.norm_rope_store(rows * factor, *rest, **kwargs)
        return rest[4] + 1  # the cache

    call = make(rotate=True, **fields)
    factor = torch.tensor(0.5, dtype=torch.bfloat16)
    halved = replace(call, rows=call.rows * factor)
    expected = halved.expected()
    args, kwargs = call.args_and_kwargs()
    torch._dynamo.reset()
    program = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = program(factor, kwargs, *args)
    assert torch.equal(got, expected.cache + 1)
    assert_is(replace(call, rows=halved.rows), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_of_a_function_that_makes_and_reads_its_own_outputs(dynamic):
    def step(args):
        codes = torch.zeros(args[0].size(0), 576, dtype=torch.uint8)
        rows = torch.zeros(args[0].size(0), 512)
        kvfold.norm_rope_store(*args, codes_out=codes, rows_out=rows)
        codes += 1
        return codes, rows * 2

    call = make(outputs={"codes_out": "", "rows_out": "fp32"})
    expected = call.expected()
    torch._dynamo.reset()
    program = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    codes, rows = program(call.args_and_kwargs()[0])
    assert torch.equal(codes, expected.codes_out + 1)
    assert torch.equal(rows, expected.rows_out * 2)
    assert torch.equal(call.cache, expected.cache)


def test_a_compiled_function_serves_calls_with_and_without_outputs():
    def step(args, kwargs):
        kvfold.norm_rope_store(*args, **kwargs)

    torch._dynamo.reset()
    program = torch.compile(step, fullgraph=True, backend="aot_eager")
    for outputs in ((), OUTPUTS, ("rows_out",), (), OUTPUTS):
        assert_stores(lambda call: program(*call.args_and_kwargs()), make(outputs=outputs))


# ---- A cache format of the user's own ------------------------------------------------------------

OWN = """
from norm_calls import assert_stores, make, run_op
fields = {"format": "mine", "head_dim": 256, "outputs": ["codes_out", "scales_out"]}
call = make(rounding="codes_from_bf16", **fields)
assert call.codes_out.shape == (7, 192 + 128) and call.scales_out.shape == (7, 32)
assert_stores(run_op, call)
assert_stores(run_op, make(rotate=True, rounding="each_step", **fields))
assert_stores(run_op, make(format="mixed_584"))
print(call.cache.size(1))
"""


def test_a_format_of_ones_own_is_one_row_of_a_table(tmp_path):
    file = tmp_path / "mine.yaml"
    shipped = load_table().path.read_text()
    own = (
        "  mine: {code: fp8_e4m3, block: 32, scale: fp32, floor: 1e-3, ties: down, rope: bf16,"
        " scale_bytes: 32, placement: after_row}\n"
    )
    file.write_text(shipped.replace("cache_formats:\n", f"cache_formats:\n{own}", 1))
    here = Path(__file__).parent
    paths = [here, here.parents[1], os.environ.get("PYTHONPATH", "")]
    environment = {"KVFOLD_CONFIG": str(file), "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", OWN], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4 * (192 + 2 * 64 + 32)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A function that puts a table with these cache formats in force."""

    def put(**formats: str) -> None:
        file = tmp_path / "formats.yaml"
        lines = [f"  {name}: {fields}" for name, fields in formats.items()]
        file.write_text("\n".join(["version: 1", "cache_formats:", *lines, ""]))
        monkeypatch.setenv("KVFOLD_CONFIG", str(file))
        dispatch.reload()

    yield put
    monkeypatch.undo()
    dispatch.reload()


def test_bf16_columns_that_end_within_a_lane_of_the_kernels_are_refused(tables):
    tables(mine="{code: fp8_e4m3, scale: tensor, rope: bf16}")
    assert_stores(run_op, make(format="mine", rope_dim=48))
    call = make(format="mine", rope_dim=48)
    changes = {"rope_table": torch.zeros(9, 2, 12)}
    message = "rope_table has rope_dim 24; accepted: a multiple of 16 for format mine"
    assert_refused(run_op, call, changes, message)


def test_only_the_formats_of_the_table_in_force_are_accepted(tables):
    call = make()
    tables(one="{code: bf16}", other="{code: fp32}")
    assert_refused(run_op, call, {}, "format is 'mixed_584'; accepted: one, other$")
