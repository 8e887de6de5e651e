"""Uploads on a CPU: results, errors, counters and memory. Asynchronous copies: test_staging_gpu."""

import gc
import sys
import threading
import warnings
from collections.abc import Mapping

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
        staged = pool.stage(arrays)
        assert_equal(staged.tensors, arrays)
        changed = {name: array.eq(0).to(array.dtype) for name, array in arrays.items()}
        staged.refresh(changed)
        assert_equal(staged.tensors, changed)


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
def test_numpy_arrays_of_any_strides_are_uploaded(pool, array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pool.upload({"x": array})["x"]
    assert result.shape == array.shape
    assert np.array_equal(result.numpy(), array)


@pytest.mark.parametrize("arrays", [{}, {"x": torch.empty(0)}, {"x": torch.empty(3, 0, 2)}])
def test_without_bytes_there_is_no_copy(pool, arrays):
    staged = pool.stage(arrays)
    assert_equal(staged.tensors, arrays)
    staged.refresh(arrays)
    assert pool.counters == StagingCounters(2, 0, 0, 0, 0)


def test_results_are_neither_the_arrays_nor_the_ring(pool):
    array = torch.arange(4)
    first = pool.upload({"x": array})["x"]
    array += 10
    second = pool.upload({"x": array})["x"]
    assert first.tolist() == [0, 1, 2, 3]
    assert second.tolist() == [10, 11, 12, 13]
    first += 1
    assert array.tolist() == second.tolist()


def test_uploads_are_not_recorded_by_autograd(pool):
    for dtype in (torch.float32, torch.bfloat16):  # of which numpy has one only
        ones = torch.ones(3, dtype=dtype, requires_grad=True)
        staged = pool.stage({"x": ones})
        staged.refresh({"x": ones * 2})
        assert staged.tensors["x"].tolist() == [2, 2, 2]
        assert not staged.tensors["x"].requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_pool_made_in_inference_mode_works_outside_and_the_other_way_round(dtype):
    ones, zeros = {"x": torch.ones(3, dtype=dtype)}, {"x": torch.zeros(3, dtype=dtype)}
    with torch.inference_mode():
        pools = [StagingPool("cpu", 1024)]
        staged = [pools[0].stage(ones)]
    pools.append(StagingPool("cpu", 1024))
    staged += [pool.stage(ones) for pool in pools]
    with torch.inference_mode():
        staged.append(pools[1].stage(ones))
    for one in staged:
        for mode in (True, False):
            with torch.inference_mode(mode):
                one.refresh(ones)
            with torch.inference_mode(not mode):
                one.refresh(zeros)
            assert one.tensors["x"].tolist() == [0, 0, 0]


def test_refreshing_what_was_staged_is_one_copy(pool):
    staged = pool.stage(some_arrays())
    addresses = {name: tensor.data_ptr() for name, tensor in staged.tensors.items()}
    changed = {name: torch.ones_like(tensor) for name, tensor in staged.tensors.items()}
    staged.refresh(dict(reversed(changed.items())))
    assert_equal(staged.tensors, changed)
    assert {name: tensor.data_ptr() for name, tensor in staged.tensors.items()} == addresses
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
def test_a_refresh_from_arrays_of_other_names_shapes_or_dtypes_is_refused(pool, arrays, message):
    staged = pool.stage({"a": torch.ones(3), "b": torch.ones(2)})
    before = pool.counters
    with pytest.raises(ValueError, match=message):
        staged.refresh(arrays)
    assert pool.counters == before
    assert all((tensor == 1).all() for tensor in staged.tensors.values())


X = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (X.to("meta"), "array 'x' is on 'meta'; accepted: 'cpu'"),
        ([1, 2], "array 'x' is of type list; accepted: tensors, numpy arrays"),
        (np.array(["a"]), "array 'x' is of dtype .*accepted: dtypes that torch has"),
        (X.to_sparse(), "array 'x' is of layout torch.sparse_coo; accepted: torch.strided"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_by_name(pool, array, message):
    staged = pool.stage({"good": torch.zeros(1), "x": X})
    before = pool.counters
    for use in (pool.upload, pool.stage, staged.refresh):
        with pytest.raises(ValueError, match=message):
            use({"good": torch.ones(1), "x": array})
    assert staged.tensors["good"].item() == 0
    assert pool.counters == before


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
    assert pool.counters == before


@pytest.mark.parametrize("capacity", [0, -1, 1.5, "1", True, np.bool_(True), np.int64(0), None])
def test_a_capacity_that_is_not_a_positive_integer_is_an_error(capacity):
    with pytest.raises(ValueError, match=r"capacity_bytes is .*; accepted: a positive integer"):
        StagingPool("cpu", capacity)


@pytest.mark.parametrize("integer", [int, np.int64, np.uint16])
def test_a_capacity_may_be_of_any_integral_type(integer):
    with StagingPool("cpu", integer(1024)) as pool:
        assert pool.upload({"x": torch.ones(1024, dtype=torch.uint8)})["x"].sum() == 1024
        with pytest.raises(ValueError, match="ring of 1024 bytes"):
            pool.upload({"x": torch.ones(1025, dtype=torch.uint8)})


def test_a_device_is_named_in_any_way_that_torch_knows():
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        assert StagingPool(device, 1).device == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'meta'; accepted: a CUDA device or 'cpu'"):
        StagingPool("meta", 1)


def test_the_counters_count_completed_uploads(pool):
    pool.upload({"a": torch.zeros(10, dtype=torch.uint8), "b": torch.zeros(2)})
    pool.stage({"a": torch.zeros(2)}).refresh({"a": torch.zeros(2)})
    counters = pool.counters
    assert counters == StagingCounters(uploads=3, copies=3, bytes=34, waits=0, high_water_bytes=264)
    pool.upload({})
    assert counters.uploads == 3
    with pytest.raises(AttributeError):
        counters.uploads = 0


def test_a_closed_pool_refuses_uploads(pool):
    staged = pool.stage({"x": X})
    pool.close()
    pool.close()
    for use in (pool.upload, pool.stage, staged.refresh):
        with pytest.raises(RuntimeError, match="closed"):
            use({"x": X})
    assert torch.equal(staged.tensors["x"], X)
    assert pool.counters.uploads == 1


def test_the_end_of_a_with_statement_closes():
    with StagingPool("cpu", 1024) as pool:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        pool.upload({})


def test_close_waits_only_for_copies_that_are_not_done(pool, monkeypatch):
    events = [Event(done=False), Event(done=True), Event(done=False)]
    pending = iter(events)
    monkeypatch.setattr(StagingPool, "_enqueued_work", lambda self: next(pending))
    for _ in range(3):
        pool.upload({"x": X})
    pool.close()
    pool.close()
    assert [event.synchronized for event in events] == [1, 0, 1]
    assert pool.counters.waits == 0


def test_a_pool_that_is_garbage_collected_waits_for_its_copies(monkeypatch):
    event = Event()
    monkeypatch.setattr(StagingPool, "_enqueued_work", lambda self: event)
    pool = StagingPool("cpu", 1024)
    pool.upload({"x": X})
    del pool
    gc.collect()
    assert event.synchronized == 1


def test_a_pool_that_is_garbage_collected_does_not_raise(monkeypatch):
    class Broken(Event):
        def query(self):
            raise RuntimeError("the device is gone")

    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    monkeypatch.setattr(StagingPool, "_enqueued_work", lambda self: Broken())
    pool = StagingPool("cpu", 1024)
    pool.upload({"x": X})
    del pool
    gc.collect()
    assert not raised


def test_a_full_ring_waits_for_the_oldest_upload(monkeypatch):
    events = []

    def enqueued_work(self):
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(StagingPool, "_enqueued_work", enqueued_work)
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
        """Reads its slot at the end, like a copy that is made as late as possible."""

        def __init__(self, value):
            super().__init__()
            self.value = value

        def synchronize(self):
            super().synchronize()
            start = self.value % 4 * 1024
            kept.append(set(pool._memory[start : start + 1024].tolist()) == {self.value})

    values = iter(range(12))
    monkeypatch.setattr(StagingPool, "_enqueued_work", lambda self: Checking(next(values)))
    for value in range(12):
        pool.upload({"x": torch.full((1024,), value, dtype=torch.uint8)})
    assert kept == [True] * 8


def test_an_interrupted_copy_holds_its_slot_until_it_is_done(pool, monkeypatch):
    event = Event()
    monkeypatch.setattr(StagingPool, "_enqueued_work", lambda self: event)
    copy_ = torch.Tensor.copy_

    def is_interrupted(self, source, non_blocking=False):
        copy_(self, source, non_blocking)
        if non_blocking:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "copy_", is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.upload({"x": X})
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
    with pytest.raises(RuntimeError, match=r"cannot pin 4096 bytes.*capacity_bytes") as caught:
        staging._allocate(4096, pinned=True)
    assert caught.value.__cause__ is cause


def test_a_pool_on_the_cpu_pins_nothing(monkeypatch):
    refuse_to_pin(monkeypatch)
    assert StagingPool("cpu", 1024).upload({"x": X})["x"].shape == X.shape


@pytest.fixture
def hasty_threads():
    """Makes the interpreter switch threads as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class UploadingMapping(Mapping):
    """A mapping that uploads to a pool whenever it is read."""

    def __init__(self, pool, arrays):
        self.pool, self.arrays = pool, arrays

    def __len__(self):
        return len(self.arrays)

    def __iter__(self):
        self.pool.upload({"other": X})
        return iter(self.arrays)

    def __getitem__(self, name):
        self.pool.upload({"other": X})
        return self.arrays[name]

    def items(self):
        self.pool.upload({"other": X})
        return self.arrays.items()


@pytest.mark.parametrize("method", ["upload", "stage", "refresh"])
def test_a_mapping_may_use_the_pool_while_it_is_read(method):
    pool = StagingPool("cpu", 1024)  # never closed: close() would wait for ever after a deadlock
    staged = pool.stage({"x": X})
    use = staged.refresh if method == "refresh" else getattr(pool, method)
    thread = threading.Thread(target=use, args=(UploadingMapping(pool, {"x": X + 1}),), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "deadlock"
    assert pool.upload({"x": X + 2})["x"].eq(2).all()
    assert staged.tensors["x"].eq(method == "refresh").all()


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
