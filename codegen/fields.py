"""Typed fields: what a table row, a problem or a benchmark option may hold.

A declaration is a frozen dataclass. `integer`, `number`, `flag`, `dtype` and `choice` make its
fields:

    @dataclass(frozen=True, kw_only=True)
    class Problem(FieldSet):
        head_dim: int = integer(range(8, 2**30, 8), symbol="hd{}", help="columns of a row")
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from .errors import TableError, in_words

Value = int | bool | str
Default = Value | float | Callable[[Mapping[str, Any]], Value]

POSITIVE = range(1, 2**30)  # twice the largest fits in the kernels' int
_KEY = "kvfold"


@dataclass(frozen=True)
class Interval:
    """The legal values of a number: least <= value <= most."""

    least: float
    most: float

    def __contains__(self, value: Any) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"{self.least} to {self.most} (number, as 1.0e-4)"


Legal = Sequence[Value] | Interval


@dataclass(frozen=True)
class Field:
    """One field of a declaration.

    Attributes:
        name: of the field, in the table, in Python and in CUDA.
        legal: the accepted values; all have one type.
        help: what the field means, in one phrase.
        symbol: the field's part of a variant's symbol, with {} for the value. Empty: no part.
        symbol_for: the value of a bool that the part stands for; the other value has no part.
        kind: 'int', 'float', 'bool', 'dtype' or 'choice'; the CUDA config struct declares it by
            kind.
        default: the value if it is left out, or a function of the fields before it; None: required.
    """

    name: str
    legal: Legal
    help: str
    symbol: str
    kind: str
    default: Default | None
    symbol_for: bool = True

    @property
    def required(self) -> bool:
        """Whether a row must give the field."""
        return self.default is None

    def check(self, value: Any) -> None:
        """Raises TableError unless the value is legal. The type counts: true is not 1."""
        check_value(self.name, value, self.legal)

    def symbol_part(self, value: Value | float) -> str | None:
        """The field's part of a symbol; None for a bool's other value and for a fixed default."""
        silent = value is not self.symbol_for if self.kind == "bool" else value == self.default
        if not self.symbol or silent:
            return None
        return self.symbol.format(value)


def integer(
    legal: Sequence[int], *, help: str, symbol: str = "", default: Default | None = None
) -> Any:
    """An integer field; legal is a tuple or a range."""
    return _declare("int", legal, help, symbol, default)


def number(legal: Interval, *, help: str, default: Default | None = None) -> Any:
    """A field with a floating-point value; it has no part in a symbol."""
    return _declare("float", legal, help, "", default)


def flag(
    *, help: str, symbol: str = "", symbol_for: bool = True, default: Default | None = None
) -> Any:
    """A bool field."""
    return _declare("bool", (False, True), help, symbol, default, symbol_for)


def dtype(*legal: str, help: str, symbol: str = "{}") -> Any:
    """A field that names a dtype: 'bf16', 'fp32'."""
    return _declare("dtype", legal, help, symbol, None)


def choice(*legal: str, help: str, symbol: str = "{}", default: Default | None = None) -> Any:
    """A field with one of several words as its value."""
    return _declare("choice", legal, help, symbol, default)


def _declare(kind, legal, help, symbol, default, symbol_for=True) -> Any:
    declaration = {
        "kind": kind,
        "legal": legal,
        "help": help,
        "symbol": symbol,
        "default": default,
        "symbol_for": symbol_for,
    }
    if default is None:
        return dataclasses.field(metadata={_KEY: declaration})
    initial = None if callable(default) else default  # None: __post_init__ asks the function
    return dataclasses.field(default=initial, metadata={_KEY: declaration})


@dataclass(frozen=True, kw_only=True)
class FieldSet:
    """Values of declared fields. An instance holds legal values only.

    Raises:
        TableError: a value that is not legal.
    """

    def __post_init__(self):
        for field in self.fields():
            value = getattr(self, field.name)
            if value is None and callable(field.default):
                value = field.default(vars(self))
                object.__setattr__(self, field.name, value)
            field.check(value)

    @classmethod
    @cache
    def fields(cls) -> tuple[Field, ...]:
        """The declared fields, in order."""
        return tuple(
            Field(name=field.name, **field.metadata[_KEY])
            for field in dataclasses.fields(cls)
            if _KEY in field.metadata
        )

    @classmethod
    def field(cls, name: str) -> Field:
        """The declared field of this name. Raises KeyError if there is none."""
        return {field.name: field for field in cls.fields()}[name]

    @classmethod
    def of(cls, values: Mapping[str, Any], what: str = "field") -> Self:
        """Makes an instance from names and values; defaults are filled in.

        Args:
            what: what an error calls a name that is not declared.

        Raises:
            TableError: an unknown name, a missing field or a value that is not legal.
        """
        check_names(values, [field.name for field in cls.fields()], what)
        for field in cls.fields():
            if field.required and field.name not in values:
                raise TableError("is missing", field=field.name, legal=in_words(field.legal))
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """Field name -> value, in the declared order."""
        return {field.name: getattr(self, field.name) for field in self.fields()}

    def given(self) -> dict[str, Any]:
        """The values without those that are the field's default for the other values."""
        values = self.values()
        return {
            field.name: values[field.name]
            for field in self.fields()
            if values[field.name] != _default(field, values)
        }

    def symbol_parts(self) -> list[str]:
        """The parts of a symbol, in the declared order."""
        parts = (field.symbol_part(getattr(self, field.name)) for field in self.fields())
        return [part for part in parts if part is not None]

    def __str__(self) -> str:
        return ", ".join(f"{name} {str(value).lower()}" for name, value in self.values().items())


def _default(field: Field, values: Mapping[str, Any]) -> Value | float | None:
    return field.default(values) if callable(field.default) else field.default


def check_value(name: str, value: Any, legal: Legal) -> None:
    """Raises TableError unless value is one of legal, type included: true is not 1."""
    accepted = float if isinstance(legal, Interval) else type(legal[0])
    if type(value) is not accepted or value not in legal:
        raise TableError("is not accepted", field=name, value=value, legal=in_words(legal))


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises TableError for the first name that is not known, with the nearest that is."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else ""
            raise TableError(f"is no {what}{hint}", field=name, legal=", ".join(known))
