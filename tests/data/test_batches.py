"""Batches as a pure function of row numbers, compared with rows cut from the raw files."""

import os
import resource

import numpy as np
import pytest

from nanogpt.data.batches import RowOrder, Rows, train_batch
from nanogpt.data.shards import ShardError, write_shard
from nanogpt.data.validation import ValidationRows
from nanogpt.devices.mesh import BATCH, make_mesh, put
from nanogpt.schedule import Schedule, Stage

T = 5


def write(folder, *lengths):
    """Write shards of these lengths without repeated tokens, so that a token shows its position."""
    files, first = [], 0
    for i, length in enumerate(lengths):
        files.append(folder / f"{i}.bin")
        write_shard(files[-1], np.arange(first, first + length))
        first += length
    return files


def raw(file):
    """Read a shard without the code under test: uint16 after 1024 bytes."""
    return np.fromfile(file, "<u2")[512:]


def raw_rows(files):
    """Return the rows by definition: T + 1 tokens, starting every T tokens, shard by shard."""
    shards = map(raw, files)
    return np.array([s[i : i + T + 1] for s in shards for i in range(0, len(s) - T, T)])


@pytest.fixture
def files(tmp_path):
    """Rows: 4 and a tail of 2 tokens; none; exactly 3; 6 and the longest tail, of 4 tokens."""
    return write(tmp_path, 4 * T + 3, T, 3 * T + 1, 6 * T + 5)


ROWS_PER_EPOCH = 4 + 0 + 3 + 6


def first_tokens(rows, epoch):
    """Return the rows of an epoch in order, each identified by its first token."""
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


def test_a_batch_depends_on_its_first_row_alone_in_whatever_order_batches_are_asked_for(files):
    stream = raw_rows(files)
    one_object = Rows(files, T, seed=0, shuffle=False)
    for first in (9, 0, 4, 9, 2):
        for rows in (one_object, Rows(files, T, seed=0, shuffle=False)):
            batch = train_batch(rows, first, (1, 4))
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
        whole, divided = (train_batch(rows, step * 24, s) for s in ((1, 24), shape))
        assert divided.shape == (*shape, T + 1)
        np.testing.assert_array_equal(divided.reshape(24, T + 1), whole[0])


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_each_device_reads_only_its_own_rows_and_all_together_the_batch(files, devices):
    rows = Rows(files, T, seed=1, shuffle=True)
    expected = rows(np.arange(16) + 7).reshape(2, 8, T + 1)
    read = []

    def recorded(index):
        read.append(train_batch(rows, 7, (2, 8), index))
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


# These orders were recorded when the first version was released. If they changed, e.g. with a new
# NumPy, every shuffled run would silently train on other data than recorded.
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


def test_more_shards_than_may_be_open_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.data.batches.OPEN", 8)
    files = write(tmp_path, *[5] * 40)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 15, limit[1]))
    try:
        rows = Rows(files, 4, seed=0, shuffle=True)
        assert len(first_tokens(rows, 1)) == 40
        assert len(ValidationRows(files, 4, 199)) == 50
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_shard_that_is_cut_short_while_it_is_read_is_named(files):
    rows = Rows(files, 4, seed=0, shuffle=False)
    everything = rows(np.arange(len(rows)))
    files[0].rename(files[0].with_suffix(".away"))  # a deleted file stays readable while it is open
    assert (rows(np.arange(len(rows))) == everything).all()
    files[0].with_suffix(".away").rename(files[0])
    os.truncate(files[0], 1030)
    with pytest.raises(ShardError, match=f"{files[0].name} has changed"):
        rows(np.array(0))


def test_shards_without_a_single_row_are_refused(tmp_path):
    with pytest.raises(ShardError, match=r"0\.bin.* no row of 6 tokens"):
        Rows(write(tmp_path, T, 3), T, seed=0, shuffle=False)


# Rows that begin with a document

SEPARATOR = 0


def write_documents(folder, seed, shards=4):
    """Write shards of random documents, in which only the separator repeats; the third has none.

    The first begins with the end of a document; the others with a separator, as FineWeb's do.
    """
    random, files, first = np.random.default_rng(seed), [], 1
    for i in range(shards):
        tokens = np.arange(first, first + 300)
        tokens[random.random(300) < 0.12] = SEPARATOR
        tokens[0] = first if i == 0 else SEPARATOR
        if i == 2:
            tokens = np.arange(first, first + 40)
        files.append(folder / f"{i}.bin")
        write_shard(files[-1], tokens)
        first += 300
    return files


def aligned(files, T, max_document, **others):
    options = {"seed": 0, "shuffle": False, "separator": SEPARATOR, **others}
    return Rows(files, T, max_document=max_document, **options)


def aligned_rows(pieces, T, max_document):
    """Return the rows by definition, token by token, of these pieces of shards."""
    rows = []
    for piece in pieces:
        documents = []
        for token in piece.tolist():
            if token == SEPARATOR:
                documents.append([])
            if documents:
                documents[-1].append(token)
        row = []
        for document in documents:
            row += document[:max_document]
            if len(row) > T:
                rows.append(row[: T + 1])
                row = []
    return rows


def pieces_from(files, start):
    """Return the pieces of shards after an offset, then those before it."""
    after, before = [], []
    for shard in map(raw, files):
        cut = min(max(start, 0), len(shard))
        before.append(shard[:cut])
        after.append(shard[cut:])
        start -= len(shard)
    return after + before


def all_of(rows):
    return rows(np.arange(len(rows)))


def test_rows_of_documents_by_hand(tmp_path):
    first, second = tmp_path / "0.bin", tmp_path / "1.bin"
    write_shard(first, [8, 9, 0, 11, 12, 13, 14, 15, 0, 21, 0, 31, 32, 0, 41, 42, 43, 0])
    write_shard(second, [0, 51, 52, 53, 54, 55, 0, 61, 62, 63])
    rows = aligned([first, second], T=6, max_document=4)
    assert all_of(rows).tolist() == [
        [0, 11, 12, 13, 0, 21, 0],  # 14 and 15 are too far in; of 31 and 32 no room is left
        [0, 51, 52, 53, 0, 61, 62],  # documents 41 and the empty one do not fill a row
    ]
    assert [rows.offset(number) for number in range(3)] == [2, 18, 0]


@pytest.mark.parametrize("T", [1, 5, 16, 60])
@pytest.mark.parametrize("max_document", [1, 2, 9, 1000])
def test_rows_of_documents_are_those_of_a_reading_token_by_token(tmp_path, T, max_document):
    lengths = []
    for seed in range(3):
        files = write_documents(tmp_path, seed)
        expected = aligned_rows(map(raw, files), T, max_document)
        lengths.append(len(expected))
        if expected:
            read = all_of(aligned(files, T, max_document))
            assert (read.dtype, read.shape) == (np.int32, (len(expected), T + 1))
            assert read.tolist() == expected
        else:
            with pytest.raises(ShardError, match="no row of"):
                aligned(files, T, max_document)
    assert max(lengths) > 0 or (T, max_document) == (60, 1)


def test_every_epoch_of_documents_visits_every_row_once_and_in_an_order_of_its_own(tmp_path):
    files = write_documents(tmp_path, seed=1)
    expected = aligned_rows(map(raw, files), 5, 9)
    rows = aligned(files, 5, 9)
    late = rows(np.arange(len(expected)) + 3 * len(expected)).tolist()  # before any other
    epochs = [rows(np.arange(len(expected)) + e * len(expected)).tolist() for e in range(4)]
    assert epochs[0] == expected
    assert epochs[3] == late
    assert all(sorted(epoch) == sorted(expected) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 4
    shuffled = aligned(files, 5, 9, shuffle=True)
    assert all_of(shuffled).tolist() != expected
    assert shuffled(np.arange(len(expected)) + len(expected)).tolist() == epochs[1]


def test_documents_are_looked_for_only_in_the_shards_that_row_numbers_have_reached(tmp_path):
    files = write_documents(tmp_path, seed=2)
    here = len(aligned_rows([raw(files[0])], 5, 9))
    rows = aligned(files, 5, 9)
    rows(np.arange(here))
    rows.offset(here - 1)
    for i in (1, 3):  # other documents in place: if the old ones had been searched, it would show
        tokens = np.memmap(files[i], "<u2", "r+", offset=1024)
        tokens[:] = tokens[::-1].copy()
        tokens[7] = SEPARATOR
        tokens.flush()
    expected = aligned_rows(map(raw, files), 5, 9)
    assert rows(np.arange(len(expected))).tolist() == expected


def test_shards_without_a_row_that_begins_with_a_document_are_refused(tmp_path):
    files = write(tmp_path, 40)
    message = r"0\.bin.* no row of 6 tokens .* separator 99: .* set max_document_length to None\.$"
    with pytest.raises(ShardError, match=message):
        aligned(files, T, 9, separator=99)
    assert len(aligned(files, T, 9, separator=34)) == 1  # exactly the last six
    with pytest.raises(ShardError, match=message.replace("99", "35")):
        aligned(files, T, 9, separator=35)


def test_a_token_beyond_the_vocabulary_in_a_row_of_documents_is_located(tmp_path):
    files = write(tmp_path, 40)
    aligned(files, T, 9, separator=10, vocab_size=16)(np.arange(1))
    with pytest.raises(ShardError, match=r"0\.bin has token 15 at position 15, "):
        aligned(files, T, 9, separator=10, vocab_size=15)(np.arange(1))


# Continuing with rows of another length


@pytest.mark.parametrize("max_document", [None, 9])
def test_an_epoch_that_starts_at_a_row_is_the_same_epoch_turned_round(tmp_path, max_document):
    files = write_documents(tmp_path, seed=3)
    rows = aligned(files, 20, max_document)
    in_order = all_of(rows)
    for number in range(len(rows)):
        turned = aligned(files, 20, max_document, start=rows.offset(number))
        np.testing.assert_array_equal(all_of(turned), np.roll(in_order, -number, axis=0))
        assert turned.offset(len(rows)) == rows.offset(number)  # where the epoch ends
    assert rows.offset(len(rows)) == 0


def test_longer_rows_go_on_in_the_tokens_where_the_shorter_ones_ended(files):
    short = Rows(files, T, seed=0, shuffle=False)
    long = Rows(files, 2 * T, seed=0, shuffle=False, start=short.offset(8))
    stream = np.concatenate([raw(file) for file in files])
    last = files[-1].stat().st_size // 2 - 512  # 8 rows: those of the shards before and one of it
    assert short.offset(8) == len(stream) - last + T
    inputs = [short(np.arange(8))[7, :-1], *long(np.arange(2))[:, :-1]]
    np.testing.assert_array_equal(np.concatenate(inputs), stream[-last : -last + 5 * T])
    # Then it wraps around to the first shard, and ends with the one row before the offset.
    beginnings = long(np.arange(len(long)))[2:, 0].tolist()
    assert beginnings == [0, 2 * T, 5 * T + 3]


@pytest.mark.parametrize("seed", range(2))
def test_longer_rows_go_on_with_the_documents_that_the_shorter_ones_left(tmp_path, seed):
    files = write_documents(tmp_path, seed)
    short = aligned(files, 8, 12)
    in_short = all_of(short).tolist()
    stream = np.concatenate([raw(file) for file in files])
    for number in range(len(short)):
        start = short.offset(number)
        assert stream[start] == SEPARATOR
        long = aligned(files, 16, 20, start=start)
        read = all_of(long).tolist()
        assert read == aligned_rows(pieces_from(files, start), 16, 20)
        this_round = [row for i, row in enumerate(read) if long.offset(i) >= start]
        used = [t for row in in_short[:number] + this_round for t in row if t != SEPARATOR]
        assert used == sorted(set(used))  # forward only, and nothing twice


def test_rows_of_documents_go_on_from_an_offset_within_a_document(tmp_path):
    files = write_documents(tmp_path, seed=4)
    for start in range(0, 940, 31):
        read = all_of(aligned(files, 8, 12, start=start)).tolist()
        assert read == aligned_rows(pieces_from(files, start), 8, 12)


# The rows of a schedule whose stages have rows of different lengths


def schedule(*stages, num_steps):
    """Return a schedule with 20 tokens per batch and 4 per row, times a stage's factors."""
    return Schedule(stages, num_steps, 20, 4, 0.0, 0.0, 0.0, 0.95, 0, 0)


def plain(files, shuffle=False):
    """Return what makes plain rows, which do not depend on documents."""
    return lambda T, _, start: Rows(files, T, 3, shuffle, start=start)


def trained_on(order, run):
    """Return the batch [R, T + 1] of each step."""
    batches = []
    for step in range(1, run.num_steps + 1):
        stage = run.stage(step)
        rows, first = order(step)
        T = run.row_length(stage)
        assert rows.sequence_length == T
        batches.append(train_batch(rows, first, (1, run.tokens_per_step(stage) // T))[0])
    return batches


STAGES = (
    Stage(0.3, 1.0, 1.0),
    Stage(0.2, 2.0, 1.0),  # larger batches, with rows of the same length
    Stage(0.3, 2.0, 2.0),
    Stage(1e-9, 1.0, 5.0),  # too short for a step
    Stage(0.1, 1.0, 5.0),
    Stage(0.1, 1.0, 0.5),
)


def test_a_schedule_reads_every_token_once_and_in_order_whatever_the_length_of_its_rows(tmp_path):
    run = schedule(*STAGES, num_steps=20)
    files = write(tmp_path, run.tokens(20) + 1)
    order = RowOrder(plain(files), run, shuffle=False)
    batches = trained_on(order, run)
    assert [batch.shape for batch in batches] == (
        6 * [(5, 5)] + 4 * [(10, 5)] + 6 * [(5, 9)] + 2 * [(1, 21)] + 2 * [(10, 3)]
    )
    for part, beginning in ((slice(None, -1), 0), (slice(1, None), 1)):  # inputs and targets
        read = np.concatenate([batch[:, part].ravel() for batch in batches])
        np.testing.assert_array_equal(read, np.arange(run.tokens(20)) + beginning)
    # Steps can be requested in any order, as in a resumed run.
    np.testing.assert_array_equal(train_batch(*order(17), (1, 1))[0], batches[16])


def test_a_schedule_uses_no_document_twice_and_goes_on_after_the_last_of_the_stage_before(tmp_path):
    files = write_documents(tmp_path, seed=5)
    run = schedule(*STAGES[:3], num_steps=8)
    order = RowOrder(lambda T, _, start: aligned(files, T, 9, start=start), run, shuffle=False)
    read = [token for batch in trained_on(order, run) for token in batch.ravel().tolist()]
    used = [token for token in read if token != SEPARATOR]
    assert used == sorted(set(used))
    # By hand: the rows of 5 tokens first, and then those of 9 from the next document on.
    short = aligned_rows(pieces_from(files, 0), 4, 9)[:35]
    start = aligned(files, 4, 9).offset(35)
    long = aligned_rows(pieces_from(files, start), 8, 9)[:15]
    assert read == [token for row in short + long for token in row]


def test_a_stage_may_use_less_of_each_document_and_the_next_one_goes_on_where_it_ended(tmp_path):
    files = write_documents(tmp_path, seed=5)
    limits = 3, None, 5, 3  # 9 for whatever stage has no limit of its own
    run = schedule(*[Stage(max_document_length=limit) for limit in limits], num_steps=8)

    def make(T, longest, start):
        return aligned(files, T, longest or 9, start=start)

    batches = trained_on(RowOrder(make, run, shuffle=False), run)
    # By hand: 10 rows in each stage, the first from the document after those used before it.
    start, expected = 0, []
    for limit in limits:
        expected += aligned_rows(pieces_from(files, start), 4, limit or 9)[:10]
        start = aligned(files, 4, limit or 9, start=start).offset(10)
    assert np.concatenate(batches).tolist() == expected
    used = [token for row in expected for token in row if token != SEPARATOR]
    assert used == sorted(set(used))

    def longest_in(rows):
        return max(len(part) for row in rows for part in np.split(row, np.flatnonzero(row == 0)))

    each = [longest_in(np.concatenate(batches[n : n + 2])) for n in (0, 2, 4, 6)]
    assert each == [3, 5, 5, 3]  # of rows of 5
    # Steps can be requested in any order, as in a resumed run.
    again = RowOrder(make, run, shuffle=False)
    for step in (7, 2, 5):
        np.testing.assert_array_equal(train_batch(*again(step), (1, 5))[0], batches[step - 1])


def test_shuffled_stages_with_other_documents_go_on_with_the_next_row(tmp_path):
    files = write_documents(tmp_path, seed=5)
    run = schedule(Stage(max_document_length=3), Stage(), Stage(), num_steps=6)

    def make(T, longest, start):
        return aligned(files, T, longest or 9, start=start, shuffle=True)

    short, long = (aligned(files, 4, limit, shuffle=True) for limit in (3, 9))
    expected = [short(np.arange(10)), long(np.arange(10, 30))]
    batches = trained_on(RowOrder(make, run, shuffle=True), run)
    np.testing.assert_array_equal(np.concatenate(batches), np.concatenate(expected))


def test_a_stage_whose_rows_are_as_long_as_before_counts_on_into_the_next_epochs(files):
    run = schedule(Stage(), Stage(batch=2.0), Stage(), num_steps=6)
    rows = Rows(files, 4, seed=3, shuffle=False)
    order = RowOrder(plain(files), run, shuffle=False)
    read = np.concatenate(trained_on(order, run))
    assert len(read) == 40 > 2 * len(rows)
    np.testing.assert_array_equal(read, rows(np.arange(40)))


def test_shuffled_stages_of_another_length_go_on_where_as_many_tokens_were_used(tmp_path):
    files = write(tmp_path, 4000)
    run = schedule(Stage(), Stage(batch=2.0, length=2.0), num_steps=6)  # 5 rows of 4, 5 rows of 8
    order = RowOrder(plain(files, shuffle=True), run, shuffle=True)
    short, long = Rows(files, 4, 3, True), Rows(files, 8, 3, True)
    # 60 tokens make 7 of the longer rows, and a half, which is not used again.
    expected = [short(np.arange(5) + n) for n in (0, 5, 10)]
    expected += [long(np.arange(5) + n) for n in (8, 13, 18)]
    for batch, wanted in zip(trained_on(order, run), expected, strict=True):
        np.testing.assert_array_equal(batch, wanted)
