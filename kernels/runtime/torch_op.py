"""Torch ops made from their declarations: schema, checks, dispatch, and the repeated call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kvfold.codegen import Arguments, OpSpec, TensorArgument, Variant, op_spec, op_specs, schema
from kvfold.runtime import dispatch, internals, repeat
from kvfold.runtime.arguments import check, check_tensors, refuse
from kvfold.runtime.driver import Kernel

_LIBRARY = torch.library.Library("kvfold", "FRAGMENT")
_data_ptr = torch.Tensor.data_ptr


@functools.cache
def torch_op(op: str) -> TorchOp:
    """The op of this name, registered as torch.ops.kvfold.<op>."""
    return TorchOp(op_spec(op))


def register_all() -> None:
    """Registers every op as torch.ops.kvfold.<op>."""
    for op in op_specs():
        torch_op(op)


class TorchOp:
    """An op that is called like the torch op, but quicker where a call repeats an earlier one."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.__doc__ = spec.arguments.__doc__
        _LIBRARY.define(
            schema(spec.name, spec.arguments),
            # The kernels use the strides that they are given; inductor must not change them.
            tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
        )
        torch.library.impl(_LIBRARY, spec.name, "CPU")(self._run)
        torch.library.impl(_LIBRARY, spec.name, "CUDA")(self._run)
        torch.library.register_fake(f"kvfold::{spec.name}", lib=_LIBRARY)(self._fake)
        self._torch_op = getattr(torch.ops.kvfold, spec.name).default

        tensors, scalars = spec.arguments.declared_tensors(), spec.arguments.declared_scalars()
        self._optional = [one.name for one in tensors if one.optional]
        self._required = len(tensors) - len(self._optional)
        self._names = [one.name for one in scalars]
        self._defaults = [one.default for one in scalars]
        self._positional = sum(not one.keyword for one in scalars)
        self._by_name = self._names[self._positional :]
        self._keyed = _covering(spec)
        self._bools = [i for i, one in enumerate(scalars) if one.type is bool]
        # The low bits of an address that must be 0.
        self._low_bits = [(i, x.alignment - 1) for i, x in enumerate(tensors) if x.alignment > 1]
        # Tensors that may be one tensor; a guard takes no tensor twice.
        names = [one.name for one in tensors]
        self._twins = [tuple(map(names.index, pair)) for pair in spec.may_be_same]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Runs the op. Raises ValueError or TableError before anything is launched or written."""
        tensors, scalars = self._split(args, kwargs)
        key = None
        if not torch.compiler.is_compiling():
            if internals.FOUND and internals.unobserved():
                key = self._key("direct", tensors, scalars)
                if key is not None and self._launch_again(key, tensors):
                    return
            check_tensors(self.spec, self._arguments(tensors, scalars))
        by_name = dict(zip(self._by_name, scalars[self._positional :], strict=True))
        by_name.update(zip(self._optional, tensors[self._required :], strict=True))
        self._torch_op(*tensors[: self._required], *scalars[: self._positional], **by_name)
        if key is not None:
            self._remember_direct(key, tensors, scalars)

    def run_variant(self, variant: Variant, *args: Any, **kwargs: Any) -> None:
        """Runs the op with exactly this variant, which the table need not hold.

        Raises:
            ValueError: as the op; or the variant solves another problem.
        """
        tensors, scalars = self._split(args, kwargs)
        arguments = self._arguments(tensors, scalars)
        call = check(self.spec, arguments)
        if call.problem != variant.problem:
            raise ValueError(f"{variant.symbol} solves {variant.problem}; got {call.problem}")
        if call.size:
            with on_device(call.device):
                dispatch.bind(variant, call.device)(arguments)

    # ---- what torch's dispatcher calls -----------------------------------------------------------

    def _run(self, *args: Any, **kwargs: Any) -> None:
        tensors, scalars = self._split(args, kwargs)
        key = self._key("dispatcher", tensors, scalars)
        if key is not None and self._launch_again(key, tensors):
            return
        arguments = self._arguments(tensors, scalars)
        call = check(self.spec, arguments)
        if not call.size:
            return
        launcher = dispatch.launcher(call.problem, call.size, call.device, call.constants)
        with on_device(call.device):
            if isinstance(launcher, Kernel) and key is not None and self._may_remember(tensors):
                launch = launcher.pack(arguments)
                launch(_addresses(tensors))
                repeat.remember(key, self._different(tensors), launch)
            else:
                launcher(arguments)

    def _fake(self, *args: Any, **kwargs: Any) -> None:
        """Reached by fake tensors, and by a call in which any tensor is on the meta device."""
        tensors, _ = self._split(args, kwargs)
        for one, tensor in zip(self.spec.arguments.declared_tensors(), tensors, strict=True):
            if tensor is not None and tensor.device != tensors[0].device:
                first = self.spec.arguments.declared_tensors()[0].name
                accepted = f"{tensors[0].device}, where {first} is"
                refuse(self.spec.name, one.name, f"on {tensor.device}", accepted)

    # ---- repeated calls --------------------------------------------------------------------------

    def _key(self, entry: str, tensors: tuple, scalars: tuple) -> tuple | None:
        """Tells most calls apart at little cost: by scalars and shapes, and by what is current.

        A guard depends on torch's dispatch state, so each entry, direct or through the dispatcher,
        has keys of its own. None for arguments that are no tensors, and for a number where a bool
        belongs: 1 == True, so it would find the call with True.
        """
        for i in self._bools:
            if scalars[i] is not True and scalars[i] is not False:
                return None
        try:
            shapes = tuple([tensors[i].shape for i in self._keyed])
            on_gpu = tensors[0].is_cuda
        except AttributeError:
            return None
        return (
            self,
            entry,
            scalars,
            shapes,
            tuple([tensors[i] is tensors[j] for i, j in self._twins]),
            tuple([tensor is None for tensor in tensors[self._required :]]),
            internals.current_device() if on_gpu else -1,
            torch.is_inference_mode_enabled(),
        )

    def _launch_again(self, key: tuple, tensors: tuple) -> bool:
        """Launches if a call like this one is known; returns whether it did."""
        try:
            launch = repeat.find(key, self._different(tensors))
        except TypeError:  # a scalar without a hash or an argument that is no tensor
            return False
        if launch is None:
            return False
        pointers = _addresses(tensors)
        bits = 0
        for i, low_bits in self._low_bits:
            bits |= pointers[i] & low_bits
        if bits:
            return False  # a view of the same layout whose rows are not aligned
        launch(pointers)
        return True

    def _remember_direct(self, key: tuple, tensors: tuple, scalars: tuple) -> None:
        """Lets calls like this one, which went through the dispatcher, be launched without it."""
        through_dispatcher = self._key("dispatcher", tensors, scalars)
        different = self._different(tensors)
        launch = repeat.launch_of(through_dispatcher, different)
        if launch is not None and self._may_remember(tensors):
            repeat.remember(key, different, launch)

    def _may_remember(self, tensors: tuple) -> bool:
        first = tensors[0]
        here = first.is_cuda and first.device.index == torch.cuda.current_device()
        return here and repeat.can_remember(self._different(tensors))

    def _different(self, tensors: tuple) -> tuple:
        """The tensors that are there, one that is passed as two arguments only once."""
        again = [j for i, j in self._twins if tensors[i] is tensors[j]]
        if not again and len(tensors) == self._required:
            return tensors
        return tuple([x for j, x in enumerate(tensors) if j not in again and x is not None])

    def _arguments(self, tensors: tuple, scalars: tuple) -> Arguments:
        """The arguments of a call."""
        required = self._required
        return self.spec.arguments(*tensors[:required], *scalars, *tensors[required:])

    def _split(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, tuple]:
        """Tensors and scalars of a call, defaults filled in. Raises TypeError like a function."""
        given, count = args[self._required :], self._required
        if len(args) < count or len(given) > len(self._names):
            args = self.spec.arguments(*args, **kwargs).args()
            last = count + len(self._names)
            return args[:count] + args[last:], args[count:last]
        scalars, used = [*given, *self._defaults[len(given) :]], 0
        for index in range(len(given), len(scalars)):
            name = self._names[index]
            if name in kwargs:
                scalars[index] = kwargs[name]
                used += 1
        tensors = args[:count]
        if self._optional:
            tensors += tuple([kwargs.get(name) for name in self._optional])
            used += sum([name in kwargs for name in self._optional])
        if used != len(kwargs) or None in scalars:
            self.spec.arguments(*args, **kwargs)  # raises the TypeError of such a call
        return tensors, tuple(scalars)


def call_with(op: Callable[..., None], arguments: Arguments) -> None:
    """Calls an op with arguments that are put together."""
    args, kwargs = arguments.args_and_kwargs()
    op(*args, **kwargs)


def _addresses(tensors: Sequence) -> list[int]:
    """The tensors' addresses; 0 for one that is absent."""
    return [0 if tensor is None else _data_ptr(tensor) for tensor in tensors]


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a CUDA device torch's current one; does nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _covering(spec: OpSpec) -> Sequence[int]:
    """Indices of few tensors whose shapes tell every dimension of the op that varies.

    Optional tensors do not count; the guard compares their shapes.
    """
    tensors = [x for x in enumerate(spec.arguments.declared_tensors()) if not x[1].optional]
    left = set().union(*(_names(one) for _, one in tensors)) & set(spec.definitions)
    chosen = []
    while left:
        index, one = max(tensors, key=lambda item: len(left & _names(item[1])))
        chosen.append(index)
        left -= _names(one)
    return sorted(chosen)


def _names(one: TensorArgument) -> set[str]:
    return {dimension.name for dimension in one.shape if dimension.name}
