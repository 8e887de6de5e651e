"""StepBatch: keys, uploads and errors, the same on a CPU as on a GPU; graphs: test_batch_gpu.py."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from kvfold.step import StepBatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def batch():
    with StepBatch("cpu", 1 << 16, max_graphs=2) as batch:
        yield batch


@pytest.fixture(params=DEVICES)
def any_batch(request):
    with StepBatch(request.param, 1 << 16) as batch:
        yield batch


def double(inputs):
    return inputs["a"] * 2


def total(uploads):
    return sum(upload["a"].sum() for upload in uploads)


def run_step(batch, *arrays, key="key"):
    """One step with an upload per array; returns the sum of all."""
    with batch.step(key) as step:
        return batch.read(step.run(total, [step.upload({"a": array}) for array in arrays])).item()


def test_a_step_runs_its_body_on_what_was_uploaded(batch):
    for n in range(3):
        with batch.step("key") as step:
            output = step.run(double, step.upload({"a": np.arange(4) + n}))
        assert torch.equal(batch.read(output), 2 * (torch.arange(4) + n))
    assert batch.counters.eager == 3 and batch.counters.replayed == 0
    assert batch.counters.synchronisations == 0


def test_each_upload_of_a_key_keeps_its_address_and_its_values(batch):
    addresses = []
    for n in range(3):
        with batch.step("key") as step:
            first = step.upload({"a": torch.full((2,), n)})
            second = step.upload({"a": torch.full((2,), -n)})
            addresses.append((first["a"].data_ptr(), second["a"].data_ptr()))
            result = step.run(lambda one, other: one["a"] - other["a"], first, second)
        assert result.tolist() == [2 * n, 2 * n]
    assert len(set(addresses)) == 1 and addresses[0][0] != addresses[0][1]


def test_an_upload_that_differs_from_that_of_the_first_step_is_refused(batch):
    with batch.step("key") as step:
        step.upload({"a": torch.zeros(3)})
    for arrays in ({"a": torch.zeros(4)}, {"b": torch.zeros(3)}, {"a": torch.zeros(3).int()}):
        with batch.step("key") as step, pytest.raises(ValueError, match=r"'a'|'b'"):
            step.upload(arrays)
    with batch.step("key") as step:  # the key is unchanged
        assert step.upload({"a": torch.ones(3)})["a"].tolist() == [1, 1, 1]


def test_from_the_third_step_on_uploads_are_those_of_the_second(any_batch):
    ones = torch.ones(3)
    for _ in range(2):
        assert run_step(any_batch, ones, ones) == 6
    for _ in range(2):  # a refusal that leaves the step does not drop the key
        for arrays, message in [
            ([ones], "run after 1 uploads; accepted: 2, as in the second step of the key"),
            ([ones] * 3, "upload 3 of a step; accepted: 2, as in the second step of the key"),
            ([ones, torch.ones(4)], r"array 'a' is of shape \(4,\)"),
            ([ones, ones.double()], r"array 'a' is of .* torch.float64"),
        ]:
            with pytest.raises(ValueError, match=message):
                run_step(any_batch, *arrays)
    assert run_step(any_batch, ones, 2 * ones) == 9


def test_the_second_step_may_make_more_or_fewer_uploads_than_the_first(any_batch):
    ones = torch.ones(3)
    for first, second in ((3, 2), (1, 2)):
        assert run_step(any_batch, *[ones] * first, key=first) == 3 * first
        for _ in range(2):
            assert run_step(any_batch, *[ones] * second, key=first) == 3 * second
        with pytest.raises(ValueError, match="upload 3 of a step; accepted: 2"):
            run_step(any_batch, *[ones] * 3, key=first)


def test_an_upload_that_is_refused_does_not_count(batch):
    for n in range(3):
        with batch.step("key") as step:
            with pytest.raises(ValueError, match="'b'"):
                step.upload({"b": None})
            assert step.run(double, step.upload({"a": torch.full((1,), n)})).item() == 2 * n


def test_a_mapping_may_upload_while_it_is_read(batch):
    class Uploads(Mapping):
        def __len__(self):
            return 1

        def __iter__(self):
            return iter(["a"])

        def __getitem__(self, name):
            self.inner = step.upload({"a": torch.zeros(2)})
            return torch.ones(2)

    for _ in range(3):
        with batch.step("key") as step:
            arrays = Uploads()
            outer = step.upload(arrays)
            assert outer["a"].tolist() == [1, 1] and arrays.inner["a"].tolist() == [0, 0]
            step.run(double, outer)


def test_past_the_limit_the_key_that_was_used_least_recently_is_dropped(batch):
    addresses = {}

    def address(key):
        with batch.step(key) as step:
            return step.upload({"a": torch.zeros(3)})["a"]

    for key in ("x", "y"):
        addresses[key] = address(key)
    assert address("x").data_ptr() == addresses["x"].data_ptr()
    address("z")  # drops y
    assert batch.counters.evicted == 1
    assert address("x").data_ptr() == addresses["x"].data_ptr()
    assert address("y").data_ptr() != addresses["y"].data_ptr()
    assert batch.counters.evicted == 2


def test_the_error_of_a_body_is_raised_and_the_next_step_is_a_first_step(batch):
    def fails(inputs):
        raise KeyError("mine")

    for steps_before in (0, 0, 1):
        for _ in range(steps_before):
            run_step(batch, torch.zeros(2))
        with pytest.raises(KeyError, match="mine"), batch.step("key") as step:
            step.run(fails, step.upload({"a": torch.zeros(2)}))
    with batch.step("key") as step:  # of other shapes than the failed step
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


def test_a_body_cannot_run_its_own_step(batch):
    with batch.step("key") as step, pytest.raises(RuntimeError, match="run: the step has run"):
        step.run(lambda: step.run(lambda: None))


def test_a_step_within_a_step_is_refused(batch):
    with batch.step("outer") as step:
        refused = pytest.raises(RuntimeError, match="'inner' begins within another step")
        with refused, batch.step("inner"):
            pass
        step.run(lambda: None)
    with batch.step("next") as step:
        step.run(lambda: None)


def test_no_step_begins_after_close(any_batch):
    for _ in range(3):
        run_step(any_batch, torch.ones(3))
    any_batch.close()
    any_batch.close()
    for key in ("key", "new"):
        refused = pytest.raises(RuntimeError, match="step: the StepBatch is closed")
        with refused, any_batch.step(key) as step:
            step.run(lambda: None)
    assert any_batch.read(torch.ones(2, device=any_batch.device)).tolist() == [1, 1]


def test_an_open_step_can_neither_upload_nor_run_after_close(any_batch):
    for _ in range(3):
        run_step(any_batch, torch.ones(3))
    with any_batch.step("key") as step:
        inputs = step.upload({"a": torch.ones(3)})
        any_batch.close()
        with pytest.raises(RuntimeError, match="upload: the StepBatch is closed"):
            step.upload({"a": torch.ones(3)})
        with pytest.raises(RuntimeError, match="run: the StepBatch is closed"):
            step.run(total, [inputs])


@pytest.mark.parametrize("graphs", [0, -1, 1.5, "2", True, None])
def test_max_graphs_is_a_positive_integer(graphs):
    with pytest.raises(ValueError, match=f"max_graphs is {graphs!r}; accepted: a positive integer"):
        StepBatch("cpu", 1024, graphs)


def test_numpy_integers_are_integers():
    with StepBatch("cpu", np.int64(1024), np.int32(3)) as batch:
        assert run_step(batch, torch.ones(3)) == 3
        assert (batch.max_graphs, type(batch.max_graphs)) == (3, int)


def test_there_is_no_wait_if_nothing_is_pending(batch):
    batch.synchronize()
    with batch.step("key") as step:
        step.run(lambda: None)
    batch.synchronize()
    assert batch.counters.synchronisations == 0
