"""Declared arguments: dimensions, the schema of the torch op, and the CUDA parameter struct."""

import struct
from dataclasses import dataclass

import pytest

from kvfold import codegen
from kvfold.codegen import ParamStruct, op_spec, op_specs, scalar, schema, tensor
from kvfold.codegen.arguments import Dimension
from kvfold.codegen.render import params_header
from kvfold.runtime import compiler


@dataclass(frozen=True)
class Arguments(codegen.Arguments):
    """A declaration with every kind of argument."""

    x: object = tensor("rows, 2*width", "bf16, fp32", help="read")
    index: object = tensor("rows+1", "int32", help="read")
    pool: object = tensor(
        "pages, rows, 16", "fp32", mutated=True, strides="page_stride, row_stride", help="written"
    )
    codes: object = tensor("rows, width", "uint8", like="x", mutated=True, help="written")
    count: int = scalar(int, help="required")
    flag: bool = scalar(bool, default=False, help="optional")
    eps: float = scalar(float, default=1e-6, help="optional")
    mode: str = scalar(str, default="once", help="optional")
    when: str = scalar(
        str, default="now", choices=("now", "later"), keyword=True, help="by name alone"
    )
    safe: bool = scalar(bool, default=True, keyword=True, help="by name alone")


@dataclass(frozen=True)
class Options(codegen.Arguments):
    """A declaration with optional tensors, strides in every dimension, and alignment."""

    table: object = tensor(
        "rows, 2, pairs",
        "fp32",
        strides="row_stride, part_stride, pair_stride",
        alignment=4,
        help="read",
    )
    cache: object = tensor("pages, page_bytes", "uint8", mutated=True, alignment=4, help="written")
    eps: float = scalar(float, help="required")
    mode: str = scalar(
        str, default="once", choices=("once", "twice"), keyword=True, help="by name alone"
    )
    scale: object = tensor("1", "fp32", optional=True, alignment=4, help="read")
    rows_out: object = tensor(
        "rows, width", "bf16, fp32", mutated=True, optional=True, help="written"
    )
    codes_out: object = tensor(
        "rows, code_bytes", "uint8", mutated=True, optional=True, help="written"
    )


# ---- dimensions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts", "plain", "value"),
    [
        ("rows", (1, "rows", 0), True, 5),
        ("state_dim", (1, "state_dim", 0), True, 7),
        ("2*rows", (2, "rows", 0), False, 10),
        ("rows+1", (1, "rows", 1), False, 6),
        ("3*rows+2", (3, "rows", 2), False, 17),
        ("16", (0, None, 16), False, 16),
        ("0", (0, None, 0), False, 0),
    ],
)
def test_dimension(text, parts, plain, value):
    dimension = Dimension.parse(text)
    assert (dimension.factor, dimension.name, dimension.offset) == parts
    assert dimension.plain is plain
    assert dimension.value({"rows": 5, "state_dim": 7}) == value
    assert str(dimension) == text


@pytest.mark.parametrize(
    "text",
    ["", "rows-1", "rows*2", "2rows", "2*", "+1", "-1", "rows +1", "Rows", "rows+columns", "1_0"],
)
def test_other_text_is_no_dimension(text):
    with pytest.raises(ValueError, match="is no dimension; accepted: name, 2"):
        Dimension.parse(text)


# ---- declarations --------------------------------------------------------------------------------


def test_declared_arguments_are_in_order():
    assert [one.name for one in Arguments.declared()] == [
        "x", "index", "pool", "codes", "count", "flag", "eps", "mode", "when", "safe",
    ]  # fmt: skip
    tensors, scalars = Arguments.declared_tensors(), Arguments.declared_scalars()
    assert Arguments.declared() == (*tensors, *scalars)
    assert [one.shape_text for one in tensors] == [
        "[rows, 2*width]", "[rows+1]", "[pages, rows, 16]", "[rows, width]",
    ]  # fmt: skip
    assert [one.strides for one in tensors] == [
        ("x_stride",), (), ("page_stride", "row_stride"), ("codes_stride",),
    ]  # fmt: skip
    assert [one.is_float for one in tensors] == [True, False, True, False]
    assert [one.default for one in scalars] == [None, False, 1e-6, "once", "now", True]
    assert [one.name for one in scalars if one.keyword] == ["when", "safe"]
    assert [one.choices for one in scalars] == [(), (), (), (), ("now", "later"), ()]


def test_the_parameter_struct_holds_the_place_of_a_word():
    *_, flag, eps, mode, when, safe = Arguments.declared_scalars()
    assert [when.as_int(word) for word in ("now", "later")] == [0, 1]
    assert [one.as_int(7) for one in (flag, eps, mode, safe)] == [7] * 4


def test_strides_of_a_tensor_of_three_dimensions_must_be_named():
    @dataclass(frozen=True)
    class Unnamed(codegen.Arguments):
        pool: object = tensor("pages, rows, width", "fp32", help="written")

    with pytest.raises(AssertionError, match="name the 2 outer strides of pool"):
        Unnamed.declared()


def test_optional_tensors_are_declared_after_scalars():
    assert [one.name for one in Options.declared()] == [
        "table", "cache", "eps", "mode", "scale", "rows_out", "codes_out",
    ]  # fmt: skip
    tensors = Options.declared_tensors()
    assert [one.name for one in tensors] == ["table", "cache", "scale", "rows_out", "codes_out"]
    assert [one.optional for one in tensors] == [False, False, True, True, True]
    assert [one.mutated for one in tensors] == [False, True, False, True, True]
    assert [one.name for one in Options.declared_scalars()] == ["eps", "mode"]


@pytest.mark.parametrize(
    "fields",
    [
        {"flag": scalar(int, help="a scalar"), "x": tensor("rows", "fp32", help="a tensor")},
        {
            "x": tensor("rows", "fp32", optional=True, help="an optional tensor"),
            "flag": scalar(int, default=1, help="a scalar"),
        },
        {
            "x": tensor("rows", "fp32", optional=True, help="an optional tensor"),
            "y": tensor("rows", "fp32", help="a tensor"),
        },
    ],
)
def test_another_order_of_tensors_and_scalars_is_an_error(fields):
    annotations = dict.fromkeys(fields, object)
    made = type("Mixed", (codegen.Arguments,), {"__annotations__": annotations, **fields})
    Mixed = dataclass(frozen=True, kw_only=True)(made)
    with pytest.raises(AssertionError, match="tensors come first, then scalars, then optional"):
        Mixed.declared()


def test_strides_may_be_named_for_the_last_dimension_too():
    table, cache, scale, rows_out, codes_out = Options.declared_tensors()
    assert table.strides == ("row_stride", "part_stride", "pair_stride")
    assert [one.strides for one in (cache, scale, rows_out, codes_out)] == [
        ("cache_stride",), (), ("rows_out_stride",), ("codes_out_stride",),
    ]  # fmt: skip
    assert [one.any_strides for one in Options.declared_tensors()] == [True] + [False] * 4
    assert not any(one.any_strides for one in Arguments.declared_tensors())


def test_floats_are_aligned_to_16_bytes_and_other_tensors_to_what_is_declared():
    assert [one.alignment for one in Arguments.declared_tensors()] == [16, 1, 16, 1]
    assert [one.alignment for one in Options.declared_tensors()] == [4, 4, 4, 16, 1]


def test_a_call_has_none_for_an_optional_tensor_that_is_absent():
    arguments = Options("table", "cache", 0.5, rows_out="rows")
    assert arguments.args() == ("table", "cache", 0.5, "once", None, "rows", None)
    assert arguments.tensors() == ("table", "cache", None, "rows", None)
    assert arguments.args_and_kwargs() == (
        ("table", "cache", 0.5),
        {"mode": "once", "scale": None, "rows_out": "rows", "codes_out": None},
    )
    assert Options(*arguments.args()) == arguments


def test_args_are_the_values_in_the_ops_order_and_a_call_takes_some_by_name():
    arguments = Arguments("x", "index", "pool", codes="codes", count=3, mode="twice")
    positional = "x", "index", "pool", "codes", 3, False, 1e-6, "twice"
    assert arguments.args() == (*positional, "now", True)
    assert arguments.args_and_kwargs() == (positional, {"when": "now", "safe": True})
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'count'"):
        Arguments("x", "index", "pool", "codes")


def test_schema_declares_what_is_written_and_what_may_be_left_out():
    assert schema("toy", Arguments) == (
        "toy(Tensor x, Tensor index, Tensor(a!) pool, Tensor(b!) codes, int count,"
        ' bool flag=False, float eps=1e-06, str mode="once", *, str when="now",'
        " bool safe=True) -> ()"
    )


def test_schema_of_optional_tensors():
    assert schema("toy", Options) == (
        'toy(Tensor table, Tensor(a!) cache, float eps, *, str mode="once", Tensor? scale=None,'
        " Tensor(b!)? rows_out=None, Tensor(c!)? codes_out=None) -> ()"
    )


def test_optional_tensors_are_passed_by_name_even_if_no_scalar_is():
    @dataclass(frozen=True)
    class Plain(codegen.Arguments):
        x: object = tensor("rows", "fp32", help="read")
        count: int = scalar(int, help="required")
        bias: object = tensor("rows", "fp32", optional=True, help="read")

    assert schema("toy", Plain) == "toy(Tensor x, int count, *, Tensor? bias=None) -> ()"
    assert Plain("x", 3).args_and_kwargs() == (("x", 3), {"bias": None})


def test_torch_reads_optional_tensors_as_they_are_meant():
    torch = pytest.importorskip("torch")
    parsed = torch._C.parse_schema(schema("toy", Options))
    written = [one.name for one in parsed.arguments if one.alias_info and one.alias_info.is_write]
    assert written == ["cache", "rows_out", "codes_out"]
    assert [one.name for one in parsed.arguments] == [one.name for one in Options.declared()]
    by_name = {one.name: one.default_value for one in parsed.arguments if one.kwarg_only}
    assert by_name == {"mode": "once", "scale": None, "rows_out": None, "codes_out": None}
    optional = [one.name for one in parsed.arguments if str(one.type) == "Optional[Tensor]"]
    assert optional == ["scale", "rows_out", "codes_out"]


def test_torch_reads_the_schema_as_it_is_meant():
    torch = pytest.importorskip("torch")
    parsed = torch._C.parse_schema(schema("toy", Arguments))
    written = [one.name for one in parsed.arguments if one.alias_info and one.alias_info.is_write]
    assert written == ["pool", "codes"]
    assert [one.name for one in parsed.arguments] == [one.name for one in Arguments.declared()]
    defaults = [one.default_value for one in parsed.arguments]
    assert defaults[-5:] == [False, 1e-6, "once", "now", True]
    assert [one.name for one in parsed.arguments if one.kwarg_only] == ["when", "safe"]


# ---- the parameter struct ------------------------------------------------------------------------


def test_members_are_pointers_then_strides_then_integers():
    params = ParamStruct.of(Arguments, ("rows", "uint32 share"))
    assert list(params.members()) == [
        ("const void*", "x"),
        ("const int*", "index"),
        ("float*", "pool"),
        ("uint8*", "codes"),
        ("int64", "x_stride"),
        ("int64", "page_stride"),
        ("int64", "row_stride"),
        ("int64", "codes_stride"),
        ("int", "rows"),
        ("uint32", "share"),
    ]
    assert params.size == 4 * 8 + 4 * 8 + 2 * 4
    assert ParamStruct.of(Arguments, ("a", "b", "c")).size == 4 * 8 + 4 * 8 + 3 * 4 + 4


def test_what_follows_the_pointers_is_packed_in_the_order_of_the_members():
    params = ParamStruct.of(Arguments, ("rows", "uint32 share"))
    packed = params.pack([1, -2, 3, 4], {"share": 2**32 - 1, "rows": -7, "other": 0})
    assert struct.unpack("4qiI", packed) == (1, -2, 3, 4, -7, 2**32 - 1)
    with pytest.raises(KeyError, match="share"):
        params.pack([1, 2, 3, 4], {"rows": 1})
    with pytest.raises(struct.error):
        params.pack([1, 2, 3], {"rows": 1, "share": 1})


def test_the_struct_has_a_pointer_and_strides_for_every_optional_tensor_and_floats():
    params = ParamStruct.of(Options, ("rows", "float eps", "uint32 floor_bits", "mode"))
    assert list(params.members()) == [
        ("const float*", "table"),
        ("uint8*", "cache"),
        ("const float*", "scale"),
        ("void*", "rows_out"),
        ("uint8*", "codes_out"),
        ("int64", "row_stride"),
        ("int64", "part_stride"),
        ("int64", "pair_stride"),
        ("int64", "cache_stride"),
        ("int64", "rows_out_stride"),
        ("int64", "codes_out_stride"),
        ("int", "rows"),
        ("float", "eps"),
        ("uint32", "floor_bits"),
        ("int", "mode"),
    ]
    assert params.size == 5 * 8 + 6 * 8 + 4 * 4


def test_a_float_is_packed_as_fp32():
    params = ParamStruct.of(Options, ("rows", "float eps", "float largest"))
    packed = params.pack([0] * 6, {"rows": 1, "eps": 1e-6, "largest": float("inf")})
    rows, eps, largest = struct.unpack("iff", packed[48:])
    assert (rows, largest) == (1, float("inf"))
    assert 0 < abs(eps - 1e-6) < 1e-13  # rounded to fp32


def offsets(params: ParamStruct) -> dict[str, tuple[int, int]]:
    """Member -> offset and size, by the rules of Python's struct module."""
    formats = {"int64": "q", "int": "i", "uint32": "I", "float": "f"}
    found, before = {}, ""
    for kind, name in params.members():
        code = formats.get(kind, "P")
        found[name] = struct.calcsize(f"{before}0{code}"), struct.calcsize(code)
        before += code
    return found


@pytest.mark.skipif(compiler.unavailable() is not None, reason="no CUDA compiler here")
@pytest.mark.parametrize("op", op_specs())
def test_the_struct_that_python_packs_is_the_struct_that_cuda_has(op):
    params = op_spec(op).param_struct
    layout = offsets(params)
    assert len(layout) == len(params.pointers) + len(params.strides) + len(params.numbers)
    # __INTADDR__ is NVRTC's offsetof.
    checks = [
        f"static_assert(__INTADDR__(&((Params*)0)->{name}) == {offset}"
        f' && sizeof(Params::{name}) == {size}, "{name}");'
        for name, (offset, size) in layout.items()
    ]
    checks.append(f"static_assert(sizeof(Params) == {params.size});")

    def compile_checks(lines):
        source = "\n".join(
            [f'#include "{params_header(op)}"', f"using {op}::Params;", *lines,
             'extern "C" __global__ void checks() {}']
        )  # fmt: skip
        return compiler.compile_source("checks", source, compiler.headers_of(source), "sm_90")

    assert compile_checks(checks).cubin
    wrong = checks[-2].replace("== ", "== 1 + ", 1)
    with pytest.raises(compiler.CompileError, match="static assertion failed"):
        compile_checks([*checks[:-2], wrong])
