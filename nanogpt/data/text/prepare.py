"""Shards from files of text, and again from where that was after an interruption.

The shards are the same to the last byte whatever the number of processes. A document goes on in the
next shard where one is full.

Until it is full a shard is a hidden file. Every few seconds what was written is flushed and a small
file, prepared.json, tells up to which document that is; from there another process goes on after
this one was killed. Only then do the shards that are full get their names.
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
from nanogpt.files import lock_file, read_json, sha256_of, write_whole

FORMAT = 2  # raise it when the same documents would be split, ordered or written differently
SAVE_SECONDS = 5.0  # what an interruption costs at most
SHARD_TOKENS = 100_000_000  # as FineWeb10B's shards have


class Recipe(NamedTuple):
    """All that determines the shards besides the inputs."""

    tokenizer: str
    field: str = "text"
    name: str = "text"  # what the names of the shards begin with
    shard_tokens: int = SHARD_TOKENS


@dataclass
class Made:
    """What is in the shards of a folder so far; kept there as prepared.json."""

    fingerprint: str  # of inputs and recipe
    shard_tokens: Positive
    below: int | None = None  # the Split
    next: tuple[Total, Total] = (0, 0)  # file, and how many of its units are in the shards
    train: tuple[Total, Total] = (1, 0)  # number of the last shard and its tokens
    val: tuple[Total, Total] = (0, 0)
    input_bytes: Total = 0
    documents: Total = 0
    empty: Total = 0  # documents left out
    bad: Total = 0  # documents and rests of files left out
    problems: list[str] = field(default_factory=list)  # where and why, of the first TOLD bad ones
    latest: tuple[str, Total] = ("", 0)  # a document that may go on, and its tokens
    longest: tuple[str, Total] = ("", 0)  # the document with most tokens
    done: bool = False

    @property
    def train_tokens(self) -> int:
        return (self.train[0] - 1) * self.shard_tokens + self.train[1]

    @property
    def val_tokens(self) -> int:
        return self.val[0] * self.shard_tokens + self.val[1]

    def add(self, encoded: Encoded, next: tuple[int, int]) -> None:
        """Count what was written."""
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
        """The document that has more than half of all tokens, if one of several has."""
        where, tokens = self.longest
        most = 2 * tokens > self.train_tokens + self.val_tokens
        return where if self.documents > 1 and most else ""

    def summary(self) -> str:
        """What is in the shards, and what was left out."""
        documents = f"{self.documents:,} document{'s' * (self.documents != 1)}"
        text = (
            f"{documents}: {self.train_tokens:,} tokens to train on and {self.val_tokens:,} to "
            "validate on"
        )
        text += ", the last tenth of each document." if self.below is None else "."
        if self.dominant:
            text += f" More than half of all tokens are of one document, {self.dominant}."
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
    """Make the shards of `inputs` in `folder`, or what an interrupted process left to be made.

    They are called `name`_train_000001.bin, ... and `name`_val_000000.bin, ... Where several
    processes do this in one folder, one does and the others find it done. `show` gets lines that
    tell how far it is. Raises DataError if the inputs hold no document, if the folder holds other
    shards or cannot be written; ConfigError if its record is damaged; TokenizerError if the
    vocabulary is missing; and what `inputs.get` raises.
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
            "A worker was killed, as happens where memory runs out: run this again with fewer "
            "processes to continue where it stopped."
        ) from error
    except OSError as error:
        raise DataError(
            f"Cannot write in {folder} ({error.strerror or error}): make room there or choose "
            "another folder, then run this again to continue where it stopped."
        ) from error


def fingerprint_of(inputs: Inputs, recipe: Recipe) -> str:
    """What changes with any input, and with what is made of it."""
    return sha256(json.dumps([FORMAT, inputs.fingerprint, recipe]).encode()).hexdigest()


def encode_rest(
    inputs: Inputs,
    folder: Path,
    recipe: Recipe,
    made: Made,
    processes: int,
    show: Callable[[str], None],
) -> None:
    """Encode what is not in the shards yet, and update `made`."""
    tokenizer_of(recipe.tokenizer)  # what is missing is told before the workers miss it
    train = Shards(folder, f"{recipe.name}_train", *made.train, recipe.shard_tokens)
    val = Shards(folder, f"{recipe.name}_val", *made.val, recipe.shard_tokens)

    def save() -> None:
        """From here another process goes on."""
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
    """One process at a time in `folder`."""
    try:
        lock = lock_file(folder / ".lock")
    except Timeout:
        show(f"waiting for another process that writes in {folder}")
        lock = lock_file(folder / ".lock", timeout=-1)
    try:
        yield
    finally:
        lock.release()


def read_record(folder: Path, fingerprint: str, recipe: Recipe) -> Made | None:
    """What an earlier process made of the same inputs; DataError if the folder holds other shards.

    All shards that are full have their names then.
    """
    path = folder / RECORD
    if path.exists():
        made = read_json(path, Made, "choose another folder, or delete it")
        if made.fingerprint != fingerprint:
            raise DataError(
                f"{folder} holds shards of other inputs, or made with other settings: choose "
                "another folder, or delete it."
            )
        name_shards(folder, recipe, made)
        return made
    for shard in folder.glob(f"{escape(recipe.name)}_*.bin"):
        raise DataError(f"{shard} was made by something else: choose another folder.")
    return None


def name_shards(folder: Path, recipe: Recipe, made: Made) -> None:
    """Give the shards that are full, or all when it is done, their names."""
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
