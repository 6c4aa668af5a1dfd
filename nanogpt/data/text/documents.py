"""Documents from files: text, JSON lines and Parquet.

    x.parquet          a document per row: its column `field`
    x.jsonl, x.ndjson  a document per line: the member `field` of the object there
    any other name     one document

Text and JSON lines may be packed (x.txt.gz, x.jsonl.zst). All text is UTF-8. Whatever cannot be
read as that, a line or a row or a file, is left out and reported; it never ends the reading.

Files are read in pieces, so that memory is bounded by the longest line or row. A text file of any
length, too, is read in pieces, cut where the tokenizers see a boundary anyway.
"""

import codecs
import glob
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from nanogpt.checks import UserError

PIECE = 2**20  # bytes of a file, or characters of a long document, that are looked at in one go
ROWS = 256  # of a Parquet file
VALIDATION = 100  # one document in so many is for validation, by its hash ...
LAST_SHARE = 10  # ... and of a lone document the last one in so many characters

# Before white space after something else no pattern of GPT-2's byte-pair encoding reads on, so the
# tokens of two parts that meet there are the tokens of the whole.
CUT = re.compile(r"(?s).*\S(?=[ \n])")


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
    found: dict[Path, None] = {}
    for given in inputs:
        pattern = os.path.expanduser(given)
        places = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = sorted({file for place in places for file in _below(Path(place), leave_out)})
        if not files:
            raise DataError(f"{given} (seen from {Path.cwd()}) names no file: check the path.")
        found |= dict.fromkeys(files)
    for file in found:
        if suffixes(file) & {".parquet", ".zst"} and find_spec("pyarrow") is None:
            raise DataError(f"To read {file}, run `pip install pyarrow`.")
        if {".parquet"} < suffixes(file):
            raise DataError(f"{file} is a packed Parquet file, which cannot be read: unpack it.")
    try:
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}).") from error
    fingerprint = sha256(json.dumps(facts).encode()).hexdigest()
    return Files([name for name, _, _ in facts], [size for _, size, _ in facts], fingerprint)


def _below(place: Path, leave_out: Path | None) -> Iterator[Path]:
    """The file `place`, or the files in the folder `place`, by their absolute paths."""
    place = Path(os.path.abspath(place))
    if place.is_file():
        yield place
    for folder, folders, names in os.walk(place):
        here = Path(folder)
        folders[:] = [x for x in folders if x[0] != "." and here / x != leave_out]
        yield from (here / x for x in names if x[0] != "." and (here / x).is_file())


def suffixes(file: Path) -> set[str]:
    """The kinds of a file that its name tells: .jsonl and .gz, of x.jsonl.gz."""
    last = file.suffix.lower()
    packed = last in (".gz", ".zst")
    return {last, Path(file.stem).suffix.lower()} if packed else {last}


class Split(NamedTuple):
    """Which documents are for validation."""

    below: int | None  # those whose digest is less; None: the last tenth of the only document

    def is_validation(self, digest: int) -> bool:
        """Whether a document is, all of it."""
        return self.below is not None and digest < self.below


def find_split(digests: Iterable[int]) -> Split | None:
    """The split of documents with these digests, of which it reads no more than it needs.

    By its digest one document in a hundred is for validation. Where that would leave nothing on
    either side, it is the document with the least digest; where there is only one, the last tenth
    of its text. None if there is no document.
    """
    usual = 2**64 // VALIDATION
    least, most = 2**64, -1
    for digest in digests:
        least, most = min(least, digest), max(most, digest)
        if least < usual <= most:
            return Split(usual)
    if most < 0:
        return None
    return Split(None if least == most else least + 1)


class Unit(NamedTuple):
    """A document, a part of a long one, or why there is none here."""

    where: str  # file, and line or row: for messages
    raw: bytes = b""  # the text, or JSON with it
    is_json: bool = False
    problem: str = ""  # why there is no document here
    digest: int | None = None  # of the whole document, where that is known already
    begins: bool = True  # a document, as opposed to the rest of one
    is_last_share: bool = False  # the part of the only document that is for validation
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
        raise ValueError(_not_utf8(error, len(unit.raw))) from error
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


def units(path: Path, field: str, split: Split | None) -> Iterator[Unit]:
    """What is in a file, in its order. Without a `split` long documents have a digest but no text.

    A file that cannot be read, or only in part, ends with a unit that says why.
    """
    kinds = suffixes(path)
    try:
        if ".parquet" in kinds:
            yield from _rows(path, field)
        elif kinds & {".jsonl", ".ndjson"}:
            yield from _lines(path)
        else:
            yield from _text(path, split)
    except Exception as error:  # those of gzip, pyarrow and the file system share no base class
        reason = error.strerror if isinstance(error, OSError) else None
        yield Unit(str(path), problem=str(reason or error or type(error).__name__))


def _rows(path: Path, field: str) -> Iterator[Unit]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, buffer_size=PIECE, pre_buffer=False) as file:
        if field not in file.schema_arrow.names:
            raise ValueError(f"has no column {without(field, file.schema_arrow.names)}")
        row = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
            # As bytes, for nothing guarantees that the strings in the file are UTF-8.
            for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                row += 1
                share = row / file.metadata.num_rows
                yield Unit(f"{path}, row {row:,}", raw or b"", share_read=share)


def _lines(path: Path) -> Iterator[Unit]:
    with _unpacked(path) as (file, share_read):
        for number, line in enumerate(file, 1):
            yield Unit(f"{path}, line {number:,}", line, is_json=True, share_read=share_read())


def _text(path: Path, split: Split | None) -> Iterator[Unit]:
    with _unpacked(path) as (file, _):
        beginning = file.read(PIECE + 1)
    if len(beginning) <= PIECE:
        yield Unit(str(path), beginning)
        return
    # Only a whole document has a digest and is known to be UTF-8, so a long one is read twice.
    digest, length = blake2b(digest_size=8), 0
    for text, _ in _pieces(path):
        digest.update(text.encode())
        length += len(text)
    whole = Unit(str(path), digest=int.from_bytes(digest.digest()))
    yield from [whole] if split is None else _parts(whole, path, split, length)


def _parts(whole: Unit, path: Path, split: Split, length: int) -> Iterator[Unit]:
    """The parts of a long document, cut in two if it is the only one."""
    left = first_share(length) if split.below is None else length  # characters of this document
    unit, held = whole, ""
    for text, share in _pieces(path):
        held += text
        if len(held) > left:
            yield unit._replace(raw=held[:left].encode(), share_read=share)
            held, left = held[left:], length
            unit = whole._replace(is_last_share=True)
        if cut := CUT.match(held):
            yield unit._replace(raw=cut.group().encode(), share_read=share)
            held, left = held[cut.end() :], left - cut.end()
            unit = unit._replace(begins=False)
    yield unit._replace(raw=held.encode(), share_read=1.0)


def first_share(length: int) -> int:
    """How many characters of the only document are for training."""
    return length - length // LAST_SHARE


def _pieces(path: Path) -> Iterator[tuple[str, float]]:
    """The text of a file, piece by piece, with the share of the file read; ValueError if not."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    end = 0
    with _unpacked(path) as (file, share_read):
        while True:
            data = file.read(PIECE)
            end += len(data)
            try:
                yield decoder.decode(data, final=not data), share_read()
            except UnicodeDecodeError as error:
                raise ValueError(_not_utf8(error, end)) from error
            if not data:
                return


def _not_utf8(error: UnicodeDecodeError, end: int) -> str:
    """What is wrong with bytes of which the last that the decoder saw came before byte `end`."""
    return f"is not UTF-8 at byte {end - len(error.object) + error.start:,}"


@contextmanager
def _unpacked(path: Path) -> Generator[tuple[IO[bytes], Callable[[], float]], None, None]:
    """The bytes of a file, unpacked by its suffix, and a function that tells the share read."""
    with path.open("rb") as file:
        size = max(1, os.fstat(file.fileno()).st_size)
        stream: Any = file
        if path.suffix.lower() == ".gz":
            stream = gzip.GzipFile(fileobj=file)
        elif path.suffix.lower() == ".zst":
            import pyarrow  # its stream tells a file that was cut short, zstandard's does not

            stream = io.BufferedReader(pyarrow.input_stream(file, "zstd"))
        with stream:
            yield stream, lambda: file.tell() / size
