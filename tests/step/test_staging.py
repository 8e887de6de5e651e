"""Uploads without a GPU: results, errors, counters and memory; the copies are in the gpu tests."""

import gc
import logging
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from fake_event import Event
from hypothesis import given
from hypothesis import strategies as st

from kvfold.step import staging
from kvfold.step.staging import StagingCounters, StagingPool

DTYPES = (torch.bfloat16, torch.bool, torch.complex64, torch.float64, torch.int32, torch.uint8)


@pytest.fixture
def pool():
    with StagingPool("cpu", 1 << 16) as pool:
        yield pool


def read_only(array):
    array.flags.writeable = False
    return array


def some_arrays() -> dict:
    return {
        "ids": torch.arange(7, dtype=torch.int32),
        "none": torch.empty(0, 3, dtype=torch.float64),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "mask": torch.tensor([[True], [False]]),
        "columns": torch.arange(12.0).view(3, 4).t(),
        "numpy": np.arange(5, dtype=np.int64),
    }


def assert_equal(results, arrays):
    assert list(results) == list(arrays)
    for name, array in arrays.items():
        expected = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        assert results[name].dtype == expected.dtype
        assert results[name].shape == expected.shape
        assert results[name].is_contiguous()
        assert torch.equal(results[name].cpu(), expected)


def test_upload_gives_the_arrays_in_one_aligned_allocation(pool):
    results = pool.upload(some_arrays())
    assert_equal(results, some_arrays())
    storages = {result.untyped_storage().data_ptr() for result in results.values()}
    assert len(storages) == 1
    for result in results.values():
        assert result.storage_offset() * result.itemsize % 256 == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6
    ),
    st.integers(0, 2**32),
)
def test_any_arrays_come_out_as_they_went_in(kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    arrays = {
        str(i): torch.randint(0, 100, shape, generator=generator).to(dtype)
        for i, (dtype, shape) in enumerate(kinds)
    }
    with StagingPool("cpu", 1 << 14) as pool:
        results = pool.upload(arrays)
        assert_equal(results, arrays)
        changed = {name: array.eq(0).to(array.dtype) for name, array in arrays.items()}
        pool.upload_into(results, changed)
        assert_equal(results, changed)


@pytest.mark.parametrize(
    "array",
    [
        read_only(np.arange(6, dtype=np.float32)),
        np.arange(6)[::-1],
        np.arange(6).reshape(2, 3).T,
        np.broadcast_to(np.int32(3), (2, 2)),
        np.array(1.5),
        np.empty((3, 0), np.uint8),
    ],
    ids=["read-only", "reversed", "transposed", "broadcast", "0-d", "empty"],
)
def test_numpy_arrays_of_any_kind(pool, array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pool.upload({"x": array})["x"]
    assert result.shape == array.shape
    assert np.array_equal(result.numpy(), array)


@pytest.mark.parametrize("arrays", [{}, {"x": torch.empty(0)}, {"x": torch.empty(3, 0, 2)}])
def test_nothing_to_copy(pool, arrays):
    results = pool.upload(arrays)
    assert_equal(results, arrays)
    pool.upload_into(results, arrays)
    assert pool.counters == StagingCounters(2, 0, 0, 0, 0, 0)


def test_results_are_neither_the_arrays_nor_the_ring(pool):
    array = torch.arange(4)
    first = pool.upload({"x": array})["x"]
    array += 10
    second = pool.upload({"x": array})["x"]
    assert first.tolist() == [0, 1, 2, 3]
    assert second.tolist() == [10, 11, 12, 13]
    first += 1
    assert array.tolist() == second.tolist()


def test_gradients_leave_no_trace(pool):
    ones = torch.ones(3, requires_grad=True)
    result = pool.upload({"x": ones})["x"]
    assert not result.requires_grad
    for into in (torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)[:3]):
        is_leaf = into.is_leaf
        pool.upload_into({"x": into}, {"x": ones})
        assert into.tolist() == [1, 1, 1]
        assert into.is_leaf == is_leaf


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_pool_made_in_inference_mode_works_outside_and_the_other_way_round(dtype):
    ones, zeros = torch.ones(3, dtype=dtype), {"x": torch.zeros(3, dtype=dtype)}
    with torch.inference_mode():
        pools = [StagingPool("cpu", 1024)]
        inside = [pools[0].upload({"x": ones})["x"], torch.ones(4, dtype=dtype)[:3]]
    pools.append(StagingPool("cpu", 1024))
    outside = [pools[0].upload({"x": ones})["x"], torch.ones(4, dtype=dtype)[:3]]
    for pool in pools:
        for mode in (True, False):
            for tensor in inside + outside:
                with torch.inference_mode():
                    tensor.fill_(1)
                with torch.inference_mode(mode):
                    pool.upload_into({"x": tensor}, zeros)
                assert tensor.tolist() == [0, 0, 0]


def test_refreshing_what_was_staged_is_one_copy(pool):
    staged = pool.stage(some_arrays())
    places = {name: tensor.data_ptr() for name, tensor in staged.tensors.items()}
    changed = {name: torch.ones_like(tensor) for name, tensor in staged.tensors.items()}
    staged.refresh(dict(reversed(changed.items())))
    assert_equal(staged.tensors, changed)
    assert {name: tensor.data_ptr() for name, tensor in staged.tensors.items()} == places
    assert pool.counters.copies == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": torch.zeros(3)}, "arrays are 'a'; accepted: 'a', 'b'"),
        ({"a": torch.zeros(3), "c": torch.zeros(2)}, "arrays are 'a', 'c'; accepted: 'a', 'b'"),
        ({"a": torch.zeros(4), "b": torch.zeros(2)}, r"array 'a' is of shape \(4,\)"),
        ({"a": torch.zeros(3), "b": torch.zeros(2).int()}, r"array 'b' is of .* torch.int32"),
        ({"a": torch.zeros(3), "b": [0, 0]}, "array 'b' is of type list"),
    ],
)
def test_what_was_staged_is_not_refreshed_from_other_arrays(pool, arrays, message):
    staged = pool.stage({"a": torch.ones(3), "b": torch.ones(2)})
    before = pool.counters
    with pytest.raises(ValueError, match=message):
        staged.refresh(arrays)
    assert pool.counters == before
    assert all((tensor == 1).all() for tensor in staged.tensors.values())


def lone_tensors(results):
    return {name: result.clone() for name, result in results.items()}


def all_but_the_last(results):
    return dict(list(results.items())[:-1])


def all_but_the_first(results):
    return dict(list(results.items())[1:])


def another_order(results):
    return dict(reversed(results.items()))


@pytest.mark.parametrize(
    "choose", [lone_tensors, all_but_the_last, all_but_the_first, another_order]
)
def test_refreshing_other_tensors_is_a_copy_each_and_touches_nothing_else(pool, choose):
    arrays = {name: torch.full((3,), i) for i, name in enumerate("abc")}
    results = pool.upload(arrays)
    chosen = choose(results)
    pool.upload_into(chosen, {name: arrays[name] + 10 for name in chosen})
    assert pool.counters.copies == 1 + len(chosen)
    assert_equal(chosen, {name: arrays[name] + 10 for name in chosen})
    for name in set(arrays) - set(chosen):
        assert torch.equal(results[name], arrays[name])


def test_tensors_of_two_uploads_are_a_copy_each(pool):
    arrays = {name: torch.full((3,), i) for i, name in enumerate("ab")}
    first, second = pool.upload(arrays), pool.upload(arrays)
    pool.upload_into({"a": first["a"], "b": second["b"]}, {"a": arrays["b"], "b": arrays["a"]})
    assert pool.counters.copies == 4
    assert_equal(first, {"a": arrays["b"], "b": arrays["b"]})
    assert_equal(second, {"a": arrays["a"], "b": arrays["a"]})


def test_a_storage_with_something_else_in_the_gaps_is_not_overwritten(pool):
    storage = torch.zeros(36, dtype=torch.int64)  # as much as upload() would take
    storage[5] = 7
    pool.upload_into(
        {"a": storage[:4], "b": storage[32:]},
        {"a": torch.ones(4, dtype=torch.int64), "b": torch.ones(4, dtype=torch.int64)},
    )
    assert storage[5] == 7
    assert storage.sum() == 15


X = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("destinations", "arrays", "message"),
    [
        ({}, {"x": X}, "array 'x' has no destination; accepted: 'good'"),
        ({"x": X, "y": X}, {"x": X}, "destination 'y' has no array; accepted: 'good', 'x'"),
        ({"x": X[:1]}, {"x": X}, r"'x' is of shape \(1, 3\); accepted: \(2, 3\)"),
        ({"x": X.long()}, {"x": X}, r"'x' is of dtype torch.int64; accepted: torch.int32"),
        ({"x": X.to("meta")}, {"x": X}, "destination 'x' is on 'meta'; accepted: 'cpu'"),
        ({"x": X.t()}, {"x": X.t()}, r"'x' is of stride \(1, 3\); accepted: contiguous"),
        ({"x": X.numpy()}, {"x": X}, "'x' is of type ndarray; accepted: tensors"),
        ({"x": X}, {"x": X.to("meta")}, "array 'x' is on 'meta'; accepted: 'cpu'"),
        ({"x": X}, {"x": [1, 2]}, "array 'x' is of type list; accepted: tensors, numpy"),
        ({"x": X}, {"x": np.array(["a"])}, "array 'x' is of dtype .*accepted: dtypes torch has"),
    ],
)
def test_a_mismatch_is_an_error_and_nothing_is_copied(pool, destinations, arrays, message):
    good = {"good": torch.zeros(1)}
    before = pool.counters
    with pytest.raises(ValueError, match=message):
        pool.upload_into(good | destinations, {"good": torch.ones(1)} | arrays)
    assert good["good"].item() == 0
    assert pool.counters == before


def test_an_array_elsewhere_cannot_be_uploaded(pool):
    with pytest.raises(ValueError, match="array 'x' is on 'meta'; accepted: 'cpu'"):
        pool.upload({"x": X.to("meta")})
    assert pool.counters == StagingCounters(0, 0, 0, 0, 0)


def test_one_upload_larger_than_the_ring_is_an_error():
    pool = StagingPool("cpu", 1000)
    assert pool.upload({"x": torch.ones(1000, dtype=torch.uint8)})["x"].sum() == 1000
    before = pool.counters
    for arrays in (
        {"x": torch.ones(1001, dtype=torch.uint8)},
        {"x": X, "y": torch.ones(745).bool()},
    ):
        with pytest.raises(ValueError, match="1001 bytes does not fit in the ring of 1000 bytes"):
            pool.upload(arrays)
        with pytest.raises(ValueError, match="1001 bytes does not fit in the ring of 1000 bytes"):
            pool.upload_into({name: a.clone() for name, a in arrays.items()}, arrays)
    assert pool.counters == before


@pytest.mark.parametrize("capacity", [0, -1, 1.5, "1", True, None])
def test_a_capacity_that_is_no_positive_int_is_an_error(capacity):
    with pytest.raises(ValueError, match=r"capacity_bytes is .*; accepted: a positive int"):
        StagingPool("cpu", capacity)


def test_devices():
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        assert StagingPool(device, 1).device == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'meta'; accepted: a CUDA device or 'cpu'"):
        StagingPool("meta", 1)


def test_counters(pool):
    pool.upload({"a": torch.zeros(10, dtype=torch.uint8), "b": torch.zeros(2)})
    pool.upload_into({"a": torch.zeros(4)}, {"a": torch.zeros(4)})
    counters = pool.counters
    assert counters == StagingCounters(
        uploads=2, copies=2, bytes=34, waits=0, high_water_bytes=264, synchronisations=0
    )
    pool.upload({})
    assert counters.uploads == 2
    with pytest.raises(AttributeError):
        counters.uploads = 0


def test_closed(pool):
    result = pool.upload({"x": X})
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.upload({"x": X})
    with pytest.raises(RuntimeError, match="closed"):
        pool.upload_into(result, {"x": X})
    assert torch.equal(result["x"], X)
    assert pool.counters.uploads == 1


def test_leaving_the_with_closes():
    with StagingPool("cpu", 1024) as pool:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        pool.upload({})


def test_close_waits_for_what_is_pending_alone(pool, monkeypatch):
    events = [Event(done=False), Event(done=True), Event(done=False)]
    pending = iter(events)
    monkeypatch.setattr(StagingPool, "_done", lambda self: next(pending))
    for _ in range(3):
        pool.upload({"x": X})
    pool.close()
    pool.close()
    assert [event.synchronized for event in events] == [1, 0, 1]
    assert pool.counters.waits == 0


def test_a_pool_that_is_dropped_waits_for_what_is_pending(monkeypatch):
    event = Event()
    monkeypatch.setattr(StagingPool, "_done", lambda self: event)
    pool = StagingPool("cpu", 1024)
    pool.upload({"x": X})
    del pool
    gc.collect()
    assert event.synchronized == 1


def test_a_pool_that_is_dropped_does_not_raise(monkeypatch):
    class Broken(Event):
        def query(self):
            raise RuntimeError("the device is gone")

    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    monkeypatch.setattr(StagingPool, "_done", lambda self: Broken())
    pool = StagingPool("cpu", 1024)
    pool.upload({"x": X})
    del pool
    gc.collect()
    assert not raised


def test_a_full_ring_waits_for_the_oldest_upload(monkeypatch):
    events = []
    monkeypatch.setattr(StagingPool, "_done", lambda self: events.append(Event()) or events[-1])
    pool = StagingPool("cpu", 1024)
    for value in range(5):
        result = pool.upload({"x": torch.full((256,), value, dtype=torch.uint8)})["x"]
        assert result.eq(value).all()
    assert [event.synchronized for event in events] == [1, 0, 0, 0, 0]
    assert pool.counters.waits == 1
    assert pool.counters.high_water_bytes == 1024


def test_a_slot_is_left_alone_until_its_event_is_done(monkeypatch):
    pool = StagingPool("cpu", 4096)
    kept = []

    class Checking(Event):
        """Looks at what its slot holds at the end, as a copy that is made late would."""

        def __init__(self, value):
            super().__init__()
            self.value = value

        def synchronize(self):
            super().synchronize()
            start = self.value % 4 * 1024
            kept.append(set(pool._memory[start : start + 1024].tolist()) == {self.value})

    values = iter(range(12))
    monkeypatch.setattr(StagingPool, "_done", lambda self: Checking(next(values)))
    for value in range(12):
        pool.upload({"x": torch.full((1024,), value, dtype=torch.uint8)})
    assert kept == [True] * 8


def test_a_copy_that_fails_holds_its_slot_for_the_copies_before_it(pool, monkeypatch):
    event = Event()
    monkeypatch.setattr(StagingPool, "_done", lambda self: event)
    destinations = {"a": torch.zeros(3), "b": torch.zeros(1)}
    copy_, copies = torch.Tensor.copy_, []

    def fails_at_the_second(self, source, non_blocking=False):
        copies.append(non_blocking)
        if sum(copies) == 2:
            raise RuntimeError("injected")
        return copy_(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", fails_at_the_second)
    with pytest.raises(RuntimeError, match="injected"):
        pool.upload_into(destinations, {"a": torch.ones(3), "b": torch.ones(1)})
    pool.close()
    assert event.synchronized == 1


def refuse_to_pin(monkeypatch):
    empty = torch.empty
    cause = RuntimeError("CUDA error: out of memory")

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise cause
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    return cause


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch):
    cause = refuse_to_pin(monkeypatch)
    with pytest.raises(RuntimeError, match=r"cannot pin 4096 bytes.*fallback=True") as caught:
        staging._allocate(4096, pinned=True, fallback=False)
    assert caught.value.__cause__ is cause


def test_pageable_memory_instead_is_said_once(monkeypatch, caplog):
    refuse_to_pin(monkeypatch)
    with caplog.at_level(logging.WARNING, "kvfold"):
        memory = staging._allocate(4096, pinned=True, fallback=True)
    assert (memory.shape, memory.dtype) == ((4096,), torch.uint8)
    assert [record.getMessage() for record in caplog.records] == [
        "cannot pin 4096 bytes of host memory; uploads go through pageable memory: "
        "CUDA error: out of memory"
    ]


def test_a_pool_on_the_cpu_pins_nothing(monkeypatch):
    refuse_to_pin(monkeypatch)
    assert StagingPool("cpu", 1024).upload({"x": X})["x"].shape == X.shape


@pytest.fixture
def hasty_threads():
    """Lets threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_may_share_a_pool(hasty_threads):
    pool = StagingPool("cpu", 4096)
    wrong = []

    def work(value):
        for _ in range(100):
            result = pool.upload({"x": torch.full((1000,), value, dtype=torch.uint8)})["x"]
            if not result.eq(value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.counters.uploads == 400
