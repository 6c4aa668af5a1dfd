"""Documents: where they come from, and which are for validation."""

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

VALIDATION = 100  # one document in so many is for validation, by its hash ...
FEW = 1000  # ... unless there are fewer than these ...
LAST_SHARE = 10  # ... of which one character in so many is


class DataError(UserError):
    """Inputs that cannot be made into shards; the message is one sentence for the user."""


class Files(NamedTuple):
    """Files on this machine, in the order in which they are read."""

    names: list[str]
    weights: list[int]  # bytes: what each counts for in the progress shown
    fingerprint: str  # changes with any name, size or time of modification

    def get(self, name: str) -> Path:
        """Where the file lies."""
        return Path(name)

    def release(self, names: Sequence[str]) -> None:
        """Called when the documents of these files are in the shards."""


def find_files(inputs: Sequence[str], leave_out: Path | None = None) -> Files:
    """The files that `inputs` name: files, folders with all below them, and globs.

    In the order of the inputs, within each by name, none twice. What a folder holds under a name
    that begins with a dot stays out, as does the folder `leave_out`. Raises DataError for an input
    that names no file, and for a file that needs a package which is not installed.
    """
    found: dict[str, Path] = {}
    for given in inputs:
        places = matches(given)
        files = sorted({file for place in places for file in files_below(place, leave_out)})
        if len(places) == len(files) == 1 and (problem := why_no_file(files[0])):
            raise DataError(f"{given} {problem}: name a file, which may be packed.")
        if not files:
            raise DataError(f"{given} (seen from {Path.cwd()}) names no file: check the path.")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    for file in found.values():
        kinds = suffixes(file)
        if kinds & {".parquet", ".pq", ".zst"} and find_spec("pyarrow") is None:
            raise DataError(f"To read {file}, run `pip install pyarrow`.")
        if kinds & {".parquet", ".pq"} and len(kinds) > 1:
            raise DataError(f"{file} is a packed Parquet file, which cannot be read: unpack it.")
    facts = [*map(_facts, found.values())]
    fingerprint = sha256(json.dumps(facts).encode()).hexdigest()
    return Files([name for name, _, _ in facts], [size for _, size, _ in facts], fingerprint)


def _facts(file: Path) -> tuple[str, int, int]:
    """Name, size and time of modification; zeros where there is nothing, which is told later."""
    try:
        status = file.stat()
    except OSError:
        return str(file), 0, 0
    return str(file), status.st_size, status.st_mtime_ns


class Split(NamedTuple):
    """Which documents are for validation."""

    below: int | None  # those whose digest is less; None: the last tenth of every document

    def is_validation(self, digest: int) -> bool:
        """Whether a document is, all of it."""
        return self.below is not None and digest < self.below


def find_split(documents: Iterable[tuple[int, int]]) -> Split | None:
    """The split of documents (digest, characters), of which it reads no more than it needs.

    By its digest one document in a hundred is for validation. Where there are few, it is those
    with the least digests that have a tenth of the text, or, where they would have more than twice
    as much, the last tenth of every document. None if there is no document.
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
    """A document, a part of a long one, or why there is none here."""

    where: str  # file, and line or row: for messages
    raw: bytes = b""  # the text, or JSON with it
    is_json: bool = False
    problem: str = ""  # why there is no document here
    digest: int | None = None  # of the whole document, where that is known already
    begins: bool = True  # a document, as opposed to the rest of one
    length: int = 0  # characters of the whole document, where they are known
    is_last_share: bool = False  # the part of a document that is for validation
    share_read: float = 0.0  # of the file, up to here


def digest_of(text: str) -> int:
    """64 bits that depend on the text alone."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def text_of(unit: Unit, field: str) -> str:
    """The text of a unit; ValueError with the reason where there is none."""
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
            raise ValueError("is JSON, but no object")
        if field not in value:
            raise ValueError(f"has no {without(field, value)}")
        text = "" if value[field] is None else value[field]
        if not isinstance(text, str):
            raise ValueError(f"has a {field!r} that is not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("has half a surrogate pair, which is no character") from error
    return text


def without(field: str, names: Iterable[str]) -> str:
    """What is wrong where there is no such field, but these."""
    others = [repr(name[:40]) for name in names]
    told = ", ".join(others[:5] + ["..."] * (len(others) > 5))
    return repr(field) + (f", only {told}" if others else "")


def first_share(length: int) -> int:
    """How many characters of a document are for training where all are divided."""
    return length - length // LAST_SHARE


def not_utf8(error: UnicodeDecodeError, end: int) -> str:
    """What is wrong with bytes of which the last that the decoder saw came before byte `end`."""
    return f"is not UTF-8 at byte {end - len(error.object) + error.start:,}"
