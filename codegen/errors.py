"""The one error that tables raise."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_VALUE_LENGTH = 120  # characters of a value or a name that a message shows
MAX_LISTED = 16  # values of a range that a message lists
UNBOUNDED = 2**29  # the last value of a range without a bound that matters is above


class TableError(ValueError):
    """A table, a variant or a request to a table that is not valid.

    Attributes:
        file: path of the table.
        row: the row, as in 'paged_kv_compress row 3 (line 14)'.
        field: name of the field.
        value: the value found.
        legal: the values accepted, in words.

    Attributes that do not apply are None.
    """

    def __init__(
        self,
        what: str,
        *,
        file: Path | None = None,
        row: str | None = None,
        field: str | None = None,
        value: Any = None,
        legal: str | None = None,
    ):
        super().__init__(what)
        self.file, self.row, self.field, self.value, self.legal = file, row, field, value, legal

    def __str__(self) -> str:
        value = None if self.value is None else f"= {shortened(self.value)}"
        field = _cut(self.field or "")  # an unknown name may be as long as a value
        sentence = " ".join(part for part in (field, value, self.args[0]) if part)
        place = [str(part) for part in (self.file, self.row) if part]
        return ": ".join([*place, sentence]) + (f"; legal: {self.legal}" if self.legal else "")


def shortened(value: Any) -> str:
    """The value as JSON, cut to a length that fits in a message."""
    return _cut(json.dumps(value, default=str))


def _cut(text: str) -> str:
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    return f"{text[:MAX_VALUE_LENGTH]}... ({len(text)} characters)"


def in_words(values: Any) -> str:
    """Legal values in words: 'bf16', '1, 2 (integer)', '8 or more in steps of 8 (integer)'.

    Args:
        values: a sequence of values, or what says itself in words, as an Interval.
    """
    if not isinstance(values, Sequence):
        return str(values)
    if not values:
        return "none"
    if isinstance(values, range) and len(values) > MAX_LISTED:
        last = "or more" if values[-1] >= UNBOUNDED else f"to {values[-1]}"
        steps = "" if values.step == 1 else f" in steps of {values.step}"
        return f"{values[0]} {last}{steps} (integer)"
    words = ", ".join(json.dumps(value).strip('"') for value in values)
    return words + (" (integer)" if type(values[0]) is int else "")
