"""The reference against the oracle."""

import pytest
from prefill_calls import random_call
from prefill_contract import CASES, assert_follows_contract

from kvfold.ops.prefill_compress import reference


@pytest.mark.parametrize("name", CASES)
def test_the_reference_follows_the_contract(name):
    assert_follows_contract(reference.run, CASES[name]())


@pytest.mark.parametrize("seed", range(60))
def test_the_reference_runs_random_calls(seed):
    assert_follows_contract(reference.run, random_call(seed))


@pytest.mark.parametrize("share", [0.03, 0.2, 1])
@pytest.mark.parametrize("seed", range(25))
def test_the_reference_is_safe_for_any_metadata(seed, share):
    assert_follows_contract(reference.run, random_call(seed).scrambled(share, seed))
