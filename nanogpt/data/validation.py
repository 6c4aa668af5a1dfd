"""The validation tokens, in rows.

Every token is scored once, and the loss does not depend on the number of devices or of rows per
pass. It does depend on the context of each token:

- If attention stays within documents, a row consists of whole documents, and a token is predicted
  from all its document so far. A document longer than a row continues in the next row, which begins
  with the `context` tokens before it, as input only.
- Otherwise rows are cut anywhere, like the training rows of such a model: the first tokens of a row
  have little context.
"""

from bisect import bisect_right
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from nanogpt.data.shards import ShardError, check_vocabulary, read_shard


class ValidationRows:
    """Rows in which each of the shards' tokens 1 to `num_tokens` (from 0) is a target once.

    Rows have T + 1 tokens. A token t that is an input but not a target is stored as ~t: context
    scored in an earlier row, and -1 = ~0 as padding.

    Raises ShardError if the shards have fewer tokens, or one of these is beyond the vocabulary.
    """

    def __init__(
        self,
        files: list[Path],
        sequence_length: int,
        num_tokens: int,
        vocab_size: int = 2**16,
        *,
        separator: int | None = None,
        context: int = 0,
    ):
        """Build rows that are cut anywhere, or of whole documents if a `separator` begins each.

        Args:
            context: number of earlier tokens at the start of a row that continues a document;
                at most half a row is used.
        """
        available = max(0, sum(len(read_shard(file)) for file in files) - 1)
        if num_tokens > available:
            raise ShardError(
                f"val_tokens is {num_tokens:,}, but the validation shards ({files[0]}, ...) have "
                f"{available:,} tokens to predict: use fewer or add shards."
            )
        parts, missing = [], num_tokens + 1
        for file in files:
            parts.append(np.array(read_shard(file)[:missing]))  # a copy, so that the file is closed
            check_vocabulary(file, parts[-1], vocab_size)
            missing -= len(parts[-1])
            if not missing:
                break
        self.tokens = np.concatenate(parts)
        self.sequence_length = sequence_length
        if separator is None:
            starts = range(0, num_tokens, sequence_length)
            self._bounds = [(i, i, min(i + sequence_length, num_tokens)) for i in starts]
        else:
            self._bounds = self._documents(separator, min(context, sequence_length // 2))

    def _documents(self, separator: int, context: int) -> list[tuple[int, int, int]]:
        """Return for each row where it begins, where its targets begin, and where it ends."""
        T, N = self.sequence_length, len(self.tokens) - 1
        begins = [0, *(np.flatnonzero(self.tokens[1:N] == separator) + 1).tolist(), N]
        bounds, scored = [], 0
        while scored < N:
            document = bisect_right(begins, scored) - 1
            start = max(begins[document], scored - context)
            stop = begins[bisect_right(begins, start + T) - 1]  # end of the last whole document
            if stop <= scored:  # no whole document fits
                stop = start + T
            bounds.append((start, scored, stop))
            scored = stop
        return bounds

    def __len__(self) -> int:
        return len(self._bounds)

    def __call__(
        self, first: int, count: int, index: tuple[slice, ...] = ()
    ) -> Int32[np.ndarray, "count T1"]:
        """Return `count` rows from `first` on, or their part at `index`, padded with -1."""
        rows = np.full((count, self.sequence_length + 1), -1, np.int32)
        bounds = self._bounds[first : first + count]
        for row, (start, scored, stop) in zip(rows, bounds, strict=False):
            row[: stop + 1 - start] = self.tokens[start : stop + 1]
            read_only = row[: scored + 1 - start]  # the first token of a row is never a target
            np.invert(read_only, out=read_only)
        return rows[index]
