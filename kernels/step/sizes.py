"""Sizes and counts: checked, and rounded up to the alignment of device memory."""

from numbers import Integral

ALIGNMENT = 256  # bytes; that of a torch allocation, so that a view is aligned as well as a tensor


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The least multiple of `alignment` that is at least `nbytes`."""
    return -(-nbytes // alignment) * alignment


def positive_integer(name: str, value: object) -> int:
    """`value` as an int.

    Args:
        name: the argument's name, for the error text.
        value: any integral number, such as an int or a numpy integer.

    Raises:
        ValueError: `value` is not an integral number, is a bool, or is less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; accepted: a positive integer")
    return int(value)
