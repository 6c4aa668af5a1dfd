"""Prefetching: a thread computes items ahead of time, in order, and no more than requested."""

import threading

import pytest

from nanogpt.data.prefetch import prefetch


def batch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 30])
def test_prefetch_keeps_the_order_and_loses_nothing(ahead):
    assert list(prefetch(lambda step: step * 10, range(1, 21), ahead)) == list(range(10, 201, 10))
    assert batch_threads() == []


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_prefetch_runs_ahead_without_being_asked_but_never_further_than_told(ahead):
    asked = []  # drawn by the consumer's thread, so it does not depend on timing
    made = {step: threading.Event() for step in range(10)}

    def steps():
        for step in range(10):
            asked.append(step)
            yield step

    for step in prefetch(lambda step: made[step].set() or step, steps(), ahead):
        furthest = min(step + ahead, 9)
        assert asked == list(range(furthest + 1))
        assert made[furthest].wait(timeout=30)


def test_an_error_is_raised_at_the_step_it_belongs_to():
    def make(step):
        if step == 3:
            raise OSError("the disk is gone")
        return step

    received = []
    with pytest.raises(OSError, match="the disk is gone"):
        for step in prefetch(make, range(10)):
            received.append(step)
    assert received == [0, 1, 2]
    assert batch_threads() == []


def test_a_consumer_that_stops_early_leaves_no_thread_behind():
    batches = prefetch(lambda step: step, iter(int, 1))  # endless
    next(batches)
    assert len(batch_threads()) == 1
    batches.close()
    assert batch_threads() == []
