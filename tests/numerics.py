"""The comparisons of results that all tests use."""

import torch
from torch import Tensor

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Same dtype, shape and bits. All NaNs count as equal."""
    actual, expected = actual.cpu(), expected.cpu()
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    nan = actual.isnan() & expected.isnan()
    bits = BITS[actual.dtype]
    differs = (actual.contiguous().view(bits) != expected.contiguous().view(bits)) & ~nan
    if differs.any():
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ; at {at} "
            f"{actual[at].item()} is not {expected[at].item()}"
        )


def assert_rows_close(actual: Tensor, expected: Tensor, scale: float, name: str) -> None:
    """Rows of weighted sums against float64 ones. NaN and infinities must be equal.

    Accepts an error of 1e-5 * scale, and one rounding to actual's dtype.

    Args:
        scale: the largest absolute value among the terms.
    """
    rounding = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(
        actual.cpu().double(),
        expected.cpu().double(),
        atol=1e-5 * scale,
        rtol=rounding,
        equal_nan=True,
        msg=lambda message: f"{name}: {message}",
    )
