"""The tokens that a model is validated on, in rows.

Every token is scored once, and the loss does not depend on how many devices there are or how many
rows each takes at a time. It does depend on what a token is predicted from:

- Where attention stays within documents, a row is whole documents, and a token is predicted from
  all of its document, as a text by itself would be. A document that is longer than a row goes on
  in the next one, which begins with the `context` tokens before, to be read but not scored.
- Else rows are cut anywhere, as those that such a model is trained on are: the first tokens of a
  row are predicted from few.
"""

from bisect import bisect_right
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from nanogpt.data.shards import ShardError, check_vocabulary, read_shard


class ValidationRows:
    """The first `num_tokens` tokens of the shards after the very first, every one a target once.

    Rows have T + 1 tokens. What is read but is no target is ~t instead of the token t: what was
    scored before, and -1, which is ~0, after the end of a row.

    Raises ShardError when the shards hold fewer tokens, or one beyond the vocabulary among them.
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
        """Rows cut anywhere, or with a `separator`, which begins each document, whole documents.

        Args:
            context: how many tokens before it a row begins with where it goes on in a document;
                at most half a row.
        """
        available = max(0, sum(len(read_shard(file)) for file in files) - 1)
        if num_tokens > available:
            raise ShardError(
                f"val_tokens is {num_tokens:,}, but the validation shards ({files[0]}, ...) have "
                f"{available:,} tokens to predict: ask for fewer or add shards."
            )
        parts, missing = [], num_tokens + 1
        for file in files:
            parts.append(np.array(read_shard(file)[:missing]))  # a copy: the file is closed
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
        """Where each row begins, where it begins to be scored, and where it ends."""
        T, N = self.sequence_length, len(self.tokens) - 1
        begins = [0, *(np.flatnonzero(self.tokens[1:N] == separator) + 1).tolist(), N]
        bounds, scored = [], 0
        while scored < N:
            document = bisect_right(begins, scored) - 1
            start = max(begins[document], scored - context)
            stop = begins[bisect_right(begins, start + T) - 1]  # of the last whole document
            if stop <= scored:  # there is none
                stop = start + T
            bounds.append((start, scored, stop))
            scored = stop
        return bounds

    def __len__(self) -> int:
        return len(self._bounds)

    def __call__(
        self, first: int, count: int, index: tuple[slice, ...] = ()
    ) -> Int32[np.ndarray, "count T1"]:
        """`count` rows from `first` on, or the part at `index`; after the end all is -1."""
        rows = np.full((count, self.sequence_length + 1), -1, np.int32)
        bounds = self._bounds[first : first + count]
        for row, (start, scored, stop) in zip(rows, bounds, strict=False):
            row[: stop + 1 - start] = self.tokens[start : stop + 1]
            read_only = row[: scored + 1 - start]  # the first token of a row is never a target
            np.invert(read_only, out=read_only)
        return rows[index]
