"""Download the tokenized FineWeb10B: the validation shard, then N training shards.

    python3 cached_fineweb10B.py 12    # 1.2 billion training tokens, 2.6 GB in all
    python3 cached_fineweb10B.py       # all 103 training shards, 20.7 GB in all

A shard gets its final name only when its size and SHA-256 match the hub's and its header is valid,
so every file that matches fineweb10B/fineweb_*.bin is complete. If it is interrupted, run it again:
it continues where it stopped.
"""

import nanogpt  # explains what to do if packages are missing

# isort: split
import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from nanogpt.checks import UserError
from nanogpt.data.hub import DownloadError, patiently
from nanogpt.data.shards import ShardError, note_sha256, read_shard
from nanogpt.files import cannot_write, sha256_of

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAINING_SHARDS = 103


SLOW = 60  # seconds over which the speed of a download is measured
LEAST = 1000  # bytes per second; give up on a slower download


class Published(NamedTuple):
    """The size and hash of a shard according to the hub."""

    size: int  # bytes
    sha256: str  # 64 hexadecimal digits


def main(argv: list[str] | None = None) -> int:
    """Download the shards that the command line asks for; return the exit status."""
    options = parse(argv)
    nanogpt.imported()
    training = [f"fineweb_train_{i:06d}.bin" for i in range(1, options.shards + 1)]
    try:
        download(["fineweb_val_000000.bin", *training], options.folder)
    except KeyboardInterrupt:
        print("\nInterrupted; run this again to continue where it stopped.", file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        otherwise = "choose another --folder, then run this again"
        print(cannot_write(options.folder, error, otherwise), file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"{message}; see --help.\n")

    def shard_count(text: str) -> int:
        if not (text.isdecimal() and 1 <= int(text) <= TRAINING_SHARDS):
            raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {TRAINING_SHARDS}")
        return int(text)

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shards",
        metavar="N",
        nargs="?",
        type=shard_count,
        default=TRAINING_SHARDS,
        help="training shards of 100 million tokens, 200 MB each (default: all %(default)s)",
    )
    parser.add_argument(
        "--folder",
        metavar="PATH",
        type=Path,
        default=Path("fineweb10B"),
        help="folder for the shards (default: %(default)s)",
    )
    return parser.parse_args(argv)


def download(names: list[str], folder: Path) -> None:
    """Download the shards `names` into `folder`, printing a line for each."""
    published = {name: look_up(name) for name in names if not is_whole(folder / name)}
    folder.mkdir(parents=True, exist_ok=True)
    check_space(published, folder)
    for i, name in enumerate(names, start=1):
        if name in published:
            fetch(name, published[name], folder)
        outcome = "verified" if name in published else "already here"
        megabytes = (folder / name).stat().st_size / 1e6
        print(f"{i}/{len(names)} {name} {megabytes:.1f} MB {outcome}", flush=True)


def is_whole(path: Path) -> bool:
    """Return whether the shard exists and has the length that its header states."""
    try:
        read_shard(path)
    except ShardError:
        return False
    return True


def look_up(name: str) -> Published:
    """Ask the hub for the size and SHA-256 of the shard `name`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(REPOSITORY, name, repo_type="dataset")
    file = patiently(name, lambda: get_hf_file_metadata(url))
    # The ETag of a large file is its SHA-256; an answer with any other tag is not the hub's.
    if file.size is None or file.etag is None or not re.fullmatch("[0-9a-f]{64}", file.etag):
        raise DownloadError(
            f"The answer about {name} has no size and SHA-256: check that HF_ENDPOINT, if set, "
            "is a hub and that no proxy or login page intercepts the connection."
        )
    return Published(file.size, file.etag)


def check_space(published: dict[str, Published], folder: Path) -> None:
    """Raise DownloadError unless the remaining bytes fit on the disk of `folder`."""
    partials = [path for name in published if (path := partial_path(folder, name)).exists()]
    here = sum(path.stat().st_size for path in partials)
    needed = sum(shard.size for shard in published.values()) - here
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"The download needs {needed / 1e9:.1f} GB but {folder} has {free / 1e9:.1f} GB free: "
            "make room, choose another --folder, or ask for fewer shards."
        )


def partial_path(folder: Path, name: str) -> Path:
    """Return the file of an unfinished download: hidden, so that no shard pattern matches it."""
    return folder / f".{name}.partial"


def fetch(name: str, published: Published, folder: Path) -> None:
    """Download the shard `name` or the rest of it, verify it, and only then rename it."""
    from huggingface_hub.utils import WeakFileLock

    partial = partial_path(folder, name)
    with WeakFileLock(folder / ".lock"):  # waits for other downloads into this folder
        if is_whole(folder / name):  # another download completed it
            return
        if partial.exists() and partial.stat().st_size > published.size:
            partial.unlink()
        with partial.open("ab") as file, progress_bar(name, published.size) as show:
            download = Download(name, published.size, file, show)
            patiently(name, download.rest, came=file.tell)
            file.flush()
            os.fsync(file.fileno())
        sha256 = sha256_of(partial)
        if sha256 != published.sha256:
            partial.unlink()
            raise DownloadError(
                f"{name} arrived damaged (its SHA-256 is {sha256}, the hub's {published.sha256}) "
                "and was deleted: run this again to download it again."
            )
        if not is_whole(partial):
            partial.unlink()
            raise DownloadError(
                f"{name} is not a shard although it matches the hub's SHA-256: check that "
                "HF_ENDPOINT, if set, is a hub that has the real dataset."
            )
        note_sha256(folder / name, sha256)
        os.replace(partial, folder / name)


class Download:
    """The download of a shard into a file, which keeps every byte received.

    The hub's library keeps only complete pieces of 10 MiB, and does not limit the size.
    """

    def __init__(self, name: str, size: int, file: BinaryIO, show: Callable[[int], None]):
        """Continue after the bytes in `file`; `show` is called with the number of bytes so far."""
        self.name, self.size, self.file, self.show = name, size, file, show
        self.since, self.had = time.monotonic(), file.tell()

    def rest(self) -> None:
        """Download the missing bytes. Raises DownloadError, or the errors of the hub's library."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        if self.file.tell() == self.size:
            return
        url = hf_hub_url(REPOSITORY, self.name, repo_type="dataset")
        headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
        if self.file.tell():
            headers["Range"] = f"bytes={self.file.tell()}-"
        wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=wait) as answer:
            hf_raise_for_status(answer)
            if answer.status_code == 200:  # the whole file, not only the rest
                self.file.seek(0)
                self.file.truncate()
                self.had = 0
            for piece in answer.iter_bytes():
                self.file.write(piece)
                self.show(self.file.tell())
                self.check()
        if self.file.tell() < self.size:
            raise ConnectionError(f"it ended before all {self.size:,} bytes arrived")

    def check(self) -> None:
        """Raise DownloadError if the download is longer than published, or too slow."""
        if self.file.tell() > self.size:
            self.file.truncate(0)
            raise DownloadError(
                f"{self.name} is longer than the hub's {self.size:,} bytes: check that "
                "HF_ENDPOINT, if set, is a hub, then run this again to download it again."
            )
        seconds = time.monotonic() - self.since
        if seconds > SLOW:
            speed = (self.file.tell() - self.had) / seconds
            if speed < LEAST:
                raise DownloadError(
                    f"{self.name} arrives at {speed:.0f} bytes per second, which is too slow: run "
                    "this again later to continue where it stopped."
                )
            self.since, self.had = time.monotonic(), self.file.tell()


@contextmanager
def progress_bar(name: str, size: int) -> Generator[Callable[[int], None], None, None]:
    """Show a progress bar if there is a terminal; yields a function to set its number of bytes."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task(name, total=size)
        yield lambda count: progress.update(task, completed=count)


if __name__ == "__main__":
    sys.exit(main())
