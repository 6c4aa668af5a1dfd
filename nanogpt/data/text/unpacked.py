"""The bytes of a file, unpacked as its name says; what is no text by its first bytes is refused."""

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

BEGINNING = 512  # bytes in which a format shows
STEP = 2**16  # bytes that are unpacked at a time

# How files begin that hold no text that can be read here, and what to say of them.
FORMATS = {
    rb"PK\x03\x04": "is a ZIP archive (as .docx, .xlsx and .epub are): unpack it, or save its text",
    rb".{257}ustar": "is a tar archive, which is not read: unpack it",
    rb"Rar!\x1a|7z\xbc\xaf\x27\x1c": "is an archive, which is not read: unpack it",
    rb"%PDF-": "is a PDF, which is not read: save its text",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP": "is an image, which is not read",
    rb"PAR1": "is Parquet: name it .parquet",
    rb"\x1f\x8b": "is packed with gzip: name it .gz",
    rb"BZh[1-9]1AY&SY": "is packed with bzip2: name it .bz2",
    rb"\xfd7zXZ\0": "is packed with xz: name it .xz",
    rb"\x28\xb5\x2f\xfd": "is packed with zstd: name it .zst",
    rb"\xff\xfe|\xfe\xff": "is UTF-16: save it as UTF-8",
}


def suffixes(file: Path) -> set[str]:
    """The kinds of a file that its name tells: .jsonl and .gz, of x.jsonl.gz."""
    last = file.suffix.lower()
    return {last, Path(file.stem).suffix.lower()} if last in UNPACKED else {last}


@contextmanager
def unpacked(path: Path) -> Generator[tuple[IO[bytes], Callable[[], float]], None, None]:
    """The bytes of a file, unpacked by its suffix, and a function that tells the share read.

    Raises ValueError, with what is wrong, if they begin like no text.
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
    """What a file packed with zstd holds, up to the damage if there is some.

    pyarrow tells a file that was cut short, but gives nothing of what it unpacked with the damage.
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
        """The last bytes before the damage, fewer than `wanted`, one by one."""
        import pyarrow

        self._file.seek(0)
        self._streams.append(pyarrow.input_stream(self._file, "zstd"))  # kept: it closes the file
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
