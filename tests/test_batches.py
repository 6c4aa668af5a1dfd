"""Batches as a pure function of position, held against slices of the raw files made with NumPy."""

import threading
from functools import partial

import numpy as np
import pytest

from nanogpt.batches import Rows, ValidationRows, prefetch, train_batch
from nanogpt.mesh import BATCH, ROWS, make_mesh, put
from nanogpt.shards import ShardError, write_shard

T = 5


def write(folder, *lengths):
    """Shards of these lengths in which no token occurs twice, so that a token tells its place."""
    files, first = [], 0
    for i, length in enumerate(lengths):
        files.append(folder / f"{i}.bin")
        write_shard(files[-1], np.arange(first, first + length))
        first += length
    return files


def raw(file):
    """The tokens of a shard without the code under test: uint16 after 1024 bytes."""
    return np.fromfile(file, "<u2")[512:]


def raw_rows(files):
    """The rows as their definition has them: T + 1 tokens, then T further on, shard by shard."""
    shards = map(raw, files)
    return np.array([s[i : i + T + 1] for s in shards for i in range(0, len(s) - T, T)])


@pytest.fixture
def files(tmp_path):
    """Rows: 4 and a tail of 2 tokens; none; exactly 3; 6 and the longest tail, of 4 tokens."""
    return write(tmp_path, 4 * T + 3, T, 3 * T + 1, 6 * T + 5)


ROWS_PER_EPOCH = 4 + 0 + 3 + 6


def first_tokens(rows, epoch):
    """Which rows an epoch visits, in order; the first token of a row names it."""
    return rows(np.arange(len(rows)) + epoch * len(rows))[:, 0].tolist()


# Rows


def test_rows_are_slices_of_one_shard_each_and_tails_shorter_than_a_row_are_left_out(files):
    rows = Rows(files, T, seed=0, shuffle=False)
    expected = raw_rows(files)
    assert len(rows) == len(expected) == ROWS_PER_EPOCH
    np.testing.assert_array_equal(rows(np.arange(ROWS_PER_EPOCH)), expected)


def test_an_empty_shard_between_others_moves_no_row(tmp_path):
    first, empty, last = write(tmp_path, 2 * T + 1, 1, 2 * T + 1)
    empty.write_bytes(np.array([20240520, 1, 0] + [0] * 253, "<i4").tobytes())
    rows = Rows([first, empty, last], T, seed=0, shuffle=False)
    np.testing.assert_array_equal(rows(np.arange(4)), raw_rows([first, last]))


def test_a_batch_depends_on_its_position_alone_in_whatever_order_batches_are_asked_for(files):
    stream = raw_rows(files)
    one_object = Rows(files, T, seed=0, shuffle=False)
    for first in (9, 0, 4, 9, 2):
        for rows in (one_object, Rows(files, T, seed=0, shuffle=False)):
            batch = train_batch(rows, first * T, (1, 4))
            np.testing.assert_array_equal(batch, stream[None, first : first + 4])


def test_late_and_early_epochs_can_be_asked_for_in_any_order(files):
    straight = Rows(files, T, seed=3, shuffle=True)
    in_order = [first_tokens(straight, epoch) for epoch in range(5)]
    jumping = Rows(files, T, seed=3, shuffle=True)
    for epoch in (4, 0, 2, 4, 1, 3, 0):
        assert first_tokens(jumping, epoch) == in_order[epoch]


@pytest.mark.parametrize("shape", [(4, 6), (2, 12), (8, 3), (24, 1)])
def test_the_division_into_microbatches_does_not_change_the_rows_of_a_step(files, shape):
    rows = Rows(files, T, seed=1, shuffle=True)
    for step in range(3):  # each longer than an epoch, so that they cross into others
        position = step * 24 * T
        whole, divided = (train_batch(rows, position, s) for s in ((1, 24), shape))
        assert divided.shape == (*shape, T + 1)
        np.testing.assert_array_equal(divided.reshape(24, T + 1), whole[0])


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_each_device_reads_only_its_own_rows_and_all_together_the_batch(files, devices):
    rows = Rows(files, T, seed=1, shuffle=True)
    expected = rows(np.arange(16) + 7).reshape(2, 8, T + 1)
    read = []

    def recorded(index):
        read.append(train_batch(rows, 7 * T, (2, 8), index))
        return read[-1]

    batch = put(make_mesh(devices), BATCH, (2, 8, T + 1), recorded)
    np.testing.assert_array_equal(batch, expected)
    assert [part.shape for part in read] == [(2, 8 // devices, T + 1)] * devices
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_visits_every_row_once_and_in_an_order_of_its_own(files, shuffle):
    rows = Rows(files, T, seed=0, shuffle=shuffle)
    epochs = [first_tokens(rows, epoch) for epoch in range(6)]
    in_file_order = raw_rows(files)[:, 0].tolist()
    for order in epochs:
        assert sorted(order) == in_file_order
    assert len(set(map(tuple, epochs))) == 6
    assert (epochs[0] == in_file_order) == (not shuffle)
    assert in_file_order not in epochs[1:]


def test_the_seed_changes_the_order_and_nothing_else_does(files):
    orders = [first_tokens(Rows(files, T, seed, shuffle=True), 0) for seed in range(6)]
    assert len(set(map(tuple, orders))) == 6
    # Whether the first epoch is shuffled too says nothing about the second.
    shuffled, not_shuffled = (Rows(files, T, 5, shuffle=shuffle) for shuffle in (True, False))
    assert first_tokens(shuffled, 1) == first_tokens(not_shuffled, 1)


# These orders were written down when the first version was released. Were they to change, with a
# new NumPy say, every shuffled run would silently see other data than its record says.
@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [
        (7, 0, [4, 1, 6, 3, 2, 7, 5, 0]),
        (7, 1, [3, 1, 6, 2, 5, 4, 0, 7]),
        (8, 0, [4, 3, 1, 6, 7, 2, 5, 0]),
    ],
)
def test_the_order_of_a_seed_and_epoch_stays_what_it_was(tmp_path, seed, epoch, order):
    rows = Rows(write(tmp_path, 8 * T + 1), T, seed, shuffle=True)
    assert [token // T for token in first_tokens(rows, epoch)] == order


def test_a_token_beyond_the_vocabulary_stops_the_batch_that_holds_it_and_is_located(files):
    # The shards hold the tokens 0, 1, 2, ...; the third has 3 T + 1 of them, from 5 T + 3 on.
    beyond = 5 * T + 3 + 8
    rows = Rows(files, T, seed=0, shuffle=False, vocab_size=beyond)
    rows(np.arange(4 + 1))  # up to the first row of the third shard
    with pytest.raises(ShardError, match=rf"2\.bin has token {beyond} at position 8, .*{beyond}"):
        rows(np.arange(4 + 1, 4 + 2))


def test_a_token_beyond_the_vocabulary_among_those_to_validate_on_is_refused(files):
    ValidationRows(files, T, num_tokens=20, vocab_size=21)
    with pytest.raises(ShardError, match=r"0\.bin has token 20 at position 20, "):
        ValidationRows(files, T, num_tokens=20, vocab_size=20)


def test_shards_without_a_single_row_are_refused(tmp_path):
    with pytest.raises(ShardError, match=r"0\.bin.* no row of 6 tokens"):
        Rows(write(tmp_path, T, 3), T, seed=0, shuffle=False)


# Validation


@pytest.mark.parametrize("num_tokens", [1, T, 4 * T, 4 * T + 2, 27, 32, 39])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_token_of_the_prefix_is_a_target_once_after_the_token_before_it(
    tmp_path, num_tokens, count
):
    files = write(tmp_path, 12, 3, 25)  # 39 tokens have one before them
    stream = np.concatenate([raw(file) for file in files])
    rows = ValidationRows(files, T, num_tokens)
    batches = [rows(first, count) for first in range(0, len(rows), count)]
    assert all(batch.shape == (count, T + 1) for batch in batches)
    read = np.concatenate(batches)
    inputs, targets = read[:, :-1].ravel(), read[:, 1:].ravel()
    np.testing.assert_array_equal(targets[targets >= 0], stream[1 : num_tokens + 1])
    np.testing.assert_array_equal(inputs[targets >= 0], stream[:num_tokens])
    assert len(rows) == np.ceil(num_tokens / T)


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_divide_the_validation_rows_without_changing_them(tmp_path, devices):
    rows = ValidationRows(write(tmp_path, 34), T, 33)
    on_devices = put(make_mesh(devices), ROWS, (4, T + 1), partial(rows, 4, 4))
    expected = np.full(4 * T + 1, -1)
    expected[: 34 - 20] = np.arange(20, 34)
    np.testing.assert_array_equal(np.asarray(on_devices)[:, 0], expected[:-1:T])
    np.testing.assert_array_equal(np.asarray(on_devices)[:, 1:].ravel(), expected[1:])


def test_more_validation_tokens_than_there_are_is_an_error_that_tells_how_many(tmp_path):
    files = write(tmp_path, 12, 3)
    ValidationRows(files, T, 14)
    with pytest.raises(ShardError, match=r"val_tokens is 15, but .*0\.bin.* have 14 tokens"):
        ValidationRows(files, T, 15)


# Prefetch


def batch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 30])
def test_prefetch_keeps_the_order_and_loses_nothing(ahead):
    assert list(prefetch(lambda step: step * 10, range(1, 21), ahead)) == list(range(10, 201, 10))
    assert batch_threads() == []


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_prefetch_runs_ahead_without_being_asked_but_never_further_than_told(ahead):
    asked = []  # drawn by the consumer's own thread, so what it holds is no matter of timing
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
