"""The ring's bookkeeping, compared with a model that lists the bytes in use."""

import pytest
from fake_event import Event
from hypothesis import given
from hypothesis import strategies as st

from kvfold.step.ring import Ring

CAPACITY = 64


def take(ring, size):
    event = Event()
    offset = ring.reserve(size)
    ring.commit(offset, size, event)
    return offset, event


def gaps(live, size, alignment):
    """All offsets at which `size` bytes overlap no live slot (offset, size)."""
    return {
        offset
        for offset in range(0, CAPACITY - size + 1, alignment)
        if all(offset + size <= other or offset >= other + length for other, length in live)
    }


def behind_or_first(live, size, alignment):
    """The gaps that a ring can use: right behind the newest slot, or at the start."""
    if not live:
        return {0}
    head = -(-sum(live[-1]) // alignment) * alignment
    free = gaps(live, size, alignment)
    if live[-1][0] < live[0][0]:
        return free & {head} if head + size <= live[0][0] else set()
    return free & ({head} if head + size <= CAPACITY else {0})


# A step takes a slot of a size, then sets the events of some live slots to done.
STEPS = st.lists(st.tuples(st.integers(1, CAPACITY), st.lists(st.integers(0, 7), max_size=3)))


@given(STEPS, st.sampled_from([1, 4, 8]))
def test_slots_never_overlap_and_are_released_in_order(steps, alignment):
    ring = Ring(CAPACITY, alignment)
    live = []  # (offset, size, event), oldest first
    waits = high_water = 0
    for size, finished in steps:
        while live and live[0][2].done:
            live.pop(0)
        expected = waits
        while not behind_or_first([slot[:2] for slot in live], size, alignment):
            expected += 1  # for the oldest
            live.pop(0)
            while live and live[0][2].done:
                live.pop(0)
        offset, event = take(ring, size)
        assert offset in behind_or_first([slot[:2] for slot in live], size, alignment)
        assert offset in gaps([slot[:2] for slot in live], size, alignment)
        assert not any(slot[2].synchronized for slot in live)
        waits = expected
        live.append((offset, size, event))
        high_water = max(high_water, sum(slot[1] for slot in live))
        assert (ring.waits, ring.high_water) == (waits, high_water)
        for place in finished:
            if place < len(live):
                live[place][2].done = True


@given(st.lists(st.integers(1, CAPACITY // 4), max_size=50), st.integers(0, 2))
def test_a_ring_with_room_for_all_live_slots_never_waits(sizes, under_way):
    ring, events = Ring(CAPACITY), []
    for size in sizes:  # at most half of the ring is in slots, and one skip wastes a fourth
        if len(events) > under_way:
            events[-1 - under_way].done = True
        events.append(take(ring, size)[1])
        for event in events[: -1 - under_way]:
            event.done = True
    assert ring.waits == 0
    assert not any(event.synchronized for event in events)


def test_a_full_ring_waits_only_for_its_oldest_slot():
    ring = Ring(CAPACITY)
    events = [take(ring, CAPACITY // 4)[1] for _ in range(4)]
    assert take(ring, CAPACITY // 4)[0] == 0
    assert [event.synchronized for event in events] == [1, 0, 0, 0]
    assert (ring.waits, ring.high_water) == (1, CAPACITY)


def test_a_slot_behind_one_that_is_not_done_is_not_released():
    ring = Ring(CAPACITY)
    first, second = (take(ring, CAPACITY // 2)[1] for _ in range(2))
    second.done = True
    assert take(ring, CAPACITY // 2)[0] == 0
    assert (first.synchronized, second.synchronized) == (1, 0)


def test_the_tail_is_skipped_where_a_slot_does_not_fit():
    ring = Ring(CAPACITY)
    first = take(ring, 30)[1]
    assert take(ring, 30)[0] == 30
    first.done = True
    assert take(ring, 8)[0] == 0
    assert ring.waits == 0


def test_reserve_takes_no_bytes():
    ring = Ring(CAPACITY)
    assert [ring.reserve(CAPACITY) for _ in range(3)] == [0, 0, 0]
    assert (ring.waits, ring.high_water) == (0, 0)


def test_an_empty_ring_starts_at_offset_0():
    ring = Ring(CAPACITY)
    take(ring, 40)[1].done = True
    assert take(ring, CAPACITY)[0] == 0


@pytest.mark.parametrize("size", [0, -1, CAPACITY + 1])
def test_a_size_out_of_range_is_an_error(size):
    with pytest.raises(ValueError, match=rf"size is {size}; accepted: 1 to {CAPACITY}"):
        Ring(CAPACITY).reserve(size)


def test_drain_waits_only_for_slots_that_are_not_done():
    ring = Ring(CAPACITY)
    events = [take(ring, 8)[1] for _ in range(3)]
    events[1].done = True
    ring.drain()
    ring.drain()
    assert [event.synchronized for event in events] == [1, 0, 1]
    assert ring.waits == 0
    assert take(ring, CAPACITY)[0] == 0
