"""Ranges and the ledger: every member exactly once, whatever workers do."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eggroll.distributed.partition import Ledger, default_range_size, ranges
from eggroll.errors import ConfigError


@given(st.integers(1, 5000), st.one_of(st.none(), st.integers(1, 100).map(lambda half: 2 * half)))
def test_ranges_cover_all_members_and_keep_pairs_together(population_size, range_size):
    found = ranges(population_size, range_size)
    assert [member for part in found for member in part] == list(range(population_size))
    assert all(part.start % 2 == 0 for part in found)


@pytest.mark.parametrize(
    ("population_size", "size"), [(2, 2), (7, 2), (32, 2), (33, 4), (64, 4), (256, 16), (1024, 64), (100_000, 64)]
)
def test_the_default_depends_on_the_population_alone(population_size, size):
    assert default_range_size(population_size) == size


def test_the_caller_can_cap_it():
    assert default_range_size(1024, most=8) == 8
    assert default_range_size(1024, most=9) == 8
    assert default_range_size(1024, most=1) == 2


@pytest.mark.parametrize("size", [0, 1, 3, -2, 2.0, True, "4"])
def test_a_range_size_that_splits_pairs_is_refused(size):
    with pytest.raises(ConfigError, match=r"must be an even number of at least 2.*use None for the default \(16\)"):
        ranges(256, size)


def test_a_lost_workers_range_comes_next():
    ledger = Ledger(ranges(8, 2))
    assert [ledger.take(worker, 0.0) for worker in (0, 1)] == [0, 1]
    assert ledger.lost(0) == [0]
    assert ledger.lost(0) == []
    assert ledger.take(2, 0.0) == 0
    assert ledger.repeated == 1
    assert not ledger.finish(0, 0, "late", 1.0), "a worker that was given up has no say"


def test_a_slow_range_is_given_to_a_second_worker_and_the_first_answer_counts():
    ledger = Ledger(ranges(6, 2), patience_s=3.0)
    for worker in range(3):
        ledger.take(worker, 0.0)
    ledger.finish(1, 1, "b", 4.0)
    assert ledger.take(1, 7.9) is None, "twice the median has not passed"
    assert ledger.next_repeat() == 8.0
    assert ledger.take(1, 8.0) == 0
    assert ledger.finish(0, 0, "a", 9.0)
    assert not ledger.finish(1, 0, "a again", 10.0)
    ledger.finish(2, 2, "c", 11.0)
    assert ledger.assemble() == ["a", "b", "c"]
    assert ledger.repeated == 1


def test_a_range_is_not_repeated_before_patience_has_passed():
    ledger = Ledger(ranges(4, 2), patience_s=100.0)
    ledger.take(0, 0.0)
    ledger.take(1, 0.0)
    ledger.finish(1, 1, "b", 0.1)
    assert ledger.take(1, 99.0) is None
    assert ledger.take(1, 100.0) == 0


def test_a_range_whose_second_worker_is_lost_stays_with_the_first():
    ledger = Ledger(ranges(2, 2), patience_s=1.0)
    ledger.take(0, 0.0)
    assert ledger.take(1, 2.0) == 0
    assert ledger.lost(1) == []
    assert ledger.finish(0, 0, "a", 3.0)
    assert ledger.done


def test_a_range_that_lies_at_hand_is_timed_from_when_it_is_begun():
    ledger = Ledger(ranges(6, 2), patience_s=3.0)
    assert [ledger.take(0, 0.0), ledger.take(0, 0.0), ledger.take(1, 0.0)] == [0, 1, 2]
    ledger.finish(0, 0, "a", 10.0)
    assert ledger.take(0, 25.0) is None, "a worker that has one is not given what another is slow with"
    ledger.finish(1, 2, "c", 11.0)
    assert ledger.next_repeat() == 10.0 + 2 * 11.0, "the second one was begun at 10"
    assert ledger.take(1, 32.0) == 1


def test_all_ranges_of_a_lost_worker_come_next_and_in_order():
    ledger = Ledger(ranges(8, 2))
    assert [ledger.take(0, 0.0) for _ in range(3)] == [0, 1, 2]
    assert ledger.waiting == 1
    assert ledger.lost(0) == [0, 1, 2]
    assert [ledger.take(1, 0.0) for _ in range(4)] == [0, 1, 2, 3]


def test_an_unfinished_ledger_is_not_assembled():
    ledger = Ledger(ranges(4, 2))
    ledger.finish(0, ledger.take(0, 0.0), "a", 1.0)
    with pytest.raises(AssertionError, match="not scored"):
        ledger.assemble()


@given(st.data())
def test_every_member_is_scored_exactly_once_whatever_workers_do(data):
    """Workers that are slow, die with a range or without, and join at any time; results depend on the range alone."""
    parts = ranges(data.draw(st.integers(1, 60)), 2 * data.draw(st.integers(1, 4)))
    ledger = Ledger(parts, patience_s=data.draw(st.sampled_from([0.0, 1.0, 5.0])))
    idle, events, alive, now, joined = [], [], set(), 0.0, 0

    def join():
        nonlocal joined
        idle.append(joined)
        alive.add(joined)
        joined += 1

    join()
    deaths = 0
    while not ledger.done:
        for worker in list(idle):
            index = ledger.take(worker, now)
            if index is not None:
                idle.remove(worker)
                # A worker that hangs answers after the end of time.
                took = data.draw(st.sampled_from([0.1, 1.0, 3.0, 1e9] if len(alive) > 1 else [0.1, 1.0, 3.0]))
                heapq.heappush(events, (now + took, worker, index))
                ahead = ledger.take(worker, now) if ledger.waiting and data.draw(st.booleans()) else None
                if ahead is not None:
                    heapq.heappush(events, (now + 2 * took, worker, ahead))
        due = ledger.next_repeat()
        if due is not None and idle and (not events or due < events[0][0]):
            now = max(now, due)
            continue
        kind = data.draw(st.sampled_from(["answer", "answer", "answer", "death", "join"]))
        if kind == "join" and joined < 20:
            join()
        elif kind == "death" and deaths < 10:
            deaths += 1
            worker = data.draw(st.sampled_from(sorted(alive)))
            alive.discard(worker)
            idle = [one for one in idle if one != worker]
            events = [event for event in events if event[1] != worker]
            heapq.heapify(events)
            ledger.lost(worker)
            if not alive:
                join()
        elif events:
            now, worker, index = heapq.heappop(events)
            ledger.finish(worker, index, parts[index], now)
            if not any(event[1] == worker for event in events):
                idle.append(worker)
        else:
            join()
    assert ledger.assemble() == parts
    assert ledger.repeated <= deaths + joined + len(parts) * 20
