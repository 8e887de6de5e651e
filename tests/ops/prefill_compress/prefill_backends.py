"""The implementations of the two state ops, as functions of a call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from prefill_calls import Call, Run

import kvfold
from kvfold.codegen import TableError, Variant
from kvfold.ops.paged_kv_compress import spec as decode_spec
from kvfold.ops.paged_kv_compress.spec import Arguments as DecodeArguments
from kvfold.ops.prefill_compress import spec
from kvfold.runtime.arguments import check
from kvfold.runtime.torch_op import torch_op

GPU = torch.cuda.is_available()


def triton_variant(call: Call, **tuning) -> Variant:
    """A Triton variant for the call, of as few slices as head_dim allows."""
    head_dim = call.output.size(1)
    tuning = spec.Tuning(**{"reduce_warps": 4, "head_slice": head_dim & -head_dim} | tuning)
    return Variant(problem=call.problem, backend="triton", tuning=tuning)


def cuda_variant(call: Call, **tuning) -> Variant:
    """A CUDA variant for the call. Without tuning, the first that the op proposes and that runs."""
    if tuning:
        return Variant(problem=call.problem, backend="cuda", tuning=spec.Tuning(**tuning))
    for proposed in spec.propose(call.problem, "cuda"):
        with contextlib.suppress(TableError):
            variant = Variant(problem=call.problem, backend="cuda", tuning=proposed)
            variant.check_arch("sm_90")
            return variant
    raise AssertionError(f"no CUDA variant solves {call.problem}")


def run_variant(variant: Variant, call: Call) -> None:
    torch_op("prefill_compress").run_variant(variant, *call.args())


def run_op(call: Call) -> None:
    """By the backend and the variant that dispatch chooses; on the CPU, the reference."""
    args, kwargs = call.args_and_kwargs()
    kvfold.prefill_compress(*args, **kwargs)


@dataclass(frozen=True)
class Backend:
    """An implementation of both ops.

    Attributes:
        device: of its tensors.
        head_dim: columns that it can have for any problem; few, where it can.
        prefill, decode: run a call.
        same_bits: whether a window that decode reduces has the bits that prefill gives it.
    """

    device: str
    head_dim: int
    prefill: Callable[[Call], None]
    decode: Callable[[DecodeArguments], None]
    same_bits: bool

    def run(self, lengths: Sequence[int], **fields) -> Run:
        """A run on its device."""
        return Run(lengths, **{"device": self.device, "head_dim": self.head_dim} | fields)

    def whole_run(self, lengths: Sequence[int], **fields) -> Run:
        """A run whose tokens have been fed in one call, which stores every row."""
        run = self.run(lengths, **fields)
        run.prefill(self.prefill, run.left)
        return run

    @property
    def is_interpreted(self) -> bool:
        """Whether Triton's interpreter runs it, which takes a hundredth of a second per window."""
        return self is BACKENDS["triton"] and self.device == "cpu"


def decode_op(arguments: DecodeArguments) -> None:
    args, kwargs = arguments.args_and_kwargs()
    kvfold.paged_kv_compress(*args, **kwargs)


def _decode_by(backend: str) -> Callable[[DecodeArguments], None]:
    def decode(arguments: DecodeArguments) -> None:
        problem = check(decode_spec.SPEC, arguments).problem
        head_slice = problem.head_dim & -problem.head_dim
        tuning = decode_spec.Tuning(reduce_warps=1, head_slice=head_slice)
        variant = Variant(problem=problem, backend=backend, tuning=tuning)
        torch_op("paged_kv_compress").run_variant(variant, *arguments.args())

    return decode


BACKENDS = {
    "reference": Backend("cpu", 16, run_op, decode_op, same_bits=True),
    "triton": Backend(
        "cuda" if GPU else "cpu",
        16,
        lambda call: run_variant(triton_variant(call), call),
        _decode_by("triton"),
        same_bits=False,  # its decode adds new rows after old ones
    ),
    "cuda": Backend(
        "cuda",
        256,  # an overlapping window needs a warp's columns
        lambda call: run_variant(cuda_variant(call), call),
        _decode_by("cuda"),
        same_bits=True,
    ),
}

_MARKS = {
    "reference": [],
    "triton": [
        pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
        *([pytest.mark.gpu] if GPU else []),
    ],
    "cuda": [pytest.mark.gpu],
}


def every_backend(**values: Callable[[Backend], Sequence]) -> pytest.MarkDecorator:
    """Parametrizes a test by the backend, and by other arguments of which each has values."""
    params = [
        pytest.param(backend, *rest, marks=_MARKS[name], id="-".join([name, *map(_id, rest)]))
        for name, backend in BACKENDS.items()
        for rest in itertools.product(*(of(backend) for of in values.values()))
    ]
    return pytest.mark.parametrize(["backend", *values], params)


def _id(value: object) -> str:
    return "_".join(map(str, value.values())) if isinstance(value, dict) else str(value)
