"""Reading the documents in a file, by its format.

    x.parquet, x.pq    one document per row, from column `field`
    x.csv, x.tsv       the same, with the names of the columns in the first line
    x.jsonl, x.ndjson  one document per line, from member `field` of its object
    x.json             the same for each object in an array or in a sequence of objects
    any other name     one document

All but Parquet may be compressed (x.txt.gz, x.jsonl.zst, x.csv.bz2, x.xz). All text is UTF-8. Any
line, row or file that cannot be read is left out and reported; reading always continues.

Files are read in pieces, so that memory is bounded whatever their size: long text files are cut
only where tokenizers have a boundary anyway. What must be held in memory as a whole, a line, a row
or text without such a boundary, can have at most LONGEST characters.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO

from nanogpt.checks import shown
from nanogpt.data.find import why_no_file
from nanogpt.data.text.documents import Split, Unit, first_share, not_utf8, without
from nanogpt.data.text.unpacked import suffixes, unpacked

PIECE = 2**20  # bytes of a file, or characters of a long document, processed at a time
ROWS = 256  # rows of a Parquet file read at a time
LONGEST = 2**26
TOO_LONG = f"is longer than {LONGEST:,} characters"

# No match of GPT-2's pattern for splitting text crosses from other characters into white space, so
# encoding the parts before and after separately gives the tokens of the whole.
CUT = re.compile(r"(?s).*\S(?=[ \n])")

CONTROL = bytes([*range(9), *range(14, 28), 127])  # control characters, white space excluded
MOST_CONTROL = 0.01  # largest share of a text's bytes

csv.field_size_limit(LONGEST)


def units(path: Path, field: str, split: Split | None) -> Iterator[Unit]:
    """Yield the units of a file. Without a `split`, long documents have a digest but no text.

    If a file cannot be read, or only in part, the last unit says why.
    """
    kinds = suffixes(path)
    try:
        if problem := why_no_file(path):
            raise ValueError(problem)
        if kinds & {".parquet", ".pq"}:
            yield from _rows(path, field)
        elif kinds & {".csv", ".tsv"}:
            yield from _table(path, field, "excel" if ".csv" in kinds else UnquotedTable)
        elif kinds & {".jsonl", ".ndjson"}:
            yield from _lines(path)
        elif ".json" in kinds:
            yield from _values(path)
        else:
            yield from _text(path, split)
    except Exception as error:  # those of gzip, pyarrow and the file system share no base class
        reason = error.strerror if isinstance(error, OSError) else None
        yield Unit(shown(path), problem=str(reason or error or type(error).__name__))


def _rows(path: Path, field: str) -> Iterator[Unit]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, buffer_size=PIECE, pre_buffer=False) as file:
        if field not in file.schema_arrow.names:
            raise ValueError(f"has no column {without(field, file.schema_arrow.names)}")
        row = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
            # As bytes, since the file's strings are not guaranteed to be UTF-8.
            for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                row += 1
                unit = Unit(f"{shown(path)}, row {row:,}", raw or b"")
                if len(unit.raw) > LONGEST:
                    unit = unit._replace(raw=b"", problem=TOO_LONG)
                yield unit._replace(share_read=row / file.metadata.num_rows)


class UnquotedTable(csv.excel_tab):
    """A table in which each line is a row: in .tsv files, quotation marks are ordinary text."""

    quoting = csv.QUOTE_NONE


def _table(path: Path, field: str, dialect: str | type[csv.Dialect]) -> Iterator[Unit]:
    with unpacked(path) as (file, share_read):
        whole = (line.decode("utf-8", "surrogateescape") for line in _short_lines(file))
        rows = csv.reader(whole, dialect, strict=True)
        columns = [name.removeprefix("\ufeff") for name in next(rows, [])]
        if field not in columns:
            raise ValueError(f"has no column {without(field, columns)}")
        for row in rows:
            unit = Unit(f"{shown(path)}, line {rows.line_num:,}", share_read=share_read())
            if len(row) == len(columns):
                text = row[columns.index(field)]
                unit = unit._replace(raw=text.encode("utf-8", "surrogateescape"))
            elif row:
                problem = f"has {len(row):,} instead of {len(columns):,} columns"
                unit = unit._replace(problem=problem)
            yield unit


def _short_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file; raises ValueError at one that is too long."""
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(f"has a line that {TOO_LONG}")
        yield line


def _lines(path: Path) -> Iterator[Unit]:
    number = 0
    with unpacked(path) as (file, share_read):
        while line := file.readline(LONGEST + 1):
            number += 1
            unit = Unit(f"{shown(path)}, line {number:,}", line, is_json=True)
            if len(line) > LONGEST:
                unit = unit._replace(raw=b"", problem=TOO_LONG)
                while line and not line.endswith(b"\n"):
                    line = file.readline(PIECE)
            yield unit._replace(share_read=share_read())


def _values(path: Path) -> Iterator[Unit]:
    scan = json.JSONDecoder().raw_decode
    text, enough, number, is_array = "", 1, 0, False
    for piece, share in _pieces(path):
        text += piece
        if piece and len(text) < enough:
            continue
        if number == 0 and not is_array:
            text = text.lstrip()
            is_array = text.startswith("[")
            text = text[is_array:]
        end = _next(text, 0)
        with suppress(ValueError, RecursionError):  # the value continues in the next piece
            while not (is_array and text.startswith("]", end)):
                start, (_, end) = end, scan(text, end)
                number += 1
                raw = text[start:end].encode()
                yield Unit(f"{shown(path)}, entry {number:,}", raw, is_json=True, share_read=share)
                end = _next(text, end)
            return
        text = text[end:]
        enough = 2 * len(text)  # avoids scanning a long value again for every piece
        if len(text) > LONGEST:
            raise ValueError(f"has an entry that {TOO_LONG}")
    if text or is_array:
        raise ValueError(f"is not JSON after entry {number:,}" if number else "is not JSON")


def _next(text: str, start: int) -> int:
    """Return where the next JSON value begins."""
    while text[start : start + 1] in (" ", "\t", "\n", "\r", ","):
        start += 1
    return start


def _text(path: Path, split: Split | None) -> Iterator[Unit]:
    with unpacked(path) as (file, _):
        beginning = file.read(PIECE + 1)
    if len(beginning) <= PIECE:
        _refuse_control(beginning.count(0), _controls(beginning), len(beginning))
        yield Unit(shown(path), beginning)
        return
    # The digest and the check for text need the whole document, so a long one is read twice.
    digest, length, num_bytes, zeros, controls = blake2b(digest_size=8), 0, 0, 0, 0
    for text, _ in _parts(path):
        raw = text.encode()
        digest.update(raw)
        length += len(text)
        num_bytes += len(raw)
        zeros += raw.count(0)
        controls += _controls(raw)
    _refuse_control(zeros, controls, num_bytes)
    whole = Unit(shown(path), digest=int.from_bytes(digest.digest()), length=length)
    yield from [whole] if split is None else _divided(whole, path, split)


def _controls(raw: bytes) -> int:
    return len(raw) - len(raw.translate(None, CONTROL))


def _refuse_control(zeros: int, controls: int, num_bytes: int) -> None:
    """Raise ValueError if bytes are not text, judged by the control characters among them."""
    if zeros:
        raise ValueError("has NUL bytes, so it is not text")
    if controls > MOST_CONTROL * num_bytes:
        share = controls / num_bytes
        raise ValueError(f"has {share:.0%} control characters, so it is not text")


def _divided(whole: Unit, path: Path, split: Split) -> Iterator[Unit]:
    """Yield the parts of a long document, with the last tenth separate if the split requires it."""
    left = first_share(whole.length) if split.below is None else whole.length
    unit = whole
    for text, share in _parts(path):
        if len(text) > left:
            yield unit._replace(raw=text[:left].encode(), share_read=share)
            text, left = text[left:], whole.length
            unit = whole._replace(is_last_share=True)
        yield unit._replace(raw=text.encode(), share_read=share)
        left -= len(text)
        unit = unit._replace(begins=False)


def _parts(path: Path) -> Iterator[tuple[str, float]]:
    """Yield a file's text in parts that can be encoded separately, with the share read."""
    held, size, last, share = [], 0, "", 0.0
    for text, share in _pieces(path):
        if cut := CUT.match(last + text):
            end = cut.end() - len(last)
            yield "".join([*held, text[:end]]), share
            held, size, text = [], 0, text[end:]
        held.append(text)
        size += len(text)
        last = text[-1:] or last
        if size > LONGEST:
            raise ValueError(f"has text without white space that {TOO_LONG}")
    if size:
        yield "".join(held), share


def _pieces(path: Path) -> Iterator[tuple[str, float]]:
    """Yield a file's text in pieces, with the share read; raises ValueError if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    end = 0
    with unpacked(path) as (file, share_read):
        while True:
            data = file.read(PIECE)
            end += len(data)
            try:
                yield decoder.decode(data, final=not data), share_read()
            except UnicodeDecodeError as error:
                raise ValueError(not_utf8(error, end)) from error
            if not data:
                return
