"""Whether tensors are laid out as others were, at the cost of a few hundred nanoseconds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from kvfold.runtime import internals


def layout_guard(*tensors: Tensor) -> Callable[..., bool]:
    """A function that tells whether as many other tensors are laid out like these.

    It compares types, dtypes, devices, shapes and strides, and torch's dispatch state. No tensor
    may be there twice. torch.compile has the same problem at every call of a compiled function; its
    guard compares in C++. Without it, a guard in Python compares layouts alone.
    """
    if internals.FOUND:
        return internals.make_guard(
            *tensors,
            dynamic_dims_sizes=[[*tensor.shape] for tensor in tensors],  # pyright: ignore
            dynamic_dims_strides=[[*tensor.stride()] for tensor in tensors],  # pyright: ignore
        ).check
    expected = layouts(tensors)
    return lambda *others: layouts(others) == expected


def layouts(tensors: Sequence[Tensor]) -> Hashable:
    """The layouts of tensors, to compare."""
    return tuple([(x.shape, x.stride(), x.dtype, x.device) for x in tensors])
