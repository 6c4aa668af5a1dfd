"""Writing shards one after the other, each a hidden file until it is full."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from nanogpt.data.shards import HEADER_BYTES, MAGIC, TOKEN_BYTES, VERSION, Tokens
from nanogpt.data.text.documents import DataError

RECORD = "prepared.json"  # records how far the shards of a folder are filled


def shard_name(stem: str, number: int) -> str:
    return f"{stem}_{number:06d}.bin"


def partial_path(folder: Path, name: str) -> Path:
    """Return the path of an unfinished shard: hidden, so that no shard pattern matches it."""
    return folder / f".{name}.partial"


class Shards:
    """Shards of at most `limit` tokens, written one after the other without buffering them."""

    def __init__(self, folder: Path, stem: str, number: int, length: int, limit: int):
        """Continue in shard `number` after its first `length` tokens."""
        self.folder, self.stem, self.limit = folder, stem, limit
        self._open(number, length)

    def write(self, tokens: Tokens) -> bool:
        """Write tokens; return whether a new shard was started."""
        first = self.number
        while len(tokens):
            if self.length == self.limit:
                self.end()
                self._open(self.number + 1, 0)
            now, tokens = np.split(tokens, [self.limit - self.length])
            self._file.write(np.ascontiguousarray(now, "<u2").data)
            self.length += len(now)
        return self.number > first

    def sync(self) -> None:
        """Flush everything written so far to disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())

    def end(self) -> None:
        """Write the shard's header and close it."""
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, self.length
        self._file.seek(0)
        self._file.write(header.data)
        self.sync()
        self._file.close()

    def close(self) -> None:
        """Close the file. If that fails, the next process writes the missing tokens again."""
        with suppress(OSError):
            self._file.close()

    def _open(self, number: int, length: int) -> None:
        path = partial_path(self.folder, shard_name(self.stem, number))
        end = HEADER_BYTES + TOKEN_BYTES * length
        if length and not (path.exists() and path.stat().st_size >= end):
            raise DataError(
                f"{path} is shorter than {RECORD} says: delete {self.folder}, then run this again."
            )
        self._file = path.open("r+b" if length else "wb")
        self._file.seek(end)  # any bytes after it are the same ones that will be written there
        self.number, self.length = number, length
