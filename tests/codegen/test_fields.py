"""Declared fields: legal values, defaults, symbols, and the errors for names and values."""

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest

from kvfold.codegen import FieldSet, TableError, choice, dtype, flag, integer, number
from kvfold.codegen.fields import Interval, check_names, check_value


@dataclass(frozen=True, kw_only=True)
class Shape(FieldSet):
    """A declaration with every kind of field and of default."""

    columns: int = integer(range(8, 65, 8), symbol="c{}", help="columns of a row")
    wide: bool = flag(
        symbol="wide", default=lambda shape: shape["columns"] >= 32, help="whether a row is wide"
    )
    kind: str = dtype("bf16", "fp32", help="of the values")
    layout: str = choice("split", "packed", default="split", help="of the pools")
    warps: int = integer((1, 2, 4), symbol="w{}", default=1, help="warps per row")
    note: int = integer(range(10), default=0, help="in no symbol")
    dense: bool = flag(symbol="sparse", symbol_for=False, default=True, help="told when false")
    floor: float = number(Interval(0.0, 1.0), default=0.5, help="in no symbol either")


def refused(call, *args, **kwargs) -> TableError:
    with pytest.raises(TableError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_fields_are_declared_in_order():
    assert [field.name for field in Shape.fields()] == [
        "columns", "wide", "kind", "layout", "warps", "note", "dense", "floor",
    ]  # fmt: skip
    assert [field.kind for field in Shape.fields()] == [
        "int", "bool", "dtype", "choice", "int", "int", "bool", "float",
    ]  # fmt: skip
    assert [field.name for field in Shape.fields() if field.required] == ["columns", "kind"]
    assert Shape.field("columns").help == "columns of a row"
    assert Shape.field("wide").legal == (False, True)
    with pytest.raises(KeyError, match="rows"):
        Shape.field("rows")


def test_a_default_that_is_a_function_is_asked_with_the_fields_before_it():
    assert Shape(columns=16, kind="bf16").wide is False
    assert Shape(columns=32, kind="bf16").wide is True
    assert Shape(columns=32, kind="bf16", wide=False).wide is False
    assert Shape(columns=16, kind="bf16") == Shape(columns=16, kind="bf16", wide=False, warps=1)


def test_an_instance_has_keyword_arguments_only_and_does_not_change():
    shape = Shape(columns=8, kind="fp32")
    with pytest.raises(TypeError, match="positional"):
        Shape(8, False, "fp32")
    with pytest.raises(FrozenInstanceError):
        shape.columns = 16
    assert {shape: 1}[Shape(columns=8, kind="fp32")] == 1


def test_values_holds_every_field_and_given_those_without_their_default():
    shape = Shape(columns=32, kind="bf16", warps=2)
    assert shape.values() == {
        "columns": 32, "wide": True, "kind": "bf16", "layout": "split", "warps": 2, "note": 0,
        "dense": True, "floor": 0.5,
    }  # fmt: skip
    assert shape.given() == {"columns": 32, "kind": "bf16", "warps": 2}
    narrow = replace(shape, wide=False, warps=1, layout="packed")
    assert narrow.given() == {"columns": 32, "wide": False, "kind": "bf16", "layout": "packed"}
    for one in (shape, narrow):
        assert Shape.of(one.given()) == one


def test_a_symbol_leaves_out_silent_flags_fixed_defaults_and_fields_without_a_part():
    assert Shape(columns=8, kind="bf16").symbol_parts() == ["c8", "bf16"]
    full = Shape(columns=32, kind="fp32", layout="packed", warps=4, note=3, floor=0.25)
    assert full.symbol_parts() == ["c32", "wide", "fp32", "packed", "w4"]
    assert replace(full, dense=False).symbol_parts() == [*full.symbol_parts(), "sparse"]


def test_an_instance_in_words():
    shape = Shape(columns=32, kind="bf16")
    assert str(shape) == (
        "columns 32, wide true, kind bf16, layout split, warps 1, note 0, dense true, floor 0.5"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"columns": 12}, "columns = 12 is not accepted; legal: 8, 16, 24, 32, 40, 48, 56, 64 (in"),
        ({"columns": True}, "columns = true is not accepted"),
        ({"columns": 8.0}, "columns = 8.0 is not accepted"),
        ({"columns": None}, "columns is not accepted"),
        ({"wide": 1}, "wide = 1 is not accepted; legal: false, true"),
        ({"kind": "fp16"}, 'kind = "fp16" is not accepted; legal: bf16, fp32'),
        ({"layout": ["split"]}, 'layout = ["split"] is not accepted; legal: split, packed'),
        ({"floor": 2.0}, "floor = 2.0 is not accepted; legal: 0.0 to 1.0 (number, as 1.0e-4)"),
        ({"floor": 1}, "floor = 1 is not accepted"),
        ({"warps": 3}, "warps = 3 is not accepted; legal: 1, 2, 4 (integer)"),
    ],
)
def test_an_instance_holds_legal_values_only(change, words):
    fields = {"columns": 8, "kind": "bf16"} | change
    for make in (lambda: Shape(**fields), lambda: Shape.of(fields)):
        error = refused(make)
        assert error.field == next(iter(change))
        assert words in str(error)


def test_of_names_missing_and_unknown_fields():
    error = refused(Shape.of, {"columns": 8})
    assert str(error) == "kind is missing; legal: bf16, fp32"
    error = refused(Shape.of, {"columns": 8, "kind": "bf16", "warp": 1}, "tuning field")
    assert str(error) == (
        "warp is no tuning field, did you mean warps?; legal: columns, wide, kind, layout, warps,"
        " note, dense, floor"
    )


def test_the_type_of_a_value_counts():
    check_value("n", 1, (0, 1))
    for value in (True, 1.0, "1", [1], None):
        assert refused(check_value, "n", value, (0, 1)).field == "n"
    check_value("n", 1.0, Interval(0.0, 1.0))
    for value in (1, True, "1.0", 1.1, -0.1, float("nan"), None):
        assert refused(check_value, "n", value, Interval(0.0, 1.0)).field == "n"
    check_value("n", True, (False, True))
    assert refused(check_value, "n", 1, (False, True)).legal == "false, true"


def test_the_first_unknown_name_is_told_with_the_nearest_known_one():
    check_names(["batch", "arch"], ["arch", "batch"], "field")
    error = refused(check_names, ["arch", "bacth", "other"], ["arch", "batch"], "field")
    assert str(error) == "bacth is no field, did you mean batch?; legal: arch, batch"
    assert str(refused(check_names, ["xyz"], ["arch"], "op")) == "xyz is no op; legal: arch"
