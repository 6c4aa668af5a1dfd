"""Encoding text files into shards, resuming after an interruption.

The shards are the same to the last byte whatever the number of processes. A document can span two
shards.

A shard is a hidden file until it is full. Every few seconds the written data is flushed, and a
small file, prepared.json, records which documents it contains; if this process is killed, another
continues from there. Full shards get their final names only after they are recorded.
"""

import json
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from glob import escape
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from nanogpt.checks import Positive, Total
from nanogpt.data.shards import note_sha256
from nanogpt.data.text.documents import DataError, Split
from nanogpt.data.text.encode import (
    TOLD,
    Encoded,
    Inputs,
    encode_batch,
    in_order,
    read_batches,
    split_of,
    tokenizer_of,
)
from nanogpt.data.text.eta import Pace
from nanogpt.data.text.writer import RECORD, Shards, partial_path, shard_name
from nanogpt.files import cannot_write, lock_file, read_json, sha256_of, write_whole

FORMAT = 2  # increase it if the same documents would be split, ordered or written differently
SAVE_SECONDS = 5.0  # an interruption loses at most this much work
SHARD_TOKENS = 100_000_000  # as in FineWeb10B's shards


class Recipe(NamedTuple):
    """Everything besides the inputs that determines the shards."""

    tokenizer: str
    field: str = "text"
    name: str = "text"  # prefix of the shards' names
    shard_tokens: int = SHARD_TOKENS


@dataclass
class Made:
    """The contents of a folder's shards so far, saved there as prepared.json."""

    fingerprint: str  # of inputs and recipe
    shard_tokens: Positive
    below: int | None = None  # the Split
    next: tuple[Total, Total] = (0, 0)  # file, and number of its units in the shards
    train: tuple[Total, Total] = (1, 0)  # number of the last shard, and its tokens
    val: tuple[Total, Total] = (0, 0)
    input_bytes: Total = 0
    documents: Total = 0
    empty: Total = 0  # number of empty documents, left out
    bad: Total = 0  # number of unreadable documents and parts of files, left out
    problems: list[str] = field(default_factory=list)  # where and why, for the first TOLD of them
    latest: tuple[str, Total] = ("", 0)  # a document that may continue, and its tokens
    longest: tuple[str, Total] = ("", 0)  # the document with most tokens
    done: bool = False

    @property
    def train_tokens(self) -> int:
        return (self.train[0] - 1) * self.shard_tokens + self.train[1]

    @property
    def val_tokens(self) -> int:
        return self.val[0] * self.shard_tokens + self.val[1]

    def add(self, encoded: Encoded, next: tuple[int, int]) -> None:
        """Count a batch that was written."""
        self.next = next
        self.input_bytes += encoded.input_bytes
        self.documents += encoded.documents
        self.empty += encoded.empty
        self.bad += encoded.bad
        self.problems += encoded.problems[: TOLD - len(self.problems)]
        where, tokens = encoded.longest
        self.latest = (where, tokens + self.latest[1] * (where == self.latest[0]))
        self.longest = max(self.longest, self.latest, key=itemgetter(1))

    @property
    def dominant(self) -> str:
        """The document with more than half of all tokens, if there are several; else empty."""
        where, tokens = self.longest
        most = 2 * tokens > self.train_tokens + self.val_tokens
        return where if self.documents > 1 and most else ""

    def summary(self) -> str:
        """Return a summary of the shards and of what was left out."""
        documents = f"{self.documents:,} document{'s' * (self.documents != 1)}"
        text = (
            f"{documents}: {self.train_tokens:,} tokens for training and {self.val_tokens:,} for "
            "validation"
        )
        text += ", the last tenth of each document." if self.below is None else "."
        if self.dominant:
            text += f" More than half of all tokens are from one document, {self.dominant}."
        left_out = [f"{self.empty:,} empty"] if self.empty else []
        if self.bad:
            more = ["..."] if self.bad > len(self.problems) else []
            told = "; ".join(self.problems + more)
            left_out.append(f"{self.bad:,} that could not be read ({told})")
        if left_out:
            text += f" Left out: {' and '.join(left_out)}."
        return text


def make_shards(
    inputs: Inputs,
    folder: Path,
    recipe: Recipe,
    processes: int,
    show: Callable[[str], None] = lambda line: None,
) -> Made:
    """Write the shards of `inputs` to `folder`, continuing the work of an interrupted process.

    They are called `name`_train_000001.bin, ... and `name`_val_000000.bin, ... If several
    processes do this in one folder, one works and the others wait for it. `show` is called with
    lines of progress. Raises DataError if the inputs have no document, or if the folder has other
    shards or cannot be written; ConfigError if its record is damaged; TokenizerError if the
    vocabulary is missing; and the errors of `inputs.get`.
    """
    fingerprint = fingerprint_of(inputs, recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, show):
            made = read_record(folder, fingerprint, recipe)
            if made is None:
                split = split_of(inputs, recipe.field)
                made = Made(fingerprint, recipe.shard_tokens, split.below)
            if not made.done:
                encode_rest(inputs, folder, recipe, made, processes, show)
            return made
    except BrokenProcessPool as error:
        raise DataError(
            "A worker was killed, perhaps because memory ran out: run this again with fewer "
            "processes to continue where it stopped."
        ) from error
    except OSError as error:
        otherwise = (
            "choose another folder (--out; XDG_CACHE_HOME with --data), then run this again to "
            "continue where it stopped"
        )
        raise DataError(cannot_write(folder, error, otherwise)) from error


def fingerprint_of(inputs: Inputs, recipe: Recipe) -> str:
    """Return a hash that changes with any input and with the recipe."""
    return sha256(json.dumps([FORMAT, inputs.fingerprint, recipe]).encode()).hexdigest()


def encode_rest(
    inputs: Inputs,
    folder: Path,
    recipe: Recipe,
    made: Made,
    processes: int,
    show: Callable[[str], None],
) -> None:
    """Encode everything that is not in the shards yet, updating `made`."""
    tokenizer_of(recipe.tokenizer)  # report a missing vocabulary before the workers start
    train = Shards(folder, f"{recipe.name}_train", *made.train, recipe.shard_tokens)
    val = Shards(folder, f"{recipe.name}_val", *made.val, recipe.shard_tokens)

    def save() -> None:
        """Save the state from which another process can continue."""
        train.sync()
        val.sync()
        write_whole(folder / RECORD, json.dumps(asdict(made), indent=2))
        name_shards(folder, recipe, made)
        inputs.release(inputs.names[: made.next[0]])

    split, pace, saved = Split(made.below), Pace(inputs.weights), time.monotonic()
    batches = read_batches(inputs, recipe.field, split, made.next)
    work = partial(encode_batch, recipe.tokenizer, recipe.field, split)
    with closing(train), closing(val):
        for encoded, place in in_order(work, batches, processes):
            filled = [train.write(encoded.train), val.write(encoded.val)]
            made.add(encoded, place.next)
            made.train, made.val = (train.number, train.length), (val.number, val.length)
            tokens = made.train_tokens + made.val_tokens
            show(pace.line(made.next[0], place.share, made.input_bytes, tokens))
            if any(filled) or time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
        train.end()
        val.end()
        made.done = True
        save()


@contextmanager
def locked(folder: Path, show: Callable[[str], None]) -> Generator[None, None, None]:
    """Lock `folder` for one process at a time."""
    try:
        lock = lock_file(folder / ".lock")
    except Timeout:
        show(f"waiting for another process that is writing to {folder}")
        lock = lock_file(folder / ".lock", timeout=-1)
    try:
        yield
    finally:
        lock.release()


def read_record(folder: Path, fingerprint: str, recipe: Recipe) -> Made | None:
    """Read an earlier process's record for the same inputs, if any, and name its full shards.

    Raises DataError if the folder has other shards.
    """
    path = folder / RECORD
    if path.exists():
        made = read_json(path, Made, "choose another folder, or delete it")
        if made.fingerprint != fingerprint:
            raise DataError(
                f"{folder} has shards of other inputs or other settings: choose another folder, "
                "or delete it."
            )
        name_shards(folder, recipe, made)
        return made
    for shard in folder.glob(f"{escape(recipe.name)}_*.bin"):
        raise DataError(f"{shard} was not written by this program: choose another folder.")
    return None


def name_shards(folder: Path, recipe: Recipe, made: Made) -> None:
    """Rename full shards, or all if the work is done, to their final names."""
    for split, first, last in (("train", 1, made.train[0]), ("val", 0, made.val[0])):
        for number in range(first, last + made.done):
            name = shard_name(f"{recipe.name}_{split}", number)
            filled = partial_path(folder, name)
            if filled.exists():
                note_sha256(folder / name, sha256_of(filled))
                os.replace(filled, folder / name)
            elif not (folder / name).exists():
                raise DataError(
                    f"{folder / name} is missing: delete {folder}, then run this again."
                )
