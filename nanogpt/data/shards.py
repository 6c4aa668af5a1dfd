"""The .bin shard: a header of 256 little-endian int32, then the tokens as little-endian uint16.

    header[0] = 20240520  magic number
    header[1] = 1         version
    header[2] = n         number of tokens
    the rest is zero; the file is 1024 + 2n bytes long

This is the format of llm.c and modded-nanogpt, so their shards can be read directly.
"""

import os
import re
from errno import EMFILE, ENFILE
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

import numpy as np
from jaxtyping import UInt16
from numpy.typing import ArrayLike

from nanogpt.checks import UserError
from nanogpt.data.find import matches, why_no_file
from nanogpt.files import cannot_write, write_whole

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKEN_BYTES = 2
MAX_TOKENS = 2**31 - 1  # the header counts in int32
SUMS = "SHA256SUMS"  # beside the shards: their hashes, in the format of `sha256sum -c`
SAMPLE_BLOCK = 4096  # consecutive tokens in a sample: 8 KB, two pages of the file

Tokens = UInt16[np.ndarray, "tokens"]

REMAKE = "delete it, then download or create it again"


class ShardError(UserError):
    """A shard that cannot be used or written; the message is one sentence for the user."""


def write_shard(path: str | os.PathLike, tokens: ArrayLike) -> None:
    """Write `tokens` (1-D, any integer type, values 0..65535) as the shard `path`.

    The write is atomic. Raises ShardError if the tokens do not fit the format or the file cannot be
    written.
    """
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < tokens.size <= MAX_TOKENS:
        raise ShardError(
            f"Cannot write shard {path}: tokens have shape {tokens.shape}; "
            f"give one dimension of 1 to {MAX_TOKENS:,} tokens."
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ShardError(
            f"Cannot write shard {path}: tokens have type {tokens.dtype}; give integers."
        )
    for token in (tokens.min(), tokens.max()):
        if not 0 <= token <= 65535:
            raise ShardError(
                f"Cannot write shard {path}: token {token} does not fit in 16 bits; "
                "use a tokenizer whose ids are 0 to 65535."
            )

    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # pods share process ids
    try:
        with temporary.open("wb") as file:
            file.write(header.data)
            file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ShardError(cannot_write(path, error, "choose another folder")) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_shard(path: str | os.PathLike) -> Tokens:
    """Return the tokens of the shard `path` as a read-only uint16 memory map.

    Only the header is read here. Raises ShardError if the file is missing, is not a shard, or does
    not have the length that its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
    except OSError as error:
        many = error.errno in (EMFILE, ENFILE)
        advice = "raise the limit (`ulimit -n`)" if many else "check the path"
        raise ShardError(f"Cannot read shard {path}: {error.strerror}; {advice}.") from error
    if size < HEADER_BYTES:
        raise ShardError(
            f"Shard {path} is truncated: {size} bytes is less than its {HEADER_BYTES}-byte header; "
            f"{REMAKE}."
        )
    magic, version, count = (int(number) for number in header[:3])
    if magic != MAGIC:
        raise ShardError(
            f"{path} is not a shard: it starts with {magic} instead of {MAGIC}; convert raw uint16 "
            "tokens without a header (nanoGPT's train.bin) with nanogpt.data.shards.write_shard."
        )
    if version != VERSION:
        raise ShardError(
            f"Shard {path} has version {version} but only version {VERSION} can be read; "
            "create it again."
        )
    if size != HEADER_BYTES + TOKEN_BYTES * count:
        raise ShardError(
            f"Shard {path} is damaged: its header promises {count:,} tokens, "
            f"{HEADER_BYTES + TOKEN_BYTES * count:,} bytes in all, but it has {size:,}; {REMAKE}."
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def sample_of(tokens: Tokens, size: int) -> Tokens:
    """Return about `size` of the tokens of a shard, at least 1, or all if there are no more.

    The shard is divided into equal parts, with one block sampled from each, the first and last
    token included. The seed is fixed: for a given length, the positions are always the same.
    """
    if size >= len(tokens):
        return tokens[:]
    blocks = -(-size // SAMPLE_BLOCK)
    width = -(-size // blocks)
    parts = np.linspace(0, len(tokens), blocks + 1, dtype=np.int64)
    room = (np.diff(parts) - width + 1).astype(np.uint64)  # possible starts of a block in each part
    starts = parts[:-1] + (np.random.Philox(key=0).random_raw(blocks) % room).astype(np.int64)
    starts[0], starts[-1] = 0, len(tokens) - width
    return np.concatenate([tokens[start : start + width] for start in starts])


def check_vocabulary(path: str | os.PathLike, tokens: Tokens, vocab_size: int) -> None:
    """Raise ShardError for the first token of shard `path` that is not below `vocab_size`.

    This matters because JAX does not report indices beyond the end of a table.
    """
    for start in range(0, len(tokens), SAMPLE_BLOCK):
        beyond = tokens[start : start + SAMPLE_BLOCK] >= vocab_size
        if beyond.any():
            position = start + int(beyond.argmax())
            raise ShardError(
                f"Shard {path} has token {tokens[position]} at position {position:,}, but the "
                f"vocabulary has {vocab_size:,} tokens; use the model's own tokenizer for its data."
            )


def note_sha256(path: Path, sha256: str) -> None:
    """Record the SHA-256 of a shard in SHA256SUMS, beside the shards."""
    sums = path.with_name(SUMS)
    known = _sums(sums) | {path.name: sha256}
    write_whole(sums, "".join(f"{digest}  {name}\n" for name, digest in sorted(known.items())))


def noted_sha256(path: Path) -> str | None:
    """Return a shard's SHA-256 from SHA256SUMS; None if it has none or is older than the shard."""
    sums = path.with_name(SUMS)
    try:
        written = sums.stat().st_mtime_ns
        return (
            _sums_as_of(sums, written).get(path.name)
            if path.stat().st_mtime_ns <= written
            else None
        )
    except OSError:
        return None


@lru_cache(maxsize=1)  # so that it is not read again for every shard
def _sums_as_of(path: Path, written: int) -> dict[str, str]:
    return _sums(path)


def _sums(path: Path) -> dict[str, str]:
    """Return the hashes in SHA256SUMS by file name."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return {line[66:]: line[:64] for line in lines if re.match(r"[0-9a-f]{64}  .", line)}


def find_shards(pattern: str) -> list[Path]:
    """Return the files that match a path or glob, sorted by name; see nanogpt/data/find.py.

    Raises ShardError if there are none, or if the path exists but is not a file.
    """
    found = sorted(map(Path, matches(pattern)))
    shards = [path for path in found if path.is_file()]
    if not shards and len(found) == 1:
        problem = "is a folder" if found[0].is_dir() else why_no_file(found[0])
        raise ShardError(f"{pattern} {problem}: give shards, such as data/train_*.bin.")
    if not shards:
        raise ShardError(
            f"No shard matches {pattern} (seen from {Path.cwd()}): `python3 cached_fineweb10B.py "
            "12` downloads enough of FineWeb10B for the speedrun preset, 2.6 GB."
        )
    return shards
