"""Batches as a pure function of (shards, position): nothing to save, nothing to lose.

A row is T + 1 neighbouring tokens of one shard, so that T of them have a successor to predict; the
rows of a shard overlap by that one token and leave out a tail shorter than T. `position` counts
the tokens trained on so far. Row number position / T comes next, whatever the number of devices
or micro-batches; numbers beyond the last row begin a new epoch in a new order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int, Int32, Int64

from nanogpt.shards import ShardError, check_vocabulary, read_shard

Result = TypeVar("Result")


class Rows:
    """The rows of T + 1 tokens that lie in a list of shards.

    Raises ShardError when a shard cannot be read or all are too short for a single row, and, when
    the row is read that holds it, for a token beyond the vocabulary.
    """

    def __init__(
        self,
        files: list[Path],
        sequence_length: int,
        seed: int,
        shuffle: bool,
        vocab_size: int = 2**16,
    ):
        """`shuffle` says whether the first epoch, too, visits the rows in random order.

        Shards whose documents were shuffled when they were made, like FineWeb's, read faster in
        the order they have.
        """
        self.files, self.vocab_size = files, vocab_size
        self.shards = [read_shard(file) for file in files]
        self.sequence_length = sequence_length
        self.seed, self.shuffle = seed, shuffle
        counts = [max(0, len(shard) - 1) // sequence_length for shard in self.shards]
        self.ends = np.cumsum(counts)  # row numbers of one epoch at which each shard ends
        if len(self) == 0:
            raise ShardError(
                f"The shards ({files[0]}, ...) hold no row of {sequence_length + 1} tokens: use "
                "more data or a shorter sequence_length."
            )
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return int(self.ends[-1])

    def __call__(self, numbers: Int64[np.ndarray, "*R"]) -> Int32[np.ndarray, "*R T+1"]:
        """The rows with these numbers, which count on through the epochs."""
        rows = np.empty((numbers.size, self.sequence_length + 1), np.int32)
        for row, number in zip(rows, numbers.flat, strict=True):
            epoch, index = divmod(int(number), len(self))
            row[:] = self._read(int(self._order(epoch)[index]))
        return rows.reshape(*numbers.shape, -1)

    def _read(self, index: int) -> Int[np.ndarray, "T+1"]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (int(self.ends[shard - 1]) if shard else 0)) * self.sequence_length
        row = self.shards[shard][start : start + self.sequence_length + 1]
        if row.max() >= self.vocab_size:  # JAX would read some other row of a table, in silence
            check_vocabulary(self.files[shard], self.shards[shard], self.vocab_size)
        return row

    def _order_of(self, epoch: int) -> Int64[np.ndarray, "rows"]:
        """Which row comes when in an epoch: a permutation that depends on seed and epoch alone."""
        if epoch == 0 and not self.shuffle:
            return np.arange(len(self))
        # Philox's raw output is fixed for all versions of NumPy; `permutation` is not.
        key = np.array([self.seed, epoch], np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(len(self)), kind="stable")


def train_batch(
    rows: Rows, position: int, shape: tuple[int, int], index: tuple[slice, ...] = ()
) -> Int32[np.ndarray, "Ng R T+1"]:
    """Micro-batches of the rows that follow `position`, the number of tokens trained on so far.

    Args:
        shape: (Ng, R), micro-batches and rows in each.
        index: the part of the batch to read, as slices of [Ng, R, T + 1]; all by default.
    """
    first = position // rows.sequence_length
    numbers = first + np.arange(shape[0] * shape[1]).reshape(shape)
    return rows(numbers[index[:2]])


class ValidationRows:
    """The first `num_tokens` tokens of the shards after the very first, every one a target once.

    Rows have T + 1 tokens and overlap by one; the last is filled up with -1, which counts nothing.
    Raises ShardError when the shards hold fewer tokens, or one beyond the vocabulary among them.
    """

    def __init__(
        self, files: list[Path], sequence_length: int, num_tokens: int, vocab_size: int = 2**16
    ):
        shards = [read_shard(file) for file in files]
        available = sum(map(len, shards)) - 1
        if num_tokens > available:
            raise ShardError(
                f"val_tokens is {num_tokens:,}, but the validation shards ({files[0]}, ...) have "
                f"{available:,} tokens to predict: ask for fewer or add shards."
            )
        parts, missing = [], num_tokens + 1
        for file, shard in zip(files, shards, strict=True):
            parts.append(shard[:missing])
            check_vocabulary(file, parts[-1], vocab_size)
            missing -= len(parts[-1])
        self.tokens = np.concatenate(parts)
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.sequence_length)

    def __call__(
        self, first: int, count: int, index: tuple[slice, ...] = ()
    ) -> Int32[np.ndarray, "count T+1"]:
        """`count` rows from `first` on, or the part at `index`; after the end all is -1."""
        T = self.sequence_length
        tokens = self.tokens[first * T : (first + count) * T + 1]
        padded = np.full(count * T + 1, -1, np.int32)
        padded[: len(tokens)] = tokens
        return np.lib.stride_tricks.sliding_window_view(padded, T + 1)[::T][index]


def prefetch(
    make: Callable[[int], Result], steps: Iterable[int], ahead: int = 2
) -> Iterator[Result]:
    """`make(step)` for each step in order, made by a thread up to `ahead` steps early.

    An exception in `make` is raised at the step it belongs to.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        waiting = deque()
        for step in steps:
            waiting.append(worker.submit(make, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
