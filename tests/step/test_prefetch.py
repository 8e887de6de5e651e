"""SegmentPrefetcher on a CPU: prefetches, write-backs and errors."""

import dataclasses
import logging

import pytest
import torch

from kvfold.step import device_buffer
from kvfold.step.prefetch import PrefetchCounters, SegmentPrefetcher

BIG = 1 << 20
NBYTES = 4 * 5 + 2 * 6  # of one segment that `make` makes


def make(count=6):
    return [
        {
            "weight": torch.arange(5, dtype=torch.float32) + 10 * i,
            "state": torch.full((2, 3), i, dtype=torch.bfloat16),
        }
        for i in range(count)
    ]


def visit(prefetcher, index):
    with prefetcher.segment(index) as tensors:
        return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def counts(prefetcher):
    return prefetcher.counters.adopted, prefetcher.counters.missed


def test_in_order_all_but_the_first_are_prefetched_and_all_are_written_back():
    given = make()
    prefetcher = SegmentPrefetcher(given, "cpu", BIG, write_back=True)
    for _ in range(5):
        for index in range(6):
            with prefetcher.segment(index) as tensors:
                for tensor in tensors.values():
                    tensor.add_(1)
    prefetcher.synchronize()
    for segment, before in zip(prefetcher.segments, make(), strict=True):
        assert_same(segment, {name: tensor + 5 for name, tensor in before.items()})
    assert prefetcher.counters == PrefetchCounters(29, 1, 31 * NBYTES, 0.0)
    for segment, before in zip(given, make(), strict=True):
        assert_same(segment, before)  # the caller's tensors are not written


def test_segments_out_of_order_are_right_and_counted():
    prefetcher = SegmentPrefetcher(make(), "cpu", BIG)
    for index in (3, 4, 1, 1, 2, 5, 0):
        assert_same(visit(prefetcher, index), make()[index])
    assert counts(prefetcher) == (3, 4)  # 4, 2 and 0 follow the segment before them


def test_without_write_back_the_changes_of_a_body_are_lost():
    prefetcher = SegmentPrefetcher(make(2), "cpu", BIG)
    for index in (0, 1, 0, 0):
        with prefetcher.segment(index) as tensors:
            assert_same(tensors, make()[index])
            tensors["weight"].zero_()
    for segment, before in zip(prefetcher.segments, make(2), strict=True):
        assert_same(segment, before)


def test_a_segment_that_changes_after_its_prefetch_is_copied_again():
    prefetcher = SegmentPrefetcher(make(), "cpu", BIG)
    visit(prefetcher, 0)
    prefetcher.segments[1]["weight"].fill_(7)
    assert visit(prefetcher, 1)["weight"].tolist() == [7] * 5
    assert counts(prefetcher) == (0, 2)
    assert_same(visit(prefetcher, 2), make()[2])
    assert counts(prefetcher) == (1, 2)


def test_a_change_is_seen_in_inference_mode_too():
    with torch.inference_mode():
        prefetcher = SegmentPrefetcher(make(), "cpu", BIG, write_back=True)
        visit(prefetcher, 0)
        prefetcher.segments[1]["weight"].fill_(7)
        assert visit(prefetcher, 1)["weight"].tolist() == [7] * 5
        assert_same(visit(prefetcher, 2), make()[2])
    assert counts(prefetcher) == (1, 2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_segments_see_their_own_write_backs(count):
    prefetcher = SegmentPrefetcher(make(count), "cpu", BIG, write_back=True)
    for round_ in range(3):
        for index in range(count):
            with prefetcher.segment(index) as tensors:
                assert tensors["weight"][0] == 10 * index + round_
                tensors["weight"].add_(1)
    assert counts(prefetcher) == ((0, 3) if count == 1 else (3 * count - 1, 1))


@pytest.mark.parametrize("write_back", [True, False])
def test_a_body_that_raises_loses_nothing(write_back):
    prefetcher = SegmentPrefetcher(make(), "cpu", BIG, write_back=write_back)
    with pytest.raises(KeyError, match="mine"), prefetcher.segment(0) as tensors:
        tensors["weight"].fill_(7)
        raise KeyError("mine")
    assert (prefetcher.segments[0]["weight"] == 7).all() == write_back
    assert_same(visit(prefetcher, 1), make()[1])
    assert counts(prefetcher) == (1, 1)


def test_while_a_segment_is_open_no_other_begins():
    prefetcher = SegmentPrefetcher(make(), "cpu", BIG)
    early = prefetcher.segment(2)
    with prefetcher.segment(0) as tensors:
        for use in (lambda: prefetcher.segment(1), early.__enter__, prefetcher.join):
            with pytest.raises(RuntimeError, match=r"segment 0 is open"):
                use()
        with pytest.raises(RuntimeError, match=r"segment 0 is open"):
            prefetcher.close()
        assert_same(tensors, make()[0])
    assert_same(visit(prefetcher, 1), make()[1])


@pytest.mark.parametrize("index", [-1, 6, 100])
def test_an_index_out_of_range_is_an_error(index):
    prefetcher = SegmentPrefetcher(make(), "cpu", BIG)
    with pytest.raises(IndexError, match=rf"segment {index} of 6"):
        prefetcher.segment(index)


def test_a_segment_larger_than_the_budget_is_an_error():
    with pytest.raises(ValueError, match=r"segment 2 takes 512 bytes .* budget_bytes is 511"):
        SegmentPrefetcher(
            [{}, {"a": torch.zeros(1)}, {"a": torch.zeros(65)}, make()[0]], "cpu", 511
        )


@pytest.fixture
def allocated(monkeypatch):
    """Sizes in bytes of the device buffers. Allocation number `fails`, from 0, is out of memory."""
    sizes = []
    sizes_and_fails = {"sizes": sizes, "fails": None}
    allocate = device_buffer._allocate

    def watched(nbytes, device):
        if len(sizes) == sizes_and_fails["fails"]:
            raise torch.OutOfMemoryError("injected")
        sizes.append(nbytes)
        return allocate(nbytes, device)

    monkeypatch.setattr(device_buffer, "_allocate", watched)
    return sizes_and_fails


@pytest.mark.parametrize(("budget", "fails"), [(1023, None), (1024, 1)])
def test_with_one_buffer_nothing_is_prefetched_and_one_warning_says_so(
    budget, fails, allocated, caplog
):
    allocated["fails"] = fails
    prefetcher = SegmentPrefetcher(make(), "cpu", budget, write_back=True)
    for _ in range(2):
        for index in range(6):
            with prefetcher.segment(index) as tensors:
                tensors["weight"].add_(1)
    assert allocated["sizes"] == [512]
    assert [(r.name, r.levelname) for r in caplog.records] == [("kvfold", "WARNING")]
    assert ("budget_bytes is 1023" if fails is None else "no memory") in caplog.text
    assert prefetcher.counters == PrefetchCounters(0, 12, 12 * NBYTES, 0.0)
    for segment, before in zip(prefetcher.segments, make(), strict=True):
        assert torch.equal(segment["weight"], before["weight"] + 2)


def test_two_buffers_of_the_largest_segment_fit_the_budget_exactly(allocated, caplog):
    segments = [{"a": torch.zeros(1)}, {"a": torch.zeros(100), "b": torch.zeros(3)}]
    with caplog.at_level(logging.WARNING, "kvfold"):
        SegmentPrefetcher(segments, "cpu", 2 * 768)
    assert allocated["sizes"] == [768, 768]
    assert not caplog.records


def test_tensors_of_any_shape_and_dtype_are_aligned():
    segment = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.arange(12).view(3, 4).t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "spread": torch.ones(1, dtype=torch.int16).expand(7),
    }
    prefetcher = SegmentPrefetcher([segment, {}], "cpu", BIG, write_back=True)
    with prefetcher.segment(0) as tensors:
        assert_same(tensors, segment)
        first = tensors["scalar"].data_ptr()
        for name, tensor in tensors.items():
            host = prefetcher.segments[0][name]
            assert (tensor.dtype, tensor.shape) == (host.dtype, host.shape)
            assert tensor.is_contiguous() and host.is_contiguous() and not tensor.requires_grad
            if tensor.numel():
                assert (tensor.data_ptr() - first) % 256 == 0
                assert tensor.data_ptr() != host.data_ptr()
        tensors["turned"].add_(1)
    assert visit(prefetcher, 1) == {}
    assert torch.equal(prefetcher.segments[0]["turned"], segment["turned"] + 1)


def test_join_drops_what_was_prefetched():
    prefetcher = SegmentPrefetcher(make(), "cpu", BIG)
    visit(prefetcher, 0)
    prefetcher.join()
    assert_same(visit(prefetcher, 1), make()[1])
    assert counts(prefetcher) == (0, 2)


@pytest.mark.parametrize(
    ("segments", "device", "message"),
    [
        ([], "cpu", "segments is empty; accepted"),
        ((segment for segment in ()), "cpu", "segments is empty; accepted: one dict of CPU"),
        ({"a": torch.zeros(1)}, "cpu", "segment 0 is a str; accepted: a dict of CPU tensors"),
        ([{}, [torch.zeros(1)]], "cpu", "segment 1 is a list; accepted: a dict of CPU tensors"),
        ([{"a": 3}], "cpu", "'a' of segment 0 is a int; accepted: a strided tensor on 'cpu'"),
        ([{"a": torch.zeros(1, device="meta")}], "cpu", "on 'meta'; accepted: a strided tensor"),
        (
            [{"a": torch.zeros(1).to_sparse()}],
            "cpu",
            "a torch.sparse_coo tensor on 'cpu'; accepted",
        ),
        ([{"a": torch.zeros(1)}], "meta", "device is 'meta'; accepted: a CUDA device or 'cpu'"),
    ],
)
def test_wrong_arguments_are_refused(segments, device, message):
    with pytest.raises(ValueError, match=message):
        SegmentPrefetcher(segments, device, BIG)


def test_segments_may_come_from_a_generator():
    with SegmentPrefetcher((segment for segment in make()), "cpu", BIG) as prefetcher:
        for index in range(6):
            assert_same(visit(prefetcher, index), make()[index])
        assert counts(prefetcher) == (5, 1)


def test_a_closed_prefetcher_is_not_usable_and_its_segments_stay():
    with SegmentPrefetcher(make(), "cpu", BIG, write_back=True) as prefetcher:
        early = prefetcher.segment(1)
        with prefetcher.segment(0) as tensors:
            tensors["weight"].zero_()
    prefetcher.close()
    uses = (lambda: prefetcher.segment(0), early.__enter__, prefetcher.join, prefetcher.synchronize)
    for use in uses:
        with pytest.raises(RuntimeError, match="closed"):
            use()
    assert not prefetcher.segments[0]["weight"].any()
    assert counts(prefetcher) == (0, 1)


def test_counters_are_a_snapshot():
    prefetcher = SegmentPrefetcher(make(), "cpu", BIG)
    before = prefetcher.counters
    visit(prefetcher, 0)
    assert before == PrefetchCounters(0, 0, 0, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.missed = 3
