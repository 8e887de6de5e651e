"""The one place where results are compared."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.bench import oracle

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Same dtype, shape and bits; any NaN is as good as another."""
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


def assert_output_close(actual: Tensor, expected: Tensor, scale: float) -> None:
    """Compressed rows against float64 ones.

    Allows the sums an error of 1e-5 of scale, the largest kv there is, and one rounding to
    actual's dtype; NaN and infinities must be the same ones.
    """
    rounding = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(
        actual.cpu().double(),
        expected.cpu().double(),
        atol=1e-5 * scale,
        rtol=rounding,
        equal_nan=True,
        msg=lambda message: f"output: {message}",
    )


def assert_does_its_job(call: Callable[..., None], problem):
    """Runs call on a copy of problem and holds all that it wrote against the oracle.

    The state must be the same bit by bit, as must output rows that are not to be written and every
    byte outside the tensors. Returns the copy.
    """
    result = problem.clone()
    call(*result.args())
    paged_kv, paged_score, output = oracle.expected(*problem.args())
    assert_same_bits(result.paged_kv, paged_kv, "paged_kv")
    assert_same_bits(result.paged_score, paged_score, "paged_score")
    finite = paged_kv[paged_kv.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    assert_output_close(result.output, output, scale)
    kept = output == problem.output.cpu().double()
    before, after = problem.output.cpu(), result.output.cpu()
    assert_same_bits(after[kept], before[kept], "output not to be written")
    for before, after in zip(problem.outside(), result.outside(), strict=True):
        assert torch.equal(before, after), "bytes outside the mutated tensors changed"
    return result
