"""Whether a kernel is right: what it writes, against the workload's expectation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.workload import Case, Tolerance, Workload


class WrongResult(RuntimeError):
    """A kernel's result is not what the contract says. The message says where."""


def verify(call: Callable[[Any], None], workload: Workload, case: Case) -> float:
    """Runs call(arguments) on a case and compares every tensor that it writes.

    Returns:
        the largest error of a tensor that has a tolerance.

    Raises:
        WrongResult: a value that is out of tolerance, or written though it is not due.
    """
    expected = workload.expected(case.arguments)
    device = case.arguments.args()[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # all work before the call is done, as prefetching takes it
    call(case.arguments)
    errors = [
        compare(name, getattr(case.arguments, name), want, workload.tolerances[name])
        for name, want in expected.items()
    ]
    return max(errors, default=0.0)


def compare(name: str, got: Tensor, want: Tensor, tolerance: Tolerance) -> float:
    """The largest |got - want|; NaN only equals NaN.

    Raises:
        WrongResult: a value that is out of tolerance.
    """
    wrong, error = outside(got, want, tolerance)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise WrongResult(
            f"{name}{list(place)} is {float(got[place]):.8g}, should be {float(want[place]):.8g};"
            f" {int(wrong.sum())} of {wrong.numel()} values are wrong"
        )
    return float(error.max()) if error.numel() else 0.0


def outside(got: Tensor, want: Tensor, tolerance: Tolerance) -> tuple[Tensor, Tensor]:
    """Which values are out of tolerance, and every |got - want| (0 where both are NaN)."""
    relative = tolerance.relative.get(got.dtype, 0.0)
    want = want.to(got.device)
    same = (got.isnan() & want.isnan()) | (got == want)
    if not tolerance.absolute and not relative:
        return ~same, torch.zeros(())
    error = (got.double() - want.double()).abs().masked_fill_(same, 0)
    close = (error <= tolerance.absolute + relative * want.double().abs()) & error.isfinite()
    return ~(close | same), error
