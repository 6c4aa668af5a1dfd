"""Batches as a pure function of (shards, row number), so that resuming needs no other state.

A row is T + 1 tokens of one shard (T1 in the shapes below): T inputs, each with the next token as
its target. There are two kinds:

- A plain row is consecutive tokens. The rows of a shard overlap by one token and leave out a tail
  shorter than T. Nearly all tokens are used, but a row starts wherever the one before it ended: its
  first tokens are usually in the middle of a document, and predicted without the context before.
- An aligned row is made of document beginnings: up to `max_document` tokens of a document, from its
  separator on, then the same of the next document, and so on until the row is full. It cuts off its
  last document, and the next row starts with the document after that. Every token is thus predicted
  with the context from its document's start, and no long document fills row after row. Skipping
  tokens costs nothing if there are more than a run needs (modded-nanogpt, 2025-07-12, 2025-09-03).

Rows are numbered in training order, independent of the number of devices and micro-batches; numbers
beyond the last row start a new epoch in a new order. The numbering can start anywhere in the
shards, so that a run that changes T continues at the same place in the data.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt16

from nanogpt.data.shards import (
    HEADER_BYTES,
    TOKEN_BYTES,
    ShardError,
    Tokens,
    check_vocabulary,
    read_shard,
)
from nanogpt.schedule import Schedule

OPEN = 64  # shards kept open; the system allows a few hundred open files


class Rows:
    """The rows of T + 1 tokens in a list of shards.

    A shard is searched for documents when a row number first reaches it, so a run reads only the
    shards it trains on; only a shuffled epoch and `len` search all of them. The results are cached
    without a lock: use an instance from one thread at a time.

    Raises ShardError if a shard cannot be read or there is not a single row, and, when a row is
    read, if it has a token beyond the vocabulary.
    """

    def __init__(
        self,
        files: list[Path],
        sequence_length: int,
        seed: int,
        shuffle: bool,
        vocab_size: int = 2**16,
        *,
        separator: int | None = None,
        max_document: int | None = None,
        start: int = 0,
    ):
        """Find plain rows, or aligned rows if `max_document` is given.

        Args:
            shuffle: whether to shuffle the first epoch, too; later ones always are. Shards of
                documents that are already in random order, like FineWeb's, read faster unshuffled.
            separator: the token that begins each document. Aligned rows require it, and skip
                everything in a shard before its first separator.
            max_document: most tokens of a document in an aligned row, its separator included.
            start: where an epoch begins, in tokens over all shards end to end. It wraps around
                from the last shard to the first and ends where it began.
        """
        self.files, self.vocab_size = files, vocab_size
        self.lengths = [len(read_shard(file)) for file in files]
        self._shard = lru_cache(maxsize=OPEN)(lambda shard: read_shard(files[shard]))
        self.sequence_length = sequence_length
        self.separator, self.max_document = separator, max_document
        self.seed, self.shuffle, self.start = seed, shuffle, start
        self.offsets = np.cumsum([0, *self.lengths]).tolist()
        self._segments = [*self._between(start, self.offsets[-1]), *self._between(0, start)]
        self._bounds = []  # of each segment searched so far: see _bounds_of
        self._ends = [0]  # number of rows up to the end of each of them
        self._order = lru_cache(maxsize=2)(self._order_of)
        if not self._reaches(0):
            kind = f"row of {sequence_length + 1} tokens"
            remedy = "use more data or a shorter sequence_length"
            if max_document is not None:
                kind += f" that begins with the document separator {separator}"
                remedy += ", or set max_document_length to None"
            raise ShardError(f"The shards ({files[0]}, ...) hold no {kind}: {remedy}.")

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        self._reaches(self.offsets[-1])  # beyond the last row, so that all segments are searched
        return self._ends[-1]

    def __call__(self, numbers: Int64[np.ndarray, "*R"]) -> Int32[np.ndarray, "*R T1"]:
        """Return the rows with these numbers, which continue from one epoch to the next."""
        rows = np.empty((numbers.size, self.sequence_length + 1), np.int32)
        for row, number in zip(rows, numbers.flat, strict=True):
            row[:] = self._read(*self._find(self._unshuffled(int(number))))
        return rows.reshape(*numbers.shape, -1)

    def offset(self, number: int) -> int:
        """Return the start of row `number` of the unshuffled order, in tokens over all shards.

        Rows with that `start` and any T continue with the tokens after row `number` - 1. For
        numbers from len(rows) on it is the start of these rows, where their epoch ends.
        """
        if not self._reaches(number):
            return self.start
        shard, begin, _ = self._find(number)
        return self.offsets[shard] + begin

    def _between(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the segments (shard, first, last) of the shards between two offsets."""
        for shard, offset in enumerate(self.offsets[:-1]):
            first = max(start - offset, 0)
            last = min(stop - offset, self.lengths[shard])
            if first < last:
                yield shard, first, last

    def _reaches(self, number: int) -> bool:
        """Return whether an epoch has a row `number`, searching no more segments than needed."""
        while self._ends[-1] <= number and len(self._bounds) < len(self._segments):
            self._bounds.append(self._bounds_of(*self._segments[len(self._bounds)]))
            self._ends.append(self._ends[-1] + len(self._bounds[-1]) - 1)
        return number < self._ends[-1]

    def _bounds_of(self, shard: int, first: int, last: int) -> range | Int64[np.ndarray, "bounds"]:
        """Return where in the shard each row of a segment begins, and where the last one ends."""
        T, tokens = self.sequence_length, self._tokens(shard)
        if self.max_document is None:
            return range(first, min(last, len(tokens) - 1) + 1, T)
        bounds = np.append(first + np.flatnonzero(tokens[first:last] == self.separator), last)
        lengths = np.minimum(np.diff(bounds), self.max_document)
        taken = np.append(0, np.cumsum(lengths))  # tokens used of the documents before each
        # The document after a row that begins at each; len(bounds) if the row would not be full.
        following = np.searchsorted(taken, taken + T + 1).tolist()
        chain = [0]
        while following[chain[-1]] < len(bounds):
            chain.append(following[chain[-1]])
        return bounds[chain]

    def _unshuffled(self, number: int) -> int:
        """Return the number in unshuffled order of the row with this number in training."""
        if not self.shuffle and self._reaches(number):
            return number
        epoch, index = divmod(number, len(self))
        return int(self._order(epoch)[index])

    def _order_of(self, epoch: int) -> Int64[np.ndarray, "rows"]:
        """Return the order of an epoch's rows, which depends only on seed and epoch."""
        # Philox's raw output is fixed for all versions of NumPy; `permutation` is not.
        key = np.array([self.seed, epoch], np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(len(self)), kind="stable")

    def _find(self, number: int) -> tuple[int, int, int]:
        """Return the shard of row `number` in unshuffled order, and the row's bounds in it."""
        segment = bisect_right(self._ends, number) - 1
        row = number - self._ends[segment]
        begin, end = self._bounds[segment][row : row + 2]
        return self._segments[segment][0], int(begin), int(end)

    def _tokens(self, shard: int) -> Tokens:
        """Return the tokens of a shard; raises ShardError if the size of its file has changed.

        Reading a memory map beyond the end of its file would kill the process.
        """
        tokens, file = self._shard(shard), self.files[shard]
        size = HEADER_BYTES + TOKEN_BYTES * self.lengths[shard]
        with suppress(FileNotFoundError):  # a deleted file stays readable while it is open
            if file.stat().st_size != size:
                raise ShardError(
                    f"Shard {file} has changed since the run began: restore it, then resume from "
                    "the newest checkpoint (--resume)."
                )
        return tokens

    def _read(self, shard: int, begin: int, end: int) -> UInt16[np.ndarray, "T1"]:
        tokens, width = self._tokens(shard), self.sequence_length + 1
        if self.max_document is None:
            row = tokens[begin : begin + width]
        else:
            span = tokens[begin:end]
            documents = np.split(span, np.flatnonzero(span == self.separator))
            row = np.concatenate([document[: self.max_document] for document in documents])[:width]
        if row.max() >= self.vocab_size:  # JAX would silently look up another token's embedding
            check_vocabulary(self.files[shard], tokens, self.vocab_size)
        return row


def train_batch(
    rows: Rows, first: int, shape: tuple[int, int], index: tuple[slice, ...] = ()
) -> Int32[np.ndarray, "Ng R T1"]:
    """Return the micro-batches of the rows from number `first` on.

    Args:
        shape: (Ng, R), the number of micro-batches and of rows in each.
        index: the part of the batch to read, as slices of [Ng, R, T + 1]; all by default.
    """
    numbers = first + np.arange(shape[0] * shape[1]).reshape(shape)
    return rows(numbers[index[:2]])


class RowOrder:
    """The rows that each step of a schedule trains on."""

    def __init__(
        self, make: Callable[[int, int | None, int], Rows], schedule: Schedule, shuffle: bool
    ):
        """`make(T, longest_document, start)` returns rows numbered from token `start` on."""
        self.make, self.schedule, self.shuffle = make, schedule, shuffle
        self._first = lru_cache(maxsize=None)(self._first_of)

    def __call__(self, step: int) -> tuple[Rows, int]:
        """Return the rows for a step, counted from 1, and the number of its first row."""
        return self._after(self.schedule.stage(step), step)

    def _after(self, stage: int, step: int) -> tuple[Rows, int]:
        """Return the rows of a stage, and the number of the first one not used before `step`."""
        rows, first = self._first(stage)
        steps = step - self.schedule.first_step(stage)
        return rows, first + steps * self.schedule.tokens_per_step(stage) // rows.sequence_length

    def _first_of(self, stage: int) -> tuple[Rows, int]:
        """Return a stage's rows and its first one's number, which goes on if rows stay alike."""
        kind = self.schedule.row_kind(stage)
        if stage == 0:
            return self.make(*kind, 0), 0
        rows, used = self._after(stage - 1, self.schedule.first_step(stage))
        if kind == self.schedule.row_kind(stage - 1):
            return rows, used
        if self.shuffle:
            return self.make(*kind, 0), -(-used * rows.sequence_length // kind[0])
        return self.make(*kind, rows.offset(used)), 0
