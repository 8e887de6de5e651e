"""Declared arguments of a torch op: its schema, its shapes and its CUDA parameter struct.

Arguments are declared as a frozen dataclass whose fields are made by `tensor` and `scalar`:

    @dataclass(frozen=True)
    class Arguments(codegen.Arguments):
        kv_score: Tensor = tensor("num_tokens, 2*state_dim", "bf16, fp32", help="new tokens' rows")
        compress_ratio: int = scalar(int, help="tokens per window")
"""

import dataclasses
import re
import string
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_KEY = "kvfold"
ALIGNMENT = 16  # bytes, of the rows of floating-point tensors
FLOATS = ("bf16", "fp32")
_SCALAR_TYPES = {int: "int", bool: "bool", float: "float", str: "str"}
_POINTERS = {"fp32": "float", "int32": "int", "int64": "int64", "uint8": "uint8"}


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor: factor * name + offset, or the number offset without a name."""

    factor: int
    name: str | None
    offset: int

    @classmethod
    def parse(cls, text: str) -> "Dimension":
        """Reads 'name', '2*name', 'name+1' or '16'. Raises ValueError for anything else."""
        if found := re.fullmatch(r"(?:(\d+)\*)?([a-z_]+)(?:\+(\d+))?", text):
            factor, name, offset = found.groups()
            return cls(int(factor or 1), name, int(offset or 0))
        if re.fullmatch(r"\d+", text):
            return cls(0, None, int(text))
        raise ValueError(f"{text!r} is no dimension; accepted: name, 2*name, name+1 or 16")

    @property
    def plain(self) -> bool:
        """Whether the dimension is a name alone, which the first tensor that has it defines."""
        return self.name is not None and (self.factor, self.offset) == (1, 0)

    def value(self, dimensions: Mapping[str, int]) -> int:
        """The dimension's length where its name has the value that `dimensions` gives."""
        return (
            self.offset if self.name is None else self.factor * dimensions[self.name] + self.offset
        )

    def __str__(self) -> str:
        if self.name is None:
            return str(self.offset)
        factor = f"{self.factor}*" if self.factor != 1 else ""
        return f"{factor}{self.name}" + (f"+{self.offset}" if self.offset else "")


@dataclass(frozen=True)
class TensorArgument:
    """A declared tensor.

    Attributes:
        name: of the argument.
        shape: its dimensions.
        dtypes: accepted dtypes, by short name.
        like: name of a tensor before it whose dtype it must have, or None.
        mutated: whether the op writes it.
        strides: names of the outer strides in the CUDA parameter struct.
        help: what it holds, in one phrase.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtypes: tuple[str, ...]
    like: str | None
    mutated: bool
    strides: tuple[str, ...]
    help: str

    @property
    def is_float(self) -> bool:
        """Whether its rows must be 16-byte aligned, as those of floating-point tensors are."""
        return self.dtypes[0] in FLOATS

    @property
    def shape_text(self) -> str:
        """The shape in words: '[num_tokens, 2*state_dim]'."""
        return f"[{', '.join(map(str, self.shape))}]"

    def pointer(self) -> str:
        """The C type of a pointer to it."""
        kind = _POINTERS[self.dtypes[0]] if len(self.dtypes) == 1 else "void"
        return f"{kind}*" if self.mutated else f"const {kind}*"


@dataclass(frozen=True)
class ScalarArgument:
    """A declared scalar.

    Attributes:
        name: of the argument.
        type: its Python type.
        default: None if it is required.
        choices: the accepted words of a str; empty for other types. The CUDA parameter struct
            holds a word's index.
        keyword: whether it is passed by name only.
        help: what it means, in one phrase.
    """

    name: str
    type: type
    default: Any
    choices: tuple[str, ...]
    keyword: bool
    help: str

    def as_int(self, value: Any) -> Any:
        """The value as the CUDA parameter struct holds it."""
        return self.choices.index(value) if self.choices else value


Argument = TensorArgument | ScalarArgument


def tensor(
    shape: str,
    dtypes: str,
    *,
    help: str,
    like: str | None = None,
    mutated: bool = False,
    strides: str | None = None,
) -> Any:
    """A tensor argument.

    Args:
        shape: 'num_tokens, 2*state_dim'; see Dimension.
        dtypes: 'bf16, fp32'.
        like: name of a tensor whose dtype it must have.
        strides: names of the outer strides, by default '<argument>_stride' for the only one.
    """
    declaration = {
        "shape": tuple(Dimension.parse(text.strip()) for text in shape.split(",")),
        "dtypes": tuple(text.strip() for text in dtypes.split(",")),
        "like": like,
        "mutated": mutated,
        "strides": None if strides is None else tuple(text.strip() for text in strides.split(",")),
        "help": help,
    }
    return dataclasses.field(metadata={_KEY: (TensorArgument, declaration)})


def scalar(
    type: type,
    *,
    help: str,
    default: Any = None,
    choices: Sequence[str] = (),
    keyword: bool = False,
) -> Any:
    """A scalar argument: an int, a bool, a float or a str; see ScalarArgument."""
    declaration = {
        "type": type,
        "default": default,
        "choices": tuple(choices),
        "keyword": keyword,
        "help": help,
    }
    metadata = {_KEY: (ScalarArgument, declaration)}
    if default is None:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of an op, in its order."""

    @classmethod
    @cache
    def declared(cls) -> tuple[Argument, ...]:
        """The declared arguments, in order."""
        found = []
        for field in dataclasses.fields(cls):
            kind, declaration = field.metadata[_KEY]
            if kind is TensorArgument and declaration["strides"] is None:
                outer = len(declaration["shape"]) - 1
                assert outer < 2, f"name the {outer} outer strides of {field.name}"
                declaration = declaration | {"strides": (f"{field.name}_stride",) * outer}
            found.append(kind(name=field.name, **declaration))
        return tuple(found)

    @classmethod
    @cache
    def declared_tensors(cls) -> tuple[TensorArgument, ...]:
        """The declared tensors, in order."""
        return tuple(one for one in cls.declared() if isinstance(one, TensorArgument))

    @classmethod
    @cache
    def declared_scalars(cls) -> tuple[ScalarArgument, ...]:
        """The declared scalars, in order."""
        return tuple(one for one in cls.declared() if isinstance(one, ScalarArgument))

    def args(self) -> tuple[Any, ...]:
        """The values in the op's order."""
        return tuple(getattr(self, one.name) for one in self.declared())

    def args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The values as a call takes them: `op(*args, **kwargs)`."""
        by_name = [one.name for one in self.declared_scalars() if one.keyword]
        args = self.args()
        return args[: len(args) - len(by_name)], {name: getattr(self, name) for name in by_name}


def schema(op: str, arguments: type[Arguments]) -> str:
    """The schema of a torch op: 'op(Tensor kv_score, Tensor(a!) paged_kv, int next_n) -> ()'."""
    aliases = iter(string.ascii_lowercase)
    parts = []
    for one in arguments.declared():
        if isinstance(one, TensorArgument):
            parts.append(
                f"Tensor({next(aliases)}!) {one.name}" if one.mutated else f"Tensor {one.name}"
            )
        else:
            if one.keyword and "*" not in parts:
                parts.append("*")
            default = "" if one.default is None else f"={_literal(one.default)}"
            parts.append(f"{_SCALAR_TYPES[one.type]} {one.name}{default}")
    return f"{op}({', '.join(parts)}) -> ()"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


# ---- the CUDA parameter struct -------------------------------------------------------------------


@dataclass(frozen=True)
class ParamStruct:
    """The parameter struct of an op's CUDA kernels.

    Attributes:
        pointers: (C type, name) of the members that are pointers; they come first.
        strides: names of the int64 members, strides in elements.
        integers: (C type, name) of the 4-byte members.
    """

    pointers: tuple[tuple[str, str], ...]
    strides: tuple[str, ...]
    integers: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, arguments: type[Arguments], params: Sequence[str]) -> "ParamStruct":
        """The struct of an op.

        Args:
            params: the 4-byte members, 'name' for an int or 'uint32 name'.
        """
        tensors = arguments.declared_tensors()
        return cls(
            pointers=tuple((one.pointer(), one.name) for one in tensors),
            strides=tuple(name for one in tensors for name in one.strides),
            integers=tuple(_typed(text) for text in params),
        )

    def members(self) -> Iterator[tuple[str, str]]:
        """(C type, name) of every member, in order."""
        yield from self.pointers
        yield from (("int64", name) for name in self.strides)
        yield from self.integers

    @property
    def size(self) -> int:
        """Bytes of the struct, padding at its end included."""
        return struct.calcsize(f"{len(self.pointers)}P{self._layout}0P")

    @property
    def _layout(self) -> str:
        kinds = {"int": "i", "uint32": "I"}
        return f"{len(self.strides)}q" + "".join(kinds[kind] for kind, _ in self.integers)

    def pack(self, strides: Sequence[int], integers: Mapping[str, int]) -> bytes:
        """What follows the pointers. Raises KeyError for an integer that is not given."""
        values = (integers[name] for _, name in self.integers)
        return struct.pack(self._layout, *strides, *values)


def _typed(text: str) -> tuple[str, str]:
    kind, _, name = text.rpartition(" ")
    return kind or "int", name
