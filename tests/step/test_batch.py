"""StepBatch without a GPU: the same code path, every step eager; keys, errors, reading."""

import numpy as np
import pytest
import torch

from kvfold.step import StepBatch


@pytest.fixture
def batch():
    with StepBatch("cpu", 1 << 16, max_graphs=2) as batch:
        yield batch


def double(inputs):
    return inputs["a"] * 2


def test_a_step_runs_its_body_on_what_was_uploaded(batch):
    for n in range(3):
        with batch.step("key") as step:
            output = step.run(double, step.upload({"a": np.arange(4) + n}))
        assert torch.equal(batch.read(output), 2 * (torch.arange(4) + n))
    assert batch.counters.eager == 3 and batch.counters.replayed == 0
    assert batch.counters.synchronisations == 0


def test_uploads_of_a_key_go_to_one_place_and_several_do_not_mix(batch):
    places = []
    for n in range(3):
        with batch.step("key") as step:
            first = step.upload({"a": torch.full((2,), n)})
            second = step.upload({"a": torch.full((2,), -n)})
            places.append((first["a"].data_ptr(), second["a"].data_ptr()))
            result = step.run(lambda one, other: one["a"] - other["a"], first, second)
        assert result.tolist() == [2 * n, 2 * n]
    assert len(set(places)) == 1 and places[0][0] != places[0][1]


def test_an_upload_that_differs_from_the_keys_is_refused(batch):
    with batch.step("key") as step:
        step.upload({"a": torch.zeros(3)})
    for arrays in ({"a": torch.zeros(4)}, {"b": torch.zeros(3)}, {"a": torch.zeros(3).int()}):
        with batch.step("key") as step, pytest.raises(ValueError, match=r"'a'|'b'"):
            step.upload(arrays)
    with batch.step("key") as step:  # and the key is as it was
        assert step.upload({"a": torch.ones(3)})["a"].tolist() == [1, 1, 1]


def test_keys_past_the_limit_go_least_recently_used_first(batch):
    places = {}

    def place(key):
        with batch.step(key) as step:
            return step.upload({"a": torch.zeros(3)})["a"]

    for key in ("x", "y"):
        places[key] = place(key)
    assert place("x").data_ptr() == places["x"].data_ptr()
    place("z")  # y goes
    assert batch.counters.evicted == 1
    assert place("x").data_ptr() == places["x"].data_ptr()
    assert place("y").data_ptr() != places["y"].data_ptr()
    assert batch.counters.evicted == 2


def test_the_bodys_error_is_raised_and_the_next_step_starts_afresh(batch):
    def fails(inputs):
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"), batch.step("key") as step:
            step.run(fails, step.upload({"a": torch.zeros(2)}))
    with batch.step("key") as step:  # of other shapes: nothing is left of the failed ones
        assert step.run(double, step.upload({"a": torch.ones(5)})).sum() == 10


def test_a_step_runs_once_and_not_after_its_end(batch):
    with batch.step("key") as step:
        step.run(lambda: None)
        with pytest.raises(RuntimeError, match="run: the step has run"):
            step.run(lambda: None)
        with pytest.raises(RuntimeError, match="upload: the step has run"):
            step.upload({"a": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="run: the step has ended"):
        step.run(lambda: None)


def test_a_step_within_a_step_is_refused(batch):
    with batch.step("outer") as step:
        refused = pytest.raises(RuntimeError, match="'inner' begins within another step")
        with refused, batch.step("inner"):
            pass
        step.run(lambda: None)
    with batch.step("next") as step:
        step.run(lambda: None)


@pytest.mark.parametrize("graphs", [0, -1, 1.5, "2"])
def test_max_graphs_is_a_positive_integer(graphs):
    with pytest.raises(ValueError, match=f"max_graphs is {graphs!r}"):
        StepBatch("cpu", 1024, graphs)


def test_nothing_pending_is_not_waited_for(batch):
    batch.synchronize()
    with batch.step("key") as step:
        step.run(lambda: None)
    batch.synchronize()
    assert batch.counters.synchronisations == 0
