"""Documents: the files they come from, and the validation split."""

import json
import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from nanogpt.checks import UserError
from nanogpt.data.find import files_below, matches, why_no_file
from nanogpt.data.text.unpacked import suffixes

VALIDATION = 100  # one document in this many is for validation, by its hash ...
FEW = 1000  # ... unless there are fewer than this many documents ...
LAST_SHARE = 10  # ... in which case one character in this many is


class DataError(UserError):
    """Inputs that cannot be encoded into shards; the message is one sentence for the user."""


class Files(NamedTuple):
    """Files on this machine, in reading order."""

    names: list[str]
    weights: list[int]  # bytes: the weight of each file in the progress
    fingerprint: str  # changes with any name, size or time of modification

    def get(self, name: str) -> Path:
        """Return the path of a file."""
        return Path(name)

    def release(self, names: Sequence[str]) -> None:
        """Release files when their documents are in the shards; here there is nothing to do."""


def find_files(inputs: Sequence[str], leave_out: Path | None = None) -> Files:
    """Return the files given by `inputs`: files, folders with everything below them, and globs.

    They are in the order of the inputs, sorted by name within each, without duplicates. Names in
    folders that begin with a dot are skipped, as is the folder `leave_out`. Raises DataError if an
    input matches no file, or if a file needs a package that is not installed.
    """
    found: dict[str, Path] = {}
    for given in inputs:
        places = matches(given)
        files = sorted({file for place in places for file in files_below(place, leave_out)})
        if len(places) == len(files) == 1 and (problem := why_no_file(files[0])):
            raise DataError(f"{given} {problem}: give a file, which may be compressed.")
        if not files:
            raise DataError(f"{given} (seen from {Path.cwd()}) matches no file: check the path.")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    for file in found.values():
        kinds = suffixes(file)
        if kinds & {".parquet", ".pq", ".zst"} and find_spec("pyarrow") is None:
            raise DataError(f"To read {file}, run `pip install pyarrow`.")
        if kinds & {".parquet", ".pq"} and len(kinds) > 1:
            raise DataError(f"{file} is a compressed Parquet file: unpack it first.")
    facts = [*map(_facts, found.values())]
    fingerprint = sha256(json.dumps(facts).encode()).hexdigest()
    return Files([name for name, _, _ in facts], [size for _, size, _ in facts], fingerprint)


def _facts(file: Path) -> tuple[str, int, int]:
    """Return name, size and mtime in ns; zeros if the file is missing, which is reported later."""
    try:
        status = file.stat()
    except OSError:
        return str(file), 0, 0
    return str(file), status.st_size, status.st_mtime_ns


class Split(NamedTuple):
    """The validation split."""

    below: int | None  # documents with smaller digests; None: the last tenth of every document

    def is_validation(self, digest: int) -> bool:
        """Return whether a whole document is for validation."""
        return self.below is not None and digest < self.below


def find_split(documents: Iterable[tuple[int, int]]) -> Split | None:
    """Choose the split of documents (digest, characters), reading no more than needed.

    One document in a hundred is for validation, by its digest. With few documents, validation gets
    those with the smallest digests that add up to a tenth of the text, or, if they exceed a fifth,
    the last tenth of every document. Returns None if there is no document.
    """
    usual = 2**64 // VALIDATION
    few: dict[int, int] = {}  # characters of the documents with each digest
    least, most = 2**64, -1
    for number, (digest, length) in enumerate(documents, start=1):
        least, most = min(least, digest), max(most, digest)
        if number < FEW:
            few[digest] = few.get(digest, 0) + length
        elif least < usual <= most:
            return Split(usual)
    if not few:
        return None
    validation, share = 0, sum(few.values()) / LAST_SHARE
    for digest in sorted(few):
        validation += few[digest]
        if share <= validation <= 2 * share and digest < most:
            return Split(digest + 1)
        if validation > 2 * share:
            break
    cuttable = max(few.values()) >= LAST_SHARE or len(few) == 1
    return Split(None if cuttable else least + 1)


class Unit(NamedTuple):
    """A document, a part of a long one, or the reason why there is none."""

    where: str  # file, and line or row, for messages
    raw: bytes = b""  # the text, or JSON that contains it
    is_json: bool = False
    problem: str = ""  # why there is no document
    digest: int | None = None  # of the whole document, if already known
    begins: bool = True  # whether this is the start of a document
    length: int = 0  # characters of the whole document, if known
    is_last_share: bool = False  # whether this is the part of a document for validation
    share_read: float = 0.0  # share of the file read so far


def digest_of(text: str) -> int:
    """Return a 64-bit hash of the text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def text_of(unit: Unit, field: str) -> str:
    """Return the text of a unit; raises ValueError with the reason if there is none."""
    if unit.problem:
        raise ValueError(unit.problem)
    try:
        text = unit.raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error, len(unit.raw))) from error
    if unit.is_json and not text.isspace():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("is not JSON") from error
        if not isinstance(value, dict):
            raise ValueError("is JSON but not an object")
        if field not in value:
            raise ValueError(f"has no {without(field, value)}")
        text = "" if value[field] is None else value[field]
        if not isinstance(text, str):
            raise ValueError(f"has a {field!r} that is not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("has half a surrogate pair, which is not a character") from error
    return text


def without(field: str, names: Iterable[str]) -> str:
    """Describe a missing field and the fields that exist, for messages."""
    others = [repr(name[:40]) for name in names]
    told = ", ".join(others[:5] + ["..."] * (len(others) > 5))
    return repr(field) + (f", only {told}" if others else "")


def first_share(length: int) -> int:
    """Return how many characters of a document are for training if every document is split."""
    return length - length // LAST_SHARE


def not_utf8(error: UnicodeDecodeError, end: int) -> str:
    """Describe a decoding error; the decoder has seen the file's bytes before `end`."""
    return f"is not UTF-8 at byte {end - len(error.object) + error.start:,}"
