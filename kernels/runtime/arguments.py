"""Checks the arguments of a call against the op's declaration, without reading the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from kvfold.codegen import Arguments, OpSpec, Problem, TableError, TensorArgument
from kvfold.codegen.fields import Value

DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What torch takes for a scalar of a type without reading a device.
_SCALARS = {
    int: (Integral, torch.SymInt),
    bool: (bool, np.bool_, torch.SymBool),
    float: (Real, torch.SymFloat),
    str: str,
}
MAX_LENGTH = 2**31 - 1  # of a dimension; the kernels count in int


@dataclass(frozen=True)
class Call:
    """What the checked arguments of a call say.

    Attributes:
        dimensions: name -> length.
        problem: what dispatch looks up.
        size: on the op's size axis.
        device: of all tensors.
        constants: for which the op's kernel is compiled, beside its variant.
    """

    dimensions: Mapping[str, int]
    problem: Problem
    size: int
    device: torch.device
    constants: tuple[tuple[str, Value], ...]


def check(spec: OpSpec, arguments: Arguments) -> Call:
    """Checks all that can be checked without reading the device.

    Raises:
        ValueError: naming the argument, what it is, and what is accepted.
    """
    check_tensors(spec, arguments)
    given = _given(arguments)
    for one, _ in given:
        _check_dtype(spec.name, one, arguments)
    dimensions = dimensions_of(spec, arguments)
    problem = _problem(spec, arguments, dimensions)
    for one, tensor in given:
        wanted = [dimension.value(dimensions) for dimension in one.shape]
        if list(tensor.shape) != wanted:
            refuse(
                spec.name,
                one.name,
                f"of shape {list(tensor.shape)}",
                f"{one.shape_text} = {wanted}",
            )
        if max(wanted) > MAX_LENGTH:
            refuse(spec.name, one.name, f"of shape {wanted}", f"dimensions of at most {MAX_LENGTH}")
        _check_strides(spec.name, one, tensor)
    _check_aliases(spec, arguments)
    device = given[0][1].device
    return Call(
        dimensions,
        problem,
        dimensions[spec.size_dimension],
        device,
        constants_of(spec, arguments, dimensions),
    )


def constants_of(
    spec: OpSpec, arguments: Arguments, dimensions: Mapping[str, int]
) -> tuple[tuple[str, Value], ...]:
    """The constants that the kernel of a call is compiled for, by name."""
    if spec.specialise is None:
        return ()
    return tuple(sorted(spec.specialise(arguments, dimensions).items()))


def check_tensors(spec: OpSpec, arguments: Arguments) -> None:
    """Checks that tensors are strided tensors of one device with the declared number of dimensions.

    Raises:
        ValueError: as `check`.
    """
    first = spec.arguments.declared_tensors()[0].name
    for one, tensor in _given(arguments):
        if not isinstance(tensor, Tensor):
            refuse(spec.name, one.name, f"a {type(tensor).__name__}", "a tensor")
        if tensor.layout != torch.strided:
            refuse(spec.name, one.name, f"a tensor of layout {tensor.layout}", "torch.strided")
        device = getattr(arguments, first).device
        if tensor.device != device:
            refuse(spec.name, one.name, f"on {tensor.device}", f"{device}, where {first} is")
        if tensor.dim() != len(one.shape):
            refuse(spec.name, one.name, f"of shape {list(tensor.shape)}", one.shape_text)
    for one in spec.arguments.declared_scalars():
        value = getattr(arguments, one.name)
        if not isinstance(value, _SCALARS[one.type]):
            refuse(spec.name, one.name, repr(value), f"a value of type {one.type.__name__}")
        if one.choices and value not in one.choices:
            refuse(spec.name, one.name, repr(value), ", ".join(map(repr, one.choices)))


def _given(arguments: Arguments) -> list[tuple[TensorArgument, Any]]:
    """The declared tensors and their values, without the optional ones that are absent."""
    declared = arguments.declared_tensors()
    pairs = zip(declared, arguments.tensors(), strict=True)
    return [(one, tensor) for one, tensor in pairs if tensor is not None or not one.optional]


def dimensions_of(spec: OpSpec, arguments: Arguments) -> dict[str, int]:
    """The length of every named dimension: a scalar of that name, or the defining tensor's.

    A dimension whose defining tensor is absent is not there.
    """
    found = {
        one.name: getattr(arguments, one.name)
        for one in spec.arguments.declared_scalars()
        if one.type is int
    }
    for name, (argument, index) in spec.definitions.items():
        tensor = getattr(arguments, argument)
        if tensor is not None:
            found.setdefault(name, tensor.shape[index])
    return found


def refuse(op: str, name: str, value: object, accepted: str) -> NoReturn:
    """Raises the ValueError of an argument."""
    raise ValueError(f"kvfold.{op}: {name} is {value}; accepted: {accepted}")


def _problem(spec: OpSpec, arguments: Arguments, dimensions: Mapping[str, int]) -> Problem:
    dtypes = {one.name: DTYPE_NAMES[tensor.dtype] for one, tensor in _given(arguments)}
    try:
        return spec.problem_of(dimensions, arguments, dtypes)
    except TableError as error:  # a problem field that is not legal
        field, legal = str(error.field), str(error.legal)
        if field in spec.definitions and not hasattr(arguments, field):
            tensor, _ = spec.definitions[field]
            refuse(spec.name, tensor, f"of {field} {error.value}", legal)
        refuse(spec.name, field, error.value, legal)
    except ValueError as error:
        raise ValueError(f"kvfold.{spec.name}: {error}") from None


def _check_dtype(op: str, one: TensorArgument, arguments: Arguments) -> None:
    dtype = getattr(arguments, one.name).dtype
    accepted = [DTYPES[name] for name in one.dtypes]
    if dtype not in accepted:
        refuse(op, one.name, f"of {dtype}", " or ".join(map(str, accepted)))
    if one.like and dtype != (other := getattr(arguments, one.like).dtype):
        refuse(op, one.name, f"of {dtype}", f"{other}, as {one.like}")


def _check_strides(op: str, one: TensorArgument, tensor: Tensor) -> None:
    accepted = f"rows that start at multiples of {one.alignment} bytes"
    if tensor.data_ptr() % one.alignment:
        value = f"at an address % {one.alignment} = {tensor.data_ptr() % one.alignment}"
        refuse(op, one.name, value, accepted)
    shape, strides, size = tensor.shape, tensor.stride(), tensor.element_size()
    if shape[-1] > 1 and strides[-1] != 1 and not one.any_strides:
        refuse(op, one.name, f"of strides {strides}", "a contiguous last dimension")
    outer = [stride for length, stride in zip(shape, strides, strict=True) if length > 1][:-1]
    if any(stride * size % one.alignment for stride in outer):
        refuse(op, one.name, f"of strides {strides}", accepted)
    if one.mutated and _overlaps_itself(tensor):
        refuse(op, one.name, f"of strides {strides}", "rows that do not overlap: it is written")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory."""
    extent = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride < extent:
                return True
            extent += stride * (length - 1)
    return False


def _check_aliases(spec: OpSpec, arguments: Arguments) -> None:
    """Refuses a written tensor that shares memory with another argument."""
    for (one, a), (other, b) in itertools.combinations(_given(arguments), 2):
        if (one.mutated or other.mutated) and _share_memory(a, b):
            if spec.one_pool and spec.one_pool[:2] == (one.name, other.name):
                tables = [getattr(arguments, name) for name in spec.one_pool[2:]]
                if _are_one_memory(a, b) and not _are_one_memory(*tables):
                    continue
            written, second = (one, other) if one.mutated else (other, one)
            refuse(
                spec.name, written.name, f"in the memory of {second.name}",
                "memory of its own: it is written",
            )  # fmt: skip


def _are_one_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same address, shape and strides."""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are known to have bytes in common.

    Views of like strides that interleave have none, as the KV and score halves of one packed pool.
    Views of unlike strides that interleave are not told from those that overlap, and pass.
    """
    if not a.numel() or not b.numel():
        return False
    (begin_a, end_a), (begin_b, end_b) = _range(a), _range(b)
    if end_a <= begin_b or end_b <= begin_a:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    if a.stride() != b.stride() or a.dtype != b.dtype:
        return False
    steps = [
        (stride * a.element_size(), length_a, length_b)
        for stride, length_a, length_b in zip(a.stride(), a.shape, b.shape, strict=True)
        if stride and max(length_a, length_b) > 1
    ]
    return _meet(begin_b - begin_a, sorted(steps, reverse=True))


def _meet(offset: int, steps: list[tuple[int, int, int]]) -> bool:
    """Whether the offset is a sum of strides, each times a difference of two indices.

    Args:
        steps: (stride in bytes, length of a, length of b), longest stride first.
    """
    if not steps:
        return offset == 0
    (stride, length_a, length_b), *rest = steps
    # The shorter strides add up to less than this one, so that two differences are possible.
    near = offset // stride
    return any(
        -length_b < difference < length_a and _meet(offset - difference * stride, rest)
        for difference in (near, near + 1)
    )


def _range(x: Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the one past its last."""
    last = sum(stride * (n - 1) for stride, n in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


@functools.cache
def divider(divisor: int) -> tuple[int, int]:
    """(m, s) such that x // divisor == x * m >> s for every 0 <= x < 2**31; m < 2**32.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift
