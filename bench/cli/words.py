"""What is typed: words of the form FIELD=VALUE, and lists."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kvfold.bench.measure.point import SIZES
from kvfold.codegen import FieldSet
from kvfold.codegen.errors import shortened
from kvfold.codegen.fields import Field, check_names, check_value


def parse_words(
    words: Iterable[str] | None, *declared: type[FieldSet], what: str = "field"
) -> list[dict[str, Any]]:
    """['head_dim=128,512'] -> per declaration {'head_dim': [128, 512]}; one value is no list.

    Raises:
        ValueError: a word of another form, or a name that is not declared.
        TableError: a value that is not accepted.
    """
    fields = {field.name: field for one in declared for field in one.fields()}
    values: dict[str, Any] = {}
    for word in words or ():
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise ValueError(f"{shortened(word)} is not of the form FIELD=VALUE")
        check_names([name], fields, what)
        if name in values:
            raise ValueError(f"{name} is given twice; accepted: once")
        found = list(dict.fromkeys(_value(fields[name], item.strip()) for item in text.split(",")))
        values[name] = found[0] if len(found) == 1 else found
    own = [{field.name for field in one.fields()} for one in declared]
    return [{name: v for name, v in values.items() if name in known} for known in own]


def _value(field: Field, text: str) -> Any:
    value: Any = text
    if field.kind == "int" and re.fullmatch("-?[0-9]{1,18}", text):
        value = int(text)
    if field.kind == "bool" and text.lower() in ("true", "false"):
        value = text.lower() == "true"
    field.check(value)
    return value


def one_value(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values. Raises ValueError if one is a list."""
    for name, value in values.items():
        if isinstance(value, list):
            raise ValueError(f"{name} has {len(value)} values; accepted: one")
    return values


def integers(option: str, text: str | None) -> tuple[int, ...] | None:
    """'1,16,64' -> (1, 16, 64), each once; None for None. Raises ValueError."""
    try:
        found = None if text is None else tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        what = f"{option} is {shortened(text)}"
        raise ValueError(f"{what}; accepted: integers, as in 1,16,64") from None
    for number in found or ():
        check_value(option, number, SIZES)
    return found


def names(text: str | None) -> tuple[str, ...] | None:
    """'all-hit, spread' -> ('all-hit', 'spread'), each once; None for None."""
    return None if text is None else tuple(dict.fromkeys(map(str.strip, text.split(","))))
