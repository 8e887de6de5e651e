"""Whether a kernel is right: its results against float64 or, for large cases, the reference."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.bench import cases, oracle
from kvfold.ops.paged_kv_compress import reference

ORACLE_BATCH = 16  # the largest batch that plain Python loops check in reasonable time

# |got - want| <= ATOL + RTOL * |want|. fp32 rounding and the order of sums; half a unit of bf16.
ATOL = 2e-5
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8}


class WrongResult(RuntimeError):
    """A kernel's result is not what the contract says; the message says where."""


def verify(call: Callable[..., None], **problem) -> float:
    """Runs `call(*args)` on `cases.make(**problem)` and compares all that it may write.

    Returns:
        the largest error of an output row, 0 where none is due.

    Raises:
        WrongResult: state that is not exact, an output value out of tolerance, or a row written
            that is not due.
    """
    case = cases.make(**problem)
    twin = cases.make(**problem | {"output_dtype": "fp32"})
    if case.kv_lens.numel() <= ORACLE_BATCH:
        paged_kv, paged_score, output = oracle.expected(*twin.args())
    else:
        reference.paged_kv_compress(*twin.args())
        paged_kv, paged_score, output = twin.paged_kv, twin.paged_score, twin.output
    call(*case.args())
    _require_equal("paged_kv", case.paged_kv, paged_kv)
    _require_equal("paged_score", case.paged_score, paged_score)
    return compare_output(case.output, output)


def settled(call: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """The call, with all work before it done: what prefetch_state=True takes for granted."""

    def after_all_else(*args) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        call(*args)

    return after_all_else


def compare_output(got: Tensor, want: Tensor) -> float:
    """The largest |got - want|, both [rows, head_dim]; NaN only equals NaN.

    Raises:
        WrongResult: a value out of tolerance.
    """
    wrong, error = outside(got, want)
    if wrong.any():
        raise WrongResult(_first(wrong, "output", got, want))
    return float(error.max()) if error.numel() else 0.0


def outside(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Which values of `got` are out of tolerance, and every |got - want| (0 where both are NaN)."""
    want = want.to(got.device, torch.float64)
    same = (got.isnan() & want.isnan()) | (got == want)
    error = (got.double() - want).abs().masked_fill_(same, 0)
    close = (error <= ATOL + RTOL[got.dtype] * want.abs()) & error.isfinite()
    return ~(close | same), error


def _require_equal(name: str, got: Tensor, want: Tensor) -> None:
    want = want.to(got.device)
    wrong = (got != want) & ~(got.isnan() & want.isnan())
    if wrong.any():
        raise WrongResult(_first(wrong, name, got, want))


def _first(wrong: Tensor, name: str, got: Tensor, want: Tensor) -> str:
    place = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{name}{list(place)} is {float(got[place]):.8g}, should be {float(want[place]):.8g};"
        f" {int(wrong.sum())} of {wrong.numel()} values are wrong"
    )
