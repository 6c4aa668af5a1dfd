"""The decompressed bytes of a file, which is refused if its first bytes are not text."""

import bz2
import gzip
import io
import lzma
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

BEGINNING = 512  # bytes that identify a format
STEP = 2**16  # bytes to decompress at a time

# The first bytes of files that cannot be read as text, and the message for each.
FORMATS = {
    rb"PK\x03\x04": "is a ZIP archive (as .docx, .xlsx and .epub are): unpack it, or save its text",
    rb".{257}ustar": "is a tar archive, which is not supported: unpack it",
    rb"Rar!\x1a|7z\xbc\xaf\x27\x1c": "is an archive, which is not supported: unpack it",
    rb"%PDF-": "is a PDF, which is not supported: save its text",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP": "is an image, not text",
    rb"PAR1": "is a Parquet file: rename it to .parquet",
    rb"\x1f\x8b": "is compressed with gzip: rename it to .gz",
    rb"BZh[1-9]1AY&SY": "is compressed with bzip2: rename it to .bz2",
    rb"\xfd7zXZ\0": "is compressed with xz: rename it to .xz",
    rb"\x28\xb5\x2f\xfd": "is compressed with zstd: rename it to .zst",
    rb"\xff\xfe|\xfe\xff": "is UTF-16: save it as UTF-8",
}


def suffixes(file: Path) -> set[str]:
    """Return the formats in a file's name: .jsonl and .gz for x.jsonl.gz."""
    last = file.suffix.lower()
    return {last, Path(file.stem).suffix.lower()} if last in UNPACKED else {last}


@contextmanager
def unpacked(path: Path) -> Generator[tuple[IO[bytes], Callable[[], float]], None, None]:
    """Open a file, decompressed by its suffix; also yield a function that returns the share read.

    Raises ValueError, with a message about the file, if it does not begin like text.
    """
    with path.open("rb") as file:
        size = max(1, os.fstat(file.fileno()).st_size)
        unpack = UNPACKED.get(path.suffix.lower())
        stream: Any = unpack(file) if unpack else file
        with stream:
            beginning = stream.peek(BEGINNING)[:BEGINNING]
            for begins, said in FORMATS.items():
                if re.match(begins, beginning, re.DOTALL):
                    raise ValueError(said)
            yield stream, lambda: file.tell() / size


class ZstdStream(io.RawIOBase):
    """The decompressed bytes of a zstd file, up to the point of damage if there is any.

    pyarrow reports damage, but discards what it decompressed in the same read.
    """

    def __init__(self, file: IO[bytes]):
        import pyarrow

        self._streams = [pyarrow.input_stream(file, "zstd")]
        self._file, self._given = file, 0
        self._damage: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._damage:
            raise self._damage
        wanted = min(len(buffer), STEP)
        try:
            data = self._streams[0].read(wanted)
        except OSError as error:
            self._damage = error
            data = self._before_damage(wanted)
        self._given += len(data)
        buffer[: len(data)] = data
        if self._damage and not data:
            raise self._damage
        return len(data)

    def _before_damage(self, wanted: int) -> bytes:
        """Read the last bytes before the damage, fewer than `wanted`, one by one."""
        import pyarrow

        self._file.seek(0)
        # Kept referenced: a stream that is collected closes the file.
        self._streams.append(pyarrow.input_stream(self._file, "zstd"))
        again, data = self._streams[1], bytearray()
        for start in range(0, self._given, STEP):
            again.read(min(STEP, self._given - start))
        with suppress(OSError):
            while len(data) < wanted and (byte := again.read(1)):
                data += byte
        return bytes(data)


UNPACKED: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(ZstdStream(file)),
}
