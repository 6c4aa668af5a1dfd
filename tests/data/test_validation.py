"""Validation rows: every token is a target once, after its document's tokens and no others."""

from functools import partial

import numpy as np
import pytest

from nanogpt.data.shards import ShardError, write_shard
from nanogpt.data.validation import ValidationRows
from nanogpt.devices.mesh import ROWS, make_mesh, put
from tests.data.test_batches import T, raw, write

SEPARATOR = 255


def all_rows(rows, count=3):
    """Read the rows `count` at a time, including those that pad the last read."""
    batches = [rows(first, count) for first in range(0, len(rows), count)]
    assert all(batch.shape == (count, rows.sequence_length + 1) for batch in batches)
    return np.concatenate(batches)


def pairs_of(read):
    """Return every target in the rows, with the token before it."""
    inputs, targets = read[:, :-1], read[:, 1:]
    inputs = np.where(inputs < 0, ~inputs, inputs)
    return inputs[targets >= 0], targets[targets >= 0]


@pytest.fixture
def files(tmp_path):
    return write(tmp_path, 12, 3, 25)  # 39 tokens have a predecessor


@pytest.mark.parametrize("num_tokens", [1, T, 4 * T, 4 * T + 2, 27, 32, 39])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_token_of_the_prefix_is_a_target_once_after_the_token_before_it(
    files, num_tokens, count
):
    stream = np.concatenate([raw(file) for file in files])
    rows = ValidationRows(files, T, num_tokens)
    inputs, targets = pairs_of(all_rows(rows, count))
    np.testing.assert_array_equal(targets, stream[1 : num_tokens + 1])
    np.testing.assert_array_equal(inputs, stream[:num_tokens])
    assert len(rows) == np.ceil(num_tokens / T)


# Lengths of documents, including separators, for rows of 16: a few per row, one that fills a row,
# one that is a token shorter, and some that are longer than one row and than two.
@pytest.mark.parametrize(
    "lengths",
    [(5, 4, 6, 3, 9), (16, 1, 15), (17, 3), (3, 40, 2, 2), (100,), (1, 1, 1, 50, 16, 16, 7)],
)
@pytest.mark.parametrize(("first", "cut"), [(0, 0), (2, 1), (0, 3)])
@pytest.mark.parametrize("context", [1, 6, 50])
def test_a_token_is_predicted_from_its_document_and_nothing_else(
    tmp_path, lengths, first, cut, context
):
    # The data may begin, and the validation tokens end, in the middle of a document.
    documents = [[SEPARATOR, *range(n - 1)] for n in lengths]
    stream = np.concatenate(documents)[first:].astype(np.uint16)
    write_shard(tmp_path / "0.bin", stream)
    num_tokens = len(stream) - 1 - cut
    rows = ValidationRows(
        [tmp_path / "0.bin"], 16, num_tokens, separator=SEPARATOR, context=context
    )
    read = all_rows(rows)
    inputs, targets = pairs_of(read)
    np.testing.assert_array_equal(targets, stream[1 : num_tokens + 1])
    np.testing.assert_array_equal(inputs, stream[:num_tokens])

    place, context = 0, min(context, 8)
    begins = np.flatnonzero(stream == SEPARATOR)
    for row in read:
        before = np.where(row < 0, ~row, row)
        for t in np.flatnonzero(row[1:] >= 0):
            begin = max([0, *begins[begins <= place]])  # of the document that predicts the next
            of_document = place - begin
            behind = before[: t + 1]
            since = np.flatnonzero(behind == SEPARATOR)
            in_row = t - (since[-1] if len(since) else 0)
            # All of its document, or as much as fits into the context.
            assert in_row == of_document or context <= in_row < of_document
            np.testing.assert_array_equal(behind[t - in_row :], stream[place - in_row : place + 1])
            place += 1
    assert place == num_tokens


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_divide_the_validation_rows_without_changing_them(tmp_path, devices):
    rows = ValidationRows(write(tmp_path, 34), T, 33)
    on_devices = put(make_mesh(devices), ROWS, (4, T + 1), partial(rows, 4, 4))
    expected = np.full(4 * T + 1, -1)
    expected[: 34 - 20] = np.arange(20, 34)
    np.testing.assert_array_equal(np.asarray(on_devices)[:, 1:].ravel(), expected[1:])
    # The first tokens of a row are read as context, but were targets in the previous row.
    np.testing.assert_array_equal(~np.asarray(on_devices)[:, 0], [20, 25, 30, 0])


def test_a_token_beyond_the_vocabulary_among_those_to_validate_on_is_refused(files):
    ValidationRows(files, T, num_tokens=11, vocab_size=12)
    with pytest.raises(ShardError, match=r"0\.bin has token 11 at position 11, "):
        ValidationRows(files, T, num_tokens=11, vocab_size=11)


def test_more_validation_tokens_than_there_are_is_an_error_that_tells_how_many(tmp_path):
    files = write(tmp_path, 12, 3)
    ValidationRows(files, T, 14)
    with pytest.raises(ShardError, match=r"val_tokens is 15, but .*0\.bin.* have 14 tokens"):
        ValidationRows(files, T, 15)
