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
ALIGNMENT = 16  # bytes, of the rows of floating-point tensors if nothing else is declared
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
        optional: whether None stands for its absence; it is then passed by name only.
        strides: names of its strides in the CUDA parameter struct: of all but the last one, which
            must be 1, or of all.
        alignment: bytes; its address and its outer strides are multiples of it.
        help: what it holds, in one phrase.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtypes: tuple[str, ...]
    like: str | None
    mutated: bool
    optional: bool
    strides: tuple[str, ...]
    alignment: int
    help: str

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point values."""
        return self.dtypes[0] in FLOATS

    @property
    def any_strides(self) -> bool:
        """Whether the last dimension may have any stride."""
        return len(self.strides) == len(self.shape)

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
    optional: bool = False,
    strides: str | None = None,
    alignment: int | None = None,
) -> Any:
    """A tensor argument; see TensorArgument.

    Args:
        shape: 'num_tokens, 2*state_dim'; see Dimension.
        dtypes: 'bf16, fp32'.
        strides: by default '<argument>_stride' for the only outer stride.
        alignment: by default 16 for floating-point tensors and 1 for others.
    """
    dtype_names = tuple(text.strip() for text in dtypes.split(","))
    declaration = {
        "shape": tuple(Dimension.parse(text.strip()) for text in shape.split(",")),
        "dtypes": dtype_names,
        "like": like,
        "mutated": mutated,
        "optional": optional,
        "strides": None if strides is None else tuple(text.strip() for text in strides.split(",")),
        "alignment": alignment or (ALIGNMENT if dtype_names[0] in FLOATS else 1),
        "help": help,
    }
    metadata = {_KEY: (TensorArgument, declaration)}
    if optional:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(metadata=metadata)


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
    """The arguments of one call of an op, in its order: tensors, scalars, optional tensors."""

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
        order = [
            1 if isinstance(one, ScalarArgument) else 2 if one.optional else 0 for one in found
        ]
        assert order == sorted(order), "tensors come first, then scalars, then optional tensors"
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

    def tensors(self) -> tuple[Any, ...]:
        """The tensors in the op's order; None for one that is absent."""
        return tuple(getattr(self, one.name) for one in self.declared_tensors())

    def args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The values as a call takes them: `op(*args, **kwargs)`."""
        by_name = [one.name for one in self.declared() if _by_name(one)]
        args = self.args()
        return args[: len(args) - len(by_name)], {name: getattr(self, name) for name in by_name}


def _by_name(one: Argument) -> bool:
    """Whether an argument is passed by name only."""
    return one.optional if isinstance(one, TensorArgument) else one.keyword


def schema(op: str, arguments: type[Arguments]) -> str:
    """The schema of a torch op: 'op(Tensor kv_score, Tensor(a!) paged_kv, int next_n) -> ()'."""
    aliases = iter(string.ascii_lowercase)
    parts = []
    for one in arguments.declared():
        if _by_name(one) and "*" not in parts:
            parts.append("*")
        if isinstance(one, TensorArgument):
            kind = f"Tensor({next(aliases)}!)" if one.mutated else "Tensor"
            parts.append(f"{kind}? {one.name}=None" if one.optional else f"{kind} {one.name}")
        else:
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
        numbers: (C type, name) of the 4-byte members.
    """

    pointers: tuple[tuple[str, str], ...]
    strides: tuple[str, ...]
    numbers: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, arguments: type[Arguments], params: Sequence[str]) -> "ParamStruct":
        """The struct of an op.

        Args:
            params: the 4-byte members, 'name' for an int, 'uint32 name' or 'float name'.
        """
        tensors = arguments.declared_tensors()
        return cls(
            pointers=tuple((one.pointer(), one.name) for one in tensors),
            strides=tuple(name for one in tensors for name in one.strides),
            numbers=tuple(_typed(text) for text in params),
        )

    def members(self) -> Iterator[tuple[str, str]]:
        """(C type, name) of every member, in order."""
        yield from self.pointers
        yield from (("int64", name) for name in self.strides)
        yield from self.numbers

    @property
    def size(self) -> int:
        """Bytes of the struct, padding at its end included."""
        return struct.calcsize(f"{len(self.pointers)}P{self._layout}0P")

    @property
    def _layout(self) -> str:
        kinds = {"int": "i", "uint32": "I", "float": "f"}
        return f"{len(self.strides)}q" + "".join(kinds[kind] for kind, _ in self.numbers)

    def pack(self, strides: Sequence[int], numbers: Mapping[str, Any]) -> bytes:
        """What follows the pointers. Raises KeyError for a number that is not given."""
        values = (numbers[name] for _, name in self.numbers)
        return struct.pack(self._layout, *strides, *values)


def _typed(text: str) -> tuple[str, str]:
    kind, _, name = text.rpartition(" ")
    return kind or "int", name
