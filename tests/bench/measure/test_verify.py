"""verify: passes what is right and names what is wrong."""

from dataclasses import replace

import pytest
import torch

from kvfold.bench.measure.verify import WrongResult, compare, verify
from kvfold.ops.paged_kv_compress import reference
from kvfold.ops.paged_kv_compress.spec import Problem
from kvfold.ops.paged_kv_compress.workload import ORACLE_BATCH, WORKLOAD
from kvfold.workload import EXACT, Case, Tolerance

SMALL = Problem(head_dim=16, compress_ratio=4, kv_dtype="bf16", state_dtype="fp32", next_n=4)
LARGE = ORACLE_BATCH + 24  # compared with the reference, not with the oracle
OUTPUT = WORKLOAD.tolerances["output"]


def case(batch: int, scenario: str = "all-hit", **changes) -> Case:
    options = WORKLOAD.options(page_size=4)
    return WORKLOAD.make(replace(SMALL, **changes), batch, scenario, options, device="cpu")


@pytest.mark.parametrize("batch", [1, 3, LARGE])
@pytest.mark.parametrize("scenario", ["all-hit", "no-hit"])
def test_the_op_is_right(batch, scenario):
    error = verify(reference.run, WORKLOAD, case(batch, scenario))
    assert (error > 0) == (scenario == "all-hit")  # a bf16 output is never exact


@pytest.mark.parametrize("batch", [3, LARGE])
@pytest.mark.parametrize("name", ["paged_kv", "paged_score", "output"])
def test_a_wrong_value_is_named(name, batch):
    def broken(arguments) -> None:
        reference.run(arguments)
        getattr(arguments, name).view(-1)[7] += 0.1

    with pytest.raises(WrongResult, match=rf"{name}\[.*7\] is .*, should be .*; 1 of \d+ values"):
        verify(broken, WORKLOAD, case(batch))


def test_a_row_that_no_window_fills_must_stay_as_it_is():
    def writes_all(arguments) -> None:
        reference.run(arguments)
        arguments.output.nan_to_num_(0)

    with pytest.raises(WrongResult, match="should be nan"):
        verify(writes_all, WORKLOAD, case(3, "no-hit", compress_ratio=8, overlap=False))


def test_nan_and_infinity_only_equal_themselves():
    want = torch.tensor([[torch.nan, torch.inf, 1.0]], dtype=torch.float64)
    assert compare("output", want.float(), want, OUTPUT) == 0
    for got in ([0.0, torch.inf, 1.0], [torch.nan, -torch.inf, 1.0], [torch.nan, torch.inf, 1.1]):
        with pytest.raises(WrongResult):
            compare("output", torch.tensor([got]), want, OUTPUT)


def test_a_tolerance_is_absolute_plus_relative_by_dtype():
    tolerance = Tolerance(0.5, {torch.bfloat16: 0.25})
    want = torch.tensor([8.0], dtype=torch.float64)
    assert compare("x", torch.tensor([10.5]).bfloat16(), want, tolerance) == 2.5
    assert compare("x", torch.tensor([8.5]), want, tolerance) == 0.5  # fp32: no relative part
    for got in (torch.tensor([10.625]).bfloat16(), torch.tensor([8.625])):
        with pytest.raises(WrongResult, match=r"x\[0\] is .*, should be 8; 1 of 1 values"):
            compare("x", got, want, tolerance)


def test_exact_values_have_no_error_at_all():
    want = torch.tensor([1.0, 2.0])
    assert compare("x", want.clone(), want, EXACT) == 0
    with pytest.raises(WrongResult):
        compare("x", torch.nextafter(want, torch.tensor(9.0)), want, EXACT)


def test_an_output_without_rows_has_no_error():
    empty = torch.empty(0, 8)
    assert compare("output", empty, empty.double(), OUTPUT) == 0
