"""Uploads to a GPU that is busy: their values are right, and only a full ring waits."""

import contextlib
import gc
import subprocess
import sys
import threading
import warnings

import gate
import numpy as np
import pytest
import torch

from kvfold.step.staging import StagingPool

pytestmark = pytest.mark.gpu

CYCLES = int(2e8)  # of torch.cuda._sleep: about 0.1 s
KIB = 1024


@pytest.fixture
def pool():
    with StagingPool("cuda", 64 * KIB) as pool:
        yield pool


@pytest.fixture(autouse=True)
def loaded():
    """Loads the kernels that the tests launch: the first launch may wait for the device."""
    torch.cuda._sleep(1)
    for dtype in (torch.uint8, torch.int64):
        torch.zeros(4, dtype=dtype, device="cuda").add(1).mul(2).clone()
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


@contextlib.contextmanager
def no_synchronisation():
    """Makes every torch call that waits for the device raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pattern(i: int, size: int) -> torch.Tensor:
    """uint8 [size]; every byte differs from that of the next i."""
    return (torch.arange(size) * 7 + i * 13).to(torch.uint8)


def assert_patterns(results: list[torch.Tensor], size: int):
    torch.cuda.synchronize()
    wrong = [i for i, x in enumerate(results) if not torch.equal(x.cpu(), pattern(i, size))]
    assert not wrong


def test_results_are_on_the_device_as_the_arrays_were(pool):
    arrays = {
        "ids": torch.arange(7, dtype=torch.int32),
        "none": torch.empty(0, 3, dtype=torch.float64),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "columns": torch.arange(12.0).view(3, 4).t(),
        "read-only": torch.from_numpy(np.arange(5)),
    }
    results = pool.upload(
        arrays | {"read-only": np.frombuffer(np.arange(5).tobytes(), dtype=np.int64)}
    )
    for name, array in arrays.items():
        assert results[name].device == pool.device == torch.device("cuda", 0)
        assert results[name].dtype == array.dtype
        assert results[name].is_contiguous()
        assert results[name].data_ptr() % 256 == 0 or not array.numel()
        assert torch.equal(results[name].cpu(), array)
    assert pool.counters.copies == 1
    assert pool.upload({}) == {}
    assert pool.upload({"none": torch.empty(0)})["none"].device == pool.device
    assert pool.counters.copies == 1


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda")])
def test_a_device_is_named_in_any_way_that_torch_knows(device):
    with StagingPool(device, KIB) as pool:
        assert pool.device == torch.device("cuda", 0)
        assert pool.upload({"x": torch.ones(3)})["x"].device == pool.device


def test_many_uploads_through_a_small_ring_are_right_while_the_device_is_busy(pool):
    size = 20 * KIB  # three slots, with a skipped tail
    results = []
    for i in range(60):
        if i % 20 == 0:
            torch.cuda._sleep(CYCLES)
        results.append(pool.upload({"x": pattern(i, size)})["x"])
    counters = pool.counters
    assert counters.waits > 0
    assert counters.high_water_bytes == 3 * size
    assert (counters.uploads, counters.copies, counters.bytes) == (60, 60, 60 * size)
    assert_patterns(results, size)


def test_uploads_of_all_sizes_are_right_while_the_device_is_busy(pool):
    sizes = np.random.default_rng(0).integers(1, 40 * KIB, 200).tolist()
    results = []
    for i, size in enumerate(sizes):
        if i % 50 == 0:
            torch.cuda._sleep(CYCLES // 2)
        results.append(pool.upload({"x": pattern(i, size)})["x"])
    torch.cuda.synchronize()
    for i, (size, result) in enumerate(zip(sizes, results, strict=True)):
        assert torch.equal(result.cpu(), pattern(i, size))


def test_a_full_ring_waits_for_the_oldest_slot_and_for_no_more(pool):
    busy = torch.cuda.Event()
    quarter = 16 * KIB
    results = [pool.upload({"x": pattern(0, quarter)})["x"]]
    with gate.closed() as open_gate:
        results += [pool.upload({"x": pattern(i, quarter)})["x"] for i in range(1, 4)]
        busy.record()
        assert pool.counters.waits == 0
        # The copy from the first slot was enqueued before the gate.
        results.append(pool.upload({"x": pattern(4, quarter)})["x"])
        assert not busy.query()
        waits = pool.counters.waits
        assert waits <= 1
        threading.Timer(0.2, open_gate).start()
        results.append(pool.upload({"x": pattern(5, quarter)})["x"])
        assert pool.counters.waits == waits + 1
    assert_patterns(results, quarter)


def test_uploads_do_not_wait_for_the_device(pool):
    arrays = {"x": pattern(0, KIB), "y": torch.ones(3, dtype=torch.bfloat16)}
    pool.stage(arrays).refresh(arrays)
    busy = torch.cuda.Event()
    torch.cuda.synchronize()
    with gate.closed():
        busy.record()
        with no_synchronisation():
            staged = [pool.stage(arrays) for _ in range(10)]
            for _ in range(10):
                staged[0].refresh(arrays)
        assert not busy.query()
    counters = pool.counters
    assert counters.waits == 0
    assert counters.copies == counters.uploads == 22


def test_a_slot_is_free_once_its_copy_is_done(pool):
    for i in range(50):
        pool.upload({"x": pattern(i, 64 * KIB)})
        torch.cuda.synchronize()
    assert pool.counters.waits == 0
    assert pool.counters.high_water_bytes == 64 * KIB


def test_a_captured_graph_reads_the_values_of_the_last_refresh(pool):
    size = 4 * KIB
    staged = pool.stage({"a": pattern(0, size), "b": torch.zeros(3, dtype=torch.int64)})
    tensors = staged.tensors
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        a, b = tensors["a"] + 1, tensors["b"] * 2
    copies, results = pool.counters.copies, []
    for i in range(40):
        if i % 10 == 0:
            torch.cuda._sleep(CYCLES // 2)
        staged.refresh({"b": torch.full((3,), i), "a": pattern(i, size)})
        graph.replay()
        results.append((a.clone(), b.clone()))
    torch.cuda.synchronize()
    for i, (a, b) in enumerate(results):
        assert torch.equal(a.cpu(), pattern(i, size) + 1)
        assert b.tolist() == [2 * i] * 3
    assert pool.counters.copies - copies == 40


def test_uploads_within_a_capture_raise_and_both_capture_and_pool_go_on(pool):
    arrays = {"x": pattern(1, KIB)}
    staged = pool.stage({"x": pattern(0, KIB)})
    before = pool.counters
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for use in (pool.upload, pool.stage, staged.refresh):
            with pytest.raises(RuntimeError, match=r"captured.*another upload.*Staged.refresh"):
                use(arrays)
        result = staged.tensors["x"] + 1
    assert pool.counters == before
    staged.refresh(arrays)
    graph.replay()
    assert torch.equal(result.cpu(), pattern(1, KIB) + 1)
    assert torch.equal(pool.upload(arrays)["x"].cpu(), arrays["x"])


def test_a_capture_goes_on_after_a_pool_is_released_within_it():
    pools = [StagingPool("cuda", KIB) for _ in range(2)]
    source = torch.zeros(4, dtype=torch.uint8, device="cuda")
    uploads = [pool.upload({"x": pattern(i, KIB)})["x"] for i, pool in enumerate(pools)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pools.pop().close()
        del pools[:]
        result = source + 1
    graph.replay()
    assert result.tolist() == [1] * 4
    assert_patterns(uploads, KIB)


def test_two_pools_on_two_streams_are_independent():
    slow, quick = torch.cuda.Stream(), torch.cuda.Stream()
    with StagingPool("cuda", 4 * KIB) as behind, StagingPool("cuda", 4 * KIB) as ahead:
        for stream, pool in ((slow, behind), (quick, ahead)):
            with torch.cuda.stream(stream):  # cudaMalloc may wait for the device
                pool.upload({"x": pattern(0, KIB)})
        torch.cuda.synchronize()
        with torch.cuda.stream(slow), gate.closed():
            late = [behind.upload({"x": pattern(i, KIB)})["x"] for i in range(4)]
            busy = torch.cuda.Event()
            busy.record()
            with torch.cuda.stream(quick):
                soon = [ahead.upload({"x": pattern(i, KIB)})["x"] for i in range(20)]
                quick.synchronize()
            assert not busy.query()
        assert behind.counters.waits == 0
        assert_patterns(late, KIB)
        assert_patterns(soon, KIB)


def test_threads_with_streams_of_their_own_may_share_a_pool(pool):
    results = {}

    def work(value):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(CYCLES // 10)
            results[value] = [
                pool.upload({"x": torch.full((9000,), value, dtype=torch.uint8)})["x"]
                for _ in range(30)
            ]

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for value in range(4):
        assert len(results[value]) == 30
        assert all(result.eq(value).all() for result in results[value])


@pytest.mark.parametrize("how", ["garbage collected", "closed"])
def test_a_pool_that_is_released_waits_for_its_copies(how):
    size = 256 * KIB
    patterns = [{"x": pattern(i, size)} for i in range(4)]
    pool = StagingPool("cuda", 4 * size)
    before = [pool.upload(arrays) for arrays in patterns]  # cudaMalloc may wait for the device
    torch.cuda.synchronize()
    del before
    made = torch.cuda.Event()
    with gate.closed() as open_gate:
        results = [pool.upload(arrays)["x"] for arrays in patterns]
        made.record()
        assert not made.query()
        threading.Timer(0.2, open_gate).start()
        if how == "closed":
            pool.close()
        del pool
        gc.collect()
        assert made.query()
        # Pinned memory that was released too early would be allocated and overwritten here.
        reused = [torch.full((4 * size,), 255, dtype=torch.uint8).pin_memory() for _ in range(4)]
    assert_patterns(results, size)
    del reused


def test_closing_waits_only_where_work_is_pending():
    torch.cuda.synchronize()
    pool = StagingPool("cuda", KIB)
    pool.upload({"x": pattern(0, KIB)})
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    with gate.closed():
        busy.record()
        pool.close()
        pool.close()
        assert not busy.query()


@pytest.mark.parametrize("where", ["pool", "module"])
def test_the_interpreter_may_exit_with_work_pending(where):
    """The pool is a global variable, or kept by references that the interpreter drops last."""
    program = (
        "import sys, torch\n"
        "from kvfold.step.staging import StagingPool\n"
        "pool = StagingPool('cuda', 1 << 20)\n"
        "torch.cuda._sleep(int(2e8))\n"
        "result = pool.upload({'x': torch.ones(1 << 18, dtype=torch.uint8)})\n"
    )
    if where == "module":
        program += "sys.modules['torch'].pool = pool\npool.me = pool\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch):
    empty = torch.empty

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(RuntimeError, match=r"cannot pin 65536 bytes") as caught:
        StagingPool("cuda", 64 * KIB)
    assert "out of memory" in str(caught.value.__cause__)


def test_an_array_on_the_device_is_refused(pool):
    with pytest.raises(ValueError, match="array 'x' is on 'cuda:0'; accepted: 'cpu'"):
        pool.upload({"x": torch.zeros(3, device="cuda")})
