"""verify: passes what is right and names what is wrong."""

import pytest
import torch

import kvfold
from kvfold.bench.verify import WrongResult, compare_output, verify

SMALL = {"head_dim": 16, "compress_ratio": 4, "page_size": 4}


@pytest.mark.parametrize("batch", [1, 3, 40])  # 40: against the reference
@pytest.mark.parametrize("scenario", ["all-hit", "no-hit"])
def test_the_op_is_right(batch, scenario):
    error = verify(kvfold.paged_kv_compress, **SMALL, batch=batch, scenario=scenario)
    assert (error > 0) == (scenario == "all-hit")  # a bf16 output is never exact


def broken(where: str):
    """An op whose result is off in one element of one tensor."""

    def call(*args):
        kvfold.paged_kv_compress(*args)
        tensor = {"paged_kv": args[2], "paged_score": args[3], "output": args[6]}[where]
        tensor.view(-1)[7] += 0.1

    return call


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("where", ["paged_kv", "paged_score", "output"])
def test_a_wrong_value_is_named(where, batch):
    with pytest.raises(WrongResult, match=rf"{where}\[.*7\] is .*, should be .*; 1 of \d+ values"):
        verify(broken(where), **SMALL, batch=batch)


def test_a_row_that_is_not_due_must_stay_as_it_is():
    def writes_all(*args):
        kvfold.paged_kv_compress(*args)
        args[6].nan_to_num_(0)

    with pytest.raises(WrongResult, match="should be nan"):
        verify(writes_all, **SMALL | {"compress_ratio": 8}, batch=3, scenario="no-hit")


def test_nan_and_infinity_only_equal_themselves():
    want = torch.tensor([[torch.nan, torch.inf, 1.0]], dtype=torch.float64)
    assert compare_output(want.float(), want) == 0
    for got in ([0.0, torch.inf, 1.0], [torch.nan, -torch.inf, 1.0], [torch.nan, torch.inf, 1.1]):
        with pytest.raises(WrongResult):
            compare_output(torch.tensor([got]), want)
